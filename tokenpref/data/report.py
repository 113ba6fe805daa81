"""What was read, cut and left out of a data set, and the faults of its rows."""

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
    """What was read, cut and left out.

    Attributes:
        source: the data's name.
        layout: format of the rows, found or declared.
        rows: pairs that were read.
        used: pairs that an epoch sees, counted as often as it sees them.
        prompts_cut: pairs whose prompt lost its beginning.
        answers_cut: answers (of 2 * rows) that lost their end, and with it their EOS.
        equal_after_cut: pairs whose sides became equal by cutting; they train nothing.
        straddling_rows: pairs with a token over the boundary of prompt and answer.
        answers_with_eos: answers (of 2 * rows) that end with EOS.
        dropped: rows (pairs where a row gives several) left out, by reason: faults, and ties, which are none.
        swapped: whether chosen and rejected were exchanged.
        prompt_tokens: mean and largest number of tokens of a prompt.
        chosen_tokens: the same of a chosen answer.
        rejected_tokens: the same of a rejected answer.
        unused_columns: columns that are not read, though their names say that they belong to prompt or answers.
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
    """Faults of all rows, reported once."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._found: dict[str, list[tuple[int, RowFault]]] = {}
        self.dropped: dict[str, int] = {}

    def add(self, row: int, fault: RowFault, *, droppable: bool) -> None:
        """Note the fault of a row: counted if the row may be left out, kept as an error otherwise."""
        if droppable:
            self.dropped[fault.kind] = self.dropped.get(fault.kind, 0) + 1
        else:
            self._found.setdefault(fault.kind, []).append((row, fault))

    def leave_out(self, pair: LeftOut) -> None:
        """Count a pair that is left out though nothing is wrong with it."""
        self.dropped[pair.reason] = self.dropped.get(pair.reason, 0) + 1

    def found(self) -> list[tuple[int, str, str, str]]:
        """The errors as plain data: row, kind, column and message; for :meth:`merge`."""
        return [
            (row, fault.kind, fault.column, fault.message)
            for alike in self._found.values()
            for row, fault in alike
        ]

    def merge(self, dropped: Mapping[str, int], found: Sequence[tuple[int, str, str, str]]) -> None:
        """Take in what another part of the rows gave; parts come in their order."""
        for kind, count in dropped.items():
            self.dropped[kind] = self.dropped.get(kind, 0) + count
        for row, kind, column, message in sorted(found, key=lambda fault: fault[0]):
            self.add(row, RowFault(kind, column, message), droppable=False)

    def summary(self) -> str:
        """How many rows were left out for which reason."""
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
