from __future__ import annotations

import datetime
import pickle

import pytest
import tokenizers

from tokenpref.data import ChatTemplate, TemplateError, normalize_messages
from tokenpref.errors import ConfigError


def test_layouts_become_one():
    wanted = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert normalize_messages([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]) == wanted
    parts = [{"type": "text", "text": "a"}]
    assert normalize_messages([{"role": "user", "content": parts, "tools": None}, wanted[1]]) == wanted


TEXT = {"type": "text", "text": "a"}


@pytest.mark.parametrize("kind", ["thinking", "reasoning"])
@pytest.mark.parametrize("key", ["thinking", "reasoning", "text", "content"])
def test_reasoning_in_parts_goes_to_the_template_as_reasoning(kind, key):
    parts = [{"type": kind, key: "so"}, {"type": kind, key: "!"}, TEXT, TEXT]
    [message] = normalize_messages([{"role": "assistant", "content": parts}])
    assert message == {"role": "assistant", "content": "aa", "reasoning_content": "so!"}
    again = {"role": "assistant", "content": parts, "reasoning_content": "so!"}
    assert normalize_messages([again]) == [message]


@pytest.mark.parametrize(
    "beside",
    [
        {"tool_calls": [{"function": {"name": "f"}}]},
        {"function_call": {"name": "f"}},
        {"reasoning_content": "so"},
        {"thinking": "so"},
    ],
)
def test_no_content_beside_calls_or_reasoning_is_empty_content(beside):
    wanted = [{"role": "assistant", "content": "", **beside}]
    assert normalize_messages([{"role": "assistant", "content": None, **beside}]) == wanted
    assert normalize_messages([{"from": "gpt", **beside}]) == wanted


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("text", "expected a list of messages, found str"),
        (["text"], "message 0 is a str"),
        ([{"role": "user"}], r"message 0 has the keys \['role'\]"),
        ([{"role": "user", "content": [{"type": "image"}]}], "a part of type"),
        (
            [{"role": "user", "content": [{"type": "tool_use", "name": "f"}]}],
            "a part of type 'tool_use'; only text",
        ),
        (
            [{"role": "user", "content": [{"type": "thinking", "signature": "x"}]}],
            "a part of type 'thinking'; only",
        ),
        (
            [{"role": "assistant", "content": [TEXT, {"type": "thinking", "thinking": "so"}]}],
            "message 0 has thinking after text, which templates cannot render",
        ),
        (
            [
                {
                    "role": "assistant",
                    "content": [{"type": "reasoning", "text": "so"}],
                    "reasoning_content": "no",
                }
            ],
            "message 0 has reasoning both in its content and in reasoning_content",
        ),
        (
            [{"role": "assistant", "content": None, "tool_calls": []}],
            r"has the keys \['role', 'tool_calls'\]",
        ),
        ([{"role": "user", "content": 3}], "content of type int"),
    ],
)
def test_what_is_no_conversation(value, message):
    with pytest.raises(TypeError, match=message):
        normalize_messages(value)


def test_templates_are_sandboxed_and_can_refuse():
    with pytest.raises(TemplateError, match="only user"):
        ChatTemplate("{{ raise_exception('only user') }}", {}).render([], False)
    with pytest.raises(TemplateError, match="unsafe"):
        ChatTemplate("{{ ''.__class__.__mro__ }}", {}).render([], False)
    with pytest.raises(TemplateError):
        ChatTemplate("{{ messages.append(1) }}", {}).render([], False)
    with pytest.raises(ConfigError, match="chat_template: line 1"):
        ChatTemplate("{% if %}", {})


def test_what_a_template_writes_is_text():
    messages = [{"role": "\ud83d", "content": "a"}]
    with pytest.raises(TemplateError, match="it writes half of a surrogate pair after '<'"):
        ChatTemplate("<{{ messages[0].role }}>", {}).render(messages, False)


