"""Adapts torchtune's tokenizers to this package's protocol: character spans, the rule for BOS, and conversations."""

from __future__ import annotations

import copy
import hashlib
import inspect
import itertools
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tokenpref._torchtune import Message
from tokenpref.data.chat import CALL_KEYS, REASONING_KEYS
from tokenpref.data.tokenizers import JsonTokenizer, Span, Tokenizer, digest
from tokenpref.errors import ConfigError

__all__ = ["ChatTokens", "TorchtuneTokenizer", "adapt_torchtune"]

# SentencePiece writes a space as this character.
_SPACE_MARK = "\u2581"


@dataclass(frozen=True)
class ChatTokens:
    """A conversation that torchtune's tokenizer has tokenised.

    Attributes:
        ids: all token ids.
        start: index of the answer's first token. The header of the answer's message belongs to the prompt.
        spans: the characters of ``text`` that each answer token covers.
        text: the answer's text.
        has_eos: whether the answer ends with the token that ends a turn.
    """

    ids: list[int]
    start: int
    spans: list[Span]
    text: str
    has_eos: bool


class _Codec(Protocol):
    """Converts between text and token ids for one family of vocabularies, without BOS and EOS."""

    def encode(self, text: str) -> tuple[list[int], list[Span]]: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def size(self) -> int: ...

    def fingerprint(self) -> str: ...


def spans_from_bytes(text: str, pieces: Sequence[bytes]) -> list[Span]:
    """The character spans of pieces of bytes whose concatenation is a text in UTF-8.

    A piece that begins or ends inside a character covers the whole character.

    Raises:
        ValueError: if the pieces do not add up to the text.
    """
    if b"".join(pieces) != text.encode("utf-8"):
        raise ValueError(f"the tokenizer does not reproduce the text {text[:60]!r}; spans cannot be found")
    char_of_byte = [i for i, char in enumerate(text) for _ in range(len(char.encode("utf-8")))]
    spans, position = [], 0
    for piece in pieces:
        end = position + len(piece)
        spans.append(
            (char_of_byte[position], char_of_byte[end - 1] + 1)
            if piece
            else (_at(char_of_byte, position),) * 2
        )
        position = end
    return spans


def _at(char_of_byte: Sequence[int], position: int) -> int:
    if position < len(char_of_byte):
        return char_of_byte[position]
    return char_of_byte[-1] + 1 if char_of_byte else 0


class _TiktokenCodec:
    """Vocabulary of torchtune's TikTokenBaseTokenizer. It reads special tokens in a text as ordinary text."""

    def __init__(self, base: Any) -> None:
        self._base = base
        self._encoding = base.tt_model

    def encode(self, text: str) -> tuple[list[int], list[Span]]:
        ids = self._base.encode(text, add_bos=False, add_eos=False)
        return ids, spans_from_bytes(text, self._encoding.decode_tokens_bytes(ids))

    def token_bytes(self, token_id: int) -> bytes:
        return self._encoding.decode_single_token_bytes(token_id)

    def size(self) -> int:
        return self._encoding.n_vocab

    def fingerprint(self) -> str:
        hasher = hashlib.sha256(self._encoding._pat_str.encode("utf-8"))
        for token, rank in sorted(self._encoding._mergeable_ranks.items()):
            hasher.update(f"{rank}:{token.hex()};".encode())
        return hasher.hexdigest()


