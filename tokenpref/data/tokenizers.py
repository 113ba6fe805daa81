"""What this package asks of a tokenizer, and the ways to get one: ``tokenizer.json`` files and torchtune's own."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import tokenizers

from tokenpref._files import read_text
from tokenpref._paths import resolve_path
from tokenpref.components import nearest
from tokenpref.data.chat import DEFAULT_DATE, RENDERED_VALUES, ChatTemplate
from tokenpref.errors import ConfigError

__all__ = [
    "TOKENIZER_FILES",
    "TOOL_TEMPLATE",
    "JsonTokenizer",
    "Span",
    "Tokenizer",
    "digest",
    "named_template",
    "tokenizer_json",
]

TOOL_TEMPLATE = "additional_chat_templates/tool_use.jinja"
"""The file of transformers for a template for conversations with tools, beside ``chat_template.jinja``."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)
"""Files that together make a tokenizer for transformers."""

Span = tuple[int, int]
"""Half-open range of characters."""


@runtime_checkable
class Tokenizer(Protocol):
    """The tokenizer of this package.

    Attributes:
        eos_id: id that ends an answer.
        pad_id: id used for padding; may equal ``eos_id``, since padding is masked by position and never by id.
        bos_id: id that begins a text, or None.
        vocab_size: largest id plus one.
        special_ids: ids of control tokens; they get empty spans and are left out when decoding.
        stop_ids: ids that end an answer; ``eos_id`` is among them.
        has_chat: whether conversations can be tokenised.
    """

    eos_id: int
    pad_id: int
    bos_id: int | None
    vocab_size: int
    special_ids: frozenset[int]
    stop_ids: frozenset[int]
    has_chat: bool

    def encode_with_offsets(self, text: str, add_bos: bool | None = None) -> tuple[list[int], list[Span]]:
        """Ids of a text and the characters that each token covers.

        Tokens that are parts of one character (byte-level vocabularies) all get that character's span; special tokens
        get an empty span. ``add_bos`` None does what the model's own tokenizer does for plain text. If a text begins
        with the text of BOS, because a chat template wrote it, the ids begin with one BOS for any ``add_bos``. No EOS is
        added.
        """
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of ids, without special tokens."""
        ...

    def decode_special(self, token_id: int) -> str:
        """The text of a special token, such as ``</s>``."""
        ...

    def render_chat(
        self, messages: list[dict], add_generation_prompt: bool, tools: list[dict] | None = None
    ) -> str:
        """A conversation as one text, special tokens included; ``tools`` are JSON schemas of functions it may call."""
        ...

    def fingerprint(self) -> str:
        """sha256 over vocabulary, merges, special tokens and chat template."""
        ...

    def template_fingerprint(self) -> str:
        """sha256 over the chat template alone."""
        ...


def digest(*parts: object) -> str:
    """sha256 (hex) of JSON-like values, independent of the order of dictionary keys."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


