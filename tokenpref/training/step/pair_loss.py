"""The statistics of a micro-batch, with its weights and anchors, handed to whatever uses them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenpref.data import IGNORE_INDEX, AnchorBatch, PairBatch
from tokenpref.models.head_work import HeadWork
from tokenpref.models.reference import Reference
from tokenpref.models.scoring import ScoringModel
from tokenpref.stats import SIDES, LossOutput, PairStats, TokenStats, rows_of, split_pair
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
"""Token weights ``[2B, T]`` of a micro-batch, or None where the loss takes none."""

BatchAnchors = Callable[[PairBatch], "AnchorBatch | None"]
"""Third answers of a micro-batch, or None where the loss takes none."""


def no_weights(_batch: PairBatch) -> None:
    """For losses without weights."""


def no_anchors(_batch: PairBatch) -> None:
    """For losses without a triplet."""


def what_is_read(loss: nn.Module, batch: PairBatch) -> PairBatch:
    """The side of a batch that a loss with ``sides`` reads; the whole batch for all others."""
    sides = getattr(loss, "sides", SIDES)
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
    objective: Callable[[LossOutput, slice], Tensor] | None = None,
) -> LossOutput:
    """A loss's output for a micro-batch, computed, and gone back from, while the reference's side is at hand.

    Args:
        policy: the model whose statistics carry gradient.
        reference: the model compared with.
        batch: chosen and rejected rows together.
        needs: statistics wanted.
        weights: token weights ``[2B, T]``, if the loss takes any; ``weights/clipped`` joins the metrics.
        loss: computes its output from the statistics.
        anchors: third answers, if the loss takes any; their counts join the metrics.
        anchor_grad: whether they need a gradient: then they ride in the pairs' forward, else in one of their own.
        objective: from the output for some pairs, and which, to what they add to the number that the step goes back from; None
            for no backward. A loss that is ``pair_by_pair`` then gets the pairs in groups, as the head's memory holds them.

    Returns:
        The output for all pairs; with an ``objective`` without gradient.
    """
    rows, apart = batch, None
    if anchors is not None and anchor_grad:
        rows = batch.with_anchors(anchors)
    elif anchors is not None:
        apart = _stats_without_gradient(policy, reference, batch, anchors)

    def output_of(stats: TokenStats, pairs: slice) -> LossOutput:
        pair = split_pair(stats, rows.sides)
        return loss(pair if apart is None else replace(pair, anchor=rows_of(apart, pairs)))

    with reference.outputs(rows, needs) as ref:
        work = HeadWork(
            rows.labels,
            needs,
            ref_logps=ref.logps,
            ref_hidden=ref.hidden,
            ref_head_weight=ref.head_weight,
            weights=None if weights is None else _for_rows(weights.weights, rows),
            sides=len(rows.sides),
        )
        if objective is None:
            output = output_of(policy.stats_of(rows.tokens, work), slice(None))
        else:
            outputs: list[LossOutput] = []

            def add(stats: TokenStats, pairs: slice) -> Tensor:
                found = output_of(stats, pairs)
                outputs.append(found.detach())
                return objective(found, pairs)

            policy.pairs_loss(rows.tokens, work, add, together=not _takes_groups(loss)).backward()
            output = LossOutput.cat(outputs)
    more = {} if weights is None else clipped_share(weights, batch)
    more |= {} if anchors is None else anchors.metrics
    return replace(output, metrics=output.metrics | more) if more else output


def _takes_groups(loss: Callable[[PairStats], LossOutput]) -> bool:
    """Whether a loss says that it looks at each pair alone, and has nothing of its own that learns."""
    learns = isinstance(loss, nn.Module) and any(p.requires_grad for p in loss.parameters())
    return getattr(loss, "pair_by_pair", False) and not learns


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
    """``weights/clipped``: the share of a pair's answer tokens whose score a bound has cut, ``[B]``."""
    mask = batch.labels[:, 1:] != IGNORE_INDEX
    cut, count = (marks.sum(-1).view(len(batch.sides), -1).sum(0) for marks in (weights.clipped, mask))
    return {"weights/clipped": cut / count.clamp(min=1)}
