"""Conversations: one shape for messages, and chat templates rendered as transformers renders them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tokenpref.errors import ConfigError

__all__ = ["ChatTemplate", "TemplateError", "normalize_messages"]

# Role names of the sharegpt layout ({"from": ..., "value": ...}) and of other common exports.
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "ipython": "tool"}


class TemplateError(ValueError):
    """A chat template refused a conversation; the message is the template's own."""


def normalize_messages(value: object) -> list[dict[str, Any]]:
    """A conversation as a list of ``{"role", "content"}`` dictionaries.

    Args:
        value: list of ``{"role", "content"}`` or of ``{"from", "value"}`` (sharegpt: human, gpt, system). Content may be a
            string or a list of ``{"type": "text", "text": ...}`` parts, which are joined. Further keys that are not
            None are kept for the template.

    Raises:
        TypeError: if it is no list of messages; the message says what was found.
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
    for role_key, text_key in (("role", "content"), ("from", "value")):
        if role_key in kept and text_key in kept:
            role = kept.pop(role_key)
            content = _content_text(kept.pop(text_key), position)
            if not isinstance(role, str):
                raise TypeError(f"message {position} has a role of type {type(role).__name__}, not a string")
            return {"role": _ROLES.get(role, role), "content": content, **kept}
    raise TypeError(
        f"message {position} has the keys {sorted(kept)}, not role and content (or from and value)"
    )


def _content_text(content: object, position: int) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        parts = []
        for part in content:
            text = part.get("text", part.get("content")) if isinstance(part, Mapping) else None
            if not isinstance(text, str) or part.get("type", "text") != "text":
                raise TypeError(
                    f"message {position} holds something other than text; only text can be trained on"
                )
            parts.append(text)
        return "".join(parts)
    raise TypeError(f"message {position} has content of type {type(content).__name__}, not a string")


class _GenerationTag(Extension):
    """``{% generation %}``: marks assistant text for transformers' masks; here its body is rendered as it stands."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(value: object, indent: int | None = None, ensure_ascii: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    # strftime_now is left out on purpose: a template that prints today's date would change the training ids, and with
    # them every stored weight, from one day to the next. Templates test for it and fall back to a fixed date.
    return environment


class ChatTemplate:
    """A Jinja chat template, run in Jinja's immutable sandbox.

    Args:
        source: the template's text.
        special_tokens: what the template may name, such as ``bos_token`` and ``eos_token``.

    Raises:
        ConfigError: if the template has a syntax error.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        self.source = source
        self.special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"chat_template: line {error.lineno}: {error.message}") from error

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
            TemplateError: if the template raises on this conversation, or writes what is no text.
        """
        try:
            text = self._template.render(
                messages=list(messages),
                tools=list(tools) if tools is not None else None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self.special_tokens,
            )
        except jinja2.TemplateError as error:
            raise TemplateError(str(error)) from error
        # Content is checked before; a role, a name or a tool call is not.
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            before = text[max(error.start - 20, 0) : error.start]
            raise TemplateError(f"it writes half of a surrogate pair after {before!r}") from error
        return text
