"""Writes distributed checkpoints as plain elements of tensors, and hashes them while they are written.

PyTorch's own writer builds an archive for every tensor in Python. That takes longer than the writing itself and holds the
interpreter's lock, so a save in the background would slow the training. The hash is a fast one (xxh3). It detects damage but
not forgery, which no checksum stored beside the data can detect.
"""

from __future__ import annotations

import errno
import fcntl
import io
import mmap
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed.checkpoint as dcp
import xxhash
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from tokenpref._sealed import Written

__all__ = ["Arena", "PlainWriter"]

_PIECE = 16 << 20
_ROOM_OF_A_SETTING = 1 << 16

SERIALISED = "torch.save"
"""Marks a tensor that is not stored as plain elements, such as quantised optimizer state."""


class PlainWriter(dcp.FileSystemWriter):
    """Writes the shards of this process into one file, directly or through memory.

    Args:
        path: an empty folder.
        memory: receives everything first, and :meth:`flush` then writes the file. None writes directly to the file.

    Attributes:
        written: what was written, by file name, without the index, which is small and written last.
    """

    def __init__(self, path: Path, memory: Arena | None = None) -> None:
        super().__init__(path)
        self.written: dict[str, Written] = {}
        self._memory = memory
        self._name = ""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write the items of the plan and sync them to the disk, or copy them to the memory."""
        self._name = f"{plan.storage_data.prefix}0.distcp"
        if self._memory is not None:
            self._memory.start(_bytes_of(plan))
            results = [self._write(self._memory, item, planner) for item in plan.items]
        else:
            with (Path(self.path) / self._name).open("wb") as stream:
                file = _HashedFile(stream)
                results = [self._write(file, item, planner) for item in plan.items]
                stream.flush()
                os.fsync(stream.fileno())
            self.written[self._name] = Written(file.size, file.hasher.hexdigest())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def flush(self) -> None:
        """Write the memory to its file and sync it. This touches no tensor and communicates with no other process."""
        assert self._memory is not None  # otherwise there is nothing to flush
        self.written[self._name] = self._memory.to_file(Path(self.path) / self._name)

    def _write(self, target: Arena | _HashedFile, item: WriteItem, planner: SavePlanner) -> WriteResult:
        data: Any = planner.resolve_data(item)
        marks, offset = None, target.size
        if item.type is WriteItemType.BYTE_IO:
            target.write(torch.frombuffer(data.getbuffer(), dtype=torch.uint8))
        elif type(data.detach()) is Tensor:
            target.write(_elements(data.detach()))
        else:
            buffer, marks = io.BytesIO(), [SERIALISED]
            torch.save(data.detach().cpu(), buffer)
            target.write(torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8))
        length = target.size - offset
        place = _StorageInfo(self._name, offset, length, transform_descriptors=marks)
        return WriteResult(index=item.index, size_in_bytes=length, storage_data=place)


class _HashedFile:
    """A file that is written from its beginning to its end."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.hasher, self.size = xxhash.xxh3_128(), 0

    def write(self, content: Tensor) -> None:
        view = content.cpu().numpy().data
        self.hasher.update(view)
        self._stream.write(view)
        self.size += view.nbytes


class Arena:
    """Memory for a file's content, reused by every save.

    It is written to the disk without the page cache where the file system allows this. Filling and writing out 1.6 GB of
    cache would take processor time that the training needs.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _PIECE)
        self.size = 0

    def start(self, capacity: int) -> None:
        """Discard the content, and reserve ``capacity`` bytes."""
        self.size = 0
        if capacity > len(self._memory):
            self._memory = mmap.mmap(-1, -(-capacity // _PIECE) * _PIECE)

    def write(self, content: Tensor) -> None:
        """Append a flat tensor of bytes from any device."""
        end = self.size + content.numel()
        if end > len(self._memory):
            raise ValueError(f"{end} bytes do not fit into a memory of {len(self._memory)}")
        if content.numel():
            torch.frombuffer(self._memory, dtype=torch.uint8)[self.size : end].copy_(content)
        self.size = end

    def to_file(self, file: Path) -> Written:
        """Write and sync the content."""
        hasher, view = xxhash.xxh3_128(), memoryview(self._memory)
        descriptor = _opened(file)
        try:
            for start in range(0, self.size, _PIECE):
                hasher.update(view[start : min(start + _PIECE, self.size)])
                # Direct writing needs whole pages; the surplus at the end is truncated below.
                end = min(start + _PIECE, -(-self.size // mmap.PAGESIZE) * mmap.PAGESIZE)
                while start < end:
                    start += _write(descriptor, view[start:end])
            os.ftruncate(descriptor, self.size)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        return Written(self.size, hasher.hexdigest())


def _write(descriptor: int, content: memoryview) -> int:
    """Write as much as fits. Where the disk or a limit ends, direct writing hides the cause, so write plainly."""
    try:
        return os.write(descriptor, content)
    except OSError as error:
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        direct = getattr(os, "O_DIRECT", 0)
        if error.errno != errno.EINVAL or not flags & direct:
            raise
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~direct)
        return os.write(descriptor, content)


def _opened(file: Path) -> int:
    """Open a new file for direct writing, or plain writing where that is not supported (tmpfs, some network disks)."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(file, flags | getattr(os, "O_DIRECT", 0), 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(file, flags, 0o644)


def _bytes_of(plan: SavePlan) -> int:
    """An upper bound of the bytes of a plan: its tensors, and small values such as settings of an optimizer."""
    total = 0
    for item in plan.items:
        data = item.tensor_data
        total += (
            _ROOM_OF_A_SETTING if data is None else data.chunk.sizes.numel() * data.properties.dtype.itemsize
        )
    return total


def _elements(tensor: Tensor) -> Tensor:
    """The elements of a tensor as bytes, without a copy if the tensor is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
