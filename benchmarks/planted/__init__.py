"""Planted rewards: preference pairs whose per-token truth is known, on a model small enough for minutes.

``python -m benchmarks.planted`` from the repository's root; :mod:`benchmarks.planted.task` says what is planted.
"""
