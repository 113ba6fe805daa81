from __future__ import annotations

import hashlib
import json
import struct

import datasets
import pytest

from tokenpref.data import encode_text_answer, preference_dataset
from tokenpref.errors import ConfigError, DataError

ROW = {"prompt": "hello", "chosen": " the yes", "rejected": " no"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def ids_of(vocab, text: str) -> list[int]:
    return [vocab[token] for token in text.split()]


def test_explicit_row(tokenizer, vocab, write_jsonl):
    data = preference_dataset(tokenizer, write_jsonl([ROW]))
    pair = data[0]
    assert pair.chosen_ids == ids_of(vocab, "hello Ġthe Ġ yes") and pair.chosen_start == 1
    assert pair.rejected_ids == ids_of(vocab, "hello Ġ no") and pair.rejected_start == 1
    assert pair.chosen_offsets == [(0, 4), (4, 5), (5, 8)] and pair.rejected_offsets == [(0, 1), (1, 3)]
    assert not pair.chosen_has_eos and not pair.rejected_has_eos and pair.row == 0
    numbers = [4, 1, *pair.chosen_ids, 3, 1, *pair.rejected_ids]
    assert pair.key == hashlib.sha256(struct.pack(f"<{len(numbers)}q", *numbers)).hexdigest()
    assert data.fingerprint() == hashlib.sha256(bytes.fromhex(pair.key)).hexdigest()
    assert data.prompt_ids(0) == [vocab["hello"]]
    assert (data.text(0).prompt, data.text(0).chosen, data.text(0).rejected) == ("hello", " the yes", " no")
    with pytest.raises(IndexError):
        data[1]


def test_a_token_over_the_boundary_belongs_to_the_answer(tokenizer, vocab, write_jsonl):
    # "hel" + "lo" is the single token "hello"; "hel" + " no" ends the prompt after "he", "l".
    data = preference_dataset(
        tokenizer, write_jsonl([{"prompt": "yes hel", "chosen": "lo", "rejected": " no"}, ROW])
    )
    pair = data[0]
    assert pair.chosen_ids == ids_of(vocab, "yes Ġ hello") and pair.chosen_start == 2
    assert pair.chosen_offsets == [(0, 2)]  # its part in the answer's own text
    assert pair.rejected_ids == ids_of(vocab, "yes Ġ he l Ġ no") and pair.rejected_start == 4
    assert data.report.straddling_rows == 1
    assert data.prompt_ids(0) == ids_of(vocab, "yes Ġ he l")


def test_a_prompt_that_ends_with_a_space_straddles_too(tokenizer, vocab):
    encoded = encode_text_answer(tokenizer, "hello ", "the")
    assert encoded.ids == ids_of(vocab, "hello Ġthe") and encoded.start == 1
    assert encoded.straddles and encoded.spans == [(0, 3)]


def test_offsets_of_parts_of_a_character(tokenizer, write_jsonl):
    pair = preference_dataset(tokenizer, write_jsonl([{"prompt": "é", "chosen": "é😀", "rejected": "no"}]))[0]
    assert pair.chosen_start == 2 and pair.chosen_offsets == [(0, 1)] * 2 + [(1, 2)] * 4


@pytest.mark.parametrize(
    ("append_eos", "marks", "expected"),
    [
        ("auto", {}, (False, False)),
        ("auto", {"complete": True}, (True, True)),
        ("auto", {"complete": True, "rejected_complete": False}, (True, False)),
        ("auto", {"chosen_complete": True}, (True, False)),
        (True, {"complete": False}, (True, True)),
        (False, {"complete": True}, (False, False)),
    ],
)
def test_eos_of_text_rows(tokenizer, write_jsonl, append_eos, marks, expected):
    data = preference_dataset(tokenizer, write_jsonl([{**ROW, **marks}]), append_eos=append_eos)
    pair = data[0]
    assert (pair.chosen_has_eos, pair.rejected_has_eos) == expected
    assert (pair.chosen_ids[-1] == 1, pair.rejected_ids[-1] == 1) == expected
    assert data.report.answers_with_eos == sum(expected)
    if expected[0]:
        assert pair.chosen_offsets[-1] == (8, 8)


@pytest.mark.parametrize("append_eos", [True, False])
def test_no_second_eos(tokenizer, vocab, write_jsonl, append_eos):
    data = preference_dataset(tokenizer, write_jsonl([{**ROW, "rejected": " no</s>"}]), append_eos=append_eos)
    assert data[0].rejected_ids == [*ids_of(vocab, "hello Ġ no"), 1] and data[0].rejected_has_eos
    assert data[0].rejected_offsets[-1] == (7, 7)


@pytest.mark.parametrize("append_eos", [True, False])
@pytest.mark.parametrize(("end", "token"), [("</s>\n", 1), ("<|im_end|>", 4), ("<|im_end|> \n\n", 4)])
def test_the_end_of_a_turn_in_rendered_text_is_the_end(
    make_tokenizer_folder, vocab, write_jsonl, append_eos, end, token
):
    from tokenpref.data import tokenizer_json

    folder = make_tokenizer_folder()
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 4]}))
    rows = [{**ROW, "rejected": f" no{end}"}]
    data = preference_dataset(tokenizer_json(folder), write_jsonl(rows), append_eos=append_eos)
    assert data[0].rejected_ids == [*ids_of(vocab, "hello Ġ no"), token] and data[0].rejected_has_eos


