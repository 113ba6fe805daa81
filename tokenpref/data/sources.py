"""Sources of rows: local files and folders, data inside the package, and the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from pyarrow import parquet

from tokenpref._paths import PACKAGE_SCHEME, resolve_path
from tokenpref._sealed import SHA256, digest_of
from tokenpref.data.cache import AUTO, DataCache, code_digest, find_cache
from tokenpref.data.readers import FORMAT_OF_SUFFIX, format_of, place_of, read_rows, stem_of
from tokenpref.data.splits import Split
from tokenpref.data.tables import open_table, write_table
from tokenpref.errors import ConfigError, DataError

__all__ = ["Rows", "load_rows"]

_BUILDERS = {"json", "jsonl", "parquet", "arrow", "csv"}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")
# Files in `save_to_disk` and Hugging Face folders that are not data.
_NOT_DATA = {"dataset_info.json", "state.json", "dataset_dict.json", "dataset_infos.json", "metadata.json"}
_TABLE_FILE = "rows.arrow"
# Files and folders in a folder of data. A home directory may hold millions, and searching them would take minutes.
_MOST_ENTRIES = 100_000


@dataclass(frozen=True)
class Rows:
    """A table and its origin.

    Attributes:
        table: the rows, to be read by index or one after another. Columns of JSON files with values of several types are
            decoded then, and what reads the Arrow data below (``to_list``) gets them as JSON.
        name: the source as a person would name it.
        files: local files in the order of the rows; empty for the hub and for folders of ``save_to_disk``.
        numbers: numbers of the rows in the source, counted from 0; a slice of a split leaves some out.
        content: sha256 or another fingerprint of the content of the whole source.
        kind: format of the files.
        counts: rows of every file; empty if the file of a row is unknown.
        whole: rows of the whole source if the table is a part of it, otherwise 0.
    """

    table: datasets.Dataset
    name: str
    files: tuple[Path, ...] = ()
    numbers: tuple[range, ...] = ()
    content: str = ""
    kind: str = ""
    counts: tuple[int, ...] = ()
    whole: int = 0
    _lines: dict[Path, list[int | None]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def size(self) -> int:
        """The number of rows of the whole source, including those outside a slice."""
        return self.whole if self.whole else int(self.table.num_rows)

    def number(self, position: int) -> int:
        """A row's number in the source. ``position`` is its number in the table."""
        left = position
        for part in self.numbers:
            if left < len(part):
                return part[left]
            left -= len(part)
        return position

    def locate(self, position: int) -> str:
        """The file and place of a row of the table, for messages: ``train.jsonl, row 3 (line 4)``.

        Rows count from 0, lines from 1. Among several files the row is counted within its file for JSON and CSV, and over
        all of them otherwise.
        """
        left = self.number(position)
        for file, count in zip(self.files, self.counts, strict=False):
            if left < count:
                return place_of(file, left, self._line(file, left))
            left -= count
        return f"{self.name}, row {self.number(position)}"

    def _line(self, file: Path, row: int) -> int | None:
        if file not in self._lines:
            self._lines[file] = [line for line, _ in read_rows(file, self.kind)]
        # The file may have changed since it was read; then the row's number must do.
        return self._lines[file][row] if row < len(self._lines[file]) else None

    def first(self, count: int) -> Rows:
        """The first rows of the table."""
        return self.at([range(min(count, self.table.num_rows))])

    def at(self, ranges: Sequence[range]) -> Rows:
        """The rows at some positions of the table."""
        if list(ranges) == [range(self.table.num_rows)]:
            return self
        table = self.table.select(ranges[0] if len(ranges) == 1 else [*chain(*ranges)])
        own = self.numbers or (range(self.table.num_rows),)
        numbers = tuple(chain(*(_within(part, own) for part in ranges)))
        return replace(self, table=table, numbers=numbers, whole=self.size)


def _within(positions: range, numbers: Sequence[range]) -> list[range]:
    """The values at some positions of several consecutive ranges."""
    found, start = [], 0
    for part in numbers:
        found.append(part[max(positions.start - start, 0) : max(positions.stop - start, 0)])
        start += len(part)
    return [part for part in found if part]


