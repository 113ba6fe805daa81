"""Two answers and a label that says which one is better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenpref.data.pairs import LeftOut, RowFault
from tokenpref.errors import ConfigError

__all__ = ["TIE", "Choice", "Labels", "as_number", "labels_from", "said_tie"]

TIE = LeftOut("tie")
_KEYS = ("column", "first", "second", "tie")
_SIGNS = ("negative", "positive")
# Texts of votes for a tie.
_TIES = frozenset({"tie", "tie (bothbad)", "bothbad", "both_bad", "both bad", "draw", "equal", "neither"})


@dataclass(frozen=True)
class Choice:
    """One pair of a row: the places of both answers, and how much better the chosen one is.

    Attributes:
        chosen: path of the better answer.
        rejected: path of the worse answer.
        values: the values at these paths.
        margin: how much better the chosen answer is in the data's own unit, if the data says so.
    """

    chosen: str
    rejected: str
    values: Mapping[str, Any]
    margin: float | None = None


@dataclass(frozen=True)
class Labels:
    """The values of a column that say which answer is better.

    Attributes:
        column: the column of the label.
        first: values that say that the first answer is better.
        second: values that say that the second answer is better.
        tie: values that say that neither is better.
    """

    column: str
    first: tuple[Any, ...]
    second: tuple[Any, ...]
    tie: tuple[Any, ...]

    def read(self, label: Any) -> str | LeftOut:
        """``first`` or ``second``, or a tie.

        Raises:
            RowFault: if the label is not one of the known values.
        """
        for side, values in (("first", self.first), ("second", self.second), ("tie", self.tie)):
            if any(_matches(label, value) for value in values):
                return TIE if side == "tie" else side
        if label is None:
            raise RowFault("no label", self.column, "has no value; fill it in or remove the row")
        shown = label if isinstance(label, (str, int, float)) else type(label).__name__
        known = [*self.first, *self.second, *self.tie]
        raise RowFault(
            "unknown label",
            self.column,
            f"holds {shown!r}, and labels knows {', '.join(map(repr, known))}; set labels: "
            "{column: ..., first: ..., second: ..., tie: ...} to its values",
        )

    def is_tie(self, label: Any) -> bool:
        """Whether a label beside a chosen and a rejected answer says that neither is better."""
        return any(_matches(label, value) for value in self.tie)

    def margin(self, label: Any) -> float | None:
        """The strength of a signed label; None for labels that are names."""
        number = _number(label)
        return abs(number) if number is not None and set(_SIGNS) & {*self.first, *self.second} else None


def labels_from(given: Mapping[str, Any], only_ties: bool = False) -> Labels:
    """Labels from settings: each value alone or in a list; ``negative`` and ``positive`` stand for signs.

    Args:
        given: column, first, second and tie.
        only_ties: whether the data already has a chosen answer, so that the label only marks ties.

    Raises:
        ConfigError: if a key is unknown or missing, or a value has two meanings.
    """
    unknown = [key for key in given if key not in _KEYS]
    if unknown:
        raise ConfigError(f"labels: {unknown[0]!r} is no key; it has {', '.join(_KEYS)}")
    column = given.get("column")
    if not isinstance(column, str) or not column:
        raise ConfigError(f"labels: column must be the name of the column with the label, got {column!r}")
    values = {side: _values(given.get(side), side) for side in ("first", "second", "tie")}
    for side in ("tie",) if only_ties else ("first", "second"):
        if not values[side]:
            raise ConfigError(f"labels: {side} is missing; set it to the label of such rows")
    flat = [value for side in values.values() for value in side]
    twice = [a for place, a in enumerate(flat) for b in flat[:place] if _matches(a, b) or _matches(b, a)]
    if twice:
        raise ConfigError(f"labels: {twice[0]!r} stands for two of first, second and tie")
    return Labels(column, values["first"], values["second"], values["tie"])


def _values(given: Any, side: str) -> tuple[Any, ...]:
    values = list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]
    for value in values:
        if not isinstance(value, (str, int, float)) or (
            isinstance(value, float) and not math.isfinite(value)
        ):
            raise ConfigError(
                f"labels: {side} must be text, a number, true, false or a list of these, got {value!r}"
            )
    return tuple(values)


def _matches(label: Any, value: Any) -> bool:
    """Whether a label has this value. Numbers may be stored as text, as in CSV files."""
    if isinstance(label, bool) or isinstance(value, bool):
        return label is value or (isinstance(label, str) and label.strip().lower() == str(value).lower())
    number = _number(label)
    if value in _SIGNS and number is not None:
        return number < 0 if value == "negative" else number > 0
    if isinstance(value, str):
        return isinstance(label, str) and label.strip() == value.strip()
    return number is not None and number == value


def _number(value: Any) -> float | int | None:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return value if math.isfinite(value) else None


def as_number(value: Any, column: str, what: str) -> float:
    """A finite number, which may be stored as text.

    Raises:
        RowFault: if the value is not a finite number.
    """
    if value is None:
        raise RowFault("no value", column, f"has no {what}; fill it in or remove the row")
    try:
        number = _number(value)
        if number is not None:
            return float(number)
    except OverflowError:
        pass
    shown = value if isinstance(value, (str, int, float, bool)) else type(value).__name__
    raise RowFault("wrong type", column, f"must hold a finite number as {what}, found {str(shown)[:60]!r}")


def said_tie(value: Any) -> bool:
    """Whether a vote beside two answers says in words that neither is better."""
    return isinstance(value, str) and value.strip().casefold() in _TIES
