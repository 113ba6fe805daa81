"""Stopping a run from outside: SIGTERM and SIGINT let it finish its step and save."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["StopRequest"]

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """While it is entered, a first SIGTERM or SIGINT is noted, and a second one does what it always did.

    Outside the main thread, where Python allows no handlers, nothing changes.

    Attributes:
        name: the signal that came, such as "SIGTERM"; None before.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            # What the caller ignores (a background job's SIGINT, under nohup or in a script) stays ignored.
            heard = [s for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
            self._former = {s: signal.signal(s, self._note) for s in heard}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, self._former[signal.Signals(number)])
