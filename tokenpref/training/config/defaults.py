"""Configs without the keys that only repeat a default, so that two ways to write the same run compare as equal."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from tokenpref.components import COMPONENT, default_arguments, find_component

__all__ = ["completed", "component_paths", "without_defaults"]


def without_defaults(
    schema: type | None, data: Mapping[str, Any], importable: Collection[str] | None = None
) -> dict[str, Any]:
    """Leave out every key, and every argument of a component, whose value is what the recipe takes without it.

    Args:
        schema: dataclass of the recipe's keys; None leaves out arguments of components only.
        data: the config as plain data.
        importable: dotted paths of the components whose defaults may be looked up, which imports them; None: all. A config that
            was read from a file of another run must not decide what is imported.

    Returns:
        A new mapping. Keys that the schema does not know stay.
    """
    known = {field.name: field for field in dataclasses.fields(schema)} if schema is not None else {}
    kept = {}
    for key, value in data.items():
        spec = known.get(key)
        given = value if spec is None else completed(spec, data)
        nested = None if spec is None else spec.metadata.get("section")
        if nested is not None and isinstance(given, Mapping):
            given = without_defaults(nested, given, importable)
        else:
            given = _without_default_arguments(given, importable)
        if spec is None or not _is_default(spec, given, data, importable):
            kept[key] = given
    return kept


def component_paths(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Keys and dotted paths of all components in a config's plain data, those inside others too."""
    if isinstance(value, Mapping):
        if COMPONENT in value:
            yield key, str(value[COMPONENT])
        for name, part in value.items():
            yield from component_paths(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for place, part in enumerate(value):
            yield from component_paths(part, f"{key}[{place}]")


def completed(spec: dataclasses.Field[Any], data: Mapping[str, Any]) -> Any:
    """The value of a key, whole where the config names single arguments of the key's default component or only a path."""
    base, value = spec.metadata.get("base"), data.get(spec.name)
    if base is None:
        return value
    if isinstance(
        value, str
    ):  # a path on the command line, where the file has no component that it could replace
        return {COMPONENT: value}
    if isinstance(value, Mapping) and COMPONENT not in value:
        return {**base(data), **value}
    return value if spec.name in data else base(data)


def _is_default(
    spec: dataclasses.Field[Any], value: Any, data: Mapping[str, Any], importable: Collection[str] | None
) -> bool:
    base = spec.metadata.get("base")
    if base is not None:
        return _same(value, _without_default_arguments(base(data), importable))
    return value is None or _same(value, spec.default)


def _without_default_arguments(value: Any, importable: Collection[str] | None) -> Any:
    if isinstance(value, list):
        return [_without_default_arguments(part, importable) for part in value]
    if not isinstance(value, Mapping):
        return value
    defaults: Mapping[str, Any] = {}
    path = value.get(COMPONENT)
    if isinstance(path, str) and (importable is None or path in importable):
        try:
            defaults = default_arguments(find_component(path))
        except ValueError:
            defaults = {}  # nothing is known of a component that cannot be imported, so all of it stays
    return {
        name: _without_default_arguments(part, importable)
        for name, part in value.items()
        if name not in defaults or not _same(part, defaults[name])
    }


def _same(value: Any, default: Any) -> bool:
    """Whether a value of plain data is a default; 1 is not true."""
    if isinstance(default, tuple):
        default = list(default)
    return isinstance(value, bool) == isinstance(default, bool) and bool(value == default)