@pytest.mark.parametrize("add_bos", ["auto", True, False])
@pytest.mark.parametrize("bos", [True, False])
def test_rendered_text_begins_with_one_bos(make_tokenizer_folder, vocab, write_jsonl, add_bos, bos):
    from tokenpref.data import tokenizer_json

    tokenizer = tokenizer_json(make_tokenizer_folder(bos=bos))
    rows = [{**ROW, "prompt": "<s>hello"}]
    data = preference_dataset(tokenizer, write_jsonl(rows), add_bos=add_bos, max_prompt_len=2)
    assert data[0].rejected_ids == [0, *ids_of(vocab, "hello Ġ no")] and data[0].rejected_start == 2
    assert data.prompt_ids(0) == [0, *ids_of(vocab, "hello")]
    assert data.text(0).prompt == "<s>hello" and data[0].rejected_offsets == [(0, 1), (1, 3)]
    # Cutting a prompt keeps the BOS that the text brought.
    long = preference_dataset(
        tokenizer, write_jsonl([{**ROW, "prompt": "<s>yes hello"}]), add_bos=add_bos, max_prompt_len=2
    )
    assert long[0].rejected_ids == data[0].rejected_ids


def test_hh_rows_end_with_eos(tokenizer, write_jsonl):
    start = "\n\nHuman: hello\n\nAssistant:"
    data = preference_dataset(tokenizer, write_jsonl([{"chosen": start + " yes", "rejected": start + " no"}]))
    assert data.report.layout == "hh" and data[0].chosen_has_eos and data[0].rejected_has_eos
    assert (
        data.text(0).prompt == start
        and tokenizer.decode(data[0].chosen_ids[data[0].chosen_start :]) == " yes"
    )


def test_implicit_rows(tokenizer, vocab, write_jsonl):
    data = preference_dataset(tokenizer, write_jsonl([{"chosen": "hello the", "rejected": "hello no"}]))
    assert data.report.layout == "implicit"
    assert data[0].chosen_ids == ids_of(vocab, "hello Ġthe") and data[0].chosen_start == 1


CHAT = {
    "prompt": [{"role": "user", "content": "hello"}],
    "chosen": [{"role": "assistant", "content": "yes the"}],
    "rejected": [{"role": "assistant", "content": "no"}],
}


def test_chat_template_rows(chat_tokenizer, vocab, write_jsonl):
    data = preference_dataset(chat_tokenizer, write_jsonl([CHAT]))
    pair = data[0]
    prompt = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert data.text(0).prompt == prompt
    assert (
        pair.chosen_ids[: pair.chosen_start]
        == data.prompt_ids(0)
        == chat_tokenizer.encode_with_offsets(prompt)[0]
    )
    # The newline that the template writes after the end of the turn is dropped.
    assert pair.chosen_ids[pair.chosen_start :] == ids_of(vocab, "yes Ġthe <|im_end|>")
    assert pair.chosen_offsets == [(0, 3), (3, 7), (7, 7)] and pair.chosen_has_eos
    assert data.report.layout == "conversational" and data.report.answers_with_eos == 2
    without = preference_dataset(chat_tokenizer, write_jsonl([CHAT]), append_eos=False)[0]
    assert without.chosen_ids == pair.chosen_ids[:-1] and not without.chosen_has_eos


