"""Contrastive pairs, and the token weights that they or attribution give."""
