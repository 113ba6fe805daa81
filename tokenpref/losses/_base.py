r"""What the trainer asks of a loss, and the one expression behind DPO, TDPO, TIS-DPO and TI-DPO.

With r_t = log pi_theta - log pi_ref of the t-th token, token weights w_t, and a side's sums

    M = sum_t w_t r_t                        F = sum_t KL(pi_ref || pi_theta)_t       K = sum_t KL(pi_theta || pi_ref)_t

(w = 1 for the losses without weights; K, or F, weighted as M is where a method says so), each answer has a score

    S = M                   centring "none"
    S = M + alpha F         centring "reference": at alpha = 1 the sum of advantages r_t - E_{z ~ pi_ref} r_t(z)
    S = M - alpha K         centring "policy":    at alpha = 1 the sum of advantages r_t - E_{z ~ pi_theta} r_t(z)

and the pair has the logit h = S(chosen) - S(rejected) and the loss -log sigmoid(beta h).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenpref._checks import check_choice, check_number
from tokenpref.stats import SIDES, LossOutput, PairStats, TokenStats

__all__ = [
    "INVARIANTS",
    "Centring",
    "Loss",
    "LossTraits",
    "PreferenceLoss",
    "answer_metrics",
    "side_metrics",
    "weight_metrics",
]

# Of beta, alpha, gamma and margins: beyond it float32's sums over an answer overflow.
MOST = 1e6


def coefficient(name: str, value: float, **bounds: float) -> float:
    """A factor of a loss, within bounds of its own and up to :data:`MOST`.

    Raises:
        ValueError: otherwise.
    """
    return check_number(name, check_number(name, value, **bounds), at_most=MOST)


INVARIANTS: frozenset[str] = frozenset(
    {
        "log2_at_reference",  # policy = reference: loss log 2 (bit for bit), rewards 0, accuracy 0
        "antisymmetric",  # swapping the sides negates rewards/train_margins
        "gradient_direction",  # never pushes a chosen token's log-probability down nor a rejected one's up
        "reward_margin_is_logit",  # rewards/train_margins = chosen_rewards - rejected_rewards
        "sums_over_tokens",  # an answer cut in two and joined again gives the same; the order of tokens is irrelevant
        "vanishes_with_beta",  # beta -> 0: loss -> log 2 and gradient -> 0, linearly
        "unit_weights_are_dpo",  # weights of one give DPO bit for bit
        "zero_weights_are_silent",  # a token of weight 0 has neither value nor gradient
    }
)
"""Properties that a loss may claim in ``invariants``; the tests check every claim of every loss."""


class Loss(Protocol):
    """What the trainer asks of a loss. Configs name it by its dotted path, and it needs no base class.

    It is usually an ``nn.Module``, but any object with these two members will do. Further attributes are optional;
    :class:`LossTraits` lists them with their defaults.
    """

    needs: frozenset[str]
    """The statistics that the loss uses, of :data:`tokenpref.stats.NEEDS`. Only these are computed."""

    def __call__(self, pair: PairStats) -> LossOutput:
        """One loss, two rewards and any metrics for each pair.

        Args:
            pair: statistics of B pairs, with all that ``needs`` names. All pairs of a micro-batch come at once.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class LossTraits:
    """The attributes of a loss that the package reads. An optional one that a loss lacks has the default that stands here.

    Args:
        needs: see :class:`Loss`. A recipe refuses a loss without it.
        sides: the answers that the loss uses, "chosen" and "rejected" or one of them. The models do not run on the other side.
        anchor_grad: whether the gradient flows through the anchors. If not, they get a forward pass of their own, without
            gradient. This matters only to a loss that needs "anchor".
        invariants: properties of :data:`INVARIANTS` that the loss claims to have. Only tests read them.
    """

    needs: frozenset[str] | None = None
    sides: tuple[str, ...] = SIDES
    anchor_grad: bool = True
    invariants: frozenset[str] = frozenset()

    @classmethod
    def of(cls, loss: Any) -> LossTraits:
        """The traits of a loss.

        Raises:
            ValueError: if it names other sides.
        """
        given = {f.name: getattr(loss, f.name) for f in fields(cls) if hasattr(loss, f.name)}
        sides = given.get("sides", SIDES)
        if not isinstance(sides, (list, tuple)) or not sides or not set(sides) <= set(SIDES):
            raise ValueError(f"the `sides` of a loss must be 'chosen', 'rejected' or both, found {sides!r}")
        return cls(**{**given, "sides": tuple(sides)})


