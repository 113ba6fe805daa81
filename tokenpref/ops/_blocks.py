"""The LM head's statistics and their gradients, a block of the vocabulary at a time.

With rows n, tokens v, policy logits z = hidden @ W^T and reference logits z', one pass over blocks of columns gives for each row

* the sums of exp(z - m) and exp(z' - m') with running maxima m and m', so both log-sum-exps,
* the sums of exp(z' - m') d, exp(z - m) d with d = z - z', and of exp(z - m) (z - m), so both KLs and the entropy: with p and q
  the softmax of z and z', KL(q || p) = lse - lse' - sum_v q d,
* the sum of exp(z' - m') expm1(d), so lse - lse' = log1p(sum_v q expm1(d)) to the last digit where the models are close: as a
  difference of two log-sum-exps it would carry the rounding of both, which is larger than a small KL.

Blocks of columns rather than of rows: a block reads its part of the heads once, its gradient is a part of the head's gradient
that is written once, and its logits of all rows stay in the cache for the passes over them. The gradient of the log-probability
is -g (p - e_y): rows of exp(z - m) times one number, which goes to the factors of the matrix products instead of
the block itself.

What the forward leaves in memory follows a budget. As many blocks as fit keep the policy's exponentials and spare the backward
their products; the others are computed again. The reference's are needed only where a KL has a gradient, so what is left keeps
those of the last rows: the rejected answers, which in TDPO2 are the ones. Where the head is frozen, the forward ends with the
gradient vectors of each row, and the backward needs no block at all.

The head's gradient is memory that the backward takes in any case, while all activations are still there. Taken by the forward
it keeps blocks beside the budget's, until the backward writes it from its end to its start: D columns of it for N rows of
exponentials, so all but one block where there are fewer rows than hidden units.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import Tensor

from tokenpref.ops._closed_form import RowStatistics, accumulation_dtype, logit_gradient
from tokenpref.ops._passes import (
    Sums,
    add_block,
    add_block_compiled,
    add_scaled,
    difference,
    exponentials,
    write_exponentials,
)
from tokenpref.ops.products import add_product, product, takes_onednn

__all__ = ["Blocks", "Found", "Heads", "Kept", "backward_blocks", "forward_blocks", "plan_blocks"]

MIB = 1 << 20
# Two ways to one number that differ by more than float32's rounding of logits: the first one has overflowed.
_CLOSE = 1e-4
# Of a model. On a CPU the passes over a block shall find it in the last-level cache; a GPU wants few and large kernels.
_BLOCK_BYTES = {"cpu": 8 * MIB, "cuda": 256 * MIB}
# Nor shall it be wider on a CPU: its products may need the block's weights once more, and their gradient beside the head's.
_WIDEST = 2048
# Rows of logits that do not begin on a cache line's boundary cost a product on a CPU a third of its speed.
_UNIT = 64
_PLACE_BYTES = 2 * MIB  # for what is made of some rows at a time, on a CPU,
_FEWEST_ROWS = 256  # but for at least so many, since products of fewer are slow


@dataclass(frozen=True)
class Blocks:
    """How the vocabulary is cut.

    Args:
        vocabulary: columns in all.
        columns: of a block; the last one may be narrower.
        kept: of how many blocks, the last ones, the policy's exponentials are kept for the backward.
        lodged: how many of these, again the last ones, are kept in the head's gradient.
        ref_kept: of how many rows, the last ones, the reference's are kept, over the whole vocabulary; none before all of the
            policy's.
        compiled: whether the passes over a block are compiled; see :mod:`tokenpref.ops._passes`.
    """

    vocabulary: int
    columns: int
    kept: int = 0
    lodged: int = 0
    ref_kept: int = 0
    compiled: bool = False

    def __len__(self) -> int:
        return -(-self.vocabulary // self.columns)

    def __iter__(self) -> Iterator[slice]:
        for start in range(0, self.vocabulary, self.columns):
            yield slice(start, min(start + self.columns, self.vocabulary))

    @property
    def first_kept(self) -> int:
        """The first block of which the policy's exponentials are kept."""
        return len(self) - self.kept

    @property
    def first_column(self) -> int:
        """The first column of these blocks."""
        return min(self.first_kept * self.columns, self.vocabulary)

    @property
    def first_lodged_column(self) -> int:
        """The first column of the blocks that are kept in the head's gradient."""
        return min((len(self) - self.lodged) * self.columns, self.vocabulary)

    def none_kept(self) -> Blocks:
        """The same blocks, of which all are computed again."""
        return replace(self, kept=0, lodged=0, ref_kept=0)


