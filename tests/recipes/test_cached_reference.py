"""A cached reference by the commands that users type: other processes, kills while it is made, folders that are shared."""

import os
import signal
import time

import pytest
from support.commands import TUNE, kill_all, logged, start, tune, weights

TDPO = ["recipes/tdpo_distributed", "--config", "tiny/tdpo"]
CACHED = ["reference=cached", "reference_cache_dir=kept"]
SLOW = """
import time
from tokenpref.models import tiny_llama

def slow_llama():
    model = tiny_llama()
    model.norm.register_forward_pre_hook(lambda *_: time.sleep(0.2))
    return model
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run beside a second model."""
    folder = tmp_path_factory.mktemp("cached")
    tune(folder, *TDPO, "output_dir=model")
    return folder


def losses(folder, run):
    return [(line["step"], line.get("loss", line.get("eval_loss"))) for line in logged(folder, run)]


def test_two_processes_make_it_and_one_reads_it(folder):
    two = tune(folder, "--nproc_per_node", "2", *TDPO, *CACHED, "batch_size=4", "output_dir=two")
    one = tune(folder, *TDPO, *CACHED, "output_dir=one")
    assert two.stderr.count("hidden states of the reference, 0.1 MiB on the disk, made in") == 2
    assert "0.1 MiB on the disk, read from" in one.stderr and " made in " not in one.stderr
    assert "reference: cached, in the place of a second model of 0.1 MiB a process" in one.stderr
    wanted = losses(folder, "model")
    for run, tolerance in (("one", 1e-5), ("two", 2e-5)):
        for (step, loss), (other, value) in zip(losses(folder, run), wanted, strict=True):
            assert step == other and loss == pytest.approx(value, abs=tolerance)


def test_a_build_that_is_killed_goes_on(folder):
    (folder / "slow.py").write_text(SLOW)
    words = [*TDPO, "model._component_=slow.slow_llama", "reference=cached", "max_steps_per_epoch=2"]
    words.append("run_val_every_n_steps=null")
    tune(folder, *words, "output_dir=whole")
    with (folder / "log.txt").open("w") as log:
        process = start(folder, TUNE, "run", *words, "output_dir=killed", stdout=log)
    deadline = time.monotonic() + 120
    while not list(folder.glob("killed/reference/*/shard-*.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline, (folder / "log.txt").read_text()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGSTOP)  # it still holds its locks
    shared = "reference_cache_dir=killed/reference"
    for more, said in (
        (["output_dir=killed"], "another run is writing to"),
        (["output_dir=other", shared], "another run is filling"),
    ):
        other = tune(folder, *words, *more, ok=False)
        assert other.returncode == 2 and said in other.stderr, other.stderr
    assert not (folder / "other").exists()
    kill_all(process)
    assert not list(folder.glob("killed/reference/*/metadata.json"))
    done = tune(folder, *words, "output_dir=killed")
    assert "of 8 shards are there already" in done.stderr
    for name, tensor in weights(folder, "killed").items():
        assert tensor.equal(weights(folder, "whole")[name]), name


def test_a_pair_is_built_without_a_second_model(folder):
    words = ["recipes/contrastive_reference_distributed", "--config", "tiny/contrastive_reference"]
    done = tune(folder, *words, "output_dir=pair", "reference=cached", "max_steps_per_epoch=2")
    # Each side's data are the other's with chosen and rejected exchanged.
    assert done.stderr.count("log-probabilities of the reference") >= 4
    assert (folder / "pair/pair.yaml").is_file()
