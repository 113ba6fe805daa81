"""Pairs whose prompt and answers are messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenpref.data.chat import normalize_messages
from tokenpref.data.message_text import messages_of
from tokenpref.data.pairs import Messages, RowFault, checked_text, not_empty, plain_text

__all__ = [
    "CONTEXT_FIELDS",
    "conversation",
    "is_history",
    "joined_input",
    "one_answer",
    "row_tools",
    "side_messages",
]

CONTEXT_FIELDS = ("system", "history", "tools")
"""Columns beside the prompt that only a conversation can contain."""


def _messages(row: Mapping[str, Any], column: str) -> Messages:
    value = messages_of(row[column], column)
    if value is None:
        raise RowFault("no value", column, "has no value; fill it in or remove the row")
    try:
        messages = normalize_messages([_stripped(message) for message in value])
    except TypeError as error:
        raise RowFault("wrong type", column, str(error)) from error
    for message in messages:
        checked_text({column: message["content"]}, column)
    return messages


def conversation(
    row: Mapping[str, Any], columns: Mapping[str, str]
) -> tuple[Messages, dict[str, Any], dict[str, Any]]:
    """Prompt, chosen and rejected answer of a row of messages.

    Raises:
        RowFault: if the row cannot be used.
    """
    sides = [side_messages(row, columns[field]) for field in ("chosen", "rejected")]
    prompt, sides = _prompt_and_sides(row, columns, sides)
    if not prompt:
        raise RowFault(
            "no shared beginning",
            columns["rejected"],
            "shares no first message with chosen, and there is no prompt column",
        )
    prompt = _with_context(prompt, row, columns)
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


def _prompt_and_sides(
    row: Mapping[str, Any], columns: Mapping[str, str], sides: list[Messages]
) -> tuple[Messages, list[Messages]]:
    """The messages before the answers, and what each side has after them."""
    value = row[columns["prompt"]] if "prompt" in columns else None
    if value is None:
        shared = _shared_messages(sides[0], sides[1], columns)
        return sides[0][:shared], [side[shared:] for side in sides]
    if isinstance(value, str) and messages_of(value, columns["prompt"]) is None:
        return _with_text_prompt(joined_input(row, columns), sides, columns)
    prompt = _messages(row, columns["prompt"])
    return prompt, [side[len(prompt) :] if side[: len(prompt)] == prompt else side for side in sides]


def joined_input(row: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    """A text prompt, with the row's input on a new line if it has one."""
    prompt = checked_text(row, columns["prompt"])
    if "input" not in columns or row[columns["input"]] in (None, ""):
        return prompt
    return f"{prompt}\n{checked_text(row, columns['input'])}"


def _with_context(prompt: Messages, row: Mapping[str, Any], columns: Mapping[str, str]) -> Messages:
    """The prompt after the row's system prompt and earlier turns."""
    before = _history(row, columns["history"]) if "history" in columns else []
    system = row[columns["system"]] if "system" in columns else None
    if system is not None and plain_text(system, columns["system"]).strip():
        own = [message["content"] for message in [*before, *prompt] if message["role"] == "system"]
        if own and own != [system]:
            raise RowFault(
                "two system messages",
                columns["system"],
                "holds a system prompt, and the row's messages begin with another one; keep one of them in the data, or leave "
                "the column out with column_map: {system: null}",
            )
        if not own:
            before = [{"role": "system", "content": system}, *before]
    # A system message always comes first.
    if before and prompt[0]["role"] == "system" and before[0]["role"] != "system":
        return [prompt[0], *before, *prompt[1:]]
    return [*before, *prompt]


def is_history(value: object) -> bool:
    """Whether a value is a list, or JSON text of one: earlier turns. A column of that name may also hold plain text."""
    if isinstance(value, str):
        return value.lstrip()[:1] == "["
    return isinstance(value, Sequence)


