"""Random JSON against the row reader: it reads what is written, or says which row it cannot use."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpref.data import PreferenceDataset, load_rows, preference_dataset
from tokenpref.errors import ConfigError, DataError

# Text that a reader may take for something else, empty text, and halves of surrogate pairs, which JSON can write.
LIKE_JSON = ["4", "1.5", "null", "true", "[]", "{}", '"a"', "NaN", "2020-01-01", "2020-01-01 10:00:00"]
LIKE_TEXT = ["", " ", "\ud83d", "😀", "hello", "hello the", "<|end|>", "\u2028"]
LIKE_HH = ["\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: c"]
texts = st.sampled_from(LIKE_JSON + LIKE_TEXT + LIKE_HH) | st.text(st.characters(), max_size=5)
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
)
names = st.sampled_from(["a", "b"]) | st.text(st.characters(), max_size=3)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
roles = st.sampled_from(["user", "assistant", "system", "human", "gpt"])
messages = st.fixed_dictionaries(
    {"role": roles | texts | values, "content": texts | values}, optional={"name": values}
) | st.fixed_dictionaries({"from": roles, "value": texts})
any_fields = texts | values | st.lists(messages, max_size=3)
any_rows = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("prompt", "chosen", "rejected", "complete", "meta"), any_fields)
) | st.dictionaries(names, values, max_size=3)
# Values that readers and Python's comparison take for each other.
alike = st.fixed_dictionaries(
    {"a": st.sampled_from([0.5, 1, 1.0, True, False, 0, "1", "true", None, [1], [True], {"b": 1}])}
)

# Rows that are mostly good: of one layout, with an answer in a text that may look like anything.
words = st.sampled_from(["hello", " the", "😀", "<|end|>", "\u2028", *LIKE_JSON])
said = st.lists(words, min_size=1, max_size=3).map("".join)
turn = "\n\nHuman: {}\n\nAssistant:{}".format


def message(role: str) -> st.SearchStrategy[list[dict[str, str]]]:
    return st.builds(lambda text: [{"role": role, "content": text}], said)


def two_answers(begun: str) -> st.SearchStrategy[dict[str, str]]:
    return st.builds(lambda a, b: {"chosen": begun + a, "rejected": begun + b}, said, said)


GOOD_ROWS = [
    st.fixed_dictionaries(
        {"prompt": said, "chosen": said, "rejected": said},
        optional={"complete": st.booleans(), "meta": values},
    ),
    said.flatmap(lambda text: two_answers(text + "\n")),
    said.flatmap(lambda text: two_answers(turn(text, ""))),
    st.fixed_dictionaries(
        {
            "prompt": message("user"),
            "chosen": message("assistant") | said,
            "rejected": message("assistant") | said,
        },
        optional={"meta": values},
    ),
]


def with_faults(good: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    fields = st.sampled_from(["prompt", "chosen", "rejected", "complete"])
    one_field = st.builds(lambda row, name, value: {**row, name: value}, good, fields, any_fields)
    return st.one_of(good, good, good, good, one_field, any_rows)


row_lists = st.sampled_from(GOOD_ROWS).flatmap(
    lambda good: st.lists(with_faults(good), min_size=1, max_size=5)
)
declared = st.sampled_from(["auto"] * 8 + ["explicit", "implicit", "conversational", "hh"])

# What is wrong with a file as a whole names no row.
OF_THE_FILE = re.compile(
    r"has no column '|needs either score|"
    r"its rows have no columns|has no rows|format: \w+ was set, but |every row was left out|is empty"
)
NO_NAME = re.compile("[\0\ud800-\udfff]")
PLACE = re.compile(r"pairs\.jsonl, row (\d+) \(line (\d+)\)")


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("rows") / "pairs.jsonl"


def write(path: Path, lines: list[str]) -> None:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def same(found: Any, written: Any) -> bool:
    """Equal as JSON: true is not 1 and "1" is not 1; a float column may give 1 as 1.0; a lacking column is null."""
    if isinstance(written, dict):
        return isinstance(found, dict) and all(same(found.get(k), written.get(k)) for k in found | written)
    if isinstance(written, list):
        return isinstance(found, list) and len(found) == len(written) and all(map(same, found, written))
    if isinstance(written, bool) or not isinstance(written, int | float):
        return type(found) is type(written) and found == written
    return isinstance(found, int | float) and not isinstance(found, bool) and found == written


def read(path: Path, tokenizer: object, **arguments: Any) -> PreferenceDataset | str:
    """The data set, or the message of the error that a user gets."""
    try:
        return preference_dataset(tokenizer, str(path), add_bos=True, **arguments)
    except (DataError, ConfigError) as error:
        message = str(error)
        assert "\n" not in message
        assert OF_THE_FILE.search(message) or PLACE.search(message), message
        return message


def contents(value: Any) -> list[str]:
    """Texts of a field's messages, or of a field that is text."""
    if isinstance(value, str):
        return [value]
    return [str(message.get("content", message.get("value"))) for message in value]


