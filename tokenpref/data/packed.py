"""Tokenised pairs in flat arrays, in memory or in files that are mapped into it."""

from __future__ import annotations

import hashlib
import io
import sys
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from tokenpref.data.tokenization import EncodedAnswer, MovedSpans
from tokenpref.data.tokenizers import Span

__all__ = [
    "COLUMNS",
    "Chunk",
    "PackedPairs",
    "PairExample",
    "PairPacker",
    "PairWriter",
    "pair_digest",
    "pair_key",
]


@dataclass(frozen=True)
class PairExample:
    """One tokenised pair.

    Attributes:
        row: number of the pair, unique in its data set. It is the row in the source, counted from 0, but for further pairs
            of the same row: pair ``part`` of a row has the number ``row + part * rows in the source``.
        chosen_ids: prompt and chosen answer.
        chosen_start: index of the first token of the chosen answer; the prompt is ``chosen_ids[:chosen_start]``.
        rejected_ids: prompt and rejected answer.
        rejected_start: index of the first token of the rejected answer.
        chosen_offsets: for each token of the answer, the characters that it covers in the answer's own text
            (:meth:`PreferenceDataset.text`); EOS has an empty span at its end.
        rejected_offsets: likewise.
        chosen_has_eos: whether the answer ends with EOS or the end of a turn.
        rejected_has_eos: likewise.
        key: sha256 (hex) of the token ids and starts of both sides, by which stored weights are found.
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


def pair_key(
    chosen_ids: Sequence[int], chosen_start: int, rejected_ids: Sequence[int], rejected_start: int
) -> str:
    """sha256 (hex) of the training token ids: for each side its length, its start and its ids, as little-endian int64."""
    return pair_digest(chosen_ids, chosen_start, rejected_ids, rejected_start).hex()


def pair_digest(
    chosen_ids: Sequence[int], chosen_start: int, rejected_ids: Sequence[int], rejected_start: int
) -> bytes:
    """:func:`pair_key` as 32 bytes."""
    numbers = array("q", [len(chosen_ids), chosen_start, *chosen_ids])
    numbers.extend([len(rejected_ids), rejected_start, *rejected_ids])
    if sys.byteorder == "big":
        numbers.byteswap()
    return hashlib.sha256(numbers).digest()


COLUMNS: dict[str, tuple[str, tuple[int, ...]]] = {
    "rows": ("<i8", ()),  # row in the table + part * rows of the table
    "starts": ("<i4", (2,)),
    "has_eos": ("|b1", (2,)),
    "keys": ("|u1", (32,)),
    "ends": ("<i8", ()),  # of each side's ids, in the order chosen, rejected
    "span_ends": ("<i8", ()),
    "ids": ("<i4", ()),
    "spans": ("<i4", (2,)),
}
"""NumPy type and the shape of one item of the arrays in which pairs are kept."""

Chunk = dict[str, bytes]
"""Some pairs, column by column. Ends count from the beginning of the chunk."""


class PairPacker:
    """Collects tokenised pairs."""

    def __init__(self) -> None:
        self._rows, self._starts, self._has_eos = array("q"), array("i"), bytearray()
        self._keys = bytearray()
        self._ids, self._spans = array("i"), array("i")
        self._ends, self._span_ends = array("q"), array("q")
        self._moves = array("q")  # of spans in a row: how many, where their answer begins, its characters

    def add(self, row: int, chosen: EncodedAnswer, rejected: EncodedAnswer) -> None:
        """Append a pair of a table's row."""
        self._rows.append(row)
        self._keys += pair_digest(chosen.ids, chosen.start, rejected.ids, rejected.start)
        for side in (chosen, rejected):
            self._starts.append(side.start)
            self._has_eos.append(side.has_eos)
            self._ids.extend(side.ids)
            self._add_spans(side.spans)
            self._ends.append(len(self._ids))
            self._span_ends.append(len(self._spans) // 2)

    def _add_spans(self, spans: Sequence[Span]) -> None:
        if isinstance(spans, MovedSpans):
            self._spans.extend(chain.from_iterable(spans.raw))
            self._moves.extend((len(spans.raw), spans.offset, spans.size))
            spans = spans.tail
        if spans:
            self._spans.extend(chain.from_iterable(spans))
            self._moves.extend((len(spans), 0, _NO_LIMIT))

    def _move_spans(self) -> None:
        """Make all spans relative to their answers, and clip them to these."""
        count, offset, size = np.frombuffer(self._moves, "=i8").reshape(-1, 3).T
        spans = np.frombuffer(self._spans, "=i4").reshape(-1, 2)
        spans -= np.repeat(offset, count).astype(np.int32)[:, None]
        np.clip(spans, 0, np.repeat(size, count).astype(np.int32)[:, None], out=spans)
        self._moves = array("q")

    def chunk(self) -> Chunk:
        """The collected pairs, after which no pair can be added."""
        if self._moves:
            self._move_spans()
        columns = {
            name: np.frombuffer(getattr(self, f"_{name}"), _OWN.get(name, kind))
            for name, (kind, _) in COLUMNS.items()
        }
        return {
            name: values.astype(COLUMNS[name][0], copy=False).tobytes() for name, values in columns.items()
        }


_NO_LIMIT = 2**31 - 1
_OWN = {"rows": "=i8", "ends": "=i8", "span_ends": "=i8", "starts": "=i4", "ids": "=i4", "spans": "=i4"}


class PairWriter:
    """Writes chunks one after another, to files or to memory.

    Args:
        folder: gets a file for each column; None keeps them in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._sinks: dict[str, Any] = {
            name: io.BytesIO() if folder is None else _file_of(folder, name).open("wb") for name in COLUMNS
        }
        self._keys = hashlib.sha256()
        self._offsets = {"ends": 0, "span_ends": 0}
        self.about: dict[str, Any] = {"pairs": 0, "longest": 0, "highest_id": -1}
        for name in self._offsets:
            self._sinks[name].write(np.zeros(1, COLUMNS[name][0]).tobytes())

    def __enter__(self) -> PairWriter:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._folder is not None:
            for sink in self._sinks.values():
                sink.close()

    def write(self, chunk: Chunk) -> None:
        """Append a chunk."""
        about, columns = self.about, {name: np.frombuffer(chunk[name], COLUMNS[name][0]) for name in COLUMNS}
        if len(columns["rows"]) == 0:
            return
        about["pairs"] += len(columns["rows"])
        about["longest"] = max(about["longest"], int(np.diff(columns["ends"], prepend=0).max()))
        about["highest_id"] = max(about["highest_id"], int(columns["ids"].max()))
        self._keys.update(chunk["keys"])
        about["fingerprint"] = self._keys.hexdigest()
        for name, offset in self._offsets.items():
            columns[name] = columns[name] + offset
            self._offsets[name] = int(columns[name][-1])
        for name, sink in self._sinks.items():
            sink.write(columns[name].tobytes())

    def packed(self) -> PackedPairs:
        """The pairs that were written into memory."""
        return PackedPairs(
            {
                name: _shaped(np.frombuffer(sink.getbuffer(), COLUMNS[name][0]), name)
                for name, sink in self._sinks.items()
            },
            self.about,
        )


def _file_of(folder: Path, name: str) -> Path:
    return folder / f"{name}.bin"


def _shaped(values: np.ndarray, name: str) -> np.ndarray:
    return values.reshape(-1, *COLUMNS[name][1])


class PackedPairs:
    """Token ids and spans of all pairs in flat arrays; side 0 is chosen, side 1 rejected.

    Args:
        columns: an array for each of :data:`COLUMNS`.
        about: plain data: ``pairs``, ``longest`` sequence in tokens, ``highest_id`` of the tokens, and ``fingerprint``, the
            sha256 over the keys of all pairs.
    """

    def __init__(self, columns: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
        self.rows, self.starts, self.has_eos = columns["rows"], columns["starts"], columns["has_eos"]
        self._keys, self._ids, self._spans = columns["keys"], columns["ids"], columns["spans"]
        self._ends, self._span_ends = columns["ends"], columns["span_ends"]
        self.longest, self.highest_id = int(about["longest"]), int(about["highest_id"])
        self.fingerprint = str(about["fingerprint"])

    @classmethod
    def open(cls, folder: Path, about: Mapping[str, Any]) -> PackedPairs:
        """The pairs that a :class:`PairWriter` wrote to a folder, mapped into memory. ``about`` is its description of them."""
        # Plain arrays over the maps, because slices of memmap objects are slow.
        maps = {
            name: np.memmap(_file_of(folder, name), kind, mode="r") for name, (kind, _) in COLUMNS.items()
        }
        return cls({name: _shaped(np.asarray(values), name) for name, values in maps.items()}, about)

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, index: int) -> str:
        """sha256 (hex) of a pair's token ids and starts."""
        return self._keys[index].tobytes().hex()

    def fingerprint_of(self, pairs: np.ndarray) -> str:
        """sha256 (hex) over the keys of some pairs."""
        return hashlib.sha256(self._keys[pairs].tobytes()).hexdigest()

    def lengths(self, pairs: Any = slice(None)) -> np.ndarray:
        """Tokens of the chosen and the rejected sequence of pairs, prompts included: int64 ``[pairs, 2]``."""
        ends = self._ends
        return np.stack(
            [(ends[side + 1 :: 2][: len(self)] - ends[side::2][: len(self)])[pairs] for side in (0, 1)],
            axis=1,
        )

    def side(self, index: int, side: int) -> tuple[list[int], list[Span]]:
        """Token ids of one side of a pair, and the spans of its answer."""
        place = 2 * index + side
        ids = self._ids[self._ends[place] : self._ends[place + 1]].tolist()
        spans = self._spans[self._span_ends[place] : self._span_ends[place + 1]].tolist()
        return ids, [(start, end) for start, end in spans]