def plan_blocks(
    rows: int,
    vocabulary: int,
    *,
    models: int,
    keep: int,
    dtype: torch.dtype,
    device: torch.device,
    budget: int,
    gradient: int = 0,
    compiled: bool = False,
) -> Blocks:
    """Blocks whose logits, with what is kept of them, take at most ``budget`` bytes (but at least one column does).

    Args:
        rows: rows that are scored.
        vocabulary: columns of the head.
        models: 1 for the policy alone, 2 with a reference.
        keep: of how many of them the backward wants exponentials.
        dtype: of the hidden states, in which exponentials are kept.
        device: where they are.
        budget: bytes.
        gradient: columns D of the head's gradient, of the same dtype, if that keeps blocks too; 0 if not.
        compiled: whether the passes over a block are compiled.
    """
    # A column at work: each model's logits, and two more for what a KL makes of both, all of them wide; compiled passes take the
    # logits as they are, and of a KL make one more.
    if compiled:
        at_work = (models + keep - 1) * dtype.itemsize
    else:
        at_work = (models + 2 * (keep - 1)) * accumulation_dtype(dtype).itemsize
    column = max(rows, 1) * at_work
    target = min(keep * _BLOCK_BYTES.get(device.type, _BLOCK_BYTES["cuda"]), budget)
    widest = min(_WIDEST, vocabulary) if device.type == "cpu" else vocabulary
    columns = min(max(target // column, 1), widest)
    unit = _UNIT if _UNIT <= columns < vocabulary else 1
    columns = columns // unit * unit
    # As equal as can be: the same number of blocks, the last one not much narrower.
    columns = -(-vocabulary // -(-vocabulary // columns) // unit) * unit
    block = max(rows, 1) * columns * dtype.itemsize
    left = max(budget - columns * column, 0)
    count = -(-vocabulary // columns)
    own, lodged = min(left // block, count), _lodged(rows, vocabulary, columns, gradient)
    if keep > 1:
        own = min(own, count - lodged)  # what the gradient keeps leaves room for the reference's
    else:
        # The budget comes first, though the gradient may hold all of few rows: what a head takes shall not grow with the rows.
        lodged = min(lodged, count - own)
    ref_kept = 0
    if keep > 1 and own + lodged == count:
        ref_kept = min((left - own * block) // (vocabulary * dtype.itemsize), rows)
    return Blocks(vocabulary, columns, own + lodged, lodged, ref_kept, compiled)


def _lodged(rows: int, vocabulary: int, columns: int, width: int) -> int:
    """How many of the last blocks the head's gradient ``[V, D]`` can keep.

    They lie in its first numbers, one after another, and the gradient of each is written where nothing is left to read, that of
    the last one first: ``rows * (stop - first) <= start * width`` for a block from ``start`` to ``stop`` where the first of them
    begins at ``first``. Both sides are linear in the block's number, were the last one as wide as the others, so what is true of
    the first and the last is true of all.
    """
    if not rows or not width:
        return 0
    count = -(-vocabulary // columns)
    of_first = -(-rows * columns // width)
    of_last = count * columns - (count - 1) * columns * width // rows
    return max(count - -(-max(of_first, of_last) // columns), 0)


@dataclass(frozen=True)
class Heads:
    """Rows to score and the heads that score them.

    Args:
        hidden: policy's last hidden states ``[N, D]``.
        weight: policy's head ``[V, D]``.
        targets: ``[N]`` int64, the predicted tokens.
        ref_hidden: reference's ``[N, D']``, where it is needed.
        ref_weight: reference's ``[V, D']``.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    ref_hidden: Tensor | None = None
    ref_weight: Tensor | None = None

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Hidden states and head of the policy, and of the reference if there is one."""
        own = [(self.hidden, self.weight)]
        if self.ref_hidden is not None and self.ref_weight is not None:
            own.append((self.ref_hidden, self.ref_weight))
        return own

    def of_rows(self, rows: slice) -> Heads:
        """The same for some of the rows."""
        ref_hidden = None if self.ref_hidden is None else self.ref_hidden[rows]
        return replace(self, hidden=self.hidden[rows], targets=self.targets[rows], ref_hidden=ref_hidden)


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


class _Targets:
    """The rows whose target lies in a block, found without looking at all rows each time."""

    def __init__(self, targets: Tensor, blocks: Blocks) -> None:
        self._columns, self._rows = targets.sort()
        edges = torch.tensor([*(part.start for part in blocks), blocks.vocabulary], device=targets.device)
        self._edges = torch.searchsorted(self._columns, edges).tolist()

    def of(self, number: int, part: slice) -> tuple[Tensor, Tensor]:
        """Rows, and the columns of their targets inside the block."""
        here = slice(self._edges[number], self._edges[number + 1])
        return self._rows[here], self._columns[here] - part.start


class _Scratch:
    """Memory for what every block makes anew.

    Taken and given back for each block it would cost a CPU as much again in page faults, wherever the allocator returns it.
    """

    def __init__(self, heads: Heads, blocks: Blocks) -> None:
        self._hidden, self._size = heads.hidden, heads.hidden.shape[0] * blocks.columns
        self._dtype = accumulation_dtype(heads.hidden.dtype)
        self._flat: dict[tuple[object, torch.dtype], Tensor] = {}

    def get(self, index: int, width: int) -> Tensor:
        """A block ``[N, width]`` in the accumulation dtype."""
        return self._block(index, width, self._dtype)

    def block(self, name: object, width: int) -> Tensor:
        """A block ``[N, width]`` in the hidden states' dtype."""
        return self._block(name, width, self._hidden.dtype)

    def narrow(self, block: Tensor) -> Tensor:
        """A block in the hidden states' dtype; itself where it is of that dtype."""
        if block.dtype == self._hidden.dtype:
            return block
        return self.block("narrow", block.shape[1]).copy_(block)

    def logits(self, index: int, hidden: Tensor, weight: Tensor, place: Tensor | None = None) -> Tensor:
        """Logits in the accumulation dtype ``[N, width]``, first rounded as the model's output layer would.

        Args:
            index: of their memory.
            hidden: all rows ``[N, D]``.
            weight: a block's ``[width, D]``.
            place: memory to take in place of that.
        """
        to = self.get(index, weight.shape[0]) if place is None else place
        if hidden.dtype != self._dtype:
            return to.copy_(self._rounded_logits(hidden, weight, "narrow", to))
        if not takes_onednn(hidden, weight):
            return product(hidden, weight.T, to)
        # It makes its own memory: of some rows at a time, for among other products and small tensors a heap would have room for a
        # whole block again, or not. Never of one row, which is summed in another order.
        count = -(-to.shape[0] // _rows_of_place(to.shape[1], to.element_size()))
        for own, part in zip(hidden.tensor_split(count), to.tensor_split(count), strict=True):
            part.copy_(product(own, weight.T))
        return to

    def own_logits(self, index: int, hidden: Tensor, weight: Tensor) -> Tensor:
        """Logits in the dtype of the hidden states, as compiled passes take them."""
        if hidden.dtype == self._dtype:
            return self.logits(index, hidden, weight)
        return self._rounded_logits(hidden, weight, index)

    def _rounded_logits(
        self, hidden: Tensor, weight: Tensor, name: object, wide: Tensor | None = None
    ) -> Tensor:
        width = weight.shape[0]
        if hidden.is_cuda:
            return hidden @ weight.T
        place = self.block(name, width)
        if _multiplies(hidden.dtype, hidden.device.type):
            return torch.mm(hidden, weight.T, out=place)
        wide = self.get(0, width) if wide is None else wide
        return place.copy_(product(hidden.to(self._dtype), weight.to(self._dtype).T, wide))

    def product(
        self, name: str, left: Tensor, right: Tensor, place: Tensor | None = None, *, widen: bool = True
    ) -> Tensor:
        """``left @ right`` in the accumulation dtype, of half precision without rounding where the device can do that.

        Args:
            name: of the result, which stays until the next one of that name.
            left: a block, or columns of one.
            right: of its dtype.
            place: at least as many rows, for the product of tensors that are of the accumulation dtype, which may be made
                elsewhere; or of half precision, for one that is rounded and not widened.
            widen: whether a product that was rounded shall be of the accumulation dtype nevertheless.
        """
        dtype, shape = self._dtype, (left.shape[0], right.shape[1])
        if left.dtype == dtype:
            return product(left, right, None if place is None else place[: left.shape[0]])
        if left.is_cuda:
            return torch.mm(left, right, out_dtype=dtype)
        # A CPU's half-precision products come out rounded: a block of many, whose sum is float32's, or the weight's dtype anyway.
        if _multiplies(left.dtype, left.device.type):
            rounded = torch.mm(
                left, right, out=self._view(name, shape, left.dtype) if place is None else place
            )
            return self._view(name, shape, dtype).copy_(rounded) if widen else rounded
        return left.to(dtype) @ right.to(dtype)

    def _block(self, name: object, width: int, dtype: torch.dtype) -> Tensor:
        return self._view(name, (self._hidden.shape[0], width), dtype, of=self._size)

    def _view(self, name: object, shape: tuple[int, int], dtype: torch.dtype, of: int = 0) -> Tensor:
        size = shape[0] * shape[1]
        flat = self._flat.get((name, dtype))
        if flat is None or flat.numel() < size:
            flat = self._flat[name, dtype] = self._hidden.new_empty(max(size, of), dtype=dtype)
        return flat[:size].view(shape)


class Kept:
    """Exponentials for the backward, in one piece of memory, and in the head's gradient.

    Many pieces, freed and taken again every step beside the head's gradient, would leave an allocator with holes that fit none.

    Args:
        memory: at least :meth:`size` numbers.
        rows: rows that are scored.
        blocks: which of theirs are kept.
        gradient: the head's ``[V, D]``, contiguous, where some of them lodge until a backward writes it.
    """

    def __init__(self, memory: Tensor, rows: int, blocks: Blocks, gradient: Tensor | None = None) -> None:
        own = rows * (blocks.first_lodged_column - blocks.first_column)
        self._policy, self._reference = memory[:own], memory[own : self.size(rows, blocks)]
        self._lodged = None if gradient is None else gradient.view(-1)
        self._rows, self._blocks = rows, blocks

    @staticmethod
    def size(rows: int, blocks: Blocks) -> int:
        """Numbers that are kept outside of the gradient."""
        columns = blocks.first_lodged_column - blocks.first_column
        return rows * columns + blocks.ref_kept * blocks.vocabulary

    def policy(self, part: slice) -> Tensor | None:
        """The policy's of a block ``[N, columns]``, if it is kept."""
        blocks = self._blocks
        if part.start < blocks.first_column:
            return None
        if part.start < blocks.first_lodged_column:
            return self._part(self._policy, self._rows, part.start - blocks.first_column, part)
        assert self._lodged is not None
        return self._part(self._lodged, self._rows, part.start - blocks.first_lodged_column, part)

    def reference(self, part: slice) -> Tensor | None:
        """The reference's of a block ``[K, columns]``, of the last K rows, if any are kept."""
        count = self._blocks.ref_kept
        return self._part(self._reference, count, part.start, part) if count else None

    def _part(self, memory: Tensor, rows: int, start: int, part: slice) -> Tensor:
        width = part.stop - part.start
        return memory[rows * start : rows * (start + width)].view(rows, width)


@cache
def _multiplies(dtype: torch.dtype, device: str) -> bool:
    """Whether a device multiplies half precision; without it PyTorch's products take ten to a hundred times float32's."""
    if device != "cpu":
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    asked = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    return bool(getattr(torch.ops.mkldnn, asked[dtype])())


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

    def __init__(self, heads: Heads, part: slice, scratch: _Scratch, kept: Kept) -> None:
        width, pairs = part.stop - part.start, heads.pairs
        self._scratch, self._width = scratch, width
        self._to_keep = [kept.policy(part), kept.reference(part)]
        dtype, rows = accumulation_dtype(heads.hidden.dtype), heads.hidden.shape[0]
        # Exponentials are made where they are kept, if those of all rows are, and not rounded.
        stay = [
            to if to is not None and to.dtype == dtype and to.shape[0] == rows else None
            for to in self._to_keep
        ]
        self.logits = [
            scratch.logits(index, states, weight[part], to)
            for index, ((states, weight), to) in enumerate(zip(pairs, stay, strict=False))
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

    def __init__(self, heads: Heads, part: slice, scratch: _Scratch, kept: Kept) -> None:
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
    scratch = _Scratch(heads, blocks)
    sums = [Sums(hidden.shape[0], dtype, hidden.device) for _ in pairs]
    at = [hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in pairs]
    found = Found({}, [], kept=kept)
    shift_places = hidden.new_empty(len(pairs), max(blocks.kept, 1), hidden.shape[0], dtype=dtype)
    if vectors:
        found.vectors = [hidden.new_zeros(hidden.shape, dtype=torch.float64) for _ in pairs]
    where, last_rows = _Targets(heads.targets, blocks), slice(hidden.shape[0] - blocks.ref_kept, None)
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


def backward_blocks(
    heads: Heads,
    found: Found,
    grads: Mapping[str, Tensor],
    blocks: Blocks,
    *,
    want_hidden: bool,
    want_weight: bool,
    write_to: Tensor | None = None,
    add: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the policy's hidden states and head.

    Args:
        heads: the forward's rows.
        found: what it found.
        grads: incoming gradients ``[N]`` by the statistic's field in TokenStats; absent means zero.
        blocks: the forward's.
        want_hidden: whether the hidden states want a gradient.
        want_weight: whether the head wants one.
        write_to: memory for the head's gradient, where blocks may lodge; None for new one.
        add: whether it joins the gradient that is there, of the accumulation dtype as all else.
    """
    if found.vectors:
        return _from_vectors(heads, found.vectors, grads), None
    steps = [_Backward(heads, found, own, blocks, rows) for rows, own in _alike(heads, grads, blocks)]
    dtype = accumulation_dtype(heads.hidden.dtype)
    grad_hidden = torch.zeros_like(heads.hidden, dtype=dtype) if want_hidden else None
    grad_weight = None
    if want_weight:
        grad_weight = torch.empty_like(heads.weight) if write_to is None else write_to
    at_target = grads.get("policy_logps", torch.zeros_like(found.lse[0]))
    # Where nothing has to be rounded on the way, products go straight to their place, and all targets at once.
    direct = heads.hidden.dtype == heads.weight.dtype == dtype
    # So does the one rounded product of a block of the head, but for its targets; several are added before they are rounded.
    alone = len(steps) == 1 and heads.hidden.dtype == heads.weight.dtype
    where = None if direct else _Targets(heads.targets, blocks)
    place = _place_of_rows(heads.hidden, direct)
    # The last blocks of the forward are the ones that the cache still holds, and those that were kept; and where these lodge in
    # the gradient, the end of that is free.
    for number, part in reversed(list(enumerate(blocks))):
        whole = grad_weight[part] if grad_weight is not None and direct else None
        begun = add
        for step in steps:
            block, factor = step.block(number, part)
            narrow = step.scratch.narrow(block)
            for rows in _pieces(narrow.shape[0], place):
                if grad_hidden is not None:
                    states = step.scratch.product(
                        "states", narrow[rows], heads.weight[part], place, widen=not blocks.compiled
                    )
                    own = None if factor is None else factor[rows]
                    add_scaled(grad_hidden[step.rows][rows], own, states, compiled=blocks.compiled)
                    del states  # before the next product makes its own memory
                if grad_weight is None:
                    continue
                scaled = step.scaled(factor, rows, place)
                if direct and whole is not None:
                    add_product(whole, narrow[rows].T, scaled, begun=begun)
                else:
                    to = grad_weight[part] if alone else None
                    own = step.scratch.product("whole", narrow[rows].T, scaled, to, widen=not alone)
                    whole = own if whole is None else whole.add_(own)
                begun = True
            del block, narrow, factor  # before the next block is made, which may need new memory
        if where is not None and grad_weight is not None and whole is not None:
            hits, columns = where.of(number, part)
            at_words = heads.hidden[hits].to(dtype) * at_target[hits, None]
            if whole.dtype == dtype:
                grad_weight[part] = whole.index_add_(0, columns, at_words)
            else:
                _add_rounded(whole, columns, at_words)
    for rows in _pieces(heads.hidden.shape[0], place):
        own, targets = at_target[rows], heads.targets[rows]
        if grad_weight is not None and direct:
            grad_weight.index_add_(0, targets, _scaled(heads.hidden[rows], own, place))
        if grad_hidden is not None:
            grad_hidden[rows].addcmul_(own[:, None], heads.weight[targets].to(dtype))
    return None if grad_hidden is None else grad_hidden.to(heads.hidden.dtype), grad_weight


def _add_rounded(total: Tensor, columns: Tensor, rows: Tensor) -> None:
    """``total[columns] += rows`` in place, of sorted columns that may occur more than once; each sum is rounded once."""
    words, which = columns.unique_consecutive(return_inverse=True)
    total[words] = total[words].to(rows.dtype).index_add_(0, which, rows).to(total.dtype)


def _place_of_rows(hidden: Tensor, direct: bool) -> Tensor | None:
    """Memory for what is made of some rows at a time ``[P, D]``; None where all are taken at once.

    With all rows it would grow with the sequences, which the budget does not bound. Half precision is not cut: a sum of pieces
    would be rounded more than once.
    """
    if not direct or hidden.is_cuda:
        return None
    width = hidden.shape[1]
    return hidden.new_empty(min(_rows_of_place(width, hidden.element_size()), hidden.shape[0]), width)


def _rows_of_place(width: int, itemsize: int) -> int:
    return max(_PLACE_BYTES // (width * itemsize), _FEWEST_ROWS)


def _pieces(count: int, place: Tensor | None) -> Iterator[slice]:
    """Rows that fit into ``place``, one piece after another; one of none where there are none."""
    step = count if place is None else place.shape[0]
    for start in range(0, max(count, 1), max(step, 1)):
        yield slice(start, min(start + step, count))


def _scaled(hidden: Tensor, factor: Tensor, place: Tensor | None) -> Tensor:
    """Rows ``[n, D]`` times a number each ``[n]``."""
    if place is None:
        return (hidden * factor[:, None]).to(hidden.dtype)
    return torch.mul(hidden, factor[:, None], out=place[: hidden.shape[0]])


def _alike(
    heads: Heads, grads: Mapping[str, Tensor], blocks: Blocks
) -> list[tuple[slice, dict[str, Tensor]]]:
    """Rows in pieces with their gradients: pieces without any but of log-probabilities, and pieces whose reference is kept.

    In TDPO2 the chosen answers' KL has no gradient, and what a KL needs costs a product and three passes.
    """
    count = heads.targets.shape[0]
    others = [grad != 0 for name, grad in grads.items() if name != "policy_logps"]
    if not others or not count:
        return [(slice(0, count), dict(grads))]
    has = torch.stack(others).any(0)
    # One answer from the device for all three.
    some, before, after = torch.stack([has.any(), has.byte().argmax(), has.byte().flip(0).argmax()]).tolist()
    start, stop = (before, count - after) if some else (0, 0)
    first_kept = min(max(count - blocks.ref_kept, start), stop)
    of_logps = {name: grad for name, grad in grads.items() if name == "policy_logps"}
    edges = [0, start, first_kept, stop, count]
    kinds = [of_logps, grads, grads, of_logps]
    return [
        (slice(a, b), {name: grad[a:b] for name, grad in own.items()})
        for a, b, own in zip(edges, edges[1:], kinds, strict=False)
        if a < b
    ]


def _from_vectors(heads: Heads, vectors: list[Tensor], grads: Mapping[str, Tensor]) -> Tensor:
    total = torch.zeros_like(vectors[0])
    if (grad := grads.get("policy_logps")) is not None:
        total.addcmul_(grad[:, None], heads.weight[heads.targets].to(total.dtype) - vectors[0])
    if (grad := grads.get("kl_ref_policy")) is not None:
        total.addcmul_(grad[:, None], vectors[0] - vectors[1])
    return total.to(heads.hidden.dtype)


class _Backward:
    """The gradient of some rows' logits, as ``factor[n] * block[n, v]`` and the log-probability's at the target.

    Args:
        heads: all rows.
        found: of all rows.
        grads: of these rows.
        blocks: the forward's.
        rows: which.
    """

    def __init__(
        self, heads: Heads, found: Found, grads: Mapping[str, Tensor], blocks: Blocks, rows: slice
    ) -> None:
        self.rows, self._blocks, self._grads = rows, blocks, grads
        self._heads, self._found = heads.of_rows(rows), found
        self._lse = [lse[rows] for lse in found.lse]
        self._nothing = torch.zeros_like(self._lse[0])
        self._first_ref = rows.start - (heads.hidden.shape[0] - blocks.ref_kept)
        self._simple = self._grads.keys() <= {"policy_logps"}
        self._closed = bool(self._grads.keys() & {"kl_policy_ref", "entropy"})
        self._pairs = self._heads.pairs[:1] if self._simple else self._heads.pairs
        self.scratch = _Scratch(self._heads, blocks)
        self._factor: tuple[int, Tensor] | None = None
        self._scaled: tuple[Tensor, Tensor] | None = None

    def scaled(self, factor: Tensor | None, rows: slice, place: Tensor | None) -> Tensor:
        """The policy's hidden states of some of these rows, times a block's factor.

        Args:
            factor: as :meth:`block` gave it; those of all rows stay until there is another one.
            rows: which.
            place: memory for them; None where they are all rows.
        """
        hidden = self._heads.hidden[rows]
        if factor is None:
            return hidden
        if place is not None:
            return _scaled(hidden, factor[rows], place)
        if self._scaled is None or self._scaled[0] is not factor:
            self._scaled = factor, _scaled(hidden, factor, None)
        return self._scaled[1]

    def block(self, number: int, part: slice) -> tuple[Tensor, Tensor | None]:
        """A block and its factor ``[N]``, None for ones."""
        width = part.stop - part.start
        if self._closed:
            return self._closed_form(part), None
        if self._blocks.compiled:
            return self._compiled_block(number, part)
        p = self._exponentials(0, number, part)
        if self._simple:
            # Of the log-probability alone the block needs no arithmetic: -g p is the exponentials times one number a row.
            return p, self._factor_of_logps(number)
        # (g' - g) p - g' q. Each product is rounded before they meet, so that a KL alone leaves exactly nothing at p = q: one
        # fused pass would leave the rounding of one of them.
        of_p, of_q = self._factors_of_kl(number)
        q = self._exponentials(1, number, part)
        p = torch.mul(p, of_p[:, None], out=self.scratch.get(0, width))
        q = torch.mul(q, of_q[:, None], out=self.scratch.get(1, width))
        return p.sub_(q), None

    def _exponentials(self, model: int, number: int, part: slice) -> Tensor:
        """A model's exponentials of a block."""
        found = self._kept(model, part)
        if found is None:
            # Shifted as the forward's, not turned into probabilities at once: where one model's are kept and the other's
            # are not, models that agree shall have no gradient of their KL.
            logits = self._logits(model, part)
            found = exponentials(logits, self._shift(model, number), logits)
        return found

    def _compiled_block(self, number: int, part: slice) -> tuple[Tensor, Tensor | None]:
        """:meth:`block` with compiled passes, in the hidden states' dtype."""
        p, shift = self._operand(0, number, part)
        if self._simple:
            return p if shift is None else write_exponentials(p, shift, p), self._factor_of_logps(number)
        to = self.scratch.block("narrow", part.stop - part.start)
        return difference((p, shift), self._operand(1, number, part), self._factors_of_kl(number), to), None

    def _operand(self, model: int, number: int, part: slice) -> tuple[Tensor, Tensor | None]:
        """A model's kept exponentials, or its logits and what makes exponentials of them ``[N]``."""
        kept = self._kept(model, part)
        if kept is not None:
            return kept, None
        states, weight = self._pairs[model]
        return self.scratch.own_logits(model, states, weight[part]), self._shift(model, number)

    def _factor_of_logps(self, number: int) -> Tensor:
        """-g of what makes a block's exponentials probabilities ``[N]``; one tensor for all blocks that share a shift."""
        shift = self._shift_number(0, number)
        if self._factor is None or self._factor[0] != shift:
            at_target = self._grads.get("policy_logps", self._nothing)
            self._factor = shift, -at_target * self._to_probabilities(0, number)
        return self._factor[1]

    def _factors_of_kl(self, number: int) -> tuple[Tensor, Tensor]:
        """g' - g and g' of what makes the models' exponentials of a block probabilities ``[N]``."""
        of_kl, at_target = self._grads["kl_ref_policy"], self._grads.get("policy_logps", self._nothing)
        return (
            (of_kl - at_target) * self._to_probabilities(0, number),
            of_kl * self._to_probabilities(1, number),
        )

    def _to_probabilities(self, model: int, number: int) -> Tensor:
        """What makes probabilities of a block's exponentials ``[N]``."""
        return (self._shift(model, number) - self._lse[model]).exp()

    def _shift(self, model: int, number: int) -> Tensor:
        """What to subtract from a block's logits ``[N]``: as the forward did where something is kept, else the last of all."""
        return self._found.shifts[model][self._shift_number(model, number)][self.rows]

    def _shift_number(self, model: int, number: int) -> int:
        count = len(self._found.shifts[model])
        kept = number - (len(self._blocks) - count)
        return kept if kept >= 0 else count - 1

    def _kept(self, model: int, part: slice) -> Tensor | None:
        """A model's exponentials, if they are kept for this block and these rows."""
        kept = self._found.kept
        if kept is None:
            return None
        first = self.rows.start if model == 0 else self._first_ref
        found = kept.policy(part) if model == 0 else kept.reference(part)
        return found[first : first + self._nothing.shape[0]] if found is not None and first >= 0 else None

    def _closed_form(self, part: slice) -> Tensor:
        logits = [self._logits(model, part) for model in range(len(self._pairs))]
        values = {name: value[self.rows] for name, value in self._found.values.items()}
        rows = RowStatistics(values, self._lse[0], self._lse[1] if len(self._lse) == 2 else None)
        return logit_gradient(logits[0], logits[1] if len(logits) == 2 else None, None, rows, self._grads)

    def _logits(self, model: int, part: slice) -> Tensor:
        states, weight = self._pairs[model]
        return self.scratch.logits(model, states, weight[part])
