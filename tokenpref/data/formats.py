"""The layouts in which people keep preference pairs, read into one."""

from __future__ import annotations

import dataclasses
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from tokenpref.data.chat import normalize_messages
from tokenpref.errors import DataError

__all__ = [
    "FORMATS",
    "LeftOut",
    "PairRow",
    "RowFault",
    "RowReader",
    "detect_format",
    "further_answer",
    "mapped_columns",
    "parse_row",
    "row_reader",
    "shared_prefix",
]

FORMATS = ("explicit", "implicit", "conversational", "hh")
"""What ``format:`` may say besides auto."""

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_MARKS = ("complete", "chosen_complete", "rejected_complete")
_FIELDS = ("prompt", "chosen", "rejected", "tools", *_MARKS)

Messages = list[dict[str, Any]]


class RowFault(Exception):
    """One row cannot be used.

    Args:
        kind: short name under which equal faults are counted.
        column: column at fault, as the data names it.
        message: what is wrong and what to do.
    """

    def __init__(self, kind: str, column: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.column = column
        self.message = message


@dataclass(frozen=True)
class PairRow:
    """A row read from any layout.

    Attributes:
        prompt: text, or the messages before the answer.
        chosen: text, or the assistant's message.
        rejected: text, or the assistant's message.
        chosen_complete: True or False when the row says so, None when it says nothing.
        rejected_complete: likewise.
        tools: JSON schemas of the functions that the assistant may call; conversations only.
        margin: how much better the chosen answer is, where the data says it, in the data's own unit.
        turns: whether an answer is a turn of a conversation, which has an end.
        columns: where both answers stand in the data, for messages.
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
        """The pair with its sides exchanged."""
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
    """A pair that a row does not give though nothing is wrong with it, such as a tie.

    Attributes:
        reason: short name under which pairs like it are counted.
    """

    reason: str


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
        prompt, chosen, rejected = _conversation(row, columns)
        _not_equal(chosen["content"], rejected["content"], columns)
    else:
        texts = [_text(row, columns[field]) for field in ("chosen", "rejected")]
        _not_equal(texts[0], texts[1], columns)
        prompt, *answers = _split_texts(row, texts[0], texts[1], columns, layout)
        for field, answer in zip(("chosen", "rejected"), answers, strict=True):
            _not_empty(answer, columns[field])
        chosen, rejected = answers
    both = _mark(row, columns, "complete")
    marks = [_mark(row, columns, f"{side}_complete") for side in ("chosen", "rejected")]
    chosen_complete, rejected_complete = (both if mark is None else mark for mark in marks)
    tools = _tools(row, columns) if layout == "conversational" else None
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
        messages = _side(row, column)
        own = list(prompt) if not isinstance(prompt, str) else []
        answer = messages[len(own) :] if own and messages[: len(own)] == own else messages
        return _one_answer(answer, column)
    text = _text(row, column)
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
        return _text(row, columns["prompt"]), chosen, rejected
    return (_hh if layout == "hh" else _implicit)(chosen, rejected, columns)


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row[column]
    if value is None:
        raise RowFault("no value", column, "has no value; fill it in or remove the row")
    if not isinstance(value, str):
        raise RowFault("wrong type", column, f"is of type {type(value).__name__}, where this format has text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowFault(
            "broken text", column, f"holds half of a surrogate pair at character {error.start}"
        ) from error
    return value


def _mark(row: Mapping[str, Any], columns: Mapping[str, str], field: str) -> bool | None:
    value = row[columns[field]] if field in columns else None
    if value is not None and not isinstance(value, bool):
        raise RowFault("wrong type", columns[field], f"must be true or false, found {value!r}")
    return value


def _tools(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[dict[str, Any]] | None:
    """The row's tools: a list of JSON schemas, or JSON text of one."""
    value = row[columns["tools"]] if "tools" in columns else None
    if value is None:
        return None
    column = columns["tools"]
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowFault("wrong type", column, f"holds text that is not JSON ({error})") from error
    if not isinstance(value, Sequence) or not all(isinstance(tool, Mapping) for tool in value):
        raise RowFault(
            "wrong type", column, "must be a list of JSON schemas of functions, or JSON text of one"
        )
    return [dict(tool) for tool in value]


def _not_empty(answer: str, column: str) -> None:
    if not answer.strip():
        raise RowFault("empty answer", column, "has no answer (nothing but white space); remove the row")


def _not_equal(chosen: str, rejected: str, columns: Mapping[str, str]) -> None:
    if chosen == rejected:
        raise RowFault(
            "equal answers",
            columns["rejected"],
            f"is equal to {columns['chosen']}, so the pair says nothing; remove the row",
        )


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


def shared_prefix(chosen: str, rejected: str) -> int:
    """Length of the prompt that two texts share.

    The longest common prefix, cut back so that it ends between words: never inside a word, a number or a character with
    combining marks; and white space other than a newline that stands at its end goes to the answers, as it does
    in the vocabularies of most models. Scripts written without spaces may be cut between any two characters.
    """
    end = 0
    while end < min(len(chosen), len(rejected)) and chosen[end] == rejected[end]:
        end += 1
    while 0 < end and _inside_word(chosen, end, rejected):
        end -= 1
    while 0 < end and chosen[end - 1] in " \t":
        end -= 1
    return end


def _inside_word(chosen: str, end: int, rejected: str) -> bool:
    following = [text[end] for text in (chosen, rejected) if end < len(text)]
    if (
        any(unicodedata.combining(char) or char in "\u200d\ufe0f" for char in following)
        or chosen[end - 1] == "\u200d"
    ):
        return True
    return _word_char(chosen[end - 1]) and any(_word_char(char) for char in following)


def _word_char(char: str) -> bool:
    return (char.isalnum() or char in "_'\u2019") and ord(char) < 0x2E80


def _messages(row: Mapping[str, Any], column: str) -> Messages:
    value = row[column]
    if value is None:
        raise RowFault("no value", column, "has no value; fill it in or remove the row")
    try:
        messages = normalize_messages(value)
    except TypeError as error:
        raise RowFault("wrong type", column, str(error)) from error
    for message in messages:
        _text({column: message["content"]}, column)
    return messages


def _conversation(
    row: Mapping[str, Any], columns: Mapping[str, str]
) -> tuple[Messages, dict[str, Any], dict[str, Any]]:
    prompt_value = row[columns["prompt"]] if "prompt" in columns else None
    sides = [_side(row, columns[field]) for field in ("chosen", "rejected")]
    if prompt_value is None:
        shared = _shared_messages(*sides)
        prompt = sides[0][:shared]
        sides = [side[shared:] for side in sides]
    elif isinstance(prompt_value, str):
        prompt, sides = _with_text_prompt(_text(row, columns["prompt"]), sides)
    else:
        prompt = _messages(row, columns["prompt"])
        sides = [side[len(prompt) :] if side[: len(prompt)] == prompt else side for side in sides]
    if not prompt:
        raise RowFault(
            "no shared beginning",
            columns["rejected"],
            "shares no first message with chosen, and there is no prompt column",
        )
    if prompt[-1]["role"] == "assistant":
        raise RowFault(
            "prompt ends with answer",
            columns.get("prompt", columns["chosen"]),
            "ends with an assistant message",
        )
    chosen, rejected = (
        _answer(side, columns[f]) for side, f in zip(sides, ("chosen", "rejected"), strict=True)
    )
    return prompt, chosen, rejected


def _side(row: Mapping[str, Any], column: str) -> Messages:
    if isinstance(row[column], str):
        return [{"role": "assistant", "content": _text(row, column)}]
    return _messages(row, column)


def _shared_messages(chosen: Messages, rejected: Messages) -> int:
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) == len(rejected):
        return max(shared - 1, 0)  # equal conversations: the last message is the answer, and equal
    return shared


def _with_text_prompt(prompt: str, sides: list[Messages]) -> tuple[Messages, list[Messages]]:
    """A text prompt beside lists of messages: the user's message, unless the lists hold the whole conversation already."""
    if all(len(side) > 1 for side in sides):
        shared = _shared_messages(*sides)
        return sides[0][:shared], [side[shared:] for side in sides]
    return [{"role": "user", "content": prompt}], sides


def _answer(side: Messages, column: str) -> dict[str, Any]:
    answer = _one_answer(side, column)
    _not_empty(answer["content"], column)
    return answer


def _one_answer(side: Messages, column: str) -> dict[str, Any]:
    if not side:
        raise RowFault("empty answer", column, "has no message after the shared beginning; remove the row")
    if len(side) > 1 or side[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in side[:5])
        raise RowFault(
            "several turns",
            column,
            f"must have one assistant message after the prompt, found {len(side)} message(s): {roles}",
        )
    return side[0]
