"""Models of transformers from a folder to a trained folder: what is read, what is exported, and what a resumed run ends with."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import folders
from support.killed import train_until

from tokenpref._paths import data_root
from tokenpref._sealed import fault_of
from tokenpref.errors import ConfigError
from tokenpref.models import causal_lm_checkpointer as checkpointing
from tokenpref.training import PreferenceTrainer
from tokenpref.training.config.command_line import load_config

TINY = data_root() / "data" / "tiny" / "model"
FEW = (
    "max_steps_per_epoch=3", "checkpoint_every_n_steps=1", "dataset_val=null", "run_val_every_n_steps=null", "log_stats=[]",
)  # fmt: skip
FIRST = float(torch.tensor(2.0).log())


def made(folder, kind, **settings):
    """A folder with a random model of a family, and the tokenizer of the tiny one."""
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1}
    sizes = {"vocab_size": 384, "max_position_embeddings": 256}
    model = folders.causal_lm(kind, torch.float32, **sizes, **ids, **settings)
    folders.saved(folder, model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder)
    (folder / "LICENSE").write_text("free")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """``model``, a Qwen3 in several files, in the current folder."""
    monkeypatch.chdir(tmp_path)
    made(tmp_path / "model", "qwen3")
    monkeypatch.setattr(checkpointing, "SHARD_BYTES", 30_000)
    return tmp_path / "model"


def train(*words, model="model", until=None):
    """A training that is over, and its metrics by step; with ``until`` it dies before that step."""
    trainer = PreferenceTrainer(
        load_config(
            [
                "--config", "tiny/dpo", "model._component_=tokenpref.models.causal_lm", f"model.path={model}",
                "checkpointer._component_=tokenpref.models.CausalLMCheckpointer", f"checkpointer.checkpoint_dir={model}",
                "checkpointer.checkpoint_files=null", f"tokenizer.path={model}",
                "output_dir=out", *FEW, *words,
            ]
        )
    )  # fmt: skip
    logged = []
    trainer._log = logged.append
    return train_until(trainer, until), logged


def loaded(folder):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def check_equal(found, expected):
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("qwen3", "fp32"), ("gemma3_text", "bf16"), ("qwen3_moe", "fp32")]
)
def test_transformers_loads_what_was_trained_and_a_run_starts_from_it(kind, dtype, folder):
    shutil.rmtree(folder)
    made(folder, kind)
    trainer, logged = train(f"dtype={dtype}")
    assert logged[0]["loss"] == pytest.approx(FIRST, abs=1e-6)
    assert logged[-1]["loss"] != logged[0]["loss"]
    written = Path("out/epoch_0")
    assert fault_of(written) is None
    own = trainer.policy.model.state_dict()
    model = loaded(written)
    check_equal(model.state_dict(), own)
    assert model.dtype == next(iter(own.values())).dtype
    assert (written / "LICENSE").read_text() == "free"
    assert (written / "tokenizer.json").read_bytes() == (TINY / "tokenizer.json").read_bytes()
    again, logged = train(f"dtype={dtype}", "output_dir=again", "optimizer.lr=0", model="out/epoch_0")
    assert [entry["loss"] for entry in logged if "loss" in entry] == pytest.approx([FIRST] * 3, abs=1e-6)
    check_equal(again.policy.model.state_dict(), own)


def test_a_killed_run_ends_with_the_files_of_one_that_never_stopped(folder):
    train("output_dir=whole")
    train("output_dir=killed", until=2)
    train("output_dir=killed", "resume_from_checkpoint=true")
    files = sorted(Path("whole/epoch_0").glob("model*"))
    assert len(files) > 2
    for file in files:
        assert (Path("killed/epoch_0") / file.name).read_bytes() == file.read_bytes()


def test_the_weights_of_a_reference_may_come_from_another_folder(folder):
    train("output_dir=first", "optimizer.lr=0.01")
    reference = (
        "ref_checkpointer._component_=tokenpref.models.CausalLMCheckpointer",
        "ref_checkpointer.output_dir=out",
    )
    _, logged = train(*reference, "ref_checkpointer.checkpoint_dir=first/epoch_0")
    assert abs(logged[0]["loss"] - FIRST) > 1e-4


def test_weights_that_do_not_fit_are_refused_before_the_model_is_placed(folder):
    for file in folder.glob("*.safetensors"):
        held = load_file(file)
        held.pop("model.norm.weight", None)
        save_file(held, file)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"].pop("model.norm.weight")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        ConfigError, match=r"^checkpointer: .* another architecture .*no tensor 'model.norm.weight'"
    ):
        train()


def test_the_folders_of_model_and_weights_are_compared(folder):
    made(folder.parent / "other", "qwen3", rope_theta=5e5, attention_dropout=0.1)
    with pytest.raises(
        ConfigError, match=r"rope_parameters is .*10000.* there and .*500000.* set model.path=model"
    ):
        train("model.path=other")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            (
                "model._component_=tokenpref.models.causal_lm",
                "model.path=model",
                "checkpointer.model_type=QWEN2",
            ),
            r"reads weights under torchtune's names.* set it to tokenpref.models.CausalLMCheckpointer",
        ),
        (
            ("checkpointer._component_=tokenpref.models.CausalLMCheckpointer",),
            r"reads weights under transformers' names.* set it to .*FullModelHFCheckpointer with its model_type",
        ),
    ],
)
def test_checkpointers_that_give_other_names_are_refused(words, says, folder):
    with pytest.raises(ConfigError, match=rf"^checkpointer._component_: .* {says}"):
        PreferenceTrainer(load_config(["--config", "tiny/dpo", *words, *FEW])).setup()
