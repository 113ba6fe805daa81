"""Confidence intervals of shares and means."""

from __future__ import annotations

import math

__all__ = ["mean_interval", "wilson_interval"]


def wilson_interval(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion (95 % with the default ``z``).

    Args:
        share: observed proportion.
        count: number of observations, at least 1.
        z: normal quantile.

    Returns:
        Lower and upper bound.
    """
    centre = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return (centre - half) / scale, (centre + half) / scale


def mean_interval(values: list[float], z: float = 1.96) -> tuple[float, float, float]:
    """Mean and its normal interval (95 % for the default ``z``).

    Args:
        values: at least two observations.
        z: normal quantile.

    Returns:
        Mean, lower and upper bound.
    """
    n = len(values)
    if n < 2:
        raise ValueError(f"an interval needs at least two values, got {n}")
    mean = sum(values) / n
    half = z * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
    return mean, mean - half, mean + half
