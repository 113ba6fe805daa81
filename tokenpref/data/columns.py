"""Finds a value in a row by its column, or by a path into nested columns such as ``completions[].response``."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from tokenpref.data.pairs import RowFault

__all__ = ["as_list", "column_of", "value_at"]

_STEP = re.compile(r"\.([^.\[\]]+)|\[(\d*)\]")
_NAME = re.compile(r"[^.\[\]]+")

Step = str | int | None
"""A key, an index, or None for all elements of a list."""


def column_of(path: str, available: Collection[str]) -> str | None:
    """The column that a path begins with; None if there is no such column or the path cannot be read."""
    if path in available:
        return path
    name = _NAME.match(path)
    if name is None or name.group() not in available or _steps(path[name.end() :]) is None:
        return None
    return name.group()


def _steps(rest: str) -> list[Step] | None:
    steps: list[Step] = []
    at = 0
    while at < len(rest):
        found = _STEP.match(rest, at)
        if found is None:
            return None
        key, index = found.groups()
        steps.append(key if key is not None else int(index) if index else None)
        at = found.end()
    return steps


def value_at(row: Mapping[str, Any], path: str) -> Any:
    """The value at a path: ``a``, ``a.b``, ``a[0].b``, or the list of all ``b`` with ``a[].b``.

    Lists and structs stored as JSON text are parsed. A struct of lists, the form in which older versions of ``datasets`` store
    a list of structs, is read as that list. A key that a struct lacks is a missing value (None), as in Arrow.

    Raises:
        RowFault: if this row has no such path.
    """
    if path in row:
        return row[path]
    name = _NAME.match(path)
    assert name is not None  # the path was checked by column_of
    return _walk(row.get(name.group()), _steps(path[name.end() :]) or [], path)


def _walk(value: Any, steps: Sequence[Step], path: str) -> Any:
    for number, step in enumerate(steps):
        if value is None:
            return None
        if isinstance(step, str):
            value = _struct(value, path).get(step)
            continue
        elements = as_list(value, path)
        if step is None:
            return [_walk(element, steps[number + 1 :], path) for element in elements]
        if step >= len(elements):
            raise RowFault("no value", path, f"has {len(elements)} elements, so none at place {step}")
        value = elements[step]
    return value


def _struct(value: Any, path: str) -> Mapping[str, Any]:
    value = _decoded(value, path)
    if not isinstance(value, Mapping):
        raise RowFault("wrong type", path, f"leads into a {type(value).__name__}, where a struct is needed")
    return value


def as_list(value: Any, path: str) -> list[Any]:
    """The elements of a list, of a list stored as JSON text, or of a struct of equally long lists.

    Raises:
        RowFault: if it is none of these.
    """
    value = _decoded(value, path)
    if isinstance(value, Mapping) and value:
        columns = list(value.values())
        if all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
            return [dict(zip(value, element, strict=True)) for element in zip(*columns, strict=True)]
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise RowFault("wrong type", path, f"holds a {type(value).__name__}, where a list is needed")
    return list(value)


def _decoded(value: Any, path: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowFault(
            "wrong type", path, "leads into text that is not JSON, where a list or struct is needed"
        ) from error
