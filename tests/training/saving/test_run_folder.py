"""What a run's folder says about itself is read with care: it decides what is kept and what is replaced."""

import hashlib
import json

import pytest
from omegaconf import OmegaConf

from tokenpref.distributed import single_process_world
from tokenpref.errors import ConfigError
from tokenpref.training.config.keys import TrainConfig
from tokenpref.training.saving.run_folder import RunFolder

# One run, written in two ways: the second names what the first leaves at its default.
SHORT = {"seed": 3, "loss": {"_component_": "tokenpref.losses.DPOLoss", "beta": 0.2}}
FULL = {
    **SHORT,
    "padding_free": True,
    "head_memory_mb": 128,
    "loss": {**SHORT["loss"], "label_smoothing": 0.0},
}


def folder_of(path, config):
    return RunFolder(path / "mine", config, "recipe", single_process_world(), schema=TrainConfig)


def finish(folder):
    folder.claim(resume=False)
    folder.finish("epoch_0")
    folder.unlock()


def as_earlier_versions_recorded(path, config):
    """Give the folder's record the form that it had when every key that a file named was counted."""
    record = json.loads((path / "mine/run.json").read_text())
    del record["defaults_count"]
    record["config"] = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    (path / "mine/run.json").write_text(json.dumps(record))


@pytest.fixture
def finished(tmp_path):
    folder = RunFolder(tmp_path / "mine", {"epochs": 1}, "recipe", single_process_world())
    folder.claim(resume=False)
    folder.finish("epoch_0")
    yield folder
    folder.unlock()


def test_a_finished_run_names_its_weights(finished):
    assert finished.finished() == finished.path / "epoch_0"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"weights"', "Expecting"),
        ("[]", "list indices"),
        ("{}", "'weights'"),
        ('{"weights": 3}', "weights is 3"),
        ('{"weights": "../elsewhere"}', "weights is '../elsewhere'"),
        ('{"weights": "/elsewhere"}', "weights is '/elsewhere'"),
        ('{"weights": ".."}', "weights is '..'"),
    ],
)
def test_a_damaged_end_is_refused(finished, text, fault):
    (finished.path / "finished.json").write_text(text)
    with pytest.raises(ConfigError, match=f"finished.json is damaged .*{fault}.*remove it and run again"):
        finished.finished()


@pytest.mark.parametrize(("first", "then"), [(SHORT, FULL), (FULL, SHORT)], ids=["longer", "shorter"])
def test_a_run_is_known_however_its_config_is_written(tmp_path, first, then):
    finish(folder_of(tmp_path, first))
    assert folder_of(tmp_path, then).finished() == tmp_path / "mine/epoch_0"
    other = {**then, "seed": 4}
    assert folder_of(tmp_path, other).finished() is None
    with pytest.raises(
        ConfigError, match=r"holds another run .*; set another output_dir, or remove that folder$"
    ):
        folder_of(tmp_path, other).check()


def test_a_run_of_an_earlier_version_is_known_by_the_config_of_then(tmp_path):
    finish(folder_of(tmp_path, FULL))
    as_earlier_versions_recorded(tmp_path, FULL)
    assert folder_of(tmp_path, FULL).finished() is not None
    with pytest.raises(
        ConfigError, match="An earlier version of tokenpref wrote it .*start it with the config file of then"
    ):
        folder_of(tmp_path, SHORT).check()


@pytest.mark.parametrize(
    ("file", "held"),
    [("torchtune_config.yaml", FULL), ("pair.yaml", {"method": "dpo", "config": FULL})],
    ids=["logged", "pair"],
)
def test_a_run_of_an_earlier_version_is_known_by_the_config_in_its_folder(tmp_path, file, held):
    finish(folder_of(tmp_path, FULL))
    as_earlier_versions_recorded(tmp_path, FULL)
    OmegaConf.save(OmegaConf.create(held), tmp_path / "mine" / file)
    folder_of(tmp_path, SHORT).check()
    assert folder_of(tmp_path, SHORT).finished() == tmp_path / "mine/epoch_0"
    with pytest.raises(ConfigError, match="holds another run"):
        folder_of(tmp_path, {**SHORT, "seed": 4}).check()


@pytest.mark.parametrize("text", ["seed: 4\n", "- 1\n", "a: [\n", "5\n", "", "seed: ${nowhere}\n"])
def test_a_config_that_is_not_the_runs_own_tells_nothing(tmp_path, text):
    finish(folder_of(tmp_path, FULL))
    as_earlier_versions_recorded(tmp_path, FULL)
    (tmp_path / "mine/torchtune_config.yaml").write_text(text)
    with pytest.raises(ConfigError, match="An earlier version"):
        folder_of(tmp_path, SHORT).check()
