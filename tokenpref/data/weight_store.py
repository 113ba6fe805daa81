"""The weight store: the raw scores of every answer token on disk, so that transforms can change without a model.

A store is a folder of Parquet shards. ``metadata.json`` is written last, so a folder without it is unfinished. It contains the
sizes and checksums of the shards, so that a damaged shard is never read. Each checksum is computed when its shard is written,
and recorded at once as a line of ``shards.jsonl``, so that an unfinished store is never continued over a damaged shard.

Each row holds a hash of the training token ids that the scores belong to, the scores of both answers, and the texts with each
token's characters. A row can therefore be read without the data or the tokenizer.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.compute
from pyarrow import parquet

from tokenpref._checks import check_choice
from tokenpref._files import write_json
from tokenpref._sealed import SHA256, Written, read_files, read_record, write_file, write_record
from tokenpref.errors import DataError
from tokenpref.weights.transforms import SCORE_KINDS

__all__ = ["StoreWriter", "StoredRow", "WeightStore"]


log = logging.getLogger("tokenpref")

FORMAT = "tokenpref-weights/1"
METADATA, JOB, WRITTEN = "metadata.json", "job.json", "shards.jsonl"
CHECKSUM, CHANGED = "checksum", "is not what was written (its checksum differs)"
_AGAIN = "estimate the weights again"
# The largest column of a shard: a gigabyte of scores.
_MOST_VALUES = 1 << 28
_MOST_BYTES = 1 << 30

_SCORES = datasets.Sequence(datasets.Value("float32"))
_SPANS = datasets.Sequence(datasets.Value("int32"))  # starts and ends alternate
_FEATURES = datasets.Features(
    {
        "row": datasets.Value("int64"),
        "key": datasets.Value("string"),
        "prompt": datasets.Value("string"),
        "chosen_text": datasets.Value("string"),
        "rejected_text": datasets.Value("string"),
        "chosen": _SCORES,
        "rejected": _SCORES,
        "chosen_spans": _SPANS,
        "rejected_spans": _SPANS,
    }
)


@dataclass(frozen=True)
class StoredRow:
    """The scores of one pair.

    Args:
        row: number of the row in the data's source.
        key: hash of the training token ids (``PairExample.key``).
        prompt: the text before the answers.
        chosen_text: text of the chosen answer.
        rejected_text: text of the rejected answer.
        chosen: ``[n]`` float32, the raw scores of the chosen answer's tokens. Scores of kind "log_ratio" are log pi+ - log pi-
            for both answers.
        rejected: the raw scores of the rejected answer's tokens.
        chosen_spans: for each token, the characters of the chosen answer's text that it covers. The span of EOS is empty.
            Tokens that are parts of one character all have that character's span.
        rejected_spans: the same for the rejected answer.
    """

    row: int
    key: str
    prompt: str
    chosen_text: str
    rejected_text: str
    chosen: np.ndarray
    rejected: np.ndarray
    chosen_spans: list[tuple[int, int]]
    rejected_spans: list[tuple[int, int]]


class StoreWriter:
    """Writes a store shard by shard. A folder that already holds shards of the same job is continued.

    A shard counts as written if it agrees with its checksum, which was computed before the shard was written. A damaged shard is
    named in the log and belongs to :meth:`missing`.

    Args:
        path: the store's folder, which is created if it does not exist.
        kind: the kind of the scores, one of :data:`SCORE_KINDS`.
        job: everything that the scores depend on, as plain data.
        shards: the number of shards of the complete store.

    Raises:
        DataError: if the folder holds scores of another job, or its record of the job is damaged.
    """

    def __init__(self, path: Path, *, kind: str, job: dict[str, Any], shards: int) -> None:
        self.path = path
        self._record = {
            "format": FORMAT,
            "kind": check_choice("kind", kind, SCORE_KINDS),
            "shards": shards,
            **job,
        }
        path.mkdir(parents=True, exist_ok=True)
        if self.is_begun(path):
            self._check_job()
        else:
            write_json(path / JOB, _signed(self._record))
        self._written = {**self._finished(), **_read_lines(path / WRITTEN)}

    @staticmethod
    def is_begun(path: Path) -> bool:
        """Whether a folder holds a store or a part of one."""
        return (path / JOB).is_file()

    def _check_job(self) -> None:
        file, mend = self.path / JOB, "set another output_dir, or remove that folder"
        found = read_record(file, mend)
        names = (found.keys() | self._record.keys()) - {CHECKSUM}
        differing = sorted(name for name in names if found.get(name) != self._record.get(name))
        if differing:
            reason = f"it differs in {', '.join(differing)}, as {JOB} says"
            if _is_changed(found):
                reason = f"{file} {CHANGED}"
            raise DataError(f"{self.path}: holds weights of another job ({reason}); {mend}")

    def _finished(self) -> dict[str, Written]:
        """The shards of a store that was finished before. Its record is of no other use here."""
        file = self.path / METADATA
        if not file.is_file():
            return {}
        try:
            if _is_changed(read_record(file)):
                raise DataError(f"{file} {CHANGED}")
            return read_files(file)
        except DataError as error:
            log.warning(f"{error}; it is written again")
            return {}

    def missing(self) -> list[int]:
        """Shards that do not exist yet, or that differ from what was written. Every byte is read."""
        missing = []
        for shard in range(self._record["shards"]):
            file = self.path / shard_name(shard)
            if fault := _fault_of(file, self._written):
                missing.append(shard)
                if file.is_file():
                    log.warning(f"{file} {fault}; that shard is computed again")
        return missing

    def write(self, shard: int, rows: Sequence[StoredRow]) -> None:
        """Write a shard. It gets its name when all of it is on the disk, and counts as written when its checksum is recorded."""
        columns: dict[str, list[Any]] = {name: [] for name in _FEATURES}
        for row in rows:
            for name, column in columns.items():
                value = getattr(row, name)
                column.append([c for span in value for c in span] if name.endswith("_spans") else value)
        content = io.BytesIO()
        with _no_progress_bar():
            datasets.Dataset.from_dict(columns, features=_FEATURES).to_parquet(content)
        file, whole = self.path / shard_name(shard), content.getvalue()
        # A finished store that gets a shard is unfinished until it is sealed again.
        (self.path / METADATA).unlink(missing_ok=True)
        write_file(file, whole)
        self._written[file.name] = written = Written.of(whole, SHA256)
        with (self.path / WRITTEN).open("a", encoding="utf-8") as lines:
            # The line feed comes first, because an earlier line may be incomplete.
            lines.write("\n" + _line(file.name, written))
            lines.flush()
            os.fsync(lines.fileno())

    def finish(self) -> WeightStore:
        """Write ``metadata.json`` and open the store.

        Raises:
            DataError: if a shard is missing or damaged; the first one is named.
        """
        names = [shard_name(shard) for shard in range(self._record["shards"])]
        for name in names:
            if fault := _fault_of(self.path / name, self._written):
                raise DataError(
                    f"{self.path / name} {fault}; the store cannot be sealed: run the command that makes it again, which makes "
                    "what is missing"
                )
        # In the order of the shards: a store that was continued has the same bytes as one that was not.
        lines = "".join(_line(name, self._written[name]) for name in names)
        write_file(self.path / WRITTEN, lines.encode())
        files = {name: self._written[name].entry for name in names}
        write_record(self.path / METADATA, _signed({**self._record, "files": files}))
        return WeightStore.open(self.path)


def _fault_of(file: Path, files: Mapping[str, Written] | None) -> str | None:
    """How a shard differs from what was written; None if it does not, or if a store has no checksums."""
    if not file.is_file():
        return "is missing"
    if files is None:
        return None
    written = files.get(file.name)
    return "has no checksum in the store's record" if written is None else written.fault_of(file)


def _line(shard: str, written: Written) -> str:
    return json.dumps({"shard": shard, **written.entry}) + "\n"


def _read_lines(file: Path) -> dict[str, Written]:
    """The shards written so far, by the newest line of each. A shard whose line is damaged is computed again."""
    files: dict[str, Written] = {}
    for line in file.read_bytes().split(b"\n") if file.is_file() else ():
        try:
            found = json.loads(line)
            written = Written.read(found)
        except ValueError:
            continue
        files[str(found.get("shard"))] = written
    return files


class WeightStore:
    """A finished store. Build it with :meth:`open`.

    Attributes:
        path: its folder.
        metadata: what the scores were computed from: estimator, tokenizer, template, truncation, and fingerprints of the data.
    """

    def __init__(self, path: Path, metadata: dict[str, Any], table: datasets.Dataset) -> None:
        self.path = path
        self.metadata = metadata
        self._table = table

    @classmethod
    def open(cls, path: str | Path) -> WeightStore:
        """Open a finished store.

        Raises:
            DataError: if it is missing, unfinished, damaged or of an unknown format.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise DataError(
                f"{folder}: no weight store there; make one with recipes/estimate_weights_distributed"
            )
        if not (folder / METADATA).is_file():
            state = "unfinished" if (folder / JOB).is_file() else "not a weight store"
            mend = (
                "run the command that makes it again: it continues"
                if state == "unfinished"
                else "check the path"
            )
            raise DataError(f"{folder}: {state} (no {METADATA}); {mend}")
        metadata = read_record(folder / METADATA, _AGAIN)
        if metadata.get("format") != FORMAT or metadata.get("kind") not in SCORE_KINDS:
            raise DataError(
                f"{folder / METADATA}: format {metadata.get('format')!r} of kind {metadata.get('kind')!r} is not known "
                f"here ({FORMAT}, {', '.join(SCORE_KINDS)}); estimate the weights again"
            )
        files = _checked_shards(folder, metadata)
        if _is_changed(metadata):
            log.warning(
                f"{folder / METADATA} {CHANGED}. The scores are whole, but what it says of their origin may be wrong; "
                f"{_AGAIN} if in doubt"
            )
        # pyarrow reads the shards, because the reader of datasets would first copy each into its cache.
        table = pyarrow.concat_tables([_read_shard(file) for file in files])
        return cls(folder, metadata, datasets.Dataset(table))

    @property
    def kind(self) -> str:
        """The kind of the scores, one of :data:`SCORE_KINDS`."""
        return str(self.metadata["kind"])

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __iter__(self) -> Iterator[StoredRow]:
        return (self._read(position) for position in range(len(self)))

    @cached_property
    def _by_key(self) -> dict[str, int]:
        return {key: position for position, key in enumerate(self._table["key"])}

    @cached_property
    def _by_row(self) -> dict[int, int]:
        return {row: position for position, row in enumerate(self._table["row"])}

    def find(self, key: str) -> StoredRow | None:
        """The row whose training token ids have this hash; None if there is none."""
        position = self._by_key.get(key)
        return None if position is None else self._read(position)

    def has_row(self, number: int) -> bool:
        """Whether the store has scores of a row, given by its number in the data's source."""
        return number in self._by_row

    def row(self, number: int) -> StoredRow:
        """A row, by its number in the data's source.

        Raises:
            DataError: if the store does not have it.
        """
        if number not in self._by_row:
            rows = sorted(self._by_row)
            raise DataError(
                f"{self.path}: no row {number}; it holds {len(rows)} rows from {rows[0]} to {rows[-1]}"
            )
        return self._read(self._by_row[number])

    def _read(self, position: int) -> StoredRow:
        record = dict(self._table[position])
        for side in ("chosen", "rejected"):
            record[side] = np.asarray(record[side], dtype=np.float32)
            flat = record[f"{side}_spans"]
            if len(flat) != 2 * len(record[side]):
                raise DataError(
                    f"{self.path}: row {record['row']} has {len(record[side])} {side} scores and {len(flat) / 2:g} spans; the "
                    "store is damaged, estimate the weights again"
                )
            record[f"{side}_spans"] = list(zip(flat[::2], flat[1::2], strict=True))
        return StoredRow(**record)


