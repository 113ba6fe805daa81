"""Sealed folders: the size and checksum of every file are recorded, and compared before the files are used.

Checkpoints, exported weights, weight stores, caches of the reference and caches of tokenised data are sealed folders. The record
is written last, when every file is on the disk, so a folder without it is unfinished. Checksums detect damage, but not forgery.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from tokenpref._files import sync, write_json
from tokenpref.errors import ConfigError, DataError

__all__ = [
    "MANIFEST",
    "SHA256",
    "Written",
    "check_if_sealed",
    "digest_of",
    "fault_of",
    "read_files",
    "read_record",
    "seal",
    "write_file",
    "write_record",
]

MANIFEST = "manifest.json"
XXH3, SHA256 = "xxh3_128", "sha256"
_HASHERS: dict[str, Callable[..., Any]] = {
    XXH3: xxhash.xxh3_128,
    SHA256: hashlib.sha256,
    "xxh3": xxhash.xxh3_128,  # the name that caches of tokenised data used before
}
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Written:
    """The size and checksum that a file had when it was written.

    Args:
        size: bytes.
        checksum: of the bytes, in hexadecimal.
        algorithm: of the checksum, ``xxh3_128`` or ``sha256``.
    """

    size: int
    checksum: str
    algorithm: str = XXH3

    @classmethod
    def of(cls, content: bytes, algorithm: str = XXH3) -> Written:
        """Size and checksum of a file's content."""
        return cls(len(content), _HASHERS[algorithm](content).hexdigest(), algorithm)

    @classmethod
    def read(cls, entry: Any) -> Written:
        """Read an entry of a record.

        Raises:
            ValueError: if it is not one.
        """
        found: Mapping[str, Any] = entry if isinstance(entry, dict) else {}
        algorithm = next((name for name in _HASHERS if isinstance(found.get(name), str)), None)
        if type(found.get("bytes")) is not int or algorithm is None:
            raise ValueError(f"{entry!r} is not a size and a checksum")
        return cls(found["bytes"], found[algorithm], algorithm)

    @property
    def entry(self) -> dict[str, Any]:
        """The entry of a record."""
        return {"bytes": self.size, self.algorithm: self.checksum}

    def fault_of(self, file: Path, *, compare_bytes: bool = True) -> str | None:
        """How a file differs from what was written, such as "is missing"; None if it does not.

        Args:
            file: the file.
            compare_bytes: whether its checksum is compared too.
        """
        if not file.is_file():
            return "is missing"
        try:
            size = file.stat().st_size
            if size != self.size:
                return f"has {size} bytes and was written with {self.size}"
            if compare_bytes and digest_of(file, self.algorithm) != self.checksum:
                return "is not what was written (its checksum differs)"
        except OSError as error:
            return f"cannot be read ({error})"
        return None


def digest_of(file: Path, algorithm: str = XXH3) -> str:
    """The checksum of a file's bytes, in hexadecimal."""
    hasher = _HASHERS[algorithm]()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            hasher.update(block)
    return str(hasher.hexdigest())


def write_file(file: Path, content: bytes) -> None:
    """Write a file that gets its name only when all of it is on the disk."""
    partial = file.with_suffix(".partial")
    with partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)
    sync(file.parent)


def write_record(file: Path, record: dict[str, Any]) -> None:
    """Write a folder's record, and wait until it is on the disk.

    Raises:
        TokenprefError: if the operating system refuses to write.
    """
    write_json(file, record)
    sync(file)
    sync(file.parent)


def read_record(file: Path, mend: str | None = None) -> dict[str, Any]:
    """Read a folder's record.

    Args:
        file: the record.
        mend: what the user can do if it is damaged.

    Raises:
        DataError: if it is damaged.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"expected a mapping, found a {type(found).__name__}")
    except (ValueError, OSError, RecursionError) as error:
        raise _unreadable(file, error, mend) from error
    return found


def read_files(file: Path, mend: str | None = None) -> dict[str, Written]:
    """Read the files that a folder's record names; see :func:`read_record`."""
    found = read_record(file, mend).get("files")
    try:
        if not isinstance(found, dict):
            raise ValueError(f"files is a {type(found).__name__}, expected a mapping of names to sizes")
        return {name: Written.read(entry) for name, entry in found.items()}
    except ValueError as error:
        raise _unreadable(file, error, mend) from error


def _unreadable(file: Path, error: Exception, mend: str | None) -> DataError:
    return DataError(f"{file} cannot be read ({error})" + (f"; {mend}" if mend else ""))


def seal(folder: Path, written: Mapping[str, Written] | None = None, **about: Any) -> None:
    """Write the manifest of a folder: its files, and how they are now. Everything is synced to the disk.

    Args:
        folder: a folder whose files are complete.
        written: files whose checksums were taken while they were written. They are not read again.
        about: further entries of the manifest, as plain data.
    """
    files = {}
    for name, file in _files(folder).items():
        sync(file)
        size = file.stat().st_size
        known = (written or {}).get(name)
        if known is not None and known.size != size:
            raise OSError(f"{file} has {size} bytes and {known.size} were written to it")
        files[name] = (known or Written(size, digest_of(file))).entry
    write_record(folder / MANIFEST, {"files": files, **about})


def fault_of(folder: Path, *, others: bool = False) -> str | None:
    """The reason why a folder must not be used; None if it has a manifest and every byte is as it was written.

    Args:
        folder: a folder that :func:`seal` may have sealed.
        others: whether it may hold further files, such as those that people add to exported weights.
    """
    if not (folder / MANIFEST).is_file():
        return f"it has no {MANIFEST}: it was never finished"
    try:
        files = read_files(folder / MANIFEST)
    except DataError as error:
        return str(error)
    present = _files(folder)
    for name, written in files.items():
        fault = written.fault_of(present[name]) if name in present else "is missing"
        if fault is not None:
            return f"{name} {fault}"
    surplus = [] if others else [name for name in present if name not in files]
    return f"{surplus[0]} does not belong to it" if surplus else None


def check_if_sealed(folder: Path, key: str) -> None:
    """Compare a folder of weights with its manifest. Folders from elsewhere, which have no manifest of ours, are not compared.

    Args:
        folder: the folder.
        key: what names it in the config, for errors.

    Raises:
        ConfigError: if a file is missing or not as it was written.
    """
    manifest = folder / MANIFEST
    content = manifest.read_bytes() if manifest.is_file() else b"{}"
    # Other programs write files of this name too, in formats of their own.
    ours = not content or XXH3.encode() in content
    if ours and (fault := fault_of(folder, others=True)):
        raise ConfigError(
            f"{key}: {folder} holds damaged weights: {fault}; restore the folder from a copy, or make it again. If you changed "
            f"that file yourself, remove {manifest}"
        )


def _files(folder: Path) -> dict[str, Path]:
    """The files of a folder by their path in it, without manifests."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != MANIFEST)
    return {file.relative_to(folder).as_posix(): file for file in files}
