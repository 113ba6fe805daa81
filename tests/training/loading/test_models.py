"""The one maker of models: which weights each model gets, what trains, and what is known without weights."""

import pytest
import torch

from tokenpref.distributed import single_process_world
from tokenpref.errors import ConfigError
from tokenpref.training import PreferenceTrainer
from tokenpref.training.config.command_line import load_config
from tokenpref.training.config.fields import Component, read_config
from tokenpref.training.config.keys import ScoringConfig, TrainConfig
from tokenpref.training.loading import models
from tokenpref.training.loading.models import ModelMaker

WORLD = single_process_world()


def maker(*overrides):
    return ModelMaker(read_config(TrainConfig, load_config(["--config", "tiny/tdpo", *overrides])), WORLD)


def test_the_policy_trains_and_the_reference_does_not():
    made = maker()
    policy, reference = made.policy(trainable=True), made.reference().scorer
    assert len(policy.trainable_parameters()) == len(list(policy.model.parameters()))
    assert policy.model.training
    assert reference.trainable_parameters() == [] and not reference.model.training
    assert made.policy().trainable_parameters() == []
    for own, other in zip(policy.model.parameters(), reference.model.parameters(), strict=True):
        assert torch.equal(own, other)


def test_the_checkpointer_that_read_the_policy_is_the_one_that_writes_it():
    made = maker()
    made.policy()
    assert made.checkpointer is made.checkpointer


def test_a_side_has_its_own_weights_and_its_own_name(tmp_path):
    made = maker()
    reader = made.config.checkpointer
    missing = Component(reader.key, reader.path, reader.kwargs | {"checkpoint_files": ["other.safetensors"]})
    with pytest.raises(ConfigError, match="other.safetensors"):
        made.side(missing, "pair's positive side")
    side = made.side(reader, "pair's positive side")
    assert side.trainable_parameters() == []


def test_what_is_known_without_weights(monkeypatch):
    monkeypatch.setattr(models, "read_weights", lambda *_: pytest.fail("weights were read"))
    made = maker()
    decoder = made.on_meta()
    assert {p.device.type for p in decoder.parameters()} == {"meta"}
    count = sum(p.numel() for p in decoder.parameters())
    assert made.context == decoder.max_seq_len
    assert made.vocabulary == decoder.tok_embeddings.num_embeddings
    assert made.reference_nbytes == 4 * count
    assert maker("compute_dtype=bf16").reference_nbytes == 2 * count
    assert {p.dtype for p in made.on_meta(torch.bfloat16).parameters()} == {torch.bfloat16}


def test_a_config_without_a_model_needs_one_named():
    settings = ScoringConfig(output_dir="unused", tokenizer=Component("tokenizer", "unused", {}))
    with pytest.raises(ValueError, match="model="):
        ModelMaker(settings, WORLD)
    with pytest.raises(ValueError, match="checkpointer="):
        _ = ModelMaker(settings, WORLD, model=Component("model", "tokenpref.models.tiny_llama", {})).policy()


def test_a_run_trains_counts_and_clips_what_the_maker_says_trains(tmp_path, monkeypatch):
    """A maker that leaves only the norms to be trained: the optimizer, the step and the files follow it."""
    monkeypatch.chdir(tmp_path)

    def only_norms(decoder, trainable):
        for name, parameter in decoder.named_parameters():
            parameter.requires_grad_(trainable and "norm" in name or trainable and "scale" in name)
        return decoder

    monkeypatch.setattr(models, "choose_trainable", only_norms)
    trainer = PreferenceTrainer(
        load_config(["--config", "tiny/tdpo", "output_dir=mine", "max_steps_per_epoch=2"])
    )
    trainer.setup()
    before = {name: p.detach().clone() for name, p in trainer.policy.model.named_parameters()}
    trainer.train()
    trainer.close()
    moved = {n for n, p in trainer.policy.model.named_parameters() if not torch.equal(p, before[n])}
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert moved and all("norm" in name or "scale" in name for name in moved)
    assert len(held) == len(trainer.policy.trainable_parameters()) < len(before)
