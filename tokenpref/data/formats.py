"""The layouts in which people keep preference pairs, read into one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from tokenpref.data.boundary import shared_prefix
from tokenpref.data.conversations import conversation, one_answer, row_tools, side_messages
from tokenpref.data.pairs import LeftOut, Messages, PairRow, RowFault, checked_text, not_empty, not_equal
from tokenpref.errors import DataError

__all__ = [
    "FORMATS",
    "RowReader",
    "detect_format",
    "further_answer",
    "mapped_columns",
    "parse_row",
    "row_reader",
]

FORMATS = ("explicit", "implicit", "conversational", "hh")
"""What ``format:`` may say besides auto."""

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_MARKS = ("complete", "chosen_complete", "rejected_complete")
_FIELDS = ("prompt", "chosen", "rejected", "tools", *_MARKS)


@dataclass(frozen=True)
class RowReader:
    """How the rows of a data set give pairs. Picklable, so that several processes may read with it.

    Attributes:
        layout: format of the rows, found or declared.
        fields: field of a pair to column of the data.
        columns: columns of the source that reading needs.
        conversations: whether answers are messages, which need a chat template.
    """

    layout: str
    fields: dict[str, str]
    columns: tuple[str, ...]
    conversations: bool

    def read(self, row: Mapping[str, Any]) -> list[PairRow | LeftOut | RowFault]:
        """What a row of the source gives: as a rule one pair, or what is wrong with it.

        The position in the list is the number of the pair within its row; it depends on the row and the settings alone.
        """
        try:
            return [parse_row(row, self.fields, self.layout)]
        except RowFault as fault:
            return [fault]

    def further_answer(
        self, row: Mapping[str, Any], column: str, prompt: str | Messages
    ) -> str | dict[str, Any]:
        """Another answer to the prompt of a row's pair; see :func:`further_answer`."""
        return further_answer(row, column, prompt, self.layout)

    def settings(self) -> dict[str, Any]:
        """All that decides how a row is read, as plain data: for addresses of caches."""
        return dataclasses.asdict(self)


def row_reader(
    table: datasets.Dataset, source: str, *, format: str = "auto", column_map: Mapping[str, str] | None = None
) -> RowReader:
    """The reader of a data set's rows.

    Args:
        table: its rows.
        source: its name, for messages.
        format: ``auto`` or one of :data:`FORMATS`.
        column_map: field to column.

    Raises:
        DataError: if the columns or the first rows are not of this format.
    """
    fields = mapped_columns(table.column_names, column_map, source)
    columns = tuple(sorted(set(fields.values())))
    layout = detect_format(_first_full(table.select_columns(list(columns)), fields), fields, format, source)
    return RowReader(layout, fields, columns, layout == "conversational")


def _first_full(rows: datasets.Dataset, fields: Mapping[str, str]) -> dict[str, Any]:
    """A row that shows the layout: the first one without a missing field, or the first one if all miss something."""
    needed = [fields[f] for f in ("prompt", "chosen", "rejected") if f in fields]
    return next((row for row in rows if all(row[f] is not None for f in needed)), rows[0])


def mapped_columns(
    available: Sequence[str], column_map: Mapping[str, str] | None, source: str
) -> dict[str, str]:
    """Which column of the data holds which field.

    Args:
        available: the data's columns.
        column_map: field (prompt, chosen, rejected, tools, complete, chosen_complete, rejected_complete) to column.
        source: the data's name, for messages.

    Returns:
        Field to column, for the fields that the data has.

    Raises:
        DataError: if a mapped column, ``chosen`` or ``rejected`` does not exist, or a key is no field.
    """
    column_map = dict(column_map or {})
    found = ", ".join(available)
    for field, column in column_map.items():
        if field not in _FIELDS:
            raise DataError(
                f"column_map: {field!r} is no field; map {', '.join(_FIELDS)} to columns of the data"
            )
        if column not in available:
            raise DataError(
                f"column_map: {source} has no column {column!r} for {field}; its columns are {found}"
            )
    columns = {f: column_map.get(f, f) for f in _FIELDS if column_map.get(f, f) in available}
    for field in ("chosen", "rejected"):
        if field not in columns:
            raise DataError(
                f"{source} has no column {field!r}; its columns are {found}. Say which one it is: "
                f"column_map: {{{field}: <column>}}"
            )
    return columns


def detect_format(row: Mapping[str, Any], columns: Mapping[str, str], declared: str, source: str) -> str:
    """The layout of a data set, judged by one row.

    Args:
        row: a row that has its fields.
        columns: field to column, from :func:`mapped_columns`.
        declared: ``auto`` or one of :data:`FORMATS`.
        source: the data's name, for messages.

    Raises:
        DataError: if ``declared`` is unknown or is not what the row looks like; the message names what was found.
    """
    if declared not in ("auto", *FORMATS):
        raise DataError(f"format must be one of auto, {', '.join(FORMATS)}; got {declared!r}")
    found, why = _looks_like(row, columns)
    # HH-RLHF text is text with a shared beginning too, so reading it as such is a choice that may be made.
    if declared in ("auto", found) or (declared, found) == ("implicit", "hh"):
        return found if declared == "auto" else declared
    raise DataError(
        f"format: {declared} was set, but {source} looks like {found} ({why}); set format: {found} or auto"
    )


def _looks_like(row: Mapping[str, Any], columns: Mapping[str, str]) -> tuple[str, str]:
    chosen = row[columns["chosen"]]
    prompt = row[columns["prompt"]] if "prompt" in columns else None
    if any(isinstance(v, Sequence) and not isinstance(v, str) for v in (chosen, prompt)):
        return "conversational", "its fields are lists of messages"
    if "prompt" in columns:
        return "explicit", f"it has a column {columns['prompt']!r} with text"
    if isinstance(chosen, str) and chosen.lstrip().startswith(_HUMAN.strip()) and _ASSISTANT in chosen:
        return "hh", "chosen is text that begins with 'Human:' and holds 'Assistant:'"
    return "implicit", "chosen and rejected are text and there is no prompt column"


def parse_row(row: Mapping[str, Any], columns: Mapping[str, str], layout: str) -> PairRow:
    """One row in one layout.

    Raises:
        RowFault: if the row cannot be used.
    """
    prompt: str | Messages
    chosen: str | dict[str, Any]
    rejected: str | dict[str, Any]
    if layout == "conversational":
        prompt, chosen, rejected = conversation(row, columns)
        not_equal(chosen["content"], rejected["content"], columns)
    else:
        texts = [checked_text(row, columns[field]) for field in ("chosen", "rejected")]
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
    """Another answer to a row's prompt, from a column laid out like those of the pair.

    Args:
        row: the row.
        column: where the answer stands.
        prompt: the prompt of the row's pair.
        layout: the pair's format; with ``implicit`` and ``hh`` the column repeats the prompt.

    Returns:
        Text, or the assistant's message; its text may be empty.

    Raises:
        RowFault: if the column has no value, or one of another layout or to another prompt.
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
        return checked_text(row, columns["prompt"]), chosen, rejected
    return (_hh if layout == "hh" else _implicit)(chosen, rejected, columns)


def _mark(row: Mapping[str, Any], columns: Mapping[str, str], field: str) -> bool | None:
    value = row[columns[field]] if field in columns else None
    if value is not None and not isinstance(value, bool):
        raise RowFault("wrong type", columns[field], f"must be true or false, found {value!r}")
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
    return chosen[:end], chosen[end:], rejected[end:]
