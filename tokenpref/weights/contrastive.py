"""Scores of tokens from a contrastive pair of models (TIS-DPO, arXiv 2410.04350)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["LogpsOf", "answer_scores", "contrastive_log_ratios"]

LogpsOf = Callable[[Tensor, Tensor], Tensor]
"""Per-token log-probabilities ``[N, L-1]`` of labels ``[N, L]`` under a model, 0 where the label is -100."""


def answer_scores(logps: Tensor, labels: Tensor) -> list[Tensor]:
    """The labelled columns of each row, as one vector per row.

    Args:
        logps: ``[N, L-1]``, column t belonging to label t + 1.
        labels: ``[N, L]``, -100 where no token is scored.

    Returns:
        N vectors, each with one number per label of its row.
    """
    return [row[kept] for row, kept in zip(logps, labels[:, 1:] != -100, strict=True)]


@torch.no_grad()
def contrastive_log_ratios(
    positive: LogpsOf,
    negative: LogpsOf,
    positive_batch: tuple[Tensor, Tensor],
    negative_batch: tuple[Tensor, Tensor],
) -> list[Tensor]:
    """log pi+(y_t | x, y_<t) - log pi-(y_t | x, y_<t) of every answer token.

    The two sides may use different prompts before the same answers, so each has its own tokens and labels.

    Args:
        positive: scores under pi+.
        negative: scores under pi-.
        positive_batch: tokens and labels ``[N, L+]`` for pi+.
        negative_batch: tokens and labels ``[N, L-]`` for pi-, the same answers in the same order.

    Returns:
        N vectors in nats, with one number per token of the answer.

    Raises:
        ValueError: if the answers of the two batches differ, or a score is not finite.
    """
    ids = [answer_scores(tokens[:, 1:], labels) for tokens, labels in (positive_batch, negative_batch)]
    for row, (one, other) in enumerate(zip(*ids, strict=True)):
        if not torch.equal(one, other):
            raise ValueError(f"row {row}: the two sides score different answers")
    sides = [
        answer_scores(logps(*batch), batch[1])
        for logps, batch in ((positive, positive_batch), (negative, negative_batch))
    ]
    ratios = [one - other for one, other in zip(*sides, strict=True)]
    for row, ratio in enumerate(ratios):
        if not bool(ratio.isfinite().all()):
            raise ValueError(f"row {row}: a log ratio is not finite; one of the two models gives nan or inf")
    return ratios
