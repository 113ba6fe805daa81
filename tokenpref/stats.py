"""The interface between models and losses: statistics of every answer token, and the output of a loss.

Conventions: log-probabilities in nats; per-token tensors ``[B, T]``, already shifted, so that column t belongs to the
predicted token t; a mask that is True on the answer's tokens. Outside the mask every value is 0 and every gradient is
exactly 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

__all__ = ["NEEDS", "SIDES", "STATISTICS", "LossOutput", "PairStats", "TokenStats", "rows_of", "split_pair"]

SIDES = ("chosen", "rejected")

STATISTICS: Mapping[str, str] = {
    "ref": "ref_logps",
    "weights": "weights",
    "kl_ref_policy": "kl_ref_policy",
    "kl_policy_ref": "kl_policy_ref",
    "entropy": "entropy",
}
"""Maps the name of a statistic in ``needs`` to its field in :class:`TokenStats`."""

NEEDS: frozenset[str] = frozenset(STATISTICS) | {"anchor"}
"""All names that ``needs`` may contain: the statistics of an answer, and the third answer of a triplet."""

_MEND = {
    "ref": "pass the reference's logits or hidden states (or ref_logps) and put 'ref' into needs",
    "weights": "pass token weights [B, T]; they are never replaced by ones",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenStats:
    """Per-token statistics of B answers, ``[B, T]`` each.

    The constructor sets every statistic and its gradient to 0 outside the mask, for any value there (also inf and
    nan), and converts half precision to float32. A loss can therefore sum over T and ignore the mask.

    Args:
        policy_logps: log pi_theta(y_t | x, y_<t).
        ref_logps: log pi_ref(y_t | x, y_<t). Held without gradient.
        mask: bool, True on the answer's tokens.
        weights: weight of each token. Held without gradient.
        kl_ref_policy: KL(pi_ref || pi_theta) over the vocabulary at each position (TDPO's forward KL).
        kl_policy_ref: KL(pi_theta || pi_ref) over the vocabulary at each position.
        entropy: entropy of pi_theta over the vocabulary at each position.

    Raises:
        ValueError: if the mask is not boolean, a statistic not floating point, or the shapes differ.
    """

    policy_logps: Tensor
    ref_logps: Tensor | None = None
    mask: Tensor
    weights: Tensor | None = None
    kl_ref_policy: Tensor | None = None
    kl_policy_ref: Tensor | None = None
    entropy: Tensor | None = None

    def __post_init__(self) -> None:
        if self.mask.dtype != torch.bool:
            raise ValueError(f"mask must be a bool tensor, got {self.mask.dtype}; pass labels != -100")
        if self.mask.dim() != 2:
            raise ValueError(f"mask must have the shape [B, T], got {list(self.mask.shape)}")
        for name in ("policy_logps", *STATISTICS.values()):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, self._clean(name, value))

    def _clean(self, name: str, value: Tensor) -> Tensor:
        if value.shape != self.mask.shape:
            raise ValueError(
                f"{name} must have the mask's shape {list(self.mask.shape)}, got {list(value.shape)}; "
                "all statistics of an answer are [B, T] in the columns of the predicted tokens"
            )
        if not value.is_floating_point():
            raise ValueError(f"{name} must be a floating point tensor, got {value.dtype}")
        if name in ("ref_logps", "weights"):
            value = value.detach()
        # where instead of a product, because inf * 0 is nan, in the value and in the gradient.
        return torch.where(self.mask, value.to(torch.promote_types(value.dtype, torch.float32)), 0)

    def require(self, name: str) -> Tensor:
        """A statistic that the caller requires.

        Args:
            name: one of :data:`STATISTICS`: "ref", "weights", "kl_ref_policy", "kl_policy_ref", "entropy".

        Returns:
            The statistic, ``[B, T]``.

        Raises:
            ValueError: if it is missing; the message names it.
        """
        value: Tensor | None = getattr(self, STATISTICS[name])
        if value is None:
            mend = _MEND.get(name, f"put '{name}' into needs when the statistics are computed")
            raise ValueError(f"the statistic '{name}' (TokenStats.{STATISTICS[name]}) is missing: {mend}")
        return value

    @property
    def log_ratio(self) -> Tensor:
        """log pi_theta - log pi_ref per token, ``[B, T]``.

        Raises:
            ValueError: if the reference's log-probabilities are missing.
        """
        return self.policy_logps - self.require("ref")

    @property
    def lengths(self) -> Tensor:
        """Number of tokens in each answer, ``[B]`` int64."""
        return self.mask.sum(-1)


@dataclass(frozen=True, eq=False)
class PairStats:
    """Statistics of B preference pairs.

    Args:
        chosen: the preferred answers.
        rejected: the other answers; T may differ from the chosen side's.
        anchor: third answers to the same prompts, for a triplet term.

    Raises:
        ValueError: if the sides differ in the number of answers.
    """

    chosen: TokenStats
    rejected: TokenStats
    anchor: TokenStats | None = None

    def __post_init__(self) -> None:
        sizes = {
            name: stats.mask.shape[0]
            for name, stats in (("chosen", self.chosen), ("rejected", self.rejected), ("anchor", self.anchor))
            if stats is not None
        }
        if len(set(sizes.values())) > 1:
            raise ValueError(f"the sides of a pair must have the same number of answers B, got {sizes}")

    def require_anchor(self) -> TokenStats:
        """The anchor's statistics.

        Raises:
            ValueError: if there is none; the message names it.
        """
        if self.anchor is None:
            raise ValueError(
                "the statistic 'anchor' (PairStats.anchor) is missing: score a third answer per prompt"
            )
        return self.anchor


def rows_of(stats: TokenStats, rows: slice, columns: slice = slice(None)) -> TokenStats:
    """The statistics of some answers and columns."""
    present = {f.name: v for f in fields(stats) if (v := getattr(stats, f.name)) is not None}
    return replace(stats, **{name: value[rows, columns] for name, value in present.items()})


def split_pair(stats: TokenStats, sides: tuple[str, ...] = SIDES) -> PairStats:
    """Split the statistics of a joint forward into sides.

    Args:
        stats: rows ``[:B]`` of the first side, then those of the second, and perhaps those of the anchors.
        sides: the sides of the rows. A missing chosen or rejected side gets answers without tokens.
    """
    count = stats.mask.shape[0] // len(sides)

    found = {side: rows_of(stats, slice(i * count, (i + 1) * count)) for i, side in enumerate(sides)}
    nothing = rows_of(stats, slice(None, count), slice(0))
    chosen, rejected = (found.get(side, nothing) for side in SIDES)
    return PairStats(chosen, rejected, found.get("anchor"))


@dataclass(frozen=True, eq=False)
class LossOutput:
    """What a loss returns: unreduced, one number per pair.

    Args:
        losses: ``[B]``, with gradient.
        chosen_rewards: ``[B]``, implicit rewards of the chosen answers. Held without gradient.
        rejected_rewards: ``[B]``, of the rejected ones. Held without gradient.
        metrics: name to ``[B]`` values for the log. Held without gradient.

    Raises:
        ValueError: if a tensor is not ``[B]``; the message names it.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.losses.dim() != 1:
            raise ValueError(f"losses must be one number per pair, [B], got {list(self.losses.shape)}")
        for name in ("chosen_rewards", "rejected_rewards"):
            object.__setattr__(self, name, self._per_pair(name, getattr(self, name)))
        metrics = {name: self._per_pair(f"metric {name!r}", value) for name, value in self.metrics.items()}
        object.__setattr__(self, "metrics", metrics)

    def _per_pair(self, name: str, value: Tensor) -> Tensor:
        if value.shape != self.losses.shape:
            raise ValueError(
                f"{name} must be one number per pair, {list(self.losses.shape)} like losses, got {list(value.shape)}"
            )
        return value.detach()

    def detach(self) -> LossOutput:
        """The same without gradient."""
        return replace(self, losses=self.losses.detach())
