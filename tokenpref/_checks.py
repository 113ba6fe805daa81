"""Argument checks that losses, weights and statistics share: each names the argument, the value and the mend."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import Any

# Tensors hold settings in float32.
_FLOAT32_MOST = 3.4028234663852886e38

__all__ = ["check_choice", "check_flag", "check_known", "check_number", "check_ordered"]


def _suggestion(value: Any, choices: Collection[str]) -> str:
    close = difflib.get_close_matches(str(value), list(choices), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def check_choice(name: str, value: Any, choices: Collection[str]) -> str:
    """``value`` if it is one of ``choices``.

    Raises:
        ValueError: otherwise, with the nearest choice.
    """
    if value not in choices:
        listed = ", ".join(repr(c) for c in choices)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}{_suggestion(value, choices)}")
    return str(value)


def check_flag(name: str, value: Any) -> bool:
    """``value`` if it is True or False.

    Raises:
        ValueError: otherwise.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {value!r}")
    return value


def check_known(name: str, values: Iterable[str], known: Collection[str]) -> frozenset[str]:
    """``values`` as a set, if all of them are in ``known``.

    Raises:
        ValueError: otherwise, with the nearest known name.
    """
    if isinstance(values, str):
        raise ValueError(f"{name} must be a set of names, got the string {values!r}; set {{{values!r}}}")
    found = frozenset(values)
    for value in sorted(found - frozenset(known)):
        listed = ", ".join(repr(k) for k in sorted(known))
        raise ValueError(f"{name} has an unknown name {value!r} (known: {listed}){_suggestion(value, known)}")
    return found


def check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> float:
    """``value`` as a float, if it is a finite real number within the bounds.

    Raises:
        ValueError: otherwise.
    """
    bounds = [
        text
        for bound, text in (
            (above, f"> {above}"),
            (at_least, f">= {at_least}"),
            (below, f"< {below}"),
            (at_most, f"<= {at_most}"),
        )
        if bound is not None
    ]
    good = (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) <= _FLOAT32_MOST
        and (above is None or value > above)
        and (at_least is None or value >= at_least)
        and (below is None or value < below)
        and (at_most is None or value <= at_most)
    )
    if not good:
        wanted = " ".join(["a finite number", " and ".join(bounds)]).strip()
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    return float(value)


def check_ordered(low_name: str, low: float, high_name: str, high: float, *, strict: bool = True) -> None:
    """Check that ``low < high`` (``low <= high`` when not ``strict``).

    Raises:
        ValueError: otherwise.
    """
    if low > high or (strict and low == high):
        relation = "<" if strict else "<="
        raise ValueError(
            f"{low_name} {relation} {high_name} must hold, got {low_name}={low}, {high_name}={high}"
        )
