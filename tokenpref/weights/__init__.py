"""Token weights: estimators, and transforms from log ratios to weights."""

from __future__ import annotations

from tokenpref.weights.attribution import (
    AnswerLogp,
    GaussianPrior,
    MaxLogit,
    PreferenceMargin,
    attribution_weights,
    importances,
)
from tokenpref.weights.contrastive import answer_scores, contrastive_log_ratios
from tokenpref.weights.spans import values_of_tokens
from tokenpref.weights.transforms import (
    SCORE_KINDS,
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
    "AnswerLogp",
    "GaussianPrior",
    "MaxLogit",
    "PreferenceMargin",
    "TransformedWeights",
    "answer_scores",
    "attribution_weights",
    "binary",
    "contrastive_log_ratios",
    "exponential",
    "importances",
    "normalized",
    "random",
    "rank_based",
    "threshold",
    "threshold_and_scale",
    "uniform",
    "values_of_tokens",
]
