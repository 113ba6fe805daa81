"""Conversations: one form for messages, and chat templates that are rendered as in transformers."""

from __future__ import annotations

import datetime
import traceback
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from tokenpref.data.template_environment import (
    LimitExceeded,
    TimeExceeded,
    compile_template,
    limited,
    variables_of,
)
from tokenpref.errors import ConfigError

__all__ = [
    "CALL_KEYS",
    "DEFAULT_DATE",
    "REASONING_KEYS",
    "RENDERED_VALUES",
    "ChatTemplate",
    "TemplateError",
    "normalize_messages",
    "reasoning_key",
]

DEFAULT_DATE = datetime.date(2024, 7, 26)
"""The date for templates that ask for one. It is the default of Llama 3's templates."""

REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Keys of messages for reasoning; the first is the one that most templates use."""

CALL_KEYS = ("tool_calls", "function_call")
"""Keys of messages for the assistant's calls."""

RENDERED_VALUES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
"""Variables of templates that belong to the conversation."""

_REASONING_PARTS = ("thinking", "reasoning", "text", "content")  # the key of the text in parts of these types
_MAX_OVERRUNS = (
    3  # after so many renderings that exceed the time limit, the template is at fault and not the row
)
_LONGEST_MESSAGE = 300

# Role names of the sharegpt layout ({"from": ..., "value": ...}) and of other common exports.
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "ipython": "tool"}


class TemplateError(ValueError):
    """A chat template refused a conversation. The message is the template's."""


