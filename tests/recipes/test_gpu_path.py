"""What recipes do on GPUs, on two gloo ranks: float8 with FSDP2's gathering in float8, bfloat16 over float32, fused AdamW."""

import math

import pytest
from support.commands import logged, tune, weights

TDPO = ["recipes/tdpo_distributed", "--config", "tiny/tdpo", "log_stats=[]", "run_val_every_n_steps=null"]
TWO = ["--nproc_per_node", "2", *TDPO, "batch_size=4"]
EMULATED = ["enable_fp8_training=true", "fp8_emulate=true"]
SAVED = ["checkpoint_every_n_steps=3", "keep_last=9"]


def losses(folder, run):
    return [m["loss"] for m in logged(folder, run) if "loss" in m]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    tune(folder, *TDPO, "output_dir=plain")
    return folder


@pytest.fixture(scope="module")
def tensorwise(folder):
    done = tune(folder, *TWO, *EMULATED, *SAVED, "output_dir=tensorwise")
    assert (
        done.stderr.count("checkpointer: 14 linear layers multiply in float8 (tensorwise)") == 2
    )  # the reference's too
    return folder


def test_one_scale_a_tensor_stays_near_float32(tensorwise):
    plain, found = losses(tensorwise, "plain"), losses(tensorwise, "tensorwise")
    assert found[0] == pytest.approx(math.log(2), abs=1e-7)
    assert found == pytest.approx(plain, rel=0.02) and found != plain


def test_a_scale_a_row_in_bfloat16_with_everything_else_stays_near_float32(folder):
    more = [
        "fp8_recipe_name=rowwise",
        "compute_dtype=bf16",
        "optimizer.fused=true",
        "fsdp_reshard_after_forward=false",
    ]
    more += ["enable_activation_checkpointing=true", "ac_mode=selective", "ac_option=2"]
    tune(folder, *TWO, *EMULATED, *more, "output_dir=rowwise")
    found = losses(folder, "rowwise")
    assert found[0] == pytest.approx(math.log(2), abs=1e-7)
    assert found == pytest.approx(losses(folder, "plain"), rel=0.02)


def test_exported_weights_are_named_and_typed_as_without_float8(tensorwise):
    expected, found = (weights(tensorwise, run) for run in ("plain", "tensorwise"))
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {
        n: (t.dtype, t.shape) for n, t in expected.items()
    }
    for name, tensor in expected.items():
        assert 0 < (found[name] - tensor).abs().max() < 0.02, name  # 8 steps of at most 1e-3 each


def test_a_run_that_goes_on_ends_at_the_same_bits(tensorwise):
    before = weights(tensorwise, "tensorwise")
    words = [
        *EMULATED,
        *SAVED,
        "output_dir=tensorwise",
        "resume_from_checkpoint=tensorwise/checkpoints/step_3",
    ]
    tune(tensorwise, *TWO, *words)
    found = losses(tensorwise, "tensorwise")
    assert found[8:] == found[3:8]
    for name, tensor in weights(tensorwise, "tensorwise").items():
        assert tensor.equal(before[name]), name
