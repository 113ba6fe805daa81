"""Chat templates of models that think: which tokens are prompt and which are answer, compared with transformers."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer

from tokenpref.data import encode_chat_answer, preference_dataset, tokenizer_json
from tokenpref.data.tokenization import encode_prompt
from tokenpref.errors import DataError

START, END, EMPTY = "<|im_start|>", "<|im_end|>", "<think>\n\n</think>\n\n"

# As Qwen3's: reasoning of earlier turns is dropped, the last answer always has a block, enable_thinking closes it in the prompt.
QWEN = """
{%- set ns = namespace(asked=-1) %}
{%- for m in messages if m.role == 'user' %}{% set ns.asked = messages.index(m) %}{% endfor %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\n' }}
    {%- set text = m.content %}
    {%- if m.role == 'assistant' %}
        {%- set thought = m.reasoning_content or '' %}
        {%- if not thought and '</think>' in text %}
            {%- set thought = text.split('</think>')[0].split('<think>')[-1] %}
            {%- set text = text.split('</think>')[-1] %}
        {%- endif %}
        {%- if loop.index0 > ns.asked and (loop.last or thought) %}
            {{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}
        {%- endif %}
        {%- set text = text.lstrip('\n') %}
    {%- endif %}
    {{- text + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}
"""
# As Qwen3.5's: with thinking, the generation prompt opens the block.
CLOSED = "{%- if enable_thinking is defined"
OPENED = QWEN.replace(
    CLOSED,
    "{%- if enable_thinking is not defined or enable_thinking %}{{- '<think>\n' }}{% endif %}\n    " + CLOSED,
)
# As SmolLM3's: the mode stands in the system message; a block of reasoning is part of the content.
SMOL = """
{%- if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}
{{- '<|im_start|>system\nmode: ' + ('/think' if enable_thinking else '/no_think') + '<|im_end|>\n' }}
{%- set block = '' if enable_thinking else '<think>\n\n</think>\n' %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- generation %}{{- '<|im_start|>assistant\n' + block + m.content.lstrip('\n') + '<|im_end|>\n' }}{% endgeneration %}
    {%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' + block }}{% endif %}
"""
# As OLMo 3 Think's: the generation prompt opens a block, and the content has to continue it.
OLMO = """
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>' }}{% endif %}
"""
# As DeepSeek-R1's: the reasoning of every turn is dropped, also of the last one.
DROPS = """
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}{% endif %}
"""

ASKED = [{"role": "user", "content": "no?"}]
TWICE = [
    {"role": "user", "content": "hello?"},
    {"role": "assistant", "content": "yes", "reasoning_content": "the first thought"},
    {"role": "user", "content": "no?"},
]


@pytest.fixture
def load(make_tokenizer_folder):
    """A tokenizer in which ``<think>`` and ``</think>`` are one ordinary token each, as in Qwen3's."""

    def loaded(template, **settings):
        folder = make_tokenizer_folder(config={"eos_token": END})
        file = str(folder / "tokenizer.json")
        tokenizer = Tokenizer.from_file(file)
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in ("<think>", "</think>")])
        tokenizer.save(file)
        return tokenizer_json(folder, chat_template=template, chat_template_kwargs=settings or None)

    return loaded


@pytest.fixture
def theirs(load):
    """The ids that transformers gives for a conversation."""
    transformers = pytest.importorskip("transformers")

    def ids(template, messages, settings, add_generation_prompt=False):
        file = str(load(template, **settings).file)
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=file, eos_token=END)
        return tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            return_dict=False,
            truncation=False,
            **settings,
        )

    return ids


