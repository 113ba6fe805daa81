from __future__ import annotations

import pytest

from tokenpref.data import ChatTemplate, TemplateError, normalize_messages
from tokenpref.errors import ConfigError


def test_layouts_become_one():
    wanted = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert normalize_messages([{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]) == wanted
    parts = [{"type": "text", "text": "a"}]
    assert normalize_messages([{"role": "user", "content": parts, "tools": None}, wanted[1]]) == wanted


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("text", "expected a list of messages, found str"),
        (["text"], "message 0 is a str"),
        ([{"role": "user"}], r"message 0 has the keys \['role'\]"),
        ([{"role": "user", "content": [{"type": "image"}]}], "something other than text"),
        ([{"role": "user", "content": 3}], "content of type int"),
    ],
)
def test_what_is_no_conversation(value, message):
    with pytest.raises(TypeError, match=message):
        normalize_messages(value)


def test_rendering_as_transformers_does():
    # trim_blocks and lstrip_blocks: a block alone on its line leaves nothing behind.
    template = ChatTemplate(
        "{{ bos_token }}\n{% for m in messages %}\n    {% if loop.index > 1 %}\n    {% break %}\n    {% endif %}\n"
        "{% generation %}{{ m.content | tojson }}{% endgeneration %}\n{% endfor %}",
        {"bos_token": "<s>"},
    )
    assert (
        template.render([{"role": "user", "content": "é<b>"}, {"role": "user", "content": "x"}], False)
        == '<s>\n"é<b>"'
    )


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