class JsonTokenizer:
    """A ``tokenizer.json`` of the ``tokenizers`` library. Build it with :func:`tokenizer_json`.

    Args:
        definition: the parsed ``tokenizer.json``.
        eos_token: text of the token that ends an answer.
        bos_token: text of the token that begins a text, or None.
        pad_token: text of the padding token; None takes the EOS token.
        stop_ids: further ids at which generation stops.
        chat_template: text of a Jinja template, or None.
        tool_template: text of the template for conversations with tools; None takes ``chat_template``.
        chat_template_date: the date that templates are told (``strftime_now``).
        chat_template_kwargs: further variables for the templates, such as ``enable_thinking``.

    Attributes:
        file: the file that it was read from, if any.

    Raises:
        ConfigError: if a named token is not in the vocabulary, or no template reads one of the further variables.
    """

    file: Path | None = None

    def __init__(
        self,
        definition: Mapping[str, Any],
        *,
        eos_token: str,
        bos_token: str | None = None,
        pad_token: str | None = None,
        stop_ids: Iterable[int] = (),
        chat_template: str | None = None,
        tool_template: str | None = None,
        chat_template_date: datetime.date = DEFAULT_DATE,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        # Without the post-processor, nothing is added around the text, and nothing trims the leading space of a
        # token off its span. A truncation or padding saved in the file would silently change texts.
        bare = {**definition, "post_processor": None, "truncation": None, "padding": None}
        self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(bare))
        self._definition = bare
        self.eos_id = self._id_of("eos_token", eos_token)
        self.pad_id = self._id_of("pad_token", pad_token) if pad_token is not None else self.eos_id
        self.bos_id = self._id_of("bos_token", bos_token) if bos_token is not None else None
        self._prefix = self._own_prefix(definition)
        if self.bos_id is None and self._prefix:
            self.bos_id = self._prefix[0]
        added = self._tokenizer.get_added_tokens_decoder()
        named = {self.eos_id, self.pad_id} | ({self.bos_id} if self.bos_id is not None else set())
        self.special_ids = frozenset({token_id for token_id, token in added.items() if token.special} | named)
        self.stop_ids = frozenset({self.eos_id, *stop_ids})
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.has_chat = chat_template is not None
        names = {"eos_token": eos_token, "bos_token": bos_token or "", "pad_token": pad_token or eos_token}
        self._settings = dict(chat_template_kwargs or {})
        self._template, self._tool_template = (
            ChatTemplate(source, names, chat_template_date, self._settings) if source is not None else None
            for source in (chat_template, tool_template)
        )
        self._check_settings(names)

    def _id_of(self, name: str, token: str) -> int:
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise ConfigError(
                f"{name}: {token!r} is not in the tokenizer's vocabulary; name one of its tokens"
            )
        return token_id

    def _check_settings(self, tokens: Iterable[str]) -> None:
        """Refuse variables that no template reads: a misspelt name would change nothing, without notice."""
        key = "tokenizer.chat_template_kwargs"
        templates = [template for template in (self._template, self._tool_template) if template is not None]
        if self._settings and not templates:
            raise ConfigError(f"{key}: the tokenizer has no chat template that could read them; remove them")
        own = {*RENDERED_VALUES, *tokens}
        read = frozenset().union(*(template.variables for template in templates)) if self._settings else set()
        for name in self._settings:
            if name in own:
                raise ConfigError(
                    f"{key}: {name!r} cannot be set here, because the conversation or the tokenizer gives it; remove it"
                )
            if name not in read:
                raise ConfigError(
                    f"{key}: the chat template does not read {name!r}{nearest(name, read - own)}; remove it, or name a "
                    "variable of the template"
                )

    @staticmethod
    def _own_prefix(definition: Mapping[str, Any]) -> list[int]:
        """The ids that the file's post-processor puts before a text (BOS for Llama, nothing for GPT-2)."""
        plain = {**definition, "truncation": None, "padding": None}
        encoding = tokenizers.Tokenizer.from_str(json.dumps(plain)).encode("a", add_special_tokens=True)
        prefix: list[int] = []
        for token_id, special in zip(encoding.ids, encoding.special_tokens_mask, strict=True):
            if not special:
                return prefix
            prefix.append(token_id)
        return []  # all tokens are special: the text gave no token, so what precedes it is unknown

    def encode_with_offsets(self, text: str, add_bos: bool | None = None) -> tuple[list[int], list[Span]]:
        """See :class:`Tokenizer`.

        Raises:
            ConfigError: if ``add_bos`` is True and the tokenizer has no BOS token.
        """
        return self._with_offsets(
            self._tokenizer.encode(text, add_special_tokens=False), self._bos_prefix(add_bos)
        )

    def encode_batch_with_offsets(
        self, texts: Sequence[str], add_bos: bool | None = None
    ) -> list[tuple[list[int], list[Span]]]:
        """Run :meth:`encode_with_offsets` for many texts, in less time.

        Raises:
            ConfigError: if ``add_bos`` is True and the tokenizer has no BOS token.
        """
        prefix = self._bos_prefix(add_bos)
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [self._with_offsets(encoding, prefix) for encoding in encodings]

    def _with_offsets(self, encoding: tokenizers.Encoding, prefix: list[int]) -> tuple[list[int], list[Span]]:
        ids, spans = encoding.ids, encoding.offsets
        if not self.special_ids.isdisjoint(ids):
            spans = [
                (span[0], span[0]) if i in self.special_ids else span
                for i, span in zip(ids, spans, strict=True)
            ]
        if prefix and ids[:1] == prefix[:1]:  # the text already has its BOS
            own = len(prefix) if ids[: len(prefix)] == prefix else 1
            ids, spans = ids[own:], spans[own:]
        return prefix + ids, [(0, 0)] * len(prefix) + spans

    def _bos_prefix(self, add_bos: bool | None) -> list[int]:
        if add_bos is None:
            return list(self._prefix)
        if not add_bos:
            return []
        if self.bos_id is None:
            raise ConfigError("add_bos: true, but the tokenizer has no BOS token; name it with bos_token")
        return list(self._prefix) if self.bos_id in self._prefix else [self.bos_id]

    def decode(self, ids: list[int]) -> str:
        """See :class:`Tokenizer`."""
        return self._tokenizer.decode(
            [i for i in ids if i not in self.special_ids], skip_special_tokens=False
        )

    def decode_special(self, token_id: int) -> str:
        """See :class:`Tokenizer`."""
        return self._tokenizer.id_to_token(token_id) or ""

    def render_chat(
        self, messages: list[dict], add_generation_prompt: bool, tools: list[dict] | None = None
    ) -> str:
        """See :class:`Tokenizer`.

        Raises:
            ConfigError: if there is no chat template.
            TemplateError: if the template refuses the conversation.
        """
        if self._template is None:
            raise ConfigError(
                "the data holds conversations, but the tokenizer has no chat template: put chat_template.jinja or a "
                "tokenizer_config.json with chat_template beside tokenizer.json, or set tokenizer.chat_template"
            )
        template = self._template
        if tools and self._tool_template is not None:
            template = self._tool_template
        return template.render(messages, add_generation_prompt, tools)

    @property
    def chat_template(self) -> str | None:
        """The text of its chat template, if it has one."""
        return self._template.source if self._template is not None else None

    @property
    def tool_template(self) -> str | None:
        """The text of its template for conversations with tools, if it has a separate one."""
        return self._tool_template.source if self._tool_template is not None else None

    def fingerprint(self) -> str:
        """See :class:`Tokenizer`."""
        return digest(
            "json", self._definition, self.eos_id, self.bos_id, self._prefix, *self._described_templates()
        )

    def template_fingerprint(self) -> str:
        """See :class:`Tokenizer`."""
        return digest(*self._described_templates())

    def _described_templates(self) -> list[Any]:
        """Everything that decides how conversations are rendered. The date counts only if a template asks for it."""
        templates = [template for template in (self._template, self._tool_template) if template is not None]
        described: list[Any] = [template.source for template in templates] or [None]
        if any(template.depends_on_date for template in templates):
            described.append(templates[0].date.isoformat())
        if self._settings:
            described.append(self._settings)
        return described


