from __future__ import annotations

import json
import pickle

import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, normalizers

from tokenpref.data import Tokenizer, adapt_tokenizer, tokenizer_json
from tokenpref.errors import ConfigError


def test_ids_and_spans_with_emoji_and_accents(tokenizer, vocab):
    text = "hello the é😀"
    ids, spans = tokenizer.encode_with_offsets(text)
    # é is 2 bytes in UTF-8 (C3 A9), the emoji 4 (F0 9F 98 80): each byte token covers its whole character.
    assert ids == [vocab[t] for t in ["hello", "Ġthe", "Ġ", "Ã", "©", "ð", "Ł", "ĺ", "Ģ"]]
    assert spans == [(0, 5), (5, 9), (9, 10), (10, 11), (10, 11), (11, 12), (11, 12), (11, 12), (11, 12)]
    assert tokenizer.decode(ids) == text


def test_special_tokens_in_text_have_empty_spans(tokenizer, vocab):
    ids, spans = tokenizer.encode_with_offsets("no</s>yes")
    assert ids == [vocab["no"], 1, vocab["yes"]]
    assert spans == [(0, 2), (2, 2), (6, 9)]
    assert tokenizer.decode(ids) == "noyes"


def test_bos_follows_the_files_own_post_processor(make_tokenizer_folder, vocab):
    plain = tokenizer_json(make_tokenizer_folder())
    assert plain.encode_with_offsets("no")[0] == [vocab["no"]]
    assert plain.encode_with_offsets("no", add_bos=True) == ([0, vocab["no"]], [(0, 0), (0, 2)])
    with_bos = tokenizer_json(make_tokenizer_folder(bos=True))
    assert with_bos.encode_with_offsets("no") == ([0, vocab["no"]], [(0, 0), (0, 2)])
    assert with_bos.encode_with_offsets("no", add_bos=True)[0] == [0, vocab["no"]]
    assert with_bos.encode_with_offsets("no", add_bos=False)[0] == [vocab["no"]]


def test_special_tokens_from_the_files_beside(make_tokenizer_folder):
    tokenizer = tokenizer_json(make_tokenizer_folder())
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    assert tokenizer.vocab_size == 5 + 256 + 9
    folder = make_tokenizer_folder(config={})
    with pytest.raises(ConfigError, match=r"set tokenizer\.eos_token"):
        tokenizer_json(folder)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 4}))
    assert tokenizer_json(folder).eos_id == 4
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 4]}))
    tokenizer = tokenizer_json(folder)
    assert tokenizer.eos_id == 1 and tokenizer.stop_ids == {1, 4}
    assert tokenizer.pad_id == 1  # none is named, so EOS
    assert tokenizer_json(folder / "tokenizer.json", eos_token="<|im_end|>").eos_id == 4


def test_chat_template_from_the_files_beside(make_tokenizer_folder):
    folder = make_tokenizer_folder(
        config={"eos_token": "</s>", "chat_template": [{"name": "default", "template": "A"}]}
    )
    assert tokenizer_json(folder).render_chat([], False) == "A"
    (folder / "chat_template.jinja").write_text("B{{ eos_token }}")
    assert tokenizer_json(folder).render_chat([], False) == "B</s>"
    (folder / "mine.jinja").write_text("C")
    assert tokenizer_json(folder, chat_template=str(folder / "mine.jinja")).render_chat([], False) == "C"
    assert tokenizer_json(folder, chat_template="D").render_chat([], False) == "D"