class _ByteLevelCodec:
    """Vocabulary of torchtune's Qwen2Tokenizer and GPT2BaseTokenizer: byte-level BPE from vocab.json and merges.txt."""

    def __init__(self, base: Any, special_tokens: Mapping[str, int]) -> None:
        self._base = base
        self._special_text = {token_id: token for token, token_id in special_tokens.items()}

    def encode(self, text: str) -> tuple[list[int], list[Span]]:
        ids = self._base.encode(text, add_bos=False, add_eos=False)
        for token_id in ids:
            if token_id not in self._base.decoder and token_id not in self._special_text:
                raise ValueError(
                    f"the text {text[:60]!r} holds a byte that is not in the tokenizer's vocabulary"
                )
        pieces = [self.token_bytes(i) for i in ids]
        composed = unicodedata.normalize("NFC", text)
        if b"".join(pieces) == text.encode("utf-8"):
            return ids, spans_from_bytes(text, pieces)
        # Qwen's tokenizer first composes characters (NFC). Its spans are translated to the text before that.
        origin = _composed_origin(text)
        return ids, [_through(origin, span) for span in spans_from_bytes(composed, pieces)]

    def token_bytes(self, token_id: int) -> bytes:
        if token_id in self._special_text:
            return self._special_text[token_id].encode("utf-8")
        return bytes(self._base.byte_decoder[char] for char in self._base.decoder[token_id])

    def size(self) -> int:
        return max(itertools.chain(self._base.decoder, self._special_text)) + 1

    def fingerprint(self) -> str:
        merges = sorted((rank, list(pair)) for pair, rank in self._base.bpe_ranks.items())
        return digest(self._base.encoder, merges, self._base.pat.pattern)


def _composed_origin(text: str) -> list[Span]:
    """For each character of the NFC form of a text, the span of the characters that were composed into it."""
    clusters: list[tuple[int, int, str]] = []  # start, end, composed form
    for i, char in enumerate(text):
        composed = unicodedata.normalize("NFC", char)
        start = i
        # A character that changes when it is composed with the characters before it belongs to their cluster.
        while (
            clusters
            and unicodedata.normalize("NFC", text[clusters[-1][0] : i + 1]) != clusters[-1][2] + composed
        ):
            start = clusters.pop()[0]
            composed = unicodedata.normalize("NFC", text[start : i + 1])
        clusters.append((start, i + 1, composed))
    return [(start, end) for start, end, composed in clusters for _ in composed]


def _through(origin: Sequence[Span], span: Span) -> Span:
    start, end = span
    if start == end:
        position = origin[start][0] if start < len(origin) else (origin[-1][1] if origin else 0)
        return position, position
    return origin[start][0], origin[end - 1][1]


class _SentencePieceCodec:
    """Vocabulary of torchtune's SentencePieceBaseTokenizer."""

    def __init__(self, base: Any) -> None:
        self._model = base.spm_model

    def encode(self, text: str) -> tuple[list[int], list[Span]]:
        ids = self._model.encode(text, out_type=int)
        pieces = self._model.encode(text, out_type=str)
        normalized, origin = self._model.Normalize(text, with_offsets=True)
        spans, position, pending = [], 0, 0
        for token_id, piece in zip(ids, pieces, strict=True):
            if self._model.is_byte(token_id):
                # The first byte of a UTF-8 character tells how many bytes it has. Each of them covers that character.
                pending = pending or _utf8_length(int(piece[3:5], 16))
                spans.append((origin[position], origin[position + 1]))
                pending -= 1
                position += pending == 0
            else:
                spans.append((origin[position], origin[position + len(piece)]))
                position += len(piece)
        if position != len(normalized):
            raise ValueError(
                f"the SentencePiece model does not reproduce the text {text[:60]!r}; spans cannot be found"
            )
        return ids, spans

    def token_bytes(self, token_id: int) -> bytes:
        piece = self._model.id_to_piece(token_id)
        if self._model.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE_MARK, " ").encode("utf-8")

    def size(self) -> int:
        return self._model.vocab_size()

    def fingerprint(self) -> str:
        return hashlib.sha256(self._model.serialized_model_proto()).hexdigest()

    def control_ids(self) -> set[int]:
        return {i for i in range(self._model.vocab_size()) if self._model.is_control(i)}


def _utf8_length(first_byte: int) -> int:
    if first_byte < 0x80:
        return 1
    return 2 if first_byte < 0xE0 else 3 if first_byte < 0xF0 else 4


