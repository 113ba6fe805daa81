"""What autograd keeps for a backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


@contextmanager
def saved_bytes(constant: Iterable[Tensor]) -> Iterator[dict[int, tuple[int, Tensor]]]:
    """Bytes of each memory that autograd keeps in the block, and a tensor in it, but for what holds the constant tensors."""
    known = {tensor.untyped_storage().data_ptr() for tensor in constant}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that its place is not another's
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept
