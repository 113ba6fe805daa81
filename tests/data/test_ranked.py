from __future__ import annotations

import pytest

from tokenpref.data import preference_dataset
from tokenpref.errors import ConfigError, DataError

PATHS = {"answers": "answers[].text", "score": "answers[].score"}


def scored(*pairs: tuple[str, object]) -> dict:
    return {"prompt": "hello", "answers": [{"text": text, "score": score} for text, score in pairs]}


FOUR = scored((" a", 3), (" b", 9), (" c", 5), (" d", 5))


def read(tokenizer, path, **settings):
    return preference_dataset(tokenizer, path, format="ranked", **{"column_map": PATHS, **settings})


def pairs(data) -> list[str]:
    texts = [data.text(index) for index in range(len(data))]
    return [(text.chosen + text.rejected).replace(" ", "") for text in texts]


@pytest.mark.parametrize(
    ("settings", "found", "dropped"),
    [
        ({}, ["ba"], {}),
        ({"pairs": "adjacent"}, ["bc", "da"], {"tie": 1}),
        ({"pairs": "all"}, ["bc", "bd", "ba", "ca", "da"], {"tie": 1}),
        ({"pairs": "all", "min_gap": 4}, ["bc", "bd", "ba"], {"tie": 1, "gap below min_gap": 2}),
        ({"pairs": "all", "swap": True}, ["cb", "db", "ab", "ac", "ad"], {"tie": 1}),
    ],
)
def test_pairs_of_scores(tokenizer, write_jsonl, settings, found, dropped):
    data = read(tokenizer, write_jsonl([FOUR]), **settings)
    assert pairs(data) == found and data.report.dropped == dropped


def test_ranks_are_better_when_they_are_low(tokenizer, write_jsonl):
    path = write_jsonl([FOUR])
    data = read(tokenizer, path, column_map={"answers": "answers[].text", "rank": "answers[].score"})
    assert pairs(data) == ["ab"] and data.margin(0) == 6.0


def test_pairs_of_a_row_have_numbers_of_their_own(tokenizer, write_jsonl):
    rows = [scored((" a", 1), (" b", 1)), FOUR, scored((" e", 2), (" f", 1))]
    data = read(tokenizer, write_jsonl(rows), pairs="all")
    assert pairs(data) == ["bc", "bd", "ba", "ca", "da", "ef"]
    numbers = [example.row for example in data]
    # Row 1 gives its pairs 0, 1, 2, 4 and 5 (3 is a tie); three rows in all.
    assert numbers == [1, 4, 7, 13, 16, 2] and len({data[i].key for i in range(6)}) == 6
    assert [data.raw(index) for index in range(6)] == [rows[1]] * 5 + [rows[2]]
    assert data.locate(0).endswith("row 1 (line 2)") and data.locate(3).endswith(
        "row 1 (line 2), pair 4 of the row"
    )
    assert [data.margin(index) for index in range(6)] == [4.0, 4.0, 6.0, 2.0, 2.0, 1.0]


def test_lists_of_texts_and_structs_of_lists(tokenizer, write_jsonl):
    flat = {"prompt": "hello", "answers": [" a", " b"], "score": ["1", "2.5"]}
    columns = {"prompt": "hello", "answers": {"text": [" a", " b"], "score": [1, 2.5]}}
    text = {"prompt": "hello", "answers": '[{"text": " a", "score": 1}, {"text": " b", "score": 2.5}]'}
    first = read(tokenizer, write_jsonl([flat]), column_map=None)
    for number, row in enumerate((columns, text)):
        data = read(tokenizer, write_jsonl([row], f"{number}.jsonl"))
        assert data.fingerprint() == first.fingerprint() and pairs(data) == ["ba"] and data.margin(0) == 1.5


def test_one_faulty_pair_leaves_the_others(tokenizer, write_jsonl):
    path = write_jsonl([scored((" a", 3), (" a", 2), (" b", 1))])
    with pytest.raises(DataError, match=r"column 'answers\[1\]\.text': is equal to answers\[0\]\.text"):
        read(tokenizer, path, pairs="all")
    data = read(tokenizer, path, pairs="all", on_fault="drop")
    assert pairs(data) == ["ab", "ab"] and data.report.dropped == {"equal answers": 1}


@pytest.mark.parametrize(
    ("row", "column", "message"),
    [
        (scored((" a", 1)), "answers[].text", "has 1 answer"),
        (scored(), "answers[].text", "has 0 answer"),
        ({"prompt": "q", "answers": None}, "answers[].text", "holds a NoneType"),
        ({"prompt": "q", "answers": "four"}, "answers[].text", "text that is not JSON"),
        (scored((" a", 1), (" b", None)), "answers[].score", "has no score or rank"),
        (scored((" a", 1), (" b", "N/A")), "answers[].score", "must hold a finite number"),
        (scored((" a", 1), (" b", True)), "answers[].score", "must hold a finite number"),
        ({"prompt": "q", "answers": [{"text": " a", "score": 1}, 7]}, "answers[].text", "leads into a int"),
        ({**scored((" a", 1), (" b", 2)), "prompt": None}, "prompt", "has no value"),
    ],
)
def test_rows_that_cannot_be_ranked(tokenizer, write_jsonl, row, column, message):
    with pytest.raises(DataError) as error:
        read(tokenizer, write_jsonl([row, FOUR]))
    assert f"row 0 (line 1), column {column!r}: " in str(error.value) and message in str(error.value)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"pairs": "best"}, ConfigError, "pairs must be one of best_worst, all, adjacent, got 'best'"),
        ({"min_gap": -1}, ConfigError, "min_gap must be a finite number of at least 0, got -1"),
        ({"min_gap": float("nan")}, ConfigError, "min_gap must be"),
        ({"labels": {"column": "x", "first": 1, "second": 2}}, ConfigError, "labels go with two answers"),
        ({"column_map": {"answers": "answers[].text"}}, DataError, "needs either score .* or rank"),
        ({"column_map": {**PATHS, "rank": "answers[].score"}}, DataError, "needs either score .* or rank"),
        ({"column_map": {**PATHS, "first": "prompt"}}, DataError, "format ranked has no field 'first'"),
        ({"column_map": {**PATHS, "score": "answers[.score"}}, DataError, r"no column 'answers\[\.score'"),
    ],
)
def test_wrong_settings(tokenizer, write_jsonl, settings, error, message):
    with pytest.raises(error, match=message):
        read(tokenizer, write_jsonl([FOUR]), **settings)


def test_pairs_and_gap_go_with_ranked_rows(tokenizer, write_jsonl):
    path = write_jsonl([{"prompt": "hello", "chosen": " yes", "rejected": " no"}])
    with pytest.raises(ConfigError, match="pairs and min_gap go with format: ranked"):
        preference_dataset(tokenizer, path, pairs="all")