_KL_FIELD = {"reference": "kl_ref_policy", "policy": "kl_policy_ref"}


@dataclass(frozen=True)
class Centring:
    """What is taken off the log ratios: nothing, or their expectation under one of the models.

    Args:
        base: "none", "reference" (adds KL(pi_ref || pi_theta)) or "policy" (subtracts KL(pi_theta || pi_ref)).
        alpha: factor of the KL term in the loss; with 0 the KL is not asked for.
        weighted: weigh the KL of each token as its log ratio.
        detach_chosen: no gradient through the chosen side's KL.

    Raises:
        ValueError: for an unknown base or a negative or non-finite alpha.
    """

    base: Literal["none", "reference", "policy"] = "none"
    alpha: float = 1.0
    weighted: bool = False
    detach_chosen: bool = False

    def __post_init__(self) -> None:
        check_choice("base", self.base, ("none", "reference", "policy"))
        coefficient("alpha", self.alpha, at_least=0)

    @property
    def needs(self) -> frozenset[str]:
        """The KL statistic, if any counts."""
        return frozenset({_KL_FIELD[self.base]} if self.base != "none" and self.alpha > 0 else ())

    def kl_sum(self, stats: TokenStats) -> Tensor:
        """F or K, ``[B]``. Not for base "none"."""
        kl = stats.require(_KL_FIELD[self.base])
        if self.weighted:
            kl = kl * stats.require("weights")
        return kl.sum(-1)

    def term(self, stats: TokenStats) -> Tensor:
        """F or -K: what alpha multiplies in the score, ``[B]``. Not for base "none"."""
        return self.kl_sum(stats) if self.base == "reference" else -self.kl_sum(stats)


class PreferenceLoss(nn.Module):
    """-log sigmoid(beta (S(chosen) - S(rejected))) with the scores of this module's docstring.

    The named losses are settings of this one. The rewards are beta M, plus beta times the whole KL term (without
    alpha) where the method publishes it so.

    Args:
        beta: strength of the pull to the reference, > 0.
        weighted: multiply each token's log ratio by its weight.
        centring: the KL term; None for none.
        label_smoothing: share of pairs that are taken to be swapped, in [0, 0.5).
        invariants: properties of :data:`INVARIANTS` that the loss has.

    Raises:
        ValueError: for a value out of its range.
    """

    def __init__(
        self,
        beta: float,
        *,
        weighted: bool = False,
        centring: Centring | None = None,
        label_smoothing: float = 0.0,
        invariants: frozenset[str] = frozenset({"log2_at_reference", "antisymmetric", "sums_over_tokens"}),
    ) -> None:
        super().__init__()
        self.beta = coefficient("beta", beta, above=0)
        self.label_smoothing = check_number("label_smoothing", label_smoothing, at_least=0, below=0.5)
        self.weighted = weighted
        self.centring = centring or Centring()
        self.needs = frozenset({"ref"} | ({"weights"} if weighted else set())) | self.centring.needs
        self.invariants = invariants

    def forward(self, pair: PairStats) -> LossOutput:
        """Loss, rewards and metrics of each pair.

        Args:
            pair: statistics of both answers, with all that ``needs`` names.

        Returns:
            ``[B]`` losses with gradient, ``[B]`` rewards and metrics without.

        Raises:
            ValueError: if a statistic that ``needs`` names is missing; the message names it.
        """
        logit = self.beta * (self._score(pair.chosen, chosen=True) - self._score(pair.rejected, chosen=False))
        # (1 - e) softplus(-x) + e softplus(x) = softplus(-x) + e x: no overflow, and exactly log 2 at x = 0.
        # logsigmoid, because F.softplus turns linear at 20, which float64 can tell from the truth.
        losses = -F.logsigmoid(logit) + self.label_smoothing * logit
        metrics = {"rewards/train_margins": logit, **answer_metrics(pair)}
        if self.weighted:
            metrics.update(weight_metrics(pair))
        if self.centring.weighted and self.centring.needs:
            name = "weighted_" + _KL_FIELD[self.centring.base]
            sums = [self.centring.kl_sum(stats) for stats in (pair.chosen, pair.rejected)]
            metrics.update(side_metrics(name, *sums, margin=True))
        return LossOutput(losses, self.reward(pair.chosen), self.reward(pair.rejected), metrics)

    def log_ratio_sum(self, stats: TokenStats) -> Tensor:
        """M: the (weighted) sum of log ratios, ``[B]``."""
        log_ratio = stats.log_ratio
        if self.weighted:
            log_ratio = log_ratio * stats.require("weights")
        return log_ratio.sum(-1)

    def _score(self, stats: TokenStats, *, chosen: bool) -> Tensor:
        score = self.log_ratio_sum(stats)
        if not self.centring.needs:
            return score
        term = self.centring.term(stats)
        if chosen and self.centring.detach_chosen:
            term = term.detach()
        return score + self.centring.alpha * term

    @torch.no_grad()
    def reward(self, stats: TokenStats) -> Tensor:
        """Implicit reward of the answers, ``[B]``: beta M, plus beta times the KL term where the loss has one."""
        total = self.log_ratio_sum(stats)
        if self.centring.needs:
            total = total + self.centring.term(stats)
        return self.beta * total

    def extra_repr(self) -> str:
        """Settings, for ``print(loss)``."""
        return f"beta={self.beta}, needs={sorted(self.needs)}"


