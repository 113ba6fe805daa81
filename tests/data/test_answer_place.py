"""Where answers stand in what chat templates write: by structure, whatever else the text occurs in."""

from __future__ import annotations

import pytest

from tokenpref.data import encode_chat_answer, preference_dataset, tokenizer_json
from tokenpref.errors import DataError

# A thinking block before each answer, its text from a field or taken out of the content, as Qwen3's template does.
THINKING = (
    "{% for m in messages %}{% set text = m.content %}{% set thought = m.reasoning_content or '' %}"
    "{% if m.role == 'assistant' and '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}{{ '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}"
    "{{ text + '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CALLS = (
    "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def around(content: str) -> str:
    """A template that writes ``content``, an expression of the message ``m``, into each turn."""
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}: {{ " + content + " }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    )


@pytest.fixture
def encode(make_tokenizer_folder):
    """The prompt, the answer's tokens as text, its own text, and the part of the answer's tokens that its spans cover."""
    tokenizers = {}

    def encoded(template, answer, prompt="hi", append_eos=True, tools=None):
        if template not in tokenizers:
            tokenizers[template] = tokenizer_json(
                make_tokenizer_folder(config={"eos_token": "<|im_end|>"}), chat_template=template
            )
        tokenizer = tokenizers[template]
        message = {"role": "assistant", **(answer if isinstance(answer, dict) else {"content": answer})}
        side = encode_chat_answer(
            tokenizer, [{"role": "user", "content": prompt}], message, append_eos=append_eos, tools=tools
        )
        ids = side.ids[side.start :]
        covered = [i for i, (start, end) in zip(ids, side.spans, strict=True) if end > start]
        assert [side.text[start:end] for start, end in side.spans if end > start] == [
            tokenizer.decode([i]) for i in covered
        ]
        return tokenizer.decode(ids), side.text, tokenizer.decode(covered), side.has_eos

    return encoded


BLOCK = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    "answer", ["hi", "<", "think", "\n", "n", "no\n\nno", "hi ", " hi", "71834026195540386217", "9"]
)
@pytest.mark.parametrize("append_eos", [True, False])
def test_an_empty_thinking_block_comes_before_the_text(encode, answer, append_eos):
    answer = answer if answer.strip() else f"{answer}a{answer}"
    assert encode(THINKING, answer, append_eos=append_eos) == (BLOCK + answer, answer, answer, append_eos)


@pytest.mark.parametrize("append_eos", [True, False])
def test_an_answer_that_occurs_in_its_reasoning_and_in_the_prompt(encode, append_eos):
    message = {"content": "no", "reasoning_content": "no or yes? no"}
    tokens, text, covered, _ = encode(THINKING, message, prompt="no? no", append_eos=append_eos)
    assert tokens == "<think>\nno or yes? no\n</think>\n\nno"
    assert (text, covered) == ("no", "no")


@pytest.mark.parametrize("answer", ["assistant", "assistant: ", ":", "user: assistant", "aa", "a a a"])
@pytest.mark.parametrize("template", [around("m.content"), around("m.content + m.content[:0]")])
def test_an_answer_that_occurs_in_headers(encode, template, answer):
    assert encode(template, answer, append_eos=False) == (answer, answer, answer, False)
    assert encode(template, answer) == (answer, answer, answer, True)


@pytest.mark.parametrize(
    ("content", "answer", "text"),
    [
        ("m.content | trim", "  hi\n", "hi"),
        ("m.content.lstrip()", "  hi\n", "hi\n"),
        ("m.content.rstrip()", "  hi\n", "  hi"),
        ("m.content | upper", "hi", "HI"),
        ("'<hi>' + m.content | upper", "hi", "HI"),
        ("m.content | replace('\n', ' ')", "a\nb", "a b"),
        ("m.content | tojson", 'a "b"', 'a \\"b\\"'),
        ("m.content | tojson(ensure_ascii=true)", "é", "\\u00e9"),
        ("'hi, ' + m.content + ', hi'", "hi", "hi"),
        ("m.content.split('</think>')[-1]", "<think>hi</think>hi", "hi"),
        ("'<t>' + m.content.split('</think>')[-1]", "<think>so</think>hi", "<t>hi"),
    ],
)
def test_text_that_the_template_changes_is_found_as_it_is_written(encode, content, answer, text):
    tokens, found, covered, _ = encode(around(content), answer, append_eos=False)
    assert (found, covered) == (text, text)
    assert tokens.endswith(text) and not tokens.endswith(text + "hi")
    assert encode(around(content), answer)[1:] == (text, text, True)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("<think>\nhi\n</think>\n\nhi", "<think>\nhi\n</think>\n\nhi"),
        ("<think>hi</think>hi", "<think>\nhi\n</think>\n\nhi"),
    ],
)
@pytest.mark.parametrize("append_eos", [True, False])
def test_thoughts_within_the_text(encode, answer, text, append_eos):
    assert encode(THINKING, answer, append_eos=append_eos) == (text, text, text, append_eos)


def test_the_frame_of_another_answer_misleads_nothing(encode):
    wanted = {
        "yes": (BLOCK + "yes", "yes"),
        "<think></think>no": (BLOCK + "no", BLOCK + "no"),
        "no": (BLOCK + "no", "no"),
    }
    for answer in [*wanted, *reversed(wanted)]:
        assert encode(THINKING, answer)[:2] == wanted[answer]
    assert (
        encode(THINKING, {"content": "yes", "reasoning_content": "yes"})[0] == "<think>\nyes\n</think>\n\nyes"
    )


