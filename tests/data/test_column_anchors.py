from __future__ import annotations

import datasets
import pytest

from tokenpref.data import ColumnAnchors, preference_dataset
from tokenpref.errors import DataError

ROW = {"prompt": "hello", "chosen": " the yes", "rejected": " no", "anchor": " yes"}
USER = [{"role": "user", "content": "hello"}]
CHAT = {
    "prompt": USER,
    "chosen": [{"role": "assistant", "content": "yes the"}],
    "rejected": [{"role": "assistant", "content": "no"}],
    "anchor": [{"role": "assistant", "content": "yes"}],
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def anchors(chat_tokenizer, write_jsonl):
    """The data set and its anchors: ``anchors(rows, column, **dataset settings)``."""

    def read(rows, column="anchor", **settings):
        data = preference_dataset(chat_tokenizer, write_jsonl(rows), **settings)
        source = ColumnAnchors(column)
        source.bind(data)
        return data, source.answers([example.row for example in data], None)

    return read


def as_chosen(data, rows, chat_tokenizer, write_jsonl, **settings):
    """What the anchors' ids would be if they were the chosen answers."""
    exchanged = [{**row, "chosen": row["anchor"]} for row in rows]
    again = preference_dataset(chat_tokenizer, write_jsonl(exchanged), **settings)
    return [(e.chosen_ids, e.chosen_start) for e in again]


@pytest.mark.parametrize("settings", [{}, {"append_eos": True}, {"max_seq_len": 3}])
@pytest.mark.parametrize("row", [ROW, CHAT], ids=["text", "chat"])
def test_an_anchor_is_tokenised_like_the_other_answers(anchors, chat_tokenizer, write_jsonl, row, settings):
    if row is CHAT and settings:
        settings = {"max_seq_len": 30} if "max_seq_len" in settings else settings
    data, found = anchors([row], **settings)
    assert found == as_chosen(data, [row], chat_tokenizer, write_jsonl, **settings)


def test_texts_that_repeat_the_prompt(anchors):
    rows = [{"chosen": "hello the yes", "rejected": "hello no", "middle": "hello yes"}]
    data, [(ids, start)] = anchors(rows, "middle")
    example = data[0]
    assert ids[:start] == example.chosen_ids[: example.chosen_start] and len(ids) == start + 2
    with pytest.raises(DataError, match=r"middle.*does not begin with the prompt of the pair"):
        anchors([{**rows[0], "middle": "no yes"}], "middle")


def test_an_empty_anchor_is_no_fault_and_has_no_tokens(anchors):
    data, [(ids, start), _] = anchors([{**ROW, "anchor": ""}, ROW])
    assert ids == data.prompt_ids(0) and start == len(ids)


def test_a_filler_has_none(anchors, chat_tokenizer, write_jsonl):
    source = ColumnAnchors()
    source.bind(preference_dataset(chat_tokenizer, write_jsonl([ROW])))
    assert source.answers([-1], None) == [None]


def test_a_column_that_is_not_there(anchors):
    with pytest.raises(
        DataError, match=r"has no column 'anchors' .*Set anchors.column.*did you mean 'anchor'"
    ):
        anchors([ROW], "anchors")


def test_faulty_anchors_are_counted(anchors):
    rows = [ROW, {**ROW, "anchor": None}, {**ROW, "anchor": None}]
    with pytest.raises(DataError, match=r"column 'anchor': has no value.*2 rows in all: 1, 2"):
        anchors(rows)
    with pytest.raises(DataError, match="must have one assistant message after the prompt, found 2"):
        anchors([{**CHAT, "anchor": [*CHAT["anchor"], *USER]}])
