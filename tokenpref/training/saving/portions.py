"""Splits long jobs into portions and stores the finished ones, so that a killed job can continue."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenpref._files import write_json
from tokenpref.distributed import World

__all__ = ["KeptPortions", "Portions"]

log = logging.getLogger("tokenpref")

SECONDS_BETWEEN_WRITES = 20.0


class Portions:
    """Portions of a job whose results are not stored.

    Args:
        world: the job's processes.
    """

    def __init__(self, world: World) -> None:
        self.world = world

    def do(self, part: str, number: int, make: Callable[[], Any]) -> list[Any]:
        """The results of a portion from all ranks, on every rank.

        Args:
            part: part of the job.
            number: portion of the part, from 0 in order.
            make: makes this rank's result, as plain data.
        """
        return self.world.gather_objects(make())


class KeptPortions(Portions):
    """Portions that are written to a file at intervals, and read by the next start of the same job.

    Args:
        file: the file of finished portions, which only the main process uses.
        job: everything that the results depend on, as plain data. Portions of another job are not used.
        world: the job's processes. Their number is part of the job.
    """

    def __init__(self, file: Path, job: dict[str, Any], world: World) -> None:
        super().__init__(world)
        self._file = file
        described = json.dumps({**job, "world_size": world.size}, sort_keys=True, default=str)
        self._job = hashlib.sha256(described.encode()).hexdigest()
        self._kept: dict[str, list[Any]] = world.broadcast_object(self._read() if world.is_main else None)
        self._written_at = time.monotonic()

    def _read(self) -> dict[str, list[Any]]:
        if not self._file.is_file():
            return {}
        try:
            record = json.loads(self._file.read_text(encoding="utf-8"))
            job, kept = record["job"], {str(k): list(v) for k, v in record["portions"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            log.info(f"{self._file} is damaged ({type(error).__name__}: {error}); the job starts again")
            return {}
        if job != self._job:
            log.info(
                f"{self._file} is of other settings, weights or data than this job's; the job starts again"
            )
            return {}
        done = ", ".join(f"{len(portions)} portions of {part}" for part, portions in kept.items())
        log.info(f"continuing: {done} are already done")
        return kept

    def do(self, part: str, number: int, make: Callable[[], Any]) -> list[Any]:
        """See :class:`Portions`."""
        portions = self._kept.setdefault(part, [])
        if number < len(portions):
            kept: list[Any] = portions[number]
            return kept
        portions.append(super().do(part, number, make))
        if self.world.is_main and time.monotonic() - self._written_at >= SECONDS_BETWEEN_WRITES:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._file, {"job": self._job, "portions": self._kept})
            self._written_at = time.monotonic()
        return portions[number]

    def drop(self) -> None:
        """Delete all portions, after the job's results have been written."""
        if self.world.is_main:
            self._file.unlink(missing_ok=True)
