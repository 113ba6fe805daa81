"""Held-out measures and samples, during training and of a trained model."""
