"""Statistics of rows of hidden states under the LM head, and their gradients, a block of the vocabulary at a time.

Raw logits are hidden @ W^T. For most models they are the logits; others scale and cap them (:mod:`tokenpref.ops.final_logits`).
With rows n, tokens v, policy logits z and reference logits z', one pass over blocks of columns gives for each row

* the sums of exp(z - m) and exp(z' - m') with running maxima m and m', so both log-sum-exps;
* the sums of exp(z' - m') d and exp(z - m) d with d = z - z', and of exp(z - m) (z - m), so both KLs and the entropy: with p and
  q the softmax of z and z', KL(q || p) = lse - lse' - sum_v q d;
* the sum of exp(z' - m') expm1(d), so lse - lse' = log1p(sum_v q expm1(d)) to the last digit where the models are close. As a
  difference of two log-sum-exps it would carry the rounding of both, which is larger than a small KL.

The backward pass has the gradient of a block of logits in closed form (:mod:`tokenpref.ops.closed_form`). It turns it into the
gradient of raw logits, and multiplies that with the block's weights and with the hidden states. A block of columns, not of rows,
reads its part of the heads once and writes its part of the head's gradient once.

The forward pass keeps the raw logits of as many blocks as the budget holds, and the backward pass recomputes the others by the
same products. The cut into blocks does not depend on the budget, so the budget changes no bit of the result. :func:`block_sums`
and :func:`block_gradient` are pure functions of one block, and ``torch.compile`` can make one kernel of each.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenpref._memory import free_memory
from tokenpref.ops.closed_form import (
    KL_STATISTICS,
    OUTPUTS,
    RowStatistics,
    accumulation_dtype,
    exponentials,
    logit_gradient,
)
from tokenpref.ops.final_logits import LogitMap
from tokenpref.ops.products import add_product, product

__all__ = ["block_gradient", "block_sums", "head_statistics", "logit_budget"]

MIB = 1 << 20
# Of one model's logits; a pass has up to six tensors of that size. A CPU should find them in its caches, a GPU wants few and
# large kernels.
_BLOCK_BYTES = {"cpu": 8 * MIB, "cuda": 64 * MIB}
_WIDEST_ON_CPU = 2048  # columns: products may need the block's weights once more
_UNIT = 64  # rows of logits that do not begin at a cache line cost a product on a CPU a third of its speed

# The default budget of one model's logits: this part of the free memory, and at most this many times the head's weight.
_PART_OF_FREE = 16
_TIMES_WEIGHT = 7

# Two ways to one number that differ by more than float32's rounding of logits: the first one has overflowed.
_CLOSE = 1e-4

_SUMS = ("total", "own", "gap", "growth")


def logit_budget(memory_mb: float | None, weight_bytes: int, device: torch.device) -> int:
    """Bytes of logits that are kept for each model.

    By default the budget follows the head's size, because recomputing a logit takes D multiplications: seven times the weight
    holds the logits of 7 D positions. It is at most a sixteenth of the memory that is free.
    """
    if memory_mb is not None:
        return int(memory_mb * MIB)
    free = free_memory(device)
    wanted = _TIMES_WEIGHT * weight_bytes
    return wanted if free is None else min(wanted, free // _PART_OF_FREE)


def _cut(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> list[slice]:
    """Blocks of columns, as equal as can be."""
    row = max(rows, 1) * accumulation_dtype(dtype).itemsize
    columns = min(max(_BLOCK_BYTES.get(device.type, _BLOCK_BYTES["cuda"]) // row, 1), vocabulary)
    if device.type == "cpu":
        columns = min(columns, _WIDEST_ON_CPU)
    unit = _UNIT if _UNIT <= columns < vocabulary else 1
    count = -(-vocabulary // (columns // unit * unit))
    columns = -(-vocabulary // count // unit) * unit
    return [slice(start, min(start + columns, vocabulary)) for start in range(0, vocabulary, columns)]


def block_sums(
    raw: Sequence[Tensor],
    shifts: Sequence[Tensor],
    needs: frozenset[str],
    final: LogitMap,
    *,
    precise: bool,
    with_exponentials: bool,
) -> list[dict[str, Tensor]]:
    """The sums that a block of columns adds to the statistics of its rows.

    Args:
        raw: raw logits ``[N, C]`` of the policy, and of the reference if ``needs`` asks for one.
        shifts: the largest logit of each row so far, ``[N]`` for each model, in the accumulation dtype.
        needs: of "ref", "kl_ref_policy", "kl_policy_ref", "entropy".
        final: from raw logits to logits, for both models.
        precise: whether to sum expm1, for a KL that would be lost in the rounding of two log-sum-exps.
        with_exponentials: whether to return these too, times the derivative of the policy's soft cap.

    Returns:
        For each model "shift", now with this block, and sums relative to it: "total" of the exponentials, and of their products
        with the model's shifted logits ("own"), with the difference d of the models' logits ("gap") and with expm1(d) ("growth").
    """
    wide = [final.logits(own).to(shift.dtype) for own, shift in zip(raw, shifts, strict=True)]
    tops = [torch.maximum(shift, own.amax(-1)) for own, shift in zip(wide, shifts, strict=True)]
    powers = [exponentials(own, top) for own, top in zip(wide, tops, strict=True)]
    found = [{"shift": top, "total": power.sum(-1)} for top, power in zip(tops, powers, strict=True)]
    if "entropy" in needs:
        found[0]["own"] = (wide[0] - tops[0][:, None]).mul_(powers[0]).sum(-1)
    if needs & KL_STATISTICS:
        gap = wide[0] - wide[1]
        for index, name in enumerate(("kl_policy_ref", "kl_ref_policy")):
            if name in needs:
                found[index]["gap"] = (gap * powers[index]).sum(-1)
        if precise:
            found[1]["growth"] = gap.expm1_().mul_(powers[1]).sum(-1)
    if with_exponentials:
        for own, power in zip(found, powers, strict=True):
            own["exponentials"] = final.through_cap_(power, wide[0])
    return found


def block_gradient(
    raw: Tensor,
    ref_raw: Tensor | None,
    columns: Tensor,
    rows: RowStatistics,
    grads: Mapping[str, Tensor],
    final: LogitMap,
) -> Tensor:
    """The gradient of a block of raw logits, in their dtype.

    Args:
        raw: the policy's raw logits ``[N, C]``.
        ref_raw: the reference's, if a KL has a gradient.
        columns: ``[N]`` int64, the target's column in this block; out of range where it lies in another one.
        rows: statistics of these rows.
        grads: incoming gradients ``[N]`` by statistic, times the logits' scale.
        final: from raw logits to logits, for both models.
    """
    logits = final.logits(raw)
    ref_logits = None if ref_raw is None else final.logits(ref_raw)
    gradient = logit_gradient(logits, ref_logits, rows, grads)
    if "policy_logps" in grads:
        places, here = _inside(columns, logits.shape[1])
        gradient.scatter_add_(1, places[:, None], torch.where(here, grads["policy_logps"], 0)[:, None])
    return final.through_cap_(gradient, logits).to(raw.dtype)


def _inside(columns: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Columns that exist in a block, and whether they are the rows' own."""
    return columns.clamp(0, width - 1), (columns >= 0) & (columns < width)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel for all sizes; made when it is first called."""
    made: Callable[..., Any] = torch.compile(function, dynamic=True)
    return made


class _Sums:
    """A model's sums over the blocks so far, ``[N]`` in float64, relative to the largest logit so far."""

    def __init__(self, hidden: Tensor) -> None:
        self.shift = hidden.new_full((len(hidden),), -torch.inf, dtype=accumulation_dtype(hidden.dtype))
        self.at = torch.zeros_like(self.shift)  # the target's raw logit, and after all blocks its logit
        for name in _SUMS:
            setattr(self, name, torch.zeros_like(self.shift, dtype=torch.float64))

    total: Tensor
    own: Tensor
    gap: Tensor
    growth: Tensor

    def add(self, block: Mapping[str, Tensor], raw: Tensor, columns: Tensor) -> Tensor:
        """Add a block's :func:`block_sums`; returns by how much the earlier sums shrank."""
        moved = torch.where(self.shift.isinf(), 0.0, (self.shift - block["shift"]).double())
        shrink = moved.exp()
        self.shift = block["shift"]
        self.own.add_(moved * self.total)
        for name in _SUMS:
            total: Tensor = getattr(self, name).mul_(shrink)
            if name in block:
                total.add_(block[name])
        places, here = _inside(columns, raw.shape[1])
        self.at = torch.where(here, raw.gather(1, places[:, None])[:, 0], self.at)
        return shrink.to(self.at.dtype)

    @property
    def lse(self) -> Tensor:
        return self.shift.double() + self.total.log()


