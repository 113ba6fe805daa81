"""The weight store: raw scores of every answer token on disk, so that transforms can change without a model.

A folder of Parquet shards and ``metadata.json``, which is written last: a folder without it is unfinished. It has the sizes
and checksums of the shards, so that a damaged one is never read. They are taken when a shard is written and kept in
``shards.jsonl``, one line a shard, so that an unfinished store is never continued over a damaged shard.

Each row holds a hash of the training token ids that the scores belong to, the scores of both answers, and the texts with each
token's characters, so that a row can be read without the data or the tokenizer.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Iterator, Sequence
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
from tokenpref.errors import DataError
from tokenpref.weights.transforms import SCORE_KINDS

__all__ = ["StoreWriter", "StoredRow", "WeightStore"]


log = logging.getLogger("tokenpref")

FORMAT = "tokenpref-weights/1"
METADATA, JOB, WRITTEN = "metadata.json", "job.json", "shards.jsonl"
CHECKSUM = "checksum"
_AGAIN = "estimate the weights again"
# Of a column in a shard: a gigabyte of scores.
_MOST_VALUES = 1 << 28
_MOST_BYTES = 1 << 30

_SCORES = datasets.Sequence(datasets.Value("float32"))
_SPANS = datasets.Sequence(datasets.Value("int32"))  # start and end in turn
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
    """Scores of one pair.

    Args:
        row: row in the data's source.
        key: hash of the training token ids (``PairExample.key``).
        prompt: text before the answers.
        chosen_text: text of the chosen answer.
        rejected_text: text of the rejected answer.
        chosen: float32 raw scores, one for each token of the chosen answer; of kind "log_ratio" they are
            log pi+ - log pi- on both sides.
        rejected: likewise.
        chosen_spans: characters of the answer's text that each token covers; an empty span for EOS. Tokens that are
            parts of one character all have that character's span.
        rejected_spans: likewise.
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


@dataclass(frozen=True)
class _Seal:
    """What a shard is when it is whole.

    Args:
        bytes: its size.
        sha256: its checksum, in hexadecimal.
    """

    bytes: int
    sha256: str

    @classmethod
    def read(cls, found: Any) -> _Seal | None:
        """A seal from plain data; None for anything else."""
        size, digest = (found.get(name) if isinstance(found, dict) else None for name in ("bytes", "sha256"))
        return cls(size, digest) if type(size) is int and isinstance(digest, str) else None

    def fault_of(self, file: Path) -> str | None:
        """How a file differs from what was written."""
        if not file.is_file():
            return f"{file} is missing"
        size = file.stat().st_size
        if size != self.bytes:
            return f"{file} has {size} bytes and was written with {self.bytes}"
        if hashlib.sha256(file.read_bytes()).hexdigest() != self.sha256:
            return f"{file} is not what was written (its checksum differs)"
        return None


