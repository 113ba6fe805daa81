"""The passes over a block of the head's logits as Triton kernels, for GPUs.

:func:`add_block` reads a block once and adds its sums to those of all rows. :func:`block_gradient` replaces a block by its
gradient in one pass, in place. In PyTorch's operations the same work launches some 25 kernels for each block. The arithmetic is
explained in :mod:`tokenpref.ops.head` and :mod:`tokenpref.ops.closed_form`.

One program works on one row. Its sums are in the accumulation dtype, and are added to sums of earlier blocks in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from tokenpref.ops.closed_form import RowStatistics
from tokenpref.ops.final_logits import LogitMap

__all__ = ["Sums", "add_block", "block_gradient", "pieces"]

_TILE = 1024  # columns that a program holds at a time


class Sums(Protocol):
    """A model's sums over the blocks so far, ``[N]`` each, relative to the largest logit so far."""

    shift: Tensor
    at: Tensor
    total: Tensor
    own: Tensor
    gap: Tensor
    growth: Tensor


@triton.jit
def _expm1(x, DOUBLE: tl.constexpr):
    """``exp(x) - 1``, by its series near 0, where the difference would lose all digits."""
    near = tl.where(tl.abs(x) < 0.5, x, 0.0)
    series = near * 0.0 + 1.0
    if DOUBLE:
        for n in tl.static_range(17, 1, -1):
            series = 1.0 + series * near / n
    else:
        for n in tl.static_range(9, 1, -1):
            series = 1.0 + series * near / n
    return tl.where(tl.abs(x) < 0.5, series * near, tl.exp(x) - 1.0)


@triton.jit
def _logits(raw, SCALE: tl.constexpr, CAP: tl.constexpr, DOUBLE: tl.constexpr):
    """Final logits of raw ones; see :class:`LogitMap`. A cap of 0 is none."""
    if CAP != 0:
        # tanh |x| = -m / (2 + m) with m = expm1(-2 |x|), which cannot overflow.
        x = raw * (SCALE / CAP)
        m = _expm1(-2.0 * tl.abs(x), DOUBLE)
        bounded = -m / (2.0 + m)
        return tl.where(x < 0, -bounded, bounded) * CAP
    if SCALE != 1:
        return raw * SCALE
    return raw


@triton.jit
def _moved(old, new):
    """By how much a shift grew, 0 for the first block."""
    return tl.where(old == float("-inf"), 0.0, old - new)


@triton.jit
def _merge(sum_ptr, row, value, shrink):
    """Add a block's sum to the one in memory, which is float64."""
    tl.store(sum_ptr + row, tl.load(sum_ptr + row) * shrink + value.to(tl.float64))


