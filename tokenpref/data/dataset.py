"""The preference data set: rows of any layout, tokenised once, with every cut counted and every fault named."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np

from tokenpref.data.chat import TemplateError
from tokenpref.data.formats import (
    PairRow,
    RowFault,
    detect_format,
    further_answer,
    mapped_columns,
    parse_row,
)
from tokenpref.data.sources import Rows, load_rows
from tokenpref.data.tokenization import (
    EncodedAnswer,
    cut_prompt,
    cut_to_length,
    encode_chat_answer,
    encode_prompt,
    encode_text_answer,
)
from tokenpref.data.tokenizers import Span, Tokenizer, adapt_tokenizer
from tokenpref.errors import ConfigError, DataError

__all__ = ["DataReport", "PairExample", "PairText", "PreferenceDataset", "WholeAnswer", "preference_dataset"]

TRUNCATIONS = ("keep_prompt_end", "drop", "error")
ON_FAULT = ("error", "drop")

_LISTED_FAULTS = 5


@dataclass(frozen=True)
class PairExample:
    """One tokenised pair.

    Attributes:
        row: row in the source, counted from 0.
        chosen_ids: prompt and chosen answer.
        chosen_start: index of the first token of the chosen answer; the prompt is ``chosen_ids[:chosen_start]``.
        rejected_ids: prompt and rejected answer.
        rejected_start: likewise.
        chosen_offsets: for each token of the answer, the characters that it covers in the answer's own text
            (:meth:`PreferenceDataset.text`); EOS has an empty span at its end.
        rejected_offsets: likewise.
        chosen_has_eos: whether the answer ends with EOS or the end of a turn.
        rejected_has_eos: likewise.
        key: sha256 (hex) of the token ids and starts of both sides: what a stored weight belongs to.
    """

    row: int
    chosen_ids: list[int]
    chosen_start: int
    rejected_ids: list[int]
    rejected_start: int
    chosen_offsets: list[Span]
    rejected_offsets: list[Span]
    chosen_has_eos: bool
    rejected_has_eos: bool
    key: str


@dataclass(frozen=True)
class PairText:
    """The texts of one pair; for conversations the prompt is what the template renders.

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
    """An answer before cutting.

    Attributes:
        num_tokens: its tokens, EOS included.
        has_eos: whether it ends with EOS or the end of a turn.
        text: the text to which offsets refer.
        written: the answer as the row has it, which a chat template may have stripped or rewritten.
    """

    num_tokens: int
    has_eos: bool
    text: str
    written: str


@dataclass(frozen=True)
class DataReport:
    """What was read, cut and left out.

    Attributes:
        source: the data's name.
        layout: format of the rows, found or declared.
        rows: pairs in the data set.
        prompts_cut: pairs whose prompt lost its beginning.
        answers_cut: answers (of 2 * rows) that lost their end, and with it their EOS.
        equal_after_cut: pairs whose sides became equal by cutting; they train nothing.
        straddling_rows: pairs with a token over the boundary of prompt and answer.
        answers_with_eos: answers (of 2 * rows) that end with EOS.
        dropped: rows left out, by reason.
        swapped: whether chosen and rejected were exchanged.
        prompt_tokens: mean and largest number of tokens of a prompt.
        chosen_tokens: the same of a chosen answer.
        rejected_tokens: the same of a rejected answer.
    """

    source: str
    layout: str
    rows: int
    prompts_cut: int
    answers_cut: int
    equal_after_cut: int
    straddling_rows: int
    answers_with_eos: int
    dropped: dict[str, int]
    swapped: bool
    prompt_tokens: tuple[float, int]
    chosen_tokens: tuple[float, int]
    rejected_tokens: tuple[float, int]

    def summary(self) -> str:
        """One short paragraph."""
        lengths = ", ".join(
            f"{name} {mean:.1f} (longest {largest})"
            for name, (mean, largest) in (
                ("prompt", self.prompt_tokens),
                ("chosen", self.chosen_tokens),
                ("rejected", self.rejected_tokens),
            )
        )
        text = f"{self.source}: {self.rows} pairs, format {self.layout}{', sides swapped' if self.swapped else ''}; "
        text += f"mean tokens: {lengths}. EOS ends {self.answers_with_eos} of {2 * self.rows} answers; "
        text += f"cut: {self.prompts_cut} prompts, {self.answers_cut} answers"
        if self.equal_after_cut:
            text += f" ({self.equal_after_cut} pairs have equal sides since)"
        text += f"; {self.straddling_rows} rows have a token over the boundary of prompt and answer."
        if self.dropped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))
            text += f" Left out {sum(self.dropped.values())} rows: {reasons}."
        return text


