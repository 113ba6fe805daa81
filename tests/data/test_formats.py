from __future__ import annotations

import pytest

from tokenpref.data.boundary import shared_prefix
from tokenpref.data.formats import detect_format, mapped_columns, parse_row
from tokenpref.data.pairs import PairRow, RowFault
from tokenpref.errors import DataError

PLAIN = {"chosen": "chosen", "rejected": "rejected"}
WITH_PROMPT = {"prompt": "prompt", **PLAIN}
USER = {"role": "user", "content": "q"}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: hi\nA: yes", "Q: hi\nA: no", "Q: hi\nA:"),  # the space belongs to the answers
        ("Q\nyes", "Q\nno", "Q\n"),  # the newline to the prompt
        ("it is warm", "it is warmer", "it is"),  # not inside a word
        ("about 3.14", "about 3.15", "about"),  # nor inside a number
        ("see e\u0301", "see e", "see"),  # nor between a letter and its accent
        ("A:😀", "A:😢", "A:"),
        ("今天很好", "今天很糟", "今天很"),  # no spaces to cut at
        ("yes", "no", ""),
        ("yes it", "yesterday", ""),
        ("the end", "the end of it", "the end"),
    ],
)
def test_shared_prefix(chosen, rejected, prompt):
    assert chosen[: shared_prefix(chosen, rejected)] == prompt
    assert shared_prefix(chosen, rejected) == shared_prefix(rejected, chosen)


@pytest.mark.parametrize(
    ("row", "layout"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "explicit"),
        ({"chosen": "q a", "rejected": "q b"}, "implicit"),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, "hh"),
        ({"chosen": [USER, assistant("a")], "rejected": [USER, assistant("b")]}, "conversational"),
        ({"prompt": [USER], "chosen": "a", "rejected": "b"}, "conversational"),
    ],
)
def test_detection_and_a_wrong_declaration(row, layout):
    columns = mapped_columns(list(row), None, "f")
    assert detect_format(row, columns, "auto", "f") == layout
    assert detect_format(row, columns, layout, "f") == layout
    wrong = "hh" if layout != "hh" else "explicit"
    with pytest.raises(
        DataError, match=f"format: {wrong} was set, but f looks like {layout} .*set format: {layout}"
    ):
        detect_format(row, columns, wrong, "f")
    with pytest.raises(DataError, match="format must be one of auto, explicit"):
        detect_format(row, columns, "alpaca", "f")


def test_column_map():
    columns = mapped_columns(
        ["question", "win", "lose", "x"], {"prompt": "question", "chosen": "win", "rejected": "lose"}, "f"
    )
    assert columns == {"prompt": "question", "chosen": "win", "rejected": "lose"}
    with pytest.raises(DataError, match="no column 'won' for chosen; its columns are win, lose"):
        mapped_columns(["win", "lose"], {"chosen": "won"}, "f")
    with pytest.raises(
        DataError, match=r"no column 'chosen'; its columns are win, lose\. .*column_map: \{chosen: <column>\}"
    ):
        mapped_columns(["win", "lose"], None, "f")
    with pytest.raises(DataError, match="column_map: 'answer' is no field"):
        mapped_columns(["win", "lose"], {"answer": "win"}, "f")


def test_explicit_and_marks():
    columns = mapped_columns([*WITH_PROMPT, "complete", "rejected_complete"], None, "f")
    row = {"prompt": "q", "chosen": " a", "rejected": " b", "complete": True, "rejected_complete": False}
    assert parse_row(row, columns, "explicit") == PairRow("q", " a", " b", True, False)
    as_text = {**row, "complete": "True", "rejected_complete": ""}  # from a CSV file
    assert parse_row(as_text, columns, "explicit") == PairRow("q", " a", " b", True, True)
    with pytest.raises(RowFault, match="must be true or false, found 'yes'"):
        parse_row({**row, "complete": "yes"}, columns, "explicit")


def test_hh():
    start = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    pair = parse_row({"chosen": start + " yes", "rejected": start + " no"}, PLAIN, "hh")
    assert pair == PairRow(start, " yes", " no")
    with pytest.raises(RowFault, match="does not begin with the conversation of chosen"):
        parse_row({"chosen": start + " yes", "rejected": "\n\nHuman: z\n\nAssistant: no"}, PLAIN, "hh")
    with pytest.raises(RowFault, match="no '\\\\n\\\\nAssistant:'"):
        parse_row({"chosen": "x", "rejected": "y"}, PLAIN, "hh")
    with pytest.raises(RowFault, match="further turns"):
        parse_row({"chosen": start + " yes", "rejected": start + " no\n\nHuman: d"}, PLAIN, "hh")


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [USER, assistant("a")], "rejected": [USER, assistant("b")]},
        {"prompt": [USER], "chosen": [assistant("a")], "rejected": [assistant("b")]},
        {"prompt": [USER], "chosen": [USER, assistant("a")], "rejected": [USER, assistant("b")]},
        {"prompt": "q", "chosen": [USER, assistant("a")], "rejected": [USER, assistant("b")]},
        {"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]},
        {"prompt": [USER], "chosen": "a", "rejected": "b"},
        {
            "chosen": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
            "rejected": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "b"}],
        },
    ],
)
def test_conversational_layouts(row):
    columns = mapped_columns(list(row), None, "f")
    assert parse_row(row, columns, "conversational") == PairRow([USER], assistant("a"), assistant("b"))


@pytest.mark.parametrize(
    ("chosen", "rejected", "kind", "message"),
    [
        ([USER, assistant("a")], [USER, assistant("a")], "equal answers", "is equal to chosen"),
        ([USER, assistant("a")], [USER, assistant(" ")], "empty answer", "nothing but white space"),
        (
            [USER, assistant("a")],
            [{"role": "user", "content": "z"}, assistant("b")],
            "no shared beginning",
            "no first message",
        ),
        ([USER, assistant("a")], [USER, assistant("b"), USER], "several turns", "found 2 message"),
        (
            [USER, assistant("a")],
            [USER, assistant("a"), USER, assistant("b")],
            "different conversations",
            "goes on after the last message of chosen",
        ),
        ([USER, assistant("a")], [USER, {"content": "b"}], "wrong type", "message 1 has the keys"),
        ([USER, assistant("a")], None, "no value", "has no value"),
    ],
)
def test_conversational_faults(chosen, rejected, kind, message):
    with pytest.raises(RowFault, match=message) as caught:
        parse_row({"chosen": chosen, "rejected": rejected}, PLAIN, "conversational")
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    ("change", "column", "message"),
    [
        ({"prompt": None}, "prompt", "has no value"),
        ({"chosen": 3}, "chosen", "is of type int"),
        ({"rejected": " \n"}, "rejected", "nothing but white space"),
        ({"rejected": "a"}, "rejected", "is equal to chosen"),
        ({"chosen": "\ud83d"}, "chosen", "half of a surrogate pair at character 0"),
    ],
)
def test_text_faults(change, column, message):
    with pytest.raises(RowFault, match=message) as caught:
        parse_row({"prompt": "q", "chosen": "a", "rejected": "b", **change}, WITH_PROMPT, "explicit")
    assert caught.value.column == column