def load_rows(
    source: str,
    *,
    data_files: str | Sequence[str] | Mapping[str, str | Sequence[str]] | None = None,
    name: str | None = None,
    split: str = "train",
    cache_dir: str | Path | None = AUTO,
) -> Rows:
    """Load the rows of a source.

    Args:
        source: a file (.jsonl, .json, .parquet, .arrow, .csv; JSON and CSV also as .gz, .bz2, .xz or .zst), a folder of
            such files or one written by ``save_to_disk``, a ``package://`` path, a file format (json, parquet, arrow, csv)
            with ``data_files``, or the name of a data set on the hub.
        data_files: one or several paths or glob patterns, or a mapping from split to those. For a data set on the hub,
            files in its repository.
        name: configuration of a data set on the hub.
        split: split, or slice of one such as ``train[:90%]``, rounded as ``datasets`` does. In a folder it selects the files
            whose names begin with the split's name. A single file is one split, whatever its name is.
        cache_dir: where rows of JSON and CSV files are kept in Arrow's format: ``auto``, a folder, or None to keep them in
            memory; see :func:`tokenpref.data.preference_dataset`.

    Raises:
        ConfigError: if ``split`` or ``cache_dir`` is invalid.
        DataError: if the source is missing, cannot be read, has no rows, or cannot be reached.
    """
    wanted, cache = Split.parse(split), find_cache(cache_dir)
    if source in _BUILDERS and (data_files is not None or not resolve_path(source).exists()):
        if data_files is None:
            raise DataError(f"source: {source} names a file format; say which files with data_files")
        kind = "json" if source == "jsonl" else source
        if isinstance(data_files, Mapping):
            groups = {part: _expand(_of_split(data_files, part)) for part in wanted.names}
            return _load_groups(groups, kind, wanted, cache)
        return _load_one_split(_expand(_listed(data_files)), kind, wanted, cache)
    if _is_local(source):
        path = resolve_path(source)
        if data_files is not None:
            raise DataError(
                f"source {source!r} is a path already; data_files goes with source: json, parquet, arrow or csv"
            )
        if path.is_file():
            return _load_one_split([path], None, wanted, cache)
        if path.is_dir():
            return _load_folder(path, wanted, cache)
        raise DataError(f"no file or folder {path} (source: {source})")
    return _load_hub(source, data_files, name, split)


def _is_local(source: str) -> bool:
    if source.startswith((PACKAGE_SCHEME, "/", "./", "../", "~")):
        return True
    return (
        resolve_path(source).exists()
        or format_of(Path(source)) is not None
        or not _HUB_NAME.fullmatch(source)
    )


def _of_split(data_files: Mapping[str, str | Sequence[str]], split: str) -> list[str]:
    if split not in data_files:
        raise DataError(f"data_files has no split {split!r}; it has {', '.join(map(repr, data_files))}")
    return _listed(data_files[split])


def _listed(data_files: object) -> list[str]:
    files = [data_files] if isinstance(data_files, str) else data_files
    if not isinstance(files, Sequence) or not all(isinstance(file, str) for file in files):
        raise ConfigError(
            f"data_files must be a path, a list of paths, or a mapping from split to those, got {data_files!r}"
        )
    return list(files)


def _expand(patterns: Sequence[str]) -> list[Path]:
    files: list[Path] = []
    for pattern in patterns:
        path = resolve_path(pattern)
        if path.is_file():
            files.append(path)
            continue
        root = Path(path.anchor)
        found = (
            sorted(p for p in root.glob(str(path.relative_to(root))) if p.is_file())
            if _is_glob(pattern)
            else []
        )
        if not found:
            raise DataError(
                f"no file {path}" + (" matches this pattern" if _is_glob(pattern) else "") + " (data_files)"
            )
        files += found
    if not files:
        raise DataError("data_files is empty; name at least one file")
    return files


def _is_glob(pattern: str) -> bool:
    return any(char in pattern for char in "*?[")


def _load_folder(folder: Path, split: Split, cache: DataCache | None) -> Rows:
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        for name in split.names:
            if name not in splits:
                raise DataError(f"{folder} has no split {name!r}; it has {', '.join(map(repr, splits))}")
        return _load_saved([folder / name for name in split.names], folder, split)
    if (folder / "state.json").is_file():
        return _load_saved([folder], folder, _one_name(split, folder))
    found = _data_files(folder)
    if not found:
        raise DataError(f"{folder} holds no data file ({', '.join(FORMAT_OF_SUFFIX)})")
    return _load_groups({name: _files_of(name, found, folder) for name in split.names}, None, split, cache)


