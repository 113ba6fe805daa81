from __future__ import annotations

import math

import pytest

from tokenpref.data import ColumnScores, preference_dataset
from tokenpref.data.labelled import labels_from
from tokenpref.data.pairs import RowFault
from tokenpref.errors import ConfigError, DataError

ROW = {"prompt": "hello", "first": " yes", "second": " no"}


def votes(*labels, **more) -> list[dict]:
    return [{**ROW, "label": label, **more} for label in labels]


def read(tokenizer, path, **labels):
    return preference_dataset(tokenizer, path, format="labelled", labels={"column": "label", **labels})


def chosen(data) -> list[str]:
    return [data.text(index).chosen for index in range(len(data))]


@pytest.mark.parametrize(
    ("labels", "values"),
    [
        ({"first": 1, "second": 2, "tie": 0}, [1, 2, 0]),
        ({"first": 1, "second": 2, "tie": 0}, [1.0, "2", "0"]),  # numbers that went through CSV
        ({"first": "a", "second": "b", "tie": ["both", "neither"]}, [" a", "b", "neither"]),
        ({"first": True, "second": False, "tie": "?"}, [True, "false", "?"]),
        ({"first": "negative", "second": "positive", "tie": 0}, [-3, 0.5, 0]),
        ({"first": [1, 2], "second": [3, 4], "tie": 5}, [2, 3, 5]),
    ],
)
def test_the_label_decides_and_ties_are_left_out(tokenizer, write_jsonl, labels, values):
    data = read(tokenizer, write_jsonl(votes(*values)), **labels)
    assert chosen(data) == [" yes", " no"] and [example.row for example in data] == [0, 1]
    assert data.report.dropped == {"tie": 1} and data.report.layout == "labelled"
    assert "Left out 1 rows: 1 tie" in data.report.summary()


@pytest.mark.parametrize("value", [3, "1x", True, [1], {"a": 1}, "", math.inf])
def test_other_labels_are_faults(value):
    labels = labels_from({"column": "label", "first": 1, "second": 2})
    with pytest.raises(RowFault, match="labels knows 1, 2") as fault:
        labels.read(value)
    assert fault.value.kind == "unknown label" and fault.value.column == "label"


def test_a_missing_label_is_a_fault_unless_the_row_is_dropped(tokenizer, write_jsonl):
    path = write_jsonl(votes(1, None, 2))
    with pytest.raises(DataError, match=r"row 1 \(line 2\), column 'label': has no value"):
        read(tokenizer, path, first=1, second=2)
    data = preference_dataset(
        tokenizer,
        path,
        format="labelled",
        labels={"column": "label", "first": 1, "second": 2},
        on_fault="drop",
    )
    assert data.report.dropped == {"no label": 1} and [example.row for example in data] == [0, 2]


def test_margins(tokenizer, write_jsonl):
    path = write_jsonl(votes(-3, 1, strength="2.5"))
    signed = read(tokenizer, path, first="negative", second="positive")
    assert [signed.margin(index) for index in (0, 1)] == [3.0, 1.0]
    named = read(tokenizer, path, first=-3, second=1)
    assert named.margin(0) is None
    mapped = preference_dataset(
        tokenizer,
        path,
        format="labelled",
        labels={"column": "label", "first": -3, "second": 1},
        column_map={"margin": "strength"},
        swap=True,
    )
    assert mapped.margin(0) == -2.5 and mapped.text(0).chosen == " no"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "format: labelled needs labels"),
        ({"column": "label", "first": 1}, "labels: second is missing"),
        ({"first": 1, "second": 2}, "labels: column must be the name of the column"),
        (
            {"column": "label", "first": 1, "second": "1"},
            "labels: .* stands for two of first, second and tie",
        ),
        ({"column": "label", "first": -1, "second": "negative"}, "stands for two of"),
        ({"column": "label", "first": {"a": 1}, "second": 2}, "labels: first must be text, a number"),
        ({"column": "label", "first": 1, "second": 2, "equal": 0}, "labels: 'equal' is no key"),
        ("label", "labels must be {column"),
    ],
)
def test_wrong_settings(tokenizer, write_jsonl, labels, message):
    with pytest.raises(ConfigError, match=message):
        preference_dataset(tokenizer, write_jsonl(votes(1)), format="labelled", labels=labels)


