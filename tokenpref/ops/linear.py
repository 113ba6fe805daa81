"""Token statistics from hidden states and the LM head, without ever holding the logits of all positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenpref.ops._backward import backward_blocks
from tokenpref.ops._blocks import MIB, Blocks, Heads, plan_blocks
from tokenpref.ops._closed_form import KL_STATISTICS, OUTPUTS, accumulation_dtype
from tokenpref.ops._forward import Found, forward_blocks
from tokenpref.ops._scratch import Kept
from tokenpref.ops.answers import AnswerRows, check_needs, check_reference, check_shapes, needs_of_rows
from tokenpref.ops.room import HeadRoom
from tokenpref.stats import TokenStats

__all__ = ["DEFAULT_MEMORY_MB", "fits", "linear_token_stats", "score_tokens", "sums_in_place"]

DEFAULT_MEMORY_MB = 128.0

_VALUES_OF_BACKWARD = ("kl_policy_ref", "entropy")


def linear_token_stats(
    hidden: Tensor,
    head_weight: Tensor,
    ref_hidden: Tensor | None,
    ref_head_weight: Tensor | None,
    labels: Tensor,
    *,
    weights: Tensor | None = None,
    needs: frozenset[str] = frozenset({"ref"}),
    memory_mb: float = DEFAULT_MEMORY_MB,
    ref_logps: Tensor | None = None,
    compiled: bool = False,
) -> TokenStats:
    """Token statistics from the last hidden states and the LM heads of both models.

    The numbers and gradients of :func:`~tokenpref.ops.token_stats_from_logits` on ``hidden @ head_weight.T``, but only
    positions that predict an answer's token meet the head, a block of the vocabulary at a time, and what ``memory_mb`` does
    not hold the backward computes again. The gradient flows to ``hidden`` and ``head_weight`` (which gets none if it requires
    none; the forward then ends with one vector a position, and the backward multiplies no matrix).

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
        memory_mb: MiB for logits and what is kept of them until the backward, twice that with a KL, which is of two models;
            it changes time and memory, and numbers by rounding only.
        ref_logps: the reference's log-probabilities ``[B, T]`` in place of ``ref_hidden``, when no KL is needed.
        compiled: make one kernel of the passes over a block of logits with ``torch.compile``: some ten seconds the first
            time and, on a CPU, a C++ compiler. Numbers change by rounding only.

    Returns:
        Statistics ``[B, T]`` in nats, in float32, or in float64 for float64 hidden states.

    Raises:
        ValueError: for wrong shapes, unknown names in ``needs``, or a reference that does not serve them.
    """
    from_hidden = needs_of_rows(needs, ref_hidden, ref_logps)
    check_shapes(
        labels, {"hidden": hidden, "ref_hidden": ref_hidden}, {"weights": weights, "ref_logps": ref_logps}
    )
    rows = AnswerRows.of(labels)
    use_reference = ref_hidden is not None and from_hidden - {"entropy"}
    values = score_tokens(
        rows.take(hidden),
        head_weight,
        rows.targets,
        ref_hidden=rows.take(ref_hidden.detach()) if ref_hidden is not None and use_reference else None,
        ref_head_weight=ref_head_weight,
        needs=from_hidden,
        memory_mb=memory_mb,
        compiled=compiled,
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
    memory_mb: float = DEFAULT_MEMORY_MB,
    room: HeadRoom | None = None,
    add_to: Tensor | None = None,
    compiled: bool = False,
) -> dict[str, Tensor]:
    """Statistics of rows that are already selected; what :func:`linear_token_stats` scatters into ``[B, T]``.

    Args:
        hidden: policy's last hidden states ``[N, D]`` at the positions to score.
        head_weight: policy's LM head ``[V, D]``.
        targets: ``[N]`` int64, the token that each position predicts.
        ref_hidden: reference's last hidden states ``[N, D']``.
        ref_head_weight: reference's LM head ``[V, D']``.
        needs: of "ref", "kl_ref_policy", "kl_policy_ref", "entropy".
        memory_mb: as in :func:`linear_token_stats`.
        room: where what is kept for the backward stays between steps; None frees it with the graph.
        add_to: ``[V, D]``, to which the backward adds the head's gradient. Autograd then sees none of it, so that calls that
            share a head need one such tensor together.
        compiled: as in :func:`linear_token_stats`.

    Returns:
        ``[N]`` tensors by the name of their :class:`~tokenpref.stats.TokenStats` field: "policy_logps" and what
        ``needs`` names. With N = 0 they are empty and still part of the graph.

    Raises:
        ValueError: for wrong shapes, unknown names in ``needs``, or a missing reference.
    """
    computed = check_needs(needs)
    check_reference(computed, "ref_hidden", ref_hidden, None)
    _check_heads(hidden, head_weight, targets, ref_hidden, ref_head_weight)
    if not memory_mb > 0:
        raise ValueError(f"memory_mb must be a number above 0, got {memory_mb!r}")
    if add_to is not None:
        _check_place(add_to, hidden, head_weight)
        head_weight = head_weight.detach()
    if ref_hidden is not None and ref_head_weight is not None:
        ref_hidden, ref_head_weight = ref_hidden.detach(), ref_head_weight.detach()
    outputs = _LinearStatistics.apply(
        hidden,
        head_weight,
        ref_hidden,
        ref_head_weight,
        targets,
        computed,
        memory_mb,
        torch.is_grad_enabled(),
        room,
        add_to,
        compiled,
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


def _check_place(add_to: Tensor, hidden: Tensor, head_weight: Tensor) -> None:
    if add_to.shape != head_weight.shape:
        raise ValueError(
            f"add_to must have the shape {list(head_weight.shape)} of head_weight, got {list(add_to.shape)}"
        )
    if not sums_in_place(hidden, head_weight) or add_to.dtype != head_weight.dtype:
        raise ValueError(
            f"add_to needs hidden states, head and itself in float32, or all in float64; got {hidden.dtype}, {head_weight.dtype} "
            f"and {add_to.dtype}; leave it out"
        )


def sums_in_place(hidden: Tensor, head_weight: Tensor) -> bool:
    """Whether the head's gradient is summed in its own dtype, so that sums can go on in the same tensor."""
    return hidden.dtype == head_weight.dtype == accumulation_dtype(hidden.dtype)


