"""Errors that a user can fix: each says what is wrong, the value found, and what to set instead."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = [
    "INTERRUPTED_EXIT",
    "USER_ERROR_EXIT",
    "ConfigError",
    "DataError",
    "DryRun",
    "Interrupted",
    "TokenprefError",
    "TrainingDiverged",
]

USER_ERROR_EXIT = 2
"""Exit code after an error that the user can fix."""

INTERRUPTED_EXIT = 75
"""Exit code of a run that a signal stopped and that can be resumed (EX_TEMPFAIL of sysexits.h)."""


class Interrupted(Exception):
    """A run has saved its state and stopped because a signal asked it to."""


class DryRun(Exception):
    """All checks are done, and the config asks for nothing else (``dry_run: true``)."""


class TokenprefError(ValueError):
    """Something in the user's input is wrong. Recipes print it without a traceback.

    Args:
        message: what is wrong, the value found, and the remedy. Several lines, as in messages of libraries, become one.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_in_one_line(message))


def _in_one_line(message: str) -> str:
    return re.sub(r"\s*[\r\n]+\s*", " ", message).strip()


class ConfigError(TokenprefError):
    """One or more faults of a config, reported together.

    Args:
        faults: one message or several; each names the key, the value found and the remedy.
    """

    def __init__(self, faults: str | Sequence[str]) -> None:
        self.faults: list[str] = [_in_one_line(f) for f in ([faults] if isinstance(faults, str) else faults)]
        if len(self.faults) == 1:
            super().__init__(self.faults[0])
        else:  # the only message of several lines
            listed = "\n".join(f"  - {fault}" for fault in self.faults)
            ValueError.__init__(self, f"{len(self.faults)} faults in the config:\n{listed}")


class DataError(TokenprefError):
    """A data file or one of its rows cannot be used. The message names the file, the row and the column."""


class TrainingDiverged(TokenprefError):
    """A loss or gradient is not finite. Raised on every rank before the update.

    Args:
        step: the optimizer step, from 1.
        cause: what is not finite.
        rows: the step's rows, of all ranks.
        bad_rows: the rows whose loss is not finite; empty if only the gradient is not finite.
        note: a further sentence for the message.
    """

    def __init__(
        self, step: int, cause: str, rows: Sequence[int], bad_rows: Sequence[int], note: str = ""
    ) -> None:
        self.step, self.cause, self.rows, self.bad_rows = step, cause, list(rows), list(bad_rows)
        super().__init__(
            f"step {step}: {cause}; no update was made. Rows of this step: {self.rows}. "
            "Lower the learning rate, set clip_grad_norm, or inspect these rows."
            + (f" {note}" if note else "")
        )
