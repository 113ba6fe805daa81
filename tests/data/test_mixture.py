from __future__ import annotations

import dataclasses
import hashlib

import datasets
import numpy as np
import pytest

from tokenpref.data import ColumnScores, PairMixture, preference_dataset, tokenizer_json
from tokenpref.data.order import weighted_selection
from tokenpref.errors import ConfigError, DataError

FILMS = [
    {
        "prompt": f"hello {i}",
        "chosen": " yes",
        "rejected": " no",
        "chosen_weights": 1.0 + i,
        "rejected_weights": 2.0,
    }
    for i in range(6)
]
TURNS = [
    {
        "prompt": [{"role": "user", "content": f"the {i}"}],
        "chosen": [{"role": "assistant", "content": "no"}],
        "rejected": [{"role": "assistant", "content": "yes yes"}],
        "chosen_weights": 10.0 + i,
        "rejected_weights": 20.0,
        "note": i,
    }
    for i in range(4)
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def parts(chat_tokenizer, write_jsonl):
    films, turns = write_jsonl(FILMS, "films.jsonl"), write_jsonl(TURNS, "turns.jsonl")
    return [
        preference_dataset(chat_tokenizer, films, split="train[1:]"),
        preference_dataset(chat_tokenizer, turns, swap=True, weight=1.5),
    ]


def test_a_mixture_is_its_parts_one_after_another(parts):
    mixed = PairMixture(parts)
    assert len(mixed) == 5 + 6 == len(list(mixed))
    places = [(0, i) for i in range(5)] + [(1, i) for i in range(6)]
    for index, (part, position) in enumerate(places):
        own = parts[part]
        assert mixed[index] == dataclasses.replace(own[position], row=own[position].row + 6 * part)
        for name in ("raw", "locate", "text", "whole_answers", "prompt_ids", "margin"):
            assert getattr(mixed, name)(index) == getattr(own, name)(position)
        assert mixed.further_answer(index, "chosen") == own.further_answer(position, "chosen")
        assert mixed.with_side_prompt(index, "chosen", "no") == own.with_side_prompt(position, "chosen", "no")
    assert mixed[-1] == mixed[10] and mixed.rows().tolist() == [e.row for e in mixed]
    assert mixed.lengths().tolist() == [[len(e.chosen_ids), len(e.rejected_ids)] for e in mixed]
    assert mixed.lengths([7, 1]).tolist() == mixed.lengths()[[7, 1]].tolist()
    assert mixed.starts().tolist() == [[e.chosen_start, e.rejected_start] for e in mixed]
    assert mixed.has_eos().tolist() == [[e.chosen_has_eos, e.rejected_has_eos] for e in mixed]
    assert mixed.longest == mixed.lengths().max()
    assert mixed.highest_id == max(max(*e.chosen_ids, *e.rejected_ids) for e in mixed)
    assert "note" not in mixed.columns and "chosen_weights" in mixed.columns
    assert mixed.fingerprint() not in (PairMixture(parts[::-1]).fingerprint(), parts[0].fingerprint())
    assert PairMixture([PairMixture(parts)]).parts == mixed.parts == tuple(parts)
    summary = mixed.report.summary()
    assert summary.startswith("2 data sets mixed, 11 pairs an epoch (45.5 %, 54.5 %). [0] ")
    assert "4 pairs (6 an epoch), format conversational, sides swapped" in summary
    with pytest.raises(IndexError):
        mixed[11]


def test_the_same_pair_has_one_number_and_different_pairs_have_different_ones(parts):
    by_row: dict[int, set[str]] = {}
    for index, example in enumerate(PairMixture([*parts, parts[0]])):
        by_row.setdefault(example.row, set()).add(example.key)
        assert index >= 0
    assert all(len(keys) == 1 for keys in by_row.values())
    assert len(by_row) == 5 + 4 + 5


def test_scores_in_columns_follow_each_part(parts):
    scores = ColumnScores("weight", "pair").load(PairMixture(parts))
    assert [float(chosen[0]) for chosen, _ in scores[:5]] == [2, 3, 4, 5, 6]
    assert [float(rejected[0]) for _, rejected in scores[5:9]] == [10, 11, 12, 13]  # its sides are swapped


def test_weights(tokenizer, write_jsonl):
    source = write_jsonl(FILMS)
    rows = {w: preference_dataset(tokenizer, source, weight=w).rows().tolist() for w in (0.5, 1, 2, 2.5)}
    assert rows[1] == [*range(6)] and rows[2] == [*range(6)] * 2
    assert (
        len(rows[0.5]) == 3
        and rows[0.5] == sorted(set(rows[0.5]))
        and rows[2.5] == [*range(6)] * 2 + rows[0.5]
    )
    half = preference_dataset(tokenizer, source, weight=0.5)
    assert half.fingerprint() == hashlib.sha256(b"".join(bytes.fromhex(e.key) for e in half)).hexdigest()
    assert half.lengths([2]).tolist() == [[len(half[2].chosen_ids), len(half[2].rejected_ids)]]
    assert half.locate(1).endswith(f"row {rows[0.5][1]} (line {rows[0.5][1] + 1})")
    for weight in (0, -1, float("nan"), float("inf"), True, "1", None):
        with pytest.raises(ConfigError, match="weight must be a number above 0"):
            preference_dataset(tokenizer, source, weight=weight)
    with pytest.raises(DataError, match=r"weight 0\.01 leaves none of 6 pairs"):
        preference_dataset(tokenizer, source, weight=0.01)


def test_the_selection_is_fixed():
    # Drawn once from a Philox generator with the key (0, 0); resumed runs and stored weights depend on it.
    draws = np.random.Philox(key=np.array([0, 0], dtype=np.uint64)).random_raw(10)
    assert weighted_selection(10, 0.3).tolist() == sorted(np.argsort(draws)[:3].tolist())
    assert weighted_selection(10, 1.0) is None


def test_what_cannot_be_mixed(parts, make_tokenizer_folder, write_jsonl):
    other = preference_dataset(
        tokenizer_json(make_tokenizer_folder(config={"eos_token": "<pad>"})), write_jsonl(FILMS)
    )
    with pytest.raises(ConfigError, match="one tokenizer"):
        PairMixture([*parts, other])
    with pytest.raises(ConfigError, match="at least one data set"):
        PairMixture([])
