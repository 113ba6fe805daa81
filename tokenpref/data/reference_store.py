"""The results of a reference on a data set, on disk: a log-probability or the last hidden state of every answer token.

A store is a folder of safetensors shards. With hidden states it also holds the LM head. ``metadata.json`` is written last, so a
folder without it is unfinished and can be continued. The name of a shard ends with the checksum of its bytes, so that damaged
shards of an unfinished folder are recognised too. The name of the folder depends on everything that determines the numbers
(model, weights, data), so another reference, or the same one on other data, has another folder.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tokenpref._checks import check_choice
from tokenpref._files import try_lock, write_json
from tokenpref._sealed import Written, digest_of, read_record, write_file, write_record
from tokenpref.data import PairExample, PreferenceDataset
from tokenpref.errors import ConfigError, DataError
from tokenpref.stats import SIDES

__all__ = ["STORED_KINDS", "ReferenceStore", "ReferenceWriter", "StoreLayout", "StoredAnswers"]

STORED_KINDS = ("logps", "hidden")
"""Log-probabilities, one number per token, or last hidden states, D numbers per token, from which a KL can be computed."""

log = logging.getLogger("tokenpref")

FORMAT = "tokenpref-reference/1"
METADATA, JOB, LOCK = "metadata.json", "job.json", ".lock"
VALUES, HEAD = "values", "head"
# Many shards can be shared among many processes, and of small shards a killed build loses little. But a shard has enough pairs
# for an efficient forward pass.
_SHARDS, _FEWEST_PAIRS, _MOST_PAIRS = 64, 8, 64
_OPEN_SHARDS = 64
_NAMES_OF_DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16"}
_AGAIN = "remove it and start again: missing files are computed again"


@dataclass(frozen=True)
class StoredAnswers:
    """What a store has to know of a data set's answers. Build it with :meth:`of`.

    Args:
        rows: for each pair, the number of its row in the data's source.
        lengths: ``[P, 2]``, scored tokens of the chosen and the rejected answer of each pair.
        sequence_tokens: tokens of all sequences that the reference reads. The prompt counts for both answers.
    """

    rows: Sequence[int]
    lengths: np.ndarray
    sequence_tokens: int

    @classmethod
    def of(cls, examples: Sequence[PairExample] | PreferenceDataset) -> StoredAnswers:
        """Count the tokens of pairs."""
        if isinstance(examples, PreferenceDataset):
            whole = examples.lengths()
            # Nothing predicts the first token of a sequence.
            scored = whole - np.maximum(examples.starts(), 1)
            return cls(examples.rows().tolist(), scored, int(whole.sum()))
        rows, lengths, tokens = [], [], 0
        for example in examples:
            sides = (
                (example.chosen_ids, example.chosen_start),
                (example.rejected_ids, example.rejected_start),
            )
            rows.append(example.row)
            # Nothing predicts the first token of a sequence.
            lengths.append([len(ids) - max(start, 1) for ids, start in sides])
            tokens += sum(len(ids) for ids, _ in sides)
        return cls(rows, np.asarray(lengths, dtype=np.int64).reshape(-1, 2), tokens)

    @property
    def tokens(self) -> int:
        """Scored tokens of all answers."""
        return int(self.lengths.sum())


@dataclass(frozen=True)
class StoreLayout:
    """The folder of a store and its division into shards. It depends on the content only, so all processes agree on it.

    Args:
        folder: holds the stores of several references and data sets.
        kind: what is stored, one of :data:`STORED_KINDS`.
        job: everything that the numbers depend on, as plain data.
        answers: the answers of the data set.
    """

    folder: Path
    kind: str
    job: Mapping[str, Any]
    answers: StoredAnswers

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, STORED_KINDS)

    @cached_property
    def path(self) -> Path:
        """The store's own folder."""
        described = json.dumps(self.record, sort_keys=True)
        return self.folder / f"{self.kind}-{hashlib.sha256(described.encode()).hexdigest()[:16]}"

    @cached_property
    def record(self) -> dict[str, Any]:
        """The entries of ``metadata.json`` that are compared when the store is opened."""
        record = {
            "format": FORMAT,
            "kind": self.kind,
            "job": dict(self.job),
            "pairs": len(self.answers.rows),
            "tokens": self.answers.tokens,
            "shard_pairs": self.shard_pairs,
        }
        # Converted to JSON and back, because values of a config that are not plain data are read back as text.
        plain: dict[str, Any] = json.loads(json.dumps(record, default=str))
        return plain

    @property
    def shard_pairs(self) -> int:
        """The number of pairs in a shard. The last shard may have fewer."""
        return min(max(-(-len(self.answers.rows) // _SHARDS), _FEWEST_PAIRS), _MOST_PAIRS)

    @property
    def shards(self) -> int:
        """The number of shards of the complete store."""
        return -(-len(self.answers.rows) // self.shard_pairs)

    def pairs(self, shard: int) -> range:
        """The positions of a shard's pairs in the data set."""
        return range(shard * self.shard_pairs, min((shard + 1) * self.shard_pairs, len(self.answers.rows)))

    @property
    def stems(self) -> list[str]:
        """The names of the files of the complete store, without their checksums."""
        return [_stem(n) for n in range(self.shards)] + ([HEAD] if self.kind == "hidden" else [])

    def found(self) -> dict[str, Path]:
        """The files that exist, by their name without checksum."""
        files = sorted(self.path.glob("*-*.safetensors"))
        by_stem = {file.name.rpartition("-")[0]: file for file in files}
        return {stem: by_stem[stem] for stem in self.stems if stem in by_stem}

    def missing(self) -> list[int]:
        """The shards that do not exist yet."""
        found = self.found()
        return [n for n in range(self.shards) if _stem(n) not in found]

    def is_complete(self) -> bool:
        """Whether all files and ``metadata.json`` exist."""
        return (self.path / METADATA).is_file() and len(self.found()) == len(self.stems)

    def refuse_if_locked(self) -> None:
        """Check early that no other process is writing the store.

        Raises:
            ConfigError: if one is.
        """
        if (self.path / LOCK).is_file():
            descriptor = try_lock(self.path / LOCK, create=False)
            if descriptor is None:
                raise ConfigError(self._locked())
            os.close(descriptor)

    def _locked(self) -> str:
        return (
            f"reference_cache_dir: another run is filling {self.path} at this moment; wait for it, or set another "
            "reference_cache_dir"
        )


def _stem(shard: int) -> str:
    return f"shard-{shard:05d}"


def _digest_in(name: str) -> str:
    """The checksum that a file's name contains."""
    return name.removesuffix(".safetensors").rpartition("-")[2]


class ReferenceWriter:
    """Writes a store shard by shard, and keeps shards that exist already.

    Args:
        layout: the store's folder and shards.
    """

    def __init__(self, layout: StoreLayout) -> None:
        self.layout = layout
        self._lock: int | None = None

    def begin(self) -> list[int]:
        """Create the folder and lock it against other writers. Only the main process calls this.

        Returns:
            The shards to write: those that do not exist, or were damaged before the store was finished.

        Raises:
            ConfigError: if another process is writing here.
        """
        path = self.layout.path
        path.mkdir(parents=True, exist_ok=True)
        self._lock = try_lock(path / LOCK)
        if self._lock is None:
            raise ConfigError(self.layout._locked())
        if not self.layout.is_complete():
            # If a file of a finished store was removed, its record is of another store.
            for left in (path / METADATA, *path.glob("*.partial")):
                left.unlink(missing_ok=True)
            write_json(path / JOB, self.layout.record)
            self._drop_damaged()
        return self.layout.missing()

    def _drop_damaged(self) -> None:
        """Remove the damaged files of an unfinished store before it is continued. Every byte is read."""
        for file in self.layout.found().values():
            if digest_of(file) != _digest_in(file.name):
                log.warning(f"{file} is not what was written (its checksum differs); it is computed again")
                file.unlink()

    def write(self, shard: int, answers: Sequence[Tensor]) -> dict[str, int]:
        """Write a shard.

        Args:
            shard: its number.
            answers: the values of the chosen and the rejected answer of each of its pairs, ``[n]`` or ``[n, D]``.

        Returns:
            The name of the file and its size in bytes.

        Raises:
            ValueError: if the lengths of the answers are not those of the data.
        """
        wanted = self.layout.answers.lengths[self.layout.pairs(shard)].flatten().tolist()
        lengths = [len(answer) for answer in answers]
        if lengths != wanted:
            raise ValueError(f"shard {shard} takes answers of {wanted} tokens, got {lengths}")
        return self._write(_stem(shard), {VALUES: torch.cat(list(answers))})

    def write_head(self, weight: Tensor) -> dict[str, int]:
        """Write the LM head ``[V, D]`` that belongs to hidden states. Returns the name of the file and its size in bytes."""
        return self._write(HEAD, {VALUES: weight.cpu().contiguous()})

    def _write(self, stem: str, tensors: dict[str, Tensor]) -> dict[str, int]:
        content = save(tensors)
        name = f"{stem}-{Written.of(content).checksum}.safetensors"
        write_file(self.layout.path / name, content)
        return {name: len(content)}

    def seal(self, written: Mapping[str, int], *, dtype: torch.dtype, width: int | None) -> None:
        """Write ``metadata.json``, which marks the store as complete. Only the main process calls this.

        Args:
            written: names and sizes of the files that all processes have written since they started.
            dtype: dtype of the values.
            width: D of hidden states; None for log-probabilities.

        Raises:
            DataError: if a shard is missing, for example because another machine wrote it to a disk of its own.
        """
        layout = self.layout
        files = {file.name: file.stat().st_size for file in layout.found().values()} | dict(written)
        stems = {name.rpartition("-")[0] for name in files}
        if lacking := [stem for stem in layout.stems if stem not in stems]:
            raise DataError(f"{layout.path}: {lacking[0]} is missing; the store cannot be sealed")
        values = {"dtype": str(dtype).removeprefix("torch."), "width": width}
        write_record(layout.path / METADATA, {**layout.record, VALUES: values, "files": files})

    def close(self) -> None:
        """Unlock the store."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


class ReferenceStore:
    """A finished store. Build it with :meth:`open`.

    Only the positions of the answers are held in memory. Their values are read from the disk when they are needed.

    Attributes:
        layout: its folder and shards.
        width: D of hidden states; None for log-probabilities.
        nbytes: bytes of its files.
    """

    def __init__(self, layout: StoreLayout, metadata: Mapping[str, Any]) -> None:
        self.layout = layout
        self.width: int | None = metadata[VALUES]["width"]
        self.dtype: torch.dtype = getattr(torch, metadata[VALUES]["dtype"])
        self.nbytes = sum(metadata["files"].values())
        self._files = {name.rpartition("-")[0]: layout.path / name for name in metadata["files"]}
        # The first token of each answer, counted over the whole data. Chosen and rejected answers alternate.
        self._starts = np.concatenate([[0], layout.answers.lengths.flatten().cumsum()])
        self._positions = {row: position for position, row in enumerate(layout.answers.rows)}
        self._open: OrderedDict[int, Any] = OrderedDict()

    @classmethod
    def open(cls, layout: StoreLayout, *, rank: int = 0, world_size: int = 1) -> ReferenceStore:
        """Open a finished store, and compare its files with their sizes and checksums.

        Args:
            layout: the store's folder and shards.
            rank: the rank of this process. Each process verifies the checksums of a part of the files.
            world_size: the number of processes.

        Raises:
            DataError: if the store is unfinished, damaged, or of another job. The message names the file.
        """
        metadata = _read_metadata(layout)
        for number, (name, size) in enumerate(sorted(metadata["files"].items())):
            file = layout.path / name
            if not file.is_file():
                raise DataError(
                    f"{file} is not there; all processes must reach the same reference_cache_dir, and a store that lost a file "
                    f"is mended by the run that makes it: remove {layout.path / METADATA} and start again"
                )
            mine = number % world_size == rank
            if fault := Written(size, _digest_in(name)).fault_of(file, compare_bytes=mine):
                raise DataError(f"{file} {fault}; {_AGAIN}")
        return cls(layout, metadata)

    @property
    def head_digest(self) -> str:
        """The checksum of the LM head, which is the same for all stores of a model."""
        return _digest_in(self._files[HEAD].name)

    def head_weight(self, device: torch.device | str) -> Tensor:
        """The LM head ``[V, D]`` on a device, as a copy."""
        with self._reader(self._files[HEAD]) as file:
            weight: Tensor = file.get_tensor(VALUES)
        if weight.dtype != self.dtype or weight.dim() != 2 or weight.shape[1] != self.width:
            raise DataError(
                f"{self._files[HEAD]}: holds {list(weight.shape)} of {weight.dtype}, expected [V, {self.width}] of {self.dtype}; "
                f"{_AGAIN}"
            )
        # Copied, because the system may drop the pages of a mapped file at any time.
        return weight.clone() if torch.device(device).type == "cpu" else weight.to(device)

    def answer(self, row: int, side: str) -> Tensor:
        """The stored values of an answer: log-probabilities ``[n]`` or hidden states ``[n, D]``.

        Args:
            row: number of the row in the data's source.
            side: ``chosen`` or ``rejected``.

        Raises:
            ValueError: if the data set does not have that row or side.
        """
        position = self._positions.get(row)
        if position is None or side not in SIDES:
            raise ValueError(
                f"{self.layout.path} holds nothing of the {side} answer of row {row}; it is of another data set"
            )
        shard, place = position // self.layout.shard_pairs, 2 * position + SIDES.index(side)
        first = self._starts[2 * self.layout.pairs(shard).start]
        begin, end = (int(self._starts[p] - first) for p in (place, place + 1))
        values: Tensor = self._shard(shard)[begin:end]
        return values

    def _shard(self, number: int) -> Any:
        """The values of a shard, to be sliced. The files of the shards that were used last stay open."""
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number][1]
        file = self._files[_stem(number)]
        reader = self._reader(file)
        values = reader.get_slice(VALUES)
        tokens = int(self.layout.answers.lengths[self.layout.pairs(number)].sum())
        shape = [tokens] if self.width is None else [tokens, self.width]
        name = _NAMES_OF_DTYPES[str(self.dtype).removeprefix("torch.")]
        if list(values.get_shape()) != shape or values.get_dtype() != name:
            raise DataError(
                f"{file}: holds {values.get_shape()} of {values.get_dtype()}, expected {shape} of {name}; {_AGAIN}"
            )
        self._open[number] = (reader, values)
        if len(self._open) > _OPEN_SHARDS:
            self._open.popitem(last=False)
        return values

    @staticmethod
    def _reader(file: Path) -> Any:
        try:
            reader = safe_open(str(file), framework="pt")
            found = list(reader.keys())
        except (SafetensorError, OSError) as error:
            raise DataError(f"{file}: cannot be read ({error}); {_AGAIN}") from error
        if found != [VALUES]:
            raise DataError(f"{file}: holds {found}, expected {VALUES}; {_AGAIN}")
        return reader


def _read_metadata(layout: StoreLayout) -> dict[str, Any]:
    """Read and check ``metadata.json``.

    Raises:
        DataError: if it is missing, cannot be read, or belongs to another store.
    """
    file = layout.path / METADATA
    if not file.is_file():
        raise DataError(
            f"{layout.path}: unfinished (no {METADATA}); start the run that makes it again: it continues"
        )
    found = read_record(file, _AGAIN)
    differing = sorted(key for key, value in layout.record.items() if found.get(key) != value)
    fault = f"it differs in {', '.join(differing)}" if differing else _fault_of(found, layout)
    if fault is not None:
        raise DataError(f"{file} is not of this store ({fault}); {_AGAIN}")
    return found


def _fault_of(metadata: Mapping[str, Any], layout: StoreLayout) -> str | None:
    """The reason why the further entries of ``metadata.json`` are wrong; None if they are not."""
    files, values = metadata.get("files"), metadata.get(VALUES)
    dtype, width = (values.get(name) if isinstance(values, dict) else None for name in ("dtype", "width"))
    if dtype not in _NAMES_OF_DTYPES:
        return f"dtype is {dtype!r}"
    if (width is None) != (layout.kind == "logps") or type(width) not in (int, type(None)) or width == 0:
        return f"width is {width!r}"
    if not isinstance(files, dict) or not all(type(size) is int for size in files.values()):
        return "files is no mapping of names to sizes"
    stems = sorted(name.rpartition("-")[0] for name in files)
    if stems != sorted(layout.stems) or any(Path(name).name != name for name in files):
        return "files names other files than the store has"
    return None