class StoreWriter:
    """Writes a store shard by shard; a folder that holds shards of the same job already is continued.

    A shard counts as written if it is as its checksum says, which was taken before it went to the disk. A damaged one is named in
    the log and belongs to :meth:`missing`.

    Args:
        path: the store's folder; made if it does not exist.
        kind: one of :data:`SCORE_KINDS`.
        job: what the scores are made from, as plain data: everything that would change them.
        shards: number of shards that make the store complete.

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
        file = path / JOB
        if file.is_file():
            mend = "set another output_dir, or remove that folder"
            found = _read_record(file, mend)
            differing = sorted(
                k
                for k in found.keys() | self._record.keys()
                if k != CHECKSUM and found.get(k) != self._record.get(k)
            )
            if differing:
                harm = _harm_of(found)
                reason = f"{file} {harm}" if harm else f"it differs in {', '.join(differing)}, as {JOB} says"
                raise DataError(f"{path}: holds weights of another job ({reason}); {mend}")
        else:
            _write_json(file, _sealed(self._record))
        self._seals = {**self._finished_seals(), **_written_seals(path / WRITTEN)}

    @staticmethod
    def is_begun(path: Path) -> bool:
        """Whether a folder holds a store, or a part of one."""
        return (path / JOB).is_file()

    def _finished_seals(self) -> dict[str, _Seal]:
        """Seals of a store that was finished already; its record is of no other use here."""
        file = self.path / METADATA
        if not file.is_file():
            return {}
        try:
            record = _read_record(file, "it is written again")
            if harm := _harm_of(record):
                raise DataError(f"{file} {harm}; it is written again")
        except DataError as error:
            log.warning(str(error))
            return {}
        files = record.get("files")
        found = {name: _Seal.read(seal) for name, seal in files.items()} if isinstance(files, dict) else {}
        return {name: seal for name, seal in found.items() if seal is not None}

    def missing(self) -> list[int]:
        """Shards that are not there yet, or not as they were written; every byte is read."""
        faults = {shard: self._fault_of(shard) for shard in range(self._record["shards"])}
        for shard, fault in faults.items():
            if fault is not None and (self.path / shard_name(shard)).is_file():
                log.warning(f"{fault}; that shard is computed again")
        return [shard for shard, fault in faults.items() if fault is not None]

    def _fault_of(self, shard: int) -> str | None:
        name = shard_name(shard)
        seal = self._seals.get(name)
        return (
            f"{self.path / name} has no checksum in {WRITTEN}"
            if seal is None
            else seal.fault_of(self.path / name)
        )

    def write(self, shard: int, rows: Sequence[StoredRow]) -> None:
        """Write a shard; it gets its name only when it is whole and on the disk, and counts when its checksum is there too."""
        columns: dict[str, list[Any]] = {name: [] for name in _FEATURES}
        for row in rows:
            for name, column in columns.items():
                value = getattr(row, name)
                column.append([c for span in value for c in span] if name.endswith("_spans") else value)
        content = io.BytesIO()
        with _no_progress_bar():
            datasets.Dataset.from_dict(columns, features=_FEATURES).to_parquet(content)
        written = content.getvalue()
        # A store that is mended is unfinished until then.
        (self.path / METADATA).unlink(missing_ok=True)
        final = self.path / shard_name(shard)
        temporary = final.with_suffix(".partial")
        with temporary.open("wb") as stream:
            stream.write(written)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, final)
        _sync(self.path)
        self._seals[final.name] = seal = _Seal(len(written), hashlib.sha256(written).hexdigest())
        with (self.path / WRITTEN).open("a", encoding="utf-8") as lines:
            # A line of its own, also after one that was cut.
            lines.write("\n" + _line(final.name, seal))
            lines.flush()
            os.fsync(lines.fileno())

    def finish(self) -> WeightStore:
        """Seal the store and open it.

        Raises:
            DataError: if shards are missing or damaged; one of them is named.
        """
        names = [shard_name(shard) for shard in range(self._record["shards"])]
        for shard in range(len(names)):
            if fault := self._fault_of(shard):
                raise DataError(
                    f"{fault}; the store cannot be sealed: run the command that makes it again, which makes what is missing"
                )
        # In order: a store that was continued has the bytes of one that was not.
        lines = self.path / f"{WRITTEN}.tmp"
        lines.write_text("".join(_line(name, self._seals[name]) for name in names), encoding="utf-8")
        os.replace(lines, self.path / WRITTEN)
        seals = {name: vars(self._seals[name]) for name in names}
        _write_json(self.path / METADATA, _sealed({**self._record, "files": seals}))
        _sync(self.path / METADATA)
        return WeightStore.open(self.path)


def _line(shard: str, seal: _Seal) -> str:
    return json.dumps({"shard": shard, **vars(seal)}) + "\n"


def _written_seals(file: Path) -> dict[str, _Seal]:
    """Seals of the shards written so far, the newest of each; a line that is damaged seals nothing."""
    seals: dict[str, _Seal] = {}
    for line in file.read_bytes().split(b"\n") if file.is_file() else ():
        try:
            found = json.loads(line)
        except ValueError:
            continue  # its shard is computed again
        seal = _Seal.read(found)
        if seal is not None:
            seals[str(found.get("shard"))] = seal
    return seals


class WeightStore:
    """A finished store. Build it with :meth:`open`.

    Attributes:
        path: its folder.
        metadata: what made it: estimator, tokenizer, template, truncation and data fingerprints.
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
        metadata = _read_record(folder / METADATA, _AGAIN)
        if metadata.get("format") != FORMAT or metadata.get("kind") not in SCORE_KINDS:
            raise DataError(
                f"{folder / METADATA}: format {metadata.get('format')!r} of kind {metadata.get('kind')!r} is not known "
                f"here ({FORMAT}, {', '.join(SCORE_KINDS)}); estimate the weights again"
            )
        files = _shards(folder, metadata)
        _check_seals(folder, metadata.get("files", {}), files)
        if harm := _harm_of(metadata):
            log.warning(
                f"{folder / METADATA} {harm}. The scores are whole, but what it says of their origin may be wrong; estimate the "
                "weights again if in doubt"
            )
        # Read directly: datasets' own reader would first copy every shard into its cache.
        table = pyarrow.concat_tables([_read_shard(file) for file in files])
        return cls(folder, metadata, datasets.Dataset(table))

    @property
    def kind(self) -> str:
        """What the scores are, one of :data:`SCORE_KINDS`."""
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
        """The row whose training token ids have this hash, if it is there."""
        position = self._by_key.get(key)
        return None if position is None else self._read(position)

    def has_row(self, number: int) -> bool:
        """Whether a row of the data's source is there."""
        return number in self._by_row

    def row(self, number: int) -> StoredRow:
        """A row by its number in the data's source.

        Raises:
            DataError: if it is not there.
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


def _shards(folder: Path, metadata: dict[str, Any]) -> list[Path]:
    """The files of a store's shards.

    Raises:
        DataError: if one is missing, or their number is none.
    """
    count = metadata.get("shards")
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise DataError(
            f"{folder / METADATA}: shards is {count!r}, expected a whole number of at least 1; estimate the weights again"
        )
    files: list[Path] = []
    for number in range(count):  # one by one: the number may be absurd
        files.append(folder / shard_name(number))
        if not files[-1].is_file():
            raise DataError(f"{folder}: {files[-1].name} is missing; estimate the weights again")
    return files


def _check_seals(folder: Path, seals: Any, files: Sequence[Path]) -> None:
    """Compare shards with the sizes and checksums that were written last; a store of an earlier version has none.

    Raises:
        DataError: for the first shard that is not as it was written.
    """
    if not isinstance(seals, dict) or not all(isinstance(seal, dict) for seal in seals.values()):
        raise DataError(
            f"{folder / METADATA}: files is no mapping of shards to sizes; estimate the weights again"
        )
    if strange := sorted(seals.keys() - {file.name for file in files}):
        raise DataError(
            f"{folder / METADATA}: files names {strange[0]!r}, which is no shard of it; estimate the weights again"
        )
    for file in files if seals else ():
        seal = _Seal.read(seals.get(file.name))
        fault = (
            f"{folder / METADATA} has no size and checksum of {file.name}"
            if seal is None
            else seal.fault_of(file)
        )
        if fault is not None:
            raise DataError(f"{fault}; {_AGAIN}")


def _read_shard(file: Path) -> pyarrow.Table:
    """A shard with exactly the columns of a store.

    Raises:
        DataError: if it is damaged, or holds something else or absurdly much; then nothing of it has been read.
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
            # Without the file's own description of its columns, which could ask for more than reading numbers.
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
    """Whether two columns hold the same; what the elements of a list are called does not matter."""
    if pyarrow.types.is_list(one) and pyarrow.types.is_list(other):
        return bool(one.value_type == other.value_type)
    return bool(one == other)


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.parquet"


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """A shard takes milliseconds; the bar would break the one of the estimation."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _sealed(record: dict[str, Any]) -> dict[str, Any]:
    """A record with a checksum of all else that it says."""
    return {**record, CHECKSUM: _checksum(record)}


def _checksum(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _harm_of(record: dict[str, Any]) -> str | None:
    """Whether a record was changed after it was written; one of an earlier version has no checksum."""
    rest = {key: value for key, value in record.items() if key != CHECKSUM}
    if record.get(CHECKSUM, _checksum(rest)) == _checksum(rest):
        return None
    return "is not what was written (its checksum differs)"


def _read_record(file: Path, mend: str) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read ({error}); {mend}") from error
    if not isinstance(found, dict):
        raise DataError(f"{file}: expected a mapping, found a {type(found).__name__}; {mend}")
    return found


def _write_json(file: Path, record: dict[str, Any]) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, file)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
