"""Reads a data set's rows as pairs. Columns and format are decided once and then used for every row."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import regex

from tokenpref.data.columns import column_of, value_at
from tokenpref.data.conversations import CONTEXT_FIELDS, is_history
from tokenpref.data.formats import check_format, detect_format, further_answer, mapped_columns, parse_row
from tokenpref.data.labelled import TIE, Choice, Labels, as_number, labels_from, said_tie
from tokenpref.data.pairs import LeftOut, Messages, PairRow, RowFault
from tokenpref.data.presets import OPTIONAL, Preset, fitting_presets, preset_named
from tokenpref.data.ranked import Ranking, check_ranking
from tokenpref.errors import ConfigError, DataError

__all__ = ["RowReader", "row_reader"]

# Names of columns that hold a prompt.
_PROMPT_NAMES = (
    "instruction",
    "question",
    "query",
    "input",
    "context",
    "post",
    "problem",
    "conversations",
    "conversation",
)
# Words in names of columns that belong to prompt or answer, and words in names of columns that only describe them.
_TELLING_WORDS = frozenset(
    {"system", "history", "tool", "tools", "function", "functions", "context", "input"}
) | {
    *("instruction", "question", "query", "messages", "conversation", "conversations", "dialogue", "persona"),
    *("document", "documents", "passage", "passages", "reasoning", "thinking", "thought", "thoughts"),
    *("image", "images", "video", "videos", "audio"),
}
_NOT_CONTENT = frozenset(
    {"id", "ids", "idx", "index", "url", "source", "type", "tokens", "count", "length", "hash"}
)
# Names of columns that may say that a pair is a tie.
_VERDICTS = ("label", "labels", "winner", "preference", "verdict", "outcome", "vote", "status")


@dataclass(frozen=True)
class RowReader:
    """Makes pairs from the rows of a data set. It can be pickled, so several processes can use it.

    Attributes:
        layout: format of the rows, found or declared.
        inner: format of each pair, for rows of which pairs are made (labelled, ranked); otherwise the same.
        fields: field of a pair to column of the data, or to a path into it.
        columns: columns of the source that reading needs.
        unused: columns that are not read, although they seem to belong to prompt or answers.
        judge: which answers make pairs, or which rows are ties; None if the rows say neither.
        verdicts: columns in which text such as "tie" leaves a row out.
        complete: whether answers of text rows end where they end in the data, if the row itself says nothing.
        after_prompt: text between a text prompt and the answers.
    """

    layout: str
    inner: str
    fields: dict[str, str]
    columns: tuple[str, ...]
    unused: tuple[str, ...] = ()
    judge: Labels | Ranking | None = None
    verdicts: tuple[str, ...] = ()
    complete: bool = False
    after_prompt: str = ""

    @property
    def conversations(self) -> bool:
        """Whether answers are messages, which need a chat template."""
        return self.inner == "conversational"

    def read(self, row: Mapping[str, Any]) -> list[PairRow | LeftOut | RowFault]:
        """The pairs of a row of the source, usually one, or the row's fault.

        The position in the list is the number of the pair within its row; it depends on the row and the settings alone.
        """
        try:
            values = self._values(row)
            choices = self._choices(values, row)
        except RowFault as fault:
            return [fault]
        return [self._pair(values, choice) for choice in choices]

    def _values(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The values at the paths of the fields."""
        paths = [*self.fields.values(), *([self.judge.column] if isinstance(self.judge, Labels) else [])]
        return {path: value_at(row, path) for path in dict.fromkeys(paths)}

    def _choices(self, values: Mapping[str, Any], row: Mapping[str, Any]) -> Sequence[Choice | LeftOut]:
        if isinstance(self.judge, Ranking):
            return self.judge.choices(values)
        label = values[self.judge.column] if self.judge is not None else None
        if self.layout == "labelled":
            assert self.judge is not None
            better = self.judge.read(label)
            if isinstance(better, LeftOut):
                return [better]
            worse = "second" if better == "first" else "first"
            return [Choice(self.fields[better], self.fields[worse], {}, self.judge.margin(label))]
        if (self.judge is not None and self.judge.is_tie(label)) or any(
            said_tie(row[c]) for c in self.verdicts
        ):
            return [TIE]
        return [Choice(self.fields["chosen"], self.fields["rejected"], {})]

    def _pair(self, values: Mapping[str, Any], choice: Choice | LeftOut) -> PairRow | LeftOut | RowFault:
        if isinstance(choice, LeftOut):
            return choice
        fields = {**self.fields, "chosen": choice.chosen, "rejected": choice.rejected}
        try:
            pair = parse_row({**values, **choice.values}, fields, self.inner)
            margin = choice.margin
            if "margin" in fields and values[fields["margin"]] is not None:
                margin = as_number(values[fields["margin"]], fields["margin"], "margin")
        except RowFault as fault:
            return fault
        if margin is None and not self.complete and not self.after_prompt:
            return pair
        prompt = pair.prompt + self.after_prompt if isinstance(pair.prompt, str) else pair.prompt
        return dataclasses.replace(pair, prompt=prompt, margin=margin, turns=pair.turns or self.complete)

    def further_answer(
        self, row: Mapping[str, Any], column: str, prompt: str | Messages
    ) -> str | dict[str, Any]:
        """Another answer to the prompt of a row's pair; see :func:`further_answer`."""
        return further_answer(row, column, prompt, self.inner)

    def settings(self) -> dict[str, Any]:
        """Everything that decides how a row is read, as plain data, for the addresses of caches."""
        # The end of an implicit prompt depends on the version of Unicode.
        return {
            **dataclasses.asdict(self),
            "unicode": regex.__version__ if self.inner == "implicit" else None,
        }


