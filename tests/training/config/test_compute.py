"""Precision, float8 and checkpointing in whole runs of one process, on the tiny model."""

import math
import re

import pytest
import torch
from safetensors.torch import load_file
from support import small

from tokenpref._paths import data_root
from tokenpref._torchtune import TransformerDecoder
from tokenpref.distributed import compute_dtype_of, init_world, shard, single_process_world
from tokenpref.errors import ConfigError
from tokenpref.models.float8 import Float8
from tokenpref.models.generation import sample
from tokenpref.training import ContrastiveReference, PreferenceTrainer, TripletTrainer
from tokenpref.training.config.command_line import load_config
from tokenpref.training.config.compute import Compute
from tokenpref.training.config.fields import read_config
from tokenpref.training.config.keys import EvaluateConfig, TrainConfig

EMULATED = ("enable_fp8_training=true", "fp8_emulate=true")
QUIET = ("log_stats=[]", "run_val_every_n_steps=null")
LOG_2 = math.log(2)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Train a tiny config with overrides; returns the trainer."""
    monkeypatch.chdir(tmp_path)

    def train(*overrides, config="tiny/tdpo", trainer_class=PreferenceTrainer):
        trainer = trainer_class(load_config(["--config", config, *overrides]))
        try:
            trainer.setup()
            trainer.train()
        finally:
            trainer.close()
        return trainer

    return train


def losses(folder):
    lines = [
        line for file in sorted((folder / "logs").glob("*.txt")) for line in file.read_text().splitlines()
    ]
    return [float(found[1]) for line in lines if (found := re.search(r" loss:(\S+)", line))]


def weights(folder):
    return load_file(folder / "epoch_0" / "model-00001-of-00001.safetensors")


def compute(*overrides, trainable=True):
    return read_config(TrainConfig, load_config(["--config", "tiny/tdpo", *overrides])).compute(
        trainable=trainable
    )


def test_what_the_keys_mean():
    assert compute() == compute(trainable=False) == Compute(dtype=torch.float32)
    assert compute("dtype=bf16").dtype == torch.bfloat16
    full, half = compute("enable_activation_checkpointing=true"), ("ac_mode=selective", "ac_option=2")
    assert full.checkpoint_every == 1
    assert compute("enable_activation_checkpointing=true", *half).checkpoint_every == 2
    assert compute(*EMULATED).float8 == Float8("tensorwise", emulate=True)
    assert compute(*EMULATED, "fp8_recipe_name=rowwise").float8 == Float8("rowwise", emulate=True)
    evaluated = read_config(EvaluateConfig, load_config(["--config", "tiny/evaluate", "dtype=bf16"]))
    assert evaluated.compute(trainable=True) == Compute(dtype=torch.bfloat16)


def test_the_reference_computes_as_the_policy_does_and_keeps_what_that_takes():
    mixed = ("compute_dtype=bf16", "enable_activation_checkpointing=true")
    assert compute(*mixed).compute_dtype == torch.bfloat16
    assert compute(*mixed, trainable=False) == Compute(dtype=torch.bfloat16)
    rows = compute(*mixed, *EMULATED, "fp8_recipe_name=rowwise", trainable=False)
    assert rows == Compute(dtype=torch.bfloat16, float8=Float8("rowwise", emulate=True))
    # FSDP2 casts float32 shards to float8: bfloat16 ones would give other numbers.
    whole = compute(*mixed, *EMULATED, trainable=False)
    assert (whole.dtype, whole.compute_dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    "settings",
    [
        EMULATED,
        (*EMULATED, "fp8_recipe_name=rowwise"),
        (*EMULATED, "fp8_recipe_name=rowwise_with_gw_hp"),
        ("compute_dtype=bf16",),
        (*EMULATED, "compute_dtype=bf16"),
        (*EMULATED, "compute_dtype=bf16", "fp8_recipe_name=rowwise", "enable_activation_checkpointing=true"),
    ],
    ids=[
        "tensorwise",
        "rowwise",
        "rowwise_with_gw_hp",
        "bf16",
        "tensorwise, bf16",
        "rowwise, bf16, checkpointed",
    ],
)
def test_losses_start_at_log_2_and_stay_near_float32s(run, tmp_path, settings):
    run("output_dir=plain", *QUIET)
    trainer = run("output_dir=this", *QUIET, *settings)
    plain, found = losses(tmp_path / "plain"), losses(tmp_path / "this")
    assert found[0] == pytest.approx(LOG_2, abs=1e-7)
    assert found == pytest.approx(plain, rel=0.02) and found != plain
    assert all(p.dtype == torch.float32 for p in trainer.policy.model.parameters())
    mine, its = weights(tmp_path / "this"), weights(tmp_path / "plain")
    assert {n: (t.dtype, t.shape) for n, t in mine.items()} == {n: (t.dtype, t.shape) for n, t in its.items()}


def test_float8_is_in_every_layer_of_both_models_and_not_in_the_head(run):
    trainer = run("output_dir=this", *QUIET, *EMULATED, "max_steps_per_epoch=1")
    for scorer in (trainer.policy, trainer.reference.scorer):
        kinds = {
            name: type(m).__name__ for name, m in scorer.model.named_modules() if hasattr(m, "in_features")
        }
        assert len(kinds) == 14 and set(kinds.values()) == {"Float8Linear"}


def test_a_run_in_bfloat16_keeps_what_bfloat16_would_round_away(run, tmp_path):
    """A rate of 1e-5 moves no weight of 0.02 in bfloat16 (2^-9 of it is 4e-5), and moves it in float32."""
    small_steps = ("optimizer.lr=1e-5", "max_steps_per_epoch=2", *QUIET)
    run("output_dir=mixed", "compute_dtype=bf16", *small_steps)
    run("output_dir=half", "dtype=bf16", *small_steps)
    start = load_file(data_root() / "data/tiny/model/model.safetensors")
    name = next(n for n in start if n.endswith("q_proj.weight"))
    large = start[name].abs() > 0.02
    assert large.any()
    moved = weights(tmp_path / "mixed")[name] != start[name]
    assert moved[large].all()
    rounded = start[name].bfloat16()
    assert (weights(tmp_path / "half")[name] == rounded)[large].all()


@pytest.mark.parametrize(
    "settings",
    [EMULATED, ("compute_dtype=bf16",), ("optimizer.fused=true",)],
    ids=["float8", "bf16", "fused"],
)
def test_a_run_that_goes_on_ends_at_the_same_bits(run, tmp_path, settings):
    steps = ("checkpoint_every_n_steps=3", "keep_last=9", *QUIET, *settings)
    run("output_dir=whole", *steps)
    whole = weights(tmp_path / "whole")
    run("output_dir=whole", *steps, "resume_from_checkpoint=whole/checkpoints/step_3")
    assert losses(tmp_path / "whole")[-5:] == losses(tmp_path / "whole")[3:8]
    for name, tensor in weights(tmp_path / "whole").items():
        assert tensor.equal(whole[name]), name


def test_a_float8_checkpoint_goes_on_without_float8(run, tmp_path):
    """What is kept are plain weights; the same way back."""
    steps = ("output_dir=this", "checkpoint_every_n_steps=3", "keep_last=9", *QUIET)
    run(*steps, *EMULATED, "compute_dtype=bf16")
    run(*steps, "resume_from_checkpoint=this/checkpoints/step_3")
    found = losses(tmp_path / "this")
    assert found[8:] == pytest.approx(found[3:8], rel=0.02) and found[8:] != found[3:8]
    run(*steps, *EMULATED, "compute_dtype=bf16", "resume_from_checkpoint=this/checkpoints/step_6")
    assert losses(tmp_path / "this")[13:] == pytest.approx(found[6:8], rel=0.02)


def test_fused_adamw_changes_only_rounding(run, tmp_path):
    run("output_dir=plain", *QUIET)
    trainer = run("output_dir=fused", "optimizer.fused=true", *QUIET)
    assert trainer.optimizer.param_groups[0]["fused"] is True
    assert losses(tmp_path / "fused") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)


def test_selective_checkpointing_changes_no_bit(run, tmp_path):
    run("output_dir=plain", *QUIET)
    trainer = run(
        "output_dir=lean", "enable_activation_checkpointing=true", "ac_mode=selective", "ac_option=2", *QUIET
    )
    wrapped = [hasattr(layer, "_checkpoint_wrapped_module") for layer in trainer.policy.model.layers]
    assert wrapped == [False, True]
    assert losses(tmp_path / "lean") == losses(tmp_path / "plain")
    for name, tensor in weights(tmp_path / "plain").items():
        assert tensor.equal(weights(tmp_path / "lean")[name]), name


def test_attribution_and_sampled_anchors_work_in_bfloat16_and_float8(run, tmp_path):
    """Anchors are sampled with a KV cache in the dtype that the model computes in, which is not its weights'."""
    for name, settings in {
        "plain": (),
        "mixed": ("compute_dtype=bf16",),
        "float8": ("compute_dtype=bf16", *EMULATED),
    }.items():
        run(
            f"output_dir={name}",
            "max_steps_per_epoch=3",
            *settings,
            config="tiny/ti_dpo",
            trainer_class=TripletTrainer,
        )
    plain = losses(tmp_path / "plain")
    for name in ("mixed", "float8"):
        assert losses(tmp_path / name) == pytest.approx(plain, rel=0.02)


