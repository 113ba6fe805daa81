"""Text, plain data, checksums and locks on the disk."""

from __future__ import annotations

import fcntl
import json
import os
import stat
from pathlib import Path
from typing import Any

import xxhash

__all__ = ["digest_of", "follow_umask", "read_text", "sync", "try_lock", "write_json"]

_BLOCK = 1 << 20


def read_text(file: Path, fault: type[Exception]) -> str:
    """The text of a UTF-8 file.

    Raises:
        Exception: of the given kind, if it is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise fault(
            f"{file} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error


def write_json(file: Path, record: dict[str, Any]) -> None:
    """Write plain data in one piece: the old file or the new one, never half of it."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def digest_of(file: Path) -> str:
    """xxh3_128 of a file's bytes, in hexadecimal: it tells harm, not forgery."""
    hasher = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            hasher.update(block)
    return hasher.hexdigest()


def follow_umask(file: Path) -> None:
    """Give a file the mode of any new file in its folder; some libraries write files that their owner alone may read."""
    probe = file.with_name(f".{file.name}.mode")
    probe.touch(mode=0o666)
    try:
        file.chmod(stat.S_IMODE(probe.stat().st_mode))
    finally:
        probe.unlink()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def try_lock(file: Path, *, create: bool = True) -> int | None:
    """Lock a file until its descriptor is closed, which the kernel does for a process that dies.

    Args:
        file: the lock.
        create: make it if it is not there.

    Returns:
        The descriptor; None if another process holds the lock.
    """
    descriptor = os.open(file, os.O_RDWR | (os.O_CREAT if create else 0), 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
