"""The folder of the recipes, configs and data of this package, and the resolution of paths in a config."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE_SCHEME = "package://"


def data_root() -> Path:
    """The folder that contains ``recipes/``, ``configs/`` and ``data/``: the source tree, or the wheel's copy."""
    package = Path(__file__).resolve().parent
    if (package.parent / "recipes").is_dir() and (package.parent / "pyproject.toml").is_file():
        return package.parent
    return package.parent / "tokenpref_data"


def resolve_path(text: str | Path) -> Path:
    """The absolute form of a path in a config.

    Args:
        text: ``package://data/...`` refers to files of this package. Any other path is relative to
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
        raise ValueError(f"{text!r} leaves the package's folder; use a plain path for files outside it")
    return path
