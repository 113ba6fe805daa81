"""Bytes on their way to the disk: the same in the file, in the checksum and in memory, whatever the file system."""

import errno
import os

import pytest
import torch
import xxhash

from tokenpref.distributed import plain_writing
from tokenpref.distributed.plain_writing import Arena


def bytes_of(count, seed=0):
    return torch.randint(256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sizes", [[], [1], [4096], [5000, 0, 3], [70_000, 1], [65_536, 65_536]])
def test_the_file_holds_what_was_put_in(tmp_path, monkeypatch, sizes):
    monkeypatch.setattr(plain_writing, "_PIECE", 65_536)
    arena = Arena()
    for round_ in range(2):  # the second one in the memory of the first
        contents = [bytes_of(size, seed=round_ * 10 + i) for i, size in enumerate(sizes)]
        arena.start(sum(sizes))
        for content in contents:
            arena.write(content)
        written = arena.to_file(tmp_path / "file")
        whole = b"".join(content.numpy().tobytes() for content in contents)
        assert (tmp_path / "file").read_bytes() == whole
        assert (written.size, written.checksum) == (len(whole), xxhash.xxh3_128(whole).hexdigest())


def test_a_file_system_without_direct_writing(tmp_path, monkeypatch):
    direct, opened = getattr(os, "O_DIRECT", 0), []
    open_ = os.open

    def refusing(path, flags, mode=0o777):
        opened.append(bool(flags & direct))
        if flags & direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return open_(path, flags, mode)

    monkeypatch.setattr(os, "open", refusing)
    arena = Arena()
    arena.start(10)
    arena.write(bytes_of(10))
    arena.to_file(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == bytes_of(10).numpy().tobytes()
    assert opened == ([True, False] if direct else [False])


def test_more_than_was_announced_is_an_error(monkeypatch):
    monkeypatch.setattr(plain_writing, "_PIECE", 4096)
    arena = Arena()
    arena.start(10)
    with pytest.raises(ValueError, match="4097 bytes do not fit into a memory of 4096"):
        arena.write(bytes_of(4097))
