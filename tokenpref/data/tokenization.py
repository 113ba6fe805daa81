"""Tokenises prompt and answer as one text: where the answer begins and ends, and how it is truncated."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Generator, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from tokenpref.data.answer_place import Frame, call_end, place_answer, reasoning_end
from tokenpref.data.chat import CALL_KEYS
from tokenpref.data.tokenizers import Span, Tokenizer
from tokenpref.errors import TokenprefError

__all__ = [
    "Encoded",
    "EncodedAnswer",
    "EncodingSteps",
    "MovedSpans",
    "Request",
    "chat_answer_steps",
    "cut_to_length",
    "encode_chat_answer",
    "encode_prompt",
    "encode_text_answer",
    "encode_together",
    "run_steps",
    "text_answer_steps",
]


class MovedSpans(Sequence[Span]):
    """Spans of an answer, stored relative to the whole text.

    Items are converted when they are read: relative to the answer and clipped to its length. Because a data set has very many
    spans, :class:`tokenpref.data.packed.PairPacker` takes the raw spans and converts those of many answers at once.

    Args:
        raw: spans in the whole text.
        offset: where the answer begins in the whole text.
        size: number of characters of the answer.
    """

    __slots__ = ("offset", "raw", "size", "tail")

    def __init__(self, raw: Sequence[Span], offset: int, size: int) -> None:
        self.raw, self.offset, self.size = raw, offset, size
        self.tail: list[Span] = []

    def append(self, span: Span) -> None:
        """Append a span that is relative to the answer."""
        self.tail.append(span)

    def moved(self) -> list[Span]:
        """All spans, relative to the answer."""
        return _all_within(self.raw, self.offset, self.size) + self.tail

    def __len__(self) -> int:
        return len(self.raw) + len(self.tail)

    def __getitem__(self, index: Any) -> Any:
        return self.moved()[index]

    def __iter__(self) -> Iterator[Span]:
        return iter(self.moved())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self.moved() == list(other)

    def __repr__(self) -> str:
        return repr(self.moved())

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class EncodedAnswer:
    """One side of a pair as tokens.

    Attributes:
        ids: prompt and answer.
        start: index of the first token of the answer.
        spans: characters of ``text`` that each answer token covers; an empty span for EOS and other special tokens.
        has_eos: whether the answer ends with a token that ends it.
        straddles: whether the first token of the answer begins in the prompt's text.
        num_special: leading special tokens (BOS) that are kept when the prompt is truncated.
        prompt_text: text of the prompt, special tokens of a chat template included.
        text: the answer's own text.
    """

    ids: list[int]
    start: int
    spans: Sequence[Span]
    has_eos: bool
    straddles: bool
    num_special: int
    prompt_text: str
    text: str


Request = tuple[str, bool | None]
"""The arguments of :meth:`Tokenizer.encode_with_offsets`: a text and ``add_bos``."""

Encoded = tuple[list[int], list[Span]]
"""The result: ids and spans."""

EncodingSteps = Generator[Request, Encoded, EncodedAnswer]
"""A generator that tokenises an answer: it yields a request, receives the ids and spans of the text, and returns the answer.

