"""The gradients of rows' statistics, a block of the vocabulary at a time; see :mod:`tokenpref.ops._blocks`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from tokenpref.ops._blocks import Blocks, Heads, TargetRows
from tokenpref.ops._closed_form import RowStatistics, accumulation_dtype, logit_gradient
from tokenpref.ops._forward import Found
from tokenpref.ops._passes import add_scaled, difference, exponentials, write_exponentials
from tokenpref.ops._scratch import Scratch, rows_of_place
from tokenpref.ops.products import add_product

__all__ = ["backward_blocks"]


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
    dtype = accumulation_dtype(heads.hidden.dtype)
    at_target = grads.get("policy_logps", torch.zeros_like(found.lse[0]))
    direct = heads.hidden.dtype == heads.weight.dtype == dtype  # nothing has to be rounded on the way
    place = _place_of_rows(heads.hidden, direct)
    steps = [_Step(heads, found, own, blocks, rows, place) for rows, own in _alike(heads, grads, blocks)]
    of_hidden = torch.zeros_like(heads.hidden, dtype=dtype) if want_hidden else None
    of_head = None
    if want_weight:
        total = torch.empty_like(heads.weight) if write_to is None else write_to
        if direct:
            of_head = _HeadGradient(total, heads, at_target, add=add)
        else:
            of_head = _RoundedHeadGradient(total, heads, at_target, blocks, alone=len(steps) == 1)
    # The last blocks of the forward are the ones that the cache still holds, and those that were kept; and where these lodge in
    # the gradient, the end of that is free.
    for number, part in reversed(list(enumerate(blocks))):
        if of_head is not None:
            of_head.begin(number, part)
        for step in steps:
            step.add_block(number, part, of_hidden, of_head)
        if of_head is not None:
            of_head.end()
    if of_head is not None:
        of_head.finish(place)
    if of_hidden is not None:
        for rows in _pieces(heads.hidden.shape[0], place):
            of_hidden[rows].addcmul_(at_target[rows, None], heads.weight[heads.targets[rows]].to(dtype))
    return (
        None if of_hidden is None else of_hidden.to(heads.hidden.dtype),
        None if of_head is None else of_head.total,
    )


class _HeadGradient:
    """The head's gradient ``[V, D]``, written a block after another.

    Here all tensors are of the accumulation dtype: products go straight to their place, and all targets at once at the end.

    Args:
        total: memory for it, where blocks may lodge.
        heads: all rows.
        at_target: gradients of the log-probabilities ``[N]``.
        add: whether it joins what is there.
    """

    def __init__(self, total: Tensor, heads: Heads, at_target: Tensor, *, add: bool = False) -> None:
        self.total = total
        self._heads, self._at_target, self._add = heads, at_target, add

    def begin(self, number: int, part: slice) -> None:
        """Begin a block."""
        self._number, self._part, self._begun = number, part, self._add

    def add(self, scratch: Scratch, block: Tensor, states: Tensor) -> None:
        """Add ``block^T states`` of some rows, ``[n, C]`` and ``[n, D]``."""
        add_product(self.total[self._part], block.T, states, begun=self._begun)
        self._begun = True

    def end(self) -> None:
        """End the block."""

    def finish(self, place: Tensor | None) -> None:
        """Add what the targets get, after the last block; ``place`` is memory for some rows at a time, None for all at once."""
        hidden, targets = self._heads.hidden, self._heads.targets
        for rows in _pieces(hidden.shape[0], place):
            self.total.index_add_(0, targets[rows], _scaled(hidden[rows], self._at_target[rows], place))


class _RoundedHeadGradient(_HeadGradient):
    """:class:`_HeadGradient` where hidden states are of half precision: each number of it is rounded once.

    A block's only product is its gradient but for its targets; several products are added before they are rounded.

    Args:
        total: memory for it.
        heads: all rows.
        at_target: gradients of the log-probabilities ``[N]``.
        blocks: how the vocabulary is cut.
        alone: whether each block is one product.
    """

    def __init__(
        self, total: Tensor, heads: Heads, at_target: Tensor, blocks: Blocks, *, alone: bool
    ) -> None:
        super().__init__(total, heads, at_target)
        self._alone = alone and heads.hidden.dtype == heads.weight.dtype
        self._targets = TargetRows(heads.targets, blocks)
        self._sum: Tensor | None = None

    def add(self, scratch: Scratch, block: Tensor, states: Tensor) -> None:
        to = self.total[self._part] if self._alone else None
        own = scratch.product("whole", block.T, states, to, widen=not self._alone)
        self._sum = own if self._sum is None else self._sum.add_(own)

    def end(self) -> None:
        assert self._sum is not None
        found, self._sum = self._sum, None
        rows, columns = self._targets.of(self._number, self._part)
        words = self._heads.hidden[rows].to(self._at_target.dtype) * self._at_target[rows, None]
        if found.dtype == words.dtype:
            self.total[self._part] = found.index_add_(0, columns, words)
        else:
            _add_rounded(found, columns, words)

    def finish(self, place: Tensor | None) -> None:
        """Nothing is left to add."""


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
    return hidden.new_empty(min(rows_of_place(width, hidden.element_size()), hidden.shape[0]), width)


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


class _Step:
    """The gradient of some rows' logits, as ``factor[n] * block[n, v]`` and the log-probability's at the target.

    Args:
        heads: all rows.
        found: of all rows.
        grads: of these rows.
        blocks: the forward's.
        rows: which.
        place: memory for some of them at a time; None where all are taken at once.
    """

    def __init__(
        self,
        heads: Heads,
        found: Found,
        grads: Mapping[str, Tensor],
        blocks: Blocks,
        rows: slice,
        place: Tensor | None,
    ) -> None:
        self._rows, self._blocks, self._grads, self._place = rows, blocks, grads, place
        self._heads, self._found = heads.of_rows(rows), found
        self._lse = [lse[rows] for lse in found.lse]
        self._nothing = torch.zeros_like(self._lse[0])
        self._first_ref = rows.start - (heads.hidden.shape[0] - blocks.ref_kept)
        self._simple = self._grads.keys() <= {"policy_logps"}
        self._closed = bool(self._grads.keys() & {"kl_policy_ref", "entropy"})
        self._pairs = self._heads.pairs[:1] if self._simple else self._heads.pairs
        self._scratch = Scratch(self._heads, blocks)
        self._factor: tuple[int, Tensor] | None = None
        self._scaled: tuple[Tensor, Tensor] | None = None

    def add_block(
        self, number: int, part: slice, of_hidden: Tensor | None, of_head: _HeadGradient | None
    ) -> None:
        """Add what these rows make of a block to the gradients that are wanted."""
        block, factor = self._block(number, part)
        narrow = self._scratch.narrow(block)
        for rows in _pieces(narrow.shape[0], self._place):
            if of_hidden is not None:
                self._add_to_hidden(of_hidden[self._rows][rows], narrow[rows], factor, rows, part)
            if of_head is not None:
                of_head.add(self._scratch, narrow[rows], self._states_times(factor, rows))

    def _add_to_hidden(
        self, total: Tensor, block: Tensor, factor: Tensor | None, rows: slice, part: slice
    ) -> None:
        """Add ``factor * (block W)`` of some of these rows to the gradient of their hidden states ``[n, D]``."""
        compiled = self._blocks.compiled
        made = self._scratch.product(
            "hidden", block, self._heads.weight[part], self._place, widen=not compiled
        )
        add_scaled(total, None if factor is None else factor[rows], made, compiled=compiled)

    def _states_times(self, factor: Tensor | None, rows: slice) -> Tensor:
        """The policy's hidden states of some of these rows, times a block's factor; those of all rows stay until the next one."""
        hidden = self._heads.hidden[rows]
        if factor is None:
            return hidden
        if self._place is not None:
            return _scaled(hidden, factor[rows], self._place)
        if self._scaled is None or self._scaled[0] is not factor:
            self._scaled = factor, _scaled(hidden, factor, None)
        return self._scaled[1]

    def _block(self, number: int, part: slice) -> tuple[Tensor, Tensor | None]:
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
        p = torch.mul(p, of_p[:, None], out=self._scratch.get(0, width))
        q = torch.mul(q, of_q[:, None], out=self._scratch.get(1, width))
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
        """:meth:`_block` with compiled passes, in the hidden states' dtype."""
        p, shift = self._operand(0, number, part)
        if self._simple:
            return p if shift is None else write_exponentials(p, shift, p), self._factor_of_logps(number)
        to = self._scratch.block("narrow", part.stop - part.start)
        return difference((p, shift), self._operand(1, number, part), self._factors_of_kl(number), to), None

    def _operand(self, model: int, number: int, part: slice) -> tuple[Tensor, Tensor | None]:
        """A model's kept exponentials, or its logits and what makes exponentials of them ``[N]``."""
        kept = self._kept(model, part)
        if kept is not None:
            return kept, None
        states, weight = self._pairs[model]
        return self._scratch.own_logits(model, states, weight[part]), self._shift(model, number)

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
        return self._found.shifts[model][self._shift_number(model, number)][self._rows]

    def _shift_number(self, model: int, number: int) -> int:
        count = len(self._found.shifts[model])
        kept = number - (len(self._blocks) - count)
        return kept if kept >= 0 else count - 1

    def _kept(self, model: int, part: slice) -> Tensor | None:
        """A model's exponentials, if they are kept for this block and these rows."""
        kept = self._found.kept
        if kept is None:
            return None
        first = self._rows.start if model == 0 else self._first_ref
        found = kept.policy(part) if model == 0 else kept.reference(part)
        return found[first : first + self._nothing.shape[0]] if found is not None and first >= 0 else None

    def _closed_form(self, part: slice) -> Tensor:
        logits = [self._logits(model, part) for model in range(len(self._pairs))]
        values = {name: value[self._rows] for name, value in self._found.values.items()}
        rows = RowStatistics(values, self._lse[0], self._lse[1] if len(self._lse) == 2 else None)
        return logit_gradient(logits[0], logits[1] if len(logits) == 2 else None, None, rows, self._grads)

    def _logits(self, model: int, part: slice) -> Tensor:
        states, weight = self._pairs[model]
        kept, place = self._found.kept, None
        if model == 0 and kept is not None and states.dtype == self._nothing.dtype:
            place = kept.spare(part)
        return self._scratch.logits(model, states, weight[part], None if place is None else place[self._rows])
