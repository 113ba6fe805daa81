"""Token weights: estimators, and transforms from log ratios to weights."""

from __future__ import annotations

from tokenpref.weights.contrastive import answer_scores, contrastive_log_ratios
from tokenpref.weights.spans import values_of_tokens
from tokenpref.weights.store import SCORE_KINDS, StoredRow, StoreWriter, WeightStore
from tokenpref.weights.transforms import (
    TransformedWeights,
    binary,
    exponential,
    normalized,
    random,
    rank_based,
    threshold,
    threshold_and_scale,
    uniform,
)

__all__ = [
    "SCORE_KINDS",
    "StoreWriter",
    "StoredRow",
    "WeightStore",
    "answer_scores",
    "contrastive_log_ratios",
    "TransformedWeights",
    "binary",
    "exponential",
    "normalized",
    "random",
    "rank_based",
    "threshold",
    "threshold_and_scale",
    "uniform",
    "values_of_tokens",
]