The texts of many answers can therefore be passed to the tokenizer at once, and a single answer uses the same code.
"""

T = TypeVar("T")


def run_steps(tokenizer: Tokenizer, steps: Generator[Request, Encoded, T]) -> T:
    """Tokenise a single answer or pair."""
    try:
        request = next(steps)
        while True:
            (encoded,) = _one_by_one(tokenizer, [request])
            request = steps.throw(encoded) if isinstance(encoded, ValueError) else steps.send(encoded)
    except StopIteration as finished:
        return finished.value


def encode_together(tokenizer: Tokenizer, requests: Sequence[Request]) -> list[Encoded | ValueError]:
    """Ids and spans of many texts, or the error of a text.

    A tokenizer with a method ``encode_batch_with_offsets(texts, add_bos)`` gets all texts at once.
    """
    together = getattr(tokenizer, "encode_batch_with_offsets", None)
    kinds = {add_bos for _, add_bos in requests}
    if together is None or len(kinds) > 1:
        return _one_by_one(tokenizer, requests)
    try:
        return list(together([text for text, _ in requests], kinds.pop()))
    except ValueError:  # one of the texts is at fault; the loop below finds it
        return _one_by_one(tokenizer, requests)


def _one_by_one(tokenizer: Tokenizer, requests: Sequence[Request]) -> list[Encoded | ValueError]:
    found: list[Encoded | ValueError] = []
    for text, add_bos in requests:
        try:
            found.append(tokenizer.encode_with_offsets(text, add_bos))
        except ValueError as error:
            found.append(error)
    return found


def encode_text_answer(
    tokenizer: Tokenizer,
    prompt: str,
    answer: str,
    *,
    add_bos: bool | None = None,
    append_eos: bool = False,
    end_ids: frozenset[int] | None = None,
) -> EncodedAnswer:
    """Tokenise ``prompt + answer`` once, as one text.

    A token that covers characters of both belongs to the answer, because predicting it says something about
    the answer. If an answer ends with the text of the EOS token, it ends with that token, in every kind of vocabulary. White
    space after it, or after another token that ends a turn, is dropped.

    Args:
        tokenizer: the tokenizer.
        prompt: text before the answer.
        answer: the answer's text.
        add_bos: begin with BOS; None does what the model's own tokenizer does for plain text.
        append_eos: end with EOS, unless the answer already ends with it.
        end_ids: ids that count as an end; by default the tokenizer's ``stop_ids``.
    """
    return run_steps(
        tokenizer,
        text_answer_steps(tokenizer, prompt, answer, add_bos=add_bos, append_eos=append_eos, end_ids=end_ids),
    )


def text_answer_steps(
    tokenizer: Tokenizer,
    prompt: str,
    answer: str,
    *,
    add_bos: bool | None = None,
    append_eos: bool = False,
    end_ids: frozenset[int] | None = None,
) -> EncodingSteps:
    """The steps of :func:`encode_text_answer`; the caller does the tokenizer's work."""
    body = answer
    eos_text = tokenizer.decode_special(tokenizer.eos_id)
    ends = tokenizer.stop_ids if end_ids is None else end_ids
    stripped = (
        answer.rstrip()
    )  # white space after the end of a turn comes from a template, and a model does not write it
    if eos_text and stripped.endswith(eos_text):
        body, append_eos = stripped[: -len(eos_text)], True
        ends = frozenset(
            {tokenizer.eos_id}
        )  # the token is added again, although another special token may precede it
    elif any(stripped.endswith(end) for end in map(tokenizer.decode_special, tokenizer.stop_ids) if end):
        body = stripped
    ids, spans = yield prompt + body, add_bos
    num_special = _leading_special(tokenizer, ids, spans)
    start = _answer_start(spans, len(prompt), num_special)
    straddles = start < len(spans) and spans[start][0] < len(prompt) < spans[start][1]
    answer_spans = MovedSpans(spans[start:], len(prompt), len(body))
    has_eos = len(ids) > start and ids[-1] in ends
    if append_eos and not has_eos:
        ids = [*ids, tokenizer.eos_id]
        answer_spans.append((len(answer), len(answer)))
        has_eos = True
    return EncodedAnswer(ids, start, answer_spans, has_eos, straddles, num_special, prompt, answer)


def _leading_special(tokenizer: Tokenizer, ids: Sequence[int], spans: Sequence[Span]) -> int:
    count = 0
    while count < len(ids) and spans[count] == (0, 0) and ids[count] in tokenizer.special_ids:
        count += 1
    return count


def _answer_start(spans: Sequence[Span], boundary: int, first: int) -> int:
    for index in range(first, len(spans)):
        start, end = spans[index]
        if end > boundary or (start == end and start >= boundary):
            return index
    return len(spans)


def _all_within(spans: Sequence[Span], offset: int, size: int) -> list[Span]:
    """Spans relative to ``offset``, clipped to a text of ``size`` characters."""
    limit = offset + size
    return [
        (span[0] - offset, span[1] - offset)
        if offset <= span[0] <= span[1] <= limit  # the case of almost every token
        else _within(span, offset, size)
        for span in spans
    ]


