"""Every config that comes with the package: read, checked, and its components built on the meta device."""

import pytest
import torch
from omegaconf import OmegaConf

from tokenpref._registry import config_files, recipe_of
from tokenpref._torchtune import TransformerDecoder
from tokenpref.models.scoring import install_head
from tokenpref.training import Evaluator, PreferenceTrainer, config
from tokenpref.training.config import EvaluateConfig, TrainConfig, loss_faults
from tokenpref.training.schema import read_config

RECIPES = {
    "tdpo_distributed": (TrainConfig, PreferenceTrainer),
    "evaluate_distributed": (EvaluateConfig, Evaluator),
}
FILES = config_files()


@pytest.fixture(params=sorted(FILES))
def shipped(request, monkeypatch):
    # The weights of the larger models are not here; their paths are the user's to make.
    monkeypatch.setattr(config, "checkpoint_faults", lambda checkpointer, model: [])
    file = FILES[request.param]
    schema, recipe = RECIPES[recipe_of(file.stem)]
    return file, read_config(
        schema, OmegaConf.load(file), lambda c: loss_faults(c.loss, recipe.provides, recipe.recipe)
    )


def test_components_can_be_built(shipped):
    _, cfg = shipped
    with torch.device("meta"):
        model = cfg.model.build()
    assert isinstance(model, TransformerDecoder)
    install_head(model)
    assert cfg.loss.build().needs
    if isinstance(cfg, TrainConfig):
        optimizer = cfg.optimizer.build(model.parameters())
        if cfg.lr_scheduler is not None:
            scheduler = cfg.lr_scheduler.build(optimizer, num_training_steps=10, last_epoch=-1)
            assert scheduler.get_last_lr()[0] > 0
        profiler, settings = cfg.profiler.build()
        assert not settings.enabled


def test_output_folder_is_the_configs_own(shipped):
    file, cfg = shipped
    name = f"{file.parent.name}_{file.stem}"
    assert cfg.output_dir == f"outputs/{name}"


def test_the_header_shows_its_command(shipped):
    file, _ = shipped
    text = file.read_text()
    name = f"{file.parent.name}/{file.stem}"
    assert f"recipes/{recipe_of(file.stem)} --config {name}" in text


def test_paper_settings_are_the_papers():
    """TDPO's appendix B: alpha 0.5, beta 0.1, RMSprop 5e-6, warm-up 150, 64 pairs a step, lengths 256 and 512, clip 10."""
    for name in ("llama3_2/1B_tdpo", "qwen2_5/0.5B_tdpo", "mistral/7B_tdpo"):
        cfg = OmegaConf.load(FILES[name])
        gpus = int(FILES[name].read_text().split("--nproc_per_node ")[1].split()[0])
        assert cfg.batch_size * cfg.gradient_accumulation_steps * gpus == 64
        assert (cfg.loss.beta, cfg.loss.alpha, cfg.loss.variant) == (0.1, 0.5, "tdpo2")
        assert (cfg.optimizer._component_, cfg.optimizer.lr) == ("torch.optim.RMSprop", 5e-6)
        assert cfg.lr_scheduler.num_warmup_steps == 150 and cfg.clip_grad_norm == 10.0
        assert (cfg.dataset.max_prompt_len, cfg.dataset.max_seq_len) == (256, 512)
