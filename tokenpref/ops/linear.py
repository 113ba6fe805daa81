"""Token statistics from hidden states and the LM head, without ever holding the logits of all positions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenpref.ops._answers import AnswerRows, check_needs, check_reference, check_shapes
from tokenpref.ops._closed_form import (
    KL_STATISTICS,
    OUTPUTS,
    RowStatistics,
    accumulation_dtype,
    logit_gradient,
    row_statistics,
)
from tokenpref.stats import STATISTICS, TokenStats

__all__ = ["DEFAULT_CHUNK_SIZE", "linear_token_stats", "score_tokens"]

DEFAULT_CHUNK_SIZE = 512


def linear_token_stats(
    hidden: Tensor,
    head_weight: Tensor,
    ref_hidden: Tensor | None,
    ref_head_weight: Tensor | None,
    labels: Tensor,
    *,
    weights: Tensor | None = None,
    needs: frozenset[str] = frozenset({"ref"}),
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    ref_logps: Tensor | None = None,
) -> TokenStats:
    """Token statistics from the last hidden states and the LM heads of both models.

    The numbers and gradients of :func:`~tokenpref.ops.token_stats_from_logits` on ``hidden @ head_weight.T``, but only
    positions that predict an answer's token meet the head, ``chunk_size`` at a time, and the backward recomputes their
    logits. The gradient flows to ``hidden`` and ``head_weight`` (which gets none if it requires none).

    Args:
        hidden: policy's last hidden states ``[B, L, D]``, as its LM head takes them (after the final norm).
        head_weight: policy's LM head ``[V, D]``.
        ref_hidden: reference's last hidden states ``[B, L, D']``; None when ``needs`` asks nothing of the reference,
            or with ``ref_logps``.
        ref_head_weight: reference's LM head ``[V, D']``; must stay unchanged until the backward.
        labels: ``[B, L]`` int64, -100 where no token is scored. The shift happens here: position t predicts
            label t + 1.
        weights: token weights ``[B, T]`` with T = L - 1, in the columns of the predicted tokens.
        needs: of "ref", "kl_ref_policy", "kl_policy_ref", "entropy": what to compute beside the policy's
            log-probabilities ("weights" and "anchor" are ignored: a loss checks them).
        chunk_size: positions whose logits exist at a time.
        ref_logps: the reference's log-probabilities ``[B, T]`` in place of ``ref_hidden``, when no KL is needed.

    Returns:
        Statistics ``[B, T]`` in nats, in float32, or in float64 for float64 hidden states.

    Raises:
        ValueError: for wrong shapes, unknown names in ``needs``, or a reference that does not serve them.
    """
    computed = check_needs(needs)
    check_reference(computed, "ref_hidden", ref_hidden, ref_logps)
    check_shapes(
        labels, {"hidden": hidden, "ref_hidden": ref_hidden}, {"weights": weights, "ref_logps": ref_logps}
    )
    rows = AnswerRows.of(labels)
    from_hidden = computed if ref_logps is None else computed - {"ref"}
    use_reference = ref_hidden is not None and from_hidden - {"entropy"}
    values = score_tokens(
        rows.take(hidden),
        head_weight,
        rows.targets,
        ref_hidden=rows.take(ref_hidden.detach()) if ref_hidden is not None and use_reference else None,
        ref_head_weight=ref_head_weight,
        needs=from_hidden,
        chunk_size=chunk_size,
    )
    return rows.token_stats(values, ref_logps, weights)


def score_tokens(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    ref_hidden: Tensor | None = None,
    ref_head_weight: Tensor | None = None,
    needs: frozenset[str] = frozenset(),
    chunk_size: int = DEFAULT_CHUNK_SIZE,
) -> dict[str, Tensor]:
    """Statistics of rows that are already selected; what :func:`linear_token_stats` scatters into ``[B, T]``.

    Args:
        hidden: policy's last hidden states ``[N, D]`` at the positions to score.
        head_weight: policy's LM head ``[V, D]``.
        targets: ``[N]`` int64, the token that each position predicts.
        ref_hidden: reference's last hidden states ``[N, D']``.
        ref_head_weight: reference's LM head ``[V, D']``.
        needs: of "ref", "kl_ref_policy", "kl_policy_ref", "entropy".
        chunk_size: rows whose logits exist at a time.

    Returns:
        ``[N]`` tensors by the name of their :class:`~tokenpref.stats.TokenStats` field: "policy_logps" and what
        ``needs`` names. With N = 0 they are empty and still part of the graph.

    Raises:
        ValueError: for wrong shapes, unknown names in ``needs``, or a missing reference.
    """
    computed = check_needs(needs)
    check_reference(computed, "ref_hidden", ref_hidden, None)
    _check_heads(hidden, head_weight, targets, ref_hidden, ref_head_weight)
    if not isinstance(chunk_size, int) or chunk_size < 1:
        raise ValueError(f"chunk_size must be an integer >= 1, got {chunk_size!r}")
    if ref_hidden is not None and ref_head_weight is not None:
        ref_hidden, ref_head_weight = ref_hidden.detach(), ref_head_weight.detach()
    outputs = _LinearStatistics.apply(
        hidden, head_weight, ref_hidden, ref_head_weight, targets, computed, chunk_size
    )
    return {name: value for name, value in zip(OUTPUTS, outputs, strict=True) if value is not None}


def _check_heads(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    ref_hidden: Tensor | None,
    ref_head_weight: Tensor | None,
) -> None:
    def check_head(prefix: str, states: Tensor, weight: Tensor) -> None:
        if states.dim() != 2 or weight.dim() != 2 or states.shape[1] != weight.shape[1]:
            raise ValueError(
                f"{prefix}hidden [..., D] and {prefix}head_weight [V, D] must agree in D, "
                f"got {list(states.shape)} and {list(weight.shape)}"
            )
        if states.shape[0] != targets.shape[0]:
            raise ValueError(f"{prefix}hidden has {states.shape[0]} rows for {targets.shape[0]} targets")

    check_head("", hidden, head_weight)
    if ref_hidden is None:
        return
    if ref_head_weight is None:
        raise ValueError("ref_hidden was given without ref_head_weight; pass the reference's LM head [V, D]")
    check_head("ref_", ref_hidden, ref_head_weight)
    if ref_head_weight.shape[0] != head_weight.shape[0]:
        raise ValueError(
            f"the heads differ in vocabulary: head_weight has {head_weight.shape[0]} rows, "
            f"ref_head_weight {ref_head_weight.shape[0]}"
        )


def _chunks(total: int, size: int) -> Iterator[slice]:
    for start in range(0, total, size):
        yield slice(start, min(start + size, total))


def _logits(hidden: Tensor | None, weight: Tensor | None, part: slice) -> Tensor | None:
    # In the model's own dtype: the model's output layer would round its logits the same way.
    return None if hidden is None or weight is None else hidden[part] @ weight.T


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``, without rounding the product to half precision on the way."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        total.add_(torch.mm(left, right, out_dtype=total.dtype))
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


class _LinearStatistics(torch.autograd.Function):
    """Statistics of rows of hidden states ``[N, D]``, a chunk of logits at a time.

    Between forward and backward it holds the hidden states, the heads, the targets and per-row numbers: nothing of
    size V beside the heads.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        ref_hidden: Tensor | None,
        ref_head_weight: Tensor | None,
        targets: Tensor,
        needs: frozenset[str],
        chunk_size: int,
    ) -> tuple[Tensor | None, ...]:
        if not needs - {"entropy"}:
            ref_hidden = ref_head_weight = None
        size, dtype = targets.shape[0], accumulation_dtype(hidden.dtype)
        names = ["policy_logps", *(STATISTICS[name] for name in needs)]
        values = {name: hidden.new_empty(size, dtype=dtype) for name in names}
        lse = hidden.new_empty(size, dtype=dtype)
        ref_lse = None
        if ref_hidden is not None:
            ref_lse = hidden.new_empty(size, dtype=accumulation_dtype(ref_hidden.dtype))
        for part in _chunks(size, chunk_size):
            logits = hidden[part] @ head_weight.T
            rows = row_statistics(logits, _logits(ref_hidden, ref_head_weight, part), targets[part], needs)
            for name in names:
                values[name][part] = cast(Tensor, rows.values[name])
            lse[part] = rows.lse
            if ref_lse is not None and rows.ref_lse is not None:
                ref_lse[part] = rows.ref_lse
        if not needs & KL_STATISTICS:
            ref_hidden = ref_head_weight = ref_lse = None  # the backward does not need them
        ctx.save_for_backward(
            hidden,
            head_weight,
            ref_hidden,
            ref_head_weight,
            targets,
            lse,
            ref_lse,
            values.get("kl_policy_ref"),
            values.get("entropy"),
        )
        ctx.chunk_size = chunk_size
        ctx.set_materialize_grads(False)
        if "ref_logps" in values:
            ctx.mark_non_differentiable(values["ref_logps"])
        return tuple(values.get(name) for name in OUTPUTS)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *output_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, head_weight, ref_hidden, ref_head_weight, targets, lse, ref_lse, kl_policy_ref, entropy = (
            ctx.saved_tensors
        )
        grads = {name: grad for name, grad in zip(OUTPUTS, output_grads, strict=True) if grad is not None}
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = None
        if want_weight:
            grad_weight = torch.zeros_like(head_weight, dtype=accumulation_dtype(head_weight.dtype))

        def cut(values: Tensor | None, part: slice) -> Tensor | None:
            return None if values is None else values[part]

        for part in _chunks(targets.shape[0], ctx.chunk_size):
            kept = {"kl_policy_ref": cut(kl_policy_ref, part), "entropy": cut(entropy, part)}
            rows = RowStatistics(kept, lse[part], cut(ref_lse, part))
            gradient = logit_gradient(
                hidden[part] @ head_weight.T,
                _logits(ref_hidden, ref_head_weight, part),
                targets[part],
                rows,
                {name: grad[part] for name, grad in grads.items()},
            ).to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = gradient @ head_weight
            if grad_weight is not None:
                _add_product(grad_weight, gradient.T, hidden[part])
        if grad_weight is not None:
            grad_weight = grad_weight.to(head_weight.dtype)
        return grad_hidden, grad_weight, None, None, None, None, None
