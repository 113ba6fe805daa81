"""Reads YAML from other people safely: plain data only, with a limit on its expanded size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

__all__ = ["check_yaml", "read_yaml"]

_MOST_VALUES = 100_000
_MOST_LEVELS = 50


def check_yaml(file: Path) -> str:
    """The text of a file, after a check that its values will not fill the memory.

    Raises:
        ValueError: if it is not UTF-8 or not YAML, is nested too deeply, or its aliases stand for too many values.
        OSError: if it cannot be read.
    """
    text = file.read_text(encoding="utf-8")
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError(f"it is nested deeper than {_MOST_LEVELS} levels") from error
    if root is not None and _expanded(root, {}, ()) > _MOST_VALUES:
        raise ValueError(f"its aliases stand for more than {_MOST_VALUES} values")
    return text


def read_yaml(file: Path) -> Any:
    """A file's plain data.

    Raises:
        ValueError: as :func:`check_yaml` does, and for tags of anything but plain data.
        OSError: if it cannot be read.
    """
    try:
        return yaml.safe_load(check_yaml(file))
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def _expanded(node: yaml.Node, known: dict[yaml.Node, int], around: tuple[yaml.Node, ...]) -> int:
    """The number of values of a node with all aliases expanded."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if node in around:
        raise ValueError("it contains itself through an alias")
    if len(around) > _MOST_LEVELS:
        raise ValueError(f"it is nested deeper than {_MOST_LEVELS} levels")
    if node not in known:
        # A mapping's value is a list of pairs of nodes.
        parts = [part for entry in node.value for part in (entry if isinstance(entry, tuple) else (entry,))]
        known[node] = 1 + sum(_expanded(part, known, (*around, node)) for part in parts)
    return known[node]
