"""The preference data set: rows of any layout, tokenised once, with counts of truncations and errors for faulty rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tokenpref.data.adapting import adapt_tokenizer
from tokenpref.data.building import PairBuilder
from tokenpref.data.cache import AUTO, DataCache, find_cache
from tokenpref.data.chat import TemplateError
from tokenpref.data.encoding import (
    PairSettings,
    encode_side,
    fitted_side,
    wants_eos,
)
from tokenpref.data.order import weighted_selection
from tokenpref.data.packed import PairExample
from tokenpref.data.pairs import PairRow, RowFault
from tokenpref.data.report import DataReport
from tokenpref.data.row_reader import RowReader, row_reader
from tokenpref.data.sources import Rows, load_rows
from tokenpref.data.tokenization import cut_prompt, encode_prompt
from tokenpref.data.tokenizers import Tokenizer
from tokenpref.errors import ConfigError, DataError

__all__ = ["DataReport", "PairExample", "PairText", "PreferenceDataset", "WholeAnswer", "preference_dataset"]

TRUNCATIONS = ("keep_prompt_end", "drop", "error")
ON_FAULT = ("error", "drop")
_MOST_ROUNDS = 1000


@dataclass(frozen=True)
class PairText:
    """The texts of a pair. The prompt of a conversation is what the template renders.

    Attributes:
        prompt: text before the answers.
        chosen: text of the chosen answer, to which ``chosen_offsets`` refer.
        rejected: likewise.
    """

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class WholeAnswer:
    """An answer before truncation.

    Attributes:
        num_tokens: its number of tokens, including EOS.
        has_eos: whether it ends with EOS or the end of a turn.
        text: the text to which offsets refer.
        written: the answer as the row has it, which a chat template may have stripped or rewritten.
    """

    num_tokens: int
    has_eos: bool
    text: str
    written: str


class PreferenceDataset:
    """Tokenised preference pairs. Build it with :func:`preference_dataset`.

    The token ids are stored in flat arrays, and an item is made when it is requested.

    Attributes:
        report: counts of what was read and truncated.
        source_name: the data's name.
        tokenizer: the tokenizer that made the ids.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        rows: Rows,
        reader: RowReader,
        settings: PairSettings,
        on_fault: str,
        cache: DataCache | None = None,
        weight: float = 1.0,
    ) -> None:
        self.tokenizer = tokenizer
        self.source_name = rows.name
        self._rows = rows
        self._reader = reader
        self._settings = settings
        self._packed, about = PairBuilder(tokenizer, rows, reader, settings, on_fault).build(cache)
        self._selected = weighted_selection(len(self._packed), weight)
        if self._selected is not None and len(self._selected) == 0:
            raise DataError(
                f"{rows.name}: weight {weight:g} leaves none of {len(self._packed)} pairs; set a larger weight"
            )
        self.report = self._report(about["counts"], about["dropped"])

    def _report(self, counts: Mapping[str, int], dropped: dict[str, int]) -> DataReport:
        packed = self._packed
        lengths = packed.lengths() - packed.starts
        return DataReport(
            source=self.source_name,
            layout=self._settings.layout,
            rows=len(packed),
            used=len(self),
            prompts_cut=counts.get("prompts_cut", 0),
            answers_cut=counts.get("answers_cut", 0),
            equal_after_cut=counts.get("equal_after_cut", 0),
            straddling_rows=counts.get("straddling_rows", 0),
            answers_with_eos=int(packed.has_eos.sum()),
            dropped=dropped,
            swapped=self._settings.swap,
            prompt_tokens=_mean_max(packed.starts[:, 0]),
            chosen_tokens=_mean_max(lengths[:, 0]),
            rejected_tokens=_mean_max(lengths[:, 1]),
            unused_columns=self._reader.unused,
        )

    def __len__(self) -> int:
        return len(self._packed if self._selected is None else self._selected)

    @property
    def parts(self) -> tuple[PreferenceDataset, ...]:
        """The data sets of a mixture, or this data set alone if it is not a mixture."""
        return (self,)

    def __getitem__(self, index: int) -> PairExample:
        packed, place = self._packed, self._place_of(index)
        (chosen_ids, chosen_offsets), (rejected_ids, rejected_offsets) = (
            packed.side(place, side) for side in (0, 1)
        )
        chosen_start, rejected_start = (int(start) for start in packed.starts[place])
        return PairExample(
            row=self._number(place),
            chosen_ids=chosen_ids,
            chosen_start=chosen_start,
            rejected_ids=rejected_ids,
            rejected_start=rejected_start,
            chosen_offsets=chosen_offsets,
            rejected_offsets=rejected_offsets,
            chosen_has_eos=bool(packed.has_eos[place, 0]),
            rejected_has_eos=bool(packed.has_eos[place, 1]),
            key=packed.key(place),
        )

    def __iter__(self) -> Iterator[PairExample]:
        return (self[index] for index in range(len(self)))

    def lengths(self, pairs: Sequence[int] | None = None) -> np.ndarray:
        """Tokens of the chosen and the rejected sequence of pairs, prompts included: int64 ``[pairs, 2]``.

        Args:
            pairs: positions in the data set; None for all.
        """
        return self._packed.lengths(self._places(pairs))

    def starts(self) -> np.ndarray:
        """Index of the first token of the answer on both sides of every pair: int32 ``[pairs, 2]``."""
        return self._packed.starts[self._places(None)]

    def has_eos(self) -> np.ndarray:
        """Whether the answers of both sides of every pair end with EOS or the end of a turn: bool ``[pairs, 2]``."""
        return self._packed.has_eos[self._places(None)]

    def rows(self) -> np.ndarray:
        """Number of every pair, as :class:`PairExample` has it: int64 ``[pairs]``."""
        part, row = np.divmod(self._packed.rows[self._places(None)], self._rows.table.num_rows)
        if self._rows.numbers:
            row = np.concatenate([np.arange(r.start, r.stop) for r in self._rows.numbers])[row]
        return row + part * self._rows.size

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return self._packed.longest if self._selected is None else int(self.lengths().max())

    @property
    def highest_id(self) -> int:
        """Largest token id."""
        return self._packed.highest_id

    def _places(self, pairs: Sequence[int] | None) -> Any:
        """The positions of some or all pairs among the packed pairs."""
        if pairs is None:
            return slice(None) if self._selected is None else self._selected
        positions = np.asarray(pairs, dtype=np.int64)
        return positions if self._selected is None else self._selected[positions]

    def _place_of(self, index: int) -> int:
        """The position of a pair among the packed pairs."""
        position = self._position(index)
        return position if self._selected is None else int(self._selected[position])

    def _position(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of a data set with {len(self)} pairs")
        return index % len(self)

    @property
    def columns(self) -> list[str]:
        """All columns of the source, also those that are not part of a pair."""
        return list(self._rows.table.column_names)

    def raw(self, index: int) -> dict[str, Any]:
        """The source's row of a pair with all columns, as it was read. ``swap`` does not change it."""
        return self._rows.table[self._source_of(self._place_of(index))[0]]

    def locate(self, index: int) -> str:
        """The place of a pair in the source, for messages."""
        row, part = self._source_of(self._place_of(index))
        return self._rows.locate(row) + (f", pair {part} of the row" if part else "")

    def _source_of(self, place: int) -> tuple[int, int]:
        """The row of a packed pair in the table, and the number of the pair within the row."""
        part, row = divmod(int(self._packed.rows[place]), self._rows.table.num_rows)
        return row, part

    def _number(self, place: int) -> int:
        row, part = self._source_of(place)
        return self._rows.number(row) + part * self._rows.size

    def _pair(self, index: int) -> PairRow:
        pair = self._reader.read(self.raw(index))[self._source_of(self._place_of(index))[1]]
        assert isinstance(pair, PairRow)  # it was a pair when it was tokenised
        return pair.swapped() if self._settings.swap else pair

    def margin(self, index: int) -> float | None:
        """How much better the chosen answer is, if the data says so, in the data's own unit. ``swap`` negates it."""
        return self._pair(index).margin

    def text(self, index: int) -> PairText:
        """The texts of a pair, sides swapped if the data set is."""
        pair = self._pair(index)
        chosen, rejected = (
            encode_side(
                self.tokenizer, pair, answer, wants_eos(self._settings, pair, marked), self._settings.add_bos
            )
            for answer, marked in (
                (pair.chosen, pair.chosen_complete),
                (pair.rejected, pair.rejected_complete),
            )
        )
        return PairText(chosen.prompt_text, chosen.text, rejected.text)

    def whole_answers(self, index: int) -> tuple[WholeAnswer, WholeAnswer]:
        """Both answers of a pair before truncation, swapped if the data set is. This tokenises them again."""
        pair = self._pair(index)
        answers = []
        for answer, marked in (
            (pair.chosen, pair.chosen_complete),
            (pair.rejected, pair.rejected_complete),
        ):
            whole = encode_side(
                self.tokenizer, pair, answer, wants_eos(self._settings, pair, marked), self._settings.add_bos
            )
            written = answer if isinstance(answer, str) else str(answer["content"])
            answers.append(WholeAnswer(len(whole.ids) - whole.start, whole.has_eos, whole.text, written))
        return answers[0], answers[1]

    def prompt_ids(self, index: int) -> list[int]:
        """The prompt tokenised alone, for generation, and truncated to ``max_prompt_len`` like the training prompts."""
        pair = self._pair(index)
        ids = encode_prompt(self.tokenizer, pair.prompt, self._settings.add_bos, pair.tools)
        num_special = 1 if self.tokenizer.bos_id is not None and ids[:1] == [self.tokenizer.bos_id] else 0
        return cut_prompt(ids, num_special, self._settings.max_prompt_len)

    def further_answer(self, index: int, column: str) -> tuple[list[int], int]:
        """Another answer to a pair's prompt. It is tokenised, truncated and ended like the pair's own answers.

        Args:
            index: position in the data set.
            column: the column of the answer, in the same form as the columns of the pair.

        Returns:
            Token ids, and the index of the first token of the answer; an empty answer has none.

        Raises:
            RowFault: if it cannot be used.
        """
        pair = self._pair(index)
        answer = self._reader.further_answer(self.raw(index), column, pair.prompt)
        if not (answer if isinstance(answer, str) else any(v for k, v in answer.items() if k != "role")):
            prompt = self.prompt_ids(index)
            return prompt, len(prompt)
        # A mark that both answers share applies to the row. Marks of one side say nothing about a third answer.
        mark = pair.chosen_complete if pair.chosen_complete == pair.rejected_complete else None
        try:
            whole = encode_side(
                self.tokenizer, pair, answer, wants_eos(self._settings, pair, mark), self._settings.add_bos
            )
        except (TemplateError, ValueError) as error:
            raise RowFault("tokenizer", column, str(error)) from error
        fitted, _, _ = fitted_side(whole, column, self._settings)
        return fitted.ids, fitted.start

    def with_side_prompt(self, index: int, side: str, prompt: str) -> tuple[list[int], int]:
        """An answer after a prompt of one side of a contrastive pair.

        In text rows the side's prompt is tokenised alone and put in front of the training ids. In conversations it becomes a
        system message (in front of the text of an existing one), and the prompt is rendered again without truncation. The
        ids of the answer are those of training.

        Args:
            index: position in the data set.
            side: "chosen" or "rejected".
            prompt: the side's prompt, used exactly as written.

        Returns:
            Token ids, and the index of the first token of the answer.
        """
        example = self[index]
        ids, start = (
            (example.chosen_ids, example.chosen_start)
            if side == "chosen"
            else (example.rejected_ids, example.rejected_start)
        )
        pair = self._pair(index)
        own = pair.prompt
        if isinstance(own, str):
            bos = ids[:1] if self.tokenizer.bos_id is not None and ids[0] == self.tokenizer.bos_id else []
            before = [*bos, *self.tokenizer.encode_with_offsets(prompt, False)[0], *ids[len(bos) : start]]
        else:
            before = encode_prompt(self.tokenizer, _with_system(own, prompt), tools=pair.tools)
        return [*before, *ids[start:]], len(before)

    def settings(self) -> dict[str, Any]:
        """How rows become tokens: format, EOS, BOS, lengths, truncation and swap, as plain data."""
        return dataclasses.asdict(self._settings)

    def fingerprint(self) -> str:
        """sha256 (hex) over the keys of all pairs in their order."""
        if self._selected is None:
            return self._packed.fingerprint
        return self._packed.fingerprint_of(self._selected)


def preference_dataset(
    tokenizer: object,
    source: str,
    *,
    data_files: str | Sequence[str] | Mapping[str, Any] | None = None,
    name: str | None = None,
    split: str = "train",
    format: str = "auto",
    column_map: Mapping[str, str | None] | None = None,
    preset: str | None = None,
    labels: Mapping[str, Any] | None = None,
    pairs: str = "best_worst",
    min_gap: float = 0.0,
    as_messages: bool | str = "auto",
    append_eos: bool | str = "auto",
    add_bos: bool | str = "auto",
    max_seq_len: int | None = 1024,
    max_prompt_len: int | None = None,
    truncation: str = "keep_prompt_end",
    on_fault: str = "error",
    max_rows: int | None = None,
    weight: float = 1.0,
    swap: bool = False,
    cache_dir: str | Path | None = AUTO,
) -> PreferenceDataset:
    """Preference pairs from files or the hub, tokenised.

    Args:
        tokenizer: this package's, or one of torchtune's.
        source: file, folder, ``package://`` path, file format (with ``data_files``) or hub name; see
            :func:`tokenpref.data.load_rows`.
        data_files: files of a file format.
        name: configuration of a hub data set.
        split: split, or slice of one such as ``train[:90%]``, rounded as ``datasets`` does; see :func:`load_rows`.
        format: ``auto``, ``explicit`` (prompt, chosen, rejected as text), ``implicit`` (chosen and rejected as text with a
            shared beginning), ``conversational`` (lists of messages), ``hh``
            (Anthropic's Human/Assistant text), ``labelled`` (two answers and a label) or ``ranked`` (a list of answers with
            scores or ranks).
        column_map: field to column, such as ``{prompt: question, chosen: win, rejected: lose}``, or to a path such as
            ``completions[].response``; null leaves out a column that would otherwise be read. Fields are prompt, chosen and
            rejected (labelled: first and second; ranked: answers, and score or rank), system, history, input, tools, margin,
            complete, chosen_complete and rejected_complete.
        preset: name of the layout of a known data set (:data:`tokenpref.data.presets.PRESETS`). It sets format, column_map and
            labels, and your own column_map and labels override parts of it.
        labels: for ``labelled``: ``{column, first, second, tie}``, the column with the label and its values (or lists of values;
            ``negative`` and ``positive`` stand for signs). Ties are left out and counted. Beside chosen and rejected,
            ``{column, tie}`` leaves ties out.
        pairs: for ``ranked``: ``best_worst``, ``all`` or ``adjacent`` (neighbours in the order of score or rank).
        min_gap: for ``ranked``: smallest difference of score or rank in a pair.
        as_messages: True makes messages of a text prompt and text answers; ``auto`` does so where the preset says it, and
            where a text prompt has a system, history or tools column beside it; False never does.
        append_eos: ``auto`` adds EOS to conversations, HH text and rows whose column ``complete`` (or ``chosen_complete``,
            ``rejected_complete``) is true, and to nothing else; True adds it to all, False to none.
        add_bos: ``auto`` does what the model's own tokenizer does for plain text.
        max_seq_len: longest sequence in tokens, BOS and EOS included; None for no limit.
        max_prompt_len: longest prompt in tokens, BOS included; None for no separate limit.
        truncation: what happens to rows that are too long. ``keep_prompt_end`` truncates prompts at their beginning and
            answers at their end, ``drop`` leaves such rows out, ``error`` stops.
        on_fault: ``error`` stops at rows that cannot be used, ``drop`` leaves them out; both say how many there are.
        max_rows: read only the first rows.
        weight: how often an epoch sees each pair, for mixing data sets: 2.0 sees each of them twice, 0.5 a fixed half of them.
        swap: exchange chosen and rejected.
        cache_dir: where the tokenised data is kept for later starts: ``auto`` (the folder that the environment variable
            ``TOKENPREF_CACHE`` names, or ``tokenpref`` in the cache of ``datasets``), a folder, or None for no cache.

    Raises:
        ConfigError: if an argument is out of range, or conversations meet a tokenizer without a chat template.
        DataError: if the source or its rows cannot be used.
    """
    if not isinstance(source, str) or not source:
        raise ConfigError(f"source must be a path or the name of a data set, got {source!r}")
    _check_weight(weight)
    _check_arguments(append_eos, add_bos, max_seq_len, max_prompt_len, truncation, on_fault, max_rows)
    adapted = adapt_tokenizer(tokenizer)
    rows = load_rows(source, data_files=data_files, name=name, split=split, cache_dir=cache_dir)
    if max_rows is not None:
        rows = rows.first(max_rows)
    reader = row_reader(
        rows.table,
        rows.name,
        format=format,
        column_map=column_map,
        preset=preset,
        labels=labels,
        pairs=pairs,
        min_gap=min_gap,
        as_messages=as_messages,
    )
    if reader.conversations and not adapted.has_chat:
        raise ConfigError(
            f"{rows.name} holds conversations, but the tokenizer has no chat template: set tokenizer.chat_template, put "
            "chat_template.jinja beside tokenizer.json, or use a torchtune tokenizer with tokenize_messages. If prompt and "
            "answers are text, as_messages: false joins them as they stand"
        )
    settings = PairSettings(
        layout=reader.layout,
        append_eos=None if append_eos == "auto" else bool(append_eos),
        add_bos=None if add_bos == "auto" else bool(add_bos),
        max_seq_len=max_seq_len,
        max_prompt_len=max_prompt_len,
        truncation=truncation,
        swap=swap,
    )
    return PreferenceDataset(adapted, rows, reader, settings, on_fault, find_cache(cache_dir), weight)


def _check_weight(weight: object) -> None:
    right = isinstance(weight, int | float) and not isinstance(weight, bool) and 0 < weight <= _MOST_ROUNDS
    if not right:
        raise ConfigError(
            f"weight must be a number above 0 and at most {_MOST_ROUNDS}, got {weight!r}; 1 sees every pair once an epoch"
        )


def _check_arguments(
    append_eos: object,
    add_bos: object,
    max_seq_len: int | None,
    max_prompt_len: int | None,
    truncation: object,
    on_fault: object,
    max_rows: object,
) -> None:
    faults = []
    for key, value in (("append_eos", append_eos), ("add_bos", add_bos)):
        if value != "auto" and not isinstance(value, bool):
            faults.append(f"{key} must be auto, true or false, got {value!r}")
    for key, value, least in (
        ("max_seq_len", max_seq_len, 2),
        ("max_prompt_len", max_prompt_len, 1),
        ("max_rows", max_rows, 1),
    ):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            faults.append(f"{key} must be an integer of at least {least}, or null, got {value!r}")
    if (
        not faults
        and max_seq_len is not None
        and max_prompt_len is not None
        and max_prompt_len >= max_seq_len
    ):
        faults.append(
            f"max_prompt_len ({max_prompt_len}) must be below max_seq_len ({max_seq_len}): answers need room"
        )
    for key, value, known in (("truncation", truncation, TRUNCATIONS), ("on_fault", on_fault, ON_FAULT)):
        if value not in known:
            faults.append(f"{key} must be one of {', '.join(known)}, got {value!r}")
    if faults:
        raise ConfigError(faults)


def _with_system(messages: Sequence[dict[str, Any]], prompt: str) -> list[dict[str, Any]]:
    """A conversation that begins with ``prompt`` as its system message."""
    if messages and messages[0]["role"] == "system":
        merged = {**messages[0], "content": f"{prompt}\n{messages[0]['content']}"}
        return [merged, *messages[1:]]
    return [{"role": "system", "content": prompt}, *messages]


def _mean_max(values: np.ndarray) -> tuple[float, int]:
    return float(values.mean()), int(values.max())
