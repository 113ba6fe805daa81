"""From one row to the token ids of its pair."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenpref.data.chat import TemplateError
from tokenpref.data.pairs import PairRow, RowFault
from tokenpref.data.tokenization import EncodedAnswer, cut_to_length, encode_chat_answer, encode_text_answer
from tokenpref.data.tokenizers import Tokenizer
from tokenpref.errors import ConfigError

__all__ = ["TOO_LONG", "PairSettings", "encode_pair", "encode_side", "fitted_side", "wants_eos"]

TOO_LONG = "too long"
"""Kind of the fault of a row that does not fit and must not be cut."""


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


def encode_pair(
    tokenizer: Tokenizer, read: PairRow | RowFault, settings: PairSettings
) -> tuple[tuple[EncodedAnswer, EncodedAnswer], Counter[str]]:
    """Both sides of a pair, swapped where the settings say so, and what happened to them.

    Args:
        tokenizer: the tokenizer.
        read: the pair as :meth:`RowReader.read` gives it.
        settings: how it becomes tokens.

    Raises:
        RowFault: if the pair cannot be used.
    """
    if isinstance(read, RowFault):
        raise read
    pair = read.swapped() if settings.swap else read
    sides: list[EncodedAnswer] = []
    cuts: Counter[str] = Counter()
    complete = (pair.chosen_complete, pair.rejected_complete)
    prompt_cut = False
    for answer, marked, column in zip((pair.chosen, pair.rejected), complete, pair.columns, strict=True):
        try:
            whole = encode_side(tokenizer, pair, answer, wants_eos(settings, pair, marked), settings.add_bos)
        except TemplateError as error:
            raise RowFault("template", column, f"the chat template refuses it: {error}") from error
        except ConfigError:
            raise  # no row is at fault, and leaving rows out mends nothing
        except ValueError as error:
            raise RowFault("tokenizer", column, str(error)) from error
        side, cut, answer_cut = fitted_side(whole, column, settings)
        prompt_cut |= cut
        cuts["answers_cut"] += answer_cut
        sides.append(side)
    chosen, rejected = sides
    cuts["prompts_cut"] = int(prompt_cut)
    cuts["straddling_rows"] = int(chosen.straddles or rejected.straddles)
    if (chosen.ids, chosen.start) == (rejected.ids, rejected.start):
        if not prompt_cut and not cuts["answers_cut"]:
            raise RowFault(
                "equal tokens",
                pair.columns[1],
                f"has the same tokens as {pair.columns[0]}{_left_out(pair)}; remove the row",
            )
        cuts["equal_after_cut"] = 1
    return (chosen, rejected), cuts


def _left_out(pair: PairRow) -> str:
    """Which parts of two messages the chat template leaves out, if the messages differ in these."""
    if isinstance(pair.chosen, str) or isinstance(pair.rejected, str):
        return ""
    keys = sorted({*pair.chosen, *pair.rejected})
    names = [key for key in keys if pair.chosen.get(key) != pair.rejected.get(key)]
    return f": the chat template and the tokenizer leave out what differs ({', '.join(names)})"


def wants_eos(settings: PairSettings, pair: PairRow, marked: bool | None) -> bool:
    """Whether an answer of a pair is to end with EOS; ``marked`` is what its row says."""
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
    """Prompt and answer as tokens, before cutting."""
    if isinstance(answer, str):
        text = str(pair.prompt)  # a text answer comes with a text prompt
        return encode_text_answer(tokenizer, text, answer, add_bos=add_bos, append_eos=append_eos)
    messages: list[dict[str, Any]] = list(pair.prompt)  # type: ignore[arg-type]
    return encode_chat_answer(tokenizer, messages, answer, append_eos=append_eos, tools=pair.tools)


def fitted_side(
    whole: EncodedAnswer, column: str, settings: PairSettings
) -> tuple[EncodedAnswer, bool, bool]:
    """A side within the limits.

    Raises:
        RowFault: if no token of its answer can be scored, or it is too long and must not be cut.
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
    lengths = f"prompt {whole.start} tokens, answer {len(whole.ids) - whole.start}, max_seq_len {settings.max_seq_len}"
    lengths += f", max_prompt_len {settings.max_prompt_len}"
    if (prompt_cut or answer_cut) and settings.truncation != "keep_prompt_end":
        raise RowFault(
            TOO_LONG,
            column,
            f"is too long ({lengths}); raise the limit, or set truncation: keep_prompt_end (cuts) or drop (leaves out)",
        )
    if side.start >= len(side.ids):
        raise RowFault(
            "prompt leaves no room",
            column,
            f"has no room for a single answer token ({lengths}); set max_prompt_len below max_seq_len, or raise max_seq_len",
        )
    return side, prompt_cut, answer_cut
