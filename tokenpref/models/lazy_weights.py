"""Weights that are read from files when they are looked up, so that they never exist as a whole beside a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence

import torch
from torch import Tensor

__all__ = ["LazyWeights", "notes_of", "shapes_of"]


class LazyWeights(MutableMapping[str, Tensor]):
    """A state dict whose tensors are read one at a time. Tensors that are set are kept.

    Args:
        shapes: shape of each tensor, by name.
        read: reads a tensor.
        notes: what a user should know about the files, as lines for the log.
    """

    def __init__(
        self, shapes: Mapping[str, torch.Size], read: Callable[[str], Tensor], notes: Sequence[str] = ()
    ) -> None:
        self.shapes: dict[str, torch.Size] = dict(shapes)
        self.notes = tuple(notes)
        self._read = read
        self._set: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name in self._set:
            return self._set[name]
        if name not in self.shapes:
            raise KeyError(name)
        return self._read(name)

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self.shapes[name] = tensor.shape
        self._set[name] = tensor

    def __delitem__(self, name: str) -> None:
        del self.shapes[name]
        self._set.pop(name, None)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """The shape of each tensor of a state dict, by name. No file is read for it."""
    if isinstance(state, LazyWeights):
        return dict(state.shapes)
    return {name: tensor.shape for name, tensor in state.items()}


def notes_of(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """What a user should know about the files of a state dict, as lines for the log."""
    return state.notes if isinstance(state, LazyWeights) else ()