def fits(
    rows: int,
    hidden: Tensor,
    head_weight: Tensor,
    needs: frozenset[str],
    memory_mb: float,
    *,
    compiled: bool = False,
) -> bool:
    """Whether the backward of so many rows finds all in memory that it needs of the vocabulary."""
    blocks = _plan(rows, hidden, head_weight, needs, memory_mb, compiled)
    return blocks.first_kept == 0 and (blocks.ref_kept == rows or not needs & KL_STATISTICS)


def _plan(
    rows: int,
    hidden: Tensor,
    head_weight: Tensor,
    needs: frozenset[str],
    memory_mb: float,
    compiled: bool,
    *,
    gradient: bool = False,
) -> Blocks:
    keep = 2 if needs & KL_STATISTICS else 1
    return plan_blocks(
        rows,
        head_weight.shape[0],
        models=2 if needs - {"entropy"} else 1,
        keep=keep,
        dtype=hidden.dtype,
        device=hidden.device,
        budget=keep * int(memory_mb * MIB),
        gradient=head_weight.shape[1] if gradient else 0,
        compiled=compiled,
    )


def _flattened(heads: Heads, found: Found) -> tuple[list[int], list[Tensor | None]]:
    """What the backward needs but for what is kept, as autograd holds it: tensors in a row, and how many belong together."""
    single = [*vars(heads).values(), *(found.values.get(name) for name in _VALUES_OF_BACKWARD)]
    groups = [found.lse, found.vectors, *found.shifts]
    return [len(group) for group in groups], [*single, *(tensor for group in groups for tensor in group)]


def _restored(lengths: list[int], tensors: Sequence[Tensor | None]) -> tuple[Heads, Found]:
    count = len(fields(Heads))
    heads = Heads(*tensors[:count])  # type: ignore[arg-type]  # as they were
    rest = iter(tensors[count:])
    values = {name: next(rest) for name in _VALUES_OF_BACKWARD}
    lse, vectors, *shifts = [[cast(Tensor, next(rest)) for _ in range(length)] for length in lengths]
    present = {name: value for name, value in values.items() if value is not None}
    return heads, Found(present, lse, (shifts[0], shifts[1]), vectors=vectors)


class _LinearStatistics(torch.autograd.Function):
    """Statistics of rows of hidden states ``[N, D]``; see :mod:`tokenpref.ops._blocks`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        ref_hidden: Tensor | None,
        ref_head_weight: Tensor | None,
        targets: Tensor,
        needs: frozenset[str],
        memory_mb: float,
        with_grad: bool,
        room: HeadRoom | None,
        add_to: Tensor | None,
        compiled: bool,
    ) -> tuple[Tensor | None, ...]:
        if not needs - {"entropy"}:
            ref_hidden = ref_head_weight = None
        heads = Heads(hidden, head_weight, targets, ref_hidden, ref_head_weight)
        want_hidden, want_weight = (with_grad and want for want in ctx.needs_input_grad[:2])
        lodges = want_weight and hidden.dtype == head_weight.dtype and head_weight.is_contiguous()
        want_weight |= with_grad and add_to is not None
        blocks = _plan(targets.shape[0], hidden, head_weight, needs, memory_mb, compiled, gradient=lodges)
        # A frozen head needs no gradient of its own: the rows' gradient vectors are all that the backward asks for.
        vectors = want_hidden and not want_weight and not needs & {"kl_policy_ref", "entropy"}
        if vectors or not (want_hidden or want_weight):
            blocks = blocks.none_kept()
        size = Kept.size(targets.shape[0], blocks)
        memory = hidden.new_empty(size) if room is None or not size else room.lend(size, hidden)
        gradient = torch.empty_like(head_weight) if blocks.lodged else None
        kept = Kept(memory, targets.shape[0], blocks, gradient)
        found = forward_blocks(heads, needs, blocks, kept, vectors=vectors)
        if not needs & KL_STATISTICS:
            heads = replace(heads, ref_hidden=None, ref_weight=None)  # the backward does not need them
            found.lse, found.shifts = found.lse[:1], (found.shifts[0], [])
        ctx.layout, tensors = _flattened(heads, found)
        ctx.save_for_backward(*tensors)
        # Not autograd's to pack away, and the backward writes in both.
        ctx.memory, ctx.gradient = memory, gradient
        ctx.blocks, ctx.room, ctx.add_to = blocks, room, add_to
        ctx.set_materialize_grads(False)
        if "ref_logps" in found.values:
            ctx.mark_non_differentiable(found.values["ref_logps"])
        return tuple(found.values.get(name) for name in OUTPUTS)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *output_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        heads, found = _restored(ctx.layout, ctx.saved_tensors)
        blocks = ctx.blocks
        # The memory is the next forward's from here on, the gradient the caller's.
        memory, ctx.memory = ctx.memory, None
        gradient, ctx.gradient = ctx.gradient, None
        if memory is None:  # asked again: everything is computed again
            blocks = blocks.none_kept()
        else:
            found.kept = Kept(memory, heads.targets.shape[0], blocks, gradient)
        grads = {name: grad for name, grad in zip(OUTPUTS, output_grads, strict=True) if grad is not None}
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden, grad_weight = backward_blocks(
            heads,
            found,
            grads,
            blocks,
            want_hidden=want_hidden,
            want_weight=want_weight or ctx.add_to is not None,
            write_to=gradient if ctx.add_to is None else ctx.add_to,
            add=ctx.add_to is not None,
        )
        if ctx.room is not None and memory is not None and memory.numel():
            ctx.room.take_back(memory)
        return grad_hidden, grad_weight if want_weight else None, *[None] * 9