def _history(row: Mapping[str, Any], column: str) -> Messages:
    """Earlier turns, stored as messages or as pairs of what the user and the assistant said."""
    value = row[column]
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowFault("wrong type", column, "is text, but not a JSON list of earlier turns") from error
    if value in (None, "", []):
        return []
    if isinstance(value, Sequence) and all(isinstance(turn, Mapping) for turn in value):
        return _messages({column: value}, column)
    messages: Messages = []
    for number, turn in enumerate(value if isinstance(value, Sequence) else [value]):
        if not isinstance(turn, Sequence) or isinstance(turn, str) or len(turn) != 2:
            raise RowFault(
                "wrong type",
                column,
                f"turn {number} must be a message, or a list of what the user and what the assistant said",
            )
        for role, said in zip(("user", "assistant"), turn, strict=True):
            messages.append({"role": role, "content": plain_text(said, column)})
    return messages


def side_messages(row: Mapping[str, Any], column: str) -> Messages:
    """The messages of one side. Text is the assistant's message, unless it is JSON text of messages."""
    value = row[column]
    if isinstance(value, str) and messages_of(value, column) is None:
        return [{"role": "assistant", "content": checked_text(row, column)}]
    return _messages(row, column)


def _shared_messages(chosen: Messages, rejected: Messages, columns: Mapping[str, str]) -> int:
    """The number of first messages that both sides share.

    Raises:
        RowFault: if one side continues where the other ends, so that they do not answer the same prompt.
    """
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) == len(rejected):
        return max(shared - 1, 0)  # equal conversations: the last message is the answer
    if shared and shared == min(len(chosen), len(rejected)):
        longer, shorter = ("chosen", "rejected") if len(chosen) > shared else ("rejected", "chosen")
        raise RowFault(
            "different conversations",
            columns[longer],
            f"goes on after the last message of {columns[shorter]} ({len(chosen)} and {len(rejected)} messages), so they are no "
            "two answers to the same prompt; remove the row",
        )
    return shared


def _with_text_prompt(
    prompt: str, sides: list[Messages], columns: Mapping[str, str]
) -> tuple[Messages, list[Messages]]:
    """A text prompt beside lists of messages becomes the user's message, unless the lists already hold the whole conversation."""
    if all(len(side) > 1 for side in sides):
        shared = _shared_messages(sides[0], sides[1], columns)
        before = sides[0][:shared]
        if before and not any(_says(message["content"], prompt) for message in before):
            raise RowFault(
                "prompt not in messages",
                columns["prompt"],
                f"is in none of the messages that {columns['chosen']} and {columns['rejected']} share, which hold a prompt of "
                "their own; leave it out with column_map: {prompt: null}, or keep the answers alone",
            )
        return before, [side[shared:] for side in sides]
    return [{"role": "user", "content": prompt}], sides


def _says(content: str, prompt: str) -> bool:
    """Whether a message contains the prompt or the prompt contains it, as data sets often strip or join them differently."""
    content, prompt = content.strip(), prompt.strip()
    return bool(content) and (content in prompt or prompt in content)


def _answer(side: Messages, column: str) -> dict[str, Any]:
    answer = one_answer(side, column)
    # The template decides whether calls and reasoning are an answer, because it may leave them out.
    if not any(value for key, value in answer.items() if key not in ("role", "content")):
        not_empty(answer["content"], column)
    return answer


def one_answer(side: Messages, column: str) -> dict[str, Any]:
    """The assistant's message, which must be the only one after the prompt."""
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


def row_tools(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[dict[str, Any]] | None:
    """The row's tools: a list of JSON schemas, or JSON text of one; None if there are none."""
    value = row[columns["tools"]] if "tools" in columns else None
    column = columns.get("tools", "tools")
    tools = _from_json(value, column)
    if tools is None or tools == "" or tools == []:
        return None
    if isinstance(tools, Sequence) and not isinstance(tools, str):
        tools = [_from_json(tool, column) for tool in tools]
        if all(isinstance(tool, Mapping) for tool in tools):
            return [_without_nulls(tool) for tool in tools]
    raise RowFault("wrong type", column, "must be a list of JSON schemas of functions, or JSON text of one")


def _from_json(value: Any, column: str) -> Any:
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowFault("wrong type", column, f"holds text that is not JSON ({error})") from error


def _stripped(message: Any) -> Any:
    """A message without the nulls that Arrow adds, because every row gets the keys of all rows."""
    if not isinstance(message, Mapping):
        return message
    return {key: _without_nulls(value) for key, value in message.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value
