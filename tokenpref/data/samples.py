"""The text files of sampling: openings to continue, and earlier samples."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tokenpref._files import read_text
from tokenpref.errors import DataError

__all__ = ["read_openings", "read_samples"]


def read_openings(file: Path) -> list[str]:
    """The openings of a text file, one per line.

    Raises:
        DataError: if the file is not text or has no openings.
    """
    openings = [line for line in read_text(file, DataError).splitlines() if line.strip()]
    if not openings:
        raise DataError(f"{file}: no openings; write one a line")
    return openings


def read_samples(file: Path) -> list[dict[str, Any]]:
    """The records of a ``samples.jsonl``: ``prompt``, ``sample``, ``reward`` and more.

    Raises:
        DataError: naming the first line that is not such a record.
    """
    records: list[dict[str, Any]] = []
    # Not splitlines, because JSON may contain line separators of Unicode.
    for number, line in enumerate(read_text(file, DataError).removesuffix("\n").split("\n"), start=1):
        where = f"{file}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(
                f"{where} is not valid JSON ({error}); name a samples.jsonl of an evaluation"
            ) from error
        if not isinstance(record, dict) or not {"prompt", "sample", "reward"} <= record.keys():
            raise DataError(
                f"{where}: needs prompt, sample and reward, found {line[:60]!r}; name a samples.jsonl of an evaluation"
            )
        reward = record["reward"]
        if not isinstance(reward, (int, float)) or isinstance(reward, bool) or not math.isfinite(reward):
            raise DataError(
                f"{where}: reward is {reward!r}, expected a finite number; evaluate that model again"
            )
        records.append(record)
    return records
