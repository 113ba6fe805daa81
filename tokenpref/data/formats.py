"""Reads preference pairs in the layouts that people use into one common form."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenpref.data.boundary import shared_prefix
from tokenpref.data.columns import column_of
from tokenpref.data.conversations import (
    conversation,
    joined_input,
    one_answer,
    row_tools,
    side_messages,
)
from tokenpref.data.message_text import messages_of, refuse_messages
from tokenpref.data.pairs import Messages, PairRow, RowFault, checked_text, not_empty, not_equal
from tokenpref.data.presets import OPTIONAL
from tokenpref.errors import DataError

__all__ = [
    "FORMATS",
    "check_format",
    "detect_format",
    "further_answer",
    "mapped_columns",
    "parse_row",
]

FORMATS = ("explicit", "implicit", "conversational", "hh", "labelled", "ranked")
"""The values of ``format:`` besides auto."""

_PLAIN = ("explicit", "implicit", "conversational", "hh")
# The ends of two column names that hold two answers of one kind, and the names of columns that hold lists of answers.
_TWIN = re.compile(r"(?<=.)[_-]?[012abAB]$")
_LISTS = frozenset(
    {"answers", "responses", "completions", "candidates", "outputs", "generations", "replies", "options"}
)
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_MARKS = ("complete", "chosen_complete", "rejected_complete")
_ANSWERS = {
    "labelled": ("first", "second"),
    "ranked": ("answers", "score", "rank"),
    **dict.fromkeys(_PLAIN, ("chosen", "rejected")),
}
# Fields that are read only if column_map names their column, because columns of these names often hold something else.
_MAPPED_ONLY = ("input", "margin")
_FIELDS = ("prompt", "chosen", "rejected", "first", "second", "answers", "score", "rank", *OPTIONAL, *_MARKS)


def mapped_columns(
    available: Sequence[str],
    column_map: Mapping[str, str | None] | None,
    source: str,
    layout: str = "auto",
) -> dict[str, str]:
    """Find the column of each field.

    Args:
        available: the data's columns.
        column_map: maps fields to columns, or to paths such as ``info.post`` or ``completions[].response``. None leaves out a
            column that would otherwise be read because of its name.
        source: the data's name, for messages.
        layout: the declared format. It decides which fields hold the answers.

    Returns:
        The column of each field that the data has.

    Raises:
        DataError: if a mapped column or a column of an answer does not exist, or a key of ``column_map`` is not a field.
    """
    column_map = dict(column_map or {})
    found = ", ".join(available)
    for field, column in column_map.items():
        if field not in _FIELDS:
            raise DataError(
                f"column_map: {field!r} is no field; map {', '.join(_FIELDS)} to columns of the data"
            )
        if column is not None and (not isinstance(column, str) or column_of(column, available) is None):
            raise DataError(
                f"column_map: {source} has no column {column!r} for {field}; its columns are {found}"
            )
    answers = _ANSWERS.get(layout, _ANSWERS["explicit"])
    own = ("prompt", *answers, *OPTIONAL, *_MARKS)
    taken = {column_of(column, available) for column in column_map.values() if column is not None}
    columns: dict[str, str] = {}
    for field in own:
        column = column_map.get(field, None if field in _MAPPED_ONLY or field in taken else field)
        if column is not None and column_of(column, available):
            columns[field] = column
    if "input" not in column_map and columns.get("prompt") == "instruction" and "input" in available:
        columns["input"] = "input"
    _check_answers(columns, column_map, answers, layout, source, available)
    return columns


def _check_answers(
    columns: Mapping[str, str],
    column_map: Mapping[str, str | None],
    answers: Sequence[str],
    layout: str,
    source: str,
    available: Sequence[str],
) -> None:
    """Refuse data that lacks its answers, and a ``column_map`` with fields that the format does not have."""
    found = ", ".join(available)
    stray = [field for field, column in column_map.items() if column is not None and field not in columns]
    if stray:
        raise DataError(f"column_map: format {layout} has no field {stray[0]!r}")
    required = answers[:1] if layout == "ranked" else answers
    for field in required:
        if field not in columns:
            raise DataError(
                f"{source} has no column {field!r}; its columns are {found}. Say which one it is: column_map: "
                f"{{{field}: <column>}}" + ("" if layout != "auto" else _other_formats(available))
            )
    if layout == "ranked" and ("score" in columns) == ("rank" in columns):
        raise DataError(
            f"format: ranked needs either score (higher is better) or rank (lower is better) in column_map; {source} has the "
            f"columns {found}"
        )


def _other_formats(available: Sequence[str]) -> str:
    """Suggest a format for data without chosen and rejected, judged by the names of its columns."""
    kinds: dict[str, list[str]] = {}
    for name in available:
        kinds.setdefault(_TWIN.sub("", name), []).append(name)
    twins = next((names for names in kinds.values() if len(names) == 2), None)
    if twins:
        first, second = sorted(twins)
        return (
            f". {first!r} and {second!r} look like two answers of which a label says the better one: format: labelled, "
            f"column_map: {{first: {first}, second: {second}}}, labels: {{column: <column>, first: <value>, second: <value>}}"
        )
    if lists := [name for name in available if name.lower() in _LISTS]:
        return (
            f". {lists[0]!r} looks like a list of answers: format: ranked, column_map: {{answers: {lists[0]}, score: <column>}} "
            f"(or answers: '{lists[0]}[].<key>')"
        )
    return (
        ", or set format: labelled (two answers and a label), format: ranked (a list of answers with scores or ranks) or a "
        "preset"
    )


def check_format(declared: object) -> None:
    """Refuse an unknown format.

    Raises:
        DataError: if it is neither auto nor one of :data:`FORMATS`.
    """
    if declared not in ("auto", *FORMATS):
        raise DataError(f"format must be one of auto, {', '.join(FORMATS)}; got {declared!r}")


def detect_format(row: Mapping[str, Any], columns: Mapping[str, str], declared: str, source: str) -> str:
    """Recognise the layout of a data set from one of its rows.

    Args:
        row: a row in which no field is missing.
        columns: the column of each field, from :func:`mapped_columns`.
        declared: the config's format: ``auto``, ``explicit``, ``implicit``, ``conversational`` or ``hh``.
        source: the data's name, for messages.

    Raises:
        DataError: if ``declared`` is unknown, or if the row looks like another format. The message names that format.
    """
    check_format(declared)
    found, why = _looks_like(row, columns)
    # Texts of HH-RLHF share a beginning like implicit ones, so a config may declare them as implicit.
    if declared in ("auto", found) or (declared, found) == ("implicit", "hh"):
        return found if declared == "auto" else declared
    raise DataError(
        f"format: {declared} was set, but {source} looks like {found} ({why}); set format: {found} or auto"
        + (", and as_messages: true to make messages of text" if declared == "conversational" else "")
    )


def _looks_like(row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[str, str]:
    chosen = row[columns["chosen"]]
    prompt = row[columns["prompt"]] if "prompt" in columns else None
    if any(_holds_messages(value) for value in (chosen, prompt)):
        return "conversational", "its fields are lists of messages"
    if "prompt" in columns:
        return "explicit", f"it has a column {columns['prompt']!r} with text"
    if isinstance(chosen, str) and chosen.lstrip().startswith(_HUMAN.strip()) and _ASSISTANT in chosen:
        return "hh", "chosen is text that begins with 'Human:' and holds 'Assistant:'"
    return "implicit", "chosen and rejected are text and there is no prompt column"


def _holds_messages(value: Any) -> bool:
    if not isinstance(value, str):
        return isinstance(value, (Sequence, Mapping))
    try:
        return messages_of(value, "") is not None
    except RowFault:
        return False  # this text is refused later, when the row is read


def parse_row(row: Mapping[str, Any], columns: Mapping[str, str], layout: str) -> PairRow:
    """Read one row.

    Args:
        row: the row.
        columns: the column of each field, from :func:`mapped_columns`.
        layout: the data's format.

    Raises:
        RowFault: if the row cannot be used.
    """
    prompt: str | Messages
    chosen: str | dict[str, Any]
    rejected: str | dict[str, Any]
    if layout == "conversational":
        prompt, chosen, rejected = conversation(row, columns)
        not_equal(
            chosen, rejected, columns
        )  # compares whole messages, because the chat template may render more than their text
    else:
        texts = [checked_text(row, columns[field]) for field in ("chosen", "rejected")]
        for field, text in zip(("chosen", "rejected"), texts, strict=True):
            refuse_messages(text, columns[field])
        not_equal(texts[0], texts[1], columns)
        prompt, *answers = _split_texts(row, texts[0], texts[1], columns, layout)
        for field, answer in zip(("chosen", "rejected"), answers, strict=True):
            not_empty(answer, columns[field])
        chosen, rejected = answers
    both = _mark(row, columns, "complete")
    marks = [_mark(row, columns, f"{side}_complete") for side in ("chosen", "rejected")]
    chosen_complete, rejected_complete = (both if mark is None else mark for mark in marks)
    tools = row_tools(row, columns) if layout == "conversational" else None
    return PairRow(
        prompt,
        chosen,
        rejected,
        chosen_complete,
        rejected_complete,
        tools,
        turns=layout in ("conversational", "hh"),
        columns=(columns["chosen"], columns["rejected"]),
    )


def further_answer(
    row: Mapping[str, Any], column: str, prompt: str | Messages, layout: str
) -> str | dict[str, Any]:
    """Read another answer to the prompt of a row's pair, such as an anchor, from a column with the same layout.

    Args:
        row: the row.
        column: the answer's column.
        prompt: the prompt of the row's pair.
        layout: the pair's format. With ``implicit`` and ``hh`` the column repeats the prompt.

    Returns:
        The answer as text or as the assistant's message. Its text may be empty.

    Raises:
        RowFault: if the column has no value, a value of another layout, or an answer to another prompt.
    """
    if layout == "conversational":
        messages = side_messages(row, column)
        own = list(prompt) if not isinstance(prompt, str) else []
        answer = messages[len(own) :] if own and messages[: len(own)] == own else messages
        return one_answer(answer, column)
    text = checked_text(row, column)
    if layout == "explicit":
        return text
    if not text.startswith(str(prompt)):
        raise RowFault(
            "different conversations",
            column,
            f"does not begin with the prompt of the pair; in format {layout} every column repeats it",
        )
    return text[len(str(prompt)) :]


def _split_texts(
    row: Mapping[str, Any], chosen: str, rejected: str, columns: Mapping[str, str], layout: str
) -> tuple[str, str, str]:
    if layout == "explicit":
        refuse_messages(checked_text(row, columns["prompt"]), columns["prompt"])
        return joined_input(row, columns), chosen, rejected
    return (_hh if layout == "hh" else _implicit)(chosen, rejected, columns)


def _mark(row: Mapping[str, Any], columns: Mapping[str, str], field: str) -> bool | None:
    value = row[columns[field]] if field in columns else None
    if isinstance(value, str):  # CSV files hold text only
        value = {"true": True, "false": False, "": None}.get(value.strip().lower(), value)
    if value is not None and not isinstance(value, bool):
        raise RowFault("wrong type", columns[field], f"must be true or false, found {repr(value)[:60]}")
    return value


def _hh(chosen: str, rejected: str, columns: Mapping[str, str]) -> tuple[str, str, str]:
    end = chosen.rfind(_ASSISTANT) + len(_ASSISTANT)
    if end < len(_ASSISTANT):
        raise RowFault(
            "no Assistant turn", columns["chosen"], "has no '\\n\\nAssistant:' to tell prompt from answer"
        )
    prompt = chosen[:end]
    if not rejected.startswith(prompt):
        raise RowFault(
            "different conversations",
            columns["rejected"],
            "does not begin with the conversation of chosen up to its last '\\n\\nAssistant:'; remove the row",
        )
    answer = rejected[end:]
    if _ASSISTANT in answer or _HUMAN in answer:
        raise RowFault(
            "several turns", columns["rejected"], "has further turns after the shared conversation"
        )
    return prompt, chosen[end:], answer


def _implicit(chosen: str, rejected: str, columns: Mapping[str, str]) -> tuple[str, str, str]:
    end = shared_prefix(chosen, rejected)
    if end == 0:
        raise RowFault(
            "no shared beginning",
            columns["rejected"],
            "shares no beginning with chosen that could be the prompt; put the prompt into a column of its own",
        )
    for side, text in (("chosen", chosen), ("rejected", rejected)):
        if not text[end:].strip():
            other = "rejected" if side == "chosen" else "chosen"
            raise RowFault(
                "prompt not told",
                columns[side],
                f"is the beginning of {columns[other]}, so where the prompt ends cannot be told; put the prompt into a column of "
                "its own, or remove the row",
            )
    return chosen[:end], chosen[end:], rejected[end:]