def normalize_messages(value: object) -> list[dict[str, Any]]:
    """A conversation as a list of ``{"role", "content"}`` dictionaries.

    Args:
        value: list of ``{"role", "content"}`` or of ``{"from", "value"}`` (sharegpt: human, gpt, system). Content may be a
            string or a list of parts: ``{"type": "text", "text": ...}`` are joined, and ``thinking`` or ``reasoning`` before
            them becomes ``reasoning_content``. A message with calls or reasoning may have no content. Further keys that
            are not None are kept for the template.

    Raises:
        TypeError: if it is not a list of messages; the error says what was found.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise TypeError(f"expected a list of messages, found {type(value).__name__}")
    return [_normalize_message(message, position) for position, message in enumerate(value)]


def _normalize_message(message: object, position: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise TypeError(
            f"message {position} is a {type(message).__name__}, not a dictionary with role and content"
        )
    kept = {key: value for key, value in message.items() if value is not None}
    if any(kept.get(key) for key in (*CALL_KEYS, *REASONING_KEYS)):
        kept.setdefault("content" if "role" in kept else "value", "")
    for role_key, text_key in (("role", "content"), ("from", "value")):
        if role_key in kept and text_key in kept:
            role = kept.pop(role_key)
            content, reasoning = _content_text(kept.pop(text_key), position)
            if not isinstance(role, str):
                raise TypeError(f"message {position} has a role of type {type(role).__name__}, not a string")
            if reasoning is not None:
                key = reasoning_key(kept)
                if key is not None and kept[key] != reasoning:
                    raise TypeError(f"message {position} has reasoning both in its content and in {key}")
                kept["reasoning_content"] = reasoning
            return {"role": _ROLES.get(role, role), "content": content, **kept}
    raise TypeError(
        f"message {position} has the keys {sorted(kept)}, not role and content (or from and value)"
    )


def _content_text(content: object, position: int) -> tuple[str, str | None]:
    """The text of a message, and the reasoning in parts before it."""
    if isinstance(content, str):
        return content, None
    if not isinstance(content, Sequence):
        raise TypeError(f"message {position} has content of type {type(content).__name__}, not a string")
    texts: list[str] = []
    reasoning: list[str] = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        text = _part_text(part, kind)
        if text is None:
            raise TypeError(f"message {position} has a part of type {kind!r}; only text can be trained on")
        if kind == "text":
            texts.append(text)
        elif texts:
            raise TypeError(f"message {position} has {kind} after text, which templates cannot render")
        else:
            reasoning.append(text)
    return "".join(texts), "".join(reasoning) if reasoning else None


def _part_text(part: object, kind: object) -> str | None:
    """The text of a part of a message, or None if it is not text."""
    keys = {"text": ("text", "content"), "thinking": _REASONING_PARTS, "reasoning": _REASONING_PARTS}
    if not isinstance(part, Mapping) or kind not in keys:
        return None
    return next((part[key] for key in keys[kind] if isinstance(part.get(key), str)), None)


class ChatTemplate:
    """A Jinja chat template, rendered as in transformers.

    It runs in Jinja's immutable sandbox, with a bound on its time and on what it writes
    (:mod:`tokenpref.data.template_environment`).

    Args:
        source: the template's text.
        special_tokens: variables for the template, such as ``bos_token`` and ``eos_token``.
        date: the date that ``strftime_now`` writes. Today's date would change the training ids, and so invalidate stored
            weights, every day.
        settings: further variables for the template, such as ``enable_thinking``.

    Raises:
        ConfigError: if the template cannot be compiled.
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        date: datetime.date = DEFAULT_DATE,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens)
        self.date = date
        self.settings = dict(settings or {})
        self._overruns = 0
        try:
            self._template = compile_template(source, date)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"chat_template: line {error.lineno}: {error.message}") from error
        # A template that Jinja accepts may still not compile in Python (loops nested 21 deep, a break
        # outside of a loop).
        except Exception as error:
            raise ConfigError(f"chat_template: cannot be compiled ({_described(error)})") from error

    def __reduce__(self) -> tuple[type, tuple[str, dict[str, str], datetime.date, dict[str, Any]]]:
        return type(self), (self.source, self.special_tokens, self.date, self.settings)

    @property
    def depends_on_date(self) -> bool:
        """Whether the template asks for the date."""
        return "strftime_now" in self.source

    @property
    def variables(self) -> frozenset[str]:
        """The names of all variables that the template reads."""
        return variables_of(self.source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The conversation as one text.

        Args:
            messages: dictionaries with role and content.
            add_generation_prompt: end with the header after which the assistant writes.
            tools: JSON schemas of the functions that the assistant may call.

        Raises:
            TemplateError: if the template fails on this conversation, exceeds a limit, or writes invalid text.
            ConfigError: if it exceeded the time limit for several conversations.
        """
        try:
            with limited():
                text = self._template.render(
                    messages=[_with_reasoning_names(message) for message in messages],
                    tools=list(tools) if tools is not None else None,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    **self.special_tokens,
                    **self.settings,
                )
        except TimeExceeded as error:
            self._overruns += 1
            if self._overruns < _MAX_OVERRUNS:
                raise TemplateError(str(error)) from error
            raise ConfigError(
                f"chat_template: {error}, and did so {self._overruns} times; use a template that ends sooner"
            ) from error
        # A template is a program that came with a model. Any exception counts as a fault of the row.
        except Exception as error:
            raise TemplateError(_described(error)) from error
        # Content was checked before; roles, names and tool calls were not.
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            before = text[max(error.start - 20, 0) : error.start]
            raise TemplateError(f"it writes half of a surrogate pair after {before!r}") from error
        return text


def _with_reasoning_names(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with its reasoning under the keys that templates use, as in transformers."""
    key = reasoning_key(message)
    if key is None:
        return message
    return {"thinking": message[key], **message, "reasoning_content": message[key]}


def reasoning_key(message: Mapping[str, Any]) -> str | None:
    """The key of a message's reasoning, or None."""
    return next((key for key in REASONING_KEYS if message.get(key) is not None), None)


def _described(error: Exception) -> str:
    """A template's error in one line: its message, or the kind of error and the template's line."""
    message = " ".join(str(error).split())
    if len(message) > _LONGEST_MESSAGE:
        message = f"{message[:_LONGEST_MESSAGE]}..."
    if isinstance(error, jinja2.TemplateError | LimitExceeded):
        return message or type(error).__name__
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if _is_template(frame)]
    where = f" in line {lines[-1]}" if lines else ""
    return f"{type(error).__name__}{where}{': ' if message else ''}{message}"


def _is_template(frame: types.FrameType) -> bool:
    return frame.f_code.co_filename == "<template>"
