"""Every key of every tiny config with values of wrong types and extreme numbers: no traceback, and nothing is written.

A value either leads to a run that nothing stands against or to one error that the user can mend, before any weight is read. What
is tried lies in ``tests/support/sweep.py``.
"""

import copy
import logging
import re
from pathlib import Path

import pytest

from tests.support import sweep
from tokenpref.training import ContrastiveReference, WeightEstimation
from tokenpref.training.config.command_line import load_config
from tokenpref.training.config.fields import Component
from tokenpref.training.loading import models

ONE_IN = 37  # of the values, in the fast test
MEMOISED = ("tokenpref.data.tokenizer_json", "tokenpref.data.preference_dataset")
KEYS = sweep.new_keys()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pair, a store, a folder and a file, for configs and values that name them."""
    place = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        (place / "folder").mkdir()
        (place / "file.json").write_text("{}")
        words = ["--config", "tiny/contrastive_reference", "method=prompt", "output_dir=pair"]
        ContrastiveReference(load_config(words)).run()
        words = [
            "--config",
            "tiny/estimate_weights",
            "estimator.pair=pair",
            "output_dir=scored",
            "dataset.max_rows=8",
        ]
        WeightEstimation(load_config(words)).run()
        (place / "scored/weights").rename(place / "store")
        (place / "scored").rmdir()
    return place


@pytest.fixture
def ready(folder, tmp_path, monkeypatch):
    """In that folder, with data and tokenizers of the same arguments built once."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    kept, build, configs = {}, Component.build, {name: sweep.config_of(name) for name in sweep.SETUPS}

    def build_once(component, *args, **kwargs):
        if component.path not in MEMOISED:
            return build(component, *args, **kwargs)
        mark = (component.key, component.path, repr(component.kwargs), *map(id, args))
        if mark not in kept:
            kept[mark] = (build(component, *args, **kwargs), args)
        return kept[mark][0]

    monkeypatch.setattr(Component, "build", build_once)
    monkeypatch.setattr(sweep, "config_of", lambda name: copy.deepcopy(configs[name]))
    logging.disable(logging.CRITICAL)
    yield folder
    logging.disable(logging.NOTSET)


def try_values(name: str, folder: Path, one_in: int) -> int:
    """Try values; returns how many."""
    assert sweep.outcome(name, ("dry_run",), True) == "accepted"
    before, cases = sweep.everything(folder), sweep.cases_of(name, KEYS[name])[::one_in]
    faults = []
    for key, value in cases:
        found = sweep.outcome(name, key, value)
        if key[-1] == "cache_dir":  # a dry run tokenises too, and keeps the result there
            sweep.remove_new(folder, before)
        if not found.startswith(("accepted", "refused: ")):
            faults.append(f"{'.'.join(map(str, key))}={value!r}: {found}")
    assert not faults, "\n".join(faults)
    assert sweep.everything(folder) == before
    return len(cases)


@pytest.mark.parametrize("name", sweep.SETUPS)
def test_an_odd_value_is_one_error_or_none(name, ready):
    assert try_values(name, ready, ONE_IN) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", sweep.SETUPS)
def test_every_odd_value_is_one_error_or_none(name, ready):
    assert try_values(name, ready, 1) > 100


def test_the_sweep_is_wide():
    assert sum(map(len, KEYS.values())) > 230 and len(sweep.VALUES) > 55
    assert all(
        "dry_run" not in key or not (value is None or value is False)
        for key, value in sweep.cases_of("tdpo", KEYS["tdpo"])
    )


