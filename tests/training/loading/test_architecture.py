"""A model that is not its checkpoint's is refused before weights are read, in every recipe that reads weights."""

import json
import re
import shutil
from dataclasses import replace

import pytest
from omegaconf import OmegaConf
from support.published import FAMILIES

from tokenpref._paths import data_root
from tokenpref._registry import config_files
from tokenpref.distributed import single_process_world
from tokenpref.errors import ConfigError, DryRun
from tokenpref.training import ContrastiveReference, Evaluator, PreferenceTrainer, WeightEstimation
from tokenpref.training.config.command_line import load_config
from tokenpref.training.config.fields import Component
from tokenpref.training.config.keys import ScoringConfig
from tokenpref.training.loading.architecture import check_architecture
from tokenpref.training.loading.models import ModelMaker

PUBLISHED = {
    "tokenpref.models.smollm2_135m": "smollm2",
    "torchtune.models.llama2.llama2_7b": "llama2",
    "torchtune.models.llama3_1.llama3_1_8b": "llama3_1",
    "torchtune.models.llama3_2.llama3_2_1b": "llama3_2",
    "torchtune.models.llama3_2.llama3_2_3b": "llama3_2_3b",
    "torchtune.models.mistral.mistral_7b": "mistral",
    "torchtune.models.qwen2_5.qwen2_5_0_5b": "qwen2_5",
    "torchtune.models.qwen2_5.qwen2_5_3b": "qwen2_5_3b",
    "torchtune.models.qwen2_5.qwen2_5_7b_instruct": "qwen2_5_7b",
}
TINY = data_root() / "data" / "tiny" / "model"