def _data_files(folder: Path) -> list[Path]:
    """The data files in a folder and the folders below it, sorted.

    Raises:
        DataError: if the folder holds too many files to be a folder of data.
    """
    found: list[Path] = []
    seen = 0
    for parent, _, names in os.walk(folder):
        seen += 1 + len(names)
        if seen > _MOST_ENTRIES:
            raise DataError(
                f"{folder} holds more than {_MOST_ENTRIES:,} files and folders, so it is not searched for data; set source to "
                "the folder or the file that holds the data"
            )
        files = (Path(parent, name) for name in names if name not in _NOT_DATA)
        found += [file for file in files if format_of(file) is not None]
    return sorted(found)


def _files_of(split: str, found: Sequence[Path], folder: Path) -> list[Path]:
    files = [path for path in found if _split_name(path, folder) == split]
    if not files:
        names = ", ".join(sorted({str(p.relative_to(folder)) for p in found})[:10])
        raise DataError(
            f"{folder} has no file for split {split!r}; it holds {names}. Set split, or name a file as source"
        )
    by_stem: dict[Path, Path] = {}
    for path in files:
        other = by_stem.setdefault(path.with_name(stem_of(path)), path)
        if other != path:
            raise DataError(
                f"{other} and {path.name} are two forms of one file; remove one, or name a file as source"
            )
    return files


def _split_name(file: Path, folder: Path) -> str:
    """``train.jsonl``, ``train-00000-of-00002.parquet`` and ``train/part.parquet`` belong to the split train."""
    parts = file.relative_to(folder).parts
    return parts[0] if len(parts) > 1 and parts[0] != "data" else re.split(r"[-.]", file.name)[0]


def _load_saved(folders: Sequence[Path], source: Path, split: Split) -> Rows:
    """The folders of ``save_to_disk``, one for each requested split."""
    tables = [datasets.load_from_disk(str(folder)) for folder in folders]
    table = tables[0] if len(tables) == 1 else datasets.concatenate_datasets(tables)
    sizes = {name: part.num_rows for name, part in zip(split.names, tables, strict=True)}
    files = [path for folder in folders for path in sorted(folder.glob("*")) if path.is_file()]
    name = str(folders[0] if len(folders) == 1 else source)
    rows = _checked(Rows(table, name, content=_content_of(files)))
    return rows.at(split.ranges(sizes, name))


def _one_name(split: Split, source: Path) -> Split:
    if len(split.names) > 1:
        raise DataError(
            f"split: {split.text!r} names {len(split.names)} splits, and {source} is one; slice one, such as train[:90%]"
        )
    return split


def _load_one_split(files: list[Path], builder: str | None, split: Split, cache: DataCache | None) -> Rows:
    """Files that form one split, independent of its name."""
    split = _one_name(split, files[0])
    return _load_groups({split.names[0]: files}, builder, split, cache)


def _load_groups(
    groups: Mapping[str, list[Path]], builder: str | None, split: Split, cache: DataCache | None
) -> Rows:
    """The files of every requested split."""
    rows = _load_files([*chain(*groups.values())], builder, cache)
    if split.is_whole:
        return rows
    if len(groups) == 1:
        sizes = {split.names[0]: rows.table.num_rows}
    else:
        counts = dict(zip(rows.files, rows.counts or map(_count_rows, rows.files), strict=True))
        sizes = {name: sum(counts[file] for file in files) for name, files in groups.items()}
    return rows.at(split.ranges(sizes, rows.name))


def _count_rows(file: Path) -> int:
    if file.suffix == ".parquet":
        return int(parquet.read_metadata(file).num_rows)
    with pyarrow.memory_map(str(file)) as content:
        try:
            return int(pyarrow.ipc.open_stream(content).read_all().num_rows)
        except pyarrow.ArrowInvalid:  # the other of Arrow's two file formats
            return int(pyarrow.ipc.open_file(content).read_all().num_rows)