@settings(max_examples=100)
@given(row_lists, declared, st.booleans())
def test_rows_are_read_as_written_or_named(path, byte_tokenizer, rows, layout, swap):
    write(path, [json.dumps(row) for row in rows])
    strict = read(path, byte_tokenizer, format=layout, swap=swap)
    lenient = read(path, byte_tokenizer, format=layout, swap=swap, on_fault="drop")
    if isinstance(lenient, str):
        # Nothing is left: then something is wrong with the file or with every row.
        assert isinstance(strict, str)
        return
    kept = [lenient[index].row for index in range(len(lenient))]
    assert kept == sorted(set(kept)) and sum(lenient.report.dropped.values()) == len(rows) - len(kept)
    if isinstance(strict, str):
        place = PLACE.search(strict)
        assert place is not None, strict
        first = int(place[1])
        assert int(place[2]) == first + 1 and first not in kept and kept[:first] == list(range(first))
    else:
        assert kept == list(range(len(rows))) and strict.fingerprint() == lenient.fingerprint()
    for index, number in enumerate(kept):
        row, text, example = rows[number], lenient.text(index), lenient[index]
        assert same(lenient.raw(index), row)
        sides = ("rejected", "chosen") if swap else ("chosen", "rejected")
        if lenient.report.layout == "explicit":
            assert (text.prompt, text.chosen, text.rejected) == (row["prompt"], row[sides[0]], row[sides[1]])
        elif lenient.report.layout == "conversational":
            for answer, side in zip((text.chosen, text.rejected), sides, strict=True):
                assert answer == contents(row[side])[-1]
        else:
            assert [text.prompt + text.chosen, text.prompt + text.rejected] == [row[side] for side in sides]
        for ids, start in (
            (example.chosen_ids, example.chosen_start),
            (example.rejected_ids, example.rejected_start),
        ):
            assert 0 < start < len(ids)


@settings(max_examples=100)
@given(st.lists(any_rows | alike, min_size=1, max_size=6) | st.lists(alike, min_size=1), st.booleans())
def test_every_value_of_a_file_is_kept(path, rows, as_list):
    write(path, [json.dumps(rows)] if as_list else [json.dumps(row) for row in rows])
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if not columns or NO_NAME.search("".join(columns)):
        with pytest.raises(
            DataError, match="its rows have no columns|holds a NUL or half of a surrogate pair"
        ):
            load_rows(str(path))
        return
    table = load_rows(str(path)).table
    assert table.num_rows == len(rows) and table.column_names == columns
    for place, row in enumerate(rows):
        assert same(table[place], row) and list(table[place]) == columns
    assert all(same(found, row) for found, row in zip(table, rows, strict=True))


# Two answers with a label, and lists of answers with scores.
labels = st.sampled_from([1, 2, 0, 1.0, "1", "2"])
LABELLED = {"format": "labelled", "labels": {"column": "label", "first": 1, "second": 2, "tie": 0}}
RANKED = {"format": "ranked", "column_map": {"answers": "answers[].text", "score": "answers[].score"}}
labelled_rows = st.fixed_dictionaries({"prompt": said, "first": said, "second": said, "label": labels})
scored = st.fixed_dictionaries({"text": said, "score": st.integers(-2, 2) | st.floats(-2, 2)})
ranked_rows = st.fixed_dictionaries({"prompt": said, "answers": st.lists(scored, min_size=2, max_size=4)})


