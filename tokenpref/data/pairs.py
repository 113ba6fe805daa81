"""A preference pair as text or messages, before it is tokenised."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = [
    "LeftOut",
    "Messages",
    "PairRow",
    "RowFault",
    "checked_text",
    "not_empty",
    "not_equal",
    "plain_text",
]

Messages = list[dict[str, Any]]
"""Dictionaries with ``role`` and ``content``, and other keys that a chat template may use."""


class RowFault(Exception):
    """One row cannot be used.

    Args:
        kind: short name under which faults of this kind are counted.
        column: the column at fault, by its name in the data.
        message: what is wrong and what to do.
    """

    def __init__(self, kind: str, column: str, message: str) -> None:
        super().__init__(kind, column, message)  # all arguments, so that it can be pickled
        self.kind = kind
        self.column = column
        self.message = message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class PairRow:
    """A row read from any layout.

    Attributes:
        prompt: text, or the messages before the answer.
        chosen: text, or the assistant's message.
        rejected: text, or the assistant's message.
        chosen_complete: whether the chosen answer is complete; None if the row does not say.
        rejected_complete: likewise.
        tools: JSON schemas of the functions that the assistant may call; conversations only.
        margin: how much better the chosen answer is, where the data says it, in the data's own unit.
        turns: whether the answers are turns of a conversation, which have an end.
        columns: the columns of both answers, for messages.
    """

    prompt: str | Messages
    chosen: str | dict[str, Any]
    rejected: str | dict[str, Any]
    chosen_complete: bool | None = None
    rejected_complete: bool | None = None
    tools: list[dict[str, Any]] | None = None
    margin: float | None = None
    turns: bool = dataclasses.field(default=False, compare=False)
    columns: tuple[str, str] = dataclasses.field(default=("chosen", "rejected"), compare=False)

    def swapped(self) -> PairRow:
        """The pair with its sides swapped."""
        return dataclasses.replace(
            self,
            chosen=self.rejected,
            rejected=self.chosen,
            chosen_complete=self.rejected_complete,
            rejected_complete=self.chosen_complete,
            margin=None if self.margin is None else -self.margin,
            columns=self.columns[::-1],
        )


@dataclass(frozen=True)
class LeftOut:
    """A pair that is left out although its row is correct, such as a tie.

    Attributes:
        reason: short name under which pairs like it are counted.
    """

    reason: str


def checked_text(row: Mapping[str, Any], column: str) -> str:
    """The text of a column.

    Raises:
        RowFault: if it is missing, is not text, or contains half of a surrogate pair.
    """
    return plain_text(row[column], column)


def plain_text(value: object, column: str) -> str:
    """A value that must be text; see :func:`checked_text`."""
    if value is None:
        raise RowFault("no value", column, "has no value; fill it in or remove the row")
    if not isinstance(value, str):
        raise RowFault("wrong type", column, f"is of type {type(value).__name__}, where this format has text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowFault(
            "broken text", column, f"contains half of a surrogate pair at character {error.start}"
        ) from error
    return value


def not_empty(answer: str, column: str) -> None:
    """Refuse an answer that is only white space."""
    if not answer.strip():
        raise RowFault("empty answer", column, "has no answer (nothing but white space); remove the row")


def not_equal(
    chosen: str | Mapping[str, Any], rejected: str | Mapping[str, Any], columns: Mapping[str, str]
) -> None:
    """Refuse a pair of equal answers, texts or messages."""
    if chosen == rejected:
        raise RowFault(
            "equal answers",
            columns["rejected"],
            f"is equal to {columns['chosen']}, so the pair says nothing; remove the row",
        )
