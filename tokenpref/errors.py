"""Errors that a user can mend: each says what is wrong, the value found, and what to set instead."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "INTERRUPTED_EXIT",
    "USER_ERROR_EXIT",
    "ConfigError",
    "DataError",
    "Interrupted",
    "TokenprefError",
    "TrainingDiverged",
]

USER_ERROR_EXIT = 2
"""Exit code after an error that the user can mend."""

INTERRUPTED_EXIT = 75
"""Exit code of a run that a signal stopped and that can go on (EX_TEMPFAIL of sysexits.h)."""


class Interrupted(Exception):
    """A run has saved and stopped because it was asked to."""


class TokenprefError(ValueError):
    """Something in the user's input is wrong. Recipes print it without a traceback."""


class ConfigError(TokenprefError):
    """One or more faults of a config, reported together.

    Args:
        faults: a single message or all messages; each names the key, the value found and the mend.
    """

    def __init__(self, faults: str | Sequence[str]) -> None:
        self.faults: list[str] = [faults] if isinstance(faults, str) else list(faults)
        if len(self.faults) == 1:
            message = self.faults[0]
        else:
            message = f"{len(self.faults)} faults in the config:\n" + "\n".join(
                f"  - {f}" for f in self.faults
            )
        super().__init__(message)


class DataError(TokenprefError):
    """A data file or one of its rows cannot be used. The message names the file, the row and the column."""


class TrainingDiverged(TokenprefError):
    """A loss or gradient is not finite. Raised on every rank before the update; the message has the step and rows."""
