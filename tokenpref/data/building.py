"""Tokenises a whole data set once, in batches, on all cores, into the cache."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import multiprocessing
import os
import platform
import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tokenpref.data.cache import DataCache, code_digest
from tokenpref.data.encoding import TOO_LONG, PairSettings, encode_pairs
from tokenpref.data.packed import Chunk, PackedPairs, PairPacker, PairWriter
from tokenpref.data.pairs import LeftOut, RowFault
from tokenpref.data.report import RowFaults
from tokenpref.data.row_reader import RowReader
from tokenpref.data.sources import Rows
from tokenpref.data.tokenizers import Tokenizer
from tokenpref.errors import DataError, TokenprefError

__all__ = ["PairBuilder"]

_BATCH_ROWS = 256  # the tokenizer gets a small multiple of this many texts at once
_SHARD_ROWS = 2048
_BAR_AFTER_S = 3.0
_LIBRARIES = ("tokenizers", "tiktoken", "sentencepiece", "jinja2", "pyarrow", "datasets")


@dataclass(frozen=True)
class _Shard:
    """The result of a part of the rows."""

    chunk: Chunk
    counts: dict[str, int]
    dropped: dict[str, int]
    faults: list[tuple[int, str, str, str]]  # row, kind, column, message


@dataclass(frozen=True)
class PairBuilder:
    """Makes packed pairs from the rows of a source.

    Args:
        tokenizer: the tokenizer.
        rows: the source.
        reader: makes pairs from rows.
        settings: for making tokens from pairs.
        on_fault: ``error`` or ``drop``.
    """

    tokenizer: Tokenizer
    rows: Rows
    reader: RowReader
    settings: PairSettings
    on_fault: str

    def build(self, cache: DataCache | None) -> tuple[PackedPairs, dict[str, Any]]:
        """The pairs, from the cache if it has them.

        Returns:
            The pairs, and plain data about them: ``counts`` of truncations, and the rows that were ``dropped``.

        Raises:
            DataError: naming the first faulty row, or if no pair remains.
        """
        # Without a fingerprint of the content, nothing guarantees that a later start has the same rows.
        if cache is None or not self.rows.content:
            with PairWriter(None) as writer:
                about = self._write(writer)
            return writer.packed(), about

        def to_folder(folder: Path) -> dict[str, Any]:
            with PairWriter(folder) as writer:
                return self._write(writer)

        folder, about = cache.entry(
            f"pairs-{self.address()}", to_folder, f"the tokenised form of {self.rows.name}"
        )
        return PackedPairs.open(folder, about), about

    def address(self) -> str:
        """A fingerprint of everything that the pairs depend on: content, tokenizer, template, settings, and the code."""
        tokenizer = self.tokenizer
        described = {
            "content": self.rows.content,
            "rows": [(part.start, part.stop) for part in self.rows.numbers] or self.rows.table.num_rows,
            "reader": self.reader.settings(),
            "settings": dataclasses.asdict(self.settings),
            "on_fault": self.on_fault,
            "tokenizer": [
                type(tokenizer).__qualname__,
                tokenizer.fingerprint(),
                tokenizer.template_fingerprint(),
            ],
            "ids": [tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id, tokenizer.vocab_size],
            "sets": [sorted(tokenizer.special_ids), sorted(tokenizer.stop_ids)],
            "code": code_digest(*(file.stem for file in sorted(Path(__file__).parent.glob("*.py")))),
            "versions": [platform.python_version(), *map(_version, _LIBRARIES)],
        }
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]

    def _write(self, writer: PairWriter) -> dict[str, Any]:
        total = self.rows.table.num_rows
        shards = [range(start, min(start + _SHARD_ROWS, total)) for start in range(0, total, _SHARD_ROWS)]
        faults, counts = RowFaults(self.rows), Counter[str]()
        with tqdm(total=total, unit="row", desc=f"tokenising {self.rows.name}", delay=_BAR_AFTER_S) as bar:
            for rows, shard in zip(shards, _each(self._shard, shards), strict=True):
                writer.write(shard.chunk)
                counts.update(shard.counts)
                faults.merge(shard.dropped, shard.faults)
                bar.update(len(rows))
        faults.raise_any()
        if writer.about["pairs"] == 0:
            raise DataError(f"{self.rows.name}: every row was left out ({faults.summary()}); no pair remains")
        return {**writer.about, "counts": dict(counts), "dropped": faults.dropped}

    def _shard(self, rows: range) -> _Shard:
        """Tokenise some rows."""
        packer, faults, counts = PairPacker(), RowFaults(self.rows), Counter[str]()
        table = self.rows.table.select_columns(list(self.reader.columns))
        for start in range(rows.start, rows.stop, _BATCH_ROWS):
            part = range(start, min(start + _BATCH_ROWS, rows.stop))
            found, places = [], []
            for row, values in zip(part, _dictionaries(table[part.start : part.stop]), strict=True):
                for number, read in enumerate(self.reader.read(values)):
                    if isinstance(read, LeftOut):
                        faults.leave_out(read)
                    else:
                        found.append(read)
                        places.append((row, number))
            for (row, number), pair in zip(
                places, encode_pairs(self.tokenizer, found, self.settings), strict=True
            ):
                if isinstance(pair, RowFault):
                    too_long = self.settings.truncation == "drop" and pair.kind == TOO_LONG
                    faults.add(row, pair, droppable=self.on_fault == "drop" or too_long)
                    continue
                packer.add(row + number * self.rows.table.num_rows, pair.chosen, pair.rejected)
                counts["prompts_cut"] += pair.prompt_cut
                counts["answers_cut"] += pair.answers_cut
                counts["straddling_rows"] += pair.straddles
                counts["equal_after_cut"] += pair.equal
        return _Shard(packer.chunk(), dict(counts), faults.dropped, faults.found())


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""


def _dictionaries(columns: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    names = list(columns)
    return (dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True))


# --- processes ----------------------------------------------------------------------------------------------------


def _each(work: Callable[[range], _Shard], shards: Sequence[range]) -> Iterator[_Shard]:
    """Run ``work`` for every shard on all cores, or in this process if there is little to do. Results come in order."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(cores, len(shards))
    if count < 2 or multiprocessing.current_process().daemon:
        yield from map(work, shards)
    else:
        yield from _in_processes(work, shards, count)


