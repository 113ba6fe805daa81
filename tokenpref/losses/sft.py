"""Negative log-likelihood of one side, for the supervised construction of a contrastive pair."""

from __future__ import annotations

import torch
from torch import nn

from tokenpref._checks import check_choice
from tokenpref.losses._base import answer_metrics
from tokenpref.stats import LossOutput, PairStats

__all__ = ["NLLLoss"]


class NLLLoss(nn.Module):
    """Mean over an answer's tokens of -log pi_theta(y_t | x, y_<t), for one side of each pair.

    loss = -(1 / n) sum_t log pi_theta(y_t | x, y_<t),  n = tokens of the answer

    It trains pi+ on the chosen answers or pi- on the rejected ones (TIS-DPO's supervised pair, arXiv 2410.04350). All
    answers have the same weight, whatever their length. An answer without tokens has loss 0 and no gradient.

    The likelihood uses no reference, so there is no implicit reward: both rewards are 0, and so are accuracy and margin
    in the log. There is no ``rewards/train_margins``, because the loss has no margin. ``sides`` names the one side that
    the loss uses, so that a trainer can leave the other out.

    Args:
        side: "chosen" or "rejected".

    Raises:
        ValueError: for another side.
    """

    def __init__(self, side: str = "chosen") -> None:
        super().__init__()
        self.side = check_choice("side", side, ("chosen", "rejected"))
        self.needs: frozenset[str] = frozenset()
        self.sides = (self.side,)  # the trainer does not run the model on the other side
        self.invariants: frozenset[str] = frozenset()

    def forward(self, pair: PairStats) -> LossOutput:
        """Loss and metrics of each pair; see the class.

        Args:
            pair: statistics of both answers.

        Returns:
            ``[B]`` losses with gradient to the trained side only, rewards of 0, and metrics.
        """
        stats = pair.chosen if self.side == "chosen" else pair.rejected
        losses = -stats.policy_logps.sum(-1) / stats.lengths.clamp(min=1)
        no_reward = torch.zeros_like(losses)
        metrics = {k: v for k, v in answer_metrics(pair).items() if k.endswith(f"/{self.side}")}
        return LossOutput(losses, no_reward, no_reward, metrics)

    def extra_repr(self) -> str:
        """Settings, for ``print(loss)``."""
        return f"side={self.side!r}"
