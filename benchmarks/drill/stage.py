"""What every stage of the drill is given: where it runs, how long it may take, and where its results go."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cpu.process import wait

__all__ = ["Log", "Stage", "TimeOver", "described", "time_limit", "timed"]


class TimeOver(BaseException):
    """The stage's time is over. No ``except Exception`` on the way can stop it."""


class Log:
    """Appends one JSON object per line and syncs each to the disk, so that a killed process leaves what it has.

    Args:
        file: the file, made when the first record is written.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def write(self, **record: Any) -> None:
        """Append a record with the time of day in seconds."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({**record, "at": round(time.time(), 2)}) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All records so far; an incomplete last line of a killed process is left out."""
        if not self.file.exists():
            return []
        lines = self.file.read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines[:-1] if line]


@dataclass
class Stage:
    """A running stage.

    Args:
        name: of the stage.
        device: "cuda" or "cpu".
        tiny: whether sizes are those of a test.
        deadline: time of day at which the stage must be done, in seconds since the epoch.
        log: receives the results.
        folder: for files of the stage.
        peer: environment or folder with TRL, if there is one.
    """

    name: str
    device: str
    tiny: bool
    deadline: float
    log: Log
    folder: Path
    peer: Path | None = None
    failures: list[str] = field(default_factory=list)

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.time()

    def row(self, table: str, **values: Any) -> None:
        """Record a row of a table; the page shows the columns in the order of their first appearance."""
        self.log.write(stage=self.name, kind="row", table=table, values=values)

    def check(self, name: str, found: float, *, most: float) -> None:
        """Record whether a number is at most a limit; a stage with a failed check has failed. NaN fails."""
        good = found <= most
        self.log.write(stage=self.name, kind="check", name=name, found=float(found), most=most, ok=good)
        if not good:
            self.failures.append(f"{name}: {found:.3g}, at most {most:g}")

    def skip(self, name: str, reason: str) -> None:
        """Record what is not measured here, and why. This is no failure."""
        self.log.write(stage=self.name, kind="skip", name=name, reason=reason)

    def has_time(self, name: str, seconds: float) -> bool:
        """Whether so many seconds are left; if not, ``name`` is recorded as skipped. Tiny runs always have time."""
        if self.tiny or self.left >= seconds:
            return True
        self.skip(
            name, f"takes about {seconds:.0f} s, and {max(self.left, 0):.0f} s are left of the stage's time"
        )
        return False

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of the stage. What goes wrong in it is recorded, and the stage continues with the next part."""
        try:
            yield
        except Exception as error:  # a drill reports everything that fails, and measures the rest
            self.failures.append(f"{name}: {type(error).__name__}")
            self.log.write(stage=self.name, kind="error", name=name, **described(error))


def described(error: BaseException) -> dict[str, Any]:
    """Type, message and last frames of an error."""
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    return {
        "type": type(error).__name__,
        "message": str(error).strip()[:600],
        "frames": [f"{'/'.join(Path(f.filename).parts[-3:])}:{f.lineno} {f.name}" for f in frames],
    }


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise :class:`TimeOver` in the block after so many seconds.

    An alarm interrupts Python, not a kernel that hangs. The drill therefore runs stages on a GPU in processes of their own, and
    kills those that do not end.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("a time limit needs the main thread of the process")

    def stop(_number: int, _frame: Any) -> None:
        raise TimeOver(f"not done after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def timed(action: Callable[[], Any], device: str) -> float:
    """Milliseconds of a call, with everything that a GPU was given before and in it."""
    wait(device)
    start = time.perf_counter()
    action()
    wait(device)
    return (time.perf_counter() - start) * 1000