def test_a_pair_is_built_in_bfloat16_in_one_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["max_steps_per_epoch=2", "compute_dtype=bf16", "output_dir=pair"]
    builder = ContrastiveReference(load_config(["--config", "tiny/contrastive_reference", *words]))
    folder = builder.run()
    assert builder.world.is_distributed and builder.world.size == 1
    builder.close()
    assert (folder / "pair.yaml").is_file()


def test_a_world_of_one_computes_and_samples_in_another_dtype():
    plain = single_process_world()
    half, mixed = (small.decoder(0, dtype=torch.float32) for _ in range(2))
    # No buffers: FSDP2 leaves the angles of rotary embeddings in float32.
    for parameter in half.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    with pytest.raises(ValueError, match="compute_dtype needs FSDP2 and so a world with a mesh"):
        shard(mixed, list(mixed.layers), plain, compute_dtype=torch.bfloat16)
    world = init_world("cpu", process_group=True)
    try:
        shard(mixed, list(mixed.layers), world, compute_dtype=torch.bfloat16)
        assert compute_dtype_of(mixed) == compute_dtype_of(half) == torch.bfloat16
        settings = {"seeds": [1, 2], "max_new_tokens": 8, "eos_id": 60, "pad_id": 0, "temperature": 1.0}
        drawn = [
            sample(model, [[1, 2, 3], [4]], world=its, **settings)
            for model, its in ((half, plain), (mixed, world))
        ]
        assert drawn[0] == drawn[1]
    finally:
        world.close()


