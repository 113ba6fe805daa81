"""Messages in the shapes in which people keep them, and what stands beside the prompt."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from tokenpref.data import preference_dataset, tokenizer_json
from tokenpref.errors import DataError

USER = {"role": "user", "content": "hello"}
# Writes tools, calls and every message, so that a lost part shows in the prompt.
TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}[{{ c | tojson }}]{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
PLAIN = "<user>hello<|im_end|><assistant>"


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


ROW = {"prompt": [USER], "chosen": said("yes"), "rejected": said("no")}
TEXT = {"prompt": "hello", "chosen": "yes", "rejected": "no"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def chat(make_tokenizer_folder):
    folder = make_tokenizer_folder(config={"eos_token": "<|im_end|>", "pad_token": "<pad>"})
    return tokenizer_json(folder, chat_template=TEMPLATE)


def prompt_of(chat, path: str, **settings: Any) -> str:
    data = preference_dataset(chat, path, **settings)
    assert (data.text(0).chosen, data.text(0).rejected) == ("yes", "no")
    assert data.report.layout == "conversational"
    return data.text(0).prompt


def write_csv(path: Path, row: dict[str, str]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(row)
    return str(path)


SHAPES = {
    "lists": ROW,
    "one message": {"prompt": USER, "chosen": said("yes")[0], "rejected": said("no")[0]},
    "sharegpt": {
        "prompt": [{"from": "human", "value": "hello"}],
        "chosen": {"from": "gpt", "value": "yes"},
        "rejected": {"from": "gpt", "value": "no"},
    },
    "JSON text": {key: json.dumps(value) for key, value in ROW.items()},
    "JSON text of one message": {key: json.dumps(value[0]) for key, value in ROW.items()},
    "structs of lists": {
        "prompt": {"role": ["user"], "content": ["hello"]},
        "chosen": {"role": ["assistant"], "content": ["yes"]},
        "rejected": {"content": ["no"], "role": ["assistant"]},
    },
    "a list of texts beside messages": {"prompt": [USER], "chosen": "yes", "rejected": said("no")[0]},
    "JSON text of whole conversations": {
        side: json.dumps([USER, *said(text)]) for side, text in (("chosen", "yes"), ("rejected", "no"))
    },
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_messages_is_read(shape, chat, write_jsonl):
    assert prompt_of(chat, write_jsonl([SHAPES[shape]])) == PLAIN


def test_json_text_in_csv(chat, tmp_path):
    assert prompt_of(chat, write_csv(tmp_path / "rows.csv", SHAPES["JSON text"])) == PLAIN


@pytest.mark.parametrize(
    "text",
    [
        str(said("yes")),
        "[{'content': 'yes', 'role': 'assistant'}]",
        '[{"role": "assistant", "content": "yes"',
        "[{'from': 'gpt', 'value': 'yes'}]",
        "[{'content': '" + "yes " * 100 + "', 'role': 'assistant'}\n {'content': 'no', 'role': 'user'}]",
        "array([{'content': 'yes', 'role': 'assistant'}], dtype=object)",
        "{'role': 'assistant', 'content': 'yes'}",
    ],
)
@pytest.mark.parametrize("declared", ["auto", "explicit"])
def test_messages_as_other_text_are_refused(text, declared, chat, write_jsonl):
    with pytest.raises(
        DataError, match="column 'chosen': is text that begins like a list of messages and is not JSON"
    ):
        preference_dataset(chat, write_jsonl([{**TEXT, "chosen": text}]), format=declared)


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
def test_json_text_of_messages_among_rows_of_text_is_never_trained_on(field, tokenizer, write_jsonl):
    path = write_jsonl([TEXT, {**TEXT, field: json.dumps(said("hello"))}])
    with pytest.raises(DataError, match=rf"row 1 \(line 2\), column '{field}': is JSON text of messages"):
        preference_dataset(tokenizer, path)


@pytest.mark.parametrize(
    "text", ["[]", "[1, 2]", '[{"name": "x"}]', '{"role": 1}', "[{ half", '{"content": "x"}']
)
def test_other_json_is_text(text, tokenizer, write_jsonl):
    data = preference_dataset(tokenizer, write_jsonl([{**TEXT, "chosen": text}]))
    assert data.text(0).chosen == text and data.report.layout == "explicit"


@pytest.mark.parametrize(
    ("more", "before"),
    [
        ({"system": "Be brief."}, "<system>Be brief.<|im_end|>"),
        ({"system": ""}, ""),
        ({"system": None}, ""),
        (
            {"history": [["one", "two"], ["three", "four"]]},
            "<user>one<|im_end|><assistant>two<|im_end|><user>three",
        ),
        (
            {"history": [{"role": "user", "content": "one"}, *said("two")]},
            "<user>one<|im_end|><assistant>two",
        ),
        ({"history": '[["one", "two"]]'}, "<user>one<|im_end|><assistant>two"),
        ({"history": [], "system": "Be brief."}, "<system>Be brief.<|im_end|>"),
        ({"history": [["one", "two"]], "system": "Be brief."}, "<system>Be brief.<|im_end|><user>one"),
        ({"tools": [{"name": "add"}]}, '<tools>[{"name": "add"}]</tools>'),
        ({"tools": '[{"name": "add"}]'}, '<tools>[{"name": "add"}]</tools>'),
        ({"tools": ['{"name": "add"}']}, '<tools>[{"name": "add"}]</tools>'),
        ({"tools": []}, ""),
        ({"tools": ""}, ""),
        ({"tools": "null"}, ""),
    ],
)
@pytest.mark.parametrize("row", [ROW, TEXT])
def test_what_stands_beside_the_prompt_is_used(row, more, before, chat, write_jsonl):
    prompt = prompt_of(chat, write_jsonl([{**row, **more}]))
    assert prompt.startswith(before) and prompt.endswith(PLAIN)
    if not before:
        assert prompt == PLAIN


def test_an_input_stands_below_its_instruction(chat, tokenizer, write_jsonl):
    row = {"instruction": "Add.", "input": "2+2", "chosen": "4", "rejected": "5"}
    path = write_jsonl([row, {**row, "input": ""}, {**row, "input": None}])
    data = preference_dataset(tokenizer, path, column_map={"prompt": "instruction"})
    assert [data.text(index).prompt for index in range(3)] == ["Add.\n2+2", "Add.", "Add."]
    messages = preference_dataset(chat, path, column_map={"prompt": "instruction"}, as_messages=True)
    assert messages.text(0).prompt == "<user>Add.\n2+2<|im_end|><assistant>"
    left_out = preference_dataset(tokenizer, path, column_map={"prompt": "instruction", "input": None})
    assert left_out.text(0).prompt == "Add." and left_out.report.unused_columns == ()


def test_two_system_messages_are_refused(chat, write_jsonl):
    begun = [{"role": "system", "content": "Be brief."}, USER]
    same = write_jsonl([{**ROW, "prompt": begun, "system": "Be brief."}])
    assert prompt_of(chat, same) == "<system>Be brief.<|im_end|>" + PLAIN
    other = write_jsonl([{**ROW, "prompt": begun, "system": "Be long."}], "b.jsonl")
    with pytest.raises(
        DataError, match=r"column 'system': holds a system prompt, .*column_map: \{system: null\}"
    ):
        preference_dataset(chat, other)
    assert prompt_of(chat, other, column_map={"system": None}).startswith("<system>Be brief.")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"system": 3}, "column 'system': is of type int"),
        ({"system": "\ud83d"}, "column 'system': contains half of a surrogate pair"),
        ({"history": [["one"]]}, "column 'history': turn 0 must be a message, or a list of what the user"),
        ({"history": [["one", None]]}, "column 'history': has no value"),
        ({"history": "[["}, "column 'history': is text, but not a JSON list"),
        ({"history": 3}, "column 'history': turn 0"),
        ({"tools": "add"}, "column 'tools': holds text that is not JSON"),
        ({"tools": [3]}, "column 'tools': must be a list of JSON schemas"),
        ({"tools": {"name": "add"}}, "column 'tools': must be a list of JSON schemas"),
    ],
)
def test_what_cannot_be_used_beside_the_prompt_is_a_fault(more, message, chat, write_jsonl):
    row = {**ROW, "system": "x", "history": [], "tools": []}
    with pytest.raises(DataError, match=message):
        preference_dataset(chat, write_jsonl([row, {**row, **more}]))


def test_the_report_names_columns_that_are_not_used(tokenizer, chat, write_jsonl):
    more = {
        "system": "x",
        "history": [],
        "chosen_reasoning": "y",
        "prompt_id": 1,
        "image_url": "z",
        "images": [],
        "n": 1,
    }
    path = write_jsonl([{**TEXT, **more}])
    report = preference_dataset(tokenizer, path, format="explicit").report
    assert report.unused_columns == ("system", "history", "chosen_reasoning", "images")
    assert (
        "Not used, though the names look like parts of the prompt or the answers: 'system',"
        in report.summary()
    )
    assert preference_dataset(chat, path).report.unused_columns == ("chosen_reasoning", "images")
    assert preference_dataset(tokenizer, path, as_messages=False).report.layout == "explicit"
    silenced = preference_dataset(chat, path, column_map={"system": None, "history": None})
    assert silenced.report.unused_columns == ("chosen_reasoning", "images")
    nothing = preference_dataset(tokenizer, write_jsonl([TEXT], "b.jsonl")).report
    assert nothing.unused_columns == () and "Not used" not in nothing.summary()


def test_a_column_of_that_name_that_holds_something_else_is_reported(chat, write_jsonl):
    report = preference_dataset(chat, write_jsonl([{**ROW, "history": "a chapter", "system": 4}])).report
    assert report.unused_columns == ("history", "system")


@pytest.mark.parametrize("column", ["question", "instruction", "conversations", "context"])
def test_a_prompt_under_another_name_is_not_lost(column, chat, write_jsonl):
    row = {column: "hello", "chosen": "so yes", "rejected": "so no"}
    with pytest.raises(DataError, match=rf"{column}"):
        preference_dataset(chat, write_jsonl([row]))
    assert preference_dataset(chat, write_jsonl([row]), format="implicit").text(0).prompt == "so"
    named = preference_dataset(chat, write_jsonl([row]), column_map={"prompt": column})
    assert named.text(0).prompt == "hello"


def test_conversations_of_which_one_goes_on_are_no_pair(chat, write_jsonl):
    longer = [USER, *said("yes"), {"role": "user", "content": "sure?"}, *said("no")]
    with pytest.raises(
        DataError, match=r"column 'rejected': goes on after the last message of chosen \(2 and 4"
    ):
        preference_dataset(chat, write_jsonl([{"chosen": [USER, *said("yes")], "rejected": longer}]))


def test_nulls_that_parquet_adds_are_dropped(chat, tmp_path, write_jsonl):
    def row(arguments: dict[str, Any]) -> dict[str, Any]:
        call = {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
        }
        tool = {"name": "f", "parameters": {"properties": dict.fromkeys(arguments, {"enum": ["x", None]})}}
        return {**ROW, "prompt": [USER, call, {"role": "tool", "content": "4"}], "tools": [tool]}

    rows = [row({"a": 2}), row({"city": "Oslo"})]
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    packed = preference_dataset(chat, str(path), max_seq_len=None)
    plain = preference_dataset(chat, write_jsonl(rows), max_seq_len=None)
    assert packed.fingerprint() == plain.fingerprint()
    assert '{"a": 2}' in packed.text(0).prompt and "city" not in packed.text(0).prompt
    assert '["x", null]' in packed.text(0).prompt  # a null in a list was written by somebody


def test_text_becomes_messages_where_that_is_asked_for(chat, tokenizer, write_jsonl):
    path = write_jsonl([TEXT])
    assert prompt_of(chat, path, as_messages=True) == PLAIN
    with pytest.raises(DataError, match="looks like explicit .*as_messages: true to make messages of text"):
        preference_dataset(chat, path, format="conversational")
    assert preference_dataset(chat, path).report.layout == "explicit"


def test_a_text_prompt_that_the_messages_do_not_hold_is_not_lost(chat, write_jsonl):
    whole = {side: [USER, *said(text)] for side, text in (("chosen", "yes"), ("rejected", "no"))}
    assert prompt_of(chat, write_jsonl([{"prompt": " hello\n", **whole}])) == PLAIN
    other = write_jsonl([{"prompt": "Answer in French.", **whole}], "b.jsonl")
    with pytest.raises(
        DataError, match="column 'prompt': is in none of the messages that chosen and rejected share"
    ):
        preference_dataset(chat, other)
    assert prompt_of(chat, other, column_map={"prompt": None}) == PLAIN


def test_history_comes_after_the_system_message(chat, write_jsonl):
    begun = [{"role": "system", "content": "Be brief."}, USER]
    prompt = prompt_of(chat, write_jsonl([{**ROW, "prompt": begun, "history": [["one", "two"]]}]))
    assert prompt == "<system>Be brief.<|im_end|><user>one<|im_end|><assistant>two<|im_end|>" + PLAIN


def test_a_prompt_alone_may_be_json_text(chat, write_jsonl):
    assert prompt_of(chat, write_jsonl([{**TEXT, "prompt": json.dumps([USER])}])) == PLAIN


def test_nested_columns_of_every_format(chat, tokenizer, write_jsonl):
    row = {"info": {"q": "hello", "sys": "Be brief."}, "answers": [{"text": "yes"}, {"text": "no"}]}
    paths = {"prompt": "info.q", "chosen": "answers[0].text", "rejected": "answers[1].text"}
    path = write_jsonl([row])
    assert preference_dataset(tokenizer, path, column_map=paths).text(0).prompt == "hello"
    with_system = prompt_of(chat, path, column_map={**paths, "system": "info.sys"})
    assert with_system == "<system>Be brief.<|im_end|>" + PLAIN
