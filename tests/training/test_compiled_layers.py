"""Trainings with compiled layers: what is compiled, and how often."""

import math
import re

import pytest
import torch
from torch._dynamo import register_backend
from torch._dynamo.utils import counters

from tokenpref.training import PreferenceTrainer, TripletTrainer
from tokenpref.training.config.command_line import load_config

CALLS = []


@register_backend(name="counting")
def counting(graph, _inputs):
    """A backend that compiles nothing, and notes for each call of a graph whether gradients are recorded."""

    def run(*tensors):
        CALLS.append(torch.is_grad_enabled())
        return graph.forward(*tensors)

    return run


@pytest.fixture
def graph_calls(monkeypatch):
    """The calls of compiled graphs in this test. Whoever reaches PyTorch's limit of compilations fails."""
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "counting")
    torch._dynamo.reset()
    counters.clear()
    CALLS.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield CALLS
    torch._dynamo.reset()


def watched(trainer, calls):
    """Take the trainer's steps, and return the graphs that each compiled, and its calls of graphs with gradients."""
    steps = []
    take = trainer._step

    def step():
        before, first = counters["stats"]["unique_graphs"], len(calls)
        result = take()
        steps.append((counters["stats"]["unique_graphs"] - before, sum(calls[first:])))
        return result

    trainer._step = step
    try:
        trainer.setup()
        trainer.train()
    finally:
        trainer.close()
    return steps


def test_training_stays_compiled_beside_attribution_sampling_and_validation(
    tmp_path, monkeypatch, graph_calls
):
    monkeypatch.chdir(tmp_path)
    words = [
        "compile=true",
        "batch_size=2",
        "max_steps_per_epoch=5",
        "run_val_every_n_steps=1",
        "output_dir=run",
    ]
    trainer = TripletTrainer(load_config(["--config", "tiny/ti_dpo", *words]))
    steps = watched(trainer, graph_calls)
    assert len(steps) == 5 and all(graphs == 0 for graphs, _ in steps[2:])
    assert len({with_gradients for _, with_gradients in steps}) == 1 and steps[0][1] > 0


@pytest.mark.parametrize("config", ["tiny/tdpo", pytest.param("tiny/tdpo_lora", marks=pytest.mark.slow)])
def test_nothing_is_compiled_after_the_second_batch(tmp_path, monkeypatch, graph_calls, config):
    """Every batch has other lengths and another number of tokens."""
    monkeypatch.chdir(tmp_path)
    words = ["compile=true", "batch_size=2", "max_steps_per_epoch=5", "run_val_every_n_steps=null"]
    trainer = PreferenceTrainer(load_config(["--config", config, *words, "output_dir=run"]))
    steps = watched(trainer, graph_calls)
    assert len(steps) == 5 and steps[0][0] > 0 and all(graphs == 0 for graphs, _ in steps[2:])


@pytest.mark.slow
def test_compiled_bfloat16_starts_at_log_2(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch._dynamo.reset()
    words = ["compile=true", "dtype=bf16", "optimizer.lr=1e-3", "max_steps_per_epoch=1", "output_dir=run"]
    words += ["run_val_every_n_steps=null", "metric_logger.filename=log.txt"]
    trainer = PreferenceTrainer(load_config(["--config", "tiny/tdpo", *words]))
    try:
        trainer.setup()
        trainer.train()
    finally:
        trainer.close()
    (line,) = (tmp_path / "run" / "logs" / "log.txt").read_text().splitlines()[-1:]
    assert float(re.search(r" loss:(\S+)", line)[1]) == pytest.approx(math.log(2), abs=1e-8)