def _checked_shards(folder: Path, metadata: dict[str, Any]) -> list[Path]:
    """The files of a store's shards, compared with the sizes and checksums that were written last.

    Raises:
        DataError: if one is missing or not as it was written, or the record of them is damaged.
    """
    record, count = folder / METADATA, metadata.get("shards")
    if type(count) is not int or count < 1:
        raise DataError(f"{record}: shards is {count!r}, expected a whole number of at least 1; {_AGAIN}")
    # Stores of versions before 0.1 have no checksums.
    written = read_files(record, _AGAIN) if "files" in metadata else None
    files: list[Path] = []
    for number in range(count):  # one by one, because the number may be absurd
        file = folder / shard_name(number)
        if fault := _fault_of(file, written):
            raise DataError(f"{file} {fault}; {_AGAIN}")
        files.append(file)
    if strange := sorted((written or {}).keys() - {file.name for file in files}):
        raise DataError(f"{record}: files names {strange[0]!r}, which is no shard of it; {_AGAIN}")
    return files


def _read_shard(file: Path) -> pyarrow.Table:
    """Read a shard, which must have exactly the columns of a store.

    Raises:
        DataError: if it is damaged, has other columns, or declares more values than a shard may have. Its values have not been
            read then.
    """
    mend = "remove it and run the command that makes the store again"
    wanted = _FEATURES.arrow_schema
    try:
        with parquet.ParquetFile(file) as shard:
            found = shard.schema_arrow
            if set(found.names) != set(wanted.names) or len(found.names) != len(wanted.names):
                raise DataError(f"{file}: has columns {found.names}, expected {wanted.names}; {mend}")
            for name in wanted.names:
                kind = found.field(name).type
                if not _same_type(kind, wanted.field(name).type):
                    raise DataError(
                        f"{file}: column {name!r} holds {kind}, expected {wanted.field(name).type}; {mend}"
                    )
            _check_counts(file, shard.metadata, mend)
            # The description of columns in the file is not used, because it could ask for more than reading numbers.
            table = shard.read(columns=wanted.names).select(wanted.names).cast(wanted)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file}: the shard cannot be read ({error}); {mend}") from error
    for name in wanted.names:
        if table[name].null_count:
            raise DataError(f"{file}: column {name!r} has no value in some rows; {mend}")
        nested = pyarrow.types.is_list(table[name].type) or pyarrow.types.is_large_list(table[name].type)
        if nested and pyarrow.compute.list_flatten(table[name]).null_count:
            raise DataError(f"{file}: column {name!r} misses values inside some rows' lists; {mend}")
    return table