CONVERSATION = [
    {"role": "system", "content": "Be brief. é<b>"},
    {"role": "user", "content": " 2+2?\n"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "two\nand two",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"b": 2, "a": 2}}}],
    },
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "It is 4.", "reasoning_content": "easy"},
]
TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "é", "parameters": {"z": 1, "a": 2}}}
]
TEMPLATES = {
    "blocks alone on their lines": (
        "{{ bos_token }}\n{% for m in messages %}\n    {% if loop.index > 2 %}\n    {% break %}\n    {% endif %}\n"
        "    {{- m.content | tojson }}\n{% endfor %}\n"
    ),
    "tojson with its arguments": (
        "{{ tools | tojson }}{{ tools | tojson(indent=2) }}{{ tools | tojson(separators=(',', ':')) }}"
        "{{ tools | tojson(sort_keys=true, ensure_ascii=true) }}{{ tools | tojson(true, 1, (', ', '= '), true) }}"
    ),
    "calls and thoughts": (
        "{%- for m in messages -%}<|{{ m.role }}|>"
        "{%- if m.reasoning_content is defined %}<think>{{ m.reasoning_content.strip() }}</think>{% endif -%}"
        "{{ m.content | trim }}"
        "{%- for c in m.tool_calls or [] %}{{ c.function.name ~ (c.function.arguments | tojson) }}{% endfor -%}"
        "{%- endfor -%}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    ),
    "loops, namespaces and macros": (
        "{%- set ns = namespace(last=-1, text='') -%}{%- macro shout(t) %}{{ t | upper }}!{% endmacro -%}"
        "{%- for m in messages if m.role != 'tool' -%}{%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif -%}"
        "{%- set ns.text = ns.text + m.role[:2] * 2 ~ loop.length -%}{{ loop.cycle('a', 'b') }}{{ loop.last }}"
        "{%- else %}nothing{% endfor -%}{{ ns.text }}{{ ns.last ** 2 }}{{ shout(messages[0].content) }}"
        "{{ messages | map(attribute='role') | unique | join(',') }}{{ documents is none }}{{ range(3) | list }}"
        "{% set block %}{% for i in range(3) %}{{ i }},{% endfor %}{% endset %}{{ block }}{{ dict(a=1) }}{{ 7 % 4 }}"
    ),
    "generation tags": (
        "{% for m in messages %}{% generation %}{% set inside = m.role %}{{ inside }}{% endgeneration %}{{ inside }}"
        "{% endfor %}"
    ),
}


@pytest.fixture(scope="module")
def of_transformers():
    transformers = pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_rendering_equals_that_of_transformers(of_transformers, name, add_generation_prompt, tools):
    wanted = of_transformers.apply_chat_template(
        CONVERSATION,
        tools=tools,
        chat_template=TEMPLATES[name],
        add_generation_prompt=add_generation_prompt,
        tokenize=False,
    )
    template = ChatTemplate(TEMPLATES[name], {"bos_token": "<s>", "eos_token": "</s>"})
    assert template.render(CONVERSATION, add_generation_prompt, tools) == wanted


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_has_the_names_that_templates_read(key):
    template = ChatTemplate(
        "{% for m in messages %}{{ m.thinking }}|{{ m.reasoning_content }}{% endfor %}", {}
    )
    assert template.render([{"role": "assistant", "content": "", key: "so"}], False) == "so|so"


def test_the_date_is_fixed_and_can_be_set():
    source = "{{ strftime_now('%d %B %Y') }}"
    assert ChatTemplate(source, {}).render([], False) == "26 July 2024"
    assert ChatTemplate(source, {}, datetime.date(2025, 1, 31)).render([], False) == "31 January 2025"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ 1 / messages | length }}", r"ZeroDivisionError in line 1: division by zero"),
        ("\n{{ 'a' + 1 }}", r"TypeError in line 2: can only concatenate str"),
        ("{{ range(10 ** 9) }}", r"OverflowError in line 1: Range too big"),
        (
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
            "RecursionError in line 1: maximum recursion depth",
        ),
        ("{{ '{:d}'.format('x') }}", "ValueError in line 1: Unknown format code"),
        ("{{ missing.attribute }}", "'missing' is undefined"),
        ("{% include 'other' %}", "no loader for this environment specified"),
        ("{{ raise_exception('two\nlines') }}", "^two lines$"),
        ("{% set ns = namespace(__class__=1) %}", "a namespace cannot contain '__class__'"),
    ],
)
def test_whatever_a_template_raises_is_its_refusal(source, message):
    with pytest.raises(TemplateError, match=message):
        ChatTemplate(source, {}).render([], False)