def _within(span: Span, offset: int, size: int) -> Span:
    start, end = (min(max(position - offset, 0), size) for position in span)
    return start, end


def encode_chat_answer(
    tokenizer: Tokenizer,
    prompt: list[dict[str, Any]],
    answer: Mapping[str, Any],
    *,
    append_eos: bool,
    tools: list[dict[str, Any]] | None = None,
) -> EncodedAnswer:
    """Tokenise a conversation and the assistant's answer to it.

    With a chat template the whole conversation is rendered and tokenised as one text; the prompt is what the template
    renders up to and including the header of the answer. The answer extends to the token that ends it; white space that
    the template writes after that is dropped. What the template writes between the header and the answer's text, such as
    a thinking block, belongs to the answer. torchtune's tokenizers use their own ``tokenize_messages``.

    Args:
        tokenizer: a tokenizer with ``has_chat``.
        prompt: messages before the answer.
        answer: the assistant's message.
        append_eos: end with the template's end of turn, or EOS where it writes none; False ends with the answer's text,
            and with its calls where it has some.
        tools: JSON schemas of the functions that the assistant may call.

    Returns:
        The answer, which has no tokens if the template writes nothing for it.

    Raises:
        ValueError: if the template renders the prompt differently when an answer follows, does not show where the text
            of an incomplete answer ends, or there are tools and the tokenizer takes none.
    """
    steps = chat_answer_steps(tokenizer, prompt, answer, append_eos=append_eos, tools=tools)
    return run_steps(tokenizer, steps)


def chat_answer_steps(
    tokenizer: Tokenizer,
    prompt: list[dict[str, Any]],
    answer: Mapping[str, Any],
    *,
    append_eos: bool,
    tools: list[dict[str, Any]] | None = None,
) -> EncodingSteps:
    """The steps of :func:`encode_chat_answer`; the caller does the tokenizer's work."""
    if hasattr(tokenizer, "encode_chat"):
        _check_tools(tokenizer, tools)
        chat = tokenizer.encode_chat(prompt, answer, append_eos)
        num_special = 1 if chat.ids[:1] == [tokenizer.bos_id] else 0
        prompt_text = tokenizer.render_chat(prompt, add_generation_prompt=True)
        return EncodedAnswer(
            chat.ids, chat.start, chat.spans, chat.has_eos, False, num_special, prompt_text, chat.text
        )
    turn = _Turn(tokenizer, prompt, tools, _render(tokenizer, prompt, True, tools))
    written = turn.written(answer)
    place = _place(turn, written, answer)
    if place is None and not append_eos:
        raise ValueError(
            "the answer is to end with its text (append_eos false, or a row that is not complete), and the chat template does "
            f"not show where that ends: it writes {written[:60]!r}; use a template that writes the text as it stands"
        )
    if place is None:
        place = _Place(0, len(_without_end(tokenizer, written)), len(written))
    if place.stop == 0:  # the template writes nothing for this answer
        append_eos = False
    rendered = _through_end(tokenizer, written) if append_eos else written[: place.stop]
    # Some templates end a turn with a special token that is not the tokenizer's EOS (Gemma's <end_of_turn>).
    end_ids = tokenizer.special_ids if append_eos else tokenizer.stop_ids
    encoded = yield from text_answer_steps(
        tokenizer, turn.prompt_text, rendered, add_bos=False, append_eos=append_eos, end_ids=end_ids
    )
    spans = _all_within(encoded.spans, place.start, place.end - place.start)
    return dataclasses.replace(encoded, spans=spans, text=written[place.start : place.end])


def _render(
    tokenizer: Tokenizer,
    messages: list[dict[str, Any]],
    add_generation_prompt: bool,
    tools: list[dict[str, Any]] | None,
) -> str:
    if tools is None:  # a tokenizer of the user's own need not know of tools
        return tokenizer.render_chat(messages, add_generation_prompt)
    _check_tools(tokenizer, tools)
    return tokenizer.render_chat(messages, add_generation_prompt, tools=tools)


