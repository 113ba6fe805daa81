"""Makes the token ids of a pair from its row."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenpref.data.chat import TemplateError
from tokenpref.data.pairs import PairRow, RowFault
from tokenpref.data.tokenization import (
    Encoded,
    EncodedAnswer,
    EncodingSteps,
    Request,
    chat_answer_steps,
    cut_to_length,
    encode_together,
    run_steps,
    text_answer_steps,
)
from tokenpref.data.tokenizers import Tokenizer
from tokenpref.errors import ConfigError

__all__ = [
    "TOO_LONG",
    "EncodedPair",
    "PairSettings",
    "encode_pairs",
    "encode_side",
    "fitted_side",
    "pair_steps",
    "wants_eos",
]

TOO_LONG = "too long"
"""The kind of fault of a row that is too long and must not be truncated."""


@dataclass(frozen=True)
class PairSettings:
    """How rows become tokens; see :func:`tokenpref.data.preference_dataset`."""

    layout: str
    append_eos: bool | None
    add_bos: bool | None
    max_seq_len: int | None
    max_prompt_len: int | None
    truncation: str
    swap: bool


@dataclass(frozen=True)
class EncodedPair:
    """A pair as tokens, and how it was truncated.

    Attributes:
        chosen: its first side.
        rejected: its second side.
        prompt_cut: whether the prompt lost its beginning.
        answers_cut: how many answers lost their end.
        straddles: whether a token covers the boundary between prompt and answer.
        equal: whether truncation made both sides equal.
    """

    chosen: EncodedAnswer
    rejected: EncodedAnswer
    prompt_cut: bool
    answers_cut: int
    straddles: bool
    equal: bool


PairSteps = Generator[Request, Encoded, EncodedPair]
"""A pair being tokenised; see :data:`tokenpref.data.tokenization.EncodingSteps`."""


def encode_pairs(
    tokenizer: Tokenizer, reads: Sequence[PairRow | RowFault], settings: PairSettings
) -> list[EncodedPair | RowFault]:
    """Tokenise pairs, passing many texts to the tokenizer at once.

    Args:
        tokenizer: the tokenizer.
        reads: pairs as :meth:`RowReader.read` gives them.
        settings: how they become tokens.

    Returns:
        For each pair its tokens, or the reason why it cannot be used.
    """
    found: list[Any] = list(reads)
    waiting: list[tuple[int, PairSteps, Request]] = []

    def advance(place: int, steps: PairSteps, encoded: Encoded | ValueError | None) -> None:
        try:
            request = steps.throw(encoded) if isinstance(encoded, ValueError) else steps.send(encoded)  # type: ignore[arg-type]
        except StopIteration as finished:
            found[place] = finished.value
        except RowFault as fault:
            found[place] = fault
        else:
            waiting.append((place, steps, request))

    for place, read in enumerate(reads):
        if isinstance(read, PairRow):
            advance(place, pair_steps(tokenizer, read, settings), None)
    while waiting:
        asked, waiting = waiting, []
        encoded = encode_together(tokenizer, [request for _, _, request in asked])
        for (place, steps, _), answer in zip(asked, encoded, strict=True):
            advance(place, steps, answer)
    return found


def pair_steps(tokenizer: Tokenizer, read: PairRow, settings: PairSettings) -> PairSteps:
    """Both sides of a pair, swapped if the settings say so. The caller does the tokenizer's work.

    Raises:
        RowFault: if the pair cannot be used.
    """
    pair = read.swapped() if settings.swap else read
    sides: list[EncodedAnswer] = []
    complete = (pair.chosen_complete, pair.rejected_complete)
    prompt_cut, answers_cut = False, 0
    for answer, marked, column in zip((pair.chosen, pair.rejected), complete, pair.columns, strict=True):
        try:
            append_eos = wants_eos(settings, pair, marked)
            whole = yield from _side_steps(tokenizer, pair, answer, append_eos, settings.add_bos)
        except TemplateError as error:
            raise RowFault("template", column, f"the chat template refuses it: {error}") from error
        except ConfigError:
            raise  # no row is at fault, so leaving rows out would not help
        except ValueError as error:
            raise RowFault("tokenizer", column, str(error)) from error
        side, cut, answer_cut = fitted_side(whole, column, settings)
        prompt_cut |= cut
        answers_cut += answer_cut
        sides.append(side)
    chosen, rejected = sides
    equal = chosen.start == rejected.start and chosen.ids == rejected.ids
    if equal and not prompt_cut and not answers_cut:
        raise RowFault(
            "equal tokens",
            pair.columns[1],
            f"has the same tokens as {pair.columns[0]}{_left_out(pair)}; remove the row",
        )
    return EncodedPair(
        chosen, rejected, prompt_cut, answers_cut, chosen.straddles or rejected.straddles, equal
    )


def _left_out(pair: PairRow) -> str:
    """The parts of two messages that the chat template leaves out, if the messages differ in them."""
    if isinstance(pair.chosen, str) or isinstance(pair.rejected, str):
        return ""
    keys = sorted({*pair.chosen, *pair.rejected})
    names = [key for key in keys if pair.chosen.get(key) != pair.rejected.get(key)]
    return f": the chat template and the tokenizer leave out what differs ({', '.join(names)})"


def wants_eos(settings: PairSettings, pair: PairRow, marked: bool | None) -> bool:
    """Whether an answer of a pair ends with EOS. ``marked`` is what its row says."""
    if settings.append_eos is not None:
        return settings.append_eos
    if marked is not None:
        return marked
    return pair.turns


def encode_side(
    tokenizer: Tokenizer,
    pair: PairRow,
    answer: str | Mapping[str, Any],
    append_eos: bool,
    add_bos: bool | None,
) -> EncodedAnswer:
    """Prompt and answer as tokens, before truncation."""
    return run_steps(tokenizer, _side_steps(tokenizer, pair, answer, append_eos, add_bos))


def _side_steps(
    tokenizer: Tokenizer,
    pair: PairRow,
    answer: str | Mapping[str, Any],
    append_eos: bool,
    add_bos: bool | None,
) -> EncodingSteps:
    if isinstance(answer, str):
        text = str(pair.prompt)  # a text answer comes with a text prompt
        return text_answer_steps(tokenizer, text, answer, add_bos=add_bos, append_eos=append_eos)
    messages: list[dict[str, Any]] = list(pair.prompt)  # type: ignore[arg-type]
    return chat_answer_steps(tokenizer, messages, answer, append_eos=append_eos, tools=pair.tools)


def fitted_side(
    whole: EncodedAnswer, column: str, settings: PairSettings
) -> tuple[EncodedAnswer, bool, bool]:
    """One side, truncated to the limits.

    Raises:
        RowFault: if no token of its answer can be scored, or if it is too long and must not be truncated.
    """
    if whole.start == len(whole.ids):
        raise RowFault("empty answer", column, "gives no token of its own; remove the row")
    if whole.start == 0:
        raise RowFault(
            "no context",
            column,
            "begins with its first scored token, which nothing precedes: the prompt is empty and there is no BOS. Give "
            "a prompt, or set add_bos: true",
        )
    side, prompt_cut, answer_cut = cut_to_length(whole, settings.max_seq_len, settings.max_prompt_len)
    if (prompt_cut or answer_cut) and settings.truncation != "keep_prompt_end":
        raise RowFault(
            TOO_LONG,
            column,
            f"is too long ({_lengths(whole, settings)}); raise the limit, or set truncation: keep_prompt_end (cuts) or drop "
            "(leaves out)",
        )
    if side.start >= len(side.ids):
        raise RowFault(
            "prompt leaves no room",
            column,
            f"has no room for a single answer token ({_lengths(whole, settings)}); set max_prompt_len below max_seq_len, or "
            "raise max_seq_len",
        )
    return side, prompt_cut, answer_cut


def _lengths(whole: EncodedAnswer, settings: PairSettings) -> str:
    return (
        f"prompt {whole.start} tokens, answer {len(whole.ids) - whole.start}, max_seq_len {settings.max_seq_len}, "
        f"max_prompt_len {settings.max_prompt_len}"
    )
