"""One invented row of every data set whose layout has a name."""

from __future__ import annotations

import json
from typing import Any

import datasets
import pytest

from tokenpref.data import preference_dataset
from tokenpref.data.presets import PRESETS
from tokenpref.errors import ConfigError, DataError

USER = {"role": "user", "content": "2+2?"}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def typed(text: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text, "image": None}]


PAIR = {"chosen": [USER, said("4")], "rejected": [USER, said("5")]}
PKU = {
    "prompt": "2+2?",
    "response_0": "5",
    "response_1": "4",
    "better_response_id": 1,
    "safer_response_id": 1,
}
ROWS: dict[str, dict[str, Any]] = {
    "shp": {
        "history": "2+2?",
        "human_ref_A": "4",
        "human_ref_B": "5",
        "labels": 1,
        "score_A": 9,
        "score_B": 3,
        "score_ratio": 3.0,
    },
    "pku_better": PKU,
    "pku_safer": {**PKU, "better_response_id": 0},
    "helpsteer3": {
        "domain": "stem",
        "context": [USER],
        "response1": "4",
        "response2": "5",
        "overall_preference": -2,
    },
    "helpsteer2": {"prompt": "2+2?", "response_1": "5", "response_2": "4", "preference_strength": 1},
    "tldr": {
        "info": {"id": "x", "post": "2+2?", "title": "sums", "subreddit": "math"},
        "summaries": [{"text": "5", "policy": "a", "note": None}, {"text": "4", "policy": "b", "note": None}],
        "choice": 1,
    },
    "arena": {
        "model_a": "x",
        "model_b": "y",
        "winner": "model_b",
        "conversation_a": [{**USER, "content": typed("2+2?")}, {**said(""), "content": typed("5")}],
        "conversation_b": [{**USER, "content": typed("2+2?")}, {**said(""), "content": typed("4")}],
    },
    "ultrafeedback": {
        "instruction": "2+2?",
        "models": ["x", "y", "z"],
        "completions": [
            {"response": "22", "overall_score": 6.5},
            {"response": "4", "overall_score": 9.0},
            {"response": "5", "overall_score": 2.0},
        ],
    },
    "nectar": {
        "prompt": "\n\nHuman: 2+2?\n\nAssistant: ",
        "answers": [
            {"answer": "5", "model": "x", "rank": 3.0},
            {"answer": "4", "model": "y", "rank": 1.0},
            {"answer": "22", "model": "z", "rank": 2.0},
        ],
    },
    "hh": {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
    "orca": {"system": "Be brief.", "question": "2+2?", "chosen": "4", "rejected": "5"},
    "distilabel_orca": {
        "system": "Be brief.",
        "input": "2+2?",
        "chosen": "4",
        "rejected": "5",
        "status": "swapped",
    },
    "stack_exchange": {"qid": 7, "question": "2+2?", "response_j": "4", "response_k": "5"},
    "alpaca": {
        "instruction": "Add.",
        "input": "2+2?",
        "chosen": "4",
        "rejected": "5",
        "system": "Be brief.",
        "history": [["1+1?", "2"]],
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "2+2?"}],
        "chosen": {"from": "gpt", "value": "4"},
        "rejected": {"from": "gpt", "value": "5"},
        "system": "Be brief.",
    },
    "tulu": {"id": "x", "source": "y", "prompt": "2+2?", **PAIR},
    "skywork": {"source": "x", **PAIR},
    "capybara": {"source": "x", "conversation": [{"input": "2+2?", "output": "4"}], **PAIR},
    "dpo_mix": {"dataset": "x", "chosen_rating": 5.0, "rejected_rating": 1.0, **PAIR},
    "ultrafeedback_binarized": {"prompt": "2+2?", "messages": PAIR["chosen"], "score_chosen": 9.0, **PAIR},
}
# Presets of which `auto` cannot tell the name, because it reads such rows by itself.
READ_BY_AUTO = {"hh", "tulu", "skywork", "capybara", "dpo_mix", "ultrafeedback_binarized"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_every_preset_has_a_row():
    assert set(ROWS) == set(PRESETS)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("kept_as", ["jsonl", "parquet"])
def test_a_preset_reads_its_rows(name, kept_as, tmp_path, chat_tokenizer):
    path = tmp_path / f"rows.{kept_as}"
    if kept_as == "jsonl":
        path.write_text(json.dumps(ROWS[name]) + "\n")
    else:
        datasets.Dataset.from_list([ROWS[name]]).to_parquet(str(path))
    data = preference_dataset(chat_tokenizer, str(path), preset=name)
    text = data.text(0)
    assert len(data) == 1 and "2+2?" in text.prompt
    assert (text.chosen.strip(), text.rejected.strip()) == ("4", "5")
    assert data[0].chosen_has_eos and data[0].rejected_has_eos
    # What stands beside the prompt is in it.
    assert ("Be brief." in text.prompt) == ("system" in ROWS[name])
    assert ("1+1?" in text.prompt) == ("history" in ROWS[name] and name != "shp")
    swapped = preference_dataset(chat_tokenizer, str(path), preset=name, swap=True)
    assert swapped.text(0).chosen == text.rejected and swapped.margin(0) == (
        None if data.margin(0) is None else -data.margin(0)
    )


@pytest.mark.parametrize("name", [name for name in ROWS if name not in READ_BY_AUTO])
def test_auto_names_the_preset(name, write_jsonl, chat_tokenizer):
    with pytest.raises(DataError, match=rf"it looks like preset: (\w+ or )*{name}\b.*Set dataset\.preset"):
        preference_dataset(chat_tokenizer, write_jsonl([ROWS[name]]))


@pytest.mark.parametrize("name", sorted(READ_BY_AUTO))
def test_auto_reads_what_needs_no_preset(name, write_jsonl, chat_tokenizer):
    data = preference_dataset(chat_tokenizer, write_jsonl([ROWS[name]]))
    named = preference_dataset(chat_tokenizer, write_jsonl([ROWS[name]], "b.jsonl"), preset=name)
    assert data.fingerprint() == named.fingerprint()


@pytest.mark.parametrize(
    ("name", "margin"),
    [
        ("shp", 3.0),
        ("helpsteer3", 2.0),
        ("helpsteer2", 1.0),
        ("ultrafeedback", 7.0),
        ("nectar", 2.0),
        ("tldr", None),
    ],
)
def test_the_strength_of_a_preference_is_its_margin(name, margin, write_jsonl, chat_tokenizer):
    assert preference_dataset(chat_tokenizer, write_jsonl([ROWS[name]]), preset=name).margin(0) == margin


def test_the_two_labels_of_pku_may_differ(write_jsonl, chat_tokenizer):
    path = write_jsonl([{**PKU, "better_response_id": 0}])
    assert preference_dataset(chat_tokenizer, path, preset="pku_better").text(0).chosen == "5"
    assert preference_dataset(chat_tokenizer, path, preset="pku_safer").text(0).chosen == "4"


def test_parts_of_a_preset_can_be_changed(write_jsonl, chat_tokenizer):
    row = {**ROWS["shp"], "labels": "b"}
    row["post"] = row.pop("history")
    data = preference_dataset(
        chat_tokenizer,
        write_jsonl([row]),
        preset="shp",
        column_map={"prompt": "post", "margin": None},
        labels={"first": "a", "second": "b"},
        as_messages=False,
    )
    assert data.text(0).chosen == "5" and data.text(0).prompt == "2+2?" and data.margin(0) is None
    assert not data[0].chosen_has_eos


def test_wrong_presets(write_jsonl, chat_tokenizer, tokenizer):
    path = write_jsonl([ROWS["shp"]])
    with pytest.raises(ConfigError, match="preset must be one of shp, .*got 'SHP2'"):
        preference_dataset(chat_tokenizer, path, preset="SHP2")
    with pytest.raises(ConfigError, match="preset: shp has format: labelled, but format: ranked was set"):
        preference_dataset(chat_tokenizer, path, preset="shp", format="ranked")
    with pytest.raises(DataError, match="no column 'instruction' for prompt; its columns are history"):
        preference_dataset(chat_tokenizer, path, preset="ultrafeedback")
    with pytest.raises(ConfigError, match="no chat template"):
        preference_dataset(tokenizer, path, preset="shp")
