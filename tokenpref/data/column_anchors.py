"""Anchors from the data, such as the middle answer of a data set with three answers."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from tokenpref.data.collate import Answer
from tokenpref.data.dataset import PreferenceDataset
from tokenpref.data.pairs import RowFault
from tokenpref.errors import DataError

__all__ = ["ColumnAnchors"]

_LISTED_FAULTS = 5


class ColumnAnchors:
    """Third answers from a column of the data.

    The column has the form of ``chosen``: text, messages, or text that repeats the prompt. An empty answer is allowed (and
    counted in ``anchors/empty``); a missing one is an error.

    Args:
        column: name of the column.
    """

    def __init__(self, column: str = "anchor") -> None:
        self.column = column
        self._answers: dict[int, Answer] = {}

    def bind(self, dataset: PreferenceDataset) -> None:
        """Read and tokenise the anchors of a data set.

        Raises:
            DataError: if there is no such column, or for the first row whose anchor cannot be used, with the number of
                rows like it.
        """
        if self.column not in dataset.columns:
            close = difflib.get_close_matches(self.column, dataset.columns, n=1)
            raise DataError(
                f"{dataset.source_name} has no column {self.column!r} with anchors; its columns are "
                f"{', '.join(dataset.columns)}. Set anchors.column to one of them, or sample anchors with "
                "tokenpref.training.AnchorSampler" + (f"; did you mean {close[0]!r}?" if close else "")
            )
        faults: list[tuple[int, RowFault]] = []
        for index, example in enumerate(dataset):
            try:
                self._answers[example.row] = dataset.further_answer(index, self.column)
            except RowFault as fault:
                faults.append((index, fault))
        if faults:
            index, first = faults[0]
            message = f"{dataset.locate(index)}, column {first.column!r}: {first.message}"
            if len(faults) > 1:
                listed = ", ".join(str(dataset[i].row) for i, _ in faults[:_LISTED_FAULTS])
                message += (
                    f" [{len(faults)} rows in all: {listed}{', ...' if len(faults) > _LISTED_FAULTS else ''}]"
                )
            raise DataError(message)

    def answers(self, rows: Sequence[int], _models: Any) -> list[Answer | None]:
        """The anchors of these rows of the data; None for a filler (row -1)."""
        return [self._answers[row] if row >= 0 else None for row in rows]
