"""Token-importance DPO: weighted log ratios, and a triplet term that pulls a sampled answer towards the chosen one."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenpref._checks import check_choice, check_flag
from tokenpref.losses._base import Centring, PreferenceLoss, coefficient, side_metrics
from tokenpref.stats import LossOutput, PairStats, TokenStats

__all__ = ["TripletTIDPOLoss"]

LENGTH_NORMALIZATIONS = ("none", "tokens", "overlap")


class TripletTIDPOLoss(PreferenceLoss):
    """TI-DPO (arXiv 2505.19653), in the paper's form (alpha = 0) and in the form of its authors' code (alpha = 0.5).

    h = M(chosen) - M(rejected) - alpha (F(rejected) - sg[F(chosen)])
    loss = -log sigmoid(beta h) + gamma relu(D(anchor, chosen) - D(anchor, rejected) + margin)
    D(anchor, side) = sum_{t <= min(T_anchor, T_side)} (d_t - s_t)^2

    with M = sum_t w_t (log pi_theta - log pi_ref) over weights from attribution (paper, Eq. 11 and 12, with Algorithm 1's
    beta), F = sum_t KL(pi_ref || pi_theta), which is not weighted (code), and sg the stop-gradient. d_t and s_t are the
    unweighted log ratios of the t-th answer tokens of anchor and side, independent of their columns (Eq. 13, one hinge per
    pair). The anchor is a third answer to the same prompt, sampled from the policy.

    The rewards are beta M for alpha = 0, and beta (M + F) for any other alpha. ``rewards/train_margins`` is beta h, without
    the triplet. With gamma > 0 the metrics also contain ``triplet/loss`` (without the factor gamma), ``triplet/active`` (1
    where the triplet term is positive) and ``triplet/distance/chosen|rejected|margin``.

    Args:
        beta: strength of the pull to the reference, > 0.
        gamma: factor of the triplet term, >= 0; 0 switches it off, and the loss then needs no anchor.
        margin: how much farther from the anchor the rejected answer has to be, >= 0; 0 does not switch the term off.
        alpha: factor of the KL terms, >= 0.
        length_normalization: "none" as published; "tokens" divides a distance by the answer's number of tokens, "overlap"
            by the number of tokens compared.
        anchor_grad: whether the triplet's gradient flows through the anchor too, as published; otherwise the anchor is a
            constant.

    Raises:
        ValueError: for a value out of its range.
    """

    def __init__(
        self,
        beta: float = 0.1,
        gamma: float = 0.1,
        margin: float = 0.1,
        alpha: float = 0.0,
        length_normalization: str = "none",
        anchor_grad: bool = True,
    ) -> None:
        alpha = coefficient("alpha", alpha, at_least=0)
        gamma = coefficient("gamma", gamma, at_least=0)
        # The shared properties hold for the part without the triplet; the triplet has its own tests.
        invariants: set[str] = set()
        if gamma == 0:
            invariants |= {"log2_at_reference", "antisymmetric", "sums_over_tokens"}
            invariants |= {"vanishes_with_beta", "gradient_direction"}
            if alpha == 0:
                invariants |= {"unit_weights_are_dpo", "zero_weights_are_silent"}
            if alpha in (0, 1):
                invariants.add("reward_margin_is_logit")
        super().__init__(
            beta,
            weighted=True,
            centring=Centring("reference", alpha=alpha, detach_chosen=True),
            invariants=frozenset(invariants),
        )
        self.alpha = alpha
        self.gamma = gamma
        self.margin = coefficient("margin", margin, at_least=0)
        self.length_normalization = check_choice(
            "length_normalization", length_normalization, LENGTH_NORMALIZATIONS
        )
        self.anchor_grad = check_flag("anchor_grad", anchor_grad)
        if gamma > 0:
            self.needs |= {"anchor"}

    def forward(self, pair: PairStats) -> LossOutput:
        """Loss, rewards and metrics of each pair; see :meth:`PreferenceLoss.forward`."""
        output = super().forward(pair)
        if self.gamma == 0:
            return output
        anchor, mask = _packed(pair.require_anchor())
        anchor = anchor if self.anchor_grad else anchor.detach()
        chosen, rejected = (self._distance(anchor, mask, side) for side in (pair.chosen, pair.rejected))
        triplet = F.relu(chosen - rejected + self.margin)
        metrics = {
            **output.metrics,
            "triplet/loss": triplet,
            "triplet/active": (triplet > 0).to(triplet.dtype),
            **side_metrics("triplet/distance", chosen, rejected, margin=True),
        }
        return replace(output, losses=output.losses + self.gamma * triplet, metrics=metrics)

    def _distance(self, anchor: Tensor, anchor_mask: Tensor, side: TokenStats) -> Tensor:
        """Distance between the packed log ratios of the anchor and of an answer, ``[B]``."""
        values, mask = _packed(side)
        width = min(values.shape[1], anchor.shape[1])
        both = mask[:, :width] & anchor_mask[:, :width]
        distance = torch.where(both, (anchor[:, :width] - values[:, :width]).square(), 0).sum(-1)
        if self.length_normalization == "none":
            return distance
        count = side.lengths if self.length_normalization == "tokens" else both.sum(-1)
        return distance / count.clamp(min=1)


def _packed(stats: TokenStats) -> tuple[Tensor, Tensor]:
    """Log ratios ``[B, T]`` with an answer's tokens moved to the left, in their order, and their mask."""
    order = torch.sort(stats.mask, dim=-1, descending=True, stable=True).indices
    return stats.log_ratio.gather(-1, order), stats.mask.gather(-1, order)
