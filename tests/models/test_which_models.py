"""The tables of docs/models.md: which architectures of transformers work without padding, which need it, which are refused."""

import json
import re
from pathlib import Path

import pytest
import torch

from tokenpref.errors import ConfigError
from tokenpref.models import causal_lm
from tokenpref.models.decoder_of import decoder_of

TEXT = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")


def listed(header):
    """The values of ``model_type`` in the table that begins with a header."""
    table = TEXT.split(f"| {header} |")[1].split("\n\n")[0]
    return re.findall(r"`([a-z0-9_]+)`", table.partition("\n")[2])


PACKED, PADDED, REFUSED = map(listed, ("works without padding", "needs `padding_free=false`", "refused"))
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2}
OWN = {
    "gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 5},
    "gemma3_text": {"query_pre_attn_scalar": 8, "sliding_window": 5},
    "mistral": {"sliding_window": 6},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "mixtral": EXPERTS,
    "qwen3_moe": EXPERTS,
    "olmoe": EXPERTS,
    "deepseek_v3": {
        "head_dim": 4,
        "num_key_value_heads": 4,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 6,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "llama4_text": {**EXPERTS, "intermediate_size_mlp": 48, "attention_chunk_size": 8192},
}


@pytest.fixture
def decoder(tmp_path):
    """A model of a kind with small random weights, as a decoder."""
    from transformers import AutoConfig

    def build(kind):
        config = AutoConfig.for_model(kind, **{**SIZES, **OWN.get(kind, {})})
        (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = causal_lm(str(tmp_path)).eval()
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.data.normal_(0, 0.2)
        return decoder_of(model)

    return build


def test_the_page_lists_the_architectures():
    assert len(PACKED) >= 20 and len(PADDED) >= 5 and len(REFUSED) >= 3
    assert not set(PACKED) & set(PADDED) and not set(PACKED + PADDED) & set(REFUSED)


@pytest.mark.parametrize("kind", PACKED)
def test_what_works_without_padding(decoder, kind):
    found = decoder(kind)
    found.check()
    found.install_padding_free()
    found.prove(padding_free=True)


@pytest.mark.parametrize("kind", PADDED)
def test_what_needs_padding(decoder, kind):
    decoder(kind).prove(padding_free=False)
    found = decoder(kind)
    found.install_padding_free()
    with pytest.raises(ConfigError, match="set padding_free=false"):
        found.prove(padding_free=True)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(decoder, kind):
    found = decoder(kind)

    def use():
        found.check()
        return found.layers

    with pytest.raises((TypeError, ConfigError), match="a Linear with a bias|keeps its layers in 0 lists"):
        use()


IMAGES = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
}


def test_a_model_that_also_sees_images_is_built_as_a_language_model(tmp_path):
    text = {"model_type": "gemma3_text", **SIZES}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gemma3", "text_config": text, "vision_config": IMAGES})
    )
    with torch.device("meta"):
        model = causal_lm(str(tmp_path), lora={"rank": 2})
    assert type(model).__name__ == "Gemma3ForCausalLM" and model.config.model_type == "gemma3_text"
    assert all(name.startswith("model.") for name, _ in model.named_parameters())


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_a_model_of_another_purpose_is_refused(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ConfigError, match="makes no causal language model of it .*name the folder of one"):
        causal_lm(str(tmp_path))