def _load_files(files: list[Path], builder: str | None, cache: DataCache | None) -> Rows:
    formats = {builder or format_of(file) for file in files}
    if None in formats:
        unknown = next(file for file in files if format_of(file) is None)
        raise DataError(
            f"{unknown}: the suffix says no format; set source: json (or parquet, arrow, csv) and data_files"
        )
    if len(formats) > 1:
        raise DataError(f"files of several formats in one data set: {', '.join(str(f) for f in files)}")
    kind = str(formats.pop())
    for file in files:
        if file.stat().st_size == 0:
            raise DataError(f"{file} is empty; it needs at least one row")
    name = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    content = _content_of(files)
    if kind in ("json", "csv"):
        table, counts = _own_table(files, kind, content, name, cache)
        return _checked(Rows(table, name, tuple(files), content=content, kind=kind, counts=counts))
    # datasets keeps what it read in a cache that compares names and times. With the content's hash as the name of the
    # configuration, a changed file is always read again, even with its old time stamp.
    try:
        table = datasets.load_dataset(
            kind, f"content-{content[:24]}", data_files=[str(f) for f in files], split="train"
        )
    except (DatasetsError, StopIteration, ValueError, TypeError, KeyError) as error:
        raise DataError(_why_unreadable(files, kind, error)) from error
    return _checked(Rows(table, name, tuple(files), content=content, kind=kind))


def _content_of(files: Sequence[Path]) -> str:
    """sha256 (hex) of the contents of files, in order."""
    content = hashlib.sha256()
    for file in files:
        try:
            content.update(bytes.fromhex(digest_of(file, SHA256)))
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error}") from error
    return content.hexdigest()


def _own_table(
    files: Sequence[Path], kind: str, content: str, name: str, cache: DataCache | None
) -> tuple[datasets.Dataset, tuple[int, ...]]:
    """The rows of JSON or CSV files and the number of rows of each file, from the cache if there is one."""

    def written(open_sink: Any) -> dict[str, Any]:
        about = write_table(files, kind, open_sink)
        for file, count in zip(files, about["counts"], strict=True):
            if count == 0:
                raise DataError(f"{file} is empty; it needs at least one row")
        return about

    if cache is None:
        sinks: list[Any] = []

        def in_memory() -> Any:
            sinks.append(pyarrow.BufferOutputStream())
            return sinks[-1]

        about = written(in_memory)
        source = pyarrow.BufferReader(sinks[-1].getvalue())
    else:
        # The suffixes give the compression, so the same bytes under another name may be other rows.
        suffixes = [file.suffix for file in files]
        described = json.dumps(
            [content, kind, suffixes, code_digest("readers", "tables"), pyarrow.__version__]
        )
        key = hashlib.sha256(described.encode()).hexdigest()[:32]
        folder, about = cache.entry(
            f"rows-{key}",
            lambda partial: written(lambda: pyarrow.OSFile(str(partial / _TABLE_FILE), "wb")),
            f"the table of {name}",
        )
        source = pyarrow.memory_map(str(folder / _TABLE_FILE))
    return open_table(source, about, content), tuple(about["counts"])


def _why_unreadable(files: Sequence[Path], kind: str | None, error: BaseException) -> str:
    cause = error.__cause__ or error
    if "corresponds to no data" in str(cause):  # the message of datasets for well-formed files without rows
        return f"{', '.join(str(f) for f in files)}: no rows; a data set needs at least one"
    return f"{', '.join(str(f) for f in files)} cannot be read as {kind}: {type(cause).__name__}: {cause}"


def _load_hub(source: str, data_files: object, name: str | None, split: str) -> Rows:
    try:
        table = datasets.load_dataset(source, name, data_files=data_files, split=split)
    except (ConnectionError, OfflineModeIsEnabled, HfHubHTTPError) as error:
        raise DataError(
            f"source {source!r} is no local path, and the hub cannot be reached for a data set of that name ({error}). "
            "Check the path; without a network, download the data set first and name its folder or files"
        ) from error
    except (DatasetsError, FileNotFoundError, ValueError) as error:
        raise DataError(
            f"source {source!r} is no local path, and not readable from the hub: {error}"
        ) from error
    fingerprint = hashlib.sha256(str(table._fingerprint).encode()).hexdigest()
    return _checked(Rows(table, f"{source} [{split}]", content=fingerprint))


def _checked(rows: Rows) -> Rows:
    if rows.table.num_rows == 0:
        raise DataError(f"{rows.name} has no rows; it needs at least one")
    return rows
