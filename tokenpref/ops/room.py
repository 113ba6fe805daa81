"""Memory that stays between one step's head and the next one's."""

from __future__ import annotations

from torch import Tensor

__all__ = ["HeadRoom"]


class HeadRoom:
    """What a head keeps for its backward is its largest tensor, of about one size in every step.

    Freed and taken again, it leaves a hole in a CPU allocator's heap that the next step's activations settle in, so that the
    heap grows by as much: on the fixed work of ``benchmarks/cpu`` a step's peak varied by a fifth from run to run. Here it stays.
    Other devices' allocators keep memory by sizes themselves, and get it back.
    """

    def __init__(self) -> None:
        self._spare: Tensor | None = None

    def lend(self, size: int, like: Tensor) -> Tensor:
        """Memory for at least ``size`` numbers of the dtype and the device of ``like``, without contents.

        It is what came back, if that is large enough.
        """
        memory, self._spare = self._spare, None
        if (
            memory is None
            or memory.numel() < size
            or (memory.dtype, memory.device) != (like.dtype, like.device)
        ):
            memory = None  # let go first: both at once may be more than there is
            memory = like.new_empty(size)
        return memory

    def take_back(self, memory: Tensor) -> None:
        """Keep the memory for the next forward."""
        if memory.device.type == "cpu" and (self._spare is None or self._spare.numel() <= memory.numel()):
            self._spare = memory