def test_a_turn_that_ends_with_another_special_token_gets_no_eos(make_tokenizer_folder, write_jsonl):
    from tokenpref.data import tokenizer_json

    template = "{% for m in messages %}{{ m.content }}<|im_end|>\n{% endfor %}"
    tokenizer = tokenizer_json(make_tokenizer_folder(), chat_template=template)
    pair = preference_dataset(tokenizer, write_jsonl([CHAT]))[0]
    assert pair.chosen_ids[-1] == 4 and 1 not in pair.chosen_ids and pair.chosen_has_eos


def test_a_template_without_an_end_gets_eos(make_tokenizer_folder, write_jsonl, vocab):
    from tokenpref.data import tokenizer_json

    template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    tokenizer = tokenizer_json(make_tokenizer_folder(), chat_template=template)
    pair = preference_dataset(tokenizer, write_jsonl([CHAT]))[0]
    assert pair.rejected_ids[pair.rejected_start :] == [*ids_of(vocab, "no ;"), 1]
    assert pair.rejected_offsets == [(0, 2), (2, 2), (2, 2)]


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": "int"}}}]


def test_tools_reach_the_template_in_training_and_generation(make_tokenizer_folder, write_jsonl):
    from tokenpref.data import tokenizer_json

    template = "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    template += "{% for m in messages %}{{ m.content }};{% endfor %}"
    tokenizer = tokenizer_json(make_tokenizer_folder(), chat_template=template)
    rows = [{**CHAT, "tools": TOOLS}, {**CHAT, "tools": None}]
    data = preference_dataset(tokenizer, write_jsonl(rows))
    assert [data.text(i).prompt for i in (0, 1)] == ["[add]hello;", "hello;"]
    assert data.prompt_ids(0) == data[0].chosen_ids[: data[0].chosen_start]
    as_text = preference_dataset(tokenizer, write_jsonl([{**CHAT, "tools": json.dumps(TOOLS)}]))
    assert as_text.fingerprint() == preference_dataset(tokenizer, write_jsonl(rows[:1])).fingerprint()


def test_a_tokenizer_that_takes_no_tools_refuses_them(tiktoken_file, write_jsonl):
    from torchtune.models.llama3 import llama3_tokenizer

    with pytest.raises(DataError, match="has tools, but TorchtuneTokenizer cannot put tools into a prompt"):
        preference_dataset(llama3_tokenizer(tiktoken_file), write_jsonl([{**CHAT, "tools": TOOLS}]))


def test_torchtune_conversations(tiktoken_file, write_jsonl):
    from torchtune.models.llama3 import llama3_tokenizer

    pair = preference_dataset(llama3_tokenizer(tiktoken_file), write_jsonl([CHAT]))[0]
    assert pair.rejected_ids[pair.rejected_start :] == [*b"no", 128009] and pair.rejected_offsets == [
        (0, 1),
        (1, 2),
        (2, 2),
    ]
    assert pair.chosen_ids[: pair.chosen_start] == pair.rejected_ids[: pair.rejected_start]


def test_conversations_need_a_template(tokenizer, write_jsonl):
    with pytest.raises(ConfigError, match=r"holds conversations, but .*set tokenizer\.chat_template"):
        preference_dataset(tokenizer, write_jsonl([CHAT]))


def test_a_template_that_refuses_or_changes_the_prompt(make_tokenizer_folder, write_jsonl):
    from tokenpref.data import tokenizer_json

    refusing = tokenizer_json(make_tokenizer_folder(), chat_template="{{ raise_exception('no user') }}")
    with pytest.raises(DataError, match="the chat template refuses it: no user"):
        preference_dataset(refusing, write_jsonl([CHAT]))
    changing = tokenizer_json(make_tokenizer_folder(), chat_template="{{ messages | length }}")
    with pytest.raises(DataError, match="renders the prompt differently when an answer follows"):
        preference_dataset(changing, write_jsonl([CHAT]))


