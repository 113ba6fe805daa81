"""Several data sets combined into one."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokenpref.data.dataset import PairText, PreferenceDataset, WholeAnswer
from tokenpref.data.packed import PairExample
from tokenpref.data.report import DataReport
from tokenpref.errors import ConfigError

__all__ = ["MixtureReport", "PairMixture"]


@dataclass(frozen=True)
class MixtureReport:
    """The reports of the data sets that were mixed.

    Attributes:
        parts: one report per data set.
        layout: always ``mixed``.
    """

    parts: tuple[DataReport, ...]
    layout: str = "mixed"

    @property
    def rows(self) -> int:
        """Pairs that were read."""
        return sum(part.rows for part in self.parts)

    @property
    def used(self) -> int:
        """The number of pairs in an epoch, counted as often as the epoch sees them."""
        return sum(part.used for part in self.parts)

    def summary(self) -> str:
        """The shares of the data sets, and a paragraph about each."""
        shares = ", ".join(f"{100 * part.used / self.used:.1f} %" for part in self.parts)
        parts = " ".join(f"[{number}] {part.summary()}" for number, part in enumerate(self.parts))
        return f"{len(self.parts)} data sets mixed, {self.used} pairs an epoch ({shares}). {parts}"


class PairMixture(PreferenceDataset):
    """Several data sets, one after another. An epoch shuffles all of their pairs together.

    Each data set's own ``weight`` and ``max_rows`` say how often it is seen (:func:`tokenpref.data.preference_dataset`).

    Args:
        parts: the data sets, with one tokenizer.

    Raises:
        ConfigError: if there is none, or their tokenizers differ.
    """

    def __init__(self, parts: Sequence[PreferenceDataset]) -> None:
        if not parts:
            raise ConfigError("a mixture needs at least one data set")
        self._parts = tuple(single for part in parts for single in part.parts)
        if len({part.tokenizer.fingerprint() for part in self._parts}) > 1:
            raise ConfigError("the data sets of a mixture must have one tokenizer")
        self.tokenizer = self._parts[0].tokenizer
        self.source_name = " + ".join(part.source_name for part in self._parts)
        self.report = MixtureReport(tuple(part.report for part in self._parts))  # type: ignore[assignment]
        self._ends = np.cumsum([len(part) for part in self._parts])
        # Rows of the parts are numbered consecutively, so a number identifies one pair of the mixture.
        spans = [int(part.rows().max()) + 1 for part in self._parts]
        self._first_rows = np.cumsum([0, *spans[:-1]])

    @property
    def parts(self) -> tuple[PreferenceDataset, ...]:
        """See :class:`PreferenceDataset`."""
        return self._parts

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _at(self, index: int) -> tuple[int, int]:
        """The part of a pair, and the pair's position in it."""
        position = self._position(index)
        part = int(np.searchsorted(self._ends, position, side="right"))
        return part, position - (int(self._ends[part - 1]) if part else 0)

    def __getitem__(self, index: int) -> PairExample:
        part, position = self._at(index)
        example = self._parts[part][position]
        return dataclasses.replace(example, row=example.row + int(self._first_rows[part]))

    def lengths(self, pairs: Sequence[int] | None = None) -> np.ndarray:
        """See :class:`PreferenceDataset`."""
        if pairs is None:
            return np.concatenate([part.lengths() for part in self._parts])
        places = [self._at(int(pair)) for pair in pairs]
        found = [self._parts[part].lengths([position]) for part, position in places]
        return np.concatenate([np.zeros((0, 2), np.int64), *found])

    def starts(self) -> np.ndarray:
        """See :class:`PreferenceDataset`."""
        return np.concatenate([part.starts() for part in self._parts])

    def has_eos(self) -> np.ndarray:
        """See :class:`PreferenceDataset`."""
        return np.concatenate([part.has_eos() for part in self._parts])

    def rows(self) -> np.ndarray:
        """See :class:`PreferenceDataset`."""
        return np.concatenate(
            [p.rows() + first for p, first in zip(self._parts, self._first_rows, strict=True)]
        )

    @property
    def longest(self) -> int:
        """See :class:`PreferenceDataset`."""
        return max(part.longest for part in self._parts)

    @property
    def highest_id(self) -> int:
        """See :class:`PreferenceDataset`."""
        return max(part.highest_id for part in self._parts)

    @property
    def columns(self) -> list[str]:
        """Columns that all sources have."""
        first, *others = (part.columns for part in self._parts)
        return [column for column in first if all(column in columns for columns in others)]

    def raw(self, index: int) -> dict[str, Any]:
        """See :class:`PreferenceDataset`."""
        part, position = self._at(index)
        return self._parts[part].raw(position)

    def locate(self, index: int) -> str:
        """See :class:`PreferenceDataset`."""
        part, position = self._at(index)
        return self._parts[part].locate(position)

    def margin(self, index: int) -> float | None:
        """See :class:`PreferenceDataset`."""
        part, position = self._at(index)
        return self._parts[part].margin(position)

    def text(self, index: int) -> PairText:
        """See :class:`PreferenceDataset`."""
        part, position = self._at(index)
        return self._parts[part].text(position)

    def whole_answers(self, index: int) -> tuple[WholeAnswer, WholeAnswer]:
        """See :class:`PreferenceDataset`."""
        part, position = self._at(index)
        return self._parts[part].whole_answers(position)

    def prompt_ids(self, index: int) -> list[int]:
        """See :class:`PreferenceDataset`."""
        part, position = self._at(index)
        return self._parts[part].prompt_ids(position)

    def further_answer(self, index: int, column: str) -> tuple[list[int], int]:
        """See :class:`PreferenceDataset`."""
        part, position = self._at(index)
        return self._parts[part].further_answer(position, column)

    def with_side_prompt(self, index: int, side: str, prompt: str) -> tuple[list[int], int]:
        """See :class:`PreferenceDataset`."""
        part, position = self._at(index)
        return self._parts[part].with_side_prompt(position, side, prompt)

    def settings(self) -> dict[str, Any]:
        """The values of the parts, in order."""
        return {"parts": [part.settings() for part in self._parts]}

    def fingerprint(self) -> str:
        """sha256 (hex) over the fingerprints of the parts."""
        return hashlib.sha256("".join(part.fingerprint() for part in self._parts).encode()).hexdigest()