def row_reader(
    table: datasets.Dataset,
    source: str,
    *,
    format: str = "auto",
    column_map: Mapping[str, str | None] | None = None,
    preset: str | None = None,
    labels: Mapping[str, Any] | None = None,
    pairs: str = "best_worst",
    min_gap: float = 0.0,
    as_messages: bool | str = "auto",
) -> RowReader:
    """The reader of a data set's rows.

    Args:
        table: its rows.
        source: its name, for messages.
        format: ``auto`` or one of :data:`FORMATS`.
        column_map: field to column or path; null leaves a column out that would be read.
        preset: name of a known layout, of which ``column_map`` and ``labels`` may change parts.
        labels: which values of which column say which answer is better.
        pairs: which pairs a list of ranked answers gives.
        min_gap: smallest difference of score or rank in a pair of ranked answers.
        as_messages: whether text becomes messages; ``auto`` does what the preset says.

    Raises:
        ConfigError: if a setting is wrong by itself.
        DataError: if the columns or the first rows are not of this format.
    """
    known = preset_named(preset) if preset is not None else None
    declared = _declared_format(format, known, preset)
    _check_settings(declared, labels, pairs, min_gap, as_messages)
    messages = (known is not None and known.as_messages) if as_messages == "auto" else bool(as_messages)
    available = table.column_names
    given = {**_own_map(known, column_map, available), **(column_map or {})}
    if declared == "auto":
        _refuse_known_layout(available, given, source)
    fields = mapped_columns(available, given, source, declared)
    label_settings = {**(known.labels if known and known.labels else {}), **(labels or {})} or None
    reader = RowReader(
        declared,
        "",
        fields,
        (),
        judge=_judge(declared, fields, label_settings, pairs, min_gap, available, source),
        complete=known is not None and known.complete,
        after_prompt=known.after_prompt if known is not None and not messages else "",
    )
    reader = _with_layout(reader, table, source, given, messages, stays_text=as_messages is False)
    return _with_columns(reader, available, given)


def _declared_format(declared: str, known: Preset | None, preset: str | None) -> str:
    check_format(declared)
    if known is None:
        return declared
    # A preset's conversational data may be lists of messages or text, which the first row shows.
    own = "auto" if known.format == "conversational" else known.format
    if declared not in ("auto", known.format):
        raise ConfigError(
            f"preset: {preset} has format: {known.format}, but format: {declared} was set; set format: auto"
        )
    return own


