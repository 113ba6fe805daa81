"""Exact rank measures with ties, and curves read at a given KL. NumPy alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["at_level", "auc", "average_ranks", "spearman"]


def average_ranks(values: np.ndarray) -> np.ndarray:
    """Ascending ranks from 1; equal values share their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((2 * last - counts + 1) / 2)[inverse.reshape(-1)]


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a random positive scores above a random negative, a tie counting one half.

    Args:
        scores: ``[N]``.
        positive: ``[N]`` bool.

    Returns:
        The area under the ROC curve; nan if one of the two classes is empty.
    """
    count, others = int(positive.sum()), int((~positive).sum())
    if count == 0 or others == 0:
        return float("nan")
    rank_sum = average_ranks(scores)[positive].sum()
    return float((rank_sum - count * (count + 1) / 2) / (count * others))


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation of average ranks; nan if one of the two is constant."""
    ranks = [average_ranks(x) - (len(x) + 1) / 2 for x in (a, b)]
    norm = float(np.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum()))
    return float((ranks[0] * ranks[1]).sum() / norm) if norm > 0 else float("nan")


def at_level(curve: Sequence[tuple[float, float, float]], level: float) -> tuple[float, float] | None:
    """Value of a curve where it first reaches a KL, linearly between checkpoints.

    Args:
        curve: (kl, value, half-width of the value's interval) in the order of training.
        level: the KL.

    Returns:
        Value and half-width there (the half-width interpolated too, which is never too small for independent ends);
        None where no two neighbouring checkpoints enclose the level.
    """
    for (kl, value, half), (next_kl, next_value, next_half) in zip(curve, curve[1:], strict=False):
        if kl <= level <= next_kl and next_kl > kl:
            share = (level - kl) / (next_kl - kl)
            return value + share * (next_value - value), half + share * (next_half - half)
    return None
