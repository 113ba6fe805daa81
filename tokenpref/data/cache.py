"""Folders of files that are built once, checked, and opened by every later start and by all processes."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets

from tokenpref._files import try_lock
from tokenpref._sealed import MANIFEST, fault_of, read_record, seal
from tokenpref.errors import ConfigError, DataError

__all__ = ["AUTO", "CACHE_VARIABLE", "DataCache", "code_digest", "find_cache"]

log = logging.getLogger("tokenpref")

AUTO = "auto"
"""The ``cache_dir`` that takes the folder from the environment."""

CACHE_VARIABLE = "TOKENPREF_CACHE"
"""Environment variable that names the folder of the cache."""

_POLL_S = 0.1
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def find_cache(cache_dir: object) -> DataCache | None:
    """The cache for a data set's ``cache_dir``.

    Args:
        cache_dir: ``auto`` (the folder that ``TOKENPREF_CACHE`` names, or ``tokenpref`` in the cache of ``datasets``), a folder,
            or None for no cache.

    Raises:
        ConfigError: if it is none of these.
    """
    if cache_dir is None:
        return None
    if not isinstance(cache_dir, (str, Path)) or not str(cache_dir) or "\0" in str(cache_dir):
        raise ConfigError(f"cache_dir must be auto, a folder or null, got {cache_dir!r}")
    if cache_dir == AUTO:
        named = os.environ.get(CACHE_VARIABLE)
        cache_dir = named if named else Path(datasets.config.HF_DATASETS_CACHE) / "tokenpref"
    return DataCache(Path(cache_dir).expanduser().absolute())


def code_digest(*modules: str) -> str:
    """sha256 (hex) of the source code of modules of ``tokenpref.data``, because a change of the code may change the result."""
    digest = hashlib.sha256()
    for module in modules:
        digest.update(hashlib.sha256((Path(__file__).parent / f"{module}.py").read_bytes()).digest())
    return digest.hexdigest()


class DataCache:
    """A cache whose entries are addressed by their content.

    An entry gets its name only when it is complete, so a process that dies leaves no entry. One process builds an entry while
    the others wait. Where files cannot be locked, several processes may build it, and the first one to finish counts.

    Args:
        folder: the folder of the entries; it is created with the first entry.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def entry(
        self, name: str, build: Callable[[Path], Mapping[str, Any]], what: str
    ) -> tuple[Path, dict[str, Any]]:
        """Open an entry, and build it first if it is missing or damaged.

        Args:
            name: name of the entry, which must depend on everything that determines its content.
            build: writes the files into an empty folder and returns plain data about them.
            what: describes the entry in messages.

        Returns:
            The entry's folder, and what ``build`` returned.

        Raises:
            DataError: if the folder cannot be written.
        """
        final = self.folder / name
        found = _opened(final, what)
        if found is not None:
            return final, found
        with _failures_named(self.folder), self._locked(name, what) as alone:
            found = _opened(final, what)  # another process may have built it meanwhile
            if found is None:
                if alone:
                    self._remove_partial(name)  # left by processes that died
                self._build(final, build, what)
                found = _opened(final, what)
        if found is None:
            raise DataError(
                f"{final}: damaged right after it was written; check the disk, or set another cache_dir"
            )
        return final, found

    def _remove_partial(self, name: str) -> None:
        for left in self.folder.glob(f"{name}.*.partial"):
            shutil.rmtree(left)

    def _build(self, final: Path, build: Callable[[Path], Mapping[str, Any]], what: str) -> None:
        partial = final.with_name(f"{final.name}.{secrets.token_hex(4)}.partial")
        partial.mkdir()
        try:
            seal(partial, about=dict(build(partial)))
            _put(partial, final, what)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    @contextmanager
    def _locked(self, name: str, what: str) -> Iterator[bool]:
        """Hold the lock of an entry; False if the file system has no locks."""
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = self.folder / f"{name}.lock"
        try:
            descriptor = try_lock(lock)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            yield False
            return
        if descriptor is None:
            log.info(f"another process is building {what}; waiting for it")
        while descriptor is None:
            time.sleep(_POLL_S)
            descriptor = try_lock(lock)
        try:
            yield True
        finally:
            os.close(descriptor)


def _put(partial: Path, final: Path, what: str) -> None:
    """Give a complete entry its name, unless a process without a lock was faster."""
    if final.exists():
        if _opened(final, what) is not None:
            return
        shutil.rmtree(final)
    try:
        partial.rename(final)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise


@contextmanager
def _failures_named(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"the cache of tokenised data in {folder} cannot be written: {error}. Free space there, set the data set's "
            f"cache_dir or {CACHE_VARIABLE} to another folder, or set cache_dir: null for no cache"
        ) from error


def _opened(folder: Path, what: str) -> dict[str, Any] | None:
    """What is recorded about an entry; None, with a warning, if the entry is damaged."""
    if not folder.exists():
        return None
    fault = fault_of(folder, others=True)
    about = read_record(folder / MANIFEST).get("about") if fault is None else None
    if isinstance(about, dict):
        return about
    fault = fault or f"its {MANIFEST} says nothing about it"
    log.warning(f"{folder} is damaged: {fault}; {what} is built again")
    return None
