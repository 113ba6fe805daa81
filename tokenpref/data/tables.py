"""Stores rows of JSON and CSV files as an Arrow table that returns every value unchanged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pyarrow

from tokenpref.data.readers import place_of, read_rows
from tokenpref.errors import DataError

__all__ = ["open_table", "write_table"]

_CHUNK_ROWS = 1000
_ARROW_LEVELS = 32  # Arrow allows 64

Values = dict[str, list[Any]]
"""A number of rows, column by column."""


def write_table(files: Sequence[Path], kind: str, open_sink: Callable[[], Any]) -> dict[str, Any]:
    """Write the rows of files as an Arrow IPC file, a thousand rows at a time.

    The readers of datasets are not used, because they guess types block by block. In a block that does not fit the guess, they
    turn numbers into text and text into numbers or dates, or put quotes around every text. Here, a column whose values Arrow
    would change (several types, messages with different keys) is stored as JSON and decoded when a row is read.

    Args:
        files: of one kind, in the order of the rows.
        kind: ``json`` or ``csv``.
        open_sink: returns an empty pyarrow stream. It is called again if later rows change the types of columns.

    Returns:
        Plain data for :func:`open_table`: the number of rows of every file, and the columns that are stored as JSON.

    Raises:
        DataError: if a file or row cannot be read, or no row has a column.
    """
    types: dict[str, pyarrow.DataType | None] = {}
    while True:
        counts = [0] * len(files)
        changed = False
        with _Sink(open_sink()) as sink:
            for number, count, chunk in _chunks(files, kind, types):
                arrays = {name: _unchanged(values) for name, values in chunk.items()}
                new = _learn(types, arrays)
                # The rest of this pass only collects types; the next pass knows all columns and writes.
                changed |= not chunk or (new and sink.begun)
                if not changed:
                    sink.write(_batch(types, chunk, arrays))
                counts[number] += count
        if any(counts) and not types:
            raise DataError(f"{files[0]}: its rows have no columns; they need at least chosen and rejected")
        if not changed:
            return {"counts": counts, "encoded": [name for name, type_ in types.items() if type_ is None]}


def open_table(source: Any, description: Mapping[str, Any], fingerprint: str) -> datasets.Dataset:
    """The table that :func:`write_table` wrote.

    Args:
        source: an IPC file for pyarrow. Rows of a memory map are read only when they are requested.
        description: the result of :func:`write_table`.
        fingerprint: of the content, for ``datasets``.
    """
    table = datasets.Dataset(pyarrow.ipc.open_file(source).read_all(), fingerprint=fingerprint[:16])
    encoded = description["encoded"]
    return table.with_transform(partial(_decoded, encoded)) if encoded else table


def _decoded(encoded: Sequence[str], rows: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    return {
        column: [None if v is None else json.loads(v) for v in values] if column in encoded else values
        for column, values in rows.items()
    }


class _Sink:
    """An IPC file that begins with its first batch, which defines the columns."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._writer: Any = None

    def __enter__(self) -> _Sink:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._writer is not None:
            self._writer.close()
        self._stream.close()

    @property
    def begun(self) -> bool:
        return self._writer is not None

    def write(self, batch: pyarrow.RecordBatch) -> None:
        if self._writer is None:
            self._writer = pyarrow.ipc.new_file(self._stream, batch.schema)
        self._writer.write_batch(batch)


def _chunks(files: Sequence[Path], kind: str, known: Mapping[str, Any]) -> Iterator[tuple[int, int, Values]]:
    """The number of a file, the number of its rows in this chunk, and their values in all columns known so far."""
    for number, file in enumerate(files):
        chunk: Values = {column: [] for column in known}
        count = 0
        for row, (line, values) in enumerate(read_rows(file, kind)):
            for column in values:
                if column not in chunk:
                    _check_name(column, place_of(file, row, line))
                    chunk[column] = [None] * count
            for column, kept in chunk.items():
                kept.append(values.get(column))
            count += 1
            if count == _CHUNK_ROWS:
                yield number, count, chunk
                chunk = {column: [] for column in chunk}
                count = 0
        if count:
            yield number, count, chunk


def _check_name(column: str, place: str) -> None:
    if "\0" in column or column != column.encode("utf-8", "replace").decode("utf-8"):
        raise DataError(
            f"{place}: the column name {column!r} holds a NUL or half of a surrogate pair; rename the column"
        )


def _learn(types: dict[str, pyarrow.DataType | None], arrays: Mapping[str, pyarrow.Array | None]) -> bool:
    """Merge the types of a chunk (None: stored as JSON), and return whether the columns have changed."""
    before = dict(types)
    for name, array in arrays.items():
        known = types.setdefault(name, pyarrow.null())
        if known is None or array is None:
            types[name] = None
        elif array.type != known and not pyarrow.types.is_null(array.type):
            types[name] = array.type if pyarrow.types.is_null(known) else None
    return types != before


def _batch(
    types: Mapping[str, pyarrow.DataType | None], chunk: Values, arrays: Mapping[str, pyarrow.Array | None]
) -> pyarrow.RecordBatch:
    columns = []
    for name, type_ in types.items():
        array = arrays[name]
        if type_ is None:
            texts = [None if value is None else json.dumps(value) for value in chunk[name]]
            array = pyarrow.array(texts, pyarrow.string())
        elif array is None or array.type != type_:
            array = pyarrow.array(chunk[name], type_)  # missing values only
        columns.append(array)
    return pyarrow.RecordBatch.from_arrays(columns, names=list(types))


def _unchanged(values: list[Any]) -> pyarrow.Array | None:
    """The values in Arrow's own types, if Arrow returns them unchanged."""
    try:
        array = pyarrow.array(values)
    except (pyarrow.ArrowException, ValueError, TypeError, OverflowError):
        return None
    kind = str(array.type)
    # Among floating-point numbers Arrow accepts true as 1.0, and so does Python's comparison.
    changed = array.to_pylist() != values or ("double" in kind and _holds_bool(values))
    # datasets passes types through C, where a name ends at a NUL and the nesting of types is limited.
    return None if changed or "\0" in kind or kind.count("<") > _ARROW_LEVELS else array


def _holds_bool(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else value
    kinds = set(map(type, inner))
    if not kinds & {dict, list}:  # as in most lists of numbers, which may be long
        return bool in kinds
    return bool in kinds or any(_holds_bool(v) for v in inner if isinstance(v, (dict, list)))