ENDLESS = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        ENDLESS,
        "{% for i in [1] * 9000000 %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% set text %}" + ENDLESS + "{% endset %}",
    ],
)
def test_the_time_of_a_rendering_is_bounded(source, monkeypatch):
    monkeypatch.setattr("tokenpref.data.template_environment.MAX_SECONDS", 0.05)
    with pytest.raises(TemplateError, match=r"takes more than 0\.05 s of processor time"):
        ChatTemplate(source, {}).render([], False)


def test_a_template_that_never_ends_stops_the_run(monkeypatch):
    monkeypatch.setattr("tokenpref.data.template_environment.MAX_SECONDS", 0.05)
    template = ChatTemplate("{% if messages %}" + ENDLESS + "{% endif %}", {})
    for _ in range(2):
        with pytest.raises(TemplateError):
            template.render([{"role": "user"}], False)
    with pytest.raises(ConfigError, match="did so 3 times"):
        template.render([{"role": "user"}], False)
    assert template.render([], False) == ""


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{% for i in range(100000) %}{{ 'a' * 100000 }}{% endfor %}",
            "writes more than 10,000,000 characters",
        ),
        (
            "{% for i in range(100000) %}" + "a" * 200 + "{% endfor %}",
            "writes more than 10,000,000 characters",
        ),
        ("{{ 'a' * 10 ** 10 }}", "makes a value of more than"),
        ("{{ [0] * 10 ** 10 }}", "makes a value of more than"),
        ("{{ 'a'.ljust(10 ** 10) }}", "makes a value of more than"),
        (
            "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
            "makes a value of more than",
        ),
        ("{% macro f(s) %}{{ f(s + s) }}{% endmacro %}{{ f('ab') }}", "makes a value of more than"),
        (
            "{% set ns = namespace(l=['a' * 999]) %}{% for i in range(99) %}{% set ns.l = [ns.l, {'b': ns.l}] %}{% endfor %}"
            "{{ ns.l }}",
            "makes a value of more than",
        ),
        (
            "{% set ns = namespace(n=3) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
            "whole number of more than 100,000 bits",
        ),
        ("{{ 10 ** (10 ** 10) }}", "whole number of more than 100,000 bits"),
    ],
)
def test_the_size_of_a_rendering_is_bounded(source, message):
    with pytest.raises(TemplateError, match=message):
        ChatTemplate(source, {}).render([], False)


def test_limits_belong_to_one_rendering():
    template = ChatTemplate("{{ 'a' * 6000000 }}", {})
    assert len(template.render([], False)) == len(template.render([], False)) == 6_000_000


@pytest.mark.parametrize("source", ["{% break %}", "{% for i in x %}" * 30 + "{% endfor %}" * 30])
def test_a_template_that_is_no_program(source):
    with pytest.raises(ConfigError, match="chat_template: "):
        ChatTemplate(source, {})


def test_a_template_can_be_sent_to_another_process():
    template = ChatTemplate(
        "{{ bos_token }}{{ strftime_now('%Y') }}", {"bos_token": "<s>"}, datetime.date(2020, 1, 1)
    )
    assert pickle.loads(pickle.dumps(template)).render([], False) == "<s>2020"
