"""Where rows come from: local files and folders, data inside the package, and the Hugging Face hub."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
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
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")
# What `save_to_disk` and Hugging Face folders hold beside the data.
_NOT_DATA = {"dataset_info.json", "state.json", "dataset_dict.json", "dataset_infos.json", "metadata.json"}


@dataclass(frozen=True)
class Rows:
    """A table and where it came from.

    Attributes:
        table: the rows.
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
    # datasets keeps what it read in a cache that looks at names and times. With the content's hash as the name of the
    # configuration a changed file is never mistaken for its former self, whatever its time stamp says.
    content = hashlib.sha256()
    for file in files:
        content.update(hashlib.sha256(file.read_bytes()).digest())
    try:
        table = datasets.load_dataset(
            kind, f"content-{content.hexdigest()[:24]}", data_files=[str(f) for f in files], split="train"
        )
    except (DatasetsError, StopIteration, ValueError, TypeError, KeyError) as error:
        raise DataError(_why_unreadable(files, kind, error)) from error
    name = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    return _checked(Rows(table, name, tuple(files)))


def _why_unreadable(files: Sequence[Path], kind: str | None, error: BaseException) -> str:
    """The first malformed line if there is one, else what the reader said."""
    if kind == "json":
        for file in files:
            fault = _first_bad_line(file)
            if fault is not None:
                return fault
    cause = error.__cause__ or error
    if "corresponds to no data" in str(cause):  # what datasets says of well-formed files without rows
        return f"{', '.join(str(f) for f in files)}: no rows; a data set needs at least one"
    return f"{', '.join(str(f) for f in files)} cannot be read as {kind}: {type(cause).__name__}: {cause}"


def _first_bad_line(file: Path) -> str | None:
    text = file.read_bytes()
    if text.lstrip()[:1] == b"[":
        try:
            json.loads(text)
        except ValueError as error:
            return f"{file} is not valid JSON: {error}"
        return None
    row = 0
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            return f"{file}, row {row} (line {number}) is not valid JSON: {error}"
        if not isinstance(value, dict):
            return f"{file}, row {row} (line {number}) is a JSON {type(value).__name__}, not an object with columns"
        row += 1
    return None


def _row_lines(file: Path) -> list[int] | None:
    """Line number of each row of a JSON Lines file; None for other files."""
    if _FORMAT_OF_SUFFIX.get(file.suffix) != "json":
        return None
    content = file.read_bytes()
    if content.lstrip()[:1] == b"[":
        return None
    return [number for number, line in enumerate(content.split(b"\n"), start=1) if line.strip()]


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
