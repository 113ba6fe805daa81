"""Reads PyTorch's distributed checkpoints without executing anything that they contain.

Their index is a pickle, of which only the classes of such an index are accepted. Other values that are not tensors are read
with ``weights_only``.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

__all__ = ["SafePlanner", "SafeReader"]


def _member(kind: Any, name: str) -> Any:
    """A member of an enumeration. Some versions of Python pickle such members as calls of ``getattr``.

    Raises:
        pickle.UnpicklingError: for an attribute of anything else.
    """
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise pickle.UnpicklingError(
            f"the checkpoint's index refers to {name!r} of {kind!r}, which is not allowed"
        )
    return kind[name]


# The classes in the index of a distributed checkpoint; anything else is refused.
_INDEX_CLASSES: dict[tuple[str, str], Any] = {
    **{
        (module.__name__, name): getattr(module, name)
        for module, names in (
            (
                metadata,
                (
                    "BytesStorageMetadata",
                    "ChunkStorageMetadata",
                    "Metadata",
                    "MetadataIndex",
                    "StorageMeta",
                    "TensorProperties",
                    "TensorStorageMetadata",
                    "_MEM_FORMAT_ENCODING",
                ),
            ),
            (filesystem, ("_StorageInfo",)),
        )
        for name in names
        if hasattr(module, name)
    },
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): getattr(torch.serialization, "_get_layout", None),
    ("collections", "OrderedDict"): OrderedDict,
    ("builtins", "getattr"): _member,
    # The writer's folder; this path is never opened.
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib", "PurePosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
    **{
        ("torch", str(t).removeprefix("torch.")): t
        for t in vars(torch).values()
        if isinstance(t, torch.dtype)
    },
}


class _IndexUnpickler(pickle.Unpickler):
    """Reads the index of a distributed checkpoint and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """The class of this name, if an index may contain it.

        Raises:
            pickle.UnpicklingError: for any other name; nothing is imported.
        """
        if (module, name) not in _INDEX_CLASSES:
            raise pickle.UnpicklingError(
                f"the checkpoint's index refers to {module}.{name}, which no checkpoint of this package contains"
            )
        return _INDEX_CLASSES[module, name]


class SafeReader(dcp.FileSystemReader):
    """PyTorch's reader with an unpickler that imports nothing, for the files of :mod:`tokenpref.distributed.plain_writing`."""

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Keep the index."""
        super().set_up_storage_reader(metadata, is_coordinator, *args, **kwargs)
        self._tensors = metadata.state_dict_metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read all items of the plan."""
        for item in plan.items:
            place = self.storage_data[item.storage_index]
            with (Path(self.path) / place.relative_path).open("rb") as stream:
                stream.seek(place.offset)
                data = bytearray(place.length)
                found = stream.readinto(data)
            if found != place.length:
                raise ValueError(
                    f"{place.relative_path} ends after {found} of the {place.length} bytes of {item.storage_index.fqn}"
                )
            if item.type is LoadItemType.BYTE_IO:
                planner.load_bytes(item, io.BytesIO(data))
                continue
            stored = self._chunk(item.storage_index, data, whole=place.transform_descriptors is None)
            stored = narrow_tensor_by_index(stored, item.storage_offsets, item.lengths)
            own = planner.resolve_tensor(item).detach()
            if own.size() != stored.size():
                raise ValueError(
                    f"{item.storage_index.fqn} has the size {list(stored.size())} there and {list(own.size())} here"
                )
            own.copy_(stored)
            planner.commit_tensor(item, own)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _chunk(self, index: metadata.MetadataIndex, data: bytearray, *, whole: bool) -> Tensor:
        """A stored part of a tensor: plain elements, or PyTorch's serialised form for tensors with a structure."""
        described = self._tensors[index.fqn]
        if not isinstance(described, metadata.TensorStorageMetadata):
            raise ValueError(f"its index lists no tensor of the name {index.fqn}")
        if not whole:
            loaded: Tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            return loaded
        size = next((chunk.sizes for chunk in described.chunks if chunk.offsets == index.offset), None)
        if size is None:
            raise ValueError(f"its index lists no part of {index.fqn} at {index.offset}")
        dtype = described.properties.dtype
        if size.numel() * dtype.itemsize != len(data):
            raise ValueError(
                f"{index.fqn} has {len(data)} bytes there, and its size {list(size)} needs another number"
            )
        return torch.frombuffer(data, dtype=dtype).view(size) if data else torch.empty(size, dtype=dtype)

    def read_metadata(self, *args: Any, **kwargs: Any) -> metadata.Metadata:
        """The checkpoint's index."""
        with (Path(self.path) / ".metadata").open("rb") as stream:
            index: metadata.Metadata = _IndexUnpickler(stream).load()
        _check_index(index, Path(self.path))
        if getattr(index, "storage_meta", None) is None:
            index.storage_meta = metadata.StorageMeta()
        index.storage_meta.load_id = self.load_id  # type: ignore[union-attr]  # set above
        return index


def _check_index(index: Any, folder: Path) -> None:
    """Check that an index names files of its folder only, within their sizes, and whole tensors.

    Raises:
        ValueError: for the first violation, before anything has been read.
    """
    if not isinstance(index, metadata.Metadata):
        raise ValueError(f"its index holds a {type(index).__name__}")
    places: Any = index.storage_data
    for place in places.values():
        name = place.relative_path
        if PurePosixPath(name).name != name:
            raise ValueError(f"its index names the file {name!r} outside of it")
        if (
            place.offset < 0
            or place.length < 0
            or place.offset + place.length > (folder / name).stat().st_size
        ):
            raise ValueError(f"its index asks for bytes beyond the end of {name}")
    for name, tensor in index.state_dict_metadata.items():
        if not isinstance(tensor, metadata.TensorStorageMetadata):
            continue
        inside = all(
            0 <= start <= start + size <= whole
            for chunk in tensor.chunks
            for start, size, whole in zip(chunk.offsets, chunk.sizes, tensor.size, strict=True)
        )
        if not inside or sum(chunk.sizes.numel() for chunk in tensor.chunks) != tensor.size.numel():
            raise ValueError(
                f"what its index lists of {name} does not cover a tensor of size {list(tensor.size)}"
            )


class SafePlanner(DefaultLoadPlanner):
    """PyTorch's planner, restricted to plain data of the same kind as the optimizer's."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Load a value that is not a tensor.

        Raises:
            ValueError: if the checkpoint has another kind of value there.
        """
        loaded = torch.load(value, weights_only=True)
        own = self.state_dict[read_item.dest_index.fqn]
        if not _same_kind(loaded, own):
            raise ValueError(f"{read_item.dest_index.fqn} is {loaded!r}, and the optimizer has {own!r} there")
        plain = io.BytesIO()
        torch.save(loaded, plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)


def _same_kind(one: Any, other: Any) -> bool:
    """Whether two settings of an optimizer could stand in the same place."""
    if one is None or other is None:
        return True
    kinds: tuple[Any, ...] = (bool, (int, float, Tensor), str, (list, tuple), dict)
    return next((isinstance(other, kind) for kind in kinds if isinstance(one, kind)), True)