def test_missing_columns(tokenizer, write_jsonl):
    with pytest.raises(DataError, match="labels: .* has no column 'vote'; its columns are prompt, first"):
        preference_dataset(
            tokenizer,
            write_jsonl(votes(1)),
            format="labelled",
            labels={"column": "vote", "first": 1, "second": 2},
        )
    with pytest.raises(DataError, match=r"has no column 'second'; .*column_map: \{second: <column>\}"):
        read(tokenizer, write_jsonl([{"prompt": "q", "first": "a", "label": 1}]), first=1, second=2)
    for names in (("answer_a", "answer_b"), ("reply1", "reply2")):
        row = {"prompt": "q", **dict.fromkeys(names, "x"), "best": 1}
        with pytest.raises(
            DataError, match=f"format: labelled, column_map: .first: {names[0]}, second: {names[1]}"
        ):
            preference_dataset(tokenizer, write_jsonl([row]))
    with pytest.raises(DataError, match="format: ranked, column_map: .answers: responses, score: <column>"):
        preference_dataset(tokenizer, write_jsonl([{"prompt": "q", "responses": ["a", "b"], "best": 1}]))
    with pytest.raises(DataError, match="format: labelled .*ranked .*preset"):
        preference_dataset(tokenizer, write_jsonl([{"prompt": "q", "one": "a", "two": "b", "best": 1}]))


def test_only_ties_leave_no_pair(tokenizer, write_jsonl):
    with pytest.raises(DataError, match=r"every row was left out \(2 tie\)"):
        read(tokenizer, write_jsonl(votes(0, 0)), first=1, second=2, tie=0)


def test_whole_texts_and_conversations_can_be_labelled(chat_tokenizer, write_jsonl):
    user = {"role": "user", "content": "hello"}
    sides = [[user, {"role": "assistant", "content": text}] for text in ("yes", "no")]
    rows = [{"first": sides[0], "second": sides[1], "label": 2}]
    data = read(chat_tokenizer, write_jsonl(rows), first=1, second=2)
    assert chosen(data) == ["no"] and data[0].chosen_has_eos
    implicit = read(
        chat_tokenizer,
        write_jsonl([{"first": "hello yes", "second": "hello no", "label": 2}], "b.jsonl"),
        first=1,
        second=2,
    )
    assert chosen(implicit) == [" no"] and implicit.text(0).prompt == "hello"


def test_a_vote_for_none_beside_chosen_and_rejected_leaves_the_row_out(tokenizer, write_jsonl):
    row = {"prompt": "hello", "chosen": " yes", "rejected": " no"}
    said = write_jsonl([{**row, "label": label} for label in ("first", "Tie", None)])
    assert preference_dataset(tokenizer, said).report.dropped == {"tie": 1}
    numbers = write_jsonl([{**row, "agreed": value} for value in (1, 0)], "b.jsonl")
    assert len(preference_dataset(tokenizer, numbers)) == 2
    data = preference_dataset(tokenizer, numbers, labels={"column": "agreed", "tie": 0})
    assert data.report.dropped == {"tie": 1} and data[0].row == 0
    with pytest.raises(ConfigError, match="labels: tie is missing"):
        preference_dataset(tokenizer, numbers, labels={"column": "agreed"})


def test_columns_of_scores_have_no_side(tokenizer, write_jsonl):
    data = read(tokenizer, write_jsonl(votes(1, chosen_weights=1.0)), first=1, second=2)
    with pytest.raises(
        DataError, match="format: labelled, where label or rank decide which answer is chosen"
    ):
        ColumnScores(kind="weight", per="pair").load(data)
