"""Rows of JSON and CSV files as an Arrow table that gives every value back as the file has it."""

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
_ARROW_LEVELS = 32  # of the 64 that Arrow allows

Values = dict[str, list[Any]]
"""Some rows, column by column."""


def write_table(files: Sequence[Path], kind: str, open_sink: Callable[[], Any]) -> dict[str, Any]:
    """Write the rows of files as an Arrow IPC file, a thousand rows at a time.

    Not by datasets' own readers: they guess types, block by block, and in a block that does not fit the guess turn
    numbers into text, text into numbers or dates, or put quotes around every text. A column whose values Arrow would
    change (several types, messages with different keys) is kept as JSON here, and decoded when a row is asked for.

    Args:
        files: of one kind, in the order of the rows.
        kind: ``json`` or ``csv``.
        open_sink: gives an empty pyarrow stream; called a second time where the first columns are not like the last.

    Returns:
        Plain data for :func:`open_table`: the rows of every file, and the columns that are kept as JSON.

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
                # From there on this pass only looks; the next one knows all columns and writes.
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
        source: what pyarrow opens as an IPC file; of a memory map no row is read before it is asked for.
        description: what it returned.
        fingerprint: identity of the content, for ``datasets``.
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
    """An IPC file that begins with its first batch, which says what the columns are."""

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
    """The number of a file, how many of its rows come, and these in all columns that are known so far."""
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
    """Take the types of a chunk in (None: kept as JSON); returns whether something about the columns is new."""
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
