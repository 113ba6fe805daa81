"""Memory in which blocks of the vocabulary are made, and in which they stay for the backward."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from tokenpref.ops._blocks import MIB, Blocks, Heads
from tokenpref.ops._closed_form import accumulation_dtype
from tokenpref.ops.products import product, takes_onednn

__all__ = ["Kept", "Scratch", "rows_of_place"]

_PLACE_BYTES = 2 * MIB  # for what is made of some rows at a time, on a CPU,
_FEWEST_ROWS = 256  # but for at least so many, since products of fewer are slow


class Scratch:
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
        count = -(-to.shape[0] // rows_of_place(to.shape[1], to.element_size()))
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

    def spare(self, part: slice) -> Tensor | None:
        """Memory for a block ``[N, columns]`` of the policy that is not kept: that of one that is, if there is any.

        The forward makes those that are not kept before the others, the backward after them.
        """
        size = self._rows * (part.stop - part.start)
        if part.start >= self._blocks.first_column or size > self._policy.numel():
            return None
        return self._part(self._policy, self._rows, 0, slice(0, part.stop - part.start))

    def reference(self, part: slice) -> Tensor | None:
        """The reference's of a block ``[K, columns]``, of the last K rows, if any are kept."""
        count = self._blocks.ref_kept
        return self._part(self._reference, count, part.start, part) if count else None

    def _part(self, memory: Tensor, rows: int, start: int, part: slice) -> Tensor:
        width = part.stop - part.start
        return memory[rows * start : rows * (start + width)].view(rows, width)


def rows_of_place(width: int, itemsize: int) -> int:
    """How many rows to make at a time, of ``width`` numbers of ``itemsize`` bytes each, where all would take too much memory."""
    return max(_PLACE_BYTES // (width * itemsize), _FEWEST_ROWS)


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
