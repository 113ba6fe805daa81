"""Several answers to one prompt with scores or ranks: which pairs are made of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenpref.data.columns import as_list
from tokenpref.data.labelled import TIE, Choice, as_number
from tokenpref.data.pairs import LeftOut, RowFault
from tokenpref.errors import ConfigError

__all__ = ["PAIRS", "Ranking", "check_ranking"]

PAIRS = ("best_worst", "all", "adjacent")
"""What ``pairs:`` may say."""

_BELOW_GAP = LeftOut("gap below min_gap")


@dataclass(frozen=True)
class Ranking:
    """How a list of answers becomes pairs.

    Attributes:
        answers: path of the answers.
        values: path of their scores or ranks.
        lower_is_better: whether the values are ranks, of which 1 is the best, and not scores.
        pairs: ``best_worst``, ``all`` or ``adjacent`` (neighbours in the order of the values).
        min_gap: smallest difference of the values of a pair.
    """

    answers: str
    values: str
    lower_is_better: bool
    pairs: str
    min_gap: float

    def choices(self, row: Mapping[str, Any]) -> list[Choice | LeftOut]:
        """The pairs of a row, of which the better answer is chosen; what has no gap is left out.

        Raises:
            RowFault: if answers and values are no lists of the same length, or fewer than two.
        """
        answers = as_list(row[self.answers], self.answers)
        values = [as_number(v, self.values, "score or rank") for v in as_list(row[self.values], self.values)]
        if len(answers) != len(values):
            raise RowFault(
                "wrong length",
                self.values,
                f"has {len(values)} values for {len(answers)} answers; each needs one",
            )
        if len(answers) < 2:
            raise RowFault("too few answers", self.answers, f"has {len(answers)} answer(s); a pair needs two")
        # Answers of the same value stay in the order of the data.
        order = sorted(range(len(answers)), key=lambda n: values[n] if self.lower_is_better else -values[n])
        return [self._choice(answers, values, better, worse) for better, worse in self._places(order)]

    def _places(self, order: Sequence[int]) -> list[tuple[int, int]]:
        if self.pairs == "best_worst":
            return [(order[0], order[-1])]
        return list(
            itertools.pairwise(order) if self.pairs == "adjacent" else itertools.combinations(order, 2)
        )

    def _choice(
        self, answers: Sequence[Any], values: Sequence[float], better: int, worse: int
    ) -> Choice | LeftOut:
        gap = abs(values[better] - values[worse])
        if gap == 0:
            return TIE
        if gap < self.min_gap:
            return _BELOW_GAP
        names = [self._name(place) for place in (better, worse)]
        return Choice(names[0], names[1], {names[0]: answers[better], names[1]: answers[worse]}, gap)

    def _name(self, place: int) -> str:
        """The path of one answer."""
        head, found, tail = self.answers.rpartition("[]")
        return f"{head}[{place}]{tail}" if found else f"{self.answers}[{place}]"


def check_ranking(pairs: object, min_gap: object) -> None:
    """Refuse settings that no ranking can have.

    Raises:
        ConfigError: if there are such.
    """
    if pairs not in PAIRS:
        raise ConfigError(f"pairs must be one of {', '.join(PAIRS)}, got {pairs!r}")
    if (
        isinstance(min_gap, bool)
        or not isinstance(min_gap, (int, float))
        or not math.isfinite(min_gap)
        or min_gap < 0
    ):
        raise ConfigError(f"min_gap must be a finite number of at least 0, got {min_gap!r}")
