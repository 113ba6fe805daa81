"""Tokenised pairs in flat arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tokenpref.data.tokenization import EncodedAnswer
from tokenpref.data.tokenizers import Span

__all__ = ["PackedPairs", "PairExample", "pair_key"]


@dataclass(frozen=True)
class PairExample:
    """One tokenised pair.

    Attributes:
        row: number of the pair, unique in its data set. It is the row in the source, counted from 0, but for further pairs
            of the same row: pair ``part`` of a row has the number ``row + part * rows in the source``.
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


def pair_key(
    chosen_ids: Sequence[int], chosen_start: int, rejected_ids: Sequence[int], rejected_start: int
) -> str:
    """sha256 (hex) of the training token ids: for each side its length, its start and its ids, as little-endian int64."""
    numbers = [len(chosen_ids), chosen_start, *chosen_ids, len(rejected_ids), rejected_start, *rejected_ids]
    return hashlib.sha256(np.asarray(numbers, dtype="<i8").tobytes()).hexdigest()


@dataclass
class PackedPairs:
    """Token ids and spans of all pairs in flat arrays; side 0 is chosen, side 1 rejected."""

    rows: Any = field(default_factory=list)
    ids: Any = field(default_factory=list)
    spans: Any = field(default_factory=list)
    ends: Any = field(default_factory=lambda: [0])  # of each side's ids, in the order chosen, rejected
    span_ends: Any = field(default_factory=lambda: [0])
    starts: Any = field(default_factory=list)
    has_eos: Any = field(default_factory=list)

    def add(self, row: int, chosen: EncodedAnswer, rejected: EncodedAnswer) -> None:
        """Append a pair of a source's row."""
        self.rows.append(row)
        self.starts.append((chosen.start, rejected.start))
        self.has_eos.append((chosen.has_eos, rejected.has_eos))
        for side in (chosen, rejected):
            self.ids.append(np.asarray(side.ids, dtype=np.int32))
            self.spans.append(np.asarray(side.spans, dtype=np.int32).reshape(-1, 2))
            self.ends.append(self.ends[-1] + len(side.ids))
            self.span_ends.append(self.span_ends[-1] + len(side.spans))

    def freeze(self) -> PackedPairs:
        """The same pairs in NumPy arrays; no pair can be added to those."""
        nothing = np.zeros((0,), dtype=np.int32)
        return PackedPairs(
            rows=np.asarray(self.rows, dtype=np.int64),
            ids=np.concatenate([nothing, *self.ids]),
            spans=np.concatenate([nothing.reshape(0, 2), *self.spans]),
            ends=np.asarray(self.ends, dtype=np.int64),
            span_ends=np.asarray(self.span_ends, dtype=np.int64),
            starts=np.asarray(self.starts, dtype=np.int64).reshape(-1, 2),
            has_eos=np.asarray(self.has_eos, dtype=bool).reshape(-1, 2),
        )

    def lengths(self, side: int) -> np.ndarray:
        """Tokens of one side of every pair, the prompt included: int64 ``[pairs]``."""
        return np.diff(self.ends)[side::2]

    def side(self, index: int, side: int) -> tuple[list[int], list[Span]]:
        """Token ids of one side of a pair, and the spans of its answer."""
        place = 2 * index + side
        ids = self.ids[self.ends[place] : self.ends[place + 1]].tolist()
        spans = self.spans[self.span_ends[place] : self.span_ends[place + 1]].tolist()
        return ids, [(start, end) for start, end in spans]
