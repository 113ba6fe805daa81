"""Memory that stays between one step's head and the next one's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["HeadRoom", "Loan"]


@dataclass(eq=False)
class Loan:
    """Memory for a forward and its backward.

    Args:
        memory: at least as many numbers as were asked for; None once another forward has it.
    """

    memory: Tensor | None


class HeadRoom:
    """What a head keeps for its backward is its largest tensor, of about one size in every step.

    Freed and taken again, it leaves a hole in a CPU allocator's heap that the next step's activations settle in, so that the
    heap grows by as much: on the fixed work of ``benchmarks/cpu`` a step's peak varied by a fifth from run to run. Here it stays.
    Other devices' allocators keep memory by sizes themselves, and get it back.
    """

    def __init__(self) -> None:
        self._spare: Loan | None = None

    def lend(self, size: int, like: Tensor) -> Loan:
        """Memory for ``size`` numbers of the dtype and the device of ``like``, without contents.

        It is the last loan's that came back, if it is large enough; that one loses it.
        """
        memory = None
        if self._spare is not None:
            memory, self._spare.memory, self._spare = self._spare.memory, None, None
        if (
            memory is None
            or memory.numel() < size
            or (memory.dtype, memory.device) != (like.dtype, like.device)
        ):
            memory = None  # let go first: both at once may be more than there is
            memory = like.new_empty(size)
        return Loan(memory)

    def take_back(self, loan: Loan) -> None:
        """Keep the memory for the next loan; until then ``loan`` has it too."""
        memory = loan.memory
        if memory is None or memory.device.type != "cpu":
            return
        spare = self._spare.memory if self._spare is not None else None
        if spare is None or spare.numel() <= memory.numel():
            self._spare = loan
