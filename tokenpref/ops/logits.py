"""Token statistics from the logits of all positions: the readable reference for :mod:`tokenpref.ops.linear`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenpref.ops.answers import AnswerRows, check_needs, check_reference, check_shapes
from tokenpref.ops.closed_form import OUTPUTS, RowStatistics, logit_gradient, row_statistics
from tokenpref.stats import TokenStats

__all__ = ["token_stats_from_logits"]


def token_stats_from_logits(
    policy_logits: Tensor,
    ref_logits: Tensor | None,
    labels: Tensor,
    *,
    weights: Tensor | None = None,
    needs: frozenset[str] = frozenset({"ref"}),
    ref_logps: Tensor | None = None,
) -> TokenStats:
    """Token statistics from the logits of both models.

    Only positions that predict an answer's token are used. The gradient flows to ``policy_logits`` only. It is
    computed in closed form and cannot be differentiated again.

    Args:
        policy_logits: ``[B, L, V]``.
        ref_logits: ``[B, L, V]``; None if ``needs`` names nothing of the reference, or with ``ref_logps``.
        labels: ``[B, L]`` int64, -100 where no token is scored. The shift happens here: position t predicts
            label t + 1.
        weights: token weights ``[B, T]`` with T = L - 1, in the columns of the predicted tokens.
        needs: of "ref", "kl_ref_policy", "kl_policy_ref", "entropy": what to compute in addition to the policy's
            log-probabilities ("weights" and "anchor" are ignored, because the loss checks them).
        ref_logps: the reference's log-probabilities ``[B, T]`` instead of ``ref_logits``, if no KL is needed.

    Returns:
        Statistics ``[B, T]`` in nats, in float32, or in float64 for float64 logits.

    Raises:
        ValueError: for wrong shapes, unknown names in ``needs``, or a reference that does not serve them.
    """
    computed = check_needs(needs)
    check_reference(computed, "ref_logits", ref_logits, ref_logps)
    check_shapes(
        labels,
        {"policy_logits": policy_logits, "ref_logits": ref_logits},
        {"weights": weights, "ref_logps": ref_logps},
    )
    if ref_logits is not None and ref_logits.shape != policy_logits.shape:
        raise ValueError(
            f"ref_logits {list(ref_logits.shape)} and policy_logits {list(policy_logits.shape)} differ in shape"
        )
    rows = AnswerRows.of(labels)
    use_reference = ref_logits is not None and computed - {"entropy"}
    reference = rows.take(ref_logits.detach()) if ref_logits is not None and use_reference else None
    outputs = _LogitStatistics.apply(rows.take(policy_logits), reference, rows.targets, computed)
    values = {name: value for name, value in zip(OUTPUTS, outputs, strict=True) if value is not None}
    return rows.token_stats(values, ref_logps, weights)


class _LogitStatistics(torch.autograd.Function):
    """Statistics of rows of logits ``[N, V]``. The backward pass recomputes the probabilities from the log-sum-exps."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, ref_logits: Tensor | None, targets: Tensor, needs: frozenset[str]
    ) -> tuple[Tensor | None, ...]:
        rows = row_statistics(logits, ref_logits, targets, needs)
        values = rows.values
        ctx.save_for_backward(
            logits,
            ref_logits,
            targets,
            rows.lse,
            rows.ref_lse,
            values.get("kl_policy_ref"),
            values.get("entropy"),
        )
        ctx.set_materialize_grads(False)
        if "ref_logps" in values:
            ctx.mark_non_differentiable(values["ref_logps"])
        return tuple(values.get(name) for name in OUTPUTS)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *output_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, ref_logits, targets, lse, ref_lse, kl_policy_ref, entropy = ctx.saved_tensors
        rows = RowStatistics({"kl_policy_ref": kl_policy_ref, "entropy": entropy}, lse, ref_lse)
        grads = {name: grad for name, grad in zip(OUTPUTS, output_grads, strict=True) if grad is not None}
        gradient = logit_gradient(logits, ref_logits, rows, grads)
        if "policy_logps" in grads:
            gradient.scatter_add_(-1, targets[:, None], grads["policy_logps"][:, None])
        return gradient.to(logits.dtype), None, None, None
