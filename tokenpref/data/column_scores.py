"""Scores of answer tokens from columns of the data."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from tokenpref._checks import check_choice, check_number
from tokenpref.data.dataset import PairExample, PreferenceDataset, WholeAnswer
from tokenpref.data.pairs import RowFault
from tokenpref.data.stored_scores import PairScores
from tokenpref.data.tokenizers import Span
from tokenpref.errors import DataError
from tokenpref.weights.spans import values_of_tokens
from tokenpref.weights.transforms import SCORE_KINDS

__all__ = ["SCORED_UNITS", "ColumnScores"]

SCORED_UNITS = ("token", "span", "pair")
"""What a number in a column applies to."""

_LISTED_FAULTS = 5


class ColumnScores:
    """Scores from the data, with one column for each answer.

    - ``per: token``: a list of numbers, one for each token of the answer, with or without one for its EOS. It covers the
      answer before truncation; if the answer is truncated, the first numbers are used.
    - ``per: span``: a list of ``[start, end, value]``, half-open, in characters of the answer's own text
      (:meth:`PreferenceDataset.text`). A token gets the mean of the spans that it overlaps, weighted by characters
      (:func:`tokenpref.weights.values_of_tokens`); EOS has no score.
    - ``per: pair``: one number for all tokens of the answer, including EOS.

    The columns refer to the source's chosen and rejected answer. With the data set's ``swap``, each answer keeps its
    scores.

    Args:
        kind: ``weight`` (used unchanged, non-negative), ``log_ratio`` (log pi+ - log pi- on both sides) or ``tis_release``
            (the published TIS-DPO data: log pi- - log pi+ on both sides, per token, none for EOS).
        per: ``token``, ``span`` or ``pair``.
        chosen: column of the chosen answer.
        rejected: column of the rejected answer.
        default: with per span, the score of a token without a span; None means 1 for kind weight and 0 otherwise.

    Raises:
        ValueError: if an argument is out of range or does not fit the others.
    """

    def __init__(
        self,
        kind: str,
        per: str,
        chosen: str = "chosen_weights",
        rejected: str = "rejected_weights",
        default: float | None = None,
    ) -> None:
        self.kind = check_choice("kind", kind, SCORE_KINDS)
        self.per = check_choice("per", per, SCORED_UNITS)
        for name, column in (("chosen", chosen), ("rejected", rejected)):
            if not isinstance(column, str) or not column:
                raise ValueError(f"{name} must be the name of a column, got {column!r}")
        if kind == "tis_release" and per != "token":
            raise ValueError(
                f"kind tis_release has one number a token, got per: {per}; set per: token, or kind: log_ratio for "
                f"log pi+ - log pi- per {per}"
            )
        if default is not None and per != "span":
            raise ValueError(
                f"default: {default!r} is the score of a token that no span touches, but per is {per}; set default: null "
                "or per: span"
            )
        least = 0.0 if kind == "weight" else None
        absent = 1.0 if kind == "weight" else 0.0
        self.default = absent if default is None else check_number("default", default, at_least=least)
        self.columns = (chosen, rejected)

    def load(self, dataset: PreferenceDataset) -> list[PairScores]:
        """The scores of all pairs in the data set's order: float64, with nan for an EOS without a score.

        Raises:
            DataError: if a column is missing, or for the first row whose scores cannot be used, with the number of rows
                like it.
        """
        if len(dataset.parts) > 1:  # each has its own settings, and perhaps its own columns
            return [scores for part in dataset.parts for scores in self.load(part)]
        if dataset.report.layout in ("labelled", "ranked"):
            raise DataError(
                f"{dataset.source_name} is read with format: {dataset.report.layout}, where label or rank decide which answer is "
                "chosen, so a column of scores belongs to no side; write the pairs to a file with chosen and rejected first"
            )
        self._check_columns(dataset)
        settings = dataset.settings()
        columns = self.columns[::-1] if settings["swap"] else self.columns
        scores: list[PairScores] = []
        faults: dict[str, list[tuple[int, RowFault]]] = {}
        for index, example in enumerate(dataset):
            raw = dataset.raw(index)
            sides = _answers(dataset, index, example, settings["max_seq_len"])
            try:
                chosen, rejected = (
                    self._scores(raw[column], column, answer)
                    for column, answer in zip(columns, sides, strict=True)
                )
            except RowFault as fault:
                faults.setdefault(fault.kind, []).append((index, fault))
                continue
            scores.append((chosen, rejected))
        if faults:
            raise DataError(_described(dataset, faults))
        return scores

    def _check_columns(self, dataset: PreferenceDataset) -> None:
        for side, column in zip(("chosen", "rejected"), self.columns, strict=True):
            if column not in dataset.columns:
                close = difflib.get_close_matches(column, dataset.columns, n=1)
                raise DataError(
                    f"{dataset.source_name} has no column {column!r} with the scores of the {side} answers; its columns "
                    f"are {', '.join(dataset.columns)}. Set token_weights.{side} to one of them"
                    + (f"; did you mean {close[0]!r}?" if close else "")
                )

    def _scores(self, value: Any, column: str, answer: _Answer) -> np.ndarray:
        if value is None:
            raise RowFault("no scores", column, "has no value; fill it in or remove the row")
        if self.per == "pair":
            return np.full(len(answer.spans), self._number(value, column, "the value"))
        if not isinstance(value, Sequence) or isinstance(value, str):
            wanted = "numbers" if self.per == "token" else "[start, end, value]"
            raise RowFault(
                "wrong type",
                column,
                f"must be a list of {wanted} with per: {self.per}, found {_shown(value)}"
                + ("; one number an answer is per: pair" if _is_number(value) else ""),
            )
        return (
            self._per_token(value, column, answer)
            if self.per == "token"
            else self._per_span(value, column, answer)
        )

    def _number(self, value: Any, column: str, where: str) -> float:
        if not _is_number(value):
            raise RowFault("wrong type", column, f"{where} must be a number, found {_shown(value)}")
        if not math.isfinite(value):
            raise RowFault("not finite", column, f"{where} is {value}; scores must be finite")
        if self.kind == "weight" and value < 0:
            raise RowFault(
                "negative weight",
                column,
                f"{where} is {value}, and weights must not be negative; if these are log ratios, set kind: log_ratio",
            )
        return float(value)

    def _per_token(self, value: Sequence[Any], column: str, answer: _Answer) -> np.ndarray:
        numbers = [self._number(v, column, f"the score of token {t}") for t, v in enumerate(value)]
        plain, with_eos = answer.lengths()
        wanted = {plain} if self.kind == "tis_release" else {plain, with_eos}
        if len(numbers) not in wanted:
            raise RowFault("wrong length", column, self._length_fault(len(numbers), plain, with_eos))
        kept = np.full(len(answer.spans), np.nan)
        kept[: len(numbers)] = numbers[: len(kept)]
        return kept

    def _length_fault(self, found: int, plain: int, with_eos: int) -> str:
        message = f"has {found} scores and the answer {plain} tokens"
        if with_eos > plain:
            release = self.kind == "tis_release"
            message += (
                " before its EOS, which has no score in the release's rows"
                if release
                else f" ({with_eos} with EOS)"
            )
        return (
            f"{message}. Use the tokenizer, append_eos and chat template that the scores were made with (a cut answer needs "
            "the scores of the whole one), or give the scores to characters, with per: span"
        )

    def _per_span(self, value: Sequence[Any], column: str, answer: _Answer) -> np.ndarray:
        triples = [self._span(span, column, f"span {number}") for number, span in enumerate(value)]
        spans = [span for span, _ in triples]
        if spans:
            _check_text(spans, column, answer)
        tokens = answer.spans[:-1] if answer.has_eos else answer.spans
        scores = values_of_tokens(tokens, spans, [v for _, v in triples], default=self.default)
        return np.append(scores, np.nan) if answer.has_eos else scores

    def _span(self, span: Any, column: str, name: str) -> tuple[Span, float]:
        if not isinstance(span, Sequence) or isinstance(span, str) or len(span) != 3:
            raise RowFault("wrong type", column, f"{name} must be [start, end, value], found {_shown(span)}")
        start, end, value = span
        if not all(
            _is_number(place) and math.isfinite(place) and place == int(place) for place in (start, end)
        ):
            raise RowFault(
                "wrong type",
                column,
                f"start and end of {name} must be whole numbers, found {_shown(list(span))}",
            )
        return (int(start), int(end)), self._number(value, column, f"the value of {name}")


@dataclass(frozen=True)
class _Answer:
    """An answer as it is trained, with access to the pair's untruncated answers, which needs a tokenisation."""

    side: int
    spans: list[Span]
    has_eos: bool
    maybe_cut: bool
    conversation: bool
    read: Callable[[], tuple[WholeAnswer, WholeAnswer]]

    def whole(self) -> WholeAnswer:
        return self.read()[self.side]

    def lengths(self) -> tuple[int, int]:
        """The numbers of tokens before truncation, without and with EOS; they are equal if the answer has no EOS."""
        if self.maybe_cut:
            whole = self.whole()
            return whole.num_tokens - whole.has_eos, whole.num_tokens
        return len(self.spans) - self.has_eos, len(self.spans)