PLAIN, THOUGHT, INSIDE = (
    {"content": "yes"},
    {"content": "yes", "reasoning_content": "so"},
    {"content": "<think>\nso\n</think>\n\nyes"},
)
CASES = {
    "no reasoning, block of the template": (QWEN, {}, PLAIN, EMPTY + "yes", "yes"),
    "no reasoning, block in the prompt": (QWEN, {"enable_thinking": False}, PLAIN, "yes", "yes"),
    "newlines before the answer": (QWEN, {"enable_thinking": False}, {"content": "\n\nyes"}, "yes", "yes"),
    "reasoning": (QWEN, {}, THOUGHT, "<think>\nso\n</think>\n\nyes", "yes"),
    "reasoning in the text": (QWEN, {}, INSIDE, "<think>\nso\n</think>\n\nyes", "<think>\nso\n</think>\n\nyes"),
    "reasoning switched on": (QWEN, {"enable_thinking": True}, THOUGHT, "<think>\nso\n</think>\n\nyes", "yes"),
    "opened in the prompt": (OPENED, {}, THOUGHT, "so\n</think>\n\nyes", "yes"),
    "closed in the prompt": (OPENED, {"enable_thinking": False}, PLAIN, "yes", "yes"),
    "mode without thinking": (SMOL, {"enable_thinking": False}, PLAIN, "yes", "yes"),
    "mode with thinking": (SMOL, {}, INSIDE, INSIDE["content"], INSIDE["content"]),
    "mode with thinking, no reasoning": (SMOL, {}, PLAIN, "yes", "yes"),
    "content continues the prompt": (
        OLMO, {}, {"content": "<think>so</think>yes"}, "so</think>yes", "so</think>yes"
    ),
}  # fmt: skip


@pytest.mark.parametrize("asked", [ASKED, TWICE], ids=["one turn", "two turns"])
@pytest.mark.parametrize("case", CASES)
def test_prompt_and_answer_are_the_tokens_that_the_model_sees(load, theirs, case, asked):
    template, settings, message, written, text = CASES[case]
    tokenizer, answer = load(template, **settings), {"role": "assistant", **message}
    side = encode_chat_answer(tokenizer, asked, answer, append_eos=True)
    *whole, newline = theirs(template, [*asked, answer], settings)
    assert side.ids == whole and tokenizer.decode([newline]) == "\n" and side.ids[-1] == tokenizer.eos_id
    prompt = theirs(template, asked, settings, add_generation_prompt=True)
    assert encode_prompt(tokenizer, asked) == prompt == side.ids[: side.start] and not side.straddles
    assert tokenizer.decode(side.ids[side.start :]) == written and side.text == text
    covered = [i for i, (start, end) in zip(side.ids[side.start :], side.spans, strict=True) if end > start]
    assert tokenizer.decode(covered) == text
    assert "the first thought" not in tokenizer.decode(side.ids)


def test_an_opened_block_that_stays_empty_begins_with_a_token_of_both(load):
    """The prompt ends with one newline and the block with two, which these vocabularies may join."""
    tokenizer = load(OPENED)
    side = encode_chat_answer(tokenizer, ASKED, {"role": "assistant", **PLAIN}, append_eos=True)
    assert tokenizer.decode(side.ids[side.start :]) == "\n</think>\n\nyes"


REFUSED = {
    "no reasoning after an opened block": (OLMO, {}, PLAIN),
    "reasoning that the template drops": (DROPS, {}, INSIDE),
    "reasoning after a closed block": (QWEN, {"enable_thinking": False}, THOUGHT),
    "reasoning in the text after a closed block": (QWEN, {"enable_thinking": False}, INSIDE),
    "a second block after a closed one": (SMOL, {"enable_thinking": False}, INSIDE),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_answer_that_contradicts_the_generation_prompt_is_refused(load, write_jsonl, case):
    template, settings, message = REFUSED[case]
    sides = {"chosen": message, "rejected": {**message, "content": message["content"] + "!"}}
    row = {"prompt": ASKED, **{side: [{"role": "assistant", **m}] for side, m in sides.items()}}
    with pytest.raises(DataError, match="disagree about reasoning: .*chat_template_kwargs"):
        preference_dataset(load(template, **settings), write_jsonl([row]), cache_dir=None)


def test_what_a_data_set_trains_on_and_samples_from(load, write_jsonl):
    row = {
        "prompt": TWICE,
        "chosen": [{"role": "assistant", **PLAIN}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    for settings, answers in (
        ({}, (EMPTY + "yes", EMPTY + "no")),
        ({"enable_thinking": False}, ("yes", "no")),
    ):
        data = preference_dataset(load(QWEN, **settings), write_jsonl([row]), cache_dir=None)
        pair = data[0]
        chosen, rejected = (
            data.tokenizer.decode(ids[start:])
            for ids, start in (
                (pair.chosen_ids, pair.chosen_start),
                (pair.rejected_ids, pair.rejected_start),
            )
        )
        assert (chosen, rejected) == answers and list(data.prompt_ids(0)) == list(
            pair.chosen_ids[: pair.chosen_start]
        )
