"""Counts of what was read, truncated and left out of a data set, and the faults of its rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenpref.data.pairs import LeftOut, RowFault
from tokenpref.data.sources import Rows
from tokenpref.errors import DataError

__all__ = ["DataReport", "RowFaults"]

_LISTED_FAULTS = 5


@dataclass(frozen=True)
class DataReport:
    """Counts of what was read, truncated and left out.

    Attributes:
        source: the data's name.
        layout: format of the rows, found or declared.
        rows: pairs that were read.
        used: pairs in an epoch, counted as often as the epoch sees them.
        prompts_cut: pairs whose prompt lost its beginning.
        answers_cut: answers (of 2 * rows) that lost their end, and with it their EOS.
        equal_after_cut: pairs whose sides are equal after truncation; they have no effect on training.
        straddling_rows: pairs with a token that covers the boundary between prompt and answer.
        answers_with_eos: answers (of 2 * rows) that end with EOS.
        dropped: number of rows (or pairs, if a row gives several) that were left out, by reason: faults and ties.
        swapped: whether chosen and rejected were swapped.
        prompt_tokens: mean and largest number of tokens of a prompt.
        chosen_tokens: the same for the chosen answer.
        rejected_tokens: the same for the rejected answer.
        unused_columns: columns that are not read, although their names suggest that they belong to prompt or answers.
    """

    source: str
    layout: str
    rows: int
    used: int
    prompts_cut: int
    answers_cut: int
    equal_after_cut: int
    straddling_rows: int
    answers_with_eos: int
    dropped: dict[str, int]
    swapped: bool
    prompt_tokens: tuple[float, int]
    chosen_tokens: tuple[float, int]
    rejected_tokens: tuple[float, int]
    unused_columns: tuple[str, ...] = ()

    def summary(self) -> str:
        """One short paragraph."""
        lengths = ", ".join(
            f"{name} {mean:.1f} (longest {largest})"
            for name, (mean, largest) in (
                ("prompt", self.prompt_tokens),
                ("chosen", self.chosen_tokens),
                ("rejected", self.rejected_tokens),
            )
        )
        used = f" ({self.used} an epoch)" if self.used != self.rows else ""
        text = f"{self.source}: {self.rows} pairs{used}, format {self.layout}{', sides swapped' if self.swapped else ''}; "
        text += f"mean tokens: {lengths}. EOS ends {self.answers_with_eos} of {2 * self.rows} answers; "
        text += f"cut: {self.prompts_cut} prompts, {self.answers_cut} answers"
        if self.equal_after_cut:
            text += f" ({self.equal_after_cut} pairs have equal sides since)"
        text += f"; {self.straddling_rows} rows have a token over the boundary of prompt and answer."
        if self.dropped:
            reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items()))
            text += f" Left out {sum(self.dropped.values())} rows: {reasons}."
        if self.unused_columns:
            names = ", ".join(map(repr, self.unused_columns))
            text += f" Not used, though the names look like parts of the prompt or the answers: {names}."
        return text


class RowFaults:
    """Collects the faults of all rows, to report them together."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._found: dict[str, list[tuple[int, RowFault]]] = {}
        self.dropped: dict[str, int] = {}

    def add(self, row: int, fault: RowFault, *, droppable: bool) -> None:
        """Record the fault of a row. It is counted if the row may be left out, and otherwise kept as an error."""
        if droppable:
            self.dropped[fault.kind] = self.dropped.get(fault.kind, 0) + 1
        else:
            self._found.setdefault(fault.kind, []).append((row, fault))

    def leave_out(self, pair: LeftOut) -> None:
        """Count a pair that is left out although its row is correct."""
        self.dropped[pair.reason] = self.dropped.get(pair.reason, 0) + 1

    def found(self) -> list[tuple[int, str, str, str]]:
        """The errors as plain data: row, kind, column and message; for :meth:`merge`."""
        return [
            (row, fault.kind, fault.column, fault.message)
            for alike in self._found.values()
            for row, fault in alike
        ]

    def merge(self, dropped: Mapping[str, int], found: Sequence[tuple[int, str, str, str]]) -> None:
        """Add the faults of another part of the rows. Parts must be merged in order."""
        for kind, count in dropped.items():
            self.dropped[kind] = self.dropped.get(kind, 0) + count
        for row, kind, column, message in sorted(found, key=lambda fault: fault[0]):
            self.add(row, RowFault(kind, column, message), droppable=False)

    def summary(self) -> str:
        """The number of rows that were left out, by reason."""
        return ", ".join(f"{count} {kind}" for kind, count in sorted(self.dropped.items()))

    def raise_any(self) -> None:
        """Raise for the first faulty row, with the number of rows like it and the first few of them."""
        if not self._found:
            return
        kind, alike = next(iter(self._found.items()))
        row, fault = alike[0]
        message = f"{self._rows.locate(row)}, column {fault.column!r}: {fault.message}"
        if len(alike) > 1:
            listed = ", ".join(str(self._rows.number(row)) for row, _ in alike[:_LISTED_FAULTS])
            more = ", ..." if len(alike) > _LISTED_FAULTS else ""
            message += f" [{kind}: {len(alike)} rows in all: {listed}{more}]"
        others = {k: len(v) for k, v in self._found.items() if k != kind}
        if others:
            message += " [other faults: " + ", ".join(f"{count} {k}" for k, count in others.items()) + "]"
        raise DataError(f"{message}. To leave faulty rows out and count them, set on_fault: drop")