def _answers(
    dataset: PreferenceDataset, index: int, example: PairExample, max_seq_len: int | None
) -> tuple[_Answer, _Answer]:
    read = cache(lambda: dataset.whole_answers(index))

    def answer(side: int, ids: list[int], spans: list[Span], has_eos: bool) -> _Answer:
        # A truncated answer fills its sequence and has lost its EOS.
        maybe_cut = max_seq_len is not None and len(ids) >= max_seq_len and not has_eos
        return _Answer(side, spans, has_eos, maybe_cut, dataset.report.layout == "conversational", read)

    return (
        answer(0, example.chosen_ids, example.chosen_offsets, example.chosen_has_eos),
        answer(1, example.rejected_ids, example.rejected_offsets, example.rejected_has_eos),
    )


def _check_text(spans: Sequence[Span], column: str, answer: _Answer) -> None:
    """Refuse spans outside the answer's text, and texts whose positions differ from those in the data."""
    seen = max((end for _, end in answer.spans), default=0)
    # The end of the last token is a lower bound of the text's length, which decides almost every row without the text.
    if not answer.conversation and all(0 <= start < end <= seen for start, end in spans):
        return
    whole = answer.whole()
    if whole.text not in (whole.written, whole.written.rstrip()):
        raise RowFault(
            "text changed by template",
            column,
            f"counts characters of {_shown(whole.written)}, but the chat template makes {_shown(whole.text)} of it; store the "
            "message as the template writes it (most strip white space at its beginning), and count from there",
        )
    for number, (start, end) in enumerate(spans):
        # A template may have stripped white space at the end. Those positions exist in the data, but no token covers them.
        if not 0 <= start < end <= len(whole.written):
            raise RowFault(
                "span outside",
                column,
                f"span {number} is [{start}, {end}), and must have 0 <= start < end <= {len(whole.written)}, the number of "
                "characters of the answer; places count from the answer's own beginning, the prompt left out",
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _described(dataset: PreferenceDataset, faults: dict[str, list[tuple[int, RowFault]]]) -> str:
    """An error about the first faulty row, the rows like it, and the number of others."""
    kind, alike = next(iter(faults.items()))
    index, fault = alike[0]
    message = f"{dataset.locate(index)}, column {fault.column!r}: {fault.message}"
    if len(alike) > 1:
        listed = ", ".join(str(dataset[i].row) for i, _ in alike[:_LISTED_FAULTS])
        more = ", ..." if len(alike) > _LISTED_FAULTS else ""
        message += f" [{kind}: {len(alike)} rows in all: {listed}{more}]"
    others = ", ".join(f"{len(rows)} {name}" for name, rows in faults.items() if name != kind)
    return message + (f" [other faults: {others}]" if others else "")
