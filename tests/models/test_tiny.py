from pathlib import Path

import pytest
import torch

from tokenpref.data import tokenizer_json
from tokenpref.models.tiny import tiny_llama

FOLDER = Path(__file__).parents[2] / "data" / "tiny" / "model"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from torchtune.training import FullModelHFCheckpointer

    checkpointer = FullModelHFCheckpointer(
        checkpoint_dir=str(FOLDER),
        checkpoint_files=["model.safetensors"],
        model_type="LLAMA3_2",
        output_dir=str(tmp_path_factory.mktemp("out")),
    )
    made = tiny_llama()
    made.load_state_dict(checkpointer.load_checkpoint()["model"])
    return made.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_json(FOLDER)


@torch.no_grad()
def test_its_distributions_are_neither_flat_nor_certain(model, tokenizer):
    ids, _ = tokenizer.encode_with_offsets("The soup was good and warm.")
    logps = model(torch.tensor([ids]))[0].log_softmax(-1)
    entropy = -(logps.exp() * logps).sum(-1)
    assert (entropy > 1).all() and (entropy < 5.9).all()  # ln 384 = 5.95 would be uniform
    assert (logps.exp().amax(-1) > 2 / 384).all()


def test_its_tokenizer_covers_any_text(model, tokenizer):
    assert tokenizer.vocab_size == model.tok_embeddings.num_embeddings == 384
    text = "The soup was good. naïve 你好 🙂\n\t\x00 12"
    ids, spans = tokenizer.encode_with_offsets(text)
    assert tokenizer.decode(ids) == text and spans[-1][1] == len(text)
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id) == (0, 1, None)
    assert len(tokenizer.encode_with_offsets("The soup was good and warm.")[0]) < 14  # merges of its own text


def test_its_chat_template(tokenizer):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    assert tokenizer.render_chat(messages, False) == "<|user|>Hi<|assistant|>Ho<|end|>"
    assert tokenizer.render_chat(messages[:1], True) == "<|user|>Hi<|assistant|>"


@torch.no_grad()
def test_transformers_reads_the_same_model(model, tokenizer):
    transformers = pytest.importorskip("transformers")
    other = transformers.AutoModelForCausalLM.from_pretrained(str(FOLDER), dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode_with_offsets("Our train ride felt great fun for all.")[0]])
    torch.testing.assert_close(other.eval()(ids).logits, model(ids), atol=1e-5, rtol=0)
    twin = transformers.AutoTokenizer.from_pretrained(str(FOLDER))
    assert (
        twin("The soup was 你好<|end|>").input_ids
        == tokenizer.encode_with_offsets("The soup was 你好<|end|>")[0]
    )
    assert (twin.eos_token_id, twin.pad_token_id) == (tokenizer.eos_id, tokenizer.pad_id)


def test_other_depths_can_be_built():
    assert len(tiny_llama(num_layers=3, max_seq_len=64).layers) == 3
