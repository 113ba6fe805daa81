"""Messages that a column keeps in another shape: one message alone, a struct of lists, or text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenpref.data.pairs import RowFault

__all__ = ["messages_of", "refuse_messages"]

_KEYS = (("role", "content"), ("from", "value"))
_ROLES = ("system", "user", "assistant", "tool", "human", "gpt")
_BEGINS = re.compile(r"\s*(?:array\()?\[?\s*\{")
# A message in JSON, or as Python prints it.
_MESSAGE = re.compile(r"""["'](?:role|from)["']\s*:\s*["'](?:system|user|assistant|tool|human|gpt)["']""")


def messages_of(value: Any, column: str) -> list[Any] | None:
    """The list of messages that a value holds; None if it is None or text that holds none.

    Args:
        value: a list, which is taken as it is; a struct, which is one message or a struct of lists; or text.
        column: for messages.

    Raises:
        RowFault: if it is text that holds messages in a form that cannot be read, such as Python's, or none of these.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return _from_text(value, column)
    if isinstance(value, Mapping):
        return _from_struct(value)
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise RowFault("wrong type", column, f"expected a list of messages, found {type(value).__name__}")
    return list(value)


def refuse_messages(text: str, column: str) -> None:
    """Refuse text that holds messages where it would be trained on as it stands.

    Raises:
        RowFault: if it does.
    """
    if _from_text(text, column) is not None:
        raise RowFault(
            "messages as text",
            column,
            "is JSON text of messages, and this format would train on the JSON itself; set format: conversational (or auto, "
            "with a first row that has messages too)",
        )


def _from_text(text: str, column: str) -> list[Any] | None:
    if not _BEGINS.match(text):
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not _MESSAGE.search(text):
            return None
        raise RowFault(
            "messages as text",
            column,
            "is text that begins like a list of messages and is not JSON (Python prints such lists with single quotes); write "
            "them with json.dumps, or as a column of lists",
        ) from error
    if isinstance(found, Mapping) and any(
        found.get(role) in _ROLES and text in found for role, text in _KEYS
    ):
        return [found]
    if isinstance(found, list) and found and all(_is_message(message) for message in found):
        return found
    return None


def _is_message(value: object) -> bool:
    return isinstance(value, Mapping) and any(role in value and text in value for role, text in _KEYS)


def _from_struct(value: Mapping[str, Any]) -> list[Any]:
    """One message, or the messages of a struct of lists, as older versions of ``datasets`` keep a list of structs."""
    lists = {key: part for key, part in value.items() if part is not None}
    for role, _ in _KEYS:
        size = len(lists[role]) if isinstance(lists.get(role), list) else None
        if size is not None and all(isinstance(part, list) and len(part) == size for part in lists.values()):
            return [dict(zip(lists, parts, strict=True)) for parts in zip(*lists.values(), strict=True)]
    return [value]
