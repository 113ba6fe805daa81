"""Statistics of rows, from one pass over blocks of the vocabulary; see :mod:`tokenpref.ops._blocks`."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from tokenpref.ops._blocks import Blocks, Heads, TargetRows
from tokenpref.ops._closed_form import accumulation_dtype
from tokenpref.ops._passes import Sums, add_block, add_block_compiled, write_exponentials
from tokenpref.ops._scratch import Kept, Scratch

__all__ = ["Found", "forward_blocks"]

# Two ways to one number that differ by more than float32's rounding of logits: the first one has overflowed.
_CLOSE = 1e-4


@dataclass
class Found:
    """What a forward found.

    Args:
        values: statistics ``[N]`` by the name of their field in TokenStats.
        lse: log-sum-exps ``[N]`` of the policy and the reference.
        shifts: for each model, what was subtracted from its logits ``[N]`` in the blocks that are kept, or in the last one: those
            of all blocks would grow with the square of the sequences.
        kept: exponentials for the backward.
        vectors: for a frozen head, sum_v p_v W_v and sum_v q_v W_v, ``[N, D]``.
    """

    values: dict[str, Tensor]
    lse: list[Tensor]
    shifts: tuple[list[Tensor], list[Tensor]] = field(default_factory=lambda: ([], []))
    kept: Kept | None = None
    vectors: list[Tensor] = field(default_factory=list)


class _Forward:
    """A block of the forward, op by op in memory that is there.

    Args:
        heads: the rows.
        part: the block's columns.
        scratch: memory of these rows.
        kept: where exponentials stay for the backward.

    Attributes:
        logits: of each model ``[N, C]``; their exponentials once they are added to the sums.
    """

    def __init__(self, heads: Heads, part: slice, scratch: Scratch, kept: Kept) -> None:
        width, pairs = part.stop - part.start, heads.pairs
        self._scratch, self._width = scratch, width
        own, other = self._to_keep = [kept.policy(part), kept.reference(part)]
        dtype, rows = accumulation_dtype(heads.hidden.dtype), heads.hidden.shape[0]
        # Exponentials are made where they are kept, if those of all rows are, and not rounded.
        places = [
            to if to is not None and to.dtype == dtype and to.shape[0] == rows else None
            for to in (kept.spare(part) if own is None else own, other)
        ]
        self.logits = [
            scratch.logits(index, states, weight[part], to)
            for index, ((states, weight), to) in enumerate(zip(pairs, places, strict=False))
        ]

    def add_to(self, models: list[Sums], needs: frozenset[str], *, growth: bool) -> list[Tensor]:
        """Add the block to the sums; returns how much each model's earlier ones shrank ``[N]``."""
        return add_block(
            self.logits,
            models,
            self.logits,
            lambda index: self._scratch.get(2 + index, self._width),
            needs,
            growth=growth,
        )

    def narrow(self, index: int, _model: Sums) -> Tensor:
        """A model's exponentials in the hidden states' dtype."""
        return self._scratch.narrow(self.logits[index])

    def keep(self, _models: list[Sums], last_rows: slice) -> None:
        """Keep what is to be kept; of the reference the last rows alone."""
        for to, own, rows in zip(self._to_keep, self.logits, (slice(None), last_rows), strict=False):
            if to is not None and to is not own:
                to.copy_(own[rows])


class _CompiledForward:
    """:class:`_Forward` with compiled passes, which leave the logits as they are."""

    def __init__(self, heads: Heads, part: slice, scratch: Scratch, kept: Kept) -> None:
        self._scratch, self._to_keep = scratch, [kept.policy(part), kept.reference(part)]
        self.logits = [
            scratch.own_logits(index, states, weight[part])
            for index, (states, weight) in enumerate(heads.pairs)
        ]

    def add_to(self, models: list[Sums], needs: frozenset[str], *, growth: bool) -> list[Tensor]:
        return add_block_compiled(self.logits, models, needs, growth=growth)

    def narrow(self, index: int, model: Sums) -> Tensor:
        logits = self.logits[index]
        return write_exponentials(logits, model.shift, self._scratch.block("narrow", logits.shape[1]))

    def keep(self, models: list[Sums], last_rows: slice) -> None:
        each = zip(self._to_keep, self.logits, models, (slice(None), last_rows), strict=False)
        for to, logits, model, rows in each:
            if to is not None:
                write_exponentials(logits[rows], model.shift[rows], to)


