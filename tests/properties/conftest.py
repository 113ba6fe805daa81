"""The same examples at every run, and tokenizers of three kinds."""

from __future__ import annotations

import base64
import tempfile

import pytest
from hypothesis import configuration, settings
from support.tokenizers import train_sentencepiece

from tokenpref.data import Tokenizer, adapt_tokenizer, tokenizer_json

# Derandomised, so that a change that breaks nothing cannot fail by a new example. No database, and what hypothesis
# keeps besides (tables of characters) in a folder that goes with the process: no `.hypothesis` in the repository.
_home = tempfile.TemporaryDirectory(prefix="hypothesis-")
configuration.set_hypothesis_home_dir(_home.name)
settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """Byte-level BPE with special tokens and a chat template; it has no BOS of its own, any control token will do."""
    return tokenizer_json("package://data/tiny/model", bos_token="<|pad|>")


@pytest.fixture(scope="session")
def tiktoken_tokenizer(tmp_path_factory) -> Tokenizer:
    """torchtune's Llama 3 over the 256 bytes and merges, one of which ends inside a character."""
    from torchtune.models.llama3 import llama3_tokenizer

    merges = [b"he", b"ll", b"hell", b"hello", b" t", b" the", "é".encode(), b"\xf0\x9f", b" \xf0\x9f"]
    tokens = [bytes([b]) for b in range(256)] + merges
    path = tmp_path_factory.mktemp("tiktoken") / "tokenizer.model"
    path.write_text("".join(f"{base64.b64encode(t).decode()} {rank}\n" for rank, t in enumerate(tokens)))
    return adapt_tokenizer(llama3_tokenizer(str(path)))


@pytest.fixture(scope="session")
def sentencepiece_tokenizer(tmp_path_factory) -> Tokenizer:
    """torchtune's Llama 2 over a model with byte fallback."""
    from torchtune.models.llama2 import llama2_tokenizer

    lines = ["hello world the cat sat", "hello again my friend"]
    return adapt_tokenizer(
        llama2_tokenizer(train_sentencepiece(tmp_path_factory.mktemp("sentencepiece"), lines, vocab_size=300))
    )


@pytest.fixture(scope="session", params=["byte", "tiktoken", "sentencepiece"])
def tokenizer(request) -> Tokenizer:
    return request.getfixturevalue(f"{request.param}_tokenizer")
