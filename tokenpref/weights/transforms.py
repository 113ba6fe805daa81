"""Transforms from log ratios of a contrastive pair to token weights (TIS-DPO, arXiv 2410.04350, and its released code).

Every transform takes ``log_ratio = log pi+(y_t | x, y_<t) - log pi-(y_t | x, y_<t)`` ``[B, T]`` of one side's answers.
The rejected side uses the negated ratio, which is called the trust of a token. On both sides a larger trust gives a larger
weight: the token is pushed up more on the chosen side, and down more on the rejected side. Padding (mask False) is ignored
and gets weight 0. No gradient flows through a transform.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tokenpref._checks import check_choice, check_number, check_ordered

__all__ = [
    "SCORE_KINDS",
    "TransformedWeights",
    "binary",
    "exponential",
    "normalized",
    "random",
    "rank_based",
    "threshold",
    "threshold_and_scale",
    "uniform",
]

SIDES = ("chosen", "rejected")
TIES = ("average", "position")


class TransformedWeights(NamedTuple):
    """Weights of one side's answers.

    Args:
        weights: ``[B, T]``, float32 or float64, 0 outside the mask.
        clipped: ``[B, T]`` bool, True where the ratio was clipped at a bound.
    """

    weights: Tensor
    clipped: Tensor


def exponential(
    log_ratio: Tensor,
    mask: Tensor,
    *,
    side: str,
    k: float = 1.0,
    mu: float = 1.0,
    lower: float = -0.5,
    upper: float = 1.5,
) -> TransformedWeights:
    """The paper's weights: k exp(mu x) on the chosen side, k exp(-mu x) on the rejected side.

    Here x = clamp(ratio, lower, upper), so the ratio is clamped before its sign changes. With the defaults, chosen weights
    lie in [exp(-0.5), exp(1.5)] = [0.607, 4.482] and rejected ones in [exp(-1.5), exp(0.5)] = [0.223, 1.649]. They are
    not normalised, so they also change the effective beta. The paper's form with k = 1, mu = 1 and these bounds is
    known to us from reviews and re-implementations; the released code has no such transform.

    Args:
        log_ratio: log pi+ - log pi-, ``[B, T]``.
        mask: ``[B, T]`` bool, True on the answer's tokens.
        side: "chosen" or "rejected".
        k: weight at ratio 0, > 0.
        mu: steepness, >= 0.
        lower: lower bound of the ratio.
        upper: upper bound of the ratio.

    Returns:
        Weights, and where the ratio was outside the bounds.

    Raises:
        ValueError: for a value out of its range, lower >= upper, or a ratio that is not finite.
    """
    ratio, sign = _checked(log_ratio, mask, side)
    k, mu = check_number("k", k, above=0), check_number("mu", mu, at_least=0)
    lower, upper = _interval("lower", lower, "upper", upper)
    weights = k * torch.exp(sign * mu * ratio.clamp(lower, upper))
    return _masked(weights, mask, (ratio < lower) | (ratio > upper))


def rank_based(
    log_ratio: Tensor,
    mask: Tensor,
    *,
    side: str,
    min_scale: float = 0.7,
    max_scale: float = 1.3,
    ties: str = "average",
) -> TransformedWeights:
    """The ascending rank in the answer, mapped evenly onto [min_scale, max_scale]; the method that the released code recommends.

    With n >= 2 tokens the weights' mean is exactly (min_scale + max_scale) / 2. Only the order of the ratios matters.

    Args:
        log_ratio: log pi+ - log pi-, ``[B, T]``.
        mask: ``[B, T]`` bool, True on the answer's tokens.
        side: "chosen" or "rejected".
        min_scale: weight of the least trusted token, >= 0.
        max_scale: weight of the most trusted token.
        ties: "average": equal ratios share their mean rank, and an answer of one token gets the middle of the range;
            "position": the later of equal ratios ranks higher, and an answer of one token gets 1 (the released code).

    Returns:
        Weights; nothing is clipped.

    Raises:
        ValueError: for a value out of its range, min_scale > max_scale, or a ratio that is not finite.
    """
    ratio, sign = _checked(log_ratio, mask, side)
    min_scale, max_scale = _scale(min_scale, max_scale)
    check_choice("ties", ties, TIES)
    trust = sign * ratio
    count = mask.sum(-1, keepdim=True)
    rank = _average_rank(trust, mask) if ties == "average" else _position_rank(trust, mask)
    share = torch.where(count > 1, rank / (count - 1).clamp(min=1), 0.5)
    weights = min_scale + (max_scale - min_scale) * share
    if ties == "position":
        weights = torch.where(count > 1, weights, 1)
    return _masked(weights, mask)


def threshold_and_scale(
    log_ratio: Tensor,
    mask: Tensor,
    *,
    side: str,
    min_val: float = -1.5,
    max_val: float = 1.5,
    min_scale: float = 0.7,
    max_scale: float = 1.3,
) -> TransformedWeights:
    """The trust clipped to [min_val, max_val], then mapped linearly onto [min_scale, max_scale] (released code).

    Args:
        log_ratio: log pi+ - log pi-, ``[B, T]``.
        mask: ``[B, T]`` bool, True on the answer's tokens.
        side: "chosen" or "rejected".
        min_val: lower bound of the ratio (of the negated ratio on the rejected side).
        max_val: its upper bound.
        min_scale: weight at min_val, >= 0.
        max_scale: weight at max_val.

    Returns:
        Weights, and where the ratio was outside the bounds.

    Raises:
        ValueError: for min_val >= max_val, min_scale > max_scale, a negative scale, or a ratio that is not finite.
    """
    ratio, sign = _checked(log_ratio, mask, side)
    min_val, max_val = _interval("min_val", min_val, "max_val", max_val)
    min_scale, max_scale = _scale(min_scale, max_scale)
    trust = sign * ratio
    share = (trust.clamp(min_val, max_val) - min_val) / (max_val - min_val)
    return _masked(min_scale + (max_scale - min_scale) * share, mask, (trust < min_val) | (trust > max_val))


def threshold(
    log_ratio: Tensor, mask: Tensor, *, side: str, lower: float, upper: float
) -> TransformedWeights:
    """The trust itself, clipped to [lower, upper] (released code, with -1 and 1).

    With lower < 0 weights can be negative. A negative weight reverses the gradient of its token.

    Args:
        log_ratio: log pi+ - log pi-, ``[B, T]``.
        mask: ``[B, T]`` bool, True on the answer's tokens.
        side: "chosen" or "rejected".
        lower: lower bound of the weight.
        upper: upper bound of the weight.

    Returns:
        Weights, and where the ratio was outside the bounds.

    Raises:
        ValueError: for lower >= upper or a ratio that is not finite.
    """
    ratio, sign = _checked(log_ratio, mask, side)
    lower, upper = _interval("lower", lower, "upper", upper)
    trust = sign * ratio
    return _masked(trust.clamp(lower, upper), mask, (trust < lower) | (trust > upper))


def binary(
    log_ratio: Tensor, mask: Tensor, *, side: str, top_percent: float, ties: str = "average"
) -> TransformedWeights:
    """Weight 1 for an answer's floor(n top_percent / 100) most trusted tokens, 0 for the rest.

    Equal ratios are kept or dropped together; ``ties`` says which of the two if the cut falls among them.

    Args:
        log_ratio: log pi+ - log pi-, ``[B, T]``.
        mask: ``[B, T]`` bool, True on the answer's tokens.
        side: "chosen" or "rejected".
        top_percent: share of the tokens to keep, in [0, 100].
        ties: "average": kept if their mean rank is above the cut, that is, if at least half of them are;
            "position": kept only if the last of them is above the cut (the released code).

    Returns:
        Weights of 0 and 1; nothing is clipped.

    Raises:
        ValueError: for a value out of its range or a ratio that is not finite.
    """
    ratio, sign = _checked(log_ratio, mask, side)
    top_percent = check_number("top_percent", top_percent, at_least=0, at_most=100)
    check_choice("ties", ties, TIES)
    first, last = _tied_ranks(-sign * ratio, mask)  # 0 is the most trusted
    keep = torch.floor(mask.sum(-1, keepdim=True).double() * top_percent / 100)
    # Rank i (from 0) is above the cut if i + 1/2 <= keep; halves let one expression serve whole ranks and means.
    kept = (first + last) / 2 + 0.5 <= keep if ties == "average" else last + 0.5 <= keep
    return _masked(kept.to(ratio.dtype), mask)


def random(
    log_ratio: Tensor,
    mask: Tensor,
    *,
    side: str,
    min_scale: float = 0.7,
    max_scale: float = 1.3,
    seed: int = 0,
    keys: Tensor | Sequence[int] | None = None,
) -> TransformedWeights:
    """Weights drawn uniformly from [min_scale, max_scale], as a control that an estimate has to beat.

    A token's weight is a hash of seed, row key, side and its number in the answer. It does not depend on the other rows of
    the batch, the padding, the device, or PyTorch's random state.

    Args:
        log_ratio: ``[B, T]``; only its shape and dtype count.
        mask: ``[B, T]`` bool, True on the answer's tokens.
        side: "chosen" or "rejected".
        min_scale: lower end, >= 0.
        max_scale: upper end.
        seed: selects the weights.
        keys: ``[B]`` integers that name the rows, such as their numbers in the data set. None: 0 to B-1.

    Returns:
        Weights; nothing is clipped.

    Raises:
        ValueError: for a negative scale, min_scale > max_scale, a seed that is not an integer, or keys of a length
            other than B.
    """
    _check_side_and_shapes(log_ratio, mask, side)
    min_scale, max_scale = _scale(min_scale, max_scale)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed must be an integer, got {seed!r}")
    rows = log_ratio.shape[0]
    keys = torch.as_tensor(range(rows) if keys is None else keys, dtype=torch.int64, device=log_ratio.device)
    if keys.shape != (rows,):
        raise ValueError(f"keys must hold one integer per row, [{rows}], got {list(keys.shape)}")
    number = mask.cumsum(-1)
    state = _mix(torch.full_like(keys, seed)) + SIDES.index(side)
    state = _mix(_mix(state) + keys)
    bits = _mix(state[:, None] + number * _GOLDEN_RATIO)
    share = _shift_right(bits, 11).double() * 2.0**-53
    return _masked((min_scale + (max_scale - min_scale) * share).to(_dtype(log_ratio)), mask)


def uniform(log_ratio: Tensor, mask: Tensor, *, side: str, value: float = 1.0) -> TransformedWeights:
    """The same weight for every token; with a value of 1, TIS-DPO equals DPO.

    Args:
        log_ratio: ``[B, T]``; only its shape and dtype count.
        mask: ``[B, T]`` bool, True on the answer's tokens.
        side: "chosen" or "rejected".
        value: the weight, >= 0.

    Returns:
        Weights; nothing is clipped.

    Raises:
        ValueError: for a negative or non-finite value.
    """
    _check_side_and_shapes(log_ratio, mask, side)
    value = check_number("value", value, at_least=0)
    return _masked(torch.full_like(log_ratio, value, dtype=_dtype(log_ratio)), mask)


def normalized(weights: Tensor, mask: Tensor) -> Tensor:
    """Divide each answer's weights by their mean over its tokens, so that the mean is one.

    This keeps DPO's scale. Without it, weights above one act like a larger beta for their answer. If all weights of an
    answer are zero, they stay zero.

    Args:
        weights: ``[B, T]``, non-negative where the mask is True.
        mask: ``[B, T]`` bool, True on the answer's tokens.

    Returns:
        ``[B, T]``, 0 outside the mask.

    Raises:
        ValueError: if a mean is below zero, because it cannot be normalised to one.
    """
    weights = torch.where(mask, weights, 0)
    count = mask.sum(-1, keepdim=True).clamp(min=1)
    mean = weights.sum(-1, keepdim=True) / count
    if bool((mean < 0).any()):
        row = int((mean[:, 0] < 0).nonzero()[0])
        raise ValueError(
            f"weights have a negative mean ({float(mean[row, 0]):.4g}) in row {row}; normalise non-negative weights only"
        )
    # Where the sum overflows or the mean underflows, every weight would silently become 0: scale the largest to 1 first.
    lost = mean.isinf() | (mean < torch.finfo(mean.dtype).tiny)
    largest = weights.amax(-1, keepdim=True)
    weights = torch.where(lost & (largest > 0), weights / torch.where(largest > 0, largest, 1), weights)
    mean = torch.where(lost, weights.sum(-1, keepdim=True) / count, mean)
    return torch.where(mean > 0, weights / torch.where(mean > 0, mean, 1), weights)


def _dtype(log_ratio: Tensor) -> torch.dtype:
    return torch.promote_types(log_ratio.dtype, torch.float32)


def _check_side_and_shapes(log_ratio: Tensor, mask: Tensor, side: str) -> None:
    check_choice("side", side, SIDES)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be a bool tensor, got {mask.dtype}")
    if log_ratio.dim() != 2 or log_ratio.shape != mask.shape:
        raise ValueError(
            f"log_ratio and mask must have one shape [B, T], got {list(log_ratio.shape)} and {list(mask.shape)}"
        )


def _checked(log_ratio: Tensor, mask: Tensor, side: str) -> tuple[Tensor, float]:
    """The ratio, with 0 outside the mask, and the sign of the side."""
    _check_side_and_shapes(log_ratio, mask, side)
    ratio = torch.where(mask, log_ratio.detach().to(_dtype(log_ratio)), 0)
    if not bool(ratio.isfinite().all()):
        row = int((~ratio.isfinite()).any(-1).nonzero()[0])
        raise ValueError(f"log_ratio has a value that is not finite on an answer's token, first in row {row}")
    return ratio, 1.0 if side == "chosen" else -1.0


def _interval(low_name: str, low: float, high_name: str, high: float) -> tuple[float, float]:
    low, high = check_number(low_name, low), check_number(high_name, high)
    check_ordered(low_name, low, high_name, high)
    return low, high


def _scale(min_scale: float, max_scale: float) -> tuple[float, float]:
    min_scale = check_number("min_scale", min_scale, at_least=0)
    max_scale = check_number("max_scale", max_scale, at_least=0)
    check_ordered("min_scale", min_scale, "max_scale", max_scale, strict=False)
    return min_scale, max_scale


def _masked(weights: Tensor, mask: Tensor, clipped: Tensor | None = None) -> TransformedWeights:
    cut = torch.zeros_like(mask) if clipped is None else clipped & mask
    return TransformedWeights(torch.where(mask, weights, 0), cut)


def _tied_ranks(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """First and last ascending rank (from 0) of the values that equal each value, within its row's mask."""
    values = torch.where(mask, values, torch.inf)  # padding sorts behind every token
    ordered = values.sort(-1).values
    first = torch.searchsorted(ordered, values)
    last = torch.searchsorted(ordered, values, right=True) - 1
    return first, last