def _in_processes(work: Callable[[range], _Shard], shards: Sequence[range], count: int) -> Iterator[_Shard]:
    # A fork has the tokenizer and the rows without sending them, and imports nothing again. Each process takes every
    # count-th shard, so results come in order, and a fast process waits at its pipe instead of filling the memory.
    context = multiprocessing.get_context("fork")
    readers: list[Any] = []
    processes: list[Any] = []
    try:
        with _single_threaded_tokenizers():
            for number in range(count):
                reader, sender = context.Pipe(duplex=False)
                readers.append(reader)
                process = context.Process(
                    target=_work, args=(work, shards[number::count], sender, list(readers)), daemon=True
                )
                process.start()
                processes.append(process)
                sender.close()
        for number in range(len(shards)):
            yield _received(readers[number % count], processes[number % count])
    finally:
        for process in processes:
            process.kill()
            process.join()
        for reader in readers:
            reader.close()


def _received(reader: Any, process: Any) -> _Shard:
    try:
        kind, value = reader.recv()
    except (EOFError, ConnectionError) as error:
        process.join()
        raise DataError(
            f"a process that tokenises ended with exit code {process.exitcode}; if memory was short, start again with fewer "
            "cores (taskset) or smaller files"
        ) from error
    if kind == "error":
        raise value
    return value


def _work(work: Callable[[range], _Shard], shards: Sequence[range], sender: Any, readers: list[Any]) -> None:
    """The work of a process: tokenise its shards, send them, and end when nobody reads them any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    gc.disable()  # millions of short-lived objects, none of them in a cycle
    for reader in readers:
        reader.close()
    try:
        for rows in shards:
            sender.send(("shard", work(rows)))
    except BrokenPipeError:
        return
    except Exception as error:  # sent to the parent, which raises it
        sender.send(("error", _portable(error)))


def _portable(error: Exception) -> Exception:
    # An exception of another library may not survive the way between processes; its text does.
    return (
        error
        if isinstance(error, TokenprefError)
        else RuntimeError("".join(traceback.format_exception(error)))
    )


@contextmanager
def _single_threaded_tokenizers() -> Iterator[None]:
    """Switch off the threads of the tokenizers library: every process has one core, and its warning does not apply."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