def test_cutting_is_counted(make_tokenizer_folder, vocab, write_jsonl):
    from tokenpref.data import tokenizer_json

    tokenizer = tokenizer_json(make_tokenizer_folder(bos=True))
    long = {"prompt": "no the yes hello", "chosen": " the the the", "rejected": " no"}
    data = preference_dataset(
        tokenizer, write_jsonl([long, ROW]), max_seq_len=5, max_prompt_len=3, append_eos=True
    )
    pair = data[0]
    # Prompt: <s> no Ġthe Ġ yes Ġ hello, 7 tokens; <s> and the last two stay. Two tokens are left for the answer.
    assert pair.chosen_ids == [0, *ids_of(vocab, "Ġ hello Ġthe Ġthe")] and pair.chosen_start == 3
    assert not pair.chosen_has_eos and pair.chosen_offsets == [(0, 4), (4, 8)]
    # "Ġ no </s>" does not fit into two tokens either: its EOS goes first.
    assert pair.rejected_ids == [0, *ids_of(vocab, "Ġ hello Ġ no")] and not pair.rejected_has_eos
    # Row 1: prompt <s> hello; chosen "Ġthe Ġ yes </s>" loses one of 4 tokens, rejected "Ġ no </s>" fits exactly.
    assert data[1].chosen_ids == [0, *ids_of(vocab, "hello Ġthe Ġ yes")] and not data[1].chosen_has_eos
    assert data[1].rejected_ids == [0, *ids_of(vocab, "hello Ġ no"), 1] and data[1].rejected_has_eos
    report = data.report
    assert (report.prompts_cut, report.answers_cut, report.answers_with_eos) == (1, 3, 1)
    assert (
        report.prompt_tokens == (2.5, 3)
        and report.chosen_tokens == (2.5, 3)
        and report.rejected_tokens == (2.5, 3)
    )
    assert "cut: 1 prompts, 3 answers" in report.summary()
    assert data.prompt_ids(0) == [0, *ids_of(vocab, "Ġ hello")]


def test_sides_that_become_equal_are_counted(tokenizer, write_jsonl):
    row = {"prompt": "hello", "chosen": " the yes", "rejected": " the no"}
    report = preference_dataset(tokenizer, write_jsonl([row, ROW]), max_seq_len=2).report
    assert report.equal_after_cut == 1 and "1 pairs have equal sides since" in report.summary()


def test_truncation_error_and_drop(tokenizer, write_jsonl):
    path = write_jsonl([{**ROW, "prompt": "hello the the"}, {**ROW, "chosen": " yes"}])
    with pytest.raises(
        DataError, match=r"row 0 \(line 1\), column 'chosen': is too long \(prompt 3 tokens, answer 3"
    ):
        preference_dataset(tokenizer, path, max_seq_len=4, truncation="error")
    data = preference_dataset(tokenizer, path, max_seq_len=4, truncation="drop")
    assert len(data) == 1 and data[0].row == 1 and data.report.dropped == {"too long": 1}
    assert data.raw(0)["chosen"] == " yes" and "Left out 1 rows: 1 too long." in data.report.summary()
    with pytest.raises(DataError, match="every row was left out"):
        preference_dataset(tokenizer, path, max_seq_len=2, truncation="drop")


def test_a_prompt_without_room_is_a_fault(tokenizer, write_jsonl):
    with pytest.raises(
        DataError, match=r"row 0 .*no room for a single answer token \(prompt 3 tokens.*set max_prompt_len"
    ):
        preference_dataset(tokenizer, write_jsonl([{**ROW, "prompt": "hello the the"}]), max_seq_len=3)


def test_faults_are_counted_and_named_once(tokenizer, write_jsonl):
    bad = [ROW] + [{**ROW, "chosen": None}] * 7 + [{**ROW, "rejected": ""}]
    path = write_jsonl(bad)
    with pytest.raises(DataError) as caught:
        preference_dataset(tokenizer, path)
    message = str(caught.value)
    assert f"{path}, row 1 (line 2), column 'chosen': has no value" in message
    assert (
        "[no value: 7 rows in all: 1, 2, 3, 4, 5, ...]" in message
        and "[other faults: 1 empty answer]" in message
    )
    data = preference_dataset(tokenizer, path, on_fault="drop")
    assert len(data) == 1 and data.report.dropped == {"no value": 7, "empty answer": 1}