def _check_counts(file: Path, metadata: Any, mend: str) -> None:
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            for count, most, what in (
                (column.num_values, _MOST_VALUES, "values"),
                (column.total_uncompressed_size, _MOST_BYTES, "bytes"),
            ):
                if count > most:
                    raise DataError(
                        f"{file}: column {column.path_in_schema.split('.')[0]!r} declares {count} {what}, more than a shard may "
                        f"have ({most}); {mend}"
                    )


def _same_type(one: Any, other: Any) -> bool:
    """Whether two columns have the same type. The name that Arrow gives to the elements of a list does not matter."""
    if pyarrow.types.is_list(one) and pyarrow.types.is_list(other):
        return bool(one.value_type == other.value_type)
    return bool(one == other)


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.parquet"


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Hide the progress bar of datasets. A shard takes milliseconds, and the bar would break the one of the estimation."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _signed(record: dict[str, Any]) -> dict[str, Any]:
    """A record with a checksum of its other entries."""
    return {**record, CHECKSUM: _checksum(record)}


def _checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _is_changed(record: dict[str, Any]) -> bool:
    """Whether a record was changed after it was written. Records of versions before 0.1 have no checksum."""
    rest = {key: value for key, value in record.items() if key != CHECKSUM}
    return bool(record.get(CHECKSUM, _checksum(rest)) != _checksum(rest))