def tokenizer_json(
    path: str | Path,
    *,
    chat_template: str | None = None,
    eos_token: str | None = None,
    bos_token: str | None = None,
    pad_token: str | None = None,
    chat_template_date: str | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> JsonTokenizer:
    """Load a tokenizer from a ``tokenizer.json`` and the files beside it.

    Settings that are not given are read, in this order, from ``tokenizer_config.json``, ``special_tokens_map.json``,
    ``generation_config.json`` and ``config.json``; the chat template from ``chat_template.jinja``, then
    ``chat_template.json``, then ``tokenizer_config.json``.

    Args:
        path: ``tokenizer.json``, or the folder of a Hugging Face checkpoint that holds one; ``package://`` paths work.
        chat_template: text of a Jinja template, or the path of a file that ends in ``.jinja``.
        eos_token: text of the token that ends an answer.
        bos_token: text of the token that begins a text.
        pad_token: text of the padding token. Without one, the EOS token is used, because padding is masked by position.
        chat_template_date: the date for chat templates that ask for today's (``strftime_now``), such as
            ``2025-01-31``; None is 2024-07-26, the date in Llama 3's own template.
        chat_template_kwargs: further variables for the chat template, such as ``{enable_thinking: false}``. The template has
            to read each of them.

    Raises:
        ConfigError: if the file is missing or broken, no EOS token is found, a named token is not in the vocabulary, the
            date is none, or the chat template does not read one of the further variables.
    """
    file = resolve_path(path)
    if file.is_dir():
        file = file / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(
            f"tokenizer.path: no file {file}; give a tokenizer.json or the folder that holds it"
        )
    definition = _read_json(file)
    folder = file.parent
    beside = _Beside(folder, dict(_vocabulary(definition, file)))
    eos = eos_token or beside.token("eos")
    if eos is None:
        raise ConfigError(
            f"tokenizer: nothing beside {file} names the EOS token (tokenizer_config.json, special_tokens_map.json, "
            "generation_config.json, config.json); set tokenizer.eos_token"
        )
    tokenizer = JsonTokenizer(
        definition,
        eos_token=eos,
        bos_token=bos_token or beside.token("bos"),
        pad_token=pad_token or beside.token("pad"),
        stop_ids=beside.ids("eos"),
        chat_template=_given_template(chat_template) if chat_template is not None else beside.chat_template(),
        tool_template=beside.tool_template() if chat_template is None else None,
        chat_template_date=_date(chat_template_date),
        chat_template_kwargs=_template_settings(chat_template_kwargs),
    )
    tokenizer.file = file
    return tokenizer


def _date(value: object) -> datetime.date:
    if value is None:
        return DEFAULT_DATE
    try:
        return datetime.date.fromisoformat(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"tokenizer.chat_template_date: must be a date such as 2024-07-26, got {value!r}"
        ) from error


def _template_settings(value: object) -> dict[str, Any]:
    if value is None:
        return {}
    key = "tokenizer.chat_template_kwargs"
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ConfigError(
            f"{key}: must be a mapping from variables of the template to values, such as {{enable_thinking: false}}, got "
            f"{value!r}"
        )
    try:
        json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}: values must be those of JSON ({error}); set others") from error
    return dict(value)