def _check_tools(tokenizer: Tokenizer, tools: list[dict[str, Any]] | None) -> None:
    """Refuse tools that the tokenizer cannot show to the model.

    Raises:
        ValueError: if there are tools and the tokenizer takes none.
    """
    if not tools:
        return
    takes_tools = "tools" in inspect.signature(tokenizer.render_chat).parameters
    if hasattr(tokenizer, "encode_chat") or not takes_tools:
        raise ValueError(
            f"the row has tools, but {type(tokenizer).__name__} cannot put tools into a prompt; use "
            "tokenpref.data.tokenizer_json with a chat template that reads them, or remove the tools"
        )


@dataclass(frozen=True)
class _Turn:
    """The assistant's turn after a prompt, as rendered by a chat template."""

    tokenizer: Tokenizer
    prompt: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    prompt_text: str

    def written(self, answer: Mapping[str, Any]) -> str:
        """What the template writes after the prompt for an answer.

        Raises:
            ValueError: if the template refuses the answer, or renders the prompt differently when it follows.
        """
        whole = _render(self.tokenizer, [*self.prompt, dict(answer)], False, self.tools)
        if not whole.startswith(self.prompt_text):
            shared = len(os.path.commonprefix([whole, self.prompt_text]))
            missing, instead = self.prompt_text[shared:], whole[shared : shared + 40]
            raise ValueError(
                "the chat template renders the prompt differently when an answer follows, so the answer's beginning is "
                f"not known: with the generation prompt it ends with {self.prompt_text[-40:]!r}, and with the answer it has "
                f"{instead!r} in place of {missing[:40]!r}; {_mend_of_prompt(missing)}"
            )
        written = whole[len(self.prompt_text) :]
        if self.prompt_text.rstrip().endswith("</think>") and written.lstrip().startswith("<think>"):
            raise ValueError(
                f"after the thinking block at the end of the prompt, the chat template writes another one; {_REASONING_MEND}"
            )
        return written

    def tried(self, answer: Mapping[str, Any]) -> str | None:
        """The same for another answer than the row's; None if the template refuses it."""
        try:
            return self.written(answer)
        except TokenprefError:
            raise
        except ValueError:
            return None


_REASONING_MEND = (
    "the generation prompt and the answer disagree about reasoning: give the answers reasoning where the prompt opens a thinking "
    "block, and none where it closes an empty one (tokenizer.chat_template_kwargs may choose, such as {enable_thinking: false}), "
    "or use another template"
)


def _mend_of_prompt(missing: str) -> str:
    """What to do about the end of a generation prompt that is missing where an answer follows."""
    return _REASONING_MEND if "think>" in missing[:40] else "use a template that keeps it"


@dataclass(frozen=True)
class _Place:
    """Positions in what a template writes for an answer: the answer's text, and the end of an incomplete answer."""

    start: int
    end: int
    stop: int


def _place(turn: _Turn, written: str, answer: Mapping[str, Any]) -> _Place | None:
    """The positions of the answer in what the template writes for it; None if they cannot be found.

    The text of an answer without content of its own (nothing but calls or reasoning) is all that the template writes
    before the end of the turn. If the template writes nothing for it, the place is empty.
    """
    if not answer["content"].strip():
        if written == turn.tried({"role": answer["role"], "content": ""}):
            return _Place(0, 0, 0)
        end = _turn_end(turn, written, answer)
        has_calls = any(answer.get(key) for key in CALL_KEYS)
        stop = None if has_calls else reasoning_end(written, answer, turn.tried)
        return _Place(0, end, end if stop is None else stop)
    memory = _memory_of(turn.tokenizer)
    place = place_answer(written, answer, turn.tried, memory.frame)
    if place is None:
        return None
    memory.frame = place.frame or memory.frame
    if any(answer.get(key) for key in CALL_KEYS):
        return _Place(place.start, place.end, max(place.end, _turn_end(turn, written, answer)))
    return _Place(place.start, place.end, place.end)


def _turn_end(turn: _Turn, written: str, answer: Mapping[str, Any]) -> int:
    """Where the end of the turn begins, after calls and reasoning."""
    end = call_end(written, answer, turn.tried)
    return len(_without_end(turn.tokenizer, written)) if end is None else end