def test_an_answer_needs_something_before_it(tokenizer, write_jsonl):
    path = write_jsonl([{**ROW, "prompt": ""}])
    with pytest.raises(DataError, match=r"the prompt is empty and there is no BOS.*add_bos: true"):
        preference_dataset(tokenizer, path)
    pair = preference_dataset(tokenizer, path, add_bos=True)[0]
    assert pair.chosen_ids[0] == 0 and pair.chosen_start == 1


def test_swap_and_max_rows(tokenizer, write_jsonl):
    path = write_jsonl([{**ROW, "chosen_complete": True, "gold": [1.5]}, ROW])
    data, swapped = (preference_dataset(tokenizer, path, swap=swap, max_rows=1) for swap in (False, True))
    a, b = data[0], swapped[0]
    assert len(data) == 1
    assert (a.chosen_ids, a.chosen_offsets, a.chosen_has_eos) == (
        b.rejected_ids,
        b.rejected_offsets,
        b.rejected_has_eos,
    )
    assert (a.rejected_ids, a.rejected_start) == (b.chosen_ids, b.chosen_start) and a.key != b.key
    assert data.text(0).chosen == swapped.text(0).rejected and swapped.report.swapped
    assert (
        "gold" in data.columns
        and swapped.raw(0)["gold"] == [1.5]
        and swapped.raw(0)["chosen"] == ROW["chosen"]
    )


def test_mapped_columns_and_sharegpt(chat_tokenizer, write_jsonl):
    turns = [{"from": "human", "value": "hello"}]
    row = {"win": [*turns, {"from": "gpt", "value": "yes"}], "lose": [*turns, {"from": "gpt", "value": "no"}]}
    data = preference_dataset(
        chat_tokenizer, write_jsonl([row]), column_map={"chosen": "win", "rejected": "lose"}
    )
    assert data.report.layout == "conversational" and data.text(0).rejected == "no"
    with pytest.raises(DataError, match="no column 'won' for chosen; its columns are win, lose"):
        preference_dataset(chat_tokenizer, write_jsonl([row]), column_map={"chosen": "won"})


def test_arguments_are_checked_together(tokenizer):
    with pytest.raises(ConfigError) as caught:
        preference_dataset(
            tokenizer, "x.jsonl", append_eos="yes", max_seq_len=1, truncation="cut", max_rows=0
        )
    assert len(caught.value.faults) == 4 and "append_eos must be auto, true or false, got 'yes'" in str(
        caught.value
    )
    with pytest.raises(ConfigError, match=r"max_prompt_len \(8\) must be below max_seq_len \(8\)"):
        preference_dataset(tokenizer, "x.jsonl", max_seq_len=8, max_prompt_len=8)


@pytest.mark.parametrize("on_fault", ["error", "drop"])
def test_a_tokenizer_without_bos_is_no_fault_of_a_row(make_tokenizer_folder, write_jsonl, on_fault):
    from tokenpref.data import tokenizer_json

    tokenizer = tokenizer_json(make_tokenizer_folder(config={"eos_token": "</s>"}))
    with pytest.raises(ConfigError, match="^add_bos: true, but the tokenizer has no BOS token"):
        preference_dataset(tokenizer, write_jsonl([ROW]), add_bos=True, on_fault=on_fault)


def test_a_number_in_one_row_changes_no_other(tokenizer, write_jsonl):
    # Every text beside it would be JSON, quotes included, and the number text, in a file of more than 10 MB.
    rows = [{**ROW, "note": "x" * 4000} for _ in range(3000)]
    rows[-1] = {**ROW, "chosen": 3}
    data = preference_dataset(tokenizer, write_jsonl(rows), on_fault="drop")
    assert len(data) == 2999 and data.report.dropped == {"wrong type": 1}
    assert {data.text(index).chosen for index in (0, 1500, 2998)} == {" the yes"}