@pytest.fixture
def other(tmp_path, monkeypatch):
    """A copy of the tiny model, and a way to change its config.json; its weights are damaged: nobody may read them."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY, "other")
    (tmp_path / "other" / "model.safetensors").write_bytes(b"unread")

    def change(**numbers):
        file = tmp_path / "other" / "config.json"
        config = json.loads(file.read_text()) | numbers
        file.write_text(json.dumps(config))

    return change


def dry(kind, name, *words):
    recipe = kind(load_config(["--config", name, "dry_run=true", *words]))
    try:
        return recipe.setup() if hasattr(recipe, "setup") else recipe.run()
    finally:
        recipe.close()


RECIPES = {
    "policy": (PreferenceTrainer, "tiny/tdpo", ("checkpointer.checkpoint_dir=other",)),
    "reference": (
        PreferenceTrainer,
        "tiny/tdpo",
        (
            "ref_checkpointer={_component_: torchtune.training.FullModelHFCheckpointer, checkpoint_dir: other, "
            "checkpoint_files: [model.safetensors], output_dir: out, model_type: LLAMA3_2}",
        ),
    ),
    "pair of prompts": (
        ContrastiveReference,
        "tiny/contrastive_reference",
        ("checkpointer.checkpoint_dir=other", "method=prompt", "positive_prompt=a", "negative_prompt=b"),
    ),
    "pair of trained sides": (
        ContrastiveReference,
        "tiny/contrastive_reference",
        ("checkpointer.checkpoint_dir=other",),
    ),
    "evaluation": (Evaluator, "tiny/evaluate", ("checkpointer.checkpoint_dir=other",)),
    "attribution": (
        WeightEstimation,
        "tiny/estimate_weights_attribution",
        ("checkpointer.checkpoint_dir=other",),
    ),
}


@pytest.mark.parametrize("place", RECIPES)
def test_every_difference_is_named_at_once(other, place):
    kind, name, words = RECIPES[place]
    with pytest.raises(DryRun):
        dry(kind, name, *words)
    other(num_attention_heads=8, num_key_value_heads=4, rope_theta=5e5, rms_norm_eps=1e-6)
    with pytest.raises(ConfigError) as refused:
        dry(kind, name, *words)
    said = str(refused.value)
    for part in (
        "num_attention_heads is 8 there and 4 in the model",
        "num_key_value_heads is 4 there and 2",
        "rope_theta is 500000.0 there and 10000",
        "rms_norm_eps is 1e-06 there and 1e-05",
        "other/config.json",
    ):
        assert part in said


def test_the_argument_to_set_is_named(other):
    other(hidden_size=32, rope_theta=5e5)
    with pytest.raises(ConfigError, match=r"rope_theta is 500000.0 .*\(set model.rope_base=500000.0\)"):
        dry(
            PreferenceTrainer,
            "tiny/tdpo",
            "checkpointer.checkpoint_dir=other",
            "model=torchtune.models.llama3_2.llama3_2",
            "model.vocab_size=384",
            "model.num_layers=2",
            "model.num_heads=4",
            "model.num_kv_heads=2",
            "model.embed_dim=32",
            "model.intermediate_dim=64",
            "model.max_seq_len=256",
            "model.rope_base=10000",
            "model.scale_factor=1",
        )


def test_a_builder_without_the_argument_gets_its_familys_general_one(other):
    other(rope_theta=1e7)
    with pytest.raises(
        ConfigError, match=r"use torchtune.models.mistral.mistral and set model.rope_base=10000000.0"
    ):
        dry(
            PreferenceTrainer,
            "tiny/tdpo",
            "checkpointer.checkpoint_dir=other",
            "model=torchtune.models.mistral.mistral_7b",
        )


def test_the_order_of_rotary_pairs(other):
    with pytest.raises(
        ConfigError, match=r"checkpointer.model_type: QWEN2 reads queries and keys in another order"
    ):
        dry(
            PreferenceTrainer,
            "tiny/tdpo",
            "checkpointer.checkpoint_dir=other",
            "checkpointer.model_type=QWEN2",
        )


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_damaged_config_is_named(other, tmp_path, text):
    (tmp_path / "other" / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config.json"):
        dry(PreferenceTrainer, "tiny/tdpo", "checkpointer.checkpoint_dir=other")


def test_without_a_config_the_log_says_that_nothing_was_compared(other, tmp_path, caplog):
    (tmp_path / "other" / "config.json").unlink()
    with caplog.at_level("INFO", "tokenpref"), pytest.raises(DryRun):
        dry(
            PreferenceTrainer,
            "tiny/tdpo",
            "checkpointer=torchtune.training.FullModelTorchTuneCheckpointer",
            "checkpointer.checkpoint_dir=other",
            "checkpointer.checkpoint_files=[model.safetensors]",
            "checkpointer.output_dir=out",
            "checkpointer.model_type=LLAMA3_2",
        )
    assert "holds no config.json" in caplog.text


def names_a_builder(config):
    """Whether a config names a builder with numbers of its own; ``causal_lm`` takes those of its checkpoint's folder."""
    return "model:" in config and "tokenpref.models.causal_lm" not in config


@pytest.mark.parametrize(
    "name", sorted(name for name, file in config_files().items() if names_a_builder(file.read_text()))
)
def test_the_shipped_configs_name_the_model_of_their_checkpoint(name, tmp_path):
    config = OmegaConf.to_container(OmegaConf.load(config_files()[name]), resolve=True)
    parts = {}
    for key in ("model", "checkpointer"):
        node = dict(config[key])
        parts[key] = Component(key, node.pop("_component_"), node)
    path = re.sub(r"\.q?lora_", ".", parts["model"].path)  # adapters have the base's config.json
    if path == "tokenpref.models.tiny_llama":
        shutil.copy(TINY / "config.json", tmp_path)
    else:
        (tmp_path / "config.json").write_text(json.dumps(FAMILIES[PUBLISHED[path]][1]))
    reader = replace(
        parts["checkpointer"], kwargs=parts["checkpointer"].kwargs | {"checkpoint_dir": str(tmp_path)}
    )
    longest = config.get("dataset", {}).get("max_seq_len", 512)
    settings = ScoringConfig(
        output_dir="unused", tokenizer=Component("tokenizer", "unused", {}), dtype="bf16"
    )
    decoder = ModelMaker(settings, single_process_world(), model=parts["model"]).on_meta()
    assert check_architecture(reader, parts["model"], decoder, longest=longest) == []
