"""README.md and docs/models.md list the architectures of transformers that tests/models/test_causal_lm.py and this file test."""

import json
import re
from pathlib import Path

import pytest
import torch
from support import families

from tokenpref.errors import ConfigError
from tokenpref.models import causal_lm
from tokenpref.models.decoder_of import decoder_of

ROOT = Path(__file__).parents[2]
PAGE, README = ((ROOT / name).read_text(encoding="utf-8") for name in ("docs/models.md", "README.md"))


def listed(header):
    """The values of ``model_type`` in the table of docs/models.md that begins with a header."""
    table = PAGE.split(f"| {header} |")[1].split("\n\n")[0]
    return set(re.findall(r"`([a-z0-9_]+)`", table.partition("\n")[2]))


PACKED, PADDED, REFUSED = map(listed, ("works without padding", "needs `padding_free=false`", "refused"))
NAMES = {
    "llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral", "ministral": "Ministral", "gemma2": "Gemma 2",
    "gemma3_text": "Gemma 2 and 3", "olmo2": "OLMo 2", "olmo3": "OLMo 2 and 3", "smollm3": "SmolLM3", "granite": "Granite",
    "phi3": "Phi-3", "glm4": "GLM-4", "cohere2": "Cohere 2", "exaone4": "EXAONE 4", "seed_oss": "Seed-OSS", "helium": "Helium",
    "starcoder2": "StarCoder2", "gpt_neox": "GPT-NeoX", "ernie4_5": "ERNIE 4.5", "hunyuan_v1_dense": "Hunyuan",
    "qwen3_moe": "Qwen3-MoE", "mixtral": "Mixtral", "olmoe": "OLMoE", "deepseek_v3": "DeepSeek-V3", "stablelm": "StableLM",
    "nemotron": "Nemotron", "gpt_oss": "gpt-oss", "lfm2": "LFM2", "llama4_text": "Llama 4", "qwen3_next": "Qwen3-Next",
}  # fmt: skip
ALONE = {"qwen3_next": {}, "phi": {}, "gptj": {}, "opt": {}}
"""Architectures that only this file tests."""


@pytest.fixture
def decoder(tmp_path):
    """A model with small random weights, as a decoder."""

    def build(kind):
        path = families.folder_of(tmp_path, families.config_of(kind, ALONE[kind]))
        return decoder_of(families.randomise(causal_lm(path)).eval())

    return build


def test_the_page_lists_what_is_tested():
    # LFM2 without its convolutions works, but no published one is without.
    assert PACKED == set(families.FAMILIES) - {"lfm2"}
    assert PADDED | REFUSED == {kind for kind, _ in families.PADDED.values()} | set(ALONE)
    assert not PADDED & REFUSED


def test_the_readme_lists_the_same():
    by_causal_lm = [
        row for row in README.split("### Which models")[1].split("\n\n")[1].splitlines() if row[:2] == "| "
    ]
    text = {True: " ".join(by_causal_lm[3:5]), False: by_causal_lm[5]}
    assert "causal_lm" in by_causal_lm[3] and "padding_free=false" in text[False]
    for kind in PACKED | PADDED:
        assert re.search(rf"\b{NAMES[kind]}\b", text[kind in PACKED]), kind


def test_layers_that_mix_neighbours_otherwise_need_padding(decoder):
    decoder("qwen3_next").prove(padding_free=False)
    found = decoder("qwen3_next")
    found.install_padding_free()
    with pytest.raises(ConfigError, match="set padding_free=false"):
        found.prove(padding_free=True)


@pytest.mark.parametrize("kind", sorted(REFUSED))
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
    "num_attention_heads": 2,
}


def test_a_model_that_also_sees_images_is_built_as_a_language_model(tmp_path):
    text = families.config_of("gemma3_text").to_dict()
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
