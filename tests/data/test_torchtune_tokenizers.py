from __future__ import annotations

import json

import pytest
from torchtune.models.gemma import GemmaTokenizer
from torchtune.models.llama2 import Llama2Tokenizer
from torchtune.models.llama3 import Llama3Tokenizer
from torchtune.models.phi3 import Phi3MiniTokenizer
from torchtune.models.qwen2 import Qwen2Tokenizer
from torchtune.modules.transforms.tokenizers import HuggingFaceBaseTokenizer, TikTokenBaseTokenizer

from tokenpref.data import adapt_tokenizer, encode_text_answer
from tokenpref.errors import ConfigError

PROMPT = [{"role": "user", "content": "the cat"}]
CALL = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
ANSWER = {"role": "assistant", "content": "hello é"}


@pytest.fixture
def llama3(tiktoken_file):
    return adapt_tokenizer(Llama3Tokenizer(tiktoken_file, max_seq_len=4))


@pytest.fixture
def qwen2(tmp_path, vocab):
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nh e\nl l\nhe ll\nhell o\nĠ t\nĠt he\n")
    special = {"<|endoftext|>": 300, "<|im_start|>": 301, "<|im_end|>": 302}
    return adapt_tokenizer(
        Qwen2Tokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), special)
    )


def test_tiktoken_spans(llama3):
    ids, spans = llama3.encode_with_offsets("hello theé😀")
    # Ids are the ranks of the file: 256 bytes, then he=256, ll=257, hell=258, hello=259, " t"=260, " the"=261.
    assert ids == [128000, 259, 261, 0xC3, 0xA9, 0xF0, 0x9F, 0x98, 0x80]
    assert spans == [(0, 0), (0, 5), (5, 9), (9, 10), (9, 10), (10, 11), (10, 11), (10, 11), (10, 11)]
    assert llama3.encode_with_offsets("he", add_bos=False) == ([256], [(0, 2)])
    assert llama3.decode(ids) == "hello theé😀"
    assert (llama3.bos_id, llama3.eos_id, llama3.pad_id) == (128000, 128001, 128004)


def test_the_tokenizers_own_length_limit_cuts_nothing(llama3):
    assert len(llama3.encode_chat(PROMPT, ANSWER, append_eos=True).ids) > 4


def test_llama3_conversation(llama3):
    chat = llama3.encode_chat(PROMPT, ANSWER, append_eos=True)
    header = [128006, *b"assistant", 128007, 10, 10]
    user = [128006, *b"user", 128007, 10, 10, *b"t", 256, *b" cat", 128009]
    assert chat.ids[: chat.start] == [128000, *user, *header]
    assert chat.ids[chat.start :] == [259, 32, 0xC3, 0xA9, 128009]
    assert chat.spans == [(0, 5), (5, 6), (6, 7), (6, 7), (7, 7)]
    assert chat.has_eos and chat.text == "hello é"
    without = llama3.encode_chat(PROMPT, ANSWER, append_eos=False)
    assert without.ids == chat.ids[:-1] and not without.has_eos
    assert llama3.render_chat(PROMPT, add_generation_prompt=True) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nthe cat<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_torchtune_strips_the_answer_but_spans_stay_those_of_the_data(llama3):
    chat = llama3.encode_chat(PROMPT, {"role": "assistant", "content": "  hello\n"}, append_eos=True)
    assert (
        chat.ids[chat.start :] == [259, 128009]
        and chat.spans == [(2, 7), (7, 7)]
        and chat.text == "  hello\n"
    )


def test_eos_written_as_text_is_the_eos_token(llama3):
    encoded = encode_text_answer(llama3, "the", " the<|end_of_text|>", append_eos=True)
    assert encoded.ids == [128000, *b"t", 256, 261, 128001] and encoded.has_eos
    assert encoded.spans == [(0, 4), (19, 19)]


def test_sentencepiece_spans(sentencepiece_file):
    tokenizer = adapt_tokenizer(Llama2Tokenizer(sentencepiece_file))
    ids, spans = tokenizer.encode_with_offsets("hello the 😀é")
    pieces = [tokenizer.decode_special(i) if i != 1 else "" for i in ids[:4]]
    assert ids[0] == tokenizer.bos_id == 1 and pieces == ["", " hello", " the", " "]
    assert spans == [(0, 0), (0, 5), (5, 9), (9, 10), *[(10, 11)] * 4, *[(11, 12)] * 2]
    assert tokenizer.decode(ids) == "hello the 😀é"


def test_llama2_conversation(sentencepiece_file):
    tokenizer = adapt_tokenizer(Llama2Tokenizer(sentencepiece_file))
    chat = tokenizer.encode_chat(PROMPT, {"role": "assistant", "content": "hello the"}, append_eos=True)
    assert tokenizer.decode(chat.ids[: chat.start]).split() == ["[INST]", "the", "cat", "[/INST]"]
    assert chat.ids[-1] == tokenizer.eos_id and chat.has_eos and chat.spans[-1] == (9, 9)
    assert "".join("hello the"[start:end] for start, end in chat.spans) == "hello the"


