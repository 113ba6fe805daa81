"""The passes over a block of logits: op by op in memory that is there already, or each one kernel that ``torch.compile`` makes.

Both make the same sums and exponentials; see :mod:`tokenpref.ops._blocks` for what they are. Op by op, a log-probability takes
five passes over a block and a KL sixteen, most of which write it. Compiled, the sums are one kernel that writes nothing but
themselves, and exponentials are written only where the backward, or a product, wants them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tokenpref.ops._closed_form import KL_STATISTICS

__all__ = [
    "Sums",
    "add_block",
    "add_block_compiled",
    "add_scaled",
    "difference",
    "exponentials",
    "write_exponentials",
]

# On CPUs powers of two are a quarter of the work of powers of e where PyTorch has these from MKL.
_LOG2E = 1 / math.log(2)


class Sums:
    """A model's running sums over blocks, ``[N]`` in float64.

    Attributes:
        shift: the largest logit so far, which the exponentials are relative to.
        total: sum of exponentials.
        gap: of exponentials times the distance of the models' logits.
        growth: of exponentials times expm1 of that distance.
        own: of exponentials times the model's own shifted logits.
    """

    def __init__(self, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.shift = torch.full((rows,), -torch.inf, dtype=dtype, device=device)
        self.total = torch.zeros(rows, dtype=torch.float64, device=device)
        self.gap = torch.zeros_like(self.total)
        self.own = torch.zeros_like(self.total)
        self.growth = torch.zeros_like(self.total)

    def join(self, shift: Tensor, total: Tensor, own: Tensor | None) -> Tensor:
        """Take a block's sums, relative to ``shift``, which is at least the last; returns how much the earlier ones shrank.

        In place: small tensors that live from block to block would cut holes that a CPU allocator has for the next one's logits.
        """
        moved = torch.where(self.shift.isinf(), 0.0, (self.shift - shift).double())
        shrink = moved.exp()
        self.shift.copy_(shift)
        if own is not None:
            self.own.add_(moved * self.total).mul_(shrink).add_(own)
        self.total.mul_(shrink).add_(total)
        self.gap.mul_(shrink)
        self.growth.mul_(shrink)
        return shrink

    @property
    def lse(self) -> Tensor:
        return self.shift.double() + self.total.log()


def exponentials(logits: Tensor, shift: Tensor, to: Tensor) -> Tensor:
    """``exp(logits - shift)`` of a block ``[N, C]``, in ``to``, which may be the block; ``shift`` is ``[N]``."""
    # The distance first: of the largest logit it is exactly 0.
    torch.sub(logits, shift[:, None], out=to)
    return to.exp_() if to.is_cuda else to.mul_(_LOG2E).exp2_()


def add_block(
    logits: Sequence[Tensor],
    models: Sequence[Sums],
    places: Sequence[Tensor],
    spare: Callable[[int], Tensor],
    needs: frozenset[str],
    *,
    growth: bool,
) -> list[Tensor]:
    """Add a block to the sums, op by op.

    Args:
        logits: of each model ``[N, C]``, in the accumulation dtype.
        models: their sums.
        places: where their exponentials shall be; a model's logits may be there.
        spare: further memory of a block, by its number.
        needs: of "kl_ref_policy", "kl_policy_ref", "entropy"; what else is in it does not count.
        growth: whether to sum expm1, where a KL is needed.

    Returns:
        How much the earlier sums of each model shrank ``[N]``.
    """
    gap = None
    if needs & KL_STATISTICS:
        gap = torch.sub(*logits, out=spare(0))
    shrinks = []
    for index, (model, own, to) in enumerate(zip(models, logits, places, strict=True)):
        shift = torch.maximum(model.shift, own.amax(-1))
        exponentials(own, shift, to)
        # exp(z - m) (z - m), from the exponentials alone
        weighted = torch.xlogy(to, to).sum(-1) if index == 0 and "entropy" in needs else None
        shrinks.append(model.join(shift, to.sum(-1), weighted))
    if gap is not None:
        # A product and its sum: batched products of one row each, which need no place, take three times as long.
        policy, reference = models
        if "kl_ref_policy" in needs:
            reference.gap += torch.mul(places[1], gap, out=spare(1)).sum(-1)
        if "kl_policy_ref" in needs:
            policy.gap += torch.mul(places[0], gap, out=spare(1)).sum(-1)
        if growth:
            reference.growth += gap.expm1_().mul_(places[1]).sum(-1)
    return shrinks


def add_block_compiled(
    logits: Sequence[Tensor], models: Sequence[Sums], needs: frozenset[str], *, growth: bool
) -> list[Tensor]:
    """:func:`add_block` in one compiled kernel; the logits, of any floating dtype, stay as they are."""
    if len(logits) == 1:
        found = _compiled(_sums)(logits[0], models[0].shift, entropy="entropy" in needs)
        return [models[0].join(*found)]
    policy, reference = models
    own, other, gaps = _compiled(_sums_of_two)(
        *logits,
        policy.shift,
        reference.shift,
        entropy="entropy" in needs,
        of_reference="kl_ref_policy" in needs,
        of_policy="kl_policy_ref" in needs,
        growth=growth and bool(needs & KL_STATISTICS),
    )
    shrinks = [policy.join(*own), reference.join(*other)]
    for total, gap in zip((reference.gap, policy.gap, reference.growth), gaps, strict=True):
        if gap is not None:
            total += gap
    return shrinks


def write_exponentials(logits: Tensor, shift: Tensor, to: Tensor) -> Tensor:
    """:func:`exponentials` in one compiled kernel, rounded to the dtype of ``to``, which may be the logits."""
    _compiled(_write_exponentials)(logits, shift, to)
    return to


def difference(
    left: tuple[Tensor, Tensor | None],
    right: tuple[Tensor, Tensor | None],
    factors: Sequence[Tensor],
    to: Tensor,
) -> Tensor:
    """``a p - b q`` in one compiled kernel, rounded to the dtype of ``to``.

    Args:
        left: logits ``[N, C]`` and the shift ``[N]`` that makes the exponentials p of them; or these, and None.
        right: the same for q.
        factors: a and b ``[N]``.
        to: memory for it ``[N, C]``.
    """
    _compiled(_write_difference)(*left, *right, *factors, to)
    return to


def add_scaled(total: Tensor, factor: Tensor | None, rows: Tensor, *, compiled: bool) -> None:
    """``total += factor * rows``, of ``[N, D]``.

    Args:
        total: in the accumulation dtype.
        factor: ``[N]``, None for ones.
        rows: of the same dtype; in one compiled kernel, and with a factor, of any.
        compiled: whether to take that.
    """
    if factor is None:
        total.add_(rows)
    elif compiled:
        _compiled(_add_scaled)(total, factor, rows)
    else:
        total.addcmul_(factor[:, None], rows)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel for all sizes; made when it is first called."""
    made: Callable[..., Any] = torch.compile(function, dynamic=True)
    return made


