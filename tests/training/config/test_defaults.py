"""A key at its default and a key that the config does not name are one and the same run."""

import sys

import pytest

from tokenpref.training.config.defaults import without_defaults
from tokenpref.training.config.keys import TrainConfig, default_profiler
from tokenpref.training.saving.run_folder import config_fingerprint

LOSS = {"_component_": "tokenpref.losses.TokenDPOLoss", "beta": 0.2}
SAMPLING = {"prompts": "openings.txt", "reward": {"_component_": "tokenpref.rewards.VaderReward"}}
NAMED = {"output_dir": "mine", "loss": LOSS, "sampling": SAMPLING, "batch_size": 4}


def data(**changed):
    return {**NAMED, **changed}


@pytest.mark.parametrize(
    "written",
    [
        {"padding_free": True},
        {"padding_free": None},
        {"clip_grad_norm": None},
        {"head_memory_mb": None},
        {"keep_last": 1, "shuffle": True, "log_stats": [], "reference": "model"},
        {"loss": {**LOSS, "variant": "tdpo2"}},
        {"loss": {**LOSS, "variant": "tdpo2", "alpha": None}},
        {"sampling": {**SAMPLING, "num_samples": 8, "top_k": None, "temperature": 1}},
        {"profiler": default_profiler({"output_dir": "mine"})},
        {"profiler": {"enabled": False}},
    ],
    ids=lambda written: ", ".join(written),
)
def test_a_value_at_its_default_is_left_out(written):
    assert without_defaults(TrainConfig, data(**written)) == without_defaults(TrainConfig, NAMED)


@pytest.mark.parametrize(
    "written",
    [
        {"padding_free": False},
        {"keep_last": 2},
        {"keep_last": True},  # no whole number, and not the default
        {"clip_grad_norm": 1.0},
        {"loss": {**LOSS, "variant": "tdpo1"}},
        {"loss": {**LOSS, "beta": 0.3}},
        {"sampling": {**SAMPLING, "num_samples": 9}},
        {"profiler": None},
        {"profiler": {"enabled": True}},
        {"of_my_own": None},
    ],
    ids=lambda written: ", ".join(written),
)
def test_any_other_value_stays(written):
    assert without_defaults(TrainConfig, data(**written)) != without_defaults(TrainConfig, NAMED)


def test_arguments_inside_components_and_lists_count():
    def scores(sigma):
        prior = {"_component_": "tokenpref.weights.attribution.GaussianPrior", **sigma}
        return {"dataset": [{"_component_": "tokenpref.training.Attribution", "prior": prior}]}

    short, full, other = ({}, {"normalized": True}, {"normalized": False})
    results = [without_defaults(None, scores(sigma)) for sigma in (short, full, other)]
    assert results[0] == results[1] != results[2]


def test_only_components_that_may_be_imported_are(tmp_path, monkeypatch):
    (tmp_path / "foreign_part.py").write_text("def make(x=1):\n    return x\n")
    monkeypatch.chdir(tmp_path)
    config = {"loss": {"_component_": "foreign_part.make", "x": 1}}
    assert without_defaults(TrainConfig, config, importable=()) == config
    assert "foreign_part" not in sys.modules
    assert without_defaults(TrainConfig, config) == {"loss": {"_component_": "foreign_part.make"}}


def test_a_component_that_cannot_be_imported_stays_as_it_is():
    config = {"loss": {"_component_": "no.such.thing", "x": 1}}
    assert without_defaults(TrainConfig, config) == config


def test_fingerprints_ignore_defaults_and_what_does_not_change_the_numbers():
    mine = config_fingerprint(NAMED, TrainConfig)
    assert mine == config_fingerprint(
        data(loss={**LOSS, "variant": "tdpo2"}, padding_free=True, epochs=7, keep_last=3), TrainConfig
    )
    assert mine != config_fingerprint(data(padding_free=False), TrainConfig)
