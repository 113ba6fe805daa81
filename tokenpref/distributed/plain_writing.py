"""Distributed checkpoints as bare elements of tensors, hashed as they are written.

PyTorch's own writer makes an archive of every tensor, in Python, under the interpreter's lock: more work than the writing,
which a save in the background would take from the training. The hash is a fast one (xxh3): it tells harm, not forgery, which
no checksum beside the data could.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
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

__all__ = ["PlainWriter", "Written"]

SERIALISED = "torch.save"
"""Marks a tensor that is not bare elements, such as quantised optimizer state."""


@dataclass(frozen=True)
class Written:
    """What was written to a file.

    Args:
        size: bytes.
        checksum: of them, xxh3_128 in hexadecimal.
    """

    size: int
    checksum: str


class PlainWriter(dcp.FileSystemWriter):
    """Writes the shards of this process into one file.

    Args:
        path: an empty folder.

    Attributes:
        written: what was written, by file name; the index, which comes last and is small, is not among it.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.written: dict[str, Written] = {}

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write what the plan lists, and sync it to the disk."""
        name = f"{plan.storage_data.prefix}0.distcp"
        with (Path(self.path) / name).open("wb") as stream:
            file = _HashedFile(stream)
            results = [self._write(file, name, item, planner) for item in plan.items]
            stream.flush()
            os.fsync(stream.fileno())
        self.written[name] = Written(file.size, file.hasher.hexdigest())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    @staticmethod
    def _write(file: _HashedFile, name: str, item: WriteItem, planner: SavePlanner) -> WriteResult:
        data: Any = planner.resolve_data(item)
        marks = None
        if item.type is WriteItemType.BYTE_IO:
            content = data.getbuffer()
        elif type(data.detach()) is Tensor:
            content = _elements(data.detach())
        else:
            buffer, marks = io.BytesIO(), [SERIALISED]
            torch.save(data.detach().cpu(), buffer)
            content = buffer.getbuffer()
        offset = file.size
        file.write(content)
        place = _StorageInfo(name, offset, file.size - offset, transform_descriptors=marks)
        return WriteResult(index=item.index, size_in_bytes=file.size - offset, storage_data=place)


class _HashedFile:
    """A file that is written from its beginning to its end."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.hasher, self.size = xxhash.xxh3_128(), 0

    def write(self, content: memoryview) -> None:
        self.hasher.update(content)
        self._stream.write(content)
        self.size += content.nbytes


def _elements(tensor: Tensor) -> memoryview:
    """A tensor's elements as bytes, not copied if they lie on the CPU in their order."""
    flat = tensor.cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
