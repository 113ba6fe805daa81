"""Text, plain data and locks on disk."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from tokenpref.errors import ConfigError, TokenprefError

__all__ = [
    "WEIGHT_SUFFIXES",
    "follow_umask",
    "move_aside",
    "read_text",
    "sampled_digest",
    "sync",
    "try_lock",
    "weight_files",
    "write_fault",
    "write_json",
    "writing",
]


def read_text(file: Path, fault: type[Exception]) -> str:
    """The text of a UTF-8 file.

    Raises:
        Exception: of the given class, if the file is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise fault(
            f"{file} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error


# The remedy for a failed write, by its cause.
_MENDS = {
    errno.ENOSPC: "make room on that disk, or set output_dir to another one",
    errno.EDQUOT: "make room within your quota, or set output_dir to another disk",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f), or set output_dir to another disk",
    errno.EACCES: "set output_dir to a folder that you may write to",
    errno.EPERM: "set output_dir to a folder that you may write to",
    errno.EROFS: "set output_dir to a disk that can be written to",
    errno.EIO: "check that disk, or set output_dir to another one",
}
# torch.save hides the cause of a failed write.
_OF_TORCH_SAVE = ("PytorchStreamWriter", "inline_container", "basic_ios")


def write_fault(error: BaseException) -> str | None:
    """The cause and the remedy, if an error or its cause is a failed write of the operating system.

    Args:
        error: an ``OSError``, or an error that safetensors or ``torch.save`` raise because of one.

    Returns:
        A text such as "No space left on device; make room on that disk, ..."; None for any other error.
    """
    seen: BaseException | None = error
    while seen is not None:
        number = _errno_of(seen)
        if number is not None:
            mend = _MENDS.get(number)
            return os.strerror(number) + (f"; {mend}" if mend else "")
        seen = seen.__cause__ or seen.__context__
    if isinstance(error, OSError):
        return str(error)
    if isinstance(error, RuntimeError) and any(word in str(error) for word in _OF_TORCH_SAVE):
        first = str(error).splitlines()[0]
        return f"{first}; make room on that disk, or set output_dir to another one"
    return None


def _errno_of(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    code = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, SafetensorError) else None
    return int(code[1]) if code else None


def move_aside(path: Path) -> Path:
    """Rename a file or folder to the first free of ``NAME.former1``, ``NAME.former2``, ...; a file keeps its suffix.

    Returns:
        The new path.
    """
    stem, suffix = (path.stem, path.suffix) if path.is_file() else (path.name, "")
    names = (path.with_name(f"{stem}.former{number}{suffix}") for number in count(1))
    aside = next(name for name in names if not name.exists())
    path.rename(aside)
    return aside


@contextmanager
def writing(what: Path | str) -> Iterator[None]:
    """Turn a failed write into an error that a user can fix.

    Args:
        what: the file or folder that is written, for the error.

    Raises:
        TokenprefError: if the operating system refuses to write; other errors are not changed.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        fault = write_fault(error)
        if fault is None:
            raise
        raise TokenprefError(f"{what} cannot be written: {fault}") from error


def write_json(file: Path, record: dict[str, Any]) -> None:
    """Write plain data atomically: the file has either its old or its new content."""
    temporary = file.with_suffix(".tmp")
    with writing(file):
        temporary.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(temporary, file)


WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
_SAMPLE = 65536


def weight_files(folder: Path, listed: Any = None) -> list[str]:
    """Names of a checkpoint's files: those listed, or, unless that is a list, all files of the folder that hold weights."""
    if isinstance(listed, list):  # torchtune also takes a pattern of names
        return [str(name) for name in listed]
    return sorted(file.name for file in folder.glob("*") if file.suffix in WEIGHT_SUFFIXES)


def sampled_digest(folder: Path, names: Sequence[str]) -> str:
    """A cheap fingerprint of large files: sha256 over their names and sizes, and over a part of their bytes.

    Raises:
        ConfigError: if a file is missing.
    """
    hasher = hashlib.sha256()
    for name in names:
        file = folder / name
        if not file.is_file():
            raise ConfigError(
                f"no file {file}: the weights are gone; build the pair anew, or restore the model"
            )
        with file.open("rb") as stream:
            size = file.stat().st_size
            hasher.update(f"{name}:{size};".encode())
            # The beginning (header), the middle and the end, because trained weights differ everywhere.
            for at in (0, size // 2, max(size - _SAMPLE, 0)):
                stream.seek(at)
                hasher.update(stream.read(_SAMPLE))
    return hasher.hexdigest()


def follow_umask(file: Path) -> None:
    """Give a file the usual mode of new files. Some libraries write files that only their owner may read."""
    probe = file.with_name(f".{file.name}.mode")
    probe.touch(mode=0o666)
    try:
        file.chmod(stat.S_IMODE(probe.stat().st_mode))
    finally:
        probe.unlink()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are written to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def try_lock(file: Path, *, create: bool = True) -> int | None:
    """Lock a file until its descriptor is closed. The kernel closes it when the process dies.

    Args:
        file: the lock file.
        create: create the file if it does not exist.

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
