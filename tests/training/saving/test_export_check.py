"""Exported weights: damage is named before a run goes on or is declared finished, and never inherited by a pair."""

import json
import random
import shutil

import pytest
from safetensors.torch import load_file
from support.killed import train_until

from tokenpref._sealed import MANIFEST, seal
from tokenpref.errors import ConfigError, DataError
from tokenpref.training import ContrastiveReference, PreferenceTrainer
from tokenpref.training.config.command_line import load_config
from tokenpref.training.estimation.pair_folder import PAIR_FILE, SIDES, read_pair
from tokenpref.training.saving.export_check import check_exports, epochs_until, finished_epochs

MODEL = "model-00001-of-00001.safetensors"
SHORT = ("dataset.max_rows=16", "run_val_every_n_steps=null")


def flip(file, place=0.5):
    data = bytearray(file.read_bytes())
    data[int(len(data) * place)] ^= 1
    file.write_bytes(data)


def cut(file):
    file.write_bytes(file.read_bytes()[:-3])


@pytest.fixture
def exported(tmp_path):
    """Three epochs and the best one of a run."""
    for name in ("epoch_0", "epoch_1", "epoch_2", "best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MODEL).write_bytes(f"weights of {name}".encode())
        (tmp_path / name / "config.json").write_text("{}")
        seal(tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (lambda f: flip(f / MODEL), f"{MODEL} is not what was written"),
        (lambda f: cut(f / MODEL), f"{MODEL} has .* bytes and was written with"),
        (lambda f: (f / MODEL).unlink(), f"{MODEL} is missing"),
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: flip(f / MANIFEST), "manifest.json|is not what was written|is missing|was written with"),
        (lambda f: cut(f / MANIFEST), "manifest.json cannot be read"),
        (lambda f: (f / MANIFEST).unlink(), "it has no manifest.json"),
    ],
    ids=["flipped", "cut", "gone", "config gone", "manifest flipped", "manifest cut", "manifest gone"],
)
@pytest.mark.parametrize("name", ["epoch_0", "epoch_1", "best"])
def test_damaged_weights_are_named_with_a_mend(exported, name, harm, fault):
    check_exports(exported, 2)
    harm(exported / name)
    with pytest.raises(
        ConfigError, match=f"{name} holds damaged weights: .*({fault}).*, or remove .*{name} and start again"
    ):
        check_exports(exported, 2)
    shutil.rmtree(exported / name)
    check_exports(exported, 2)


def test_every_byte_of_an_export_is_compared(exported):
    """Flips anywhere in weights and manifests."""
    draw = random.Random(3)
    for _ in range(150):
        file = draw.choice([f for f in sorted(exported.glob("*/*")) if f.parent.name != "epoch_2"])
        whole = file.read_bytes()
        bit = draw.randrange(8 * len(whole))
        harmed = bytearray(whole)
        harmed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(harmed)
        with pytest.raises(ConfigError, match=f"{file.parent} holds damaged weights"):
            check_exports(exported, 2)
        file.write_bytes(whole)
    check_exports(exported, 3)


def test_what_is_no_damage(exported):
    (exported / "epoch_0" / "README.md").write_text("added by somebody")
    (
        exported / "epoch_2" / MANIFEST
    ).unlink()  # half written: its epoch has not ended, and it is written again
    check_exports(exported, 2)
    check_exports(exported / "nowhere", 7)


def test_which_epochs_count():
    assert [epochs_until(name) for name in ("epoch_0", "epoch_11", "elsewhere")] == [1, 12, 0]
    progress = {"step": 7, "facts": {"steps_per_epoch": 3}}
    assert finished_epochs(progress) == 2 and finished_epochs({"step": 7, "facts": {}}) == 0


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Train three epochs of two steps; with ``until`` the run dies before that step, as if killed."""
    monkeypatch.chdir(tmp_path)

    def run(*words, until=None):
        trainer = PreferenceTrainer(load_config(["--config", "tiny/tdpo", *SHORT, "epochs=3", *words]))
        return train_until(trainer, until)

    return run


def test_a_run_does_not_go_on_over_damaged_weights(train, tmp_path):
    train("output_dir=whole")
    train("output_dir=run", until=4)
    flip(tmp_path / "run" / "epoch_0" / MODEL)
    again = ("output_dir=run", "resume_from_checkpoint=auto")
    for words in (again, (*again, "dry_run=true")):
        with pytest.raises(ConfigError, match=f"run/epoch_0 holds damaged weights: {MODEL} is not what was"):
            train(*words)
    assert not (tmp_path / "run" / "finished.json").exists()
    shutil.rmtree(tmp_path / "run" / "epoch_0")
    train(*again)
    assert (tmp_path / "run" / "finished.json").exists() and not (tmp_path / "run" / "epoch_0").exists()
    one, other = (load_file(tmp_path / name / "epoch_2" / MODEL) for name in ("whole", "run"))
    assert all(tensor.equal(other[name]) for name, tensor in one.items())


def test_an_export_that_was_half_written_is_written_again(train, tmp_path):
    train("output_dir=run", until=4)
    shutil.copytree(tmp_path / "run" / "epoch_1", tmp_path / "run" / "epoch_2")
    (tmp_path / "run" / "epoch_2" / MANIFEST).unlink()
    cut(tmp_path / "run" / "epoch_2" / MODEL)
    train("output_dir=run", "resume_from_checkpoint=auto")
    check_exports(tmp_path / "run", 3)


def test_a_run_whose_weights_were_harmed_is_not_declared_finished(train, tmp_path):
    trainer = train("output_dir=run", until=5)
    cut(tmp_path / "run" / "epoch_1" / MODEL)
    with pytest.raises(ConfigError, match="run/epoch_1 holds damaged weights"):
        trainer.folder.finish("epoch_1")
    assert not (tmp_path / "run" / "finished.json").exists()


def test_another_folder_is_not_asked_for_its_weights(train, tmp_path):
    """A run that begins from a checkpoint of another one has exported nothing yet."""
    train("output_dir=run", until=4)
    cut(tmp_path / "run" / "epoch_0" / MODEL)
    train("output_dir=branch", "resume_from_checkpoint=run")
    check_exports(tmp_path / "branch", 3)


def build_pair(*words):
    recipe = ContrastiveReference(
        load_config(["--config", "tiny/contrastive_reference", *SHORT, "epochs=1", "output_dir=pair", *words])
    )
    try:
        return recipe.run()
    finally:
        recipe.close()


@pytest.mark.parametrize("side", SIDES)
def test_a_pair_with_a_damaged_side_is_not_declared_whole(tmp_path, monkeypatch, side):
    monkeypatch.chdir(tmp_path)
    build_pair()
    weights = tmp_path / "pair" / side / "epoch_0"
    (tmp_path / "pair" / PAIR_FILE).unlink()  # as if killed before the last of it was written
    flip(weights / MODEL)
    with pytest.raises(ConfigError, match=f"pair/{side}/epoch_0 holds damaged weights: {MODEL} is not"):
        build_pair()
    with pytest.raises(DataError, match="half built"):
        read_pair(tmp_path / "pair")
    shutil.rmtree(weights)
    build_pair()
    check_exports(weights.parent, 1)
    assert read_pair(tmp_path / "pair").method == "dpo"
    assert json.loads((weights.parent / "finished.json").read_text())["weights"] == "epoch_0"
