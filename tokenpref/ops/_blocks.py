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

How the vocabulary is cut is decided here; :mod:`tokenpref.ops._forward` and :mod:`tokenpref.ops._backward` are the two passes, in
the memory of :mod:`tokenpref.ops._scratch`, and :mod:`tokenpref.ops._passes` has the arithmetic of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenpref.ops._closed_form import accumulation_dtype

__all__ = ["MIB", "Blocks", "Heads", "TargetRows", "plan_blocks"]

MIB = 1 << 20
# Of a model. On a CPU the passes over a block shall find it in the last-level cache; a GPU wants few and large kernels.
_BLOCK_BYTES = {"cpu": 8 * MIB, "cuda": 256 * MIB}
# Nor shall it be wider on a CPU: its products may need the block's weights once more, and their gradient beside the head's.
_WIDEST = 2048
# Rows of logits that do not begin on a cache line's boundary cost a product on a CPU a third of its speed.
_UNIT = 64


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


class TargetRows:
    """The rows whose target lies in a block, found without looking at all rows each time."""

    def __init__(self, targets: Tensor, blocks: Blocks) -> None:
        self._columns, self._rows = targets.sort()
        edges = torch.tensor([*(part.start for part in blocks), blocks.vocabulary], device=targets.device)
        self._edges = torch.searchsorted(self._columns, edges).tolist()

    def of(self, number: int, part: slice) -> tuple[Tensor, Tensor]:
        """Rows, and the columns of their targets inside the block."""
        here = slice(self._edges[number], self._edges[number + 1])
        return self._rows[here], self._columns[here] - part.start