def spoilt(good: st.SearchStrategy[dict[str, Any]], names: list[str]) -> st.SearchStrategy[dict[str, Any]]:
    one_field = st.builds(
        lambda row, name, value: {**row, name: value},
        good,
        st.sampled_from(names),
        any_fields | st.lists(values),
    )
    return st.one_of(good, good, good, one_field, any_rows)


@settings(max_examples=100)
@given(st.lists(spoilt(labelled_rows, ["prompt", "first", "second", "label"]), min_size=1, max_size=5))
def test_labelled_rows_are_read_left_out_or_named(path, byte_tokenizer, rows):
    write(path, [json.dumps(row) for row in rows])
    found = read(path, byte_tokenizer, on_fault="drop", **LABELLED)
    if isinstance(found, str):
        return
    kept = [example.row for example in found]
    assert kept == sorted(set(kept)) and sum(found.report.dropped.values()) == len(rows) - len(kept)
    for index, number in enumerate(kept):
        row, text = rows[number], found.text(index)
        sides = ("first", "second") if float(row["label"]) == 1 else ("second", "first")
        assert [text.chosen, text.rejected] == [row[side] for side in sides]


@settings(max_examples=100)
@given(
    st.lists(spoilt(ranked_rows, ["prompt", "answers"]), min_size=1, max_size=4),
    st.sampled_from(["best_worst", "all", "adjacent"]),
    st.sampled_from([0, 1.5]),
)
def test_ranked_rows_give_the_pairs_of_their_scores(path, byte_tokenizer, rows, pairs, min_gap):
    write(path, [json.dumps(row) for row in rows])
    found = read(path, byte_tokenizer, on_fault="drop", pairs=pairs, min_gap=min_gap, **RANKED)
    if isinstance(found, str):
        return
    assert len({example.row for example in found}) == len(found)
    for index, example in enumerate(found):
        row, text, margin = rows[example.row % len(rows)], found.text(index), found.margin(index)
        assert same(found.raw(index), row)
        values = [float(answer["score"]) for answer in row["answers"]]
        texts = [answer["text"] for answer in row["answers"]]
        gaps = {
            a - b
            for a, chosen in zip(values, texts, strict=True)
            for b, worse in zip(values, texts, strict=True)
            if (chosen, worse) == (text.chosen, text.rejected)
        }
        assert margin in gaps and margin > 0 and margin >= min_gap
        if pairs == "best_worst":
            assert margin == max(values) - min(values)


GOOD = '{"prompt": "q", "chosen": " a", "rejected": " b"}'
lines_of_anything = (
    st.sampled_from(
        [GOOD, GOOD, "", " ", "null", "3", "[1]", "{", '"a"', '{"chosen": 1, "chosen": 2}', f"{GOOD} {GOOD}"]
    )
    | values.map(json.dumps)
    | st.binary(max_size=12).map(lambda line: line.replace(b"\n", b" ").decode("latin-1"))
)


@settings(max_examples=100)
@given(st.lists(lines_of_anything, max_size=5))
def test_lines_that_are_no_rows_are_named(path, byte_tokenizer, further):
    # The first line is a row, since a file that begins with a bracket is a list.
    lines = [GOOD, *further]
    path.write_bytes("\n".join(lines).encode("latin-1"))
    found = read(path, byte_tokenizer)
    if isinstance(found, str):
        place = PLACE.search(found)
        assert place is not None, found
        number = int(place[2])
        assert lines[number - 1] not in (GOOD, "", " ")
        assert int(place[1]) == sum(bool(line.encode("latin-1").strip()) for line in lines[: number - 1])
    else:
        assert [found.raw(index) for index in range(len(found))] == [
            json.loads(line.encode("latin-1")) for line in lines if line.encode("latin-1").strip()
        ]
