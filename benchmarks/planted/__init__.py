"""Planted rewards: preference pairs with a known reward per token, and a model small enough to train in minutes.

Run ``python -m benchmarks.planted`` in the repository's root. :mod:`benchmarks.planted.task` defines the reward.
"""
