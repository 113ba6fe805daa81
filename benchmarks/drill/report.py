"""The page of a drill, from whatever its stages have recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import tables

__all__ = ["latest", "page"]

Record = Mapping[str, Any]


def latest(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each stage, from its last beginning on, in the order of the stages' first beginnings."""
    found: dict[str, list[Record]] = {}
    for record in records:
        if record["kind"] == "begin":
            found[record["stage"]] = []
        found.setdefault(record["stage"], []).append(record)
    return found


def page(records: Sequence[Record], titles: Mapping[str, str]) -> str:
    """A Markdown page.

    Args:
        records: of :class:`benchmarks.drill.stage.Log`.
        titles: what each stage measures, by its name.
    """
    stages = latest(records)
    parts = ["# Drill on a GPU", _about(stages)]
    parts.append(tables.markdown(["stage", "result", "s", "limit s"], [_summary(*s) for s in stages.items()]))
    for name, found in stages.items():
        parts += [f"## {titles.get(name, name)}", *_tables(found), *_checks(found), *_lists(found)]
    return "\n\n".join(parts) + "\n"


def _about(stages: Mapping[str, Sequence[Record]]) -> str:
    rows = {r["table"]: r["values"] for records in stages.values() for r in records if r["kind"] == "row"}
    said = [rows.get(table, {}) for table in ("device", "versions")]
    listed = "; ".join(
        ", ".join(f"{k} {v}" for k, v in values.items() if v is not None) for values in said if values
    )
    text = (
        "`python -m benchmarks.gpu_drill` measured this page and wrote it. CONTRIBUTING.md says how to run it and what its\n"
        "stages do. Times are of one process and one device. Memory is what tensors have allocated."
    )
    if any(r["kind"] == "begin" and r["tiny"] for records in stages.values() for r in records):
        text += " **Some stages ran with the sizes of a test, so their times mean nothing.**"
    return f"{text}\n\n{listed or 'The stage that records device and versions has not run.'}"


def _summary(name: str, records: Sequence[Record]) -> list[str]:
    begin = next((r for r in records if r["kind"] == "begin"), {})
    end = next((r for r in records if r["kind"] == "end"), None)
    if end is None:
        return [name, "did not end", "-", f"{begin.get('limit', 0):.0f}"]
    result = "skipped" if end["skipped"] else "passed" if end["ok"] else "failed"
    return [name, result, f"{end['seconds']:.0f}", f"{begin.get('limit', 0):.0f}"]


def _tables(records: Sequence[Record]) -> list[str]:
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        if record["kind"] == "row":
            rows.setdefault(record["table"], []).append(record["values"])
    texts = []
    for table, values in rows.items():
        columns = list(dict.fromkeys(column for row in values for column in row))
        cells = [[_text(row.get(column)) for column in columns] for row in values]
        texts += [f"{table[0].upper()}{table[1:]}:", tables.markdown(columns, cells)]
    return texts


def _checks(records: Sequence[Record]) -> list[str]:
    checks = [r for r in records if r["kind"] == "check"]
    if not checks:
        return []
    rows = [
        [r["name"], f"{r['found']:.2g}", f"{r['most']:g}", "good" if r["ok"] else "**too large**"]
        for r in checks
    ]
    return ["Checks:", tables.markdown(["number", "found", "at most", "result"], rows)]


def _lists(records: Sequence[Record]) -> list[str]:
    lines = [f"- Not measured: {r['name']}: {r['reason']}." for r in records if r["kind"] == "skip"]
    for r in records:
        if r["kind"] == "error":
            message = " ".join(r["message"].split())[:300]
            lines.append(
                f"- **Failed**: {r['name']}: {r['type']}: {message} (at {', '.join(r['frames'][-2:])})"
            )
    return ["\n".join(lines)] if lines else []


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return str(value).replace("|", "/")