def test_a_gpu_that_cannot_is_refused_before_weights_are_read(run, monkeypatch):
    monkeypatch.setattr("tokenpref.training.config.compute._on_cpu", lambda config: False)
    monkeypatch.setattr(
        TransformerDecoder, "load_state_dict", lambda *args, **kwargs: pytest.fail("weights were read")
    )
    with pytest.raises(
        ConfigError, match="enable_fp8_training: float8 products need a GPU of compute capability 8.9"
    ):
        run("output_dir=this", "enable_fp8_training=true")


@pytest.mark.slow
def test_compiled_float8_layers_stay_near_float32(run, tmp_path):
    """Compiled, the policy's forward and the reference's may round differently: the first loss is not log 2 to the last bit."""
    lean = ("enable_activation_checkpointing=true", "ac_mode=selective", "ac_option=2")
    few = ("max_steps_per_epoch=3", *QUIET)
    run("output_dir=plain", *few)
    run("output_dir=this", *few, *EMULATED, *lean, "compute_dtype=bf16", "compile=true")
    assert losses(tmp_path / "this") == pytest.approx(losses(tmp_path / "plain"), rel=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
    reason="no GPU that multiplies float8",
)
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_float8_on_a_gpu_with_everything_on(run, tmp_path, recipe):
    lean = (
        "enable_activation_checkpointing=true",
        "enable_activation_offloading=true",
        "optimizer.fused=true",
    )
    gpu = ("device=cuda", "compute_dtype=bf16", *QUIET)
    run("output_dir=plain", *gpu)
    run("output_dir=this", *gpu, *lean, "enable_fp8_training=true", f"fp8_recipe_name={recipe}")
    assert losses(tmp_path / "this") == pytest.approx(losses(tmp_path / "plain"), rel=0.02)