def _check_settings(
    declared: str, labels: object, pairs: object, min_gap: object, as_messages: object
) -> None:
    check_ranking(pairs, min_gap)
    if as_messages != "auto" and not isinstance(as_messages, bool):
        raise ConfigError(f"as_messages must be auto, true or false, got {as_messages!r}")
    if labels is not None and not isinstance(labels, Mapping):
        raise ConfigError(
            f"labels must be {{column: ..., first: ..., second: ..., tie: ...}}, got {labels!r}"
        )
    if declared != "ranked" and (pairs, min_gap) != ("best_worst", 0.0):
        raise ConfigError("pairs and min_gap go with format: ranked (or a preset of that format)")


def _own_map(
    known: Preset | None, column_map: Mapping[str, str | None] | None, available: Sequence[str]
) -> dict[str, str | None]:
    """A preset's columns, without optional ones that the data lacks."""
    own = known.column_map if known is not None else {}
    return {field: path for field, path in own.items() if field not in OPTIONAL or column_of(path, available)}


def _refuse_known_layout(available: Sequence[str], column_map: Mapping[str, str | None], source: str) -> None:
    """Suggest the preset for the data if ``auto`` alone cannot tell the columns apart.

    Raises:
        DataError: if one fits.
    """
    if column_map or {"prompt", "chosen", "rejected"} <= set(available):
        return
    if found := fitting_presets(available):
        raise DataError(
            f"{source} has the columns {', '.join(available)}, which format: auto does not read by itself; it looks like "
            f"preset: {' or '.join(found)}. Set dataset.preset, or name the columns in column_map"
        )


def _judge(
    declared: str,
    fields: Mapping[str, str],
    labels: Mapping[str, Any] | None,
    pairs: str,
    min_gap: float,
    available: Sequence[str],
    source: str,
) -> Labels | Ranking | None:
    if declared == "ranked":
        if labels is not None:
            raise ConfigError(
                "labels go with two answers (format: labelled); format: ranked has score or rank"
            )
        values = "rank" if "rank" in fields else "score"
        return Ranking(fields["answers"], fields[values], values == "rank", pairs, float(min_gap))
    if labels is None:
        if declared == "labelled":
            raise ConfigError(
                "format: labelled needs labels: {column: ..., first: ..., second: ..., tie: ...}, which say what values of "
                "which column stand for a better first answer, a better second answer and a tie"
            )
        return None
    found = labels_from(labels, only_ties=declared != "labelled")
    if column_of(found.column, available) is None:
        raise DataError(
            f"labels: {source} has no column {found.column!r}; its columns are {', '.join(available)}"
        )
    return found


def _with_layout(
    reader: RowReader,
    table: datasets.Dataset,
    source: str,
    given: Collection[str],
    messages: bool,
    stays_text: bool,
) -> RowReader:
    """A reader that knows the format of its pairs, judged by the first row that shows it."""
    declared, fields = reader.layout, reader.fields
    plain = declared not in ("labelled", "ranked")
    rows = table.select_columns(list(_top_columns(reader, table.column_names)))
    first = (_first_full(rows, fields), fields) if plain else _first_pair(reader, rows)
    if first is None:
        return dataclasses.replace(reader, inner="explicit" if "prompt" in fields else "implicit")
    row, shown = first
    inner = detect_format(row, shown, declared if plain else "auto", source)
    strange = [f for f in CONTEXT_FIELDS if f in fields and f not in given and not _usable(f, row[fields[f]])]
    fields = {field: path for field, path in fields.items() if field not in strange}
    context = any(field in fields for field in CONTEXT_FIELDS)
    if inner == "explicit" and not stays_text and (messages or (declared != "explicit" and context)):
        inner = "conversational"
    if declared == "auto" and "prompt" not in fields:
        _refuse_lost_prompt(inner, row, fields, table.column_names, source)
    return dataclasses.replace(reader, inner=inner, layout=inner if plain else declared, fields=fields)


