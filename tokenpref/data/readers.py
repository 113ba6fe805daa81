"""Reads rows of JSON and CSV files, compressed or not, with unchanged values and the line of every row."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow

from tokenpref.errors import DataError

__all__ = ["COMPRESSIONS", "FORMAT_OF_SUFFIX", "format_of", "place_of", "read_rows", "stem_of"]

FORMAT_OF_SUFFIX = {
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
}
"""The formats by the suffix of a file."""


def _open_zstd(file: Path, _mode: str) -> Any:
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(file)), "zstd"), 1 << 20)


COMPRESSIONS: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}
"""The functions that open compressed files."""

_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab", "|": "bar"}

Row = tuple[int | None, dict[str, Any]]
"""The line on which a row begins (None within a JSON list), and its columns."""


def format_of(file: Path) -> str | None:
    """The format by a file's name: ``pairs.jsonl`` and ``pairs.jsonl.gz`` are JSON."""
    kind = FORMAT_OF_SUFFIX.get(file.suffix)
    if kind is None and file.suffix in COMPRESSIONS:
        kind = FORMAT_OF_SUFFIX.get(Path(file.stem).suffix)
        return kind if kind in ("json", "csv") else None
    return kind


def stem_of(file: Path) -> str:
    """A file's name without the suffixes of its compression."""
    return file.stem if file.suffix in COMPRESSIONS else file.name


def read_rows(file: Path, kind: str) -> Iterator[Row]:
    """The rows of a JSON or CSV file, one after another. Only a JSON list is read into memory as a whole.

    Args:
        file: its path; the suffix gives the compression.
        kind: ``json`` (JSON Lines, or a list of objects) or ``csv`` (every field is text).

    Raises:
        DataError: if the file cannot be read, or for the first invalid row, naming its line.
    """
    read = _json_rows if kind == "json" else _csv_rows
    try:
        with _opened(file) as stream:
            yield from read(stream, file)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed, without a byte order mark."""
    with COMPRESSIONS.get(file.suffix, open)(file, "rb") as stream:
        buffered = stream if hasattr(stream, "peek") else io.BufferedReader(stream)
        if buffered.peek(len(codecs.BOM_UTF8)).startswith(codecs.BOM_UTF8):
            buffered.read(len(codecs.BOM_UTF8))
        yield buffered


def _json_rows(stream: BinaryIO, file: Path) -> Iterator[Row]:
    row = 0
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        if row == 0 and line.lstrip()[:1] == b"[":
            yield from _listed_rows(line + stream.read(), file)
            return
        yield number, _object_of(_parsed(line, place_of(file, row, number)), place_of(file, row, number))
        row += 1


def _listed_rows(content: bytes, file: Path) -> Iterator[Row]:
    for row, value in enumerate(_parsed(content, str(file))):
        yield None, _object_of(value, place_of(file, row, None))


def place_of(file: Path, row: int, line: int | None) -> str:
    """The place of a row, for messages: ``train.jsonl, row 3 (line 4)``. Rows count from 0, lines from 1."""
    return f"{file}, row {row}" + (f" (line {line})" if line is not None else "")


def _object_of(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{place} is a JSON {type(value).__name__}, not an object with columns")
    return value


def _parsed(text: bytes, place: str) -> Any:
    try:
        return _DECODER.decode(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not valid JSON: {error}") from error


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} occurs more than once")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys)


def _csv_rows(stream: BinaryIO, file: Path) -> Iterator[Row]:
    """The rows of a CSV file. Not read by pandas, which converts None, N/A, 007 and True."""
    # newline="" keeps line ends inside quotes unchanged; the csv module knows all three kinds between rows.
    text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
    lines = _Lines(text, file)
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        return
    # A quoted name may contain a line break, but the first line still shows the delimiter.
    delimiter = _delimiter(first, file)
    lines.push_back(first)
    limit = csv.field_size_limit(sys.maxsize)
    try:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        yield from _csv_fields(reader, lines, delimiter, file)
    finally:
        csv.field_size_limit(limit)


class _Lines:
    """Counted lines of text. The first may be pushed back after it was read."""

    def __init__(self, text: io.TextIOWrapper, file: Path) -> None:
        self._text, self._file = text, file
        self._pushed: list[str] = []
        self.count = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if self._pushed:
            line = self._pushed.pop()
        else:
            try:
                line = next(self._text)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{self._file}, after line {self.count}: not UTF-8 text ({error.reason}); save the file as UTF-8"
                ) from error
        self.count += 1
        return line

    def push_back(self, line: str) -> None:
        self._pushed.append(line)
        self.count -= 1


def _delimiter(header: str, file: Path) -> str:
    counts = {delimiter: len(_fields(header, delimiter)) for delimiter in _DELIMITERS}
    several = [delimiter for delimiter, count in counts.items() if count > 1]
    if not several or several[0] == ",":
        return ","
    if len(several) > 1:
        raise DataError(
            f"{file}: the header may be separated by {' or '.join(_DELIMITERS[d] for d in several)}: "
            f"{header.strip()[:80]!r}; separate its columns by commas"
        )
    return several[0]


def _fields(header: str, delimiter: str) -> list[str]:
    return next(csv.reader([header], delimiter=delimiter), [])


def _csv_fields(reader: Any, lines: _Lines, delimiter: str, file: Path) -> Iterator[Row]:
    header: list[str] | None = None
    row, start = 0, lines.count + 1
    while True:
        place = place_of(file, row, start) if header is not None else f"{file}, header"
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{place} is not valid CSV: {error}; put quotes around the whole field"
            ) from error
        if fields is None:
            return
        if fields and header is None:
            header = _column_names(fields, file)
        elif fields:
            if len(fields) != len(header or ()):
                raise DataError(
                    f"{place} has {len(fields)} fields and the header {len(header or ())} (separated by "
                    f"{_DELIMITERS[delimiter]}); put quotes around fields that hold a {_DELIMITERS[delimiter]} or a line break"
                )
            yield start, dict(zip(header or (), fields, strict=True))
            row += 1
        start = lines.count + 1


def _column_names(fields: Sequence[str], file: Path) -> list[str]:
    # pandas writes its index under an empty name and reads it under this one.
    names = [name or f"Unnamed: {place}" for place, name in enumerate(fields)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{file}: two columns are called {twice!r}; rename one of them")
    return names
