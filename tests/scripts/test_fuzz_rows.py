from __future__ import annotations

import collections
import importlib.util
from pathlib import Path

import datasets

from tokenpref.data import tokenizer_json

SCRIPT = Path(__file__).parents[2] / "scripts" / "fuzz_rows.py"


def test_a_few_files(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("fuzz_rows", SCRIPT)
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tokenizer = tokenizer_json("package://data/tiny/model")
    counts = collections.Counter()
    for seed in range(60):
        counts.update(fuzz.one_file(tmp_path / "rows.jsonl", tokenizer, seed))
    assert counts["foreign exceptions"] == 0, capsys.readouterr().out
    assert counts["files"] == 60 and counts["rows"] > 300
    # Rows are read, left out and refused: none of these has become everything.
    assert counts["pairs"] > 30 and counts["left out"] > 30 and counts["files refused"] > 5


def test_a_foreign_exception_is_counted_and_shown(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("fuzz_rows", SCRIPT)
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)

    def broken(*_, **__):
        raise KeyError("chosen")

    monkeypatch.setattr(fuzz, "preference_dataset", broken)
    counts = fuzz.one_file(tmp_path / "rows.jsonl", None, 7)
    assert (
        counts["foreign exceptions"] == 1
        and "seed 7" in (out := capsys.readouterr().out)
        and "KeyError" in out
    )
