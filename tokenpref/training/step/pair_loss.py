"""The loss of a micro-batch: scores its pairs, with weights and anchors, and runs the backward pass.

docs/tour.md shows the calls above and below this module.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenpref.data import IGNORE_INDEX, AnchorBatch, PairBatch
from tokenpref.losses import Loss, LossTraits
from tokenpref.models.reference import Reference
from tokenpref.models.scoring import ScoringModel
from tokenpref.stats import SIDES, LossOutput, PairStats, TokenStats, split_pair
from tokenpref.weights import TransformedWeights

__all__ = [
    "BatchAnchors",
    "BatchWeights",
    "clipped_share",
    "no_anchors",
    "no_weights",
    "score_pairs",
    "what_is_read",
]

BatchWeights = Callable[[PairBatch], "TransformedWeights | None"]
"""Token weights ``[2B, T]`` of a micro-batch, or None if the loss uses none."""

BatchAnchors = Callable[[PairBatch], "AnchorBatch | None"]
"""Third answers of a micro-batch, or None if the loss uses none."""


def no_weights(_batch: PairBatch) -> None:
    """For losses without weights."""


def no_anchors(_batch: PairBatch) -> None:
    """For losses without a triplet."""


def what_is_read(loss: Loss, batch: PairBatch) -> PairBatch:
    """The side of a batch that a loss of one side uses; the whole batch for all other losses."""
    sides = LossTraits.of(loss).sides
    return batch if set(sides) == set(SIDES) else batch.only(sides[0])


def score_pairs(
    policy: ScoringModel,
    reference: Reference,
    batch: PairBatch,
    needs: frozenset[str],
    weights: TransformedWeights | None,
    loss: Callable[[PairStats], LossOutput],
    *,
    anchors: AnchorBatch | None = None,
    anchor_grad: bool = True,
    scale: float | None = None,
) -> LossOutput:
    """The output of a loss for a micro-batch, and its backward pass if ``scale`` is given.

    Args:
        policy: the model whose statistics carry gradient.
        reference: the reference of the run.
        batch: chosen and rejected rows together.
        needs: the statistics to compute.
        weights: token weights ``[2B, T]``, if the loss uses any; ``weights/clipped`` is added to the metrics.
        loss: computes its output from the statistics.
        anchors: third answers, if the loss uses any; their counts are added to the metrics.
        anchor_grad: whether the anchors need a gradient. If so, they are part of the pairs' forward; otherwise they get a
            separate forward.
        scale: factor of the sum of the real pairs' losses, whose gradient is added to the model's; None for no backward pass.

    Returns:
        The output for all pairs; without gradient after a backward pass.
    """
    rows, apart = batch, None
    if anchors is not None and anchor_grad:
        rows = batch.with_anchors(anchors)
    elif anchors is not None:
        apart = _stats_without_gradient(policy, reference, batch, anchors)

    with reference.outputs(rows, needs) as ref:
        stats = policy.token_stats(
            rows.tokens,
            rows.labels,
            needs=needs,
            ref_logps=ref.logps,
            ref_hidden=ref.hidden,
            ref_head_weight=ref.head_weight,
            weights=None if weights is None else _for_rows(weights.weights, rows),
            sides=len(rows.sides),
        )
        pair = split_pair(stats, rows.sides)
        output = loss(pair if apart is None else replace(pair, anchor=apart))
        if scale is not None:
            # Inside the context: the head's backward pass may recompute the reference's logits.
            (torch.where(batch.real, output.losses, 0).sum() * scale).backward()
            output = output.detach()
    more = {} if weights is None else clipped_share(weights, batch)
    more |= {} if anchors is None else anchors.metrics
    return replace(output, metrics=output.metrics | more) if more else output


def _for_rows(weights: Tensor, rows: PairBatch) -> Tensor:
    """Weights of the pairs' rows with zeros for the anchors' rows and columns."""
    height, width = rows.tokens.shape
    return F.pad(weights, (0, width - 1 - weights.shape[1], 0, height - weights.shape[0]))


@torch.no_grad()
def _stats_without_gradient(
    policy: ScoringModel, reference: Reference, batch: PairBatch, anchors: AnchorBatch
) -> TokenStats:
    """The anchors' log-probabilities under both models."""
    rows = replace(batch, tokens=anchors.tokens, labels=anchors.labels, sides=("anchor",))
    needs = frozenset({"ref"})
    with reference.outputs(rows, needs) as ref:
        return policy.token_stats(rows.tokens, rows.labels, needs=needs, ref_logps=ref.logps)


def clipped_share(weights: TransformedWeights, batch: PairBatch) -> dict[str, Tensor]:
    """``weights/clipped``: the share of a pair's answer tokens whose score was clipped at a bound, ``[B]``."""
    mask = batch.labels[:, 1:] != IGNORE_INDEX
    cut, count = (marks.sum(-1).view(len(batch.sides), -1).sum(0) for marks in (weights.clipped, mask))
    return {"weights/clipped": cut / count.clamp(min=1)}
