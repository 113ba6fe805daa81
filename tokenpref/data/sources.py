"""Where rows come from: local files and folders, data inside the package, and the Hugging Face hub."""

from __future__ import annotations

import bz2
import codecs
import gzip
import hashlib
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from datasets.exceptions import DatasetsError
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from tokenpref._paths import PACKAGE_SCHEME, resolve_path
from tokenpref.errors import DataError

__all__ = ["Rows", "load_rows"]

_FORMAT_OF_SUFFIX = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
}
_BUILDERS = {"json", "jsonl", "parquet", "arrow", "csv"}
_ARROW_LEVELS = 32  # of the 64 that Arrow allows
_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")
# What `save_to_disk` and Hugging Face folders hold beside the data.
_NOT_DATA = {"dataset_info.json", "state.json", "dataset_dict.json", "dataset_infos.json", "metadata.json"}


@dataclass(frozen=True)
class Rows:
    """A table and where it came from.

    Attributes:
        table: the rows, to be read by index or one after another. Columns of JSON files with values of several types are
            decoded then, and what reads the Arrow data below (``to_list``) gets them as JSON.
        name: the source as a person would name it.
        files: local files in the order of the rows; empty for the hub and for folders of ``save_to_disk``.
    """

    table: datasets.Dataset
    name: str
    files: tuple[Path, ...] = ()

    def locate(self, row: int) -> str:
        """File and place of a row, for messages: ``train.jsonl, row 3 (line 4)``; rows count from 0, lines from 1.

        Among several files the row is counted within its file for JSON Lines, and over all of them otherwise.
        """
        left = row
        for file in self.files:
            lines = _row_lines(file)
            if lines is None:
                break
            if left < len(lines):
                return f"{file}, row {left} (line {lines[left]})"
            left -= len(lines)
        return f"{self.name}, row {row}"


def load_rows(
    source: str,
    *,
    data_files: str | Sequence[str] | Mapping[str, str | Sequence[str]] | None = None,
    name: str | None = None,
    split: str = "train",
) -> Rows:
    """Rows of a source.

    Args:
        source: a file (.jsonl, .json, .parquet, .arrow, .csv), a folder of such files or one written by
            ``save_to_disk``, a ``package://`` path, a file format (json, parquet, arrow, csv) with ``data_files``, or
            the name of a data set on the hub.
        data_files: one or several paths or glob patterns, or a mapping from split to those. For a data set on the hub,
            files in its repository.
        name: configuration of a data set on the hub.
        split: split of a hub data set (slices such as ``train[:100]`` too) or of a folder, whose files then begin
            with the split's name. One file is one split, so for files the name is not looked at.

    Raises:
        DataError: if the source is missing, cannot be read, has no rows, or cannot be reached.
    """
    if source in _BUILDERS and (data_files is not None or not resolve_path(source).exists()):
        if data_files is None:
            raise DataError(f"source: {source} names a file format; say which files with data_files")
        chosen = _of_split(data_files, split)
        return _load_files(_expand(chosen), "json" if source == "jsonl" else source)
    if _is_local(source):
        path = resolve_path(source)
        if data_files is not None:
            raise DataError(
                f"source {source!r} is a path already; data_files goes with source: json, parquet, arrow or csv"
            )
        if path.is_file():
            return _load_files([path], None)
        if path.is_dir():
            return _load_folder(path, split)
        raise DataError(f"no file or folder {path} (source: {source})")
    return _load_hub(source, data_files, name, split)


def _is_local(source: str) -> bool:
    if source.startswith((PACKAGE_SCHEME, "/", "./", "../", "~")):
        return True
    return (
        resolve_path(source).exists()
        or Path(source).suffix in _FORMAT_OF_SUFFIX
        or not _HUB_NAME.fullmatch(source)
    )


def _of_split(data_files: str | Sequence[str] | Mapping, split: str) -> list[str]:
    if isinstance(data_files, Mapping):
        if split not in data_files:
            raise DataError(f"data_files has no split {split!r}; it has {', '.join(map(repr, data_files))}")
        data_files = data_files[split]
    return [data_files] if isinstance(data_files, str) else list(data_files)


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


