"""What is said of a run before its weights are read, against counts by hand and against the real thing."""

import shutil
from collections import namedtuple

import pytest
import torch
from support.commands import tune
from support.saved import saved_bytes

from tokenpref.distributed import single_process_world
from tokenpref.errors import ConfigError, DryRun
from tokenpref.training import ContrastiveReference, PreferenceTrainer
from tokenpref.training.config.command_line import load_config
from tokenpref.training.config.fields import read_config
from tokenpref.training.config.keys import TrainConfig
from tokenpref.training.loading import models
from tokenpref.training.loading.models import ModelMaker
from tokenpref.training.loading.preflight import bf16_fault, estimate_memory

WORLD = single_process_world()
Usage = namedtuple("Usage", "total used free")


def config(*overrides):
    return read_config(TrainConfig, load_config(["--config", "tiny/tdpo", *overrides]))


def memory(*overrides, tokens=96, **kwargs):
    read = config(*overrides)
    kwargs = {"device": torch.device("cpu"), "world_size": 1, "reference": True, **kwargs}
    return estimate_memory(read, ModelMaker(read, WORLD), tokens=tokens, **kwargs)


def policy():
    """The tiny policy on the meta device."""
    return ModelMaker(config(), WORLD).on_meta()


def parameters():
    return sum(p.numel() for p in policy().parameters())


def test_shares_of_the_models_by_hand():
    count, found = parameters(), memory()
    assert found.weights == found.gradients == found.reference == 4 * count
    assert found.optimizer == pytest.approx(
        8 * count, rel=1e-3
    )  # two moments, and a step count for each tensor
    assert found.head == 4 * 96 * policy().tok_embeddings.num_embeddings * 4
    assert found.copy == 0 and found.total == sum(vars(found).values())


def test_what_changes_them():
    count = parameters()
    assert memory("dtype=bf16").weights == 2 * count
    assert memory("optimizer=torch.optim.SGD").optimizer == 0
    assert memory("optimizer=torch.optim.SGD", "optimizer.momentum=0.9").optimizer == 4 * count
    two = memory(world_size=2)
    assert two.weights == 2 * count and two.optimizer == pytest.approx(4 * count, rel=1e-3)
    assert memory(reference=False).reference == 0
    background = memory("enable_async_checkpointing=true")
    assert background.copy == background.weights + background.optimizer
    assert memory("head_memory_mb=0.01").head == 2 * int(0.01 * 2**20) < memory().head
    assert memory("head_memory_mb=0.01", reference=False).head == int(0.01 * 2**20)


def test_activations_are_what_autograd_keeps(tmp_path, monkeypatch):
    """Counted beforehand on the meta device; here by the hooks of a real forward."""
    monkeypatch.chdir(tmp_path)
    trainer = PreferenceTrainer(load_config(["--config", "tiny/tdpo", "output_dir=mine"]))
    trainer.setup()
    model = trainer.policy.model
    with saved_bytes([*model.parameters(), *model.buffers()]) as kept:
        trainer.policy.hidden(torch.zeros(4, 32, dtype=torch.int64))
    trainer.close()
    real = sum(size for size, _ in kept.values())
    assert memory(tokens=128).activations == pytest.approx(real, rel=0.03)


def test_activation_checkpointing_keeps_less():
    whole, less = memory().activations, memory("enable_activation_checkpointing=true").activations
    layers = len(policy().layers)
    inputs = layers * policy().tok_embeddings.embedding_dim * 4 * 96
    assert less == pytest.approx(inputs + whole / layers, rel=1e-3) and less < whole


def test_selective_checkpointing_keeps_some_layers_whole():
    """Of two layers the second is checkpointed: the first is kept, the second's input, and the second computed again."""
    full, half = ["enable_activation_checkpointing=true"], ["ac_mode=selective", "ac_option=2"]
    whole, one_input = memory().activations, 32 * 4 * 96
    assert memory(*full, *half).activations == pytest.approx(one_input + whole, rel=1e-3)


def test_offloading_leaves_five_inputs_on_the_gpu(monkeypatch):
    monkeypatch.setattr("tokenpref.training.config.compute._on_cpu", lambda config: False)
    deep = ["enable_activation_checkpointing=true", "model.num_layers=20"]
    kept, moved = memory(*deep).activations, memory(*deep, "enable_activation_offloading=true").activations
    assert kept - moved == pytest.approx((20 - 5) * 32 * 4 * 96, abs=1)