class TorchtuneTokenizer:
    """A torchtune tokenizer with the protocol of this package.

    The tokenizer's own ``encode`` tokenises plain text, and its ``tokenize_messages`` tokenises conversations, with its prompt
    template and special tokens. Its ``max_seq_len`` is ignored, because the data set truncates and counts what it cut.

    Args:
        tokenizer: the torchtune tokenizer.
        codec: access to its vocabulary.
        special_ids: ids of control tokens.
    """

    def __init__(self, tokenizer: Any, codec: _Codec, special_ids: frozenset[int]) -> None:
        self._tokenizer = copy.copy(tokenizer)
        if getattr(tokenizer, "max_seq_len", None) is not None:
            self._tokenizer.max_seq_len = None
        self._codec = codec
        self.eos_id: int = tokenizer.eos_id
        self.bos_id: int | None = _usable(getattr(tokenizer, "bos_id", None))
        pad_id = _usable(getattr(tokenizer, "pad_id", None))
        self.pad_id: int = self.eos_id if pad_id is None else pad_id
        self.special_ids = special_ids
        self._special_text = {
            i: text for text, i in (getattr(tokenizer, "special_tokens", None) or {}).items()
        }
        self.stop_ids = frozenset(
            i for i in (self.eos_id, *getattr(tokenizer, "stop_tokens", ())) if i is not None
        )
        self.vocab_size = max(codec.size(), max(special_ids, default=0) + 1)
        self.has_chat = hasattr(tokenizer, "tokenize_messages")

    def encode_with_offsets(self, text: str, add_bos: bool | None = None) -> tuple[list[int], list[Span]]:
        """See :class:`~tokenpref.data.tokenizers.Tokenizer`. None adds BOS if the tokenizer has one, as torchtune does.

        Raises:
            ConfigError: if ``add_bos`` is True and the tokenizer has no BOS token.
        """
        written = self._written_bos(text)
        ids, spans = self._codec.encode(text[written:])
        if written:
            spans = [(start + written, end + written) for start, end in spans]
        if not self.special_ids.isdisjoint(ids):
            spans = [(s[0], s[0]) if i in self.special_ids else s for i, s in zip(ids, spans, strict=True)]
        if add_bos and self.bos_id is None:
            raise ConfigError("add_bos: true, but the tokenizer has no BOS token; set it to auto or false")
        if self.bos_id is not None and (written or add_bos is not False):
            return [self.bos_id, *ids], [(0, 0), *spans]
        return ids, spans

    def _written_bos(self, text: str) -> int:
        """Length of the BOS that a text begins with, in characters. torchtune's tokenizers would read it as ordinary text."""
        bos = self.decode_special(self.bos_id) if self.bos_id is not None else ""
        return len(bos) if bos and text.startswith(bos) else 0

    def decode(self, ids: list[int]) -> str:
        """See :class:`~tokenpref.data.tokenizers.Tokenizer`. Bytes that form no character become U+FFFD."""
        text = b"".join(self._bytes(i) for i in ids if i not in self.special_ids).decode("utf-8", "replace")
        # SentencePiece models put a space before the first word, which is not part of the text.
        return text[1:] if isinstance(self._codec, _SentencePieceCodec) and text.startswith(" ") else text

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self._special_text:
            return self._special_text[token_id].encode("utf-8")
        return self._codec.token_bytes(token_id)

    def decode_special(self, token_id: int) -> str:
        """See :class:`~tokenpref.data.tokenizers.Tokenizer`."""
        return self._bytes(token_id).decode("utf-8", "replace")

    def render_chat(
        self, messages: list[dict], add_generation_prompt: bool, tools: list[dict] | None = None
    ) -> str:
        """The text of torchtune's tokens for a conversation, with its special tokens.

        Raises:
            ValueError: if there are tools, or messages with calls or reasoning, because torchtune's ``tokenize_messages``
                cannot render them.
        """
        if tools:
            raise ValueError(f"the row has tools, {self._no_place()}")
        if add_generation_prompt:
            ids = self.encode_chat(messages, {"role": "assistant", "content": ""}, append_eos=False).ids
        else:
            ids = self._tokenize(messages, masked=len(messages), end=False)[0]
        return b"".join(self._bytes(i) for i in ids).decode("utf-8", "replace")

    def encode_chat(self, prompt: Sequence[Mapping], answer: Mapping, append_eos: bool) -> ChatTokens:
        """Tokenise a conversation with its answer.

        torchtune does not mask the header of the assistant's message. Here the header belongs to the prompt, so that the
        prompt is exactly what the model gets when it generates.

        Args:
            prompt: messages before the answer.
            answer: the assistant's message.
            append_eos: whether the answer keeps the tokens that end its turn.

        Raises:
            ConfigError: if the tokenizer has no ``tokenize_messages``.
            ValueError: if a message has calls or reasoning.
        """
        if not self.has_chat:
            raise ConfigError(
                f"the data holds conversations, but {type(self._tokenizer).__name__} cannot tokenise messages; use a "
                "model's tokenizer such as torchtune.models.llama3.llama3_tokenizer, or tokenpref.data.tokenizer_json"
            )
        ids, mask = self._tokenize([*prompt, answer], masked=len(prompt), end=True)
        # The tokens that stay the same with another content are the header.
        probe, _ = self._tokenize(
            [*prompt, {**answer, "content": "" if answer["content"] else "a"}], len(prompt), end=True
        )
        header = sum(
            1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(ids, probe, strict=False))
        )
        first = next((i for i, masked in enumerate(mask) if not masked), len(ids))
        last = max((i for i, masked in enumerate(mask) if not masked), default=len(ids) - 1)
        start = max(first, header)
        answer_ids = ids[start : last + 1]
        if append_eos:
            answer_ids = self._through_end(answer_ids)
            if not answer_ids or answer_ids[-1] not in self.special_ids:
                answer_ids = [*answer_ids, self.eos_id]
        else:
            answer_ids = self._without_end(answer_ids)
        spans, text = self._answer_spans(answer_ids, answer["content"])
        has_eos = bool(answer_ids) and answer_ids[-1] in self.special_ids
        return ChatTokens(ids[:start] + answer_ids, start, spans, text, has_eos)

    def _no_place(self) -> str:
        return (
            f"which {type(self._tokenizer).__name__} has no place for; use tokenpref.data.tokenizer_json with a chat template "
            "that reads them"
        )

    def _tokenize(self, messages: Sequence[Mapping], masked: int, end: bool) -> tuple[list[int], list[bool]]:
        for index, message in enumerate(messages):
            for key in (*CALL_KEYS, *REASONING_KEYS):
                if message.get(key):
                    raise ValueError(f"message {index} of the conversation has {key}, {self._no_place()}")
        built = [
            Message(
                role="ipython" if message["role"] == "tool" else message["role"],
                content=message["content"],
                masked=index < masked,
            )
            for index, message in enumerate(messages)
        ]
        method = self._tokenizer.tokenize_messages
        flag = next(
            n
            for n in ("add_end_tokens", "add_eos", None)
            if n is None or n in inspect.signature(method).parameters
        )
        return method(built, **({flag: end} if flag else {}))

    def _without_end(self, ids: list[int]) -> list[int]:
        """The answer without the special tokens at its end, and without white space between and after them."""
        keep = index = len(ids)
        while index > 0:
            index -= 1
            if ids[index] in self.special_ids:
                keep = index
            elif self._bytes(ids[index]).strip():
                break
        return ids[:keep]

    def _through_end(self, ids: list[int]) -> list[int]:
        """The answer up to its last special token, if only white space follows it."""
        for index in range(len(ids), 0, -1):
            if ids[index - 1] in self.special_ids:
                return ids[:index]
            if self._bytes(ids[index - 1]).strip():
                break
        return ids

    def _answer_spans(self, ids: Sequence[int], content: str) -> tuple[list[Span], str]:
        """Spans in the answer as it was written, or in the tokenizer's form of it if the tokenizer rewrote it."""
        pieces = [b"" if i in self.special_ids else self._bytes(i) for i in ids]
        whole = b"".join(pieces)
        for variant in (content, content.strip()):
            at = whole.find(variant.encode("utf-8"))
            if at >= 0 and variant:
                offset = content.find(variant)
                return _clipped_spans(pieces, at, variant, offset), content
        text = whole.decode("utf-8")
        return spans_from_bytes(text, pieces), text

    def fingerprint(self) -> str:
        """See :class:`~tokenpref.data.tokenizers.Tokenizer`."""
        special = getattr(self._tokenizer, "special_tokens", None) or {}
        kind = type(self._tokenizer).__qualname__
        return digest(
            kind, self._codec.fingerprint(), special, self.eos_id, self.bos_id, self._described_template()
        )

    def template_fingerprint(self) -> str:
        """See :class:`~tokenpref.data.tokenizers.Tokenizer`."""
        return digest(type(self._tokenizer).__qualname__, self._described_template())

    def _described_template(self) -> list[str] | None:
        template = getattr(self._tokenizer, "prompt_template", None)
        if template is None:
            return None
        tags = json.dumps(getattr(template, "template", None), default=str, sort_keys=True)
        return [f"{type(template).__module__}.{type(template).__qualname__}", tags]


