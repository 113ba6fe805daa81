"""Text and plain data on the disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["read_text", "write_json"]


def read_text(file: Path, fault: type[Exception]) -> str:
    """The text of a UTF-8 file.

    Raises:
        Exception: of the given kind, if it is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise fault(
            f"{file} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error


def write_json(file: Path, record: dict[str, Any]) -> None:
    """Write plain data in one piece: the old file or the new one, never half of it."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, file)