def _load_folder(folder: Path, split: str) -> Rows:
    if (folder / "dataset_dict.json").is_file():
        splits = json.loads((folder / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        if split not in splits:
            raise DataError(f"{folder} has no split {split!r}; it has {', '.join(map(repr, splits))}")
        return _load_folder(folder / split, split)
    if (folder / "state.json").is_file():
        return _checked(Rows(datasets.load_from_disk(str(folder)), str(folder)))
    found = sorted(p for p in folder.rglob("*") if p.suffix in _FORMAT_OF_SUFFIX and p.name not in _NOT_DATA)
    if not found:
        raise DataError(f"{folder} holds no data file ({', '.join(_FORMAT_OF_SUFFIX)})")
    of_split = [p for p in found if _split_name(p, folder) == split]
    if not of_split:
        names = ", ".join(sorted({str(p.relative_to(folder)) for p in found})[:10])
        raise DataError(
            f"{folder} has no file for split {split!r}; it holds {names}. Set split, or name a file as source"
        )
    return _load_files(of_split, None)


def _split_name(file: Path, folder: Path) -> str:
    """``train.jsonl``, ``train-00000-of-00002.parquet`` and ``train/part.parquet`` are of the split train."""
    parts = file.relative_to(folder).parts
    return parts[0] if len(parts) > 1 and parts[0] != "data" else re.split(r"[-.]", file.name)[0]


def _load_files(files: list[Path], builder: str | None) -> Rows:
    formats = {builder or _FORMAT_OF_SUFFIX.get(file.suffix) for file in files}
    if None in formats:
        unknown = next(file for file in files if file.suffix not in _FORMAT_OF_SUFFIX)
        raise DataError(
            f"{unknown}: the suffix says no format; set source: json (or parquet, arrow, csv) and data_files"
        )
    if len(formats) > 1:
        raise DataError(f"files of several formats in one data set: {', '.join(str(f) for f in files)}")
    kind = formats.pop()
    for file in files:
        if file.stat().st_size == 0 or (kind == "json" and not file.read_bytes().strip()):
            raise DataError(f"{file} is empty; it needs at least one row")
    name = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    content = hashlib.sha256()
    for file in files:
        content.update(hashlib.sha256(file.read_bytes()).digest())
    if kind == "json":
        return _checked(Rows(_json_table(files, content.hexdigest()), name, tuple(files)))
    # datasets keeps what it read in a cache that looks at names and times. With the content's hash as the name of the
    # configuration a changed file is never mistaken for its former self, whatever its time stamp says.
    try:
        table = datasets.load_dataset(
            kind, f"content-{content.hexdigest()[:24]}", data_files=[str(f) for f in files], split="train"
        )
    except (DatasetsError, StopIteration, ValueError, TypeError, KeyError) as error:
        raise DataError(_why_unreadable(files, kind, error)) from error
    return _checked(Rows(table, name, tuple(files)))


def _why_unreadable(files: Sequence[Path], kind: str | None, error: BaseException) -> str:
    cause = error.__cause__ or error
    if "corresponds to no data" in str(cause):  # what datasets says of well-formed files without rows
        return f"{', '.join(str(f) for f in files)}: no rows; a data set needs at least one"
    return f"{', '.join(str(f) for f in files)} cannot be read as {kind}: {type(cause).__name__}: {cause}"


def _json_table(files: Sequence[Path], fingerprint: str) -> datasets.Dataset:
    """Rows of JSON files with every value as it is written.

    Not by datasets' own reader: it guesses types, block by block, and in a block that does not fit the guess it turns
    numbers into text, text into numbers or dates, or puts quotes around every text; a row ``null`` ends the process.
    A column whose values Arrow would change (several types, messages with different keys) is kept as JSON here, and
    decoded when a row is asked for.
    """
    columns: dict[str, list[Any]] = {}
    count = 0
    for file in files:
        for place, row in _json_rows(file):
            for column in row:
                if column not in columns:
                    _check_name(column, place)
                    columns[column] = [None] * count
            for column, values in columns.items():
                values.append(row.get(column))
            count += 1
    if count and not columns:
        raise DataError(f"{files[0]}: its rows have no columns; they need at least chosen and rejected")
    arrays = {column: _unchanged(values) for column, values in columns.items()}
    encoded = [column for column, array in arrays.items() if array is None]
    for column in encoded:
        texts = [None if value is None else json.dumps(value) for value in columns[column]]
        arrays[column] = pyarrow.array(texts, pyarrow.string())
    table = datasets.Dataset(pyarrow.table(arrays), fingerprint=fingerprint[:16])
    return table.with_transform(partial(_decoded, encoded)) if encoded else table


def _check_name(column: str, place: str) -> None:
    if "\0" in column or column != column.encode("utf-8", "replace").decode("utf-8"):
        raise DataError(
            f"{place}: the column name {column!r} holds a NUL or half of a surrogate pair; rename the column"
        )


def _decoded(encoded: Sequence[str], rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    return {
        column: [None if v is None else json.loads(v) for v in values] if column in encoded else values
        for column, values in rows.items()
    }


def _unchanged(values: list[Any]) -> pyarrow.Array | None:
    """The values in Arrow's own types, if they come back from there as they are."""
    try:
        array = pyarrow.array(values)
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError):
        return None
    kind = str(array.type)
    # Among floating-point numbers Arrow takes true for 1.0, and so does Python's comparison.
    changed = array.to_pylist() != values or ("double" in kind and _holds_bool(values))
    # datasets hands types on by way of C, where a name ends at a NUL and the levels of a type are counted.
    return None if changed or "\0" in kind or kind.count("<") > _ARROW_LEVELS else array


def _holds_bool(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else value
    kinds = set(map(type, inner))
    if not kinds & {dict, list}:  # as in most lists of numbers, which are long
        return bool in kinds
    return bool in kinds or any(_holds_bool(v) for v in inner if isinstance(v, (dict, list)))


def _json_rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of JSON Lines, or of a list of objects, and where each stands.

    Raises:
        DataError: for the first row that is not an object, naming its line.
    """
    content = _uncompressed(file)
    if content.lstrip()[:1] == b"[":
        found = _parsed(content, str(file))
        places = [f"{file}, row {row}" for row in range(len(found))]
        values: Iterator[Any] = iter(found)
    else:
        lines = content.split(b"\n")
        numbers = _line_numbers(lines)
        places = [f"{file}, row {row} (line {number})" for row, number in enumerate(numbers)]
        values = (_parsed(lines[number - 1], place) for number, place in zip(numbers, places, strict=True))
    for place, value in zip(places, values, strict=True):
        if not isinstance(value, dict):
            raise DataError(f"{place} is a JSON {type(value).__name__}, not an object with columns")
        yield place, value


def _uncompressed(file: Path) -> bytes:
    try:
        with _OPENERS.get(file.suffix, open)(file, "rb") as stream:
            return stream.read().removeprefix(codecs.BOM_UTF8)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _parsed(text: bytes, place: str) -> Any:
    try:
        return _DECODER.decode(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not valid JSON: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands there more than once")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _row_lines(file: Path) -> list[int] | None:
    """Line number of each row of a JSON Lines file; None for other files."""
    if _FORMAT_OF_SUFFIX.get(file.suffix) != "json":
        return None
    content = _uncompressed(file)
    if content.lstrip()[:1] == b"[":
        return None
    return _line_numbers(content.split(b"\n"))


def _line_numbers(lines: Sequence[bytes]) -> list[int]:
    return [number for number, line in enumerate(lines, start=1) if line.strip()]


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
    return _checked(Rows(table, f"{source} [{split}]"))


def _checked(rows: Rows) -> Rows:
    if rows.table.num_rows == 0:
        raise DataError(f"{rows.name} has no rows; it needs at least one")
    return rows
