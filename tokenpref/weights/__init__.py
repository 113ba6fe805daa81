"""Token weights: estimators, and transforms from log ratios to weights."""

from __future__ import annotations

from tokenpref.weights.transforms import (
    TransformedWeights,
    binary,
    exponential,
    random,
    rank_based,
    threshold,
    threshold_and_scale,
    uniform,
)

__all__ = [
    "TransformedWeights",
    "binary",
    "exponential",
    "random",
    "rank_based",
    "threshold",
    "threshold_and_scale",
    "uniform",
]
