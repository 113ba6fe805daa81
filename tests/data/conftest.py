"""Small tokenizers whose ids can be worked out by hand."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
from support.tokenizers import train_sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

SPECIALS = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
MERGES = [
    ("h", "e"),
    ("l", "l"),
    ("he", "ll"),
    ("hell", "o"),
    ("Ġ", "t"),
    ("Ġt", "he"),
    ("y", "e"),
    ("ye", "s"),
    ("n", "o"),
]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def vocabulary() -> dict[str, int]:
    """Special tokens 0-4, the 256 bytes in order of their letters, then one token for each merge."""
    tokens = SPECIALS + sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in MERGES]
    return {token: i for i, token in enumerate(tokens)}


def write_tokenizer(folder: Path, *, bos: bool = False, config: dict | None = None) -> Path:
    tokenizer = Tokenizer(models.BPE(vocabulary(), MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    steps = [processors.ByteLevel(trim_offsets=True)]
    if bos:
        steps.append(processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]))
    tokenizer.post_processor = processors.Sequence(steps)
    # A limit saved in the file must not cut anything.
    tokenizer.enable_truncation(3)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = (
        {"eos_token": "</s>", "bos_token": "<s>", "pad_token": {"content": "<pad>"}}
        if config is None
        else config
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def vocab() -> dict[str, int]:
    return vocabulary()


@pytest.fixture
def make_tokenizer_folder(tmp_path):
    return lambda **settings: write_tokenizer(tmp_path / "tokenizer", **settings)


@pytest.fixture
def tokenizer(tmp_path):
    from tokenpref.data import tokenizer_json

    return tokenizer_json(write_tokenizer(tmp_path / "tokenizer"))


@pytest.fixture
def chat_tokenizer(tmp_path):
    from tokenpref.data import tokenizer_json

    folder = write_tokenizer(tmp_path / "chat", config={"eos_token": "<|im_end|>", "pad_token": "<pad>"})
    return tokenizer_json(folder, chat_template=CHATML)


@pytest.fixture
def write_jsonl(tmp_path):
    def write(rows: list[dict], name: str = "pairs.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def tiktoken_file(tmp_path) -> str:
    """A vocabulary of the 256 bytes and the merges "he", "ll", "hell", "hello", " t", " the"."""
    tokens = [bytes([b]) for b in range(256)] + [b"he", b"ll", b"hell", b"hello", b" t", b" the"]
    path = tmp_path / "tiktoken.model"
    path.write_text("".join(f"{base64.b64encode(t).decode()} {rank}\n" for rank, t in enumerate(tokens)))
    return str(path)


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory) -> str:
    lines = ["hello world the cat sat", "the dog and the cat", "hello again my friend"]
    return train_sentencepiece(tmp_path_factory.mktemp("sentencepiece"), lines, vocab_size=310)