def _average_rank(values: Tensor, mask: Tensor) -> Tensor:
    first, last = _tied_ranks(values, mask)
    return (first + last).to(values.dtype) / 2


def _position_rank(values: Tensor, mask: Tensor) -> Tensor:
    order = torch.where(mask, values, torch.inf).argsort(dim=-1, stable=True)
    places = torch.arange(values.shape[-1], device=values.device, dtype=values.dtype).expand_as(values)
    return torch.empty_like(values).scatter_(-1, order, places)


# splitmix64 (Steele, Lea and Flood, OOPSLA 2014) in the wrapping arithmetic of signed 64-bit integers.
_GOLDEN_RATIO = 0x9E3779B97F4A7C15 - 2**64
_FACTORS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # >> copies the sign bit on signed integers; a hash needs zeros there.
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _mix(x: Tensor) -> Tensor:
    x = x + _GOLDEN_RATIO
    x = (x ^ _shift_right(x, 30)) * _FACTORS[0]
    x = (x ^ _shift_right(x, 27)) * _FACTORS[1]
    return x ^ _shift_right(x, 31)


SCORE_KINDS = ("weight", "log_ratio", "tis_release")
"""What scores are: weights to use as they are; log pi+ - log pi-; or the TIS-DPO release's log pi- - log pi+."""