def _statistics(models: Sequence[_Sums], needs: frozenset[str], *, precise: bool) -> dict[str, Tensor]:
    policy, dtype = models[0], models[0].at.dtype
    found = {"policy_logps": policy.at.double() - policy.lse}
    if "entropy" in needs:
        found["entropy"] = policy.total.log() - policy.own / policy.total
    if len(models) == 2:
        reference = models[1]
        if "ref" in needs:
            found["ref_logps"] = reference.at.double() - reference.lse
        apart = policy.lse - reference.lse
        if precise:  # unless the sum of expm1 overflowed, or lost what the reference gives no probability to
            close = (reference.growth / reference.total).log1p()
            apart = torch.where((close - apart).abs() < _CLOSE, close, apart)
        # Rounding may leave a little less than nothing.
        if "kl_ref_policy" in needs:
            found["kl_ref_policy"] = (apart - reference.gap / reference.total).clamp(min=0)
        if "kl_policy_ref" in needs:
            found["kl_policy_ref"] = (policy.gap / policy.total - apart).clamp(min=0)
    return {name: value.to(dtype) for name, value in found.items()}


class _TorchPasses:
    """The passes over a block in PyTorch's operations, or compiled."""

    def __init__(self, compiled: bool) -> None:
        self._sums = _compiled(block_sums) if compiled else block_sums
        self.block_gradient = _compiled(block_gradient) if compiled else block_gradient

    def add_block(
        self,
        models: Sequence[_Sums],
        raw: Sequence[Tensor],
        columns: Tensor,
        needs: frozenset[str],
        final: LogitMap,
        *,
        precise: bool,
        with_exponentials: bool,
    ) -> list[tuple[Tensor, Tensor]]:
        """Add a block to the models' sums.

        Args:
            models: the policy, and the reference if there is one.
            raw: their raw logits ``[N, C]``.
            columns: ``[N]`` int64, the target's column in this block; out of range where it lies in another one.
            needs: as in :func:`block_sums`.
            final: as in :func:`block_sums`.
            precise: as in :func:`block_sums`.
            with_exponentials: as in :func:`block_sums`.

        Returns:
            With ``with_exponentials``, for each model by how much its earlier sums shrank ``[N]``, and the exponentials.
        """
        shifts = [model.shift for model in models]
        found = self._sums(raw, shifts, needs, final, precise=precise, with_exponentials=with_exponentials)
        shrinks = [model.add(sums, own, columns) for model, sums, own in zip(models, found, raw, strict=True)]
        if not with_exponentials:
            return []
        return [(shrink, sums["exponentials"]) for shrink, sums in zip(shrinks, found, strict=True)]

    def pieces(
        self, rows: RowStatistics, grads: Mapping[str, Tensor]
    ) -> list[tuple[slice, RowStatistics, dict[str, Tensor]]]:
        """Rows with their statistics and gradients, in pieces that each cost only what they need."""
        return _pieces(rows, grads)


