"""Pairs whose prompt and answers are messages."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenpref.data.chat import normalize_messages
from tokenpref.data.pairs import Messages, RowFault, checked_text, not_empty

__all__ = ["conversation", "one_answer", "row_tools", "side_messages"]


def _messages(row: Mapping[str, Any], column: str) -> Messages:
    value = row[column]
    if value is None:
        raise RowFault("no value", column, "has no value; fill it in or remove the row")
    try:
        messages = normalize_messages(value)
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
    prompt_value = row[columns["prompt"]] if "prompt" in columns else None
    sides = [side_messages(row, columns[field]) for field in ("chosen", "rejected")]
    if prompt_value is None:
        shared = _shared_messages(*sides)
        prompt = sides[0][:shared]
        sides = [side[shared:] for side in sides]
    elif isinstance(prompt_value, str):
        prompt, sides = _with_text_prompt(checked_text(row, columns["prompt"]), sides)
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


def side_messages(row: Mapping[str, Any], column: str) -> Messages:
    """Messages of one side; text is the assistant's message."""
    if isinstance(row[column], str):
        return [{"role": "assistant", "content": checked_text(row, column)}]
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
    answer = one_answer(side, column)
    not_empty(answer["content"], column)
    return answer


def one_answer(side: Messages, column: str) -> dict[str, Any]:
    """The assistant's message that is all there may be after the prompt."""
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