def forward_blocks(
    heads: Heads, needs: frozenset[str], blocks: Blocks, kept: Kept, *, vectors: bool = False
) -> Found:
    """Statistics of rows.

    Args:
        heads: the rows; with a reference if ``needs`` asks for one.
        needs: of "ref", "kl_ref_policy", "kl_policy_ref", "entropy".
        blocks: how to cut the vocabulary.
        kept: where exponentials stay for the backward.
        vectors: form the gradient vectors of a frozen head, with blocks of which none is kept.
    """
    pairs, hidden = heads.pairs, heads.hidden
    dtype = accumulation_dtype(hidden.dtype)
    scratch = Scratch(heads, blocks)
    sums = [Sums(hidden.shape[0], dtype, hidden.device) for _ in pairs]
    at = [hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in pairs]
    found = Found({}, [], kept=kept)
    shift_places = hidden.new_empty(len(pairs), max(blocks.kept, 1), hidden.shape[0], dtype=dtype)
    if vectors:
        found.vectors = [hidden.new_zeros(hidden.shape, dtype=torch.float64) for _ in pairs]
    where, last_rows = TargetRows(heads.targets, blocks), slice(hidden.shape[0] - blocks.ref_kept, None)
    # Of rounded logits a difference of two log-sum-exps, to float32's rounding, says all that there is to know.
    precise = hidden.dtype == dtype
    for number, part in enumerate(blocks):
        step = (_CompiledForward if blocks.compiled else _Forward)(heads, part, scratch, kept)
        rows, columns = where.of(number, part)
        for target_logits, own in zip(at, step.logits, strict=True):
            target_logits[rows] = own[rows, columns].to(dtype)
        shrinks = step.add_to(sums, needs, growth=precise)
        for index, (vector, shrink) in enumerate(zip(found.vectors, shrinks, strict=False)):
            own = scratch.product("vector", step.narrow(index, sums[index]), heads.weight[part])
            vector.mul_(shrink[:, None]).add_(own)
        step.keep(sums, last_rows)
        for shifts, places, model in zip(found.shifts, shift_places, sums, strict=False):
            if number >= len(blocks) - len(places):
                shifts.append(places[len(shifts)].copy_(model.shift))
        del step, own, shrinks  # before the next block's are made, which may need new memory
    for vector, model in zip(found.vectors, sums, strict=False):
        vector /= model.total[:, None]
    found.vectors = [vector.to(dtype) for vector in found.vectors]
    found.values = _values(sums, at, needs, close=precise)
    found.lse = [model.lse.to(dtype) for model in sums]
    return found


def _values(sums: list[Sums], at: list[Tensor], needs: frozenset[str], *, close: bool) -> dict[str, Tensor]:
    policy, dtype = sums[0], at[0].dtype
    found = {"policy_logps": at[0].double() - policy.lse}
    if "entropy" in needs:
        found["entropy"] = policy.total.log() - policy.own / policy.total
    if len(sums) == 2:
        reference = sums[1]
        if "ref" in needs:
            found["ref_logps"] = at[1].double() - reference.lse
        apart = _apart(policy, reference) if close else policy.lse - reference.lse
        # Rounding may leave a little less than nothing.
        if "kl_ref_policy" in needs:
            found["kl_ref_policy"] = (apart - reference.gap / reference.total).clamp(min=0)
        if "kl_policy_ref" in needs:
            found["kl_policy_ref"] = (policy.gap / policy.total - apart).clamp(min=0)
    return {name: value.to(dtype) for name, value in found.items()}


def _apart(policy: Sums, reference: Sums) -> Tensor:
    """lse - lse', from the sum of expm1 unless that overflowed or lost what the reference gives no probability to."""
    rough = policy.lse - reference.lse
    close = (reference.growth / reference.total).log1p()
    return torch.where((close - rough).abs() < _CLOSE, close, rough)
