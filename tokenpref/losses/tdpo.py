"""Token-level DPO: log ratios with KL terms."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenpref._checks import check_choice
from tokenpref.losses._base import Centring, PreferenceLoss, coefficient
from tokenpref.stats import TokenStats

__all__ = ["TokenDPOLoss"]


class TokenDPOLoss(PreferenceLoss):
    """Both variants of TDPO (Zeng et al., arXiv 2404.11999), as in the paper's loss figure and the authors' code.

    tdpo1: h = M(chosen) - M(rejected) - (F(rejected) - F(chosen))
    tdpo2: h = M(chosen) - M(rejected) - alpha (F(rejected) - sg[F(chosen)])
    loss = -log sigmoid(beta h)

    with M = sum_t log pi_theta - log pi_ref, F = sum_t KL(pi_ref || pi_theta) over the vocabulary at each position of
    the answer, and sg the stop-gradient. tdpo1 rewards a growing KL on the chosen answer; tdpo2 removes that incentive.

    The rewards are beta (M + F) for any alpha, as published. Their margin equals the trained logit only for tdpo1 and
    for alpha = 1; the logit is logged as ``rewards/train_margins``. With alpha = 0 the loss is DPO and needs no KL. The
    rewards then contain F only if ``log_stats`` asked for ``kl_ref_policy``.

    Args:
        beta: strength of the pull to the reference, > 0.
        alpha: factor of the KL terms, >= 0, for tdpo2 only. None means 0.5.
        variant: "tdpo1" or "tdpo2".

    Raises:
        ValueError: for an unknown variant, a value out of its range, or an alpha with tdpo1.
    """

    def __init__(self, beta: float = 0.1, alpha: float | None = None, variant: str = "tdpo2") -> None:
        variant = check_choice("variant", variant, ("tdpo1", "tdpo2"))
        if variant == "tdpo1" and alpha is not None:
            raise ValueError(
                f"variant 'tdpo1' has no alpha, got alpha={alpha!r}; leave it out or set variant='tdpo2'"
            )
        invariants = {
            "log2_at_reference",
            "antisymmetric",
            "gradient_direction",
            "sums_over_tokens",
            "vanishes_with_beta",
        }
        if variant == "tdpo1":
            factor = 1.0
        else:
            factor = 0.5 if alpha is None else coefficient("alpha", alpha, at_least=0)
        if factor == 1:
            invariants.add("reward_margin_is_logit")
        super().__init__(
            beta,
            centring=Centring("reference", alpha=factor, detach_chosen=variant == "tdpo2"),
            invariants=frozenset(invariants),
        )
        self.variant = variant
        self.alpha = factor

    @torch.no_grad()
    def reward(self, stats: TokenStats) -> Tensor:
        """beta (M + F), ``[B]``; see the class for alpha = 0."""
        total = self.log_ratio_sum(stats)
        if self.centring.needs or stats.kl_ref_policy is not None:
            total = total + self.centring.term(stats)
        return self.beta * total