def test_gemma_and_phi3_conversations(sentencepiece_file):
    gemma = adapt_tokenizer(GemmaTokenizer(sentencepiece_file)).encode_chat(PROMPT, ANSWER, append_eos=True)
    assert gemma.ids[-1] == 2 and gemma.has_eos
    phi3 = adapt_tokenizer(Phi3MiniTokenizer(sentencepiece_file))
    chat = phi3.encode_chat(PROMPT, ANSWER, append_eos=True)
    assert chat.ids[-1] == phi3.eos_id == 32000 and 32007 in chat.ids[chat.start :]
    bare = phi3.encode_chat(PROMPT, ANSWER, append_eos=False)
    assert 32007 not in bare.ids[bare.start :] and bare.start == chat.start
    assert phi3.render_chat(PROMPT, True).split()[-2:] == ["cat<|end|>", "<|assistant|>"]


def test_qwen2_conversation_and_spans(qwen2, vocab):
    ids, spans = qwen2.encode_with_offsets("hello the")
    assert ids == [vocab["hello"], vocab["Ġthe"]] and spans == [(0, 5), (5, 9)] and qwen2.bos_id is None
    chat = qwen2.encode_chat(PROMPT, {"role": "assistant", "content": "hello"}, append_eos=True)
    assert chat.ids[chat.start :] == [vocab["hello"], 302] and chat.has_eos
    assert qwen2.render_chat(PROMPT, True) == "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(ConfigError, match="no BOS token"):
        qwen2.encode_with_offsets("he", add_bos=True)


def test_qwen2_composes_characters_and_spans_go_back(qwen2, vocab):
    # "e" + combining acute is composed to é (C3 A9) before the vocabulary sees it: 2 characters of the text.
    ids, spans = qwen2.encode_with_offsets("xe\u0301 the")
    assert ids == [vocab["x"], vocab["Ã"], vocab["©"], vocab["Ġthe"]]
    assert spans == [(0, 1), (1, 3), (1, 3), (3, 7)]
    # Hangul written as three letters is one syllable of three bytes.
    ids, spans = qwen2.encode_with_offsets("\u1112\u1161\u11abx")
    assert len(ids) == 4 and spans == [(0, 3), (0, 3), (0, 3), (3, 4)]


def test_torchtunes_hugging_face_tokenizer(make_tokenizer_folder, vocab):
    folder = make_tokenizer_folder(bos=True)
    inner = HuggingFaceBaseTokenizer(
        str(folder / "tokenizer.json"), tokenizer_config_json_path=str(folder / "tokenizer_config.json")
    )
    tokenizer = adapt_tokenizer(inner)
    assert tokenizer.encode_with_offsets("hello the")[0] == [0, vocab["hello"], vocab["Ġthe"]]
    assert (tokenizer.eos_id, tokenizer.pad_id) == (1, 2)


def test_a_base_tokenizer_has_no_conversations(tiktoken_file):
    tokenizer = adapt_tokenizer(TikTokenBaseTokenizer(tiktoken_file, "t", r"\S+|\s+", 256 + 6, 256 + 7, {}))
    assert not tokenizer.has_chat and tokenizer.pad_id == 263
    with pytest.raises(ConfigError, match="cannot tokenise messages"):
        tokenizer.encode_chat(PROMPT, ANSWER, append_eos=True)


def test_fingerprints_differ(tiktoken_file, sentencepiece_file, qwen2):
    llama3 = adapt_tokenizer(Llama3Tokenizer(tiktoken_file))
    assert (
        llama3.fingerprint() == adapt_tokenizer(Llama3Tokenizer(tiktoken_file, max_seq_len=9)).fingerprint()
    )
    prints = {llama3.fingerprint(), qwen2.fingerprint()}
    prints |= {
        adapt_tokenizer(kind(sentencepiece_file)).fingerprint() for kind in (Llama2Tokenizer, GemmaTokenizer)
    }
    assert len(prints) == 4


def test_text_that_begins_with_bos_gets_one(llama3, sentencepiece_file):
    for add_bos in (None, True, False):
        ids, spans = llama3.encode_with_offsets("<|begin_of_text|>hello", add_bos)
        assert (ids, spans) == ([128000, 259], [(0, 0), (17, 22)])
    llama2 = adapt_tokenizer(Llama2Tokenizer(sentencepiece_file))
    plain, rendered = (llama2.encode_with_offsets(text) for text in ("hello the", "<s>hello the"))
    assert rendered[0] == plain[0] and rendered[0].count(llama2.bos_id) == 1
    assert rendered[1][1:] == [(start + 3, end + 3) for start, end in plain[1][1:]]
    side = encode_text_answer(llama3, "<|begin_of_text|>the", " hello<|end_of_text|>\n", append_eos=True)
    assert side.ids.count(128000) == 1 and side.ids[-2:] == [259, 128001]


@pytest.mark.parametrize(
    ("message", "key"), [(CALL, "tool_calls"), ({**ANSWER, "reasoning_content": "so"}, "reasoning_content")]
)
def test_calls_and_reasoning_are_refused(llama3, message, key):
    for prompt, answer in ((PROMPT, message), ([*PROMPT, message, *PROMPT], ANSWER)):
        with pytest.raises(
            ValueError, match=rf"message 1 of the conversation has {key}, which .* has no place for"
        ):
            llama3.encode_chat(prompt, answer, append_eos=True)
    with pytest.raises(ValueError, match="the row has tools, which Llama3Tokenizer has no place for"):
        llama3.render_chat(PROMPT, True, tools=[{"type": "function"}])
