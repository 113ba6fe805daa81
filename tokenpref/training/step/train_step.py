"""One optimizer step: draw all micro-batches, count the pairs once, then run forward and backward for each.

docs/tour.md shows this step from the command to the update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tokenpref.data import PairBatch
from tokenpref.distributed import World, gradient_sync, refresh_float8_scales
from tokenpref.errors import TrainingDiverged
from tokenpref.losses import Loss, LossTraits
from tokenpref.models.reference import Reference
from tokenpref.models.scoring import ScoringModel
from tokenpref.training.step.metrics import MetricSums, loss_metrics
from tokenpref.training.step.pair_loss import (
    BatchAnchors,
    BatchWeights,
    no_anchors,
    score_pairs,
    what_is_read,
)

__all__ = ["StepResult", "train_step"]


@dataclass(frozen=True)
class StepResult:
    """The result of a step, before any reduction over ranks.

    Args:
        sums: per-pair metrics of this rank.
        pairs: pairs of all ranks.
        tokens: non-padding tokens of all ranks; a prompt counts in both answers.
        grad_norm: global gradient norm before clipping.
    """

    sums: MetricSums
    pairs: int
    tokens: int
    grad_norm: float


def train_step(
    policy: ScoringModel,
    reference: Reference,
    loss: Loss,
    optimizer: Optimizer,
    micro_batches: Sequence[PairBatch],
    world: World,
    *,
    step: int,
    needs: frozenset[str],
    weigh: BatchWeights,
    anchor: BatchAnchors = no_anchors,
    clip_grad_norm: float | None = None,
) -> StepResult:
    """Optimise the mean loss over all pairs of all ranks and micro-batches.

    Weights and anchors of all micro-batches are computed first, from the policy before this step and before the step builds any
    graph. Every rank passes the same number of micro-batches. A rank without pairs passes fillers, which run the same
    forwards (FSDP2 would hang otherwise) and contribute exactly zero.

    Raises:
        TrainingDiverged: on every rank, before the update, if a loss or the gradient is not finite on any.
    """
    micro_batches = [what_is_read(loss, batch) for batch in micro_batches]
    counts = torch.tensor([[b.num_pairs, b.num_tokens] for b in micro_batches], device=world.device).sum(0)
    pairs, tokens = (int(n) for n in world.sum(counts))
    # FSDP2 averages gradients over ranks. The loss below is a sum over ranks, divided by the number of all pairs.
    scale = (world.size if world.is_distributed else 1) / pairs
    sums = MetricSums()
    losses: list[Tensor] = []
    beside = [(weigh(batch), anchor(batch)) for batch in micro_batches]
    anchor_grad = LossTraits.of(loss).anchor_grad
    for index, batch in enumerate(micro_batches):
        gradient_sync(policy.model, index == len(micro_batches) - 1)
        weights, anchors = beside[index]
        output = score_pairs(
            policy,
            reference,
            batch,
            needs,
            weights,
            loss,
            anchors=anchors,
            anchor_grad=anchor_grad,
            scale=scale,
        )
        sums.add(loss_metrics(output), batch.real)
        losses.append(output.losses[batch.real])
    trained = policy.trainable_parameters()
    grads = [p.grad for p in trained if p.grad is not None]
    norm = nn.utils.get_total_norm(grads)
    norm_value = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    _stop_unless_finite(torch.cat(losses), norm_value, micro_batches, world, step)
    if clip_grad_norm is not None:
        nn.utils.clip_grads_with_norm_(trained, clip_grad_norm, norm)
    optimizer.step()
    refresh_float8_scales(policy.model)
    optimizer.zero_grad(set_to_none=True)
    return StepResult(sums, pairs, tokens, norm_value)


def _stop_unless_finite(
    losses: Tensor, norm: float, micro_batches: Sequence[PairBatch], world: World, step: int
) -> None:
    finite = losses.isfinite()
    norm_finite = norm == norm and abs(norm) != float("inf")
    if not world.any(not (bool(finite.all()) and norm_finite)):
        return
    rows = [row for batch in micro_batches for row in batch.rows if row >= 0]
    bad = [row for row, good in zip(rows, finite.tolist(), strict=True) if not good]
    everyone = world.gather_objects((rows, bad))
    named = sorted({row for _, bad_rows in everyone for row in bad_rows})
    batch_rows = sorted({row for all_rows, _ in everyone for row in all_rows})
    cause = f"the loss of rows {named} is not finite" if named else f"the gradient norm is {norm}"
    raise TrainingDiverged(step, cause, batch_rows, named)