def _vocabulary(definition: Mapping[str, Any], file: Path) -> Iterable[tuple[str, int]]:
    plain = {**definition, "truncation": None, "padding": None}
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(plain))
    # The library raises a plain Exception for anything that it cannot parse, which becomes our error.
    except Exception as error:
        raise ConfigError(f"tokenizer.path: {file} cannot be read as a tokenizer.json ({error})") from error
    return tokenizer.get_vocab(with_added_tokens=True).items()


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file} holds a JSON {type(value).__name__}, not an object")
    return value


def _given_template(chat_template: str) -> str:
    if not chat_template.endswith(".jinja"):
        return chat_template
    file = resolve_path(chat_template)
    if not file.is_file():
        raise ConfigError(f"tokenizer.chat_template: no file {file}")
    return read_text(file, ConfigError)


class _Beside:
    """Settings in the files beside a ``tokenizer.json``."""

    def __init__(self, folder: Path, vocabulary: Mapping[str, int]) -> None:
        self._folder = folder
        self._token_of = {token_id: token for token, token_id in vocabulary.items()}
        self._named = [self._optional("tokenizer_config.json"), self._optional("special_tokens_map.json")]
        self._numbered = [self._optional("generation_config.json"), self._optional("config.json")]

    def _optional(self, name: str) -> dict[str, Any]:
        file = self._folder / name
        return _read_json(file) if file.is_file() else {}

    def token(self, kind: str) -> str | None:
        """The text of the eos, bos or pad token, or None."""
        for settings in self._named:
            token = settings.get(f"{kind}_token")
            if isinstance(token, Mapping):
                token = token.get("content")
            if isinstance(token, str):
                return token
        for token_id in self.ids(kind):
            if token_id in self._token_of:
                return self._token_of[token_id]
        return None

    def ids(self, kind: str) -> list[int]:
        """Ids that the model's configuration gives for a kind of token; generation may stop at several."""
        for settings in self._numbered:
            value = settings.get(f"{kind}_token_id")
            if isinstance(value, int):
                return [value]
            if isinstance(value, Sequence):
                return [int(v) for v in value]
        return []

    def chat_template(self) -> str | None:
        file = self._folder / "chat_template.jinja"
        if file.is_file():
            return read_text(file, ConfigError)
        for settings in (self._optional("chat_template.json"), self._named[0]):
            template = named_template(settings.get("chat_template"), "default")
            if template is not None:
                return template
        return None

    def tool_template(self) -> str | None:
        """The template that transformers uses for conversations with tools, if there is a separate one."""
        file = self._folder / TOOL_TEMPLATE
        if file.is_file():
            return read_text(file, ConfigError)
        if (self._folder / "chat_template.jinja").is_file():
            return None  # transformers then reads none from the configuration
        return named_template(self._named[0].get("chat_template"), "tool_use")


def named_template(value: object, name: str) -> str | None:
    """tokenizer_config.json holds one template, which is the default one, or a list of named ones."""
    if isinstance(value, str):
        return value if name == "default" else None
    if isinstance(value, Sequence):
        return next((t["template"] for t in value if t.get("name") == name), None)
    return None