def _usable(field: str, value: Any) -> bool:
    """Whether the value of a column named ``system``, ``history`` or ``tools`` really is one."""
    if value is None:
        return True
    return isinstance(value, str) if field == "system" else value in ("", "null") or is_history(value)


def _refuse_lost_prompt(
    inner: str, row: Mapping[str, Any], fields: Mapping[str, str], available: Sequence[str], source: str
) -> None:
    """Refuse rows without a prompt column where another column holds the prompt.

    Raises:
        DataError: if it looks like that.
    """
    alone = inner == "conversational" and all(
        isinstance(row[fields[side]], Mapping)
        or (isinstance(row[fields[side]], Sequence) and len(row[fields[side]]) == 1)
        for side in ("chosen", "rejected")
    )
    found = [name for name in _PROMPT_NAMES if name in available and name not in fields.values()]
    if found and (inner == "implicit" or alone):
        raise DataError(
            f"{source} has no column 'prompt', and its column {found[0]!r} looks like the prompt; set column_map: {{prompt: "
            f"{found[0]}}}, or format: {inner} if chosen and rejected hold the prompt themselves"
        )


def _first_pair(
    reader: RowReader, rows: datasets.Dataset
) -> tuple[Mapping[str, Any], Mapping[str, str]] | None:
    """A row that gives a pair, with its fields; None if there is none."""
    for row in rows:
        try:
            values = reader._values(row)
            choices = reader._choices(values, row)
        except RowFault:
            continue
        for choice in choices:
            if isinstance(choice, Choice):
                found = {**values, **choice.values}
                if found[choice.chosen] is not None:
                    return found, {**reader.fields, "chosen": choice.chosen, "rejected": choice.rejected}
    return None


def _top_columns(reader: RowReader, available: Collection[str]) -> tuple[str, ...]:
    paths = [*reader.fields.values(), *([reader.judge.column] if isinstance(reader.judge, Labels) else [])]
    return tuple(
        sorted({c for c in (column_of(path, available) for path in paths) if c} | set(reader.verdicts))
    )


def _with_columns(
    reader: RowReader, available: Sequence[str], column_map: Mapping[str, str | None]
) -> RowReader:
    """A reader with the columns that it needs, and those that the user may have wanted it to read."""
    fields = dict(reader.fields)
    if not reader.conversations:
        for field in CONTEXT_FIELDS:
            if field in fields and column_map.get(field):
                raise DataError(
                    f"column_map: {field} goes with conversations, and the rows are text; set as_messages: true to make "
                    "messages of them"
                )
            fields.pop(field, None)
    verdicts = () if reader.judge is not None else tuple(name for name in _VERDICTS if name in available)
    reader = dataclasses.replace(reader, fields=fields, verdicts=verdicts)
    columns = _top_columns(reader, available)
    left_out = {field for field, path in column_map.items() if path is None}
    unused = tuple(
        name for name in available if name not in columns and name not in left_out and _looks_used(name)
    )
    return dataclasses.replace(reader, columns=columns, unused=unused)


def _looks_used(name: str) -> bool:
    words = set(name.lower().replace("-", "_").split("_"))
    return bool(words & _TELLING_WORDS) and not words & _NOT_CONTENT


def _first_full(rows: datasets.Dataset, fields: Mapping[str, str]) -> dict[str, Any]:
    """A row that shows the layout: the first one without a missing field, or else the first one."""
    needed = [fields[f] for f in ("prompt", "chosen", "rejected") if f in fields]
    first = None
    for row in rows:
        values = {path: _value_or_none(row, path) for path in fields.values()}
        if all(values[path] is not None for path in needed):
            return values
        first = first or values
    assert first is not None  # a source has rows
    return first


def _value_or_none(row: Mapping[str, Any], path: str) -> Any:
    try:
        return value_at(row, path)
    except RowFault:
        return None  # the row is read again later, and the error then names it