def test_errors_name_the_mend(make_tokenizer_folder, tmp_path):
    with pytest.raises(ConfigError, match=r"no file .*nowhere"):
        tokenizer_json(tmp_path / "nowhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"cannot be read as a tokenizer\.json"):
        tokenizer_json(tmp_path)
    with pytest.raises(ConfigError, match=r"eos_token: '<end>' is not in the tokenizer's vocabulary"):
        tokenizer_json(make_tokenizer_folder(), eos_token="<end>")
    with pytest.raises(ConfigError, match="no chat template"):
        tokenizer_json(make_tokenizer_folder()).render_chat([{"role": "user", "content": "hi"}], True)


def test_fingerprint_follows_vocabulary_and_template(make_tokenizer_folder):
    folder = make_tokenizer_folder()
    base = tokenizer_json(folder).fingerprint()
    assert len(base) == 64 and base == tokenizer_json(folder).fingerprint()
    assert base != tokenizer_json(folder, chat_template="x").fingerprint()
    assert base != tokenizer_json(folder, eos_token="<|im_end|>").fingerprint()
    assert base != tokenizer_json(make_tokenizer_folder(bos=True)).fingerprint()


def test_sentencepiece_like_json_with_byte_fallback(tmp_path):
    vocab = {f"<0x{i:02X}>": i for i in range(256)} | {"a": 256, "\u2581": 257, "<unk>": 258, "</s>": 259}
    inner = HFTokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizer_json(tmp_path, eos_token="</s>")
    ids, spans = tokenizer.encode_with_offsets("a 😀a")
    assert ids == [257, 256, 257, 0xF0, 0x9F, 0x98, 0x80, 256]
    assert spans == [(0, 1), (0, 1), (1, 2), (2, 3), (2, 3), (2, 3), (2, 3), (3, 4)]


def test_adapt_keeps_what_fits_and_names_what_does_not(tokenizer):
    assert isinstance(tokenizer, Tokenizer) and adapt_tokenizer(tokenizer) is tokenizer
    with pytest.raises(ConfigError, match=r"builtins\.dict is not a tokenizer that tokenpref knows"):
        adapt_tokenizer({})


def test_the_date_of_templates_belongs_to_the_fingerprint_where_they_ask_for_it(make_tokenizer_folder):
    folder = make_tokenizer_folder()
    dated = "{{ strftime_now('%Y-%m-%d') }}"
    default, later = (
        tokenizer_json(folder, chat_template=dated, chat_template_date=date) for date in (None, "2025-01-31")
    )
    assert default.render_chat([], False) == "2024-07-26" and later.render_chat([], False) == "2025-01-31"
    assert default.fingerprint() != later.fingerprint()
    assert default.template_fingerprint() != later.template_fingerprint()
    same = {
        tokenizer_json(folder, chat_template="x", chat_template_date=date).fingerprint()
        for date in (None, "2025-01-31")
    }
    assert len(same) == 1
    with pytest.raises(ConfigError, match=r"chat_template_date: must be a date such as 2024-07-26, got 3"):
        tokenizer_json(folder, chat_template_date=3)  # type: ignore[arg-type]


SWITCH = "{{ 'a' if enable_thinking is not defined or enable_thinking else 'b' }}"


def test_variables_of_a_template_can_be_set_and_belong_to_the_fingerprint(make_tokenizer_folder):
    folder = make_tokenizer_folder()
    unset, on, off = (
        tokenizer_json(folder, chat_template=SWITCH, chat_template_kwargs=given)
        for given in ({}, {"enable_thinking": True}, {"enable_thinking": False})
    )
    assert [t.render_chat([], False) for t in (unset, on, off)] == ["a", "a", "b"]
    assert len({t.fingerprint() for t in (unset, on, off)}) == 3
    assert len({t.template_fingerprint() for t in (unset, on, off)}) == 3
    # Fingerprints of stores that were made before there were such variables stay the same.
    assert unset.fingerprint() == tokenizer_json(folder, chat_template=SWITCH).fingerprint()


def test_variables_of_the_template_survive_in_other_processes(make_tokenizer_folder):
    tokenizer = tokenizer_json(
        make_tokenizer_folder(), chat_template=SWITCH, chat_template_kwargs={"enable_thinking": False}
    )
    assert pickle.loads(pickle.dumps(tokenizer)).render_chat([], False) == "b"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"enable_thinkin": False},
            "does not read 'enable_thinkin'; did you mean 'enable_thinking'.*name a variable of the template",
        ),
        ({"zzz": 1}, "does not read 'zzz'; remove it"),
        ({"messages": []}, "'messages' cannot be set here"),
        ({"eos_token": "x"}, "'eos_token' cannot be set here"),
        ([1], "must be a mapping .*got .1."),
        ({1: 2}, "must be a mapping"),
        ({"enable_thinking": {1, 2}}, "values must be those of JSON"),
    ],
)
def test_variables_that_change_nothing_are_refused(make_tokenizer_folder, given, message):
    with pytest.raises(ConfigError, match=f"tokenizer.chat_template_kwargs: .*{message}"):
        tokenizer_json(make_tokenizer_folder(), chat_template=SWITCH, chat_template_kwargs=given)


def test_variables_without_a_template_are_refused(make_tokenizer_folder):
    with pytest.raises(ConfigError, match="chat_template_kwargs: the tokenizer has no chat template"):
        tokenizer_json(make_tokenizer_folder(), chat_template_kwargs={"enable_thinking": False})


def test_conversations_with_tools_take_the_template_named_for_them(make_tokenizer_folder):
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools | length }} tools"},
    ]
    folder = make_tokenizer_folder(config={"eos_token": "</s>", "chat_template": named})
    tokenizer = tokenizer_json(folder)
    assert tokenizer.render_chat([], False) == tokenizer.render_chat([], False, tools=[]) == "plain"
    assert tokenizer.render_chat([], False, tools=[{"type": "function"}]) == "1 tools"
    assert (
        tokenizer.template_fingerprint()
        != tokenizer_json(folder, chat_template="plain").template_fingerprint()
    )