def _power(logits: Tensor, shift: Tensor) -> Tensor:
    return torch.exp2((logits - shift[:, None]) * _LOG2E)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _sums(logits: Tensor, shift: Tensor, *, entropy: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    logits = _wide(logits)
    shift = torch.maximum(shift, logits.amax(-1))
    p = _power(logits, shift)
    return shift, p.sum(-1), (p * (logits - shift[:, None])).sum(-1) if entropy else None


def _sums_of_two(
    logits: Tensor,
    ref_logits: Tensor,
    shift: Tensor,
    ref_shift: Tensor,
    *,
    entropy: bool,
    of_reference: bool,
    of_policy: bool,
    growth: bool,
) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
    logits, ref_logits = _wide(logits), _wide(ref_logits)
    shift, ref_shift = torch.maximum(shift, logits.amax(-1)), torch.maximum(ref_shift, ref_logits.amax(-1))
    p, q, gap = _power(logits, shift), _power(ref_logits, ref_shift), logits - ref_logits
    return (
        (shift, p.sum(-1), (p * (logits - shift[:, None])).sum(-1) if entropy else None),
        (ref_shift, q.sum(-1), None),
        (
            (q * gap).sum(-1) if of_reference else None,
            (p * gap).sum(-1) if of_policy else None,
            (q * torch.expm1(gap)).sum(-1) if growth else None,
        ),
    )


def _write_exponentials(logits: Tensor, shift: Tensor, to: Tensor) -> None:
    to.copy_(_power(_wide(logits), shift))


def _add_scaled(total: Tensor, factor: Tensor, rows: Tensor) -> None:
    total.add_(_wide(rows) * factor[:, None])


def _write_difference(
    left: Tensor,
    left_shift: Tensor | None,
    right: Tensor,
    right_shift: Tensor | None,
    of_left: Tensor,
    of_right: Tensor,
    to: Tensor,
) -> None:
    p = _wide(left) if left_shift is None else _power(_wide(left), left_shift)
    q = _wide(right) if right_shift is None else _power(_wide(right), right_shift)
    to.copy_(p * of_left[:, None] - q * of_right[:, None])
