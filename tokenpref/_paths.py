"""Where the recipes, configs and data that come with the package lie, and how paths in a config are read."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE_SCHEME = "package://"


def data_root() -> Path:
    """Folder that holds ``recipes/``, ``configs/`` and ``data/``: the source tree, or the wheel's copy."""
    package = Path(__file__).resolve().parent
    if (package.parent / "recipes").is_dir() and (package.parent / "pyproject.toml").is_file():
        return package.parent
    return package.parent / "tokenpref_data"


def resolve_path(text: str | Path) -> Path:
    """Absolute path of a path as written in a config.

    Args:
        text: ``package://data/...`` reaches what comes with the package; anything else is taken against
            the current directory, with ``~`` expanded.

    Returns:
        An absolute path; it need not exist.

    Raises:
        ValueError: if a ``package://`` path leaves the package's folder.
    """
    text = str(text)
    if not text.startswith(PACKAGE_SCHEME):
        return Path(os.path.expanduser(text)).absolute()
    root = data_root().resolve()
    path = (root / text[len(PACKAGE_SCHEME) :]).resolve()
    if not path.is_relative_to(root):
        raise ValueError(
            f"{text!r} leaves the package's folder; write a plain path to reach files outside it"
        )
    return path