@dataclass(frozen=True)
class _Settings:
    layout: str
    append_eos: bool | None
    add_bos: bool | None
    max_seq_len: int | None
    max_prompt_len: int | None
    truncation: str
    swap: bool


class PreferenceDataset:
    """Tokenised preference pairs. Build it with :func:`preference_dataset`.

    The token ids lie in flat arrays; an item is made when it is asked for.

    Attributes:
        report: counts of what was read and cut.
        source_name: the data's name.
        tokenizer: the tokenizer that made the ids.
    """

    def __init__(
        self, tokenizer: Tokenizer, rows: Rows, columns: dict[str, str], settings: _Settings, on_fault: str
    ) -> None:
        self.tokenizer = tokenizer
        self.source_name = rows.name
        self._rows = rows
        self._fields = columns
        self._settings = settings
        packed = _Packed()
        faults = _Faults(rows)
        counts: Counter[str] = Counter()
        for number, row in enumerate(_needed(rows.table, columns)):
            try:
                sides, cuts = _encode_pair(tokenizer, row, columns, settings)
            except RowFault as fault:
                too_long = settings.truncation == "drop" and fault.kind == _TOO_LONG
                faults.add(number, fault, droppable=on_fault == "drop" or too_long)
                continue
            packed.add(number, *sides)
            counts.update(cuts)
        faults.raise_any()
        self._packed = packed.freeze()
        if len(self) == 0:
            raise DataError(f"{rows.name}: every row was left out ({faults.summary()}); no pair remains")
        self.report = self._report(counts, faults.dropped)

    def _report(self, counts: Counter[str], dropped: dict[str, int]) -> DataReport:
        packed = self._packed
        lengths = [packed.lengths(side) - packed.starts[:, side] for side in (0, 1)]
        return DataReport(
            source=self.source_name,
            layout=self._settings.layout,
            rows=len(self),
            prompts_cut=counts["prompts_cut"],
            answers_cut=counts["answers_cut"],
            equal_after_cut=counts["equal_after_cut"],
            straddling_rows=counts["straddling_rows"],
            answers_with_eos=int(packed.has_eos.sum()),
            dropped=dropped,
            swapped=self._settings.swap,
            prompt_tokens=_mean_max(packed.starts[:, 0]),
            chosen_tokens=_mean_max(lengths[0]),
            rejected_tokens=_mean_max(lengths[1]),
        )

    def __len__(self) -> int:
        return len(self._packed.rows)

    def __getitem__(self, index: int) -> PairExample:
        index = self._position(index)
        packed = self._packed
        (chosen_ids, chosen_offsets), (rejected_ids, rejected_offsets) = (
            packed.side(index, side) for side in (0, 1)
        )
        chosen_start, rejected_start = (int(start) for start in packed.starts[index])
        return PairExample(
            row=int(packed.rows[index]),
            chosen_ids=chosen_ids,
            chosen_start=chosen_start,
            rejected_ids=rejected_ids,
            rejected_start=rejected_start,
            chosen_offsets=chosen_offsets,
            rejected_offsets=rejected_offsets,
            chosen_has_eos=bool(packed.has_eos[index, 0]),
            rejected_has_eos=bool(packed.has_eos[index, 1]),
            key=pair_key(chosen_ids, chosen_start, rejected_ids, rejected_start),
        )

    def __iter__(self) -> Iterator[PairExample]:
        return (self[index] for index in range(len(self)))

    def lengths(self) -> np.ndarray:
        """Tokens of the chosen and the rejected sequence of every pair, prompts included: int64 ``[pairs, 2]``."""
        return np.stack([self._packed.lengths(side) for side in (0, 1)], axis=1)

    def _position(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of a data set with {len(self)} pairs")
        return index % len(self)

    @property
    def columns(self) -> list[str]:
        """Columns of the source, those that are no part of a pair included."""
        return list(self._rows.table.column_names)

    def raw(self, index: int) -> dict[str, Any]:
        """The source's row of a pair, all columns, as it was read (``swap`` does not touch it)."""
        return self._rows.table[int(self._packed.rows[self._position(index)])]

    def locate(self, index: int) -> str:
        """Where a pair stands in the source, for messages."""
        return self._rows.locate(int(self._packed.rows[self._position(index)]))

    def _pair(self, index: int) -> PairRow:
        return _read_pair(self.raw(index), self._fields, self._settings)

    def text(self, index: int) -> PairText:
        """The texts of a pair, sides swapped if the data set is."""
        pair = self._pair(index)
        chosen, rejected = (
            _encode_side(self.tokenizer, pair, answer, False, self._settings.add_bos)
            for answer in (pair.chosen, pair.rejected)
        )
        return PairText(chosen.prompt_text, chosen.text, rejected.text)

    def whole_answers(self, index: int) -> tuple[WholeAnswer, WholeAnswer]:
        """Both answers of a pair before cutting, sides swapped if the data set is; they are tokenised for it."""
        pair = self._pair(index)
        answers = []
        for answer, marked in (
            (pair.chosen, pair.chosen_complete),
            (pair.rejected, pair.rejected_complete),
        ):
            whole = _encode_side(
                self.tokenizer, pair, answer, _wants_eos(self._settings, marked), self._settings.add_bos
            )
            written = answer if isinstance(answer, str) else str(answer["content"])
            answers.append(WholeAnswer(len(whole.ids) - whole.start, whole.has_eos, whole.text, written))
        return answers[0], answers[1]

    def prompt_ids(self, index: int) -> list[int]:
        """The prompt tokenised alone, for generation; cut to ``max_prompt_len`` like the training prompts."""
        pair = self._pair(index)
        ids = encode_prompt(self.tokenizer, pair.prompt, self._settings.add_bos, pair.tools)
        num_special = 1 if self.tokenizer.bos_id is not None and ids[:1] == [self.tokenizer.bos_id] else 0
        return cut_prompt(ids, num_special, self._settings.max_prompt_len)

    def further_answer(self, index: int, column: str) -> tuple[list[int], int]:
        """Another answer to a pair's prompt, tokenised, cut and ended like the pair's own.

        Args:
            index: position in the data set.
            column: where it stands; laid out like the columns of the pair.

        Returns:
            Token ids, and the index of the first token of the answer; an empty answer has none.

        Raises:
            RowFault: if it cannot be used.
        """
        pair = self._pair(index)
        answer = further_answer(self.raw(index), column, pair.prompt, self._settings.layout)
        if not (answer if isinstance(answer, str) else answer["content"]):
            prompt = self.prompt_ids(index)
            return prompt, len(prompt)
        # A mark that both answers share is the row's; marks of one side say nothing about a third answer.
        mark = pair.chosen_complete if pair.chosen_complete == pair.rejected_complete else None
        try:
            whole = _encode_side(
                self.tokenizer, pair, answer, _wants_eos(self._settings, mark), self._settings.add_bos
            )
        except (TemplateError, ValueError) as error:
            raise RowFault("tokenizer", column, str(error)) from error
        fitted, _, _ = _fitted(whole, column, self._settings)
        return fitted.ids, fitted.start

    def with_side_prompt(self, index: int, side: str, prompt: str) -> tuple[list[int], int]:
        """An answer after a prompt of one side of a contrastive pair.

        For text rows the side's prompt stands in front of the training ids, tokenised alone; for conversations it is a
        system message (before the text of one that is there already) and the prompt is rendered anew, uncut. The
        answer's ids are those of training.

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
        hasher = hashlib.sha256()
        for example in self:
            hasher.update(bytes.fromhex(example.key))
        return hasher.hexdigest()


def preference_dataset(
    tokenizer: object,
    source: str,
    *,
    data_files: str | Sequence[str] | Mapping[str, Any] | None = None,
    name: str | None = None,
    split: str = "train",
    format: str = "auto",
    column_map: Mapping[str, str] | None = None,
    append_eos: bool | str = "auto",
    add_bos: bool | str = "auto",
    max_seq_len: int | None = 1024,
    max_prompt_len: int | None = None,
    truncation: str = "keep_prompt_end",
    on_fault: str = "error",
    max_rows: int | None = None,
    swap: bool = False,
) -> PreferenceDataset:
    """Preference pairs from files or the hub, tokenised.

    Args:
        tokenizer: this package's, or one of torchtune's.
        source: file, folder, ``package://`` path, file format (with ``data_files``) or hub name; see
            :func:`tokenpref.data.load_rows`.
        data_files: files of a file format.
        name: configuration of a hub data set.
        split: split of a hub data set or folder.
        format: ``auto``, ``explicit`` (prompt, chosen, rejected as text), ``implicit`` (chosen and rejected as text with a
            shared beginning), ``conversational`` (lists of messages) or ``hh`` (Anthropic's Human/Assistant text).
        column_map: field to column, such as ``{prompt: question, chosen: win, rejected: lose}``.
        append_eos: ``auto`` adds EOS to conversations, HH text and rows whose column ``complete`` (or ``chosen_complete``,
            ``rejected_complete``) is true, and to nothing else; True adds it to all, False to none.
        add_bos: ``auto`` does what the model's own tokenizer does for plain text.
        max_seq_len: longest sequence in tokens, BOS and EOS included; None for no limit.
        max_prompt_len: longest prompt in tokens, BOS included; None for no limit of its own.
        truncation: what happens to rows that are too long. ``keep_prompt_end`` cuts prompts from their beginning and
            answers at their end, ``drop`` leaves such rows out, ``error`` stops.
        on_fault: ``error`` stops at rows that cannot be used, ``drop`` leaves them out; both say how many there are.
        max_rows: read only the first rows.
        swap: exchange chosen and rejected.

    Raises:
        ConfigError: if an argument is out of range, or conversations meet a tokenizer without a chat template.
        DataError: if the source or its rows cannot be used.
    """
    if not isinstance(source, str) or not source:
        raise ConfigError(f"source must be a path or the name of a data set, got {source!r}")
    _check_arguments(append_eos, add_bos, max_seq_len, max_prompt_len, truncation, on_fault, max_rows)
    adapted = adapt_tokenizer(tokenizer)
    rows = load_rows(source, data_files=data_files, name=name, split=split)
    if max_rows is not None and max_rows < rows.table.num_rows:
        rows = Rows(rows.table.select(range(max_rows)), rows.name, rows.files)
    columns = mapped_columns(rows.table.column_names, column_map, rows.name)
    layout = detect_format(_first_full(rows.table, columns), columns, format, rows.name)
    if layout == "conversational" and not adapted.has_chat:
        raise ConfigError(
            f"{rows.name} holds conversations, but the tokenizer has no chat template: set tokenizer.chat_template, put "
            "chat_template.jinja beside tokenizer.json, or use a torchtune tokenizer with tokenize_messages"
        )
    settings = _Settings(
        layout=layout,
        append_eos=None if append_eos == "auto" else bool(append_eos),
        add_bos=None if add_bos == "auto" else bool(add_bos),
        max_seq_len=max_seq_len,
        max_prompt_len=max_prompt_len,
        truncation=truncation,
        swap=swap,
    )
    return PreferenceDataset(adapted, rows, columns, settings, on_fault)


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


def _needed(table: datasets.Dataset, columns: Mapping[str, str]) -> datasets.Dataset:
    return table.select_columns(sorted(set(columns.values())))


def _first_full(table: datasets.Dataset, columns: Mapping[str, str]) -> dict[str, Any]:
    """A row that shows the layout: the first one without a missing field, or the first one if all miss something."""
    needed = _needed(table, columns)
    fields = [columns[f] for f in ("prompt", "chosen", "rejected") if f in columns]
    return next((row for row in needed if all(row[f] is not None for f in fields)), needed[0])


def pair_key(
    chosen_ids: Sequence[int], chosen_start: int, rejected_ids: Sequence[int], rejected_start: int
) -> str:
    """sha256 (hex) of the training token ids: for each side its length, its start and its ids, as little-endian int64."""
    numbers = [len(chosen_ids), chosen_start, *chosen_ids, len(rejected_ids), rejected_start, *rejected_ids]
    return hashlib.sha256(np.asarray(numbers, dtype="<i8").tobytes()).hexdigest()


def _read_pair(row: Mapping[str, Any], columns: Mapping[str, str], settings: _Settings) -> PairRow:
    pair = parse_row(row, columns, settings.layout)
    if not settings.swap:
        return pair
    return dataclasses.replace(
        pair,
        chosen=pair.rejected,
        rejected=pair.chosen,
        chosen_complete=pair.rejected_complete,
        rejected_complete=pair.chosen_complete,
    )


def _encode_pair(
    tokenizer: Tokenizer, row: Mapping[str, Any], columns: Mapping[str, str], settings: _Settings
) -> tuple[tuple[EncodedAnswer, EncodedAnswer], Counter[str]]:
    """Both sides of a row, and what happened to them.

    Raises:
        RowFault: if the row cannot be used.
    """
    pair = _read_pair(row, columns, settings)
    names = (
        [columns["rejected"], columns["chosen"]]
        if settings.swap
        else [columns["chosen"], columns["rejected"]]
    )
    sides: list[EncodedAnswer] = []
    cuts: Counter[str] = Counter()
    complete = (pair.chosen_complete, pair.rejected_complete)
    prompt_cut = False
    for answer, marked, column in zip((pair.chosen, pair.rejected), complete, names, strict=True):
        try:
            whole = _encode_side(tokenizer, pair, answer, _wants_eos(settings, marked), settings.add_bos)
        except TemplateError as error:
            raise RowFault("template", column, f"the chat template refuses it: {error}") from error
        except ConfigError:
            raise  # no row is at fault, and leaving rows out mends nothing
        except ValueError as error:
            raise RowFault("tokenizer", column, str(error)) from error
        side, cut, answer_cut = _fitted(whole, column, settings)
        prompt_cut |= cut
        cuts["answers_cut"] += answer_cut
        sides.append(side)
    chosen, rejected = sides
    cuts["prompts_cut"] = int(prompt_cut)
    cuts["straddling_rows"] = int(chosen.straddles or rejected.straddles)
    if (chosen.ids, chosen.start) == (rejected.ids, rejected.start):
        if not prompt_cut and not cuts["answers_cut"]:
            raise RowFault("equal tokens", names[1], f"has the same tokens as {names[0]}; remove the row")
        cuts["equal_after_cut"] = 1
    return (chosen, rejected), cuts


def _wants_eos(settings: _Settings, marked: bool | None) -> bool:
    if settings.append_eos is not None:
        return settings.append_eos
    if marked is not None:
        return marked
    return settings.layout in ("conversational", "hh")


def _encode_side(
    tokenizer: Tokenizer,
    pair: PairRow,
    answer: str | Mapping[str, Any],
    append_eos: bool,
    add_bos: bool | None,
) -> EncodedAnswer:
    if isinstance(answer, str):
        text = str(pair.prompt)  # a text answer comes with a text prompt
        return encode_text_answer(tokenizer, text, answer, add_bos=add_bos, append_eos=append_eos)
    messages: list[dict[str, Any]] = list(pair.prompt)  # type: ignore[arg-type]
    return encode_chat_answer(tokenizer, messages, answer, append_eos=append_eos, tools=pair.tools)


_TOO_LONG = "too long"


def _fitted(whole: EncodedAnswer, column: str, settings: _Settings) -> tuple[EncodedAnswer, bool, bool]:
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
            _TOO_LONG,
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


def _with_system(messages: Sequence[dict[str, Any]], prompt: str) -> list[dict[str, Any]]:
    """A conversation that begins with ``prompt`` as its system message."""
    if messages and messages[0]["role"] == "system":
        merged = {**messages[0], "content": f"{prompt}\n{messages[0]['content']}"}
        return [merged, *messages[1:]]
    return [{"role": "system", "content": prompt}, *messages]


def _mean_max(values: np.ndarray) -> tuple[float, int]:
    return float(values.mean()), int(values.max())


class _Faults:
    """Faults of all rows, reported once."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._found: dict[str, list[tuple[int, RowFault]]] = {}
        self.dropped: dict[str, int] = {}

    def add(self, row: int, fault: RowFault, *, droppable: bool) -> None:
        if droppable:
            self.dropped[fault.kind] = self.dropped.get(fault.kind, 0) + 1
        else:
            self._found.setdefault(fault.kind, []).append((row, fault))

    def summary(self) -> str:
        return ", ".join(f"{count} {kind}" for kind, count in sorted(self.dropped.items()))

    def raise_any(self) -> None:
        """Raise for the first faulty row, with the number of rows like it and the first few of them."""
        if not self._found:
            return
        kind, alike = next(iter(self._found.items()))
        row, fault = alike[0]
        message = f"{self._rows.locate(row)}, column {fault.column!r}: {fault.message}"
        if len(alike) > 1:
            listed = ", ".join(str(number) for number, _ in alike[:_LISTED_FAULTS])
            more = ", ..." if len(alike) > _LISTED_FAULTS else ""
            message += f" [{kind}: {len(alike)} rows in all: {listed}{more}]"
        others = {k: len(v) for k, v in self._found.items() if k != kind}
        if others:
            message += " [other faults: " + ", ".join(f"{count} {k}" for k, count in others.items()) + "]"
        raise DataError(f"{message}. To leave faulty rows out and count them, set on_fault: drop")


@dataclass
class _Packed:
    """Token ids and spans of all pairs in flat arrays; side 0 is chosen, side 1 rejected."""

    rows: Any = field(default_factory=list)
    ids: Any = field(default_factory=list)
    spans: Any = field(default_factory=list)
    ends: Any = field(default_factory=lambda: [0])  # of each side's ids, in the order chosen, rejected
    span_ends: Any = field(default_factory=lambda: [0])
    starts: Any = field(default_factory=list)
    has_eos: Any = field(default_factory=list)

    def add(self, row: int, chosen: EncodedAnswer, rejected: EncodedAnswer) -> None:
        self.rows.append(row)
        self.starts.append((chosen.start, rejected.start))
        self.has_eos.append((chosen.has_eos, rejected.has_eos))
        for side in (chosen, rejected):
            self.ids.append(np.asarray(side.ids, dtype=np.int32))
            self.spans.append(np.asarray(side.spans, dtype=np.int32).reshape(-1, 2))
            self.ends.append(self.ends[-1] + len(side.ids))
            self.span_ends.append(self.span_ends[-1] + len(side.spans))

    def freeze(self) -> _Packed:
        nothing = np.zeros((0,), dtype=np.int32)
        return _Packed(
            rows=np.asarray(self.rows, dtype=np.int64),
            ids=np.concatenate([nothing, *self.ids]),
            spans=np.concatenate([nothing.reshape(0, 2), *self.spans]),
            ends=np.asarray(self.ends, dtype=np.int64),
            span_ends=np.asarray(self.span_ends, dtype=np.int64),
            starts=np.asarray(self.starts, dtype=np.int64).reshape(-1, 2),
            has_eos=np.asarray(self.has_eos, dtype=bool).reshape(-1, 2),
        )

    def lengths(self, side: int) -> np.ndarray:
        return np.diff(self.ends)[side::2]

    def side(self, index: int, side: int) -> tuple[list[int], list[Span]]:
        place = 2 * index + side
        ids = self.ids[self.ends[place] : self.ends[place + 1]].tolist()
        spans = self.spans[self.span_ends[place] : self.span_ends[place + 1]].tolist()
        return ids, [(start, end) for start, end in spans]
