"""State of sharded and plain models: whole copies for export, sharded files for resume.

PyTorch's distributed checkpoints are read here without running anything that they say: their index is a pickle, from which only
the classes of such an index are taken, and what is no tensor is read with ``weights_only``.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer

from tokenpref.distributed.world import World
from tokenpref.errors import TokenprefError

__all__ = [
    "StateCopy",
    "check_sharded",
    "full_state_dict",
    "load_full_state_dict",
    "load_sharded",
    "save_sharded",
    "sharded_state",
    "write_sharded",
]


def full_state_dict(model: nn.Module, world: World) -> dict[str, Tensor]:
    """The whole parameters of ``model`` on the CPU of the main process (an empty dict elsewhere).

    Every process must call it.
    """
    if not world.is_distributed:
        return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    return state


def load_full_state_dict(model: nn.Module, state: dict[str, Tensor], world: World) -> None:
    """Copy whole parameters into ``model``, whose tensors are materialised already (sharded or not).

    Args:
        model: target; each tensor keeps its own dtype and device.
        state: name to whole tensor on the main process, which broadcasts; ignored elsewhere.
        world: the run's processes.

    Raises:
        RuntimeError: if names or shapes do not fit.
    """
    if not world.is_distributed:
        model.load_state_dict(state, strict=True)
        return
    own = model.state_dict()
    typed: dict[str, Any] = (
        {name: tensor.to(own[name].dtype) for name, tensor in state.items()} if world.is_main else {}
    )
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
    set_model_state_dict(model, typed, options=options)


def _member(kind: Any, name: str) -> Any:
    """A member of an enumeration: what ``getattr`` is called for in an index, as some versions of Python pickle members.

    Raises:
        pickle.UnpicklingError: for an attribute of anything else.
    """
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise pickle.UnpicklingError(f"the checkpoint's index asks for {name!r} of {kind!r}; it is not read")
    return kind[name]


# What the index of a distributed checkpoint is made of; anything else in it is refused.
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
    # Where the writer put it; a path that is never opened.
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
        """The named part of an index.

        Raises:
            pickle.UnpicklingError: for anything that an index does not hold; nothing is imported.
        """
        if (module, name) not in _INDEX_CLASSES:
            raise pickle.UnpicklingError(
                f"the checkpoint's index asks for {module}.{name}, which no checkpoint of this package does; it is not read"
            )
        return _INDEX_CLASSES[module, name]


class _SafeReader(dcp.FileSystemReader):
    """PyTorch's reader with :class:`_IndexUnpickler`."""

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
        ValueError: for the first thing that is not so; nothing has been read by then.
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


class _SafePlanner(DefaultLoadPlanner):
    """PyTorch's planner, which unpickles only plain data, of the kind that the optimizer has."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put what is no tensor into its place.

        Raises:
            ValueError: if another kind of value is there.
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


@contextmanager
def _plain_failures(what: str) -> Iterator[None]:
    """PyTorch's own exception is no ``Exception`` and hides its cause in a table; say the cause.

    Raises:
        TokenprefError: on every rank, with the first rank's cause.
    """
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        text = str(cause).strip().splitlines() or [""]
        raise TokenprefError(f"{what} (rank {rank}: {type(cause).__name__}: {text[0]})") from error


def save_sharded(path: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Write model and optimizer to the folder ``path``, each process its own shards."""
    write_sharded(path, sharded_state(model, optimizer))


def sharded_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """What :func:`write_sharded` writes: this process's shards, not copied. Every process must call it."""
    weights, state = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": state}


def write_sharded(path: Path, state: dict[str, Any], group: dist.ProcessGroup | None = None) -> None:
    """Write the shards of all processes to the folder ``path``; every process calls it.

    Args:
        path: an empty folder.
        state: from :func:`sharded_state`, or a :class:`StateCopy` of it.
        group: the processes; None: all of the run. A call from another thread needs a group of its own
            (:meth:`tokenpref.distributed.World.side_group`).

    Raises:
        TokenprefError: on every process, if one of them cannot write.
    """
    with _plain_failures(f"{path}: the checkpoint cannot be written"):
        dcp.save(state, checkpoint_id=path, process_group=group)


class StateCopy:
    """Copies of a state in main memory that training does not change; the memory is used again at the next copy."""

    def __init__(self) -> None:
        options = StagingOptions(
            use_pinned_memory=torch.cuda.is_available(),
            use_shared_memory=False,
            use_async_staging=False,
            use_non_blocking_copy=torch.cuda.is_available(),
        )
        self._stager = DefaultStager(options)

    def take(self, state: dict[str, Any]) -> dict[str, Any]:
        """A copy, valid until the next one is taken."""
        copied: dict[str, Any] = self._stager.stage(state)  # type: ignore[assignment]  # no future: it stages at once
        return copied


def check_sharded(path: Path) -> None:
    """Check the index of what :func:`save_sharded` wrote, before any process reads anything else.

    PyTorch would look for another index and print where it failed.

    Raises:
        TokenprefError: if it is damaged, or asks for what no checkpoint of this package holds.
    """
    try:
        _SafeReader(path).read_metadata()
    except (
        Exception
    ) as error:  # a damaged pickle may raise nearly anything; it is turned into our error, not passed over
        raise TokenprefError(
            f"{path}: the checkpoint cannot be read ({type(error).__name__}: {error})"
        ) from error


def load_sharded(path: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Read what :func:`save_sharded` wrote, into a model and a fresh optimizer, in place.

    The number of processes may differ from the one that wrote.
    """
    stored = sharded_state(model, optimizer)
    with torch.no_grad(), _plain_failures(f"{path}: the checkpoint cannot be read"):
        dcp.load(stored, storage_reader=_SafeReader(path), planner=_SafePlanner())
    set_state_dict(model, optimizer, model_state_dict=stored["model"], optim_state_dict=stored["optimizer"])