def _passes(compiled: bool, device: torch.device) -> Any:
    """The passes over a block: those of :mod:`tokenpref.ops.triton_head` if they are compiled and Triton runs on the device."""
    if compiled and _has_triton(device.type):
        return import_module("tokenpref.ops.triton_head")
    return _TorchPasses(compiled)


@cache
def _has_triton(device: str) -> bool:
    """Whether Triton is installed and has kernels for a device; for a CPU only in its interpreter, which the tests use."""
    runs = device == "cuda" or (device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")
    return runs and find_spec("triton") is not None


def head_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ref_hidden: Tensor | None,
    ref_weight: Tensor | None,
    needs: frozenset[str],
    final: LogitMap,
    *,
    budget: int,
    compiled: bool,
) -> dict[str, Tensor]:
    """Statistics ``[N]`` by name; arguments as in :func:`tokenpref.ops.score_tokens`, with a budget in bytes of each model."""
    wants_grad = torch.is_grad_enabled()
    outputs = _HeadStatistics.apply(
        hidden, weight, ref_hidden, ref_weight, targets, needs, final, budget, wants_grad, compiled
    )
    return {name: value for name, value in zip(OUTPUTS, outputs, strict=True) if value is not None}


class _HeadStatistics(torch.autograd.Function):
    """Statistics of rows of hidden states ``[N, D]``, in the order of ``OUTPUTS``."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        targets: Tensor,
        needs: frozenset[str],
        final: LogitMap,
        budget: int,
        with_grad: bool,
        compiled: bool,
    ) -> tuple[Tensor | None, ...]:
        heads = [(hidden, weight)]
        if needs - {"entropy"}:
            assert ref_hidden is not None and ref_weight is not None
            heads.append((ref_hidden, ref_weight))
        want_hidden, want_weight = (with_grad and want for want in ctx.needs_input_grad[:2])
        # A frozen head has no gradient of its own, and the rows' gradient vectors are all that the backward pass needs.
        vectors_wanted = want_hidden and not want_weight and not needs & {"kl_policy_ref", "entropy"}
        models = [_Sums(states) for states, _ in heads]
        vectors = (
            [torch.zeros_like(hidden, dtype=models[0].at.dtype) for _ in heads] if vectors_wanted else []
        )
        # Of rounded logits a difference of two log-sum-exps, to float32's rounding, says all that there is to know.
        precise = hidden.dtype == models[0].at.dtype
        blocks = _cut(len(hidden), len(weight), hidden.dtype, hidden.device)
        to_keep = 2 if needs & KL_STATISTICS else 1
        fit = budget // max(hidden.element_size() * len(hidden) * blocks[0].stop, 1)
        if vectors_wanted or not (want_hidden or want_weight):
            fit = 0
        kept: dict[int, list[Tensor]] = {}
        passes = _passes(compiled, hidden.device)
        for number, part in enumerate(blocks):
            # Rounded to the hidden states' dtype, as the model's output layer does.
            raw = [product(states, head[part].T) for states, head in heads]
            columns = targets - part.start
            found = passes.add_block(
                models, raw, columns, needs, final, precise=precise, with_exponentials=vectors_wanted
            )
            _add_to_vectors(vectors, found, weight[part])
            if number >= len(blocks) - fit:
                kept[number] = raw[:to_keep]
            del raw, found  # before the next block allocates its own
        for model in models:
            model.at = final.logits(model.at)
        values = _statistics(models, needs, precise=precise)
        for vector, model in zip(vectors, models, strict=False):
            vector /= model.total[:, None]
        lse = [model.lse.to(model.at.dtype) for model in models]
        extra = [models[0].at, *vectors, *[None] * (2 - len(vectors)), *lse, *[None] * (2 - len(lse))]
        others = [values.get("kl_policy_ref"), values.get("entropy")]
        reference = (ref_hidden, ref_weight) if to_keep == 2 else (None, None)
        ctx.save_for_backward(hidden, weight, *reference, targets, *extra, *others)
        ctx.kept, ctx.blocks, ctx.compiled, ctx.final = kept, blocks, compiled, final
        ctx.set_materialize_grads(False)
        if "ref_logps" in values:
            ctx.mark_non_differentiable(values["ref_logps"])
        return tuple(values.get(name) for name in OUTPUTS)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *output_grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, *reference, targets, at, vector, ref_vector, lse, ref_lse, kl, entropy = (
            ctx.saved_tensors
        )
        final = ctx.final
        grads = {
            n: grad * final.scale for n, grad in zip(OUTPUTS, output_grads, strict=True) if grad is not None
        }
        if vector is not None:
            return _from_vectors(hidden, weight, targets, at, (vector, ref_vector), grads, final), *[None] * 9
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        of_hidden = torch.zeros_like(hidden, dtype=lse.dtype) if want_hidden else None
        of_weight = torch.empty_like(weight) if want_weight else None
        passes = _passes(ctx.compiled, hidden.device)
        rows = RowStatistics({"kl_policy_ref": kl, "entropy": entropy}, lse, ref_lse)
        pieces = passes.pieces(rows, grads)
        with_kl = any(own.keys() & KL_STATISTICS for *_, own in pieces)
        heads = [(hidden, weight), reference] if with_kl else [(hidden, weight)]
        for number, part in reversed(list(enumerate(ctx.blocks))):
            raw = ctx.kept.pop(number, None) or [product(states, head[part].T) for states, head in heads]
            made = [
                passes.block_gradient(
                    raw[0][rows],
                    raw[1][rows] if own.keys() & KL_STATISTICS else None,
                    targets[rows] - part.start,
                    statistics,
                    own,
                    final,
                )
                for rows, statistics, own in pieces
            ]
            gradient = made[0] if len(made) == 1 else torch.cat(made)
            del raw, made
            if of_hidden is not None:
                add_product(of_hidden, gradient, weight[part])
            if of_weight is not None:
                add_product(of_weight[part], gradient.T, hidden, begun=False)
            del gradient
        return None if of_hidden is None else of_hidden.to(hidden.dtype), of_weight, *[None] * 8


def _pieces(
    rows: RowStatistics, grads: Mapping[str, Tensor]
) -> list[tuple[slice, RowStatistics, dict[str, Tensor]]]:
    """Rows in pieces with their statistics and gradients, those in the middle with a gradient of more than log-probabilities.

    In TDPO2 the chosen answers' KL has none, and what a KL needs takes as many passes over a block again.
    """
    count, of_logps = len(rows.lse), {name: grad for name, grad in grads.items() if name == "policy_logps"}
    others = [grad != 0 for name, grad in grads.items() if name != "policy_logps"]
    if not others or not count:
        return [(slice(0, count), rows, dict(grads))]
    has = torch.stack(others).any(0)
    # One answer from the device for all three.
    some, before, after = torch.stack([has.any(), has.byte().argmax(), has.byte().flip(0).argmax()]).tolist()
    edges = [0, before, count - after, count] if some else [0, 0, 0, count]
    kinds = zip(edges, edges[1:], (of_logps, grads, of_logps), strict=False)
    return [
        (slice(a, b), rows.of(slice(a, b)), {name: grad[a:b] for name, grad in own.items()})
        for a, b, own in kinds
        if a < b
    ]


def _add_to_vectors(
    vectors: Sequence[Tensor], found: Sequence[tuple[Tensor, Tensor]], weight: Tensor
) -> None:
    """Add a block of the policy's head to sum_v p_v c_v W_v and sum_v q_v c_v W_v, relative to the largest logit."""
    for vector, (shrink, powers) in zip(vectors, found, strict=True):
        add_product(vector.mul_(shrink[:, None]), powers.to(weight.dtype), weight)


def _from_vectors(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    at: Tensor,
    vectors: tuple[Tensor, Tensor],
    grads: Mapping[str, Tensor],
    final: LogitMap,
) -> Tensor:
    """The hidden states' gradient under a frozen head, from sum_v p_v c_v W_v and sum_v q_v c_v W_v.

    The soft cap's derivative c is 1 where there is no cap. ``at`` are the targets' logits ``[N]``.
    """
    total = torch.zeros_like(vectors[0])
    if (grad := grads.get("policy_logps")) is not None:
        of_targets = final.through_cap_(weight[targets].to(total.dtype), at[:, None])
        total.addcmul_(grad[:, None], of_targets - vectors[0])
    if (grad := grads.get("kl_ref_policy")) is not None:
        total.addcmul_(grad[:, None], vectors[0] - vectors[1])
    return total.to(hidden.dtype)