@dataclass
class _Memory:
    """What is cached for a tokenizer.

    Attributes:
        ends: texts of its special tokens.
        frame: what its template wrote around the last answer, which is the same for most answers of a data set.
    """

    ends: tuple[str, ...]
    frame: Frame | None = None


_memories: MutableMapping[Tokenizer, _Memory] = WeakKeyDictionary()


def _memory_of(tokenizer: Tokenizer) -> _Memory:
    try:
        memory = _memories.get(tokenizer)
    except TypeError:  # a user's class that cannot be a key is not cached
        return _Memory(_end_texts(tokenizer))
    if memory is None:
        memory = _memories[tokenizer] = _Memory(_end_texts(tokenizer))
    return memory


def _end_texts(tokenizer: Tokenizer) -> tuple[str, ...]:
    return tuple(filter(None, map(tokenizer.decode_special, tokenizer.special_ids)))


def _through_end(tokenizer: Tokenizer, written: str) -> str:
    """The turn up to its last special token, if only white space follows it."""
    stripped = written.rstrip()
    return stripped if stripped.endswith(_memory_of(tokenizer).ends) else written


def _without_end(tokenizer: Tokenizer, written: str) -> str:
    """The turn without the special tokens that end it, and without white space between and after those."""
    ends = _memory_of(tokenizer).ends
    kept = written
    while kept.rstrip().endswith(ends):
        kept = kept.rstrip()
        kept = kept[: -max(len(end) for end in ends if kept.endswith(end))]
    return kept


def encode_prompt(
    tokenizer: Tokenizer,
    prompt: str | list[dict[str, Any]],
    add_bos: bool | None = None,
    tools: list[dict[str, Any]] | None = None,
) -> list[int]:
    """The ids of a prompt alone, from which a model generates an answer.

    Args:
        tokenizer: the tokenizer.
        prompt: text, or the messages before the answer.
        add_bos: for text, as in :func:`encode_text_answer`.
        tools: JSON schemas of the functions that the assistant may call; for conversations only.

    Raises:
        ValueError: if there are tools and the tokenizer takes none.
    """
    if isinstance(prompt, str):
        return tokenizer.encode_with_offsets(prompt, add_bos)[0]
    if hasattr(tokenizer, "encode_chat"):
        _check_tools(tokenizer, tools)
        encoded = tokenizer.encode_chat(prompt, {"role": "assistant", "content": ""}, append_eos=False)
        return encoded.ids[: encoded.start]
    return tokenizer.encode_with_offsets(_render(tokenizer, prompt, True, tools), False)[0]


def cut_prompt(ids: list[int], num_special: int, limit: int | None) -> list[int]:
    """The last tokens of the prompt, at most ``limit``, including its leading special tokens, which are kept."""
    if limit is None or len(ids) <= limit:
        return ids
    kept = max(limit - num_special, 0)
    return ids[:num_special] + (ids[-kept:] if kept else [])


def cut_to_length(
    encoded: EncodedAnswer, max_seq_len: int | None, max_prompt_len: int | None
) -> tuple[EncodedAnswer, bool, bool]:
    """Truncate a prompt that is too long at its beginning, and an answer at its end.

    Args:
        encoded: prompt and answer.
        max_seq_len: longest sequence, BOS and EOS included; None for no limit.
        max_prompt_len: longest prompt, BOS included; None for no limit.

    Returns:
        The result, whether the prompt was truncated, and whether the answer was. A truncated answer has no EOS, because it
        does not end there. If the prompt leaves no space, the answer is empty.
    """
    prompt = cut_prompt(encoded.ids[: encoded.start], encoded.num_special, max_prompt_len)
    prompt_cut = len(prompt) < encoded.start
    answer, spans, has_eos = encoded.ids[encoded.start :], encoded.spans, encoded.has_eos
    room = len(answer) if max_seq_len is None else max(max_seq_len - len(prompt), 0)
    answer_cut = len(answer) > room
    if answer_cut:
        answer, spans, has_eos = answer[:room], spans[:room], False
    if not prompt_cut and not answer_cut:
        return encoded, False, False
    cut = dataclasses.replace(encoded, ids=prompt + answer, start=len(prompt), spans=spans, has_eos=has_eos)
    return cut, prompt_cut, answer_cut
