"""Stops a run on SIGTERM and SIGINT, after it has finished its step and saved."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["StopRequest"]

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """A context in which the first SIGTERM or SIGINT is recorded, and a second one has its usual effect.

    Outside the main thread, where Python allows no handlers, the context has no effect.

    Attributes:
        name: the signal that arrived, such as "SIGTERM", or None.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            # Signals that the caller ignores (SIGINT of a background job, under nohup or in a script) remain ignored.
            heard = [s for s in SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
            self._former = {s: signal.signal(s, self._note) for s in heard}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, self._former[signal.Signals(number)])