def test_a_text_that_is_not_written_whole_cannot_end_an_answer(encode):
    template = around("m.content[:2]")
    assert encode(template, "hello") == ("he", "he", "he", True)
    with pytest.raises(ValueError, match="does not show where that ends: it writes 'he<|im_end|>"):
        encode(template, "hello", append_eos=False)


ADD = {"function": {"name": "add", "arguments": {"a": 2}}}
WRITTEN = '<call>{"name": "add", "arguments": {"a": 2}}</call>'


@pytest.mark.parametrize("append_eos", [True, False])
def test_calls_belong_to_the_answer(encode, append_eos):
    assert encode(CALLS, {"content": "", "tool_calls": [ADD]}, append_eos=append_eos) == (
        WRITTEN,
        WRITTEN,
        WRITTEN,
        append_eos,
    )
    with_text = encode(CALLS, {"content": "call", "tool_calls": [ADD]}, append_eos=append_eos)
    assert with_text == ("call" + WRITTEN, "call", "call", append_eos)


def test_the_end_of_turn_stays_behind_another_special_token(chat_tokenizer):
    """Some models write special tokens around their calls."""
    prompt, answer = [{"role": "user", "content": "hi"}], {"role": "assistant", "content": "no</s>"}
    side = encode_chat_answer(chat_tokenizer, prompt, answer, append_eos=True)
    assert side.ids[-2:] == [1, 4] and side.has_eos
    # A message that holds its own end of turn is not ended twice.
    ended = encode_chat_answer(chat_tokenizer, prompt, {**answer, "content": "no<|im_end|>"}, append_eos=True)
    assert ended.ids[-1] == 4 and ended.ids[ended.start :].count(4) == 1


def test_reasoning_without_text(encode):
    message = {"content": "", "reasoning_content": "hello\nthe"}
    assert encode(THINKING, message)[0] == "<think>\nhello\nthe\n</think>\n\n"
    # Cut while the model was thinking: the end of the block is not its own.
    assert encode(THINKING, message, append_eos=False)[0] == "<think>\nhello\nthe"


def pair(chosen: dict, rejected: dict, **columns: object) -> dict:
    sides = {"chosen": chosen, "rejected": rejected}
    return {
        "prompt": [{"role": "user", "content": "2+2?"}],
        **{side: [{"role": "assistant", **message}] for side, message in sides.items()},
        **columns,
    }


@pytest.fixture
def read(make_tokenizer_folder, write_jsonl):
    def data(template, *rows, **settings):
        folder = make_tokenizer_folder(config={"eos_token": "<|im_end|>"})
        return preference_dataset(
            tokenizer_json(folder, chat_template=template), write_jsonl(list(rows)), **settings
        )

    return data


def test_answers_that_differ_in_reasoning_or_calls_are_two_answers(read):
    thoughts = pair(
        {"content": "4", "reasoning_content": "two"}, {"content": "4", "reasoning_content": "guess"}
    )
    data = read(THINKING, thoughts)
    assert (data.text(0).chosen, data.text(0).rejected) == ("4", "4") and data[0].chosen_ids != data[
        0
    ].rejected_ids
    other = {"function": {"name": "add", "arguments": {"a": 3}}}
    calls = pair({"content": None, "tool_calls": [ADD]}, {"content": None, "tool_calls": [other]})
    assert read(CALLS, calls).text(0).chosen == WRITTEN
    assert read(CALLS, pair({"content": None, "tool_calls": [ADD]}, {"content": "4"})).text(0).rejected == "4"


def test_what_the_template_does_not_write_makes_no_answer(read):
    thoughts = pair(
        {"content": "4", "reasoning_content": "two"}, {"content": "4", "reasoning_content": "guess"}
    )
    with pytest.raises(
        DataError,
        match=r"'rejected': has the same tokens as chosen: .* leave out what differs \(reasoning_content\)",
    ):
        read(CALLS, thoughts)
    calls = pair({"content": "", "tool_calls": [ADD]}, {"content": "4"})
    with pytest.raises(DataError, match="column 'chosen': gives no token of its own"):
        read(THINKING, calls)
    with pytest.raises(DataError, match="column 'rejected': is equal to chosen"):
        read(CALLS, pair({"content": "4", "tool_calls": [ADD]}, {"content": "4", "tool_calls": [ADD]}))
    with pytest.raises(DataError, match="column 'chosen': has no answer"):
        read(CALLS, pair({"content": " ", "tool_calls": []}, {"content": "4"}))


def test_an_incomplete_answer_keeps_its_thinking_block(read):
    data = read(THINKING, pair({"content": "hi"}, {"content": "no"}, complete=False))
    kept = data[0].chosen_ids[data[0].chosen_start :]
    assert data.tokenizer.decode(kept) == BLOCK + "hi" and not data[0].chosen_has_eos
    assert data[0].chosen_offsets[-1] == (1, 2)


def test_spans_fall_on_the_answer_and_not_on_its_reasoning(read):
    from tokenpref.data import ColumnScores

    chosen = {"content": "no", "reasoning_content": "no no"}
    data = read(THINKING, pair(chosen, {"content": "yes"}, cw=[[0, 2, 3.0]], rw=[[0, 3, 2.0]]))
    (scores, _), *_ = ColumnScores(kind="weight", per="span", chosen="cw", rejected="rw").load(data)
    tokens = [data.tokenizer.decode([i]) for i in data[0].chosen_ids[data[0].chosen_start :]]
    assert tokens[-2] == "no" and list(scores[-2:-1]) == [3.0]
    assert set(scores[:-2]) == {1.0}