def _clipped_spans(pieces: Sequence[bytes], at: int, variant: str, offset: int) -> list[Span]:
    """Spans in an answer whose text ``variant`` begins at byte ``at`` of the pieces and at character ``offset`` of the answer."""
    size = len(variant.encode("utf-8"))
    inner, position = [], 0
    for piece in pieces:
        start, end = (min(max(p - at, 0), size) for p in (position, position + len(piece)))
        inner.append(variant.encode("utf-8")[start:end])
        position += len(piece)
    return [(start + offset, end + offset) for start, end in spans_from_bytes(variant, inner)]


def _usable(token_id: int | None) -> int | None:
    """A token id, or None. SentencePiece gives -1 for a token that the model does not have."""
    return None if token_id is None or token_id < 0 else token_id


def adapt_torchtune(tokenizer: Any) -> Tokenizer:
    """Adapt one of torchtune's tokenizers, which is recognised by its parts.

    Raises:
        ConfigError: if it is not a tokenizer of torchtune's, or has no EOS token.
    """
    special = dict(getattr(tokenizer, "special_tokens", None) or {})
    backend = getattr(tokenizer, "tokenizer", None)
    if type(backend).__module__.startswith("tokenizers") and hasattr(backend, "to_str"):
        return _adapt_hugging_face(tokenizer)
    if getattr(tokenizer, "eos_id", None) is None:
        raise ConfigError(
            f"tokenizer: {type(tokenizer).__module__}.{type(tokenizer).__qualname__} is not a tokenizer that tokenpref "
            "knows; use tokenpref.data.tokenizer_json, a tokenizer of torchtune's models, or a class with the methods "
            "of tokenpref.data.Tokenizer"
        )
    codec: _Codec
    control = set(special.values())
    if hasattr(tokenizer, "tt_model"):
        codec = _TiktokenCodec(tokenizer.tt_model if hasattr(tokenizer.tt_model, "tt_model") else tokenizer)
        control |= set(codec._encoding._special_tokens.values())
    elif hasattr(tokenizer, "_spm_model") or hasattr(tokenizer, "spm_model"):
        codec = _SentencePieceCodec(getattr(tokenizer, "_spm_model", tokenizer))
        control |= codec.control_ids()
    elif hasattr(getattr(tokenizer, "tokenizer_model", tokenizer), "byte_decoder"):
        codec = _ByteLevelCodec(getattr(tokenizer, "tokenizer_model", tokenizer), special)
    else:
        raise ConfigError(
            f"tokenizer: {type(tokenizer).__qualname__} has none of the parts that torchtune's tokenizers have (tiktoken, "
            "SentencePiece, byte-level BPE); use tokenpref.data.tokenizer_json"
        )
    control |= {i for i in (tokenizer.eos_id, getattr(tokenizer, "bos_id", None)) if i is not None and i >= 0}
    return TorchtuneTokenizer(tokenizer, codec, frozenset(control))


def _adapt_hugging_face(tokenizer: Any) -> Tokenizer:
    """Adapt torchtune's HuggingFaceBaseTokenizer, which uses the same library and files as ``tokenizer_json``."""
    backend = tokenizer.tokenizer
    config = tokenizer.config or {}
    pad = config.get("pad_token")
    template = config.get("chat_template")
    return JsonTokenizer(
        json.loads(backend.to_str()),
        eos_token=backend.id_to_token(tokenizer.eos_id),
        bos_token=backend.id_to_token(tokenizer.bos_id) if tokenizer.bos_id is not None else None,
        pad_token=pad.get("content") if isinstance(pad, Mapping) else pad,
        chat_template=template if isinstance(template, str) else None,
    )