def test_bfloat16_over_float32_weights():
    """Weights, gradients and moments are float32; the reference is kept in bfloat16, unless float8 is made of float32 shards."""
    plain, mixed, half = memory(), memory("compute_dtype=bf16"), memory("dtype=bf16")
    for name in ("weights", "gradients", "optimizer"):
        assert getattr(mixed, name) == getattr(plain, name)
    assert mixed.reference == half.reference == 2 * parameters() and mixed.activations == half.activations
    float8 = ["compute_dtype=bf16", "enable_fp8_training=true", "fp8_emulate=true"]
    assert memory(*float8).reference == 4 * parameters()
    assert memory(*float8, "fp8_recipe_name=rowwise").reference == 2 * parameters()


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**6, 10**6 - 1000, 1000))
    trainer = PreferenceTrainer(load_config(["--config", "tiny/tdpo", "output_dir=a/b"]))
    with pytest.raises(
        ConfigError, match=r"output_dir: .*a/b needs .* MiB .* and 0\.0 MiB are free there; make room"
    ):
        trainer.setup()
    trainer.close()
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["dtype=bf16", "optimizer.lr=5e-7"], "weights above 0.0003 in size cannot move"),  # 5e-7 * 512
        (["dtype=bf16", "optimizer.lr=1e-4"], None),
        (["dtype=fp32", "optimizer.lr=5e-7"], None),
    ],
    ids=["too small", "large enough", "float32"],
)
def test_a_rate_too_small_for_bfloat16(overrides, said):
    fault = bf16_fault(config(*overrides))
    assert fault is None if said is None else said in fault


def test_such_a_rate_moves_no_weight():
    """The rule of thumb itself: 0.02 and larger stay where they are, small ones move."""
    rate, weights = 1e-5, torch.tensor([0.02, 0.1, 1e-4], dtype=torch.bfloat16)
    assert rate < 0.02 * 2**-9
    assert ((weights - torch.tensor(rate, dtype=torch.bfloat16)) == weights).tolist() == [True, True, False]


def test_a_dry_run_says_everything_and_writes_nothing(tmp_path):
    words = [
        "recipes/tdpo_distributed",
        "--config",
        "tiny/tdpo",
        "dtype=bf16",
        "optimizer.lr=5e-7",
        "dry_run=true",
    ]
    for launch in ([], ["--nproc_per_node", "2"]):
        done = tune(tmp_path, *launch, *words)
        for part in (
            "64 pairs",
            "memory a process: about",
            "disk: ",
            "warning: optimizer.lr is 5e-07",
            "dry run: ",
        ):
            assert done.stderr.count(part) == 1, (part, done.stderr)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("contrastive_reference_distributed", "contrastive_reference"),
        ("ti_dpo_distributed", "ti_dpo"),
        ("evaluate_distributed", "evaluate"),
    ],
)
def test_every_recipe_has_it(tmp_path, recipe, name):
    done = tune(tmp_path, f"recipes/{recipe}", "--config", f"tiny/{name}", "dry_run=true")
    assert "dry run: " in done.stderr and not list(tmp_path.iterdir())


def test_it_does_not_load_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "read_weights", lambda *_: pytest.fail("weights were read"))
    trainer = PreferenceTrainer(load_config(["--config", "tiny/tdpo", "dry_run=true"]))
    with pytest.raises(DryRun):
        trainer.setup()
    trainer.close()


@pytest.mark.parametrize("method", ["prompt", "dpo"])
def test_a_dry_run_of_a_pair_with_nothing_left_to_train_writes_nothing(tmp_path, monkeypatch, method):
    """Prompts train nothing, and finished sides are not trained again: what is left to do is the writing."""
    monkeypatch.chdir(tmp_path)
    words = [
        f"method={method}",
        "positive_prompt=Be kind.",
        "negative_prompt=Be rude.",
        "max_steps_per_epoch=1",
    ]
    cfg = load_config(["--config", "tiny/contrastive_reference", "output_dir=pair", *words])
    if method == "dpo":
        built = ContrastiveReference(cfg.copy())
        built.run()
        built.close()
        (tmp_path / "pair/pair.yaml").unlink()
    before = sorted(tmp_path.rglob("*"))
    cfg.dry_run = True
    with pytest.raises(DryRun, match=r"nothing was written to .*pair"):
        ContrastiveReference(cfg).run()
    assert sorted(tmp_path.rglob("*")) == before