@triton.jit
def _add_block(
    raw, ref_raw, columns, width,
    shift, at, total, own, gap,
    ref_shift, ref_at, ref_total, ref_gap, growth,
    HAS_REF: tl.constexpr, OWN: tl.constexpr, GAP: tl.constexpr, REF_GAP: tl.constexpr, PRECISE: tl.constexpr,
    SCALE: tl.constexpr, CAP: tl.constexpr, DOUBLE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    row = tl.program_id(0)
    start = row.to(tl.int64) * width
    zero = tl.full((), 0.0, ACC)
    top, ref_top = tl.full((), float("-inf"), ACC), tl.full((), float("-inf"), ACC)
    s_total, s_own, s_gap = zero, zero, zero
    s_ref_total, s_ref_gap, s_growth = zero, zero, zero
    for first in range(0, width, TILE):
        places = first + tl.arange(0, TILE)
        inside = places < width
        z = _logits(tl.load(raw + start + places, mask=inside, other=0.0).to(ACC), SCALE, CAP, DOUBLE)
        new = tl.maximum(top, tl.max(tl.where(inside, z, float("-inf")), 0))
        moved = _moved(top, new)
        shrink = tl.exp(moved)
        power = tl.where(inside, tl.exp(z - new), 0.0)
        if OWN:
            s_own = (s_own + moved * s_total) * shrink + tl.sum((z - new) * power, 0)
        s_total = s_total * shrink + tl.sum(power, 0)
        top = new
        if HAS_REF:
            q = _logits(tl.load(ref_raw + start + places, mask=inside, other=0.0).to(ACC), SCALE, CAP, DOUBLE)
            ref_new = tl.maximum(ref_top, tl.max(tl.where(inside, q, float("-inf")), 0))
            ref_shrink = tl.exp(_moved(ref_top, ref_new))
            ref_power = tl.where(inside, tl.exp(q - ref_new), 0.0)
            s_ref_total = s_ref_total * ref_shrink + tl.sum(ref_power, 0)
            ref_top = ref_new
            if GAP:
                s_gap = s_gap * shrink + tl.sum((z - q) * power, 0)
            if REF_GAP:
                s_ref_gap = s_ref_gap * ref_shrink + tl.sum((z - q) * ref_power, 0)
            if PRECISE:
                s_growth = s_growth * ref_shrink + tl.sum(_expm1(z - q, DOUBLE) * ref_power, 0)
    column = tl.load(columns + row)
    here = (column >= 0) & (column < width)
    earlier = tl.load(shift + row)
    new = tl.maximum(earlier, top)
    before = tl.exp(_moved(earlier, new).to(tl.float64))
    within = tl.exp(_moved(top, new)).to(tl.float64)
    if OWN:
        relative = (s_own + _moved(top, new) * s_total).to(tl.float64) * within
        earlier_own = tl.load(own + row) + _moved(earlier, new).to(tl.float64) * tl.load(total + row)
        tl.store(own + row, earlier_own * before + relative)
    _merge(total, row, s_total.to(tl.float64) * within, before)
    if GAP:
        _merge(gap, row, s_gap.to(tl.float64) * within, before)
    tl.store(shift + row, new)
    tl.store(at + row, tl.load(raw + start + column, mask=here, other=0.0).to(ACC), mask=here)
    if HAS_REF:
        earlier = tl.load(ref_shift + row)
        new = tl.maximum(earlier, ref_top)
        before = tl.exp(_moved(earlier, new).to(tl.float64))
        within = tl.exp(_moved(ref_top, new)).to(tl.float64)
        _merge(ref_total, row, s_ref_total.to(tl.float64) * within, before)
        if REF_GAP:
            _merge(ref_gap, row, s_ref_gap.to(tl.float64) * within, before)
        if PRECISE:
            _merge(growth, row, s_growth.to(tl.float64) * within, before)
        tl.store(ref_shift + row, new)
        tl.store(ref_at + row, tl.load(ref_raw + start + column, mask=here, other=0.0).to(ACC), mask=here)


@triton.jit
def _exponentials(
    raw, policy_raw, shift, out, width,
    SCALE: tl.constexpr, CAP: tl.constexpr, DOUBLE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    row = tl.program_id(0)
    places = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = places < width
    at = row.to(tl.int64) * width + places
    z = _logits(tl.load(raw + at, mask=inside, other=0.0).to(ACC), SCALE, CAP, DOUBLE)
    power = tl.exp(z - tl.load(shift + row))
    if CAP != 0:
        z = _logits(tl.load(policy_raw + at, mask=inside, other=0.0).to(ACC), SCALE, CAP, DOUBLE)
        power -= power * (z / CAP) * (z / CAP)
    tl.store(out + at, power.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _gradient(
    raw, ref_raw, columns, width, lse, ref_lse, divergence, entropy,
    of_logps, of_ref_policy, of_policy_ref, of_entropy,
    LOGPS: tl.constexpr, REF_POLICY: tl.constexpr, POLICY_REF: tl.constexpr, ENTROPY: tl.constexpr,
    SCALE: tl.constexpr, CAP: tl.constexpr, DOUBLE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    ACC: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    row = tl.program_id(0)
    places = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = places < width
    at = row.to(tl.int64) * width + places
    z = _logits(tl.load(raw + at, mask=inside, other=0.0).to(ACC), SCALE, CAP, DOUBLE)
    row_lse = tl.load(lse + row)
    slope = tl.full((TILE,), 0.0, ACC)
    g_logps, g_ref, g_policy = tl.full((), 0.0, ACC), tl.full((), 0.0, ACC), tl.full((), 0.0, ACC)
    if LOGPS:
        g_logps = tl.load(of_logps + row)
        slope -= g_logps
    if REF_POLICY:
        g_ref = tl.load(of_ref_policy + row)
        slope += g_ref
    if ENTROPY:
        slope -= tl.load(of_entropy + row) * (z - row_lse + tl.load(entropy + row))
    if POLICY_REF:
        g_policy = tl.load(of_policy_ref + row)
    gradient = tl.exp(z - row_lse)
    if REF_POLICY or POLICY_REF:
        # In TDPO2 the chosen answers' KL has no gradient: their rows do not read the reference's logits.
        read = tl.where(inside, tl.abs(g_ref) + tl.abs(g_policy), 0.0) > 0
        q = _logits(tl.load(ref_raw + at, mask=read, other=0.0).to(ACC), SCALE, CAP, DOUBLE)
        row_ref_lse = tl.load(ref_lse + row)
        if POLICY_REF:
            slope += tl.where(
                read, g_policy * (z - q - (row_lse - row_ref_lse + tl.load(divergence + row))), 0.0
            )
        gradient *= slope
        if REF_POLICY:
            gradient -= tl.where(read, tl.exp(q - row_ref_lse) * g_ref, 0.0)
    else:
        gradient *= slope
    if LOGPS:
        gradient += tl.where(places == tl.load(columns + row), g_logps, 0.0)
    if CAP != 0:
        gradient -= gradient * (z / CAP) * (z / CAP)
    tl.store(raw + at, gradient.to(raw.dtype.element_ty), mask=inside)


def _map(final: LogitMap, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "SCALE": float(final.scale),
        "CAP": float(final.soft_cap or 0.0),
        "DOUBLE": dtype == torch.float64,
        # A multiplication and an addition that are rounded together would leave a gradient where both models agree.
        **({} if _interpreted() else {"enable_fp_fusion": False}),
    }


def _interpreted() -> bool:
    """Whether Triton runs its kernels on a CPU, as the tests let it."""
    return bool(triton.knobs.runtime.interpret)


def add_block(
    models: Sequence[Sums],
    raw: Sequence[Tensor],
    columns: Tensor,
    needs: frozenset[str],
    final: LogitMap,
    *,
    precise: bool,
    with_exponentials: bool,
) -> list[tuple[Tensor, Tensor]]:
    """Add a block to the models' sums, in place.

    Args:
        models: the policy, and the reference if there is one.
        raw: their raw logits ``[N, C]``, contiguous.
        columns: ``[N]`` int64, the target's column in this block; out of range where it lies in another one.
        needs: of "ref", "kl_ref_policy", "kl_policy_ref", "entropy".
        final: from raw logits to logits, for both models.
        precise: whether to sum expm1, for a KL that would be lost in the rounding of two log-sum-exps.
        with_exponentials: whether to return the exponentials, times the derivative of the policy's soft cap.

    Returns:
        With ``with_exponentials``, for each model by how much its earlier sums shrank ``[N]``, and the exponentials ``[N, C]``.
    """
    earlier = [model.shift.clone() for model in models] if with_exponentials else []
    if len(columns):
        _launch_add_block(models, raw, columns, needs, final, precise)
    return [
        ((before - model.shift).exp(), _exponentials_of(own, raw[0], model.shift, final))
        for before, model, own in zip(earlier, models, raw, strict=False)
    ]


def _launch_add_block(
    models: Sequence[Sums],
    raw: Sequence[Tensor],
    columns: Tensor,
    needs: frozenset[str],
    final: LogitMap,
    precise: bool,
) -> None:
    rows, width = raw[0].shape
    policy, reference = models[0], models[-1]
    with_kl = bool(needs & {"kl_ref_policy", "kl_policy_ref"})
    _add_block[(rows,)](
        raw[0], raw[-1], columns, width,
        shift=policy.shift, at=policy.at, total=policy.total, own=policy.own, gap=policy.gap,
        ref_shift=reference.shift, ref_at=reference.at, ref_total=reference.total, ref_gap=reference.gap,
        growth=reference.growth,
        HAS_REF=len(models) == 2, OWN="entropy" in needs, GAP="kl_policy_ref" in needs,
        REF_GAP="kl_ref_policy" in needs, PRECISE=precise and with_kl,
        TILE=min(_TILE, triton.next_power_of_2(width)), **_map(final, policy.shift.dtype),
    )  # fmt: skip


def _exponentials_of(raw: Tensor, policy_raw: Tensor, shift: Tensor, final: LogitMap) -> Tensor:
    """``exp(logits - shift)`` times the derivative of the policy's soft cap, ``[N, C]`` in the dtype of ``raw``."""
    rows, width = raw.shape
    out = torch.empty_like(raw)
    if rows:
        tile = min(_TILE, triton.next_power_of_2(width))
        grid = (rows, triton.cdiv(width, tile))
        _exponentials[grid](raw, policy_raw, shift, out, width, TILE=tile, **_map(final, shift.dtype))
    return out


def pieces(
    rows: RowStatistics, grads: Mapping[str, Tensor]
) -> list[tuple[slice, RowStatistics, dict[str, Tensor]]]:
    """All rows in one piece: the kernel itself skips what a row does not need."""
    return [(slice(0, len(rows.lse)), rows, dict(grads))]


def block_gradient(
    raw: Tensor,
    ref_raw: Tensor | None,
    columns: Tensor,
    rows: RowStatistics,
    grads: Mapping[str, Tensor],
    final: LogitMap,
) -> Tensor:
    """The gradient of a block of raw logits, which replaces them.

    Args:
        raw: the policy's raw logits ``[N, C]``, contiguous.
        ref_raw: the reference's, if a KL has a gradient.
        columns: as in :func:`add_block`.
        rows: statistics of these rows.
        grads: incoming gradients ``[N]`` by statistic, times the logits' scale.
        final: from raw logits to logits, for both models.
    """
    count, width = raw.shape
    if not count:
        return raw
    tile = min(_TILE, triton.next_power_of_2(width))
    given = {name: grad.to(rows.lse.dtype).contiguous() for name, grad in grads.items()}
    unused = rows.lse
    _gradient[(count, triton.cdiv(width, tile))](
        raw, raw if ref_raw is None else ref_raw, columns, width,
        lse=rows.lse, ref_lse=_or(rows.ref_lse, unused),
        divergence=_or(rows.values.get("kl_policy_ref"), unused), entropy=_or(rows.values.get("entropy"), unused),
        of_logps=given.get("policy_logps", unused), of_ref_policy=given.get("kl_ref_policy", unused),
        of_policy_ref=given.get("kl_policy_ref", unused), of_entropy=given.get("entropy", unused),
        LOGPS="policy_logps" in given, REF_POLICY="kl_ref_policy" in given, POLICY_REF="kl_policy_ref" in given,
        ENTROPY="entropy" in given, TILE=tile, **_map(final, rows.lse.dtype),
    )  # fmt: skip
    return raw


def _or(value: Tensor | None, unused: Tensor) -> Tensor:
    return unused if value is None else value