CANNOT_TRAIN = [
    ("tdpo", "optimizer.lr", float("inf"), "optimizer.lr: expected a number from 0 to 1000, found inf"),
    ("tdpo", "optimizer.lr", float("nan"), "optimizer.lr: expected a number from 0 to 1000, found nan"),
    ("tdpo", "optimizer.lr", -1e-3, "optimizer.lr: expected a number from 0"),
    ("tdpo", "optimizer.weight_decay", 1e30, "optimizer.weight_decay: expected a number from 0 to 1000, found 1e\\+30"),
    ("tdpo", "optimizer.eps", 1e300, "optimizer.eps: expected a number from 0 to 1,"),
    ("tdpo", "optimizer.betas", [0.9, 1.0], "optimizer.betas: expected a number from 0 to below 1, found 1.0"),
    ("tdpo", "optimizer.betas", [0.9, -1], "optimizer.betas: expected a number from 0 to below 1, found -1"),
    ("tdpo", "optimizer.maximize", True, "optimizer.maximize: true would maximise the loss"),
    ("tdpo", "optimizer.foreach", True, "optimizer .*fused.*foreach"),
    ("tdpo", "lr_scheduler.num_warmup_steps", -1, "num_warmup_steps: expected a whole number from 0"),
    ("tdpo", "lr_scheduler.num_warmup_steps", float("inf"), "num_warmup_steps must be a whole number, got inf"),
    ("tdpo", "lr_scheduler.num_cycles", float("nan"), "lr_scheduler.num_cycles: expected a finite number"),
    ("tdpo", "lr_scheduler.num_training_steps", 5, "num_training_steps: the recipe sets this argument itself"),
    ("tdpo", "sampling.top_p", 2, "sampling.top_p: expected a number of at most 1, found 2"),
    ("tdpo", "sampling.max_new_tokens", 10**6, "sampling.max_new_tokens: 1000000 after the longest opening"),
    ("tdpo", "sampling.reward.positive", None, "sampling.reward.positive must be a list .text each., got null"),
    ("tdpo", "best.metric", "los", "best.metric: the validation has no 'los'; did you mean 'loss'"),
    ("tdpo", "best.metric", "reward_gain", "best.metric: the validation has no 'reward_gain'"),
    ("tdpo", "profiler.wait_steps", -1, "profiler.wait_steps: expected a whole number from 0"),
    ("tdpo", "profiler.active_steps", 0, "profiler.active_steps: expected a whole number from 1"),
    ("tdpo", "metric_logger.filename", "a/b", "metric_logger.filename: there is no folder"),
    ("tdpo", "metric_logger.log_dir", "file.json", "metric_logger.log_dir: .*file.json is a file; set a folder"),
    ("tdpo", "profiler", {"_component_": "tokenpref.losses.DPOLoss"}, "profiler .*has no start and no step and no stop"),
    ("tdpo", "checkpointer.checkpoint_files", [], "checkpointer.checkpoint_files: names no file"),
    ("tdpo", "checkpointer.resume_from_checkpoint", True, "checkpointer.resume_from_checkpoint: is True"),
    ("tdpo", "dataset.swap", {"_component_": "tokenpref.losses.DPOLoss"}, "dataset.swap must be true or false, got "),
    ("tdpo", "model.num_layers", 0, "num_layers must be a whole number from 1"),
    ("tdpo", "loss.beta", 1e30, "beta must be a finite number <= 1000000.0, got 1e.30"),
    ("tdpo", "clip_grad_norm", 1e-300, "clip_grad_norm: .* no step would move a weight"),
    ("tis_dpo", "weight_transform.mu", 100, "weight_transform .*makes weights that are not finite"),
    ("tis_dpo", "eos_weight", 1e30, "eos_weight: expected a number of at most 1e\\+06"),
    ("tis_dpo_online", "token_weights.positive_prompt", "good " * 300, "with the side's prompt in front the longest"),
    ("ti_dpo", "anchors.max_new_tokens", 10**6, "anchors.max_new_tokens: 1000000 after the longest beginning"),
    ("ti_dpo", "anchors.top_p", 2, "anchors .*top_p must be"),
    ("estimate_weights", "estimator", {"_component_": "tokenpref.losses.DPOLoss"}, "estimator .*its kind is None"),
    ("evaluate", "sampling.max_new_tokens", 10**6, "sampling.max_new_tokens: 1000000 after the longest opening"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "key", "value", "words"), CANNOT_TRAIN)
def test_what_cannot_train_is_refused_before_weights_are_read(name, key, value, words, ready, monkeypatch):
    monkeypatch.setattr(models, "read_weights", lambda *_: pytest.fail("weights were read"))
    found = sweep.outcome(name, tuple(key.split(".")), value)
    assert found.startswith("refused: ")
    assert re.search(words, found), found


BOLD = [
    ("tdpo", "optimizer.lr", 0.0), ("tdpo", "optimizer.lr", 5), ("tdpo", "optimizer.weight_decay", 10),
    ("tdpo", "optimizer.eps", 1e-4),
    ("tdpo", "optimizer.betas", [0.0, 0.999]), ("tdpo", "lr_scheduler.num_warmup_steps", 10**6), ("tdpo", "loss.beta", 1000),
    ("tdpo", "clip_grad_norm", 1e10), ("tdpo", "best.metric", "reward"), ("tdpo", "best.metric", "kl_ref_policy/rejected"),
    ("tdpo", "head_memory_mb", 1e6), ("tdpo", "sampling.top_p", 1), ("tdpo", "profiler.num_cycles", 0), ("tdpo", "epochs", 10**6),
    ("tdpo", "metric_logger", {"_component_": "torchtune.training.metric_logging.StdoutLogger"}),
    ("tdpo", "optimizer", {"_component_": "torch.optim.SGD", "lr": 1, "momentum": 0.9}), ("tis_dpo", "eos_weight", 100),
    ("tis_dpo", "weight_transform.mu", 10), ("ti_dpo", "best", {"metric": "rewards/accuracies", "goal": "max"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "key", "value"), BOLD)
def test_bold_settings_are_taken(name, key, value, ready):
    assert sweep.outcome(name, tuple(key.split(".")), value) == "accepted"