def side_metrics(name: str, chosen: Tensor, rejected: Tensor, *, margin: bool = False) -> dict[str, Tensor]:
    """``name/chosen``, ``name/rejected`` and, if asked, their difference ``name/margin``."""
    metrics = {f"{name}/chosen": chosen, f"{name}/rejected": rejected}
    return {**metrics, f"{name}/margin": chosen - rejected} if margin else metrics


@torch.no_grad()
def answer_metrics(pair: PairStats) -> dict[str, Tensor]:
    """Metrics that every loss logs, ``[B]`` each, of whatever statistics are present; none of them is weighted.

    Args:
        pair: statistics of both answers.

    Returns:
        ``logps/chosen|rejected`` (sums over tokens), ``kl_ref_policy/...`` and ``kl_policy_ref/chosen|rejected|margin``
        (sums), ``entropy/chosen|rejected`` (means over the answer's tokens).
    """
    sides = (pair.chosen, pair.rejected)
    metrics = side_metrics("logps", *(stats.policy_logps.sum(-1) for stats in sides))
    for name in ("kl_ref_policy", "kl_policy_ref"):
        kl = [value for stats in sides if (value := getattr(stats, name)) is not None]
        if len(kl) == len(sides):
            metrics.update(side_metrics(name, *(value.sum(-1) for value in kl), margin=True))
    if pair.chosen.entropy is not None and pair.rejected.entropy is not None:
        means = [stats.require("entropy").sum(-1) / stats.lengths.clamp(min=1) for stats in sides]
        metrics.update(side_metrics("entropy", *means))
    return metrics


@torch.no_grad()
def weight_metrics(pair: PairStats) -> dict[str, Tensor]:
    """What the weights of a pair look like, over the tokens of both answers, ``[B]`` each.

    Args:
        pair: statistics of both answers, with weights.

    Returns:
        ``weights/mean``, ``weights/std`` (population), and ``weights/ess``: the effective share of tokens,
        (sum w)^2 / (n sum w^2), 1 for equal weights and 0 where all weights are 0.
    """
    sides = (pair.chosen, pair.rejected)
    count = sum((stats.lengths for stats in sides), torch.zeros_like(pair.chosen.lengths)).clamp(min=1)
    weights = torch.cat([stats.require("weights") for stats in sides], dim=-1)
    mask = torch.cat([stats.mask for stats in sides], dim=-1)
    total, squares = weights.sum(-1), weights.square().sum(-1)
    mean = total / count
    spread = torch.where(mask, (weights - mean[:, None]).square(), 0).sum(-1)
    ess = torch.where(squares > 0, total.square() / (count * torch.where(squares > 0, squares, 1)), 0)
    return {"weights/mean": mean, "weights/std": (spread / count).sqrt(), "weights/ess": ess}
