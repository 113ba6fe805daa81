"""Runs that are killed or stopped from outside, as a cluster does it, and then go on."""

import os
import random
import signal
import subprocess
import time

import pytest
from support.commands import TUNE, kill_all, tune, weights

RUN = [
    "recipes/tdpo_distributed",
    "--config",
    "tiny/tdpo",
    "epochs=8",
    "run_val_every_n_steps=null",
    "log_stats=[]",
]
SAVING = ["checkpoint_every_n_steps=3", "keep_last=2", "resume_from_checkpoint=auto"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("kills")
    tune(folder, *RUN, "output_dir=whole")
    return folder


def started(folder, *words):
    """The command, once it has written its first checkpoint; its output goes to a file."""
    log = (folder / "log.txt").open("w")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [TUNE, "run", *words],
        cwd=folder,
        env=env,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    run = next(w.removeprefix("output_dir=") for w in words if w.startswith("output_dir="))
    deadline = time.monotonic() + 120
    while not (folder / run / "checkpoints/latest").exists():
        assert process.poll() is None and time.monotonic() < deadline, (folder / "log.txt").read_text()
        time.sleep(0.02)
    return process


def assert_same(folder, run, tolerance=0.0):
    for name, tensor in weights(folder, run, 7).items():
        assert (tensor - weights(folder, "whole", 7)[name]).abs().max() <= tolerance, name


def test_sigkill_at_any_instant(folder):
    words = [*RUN, *SAVING, "output_dir=killed"]
    generator = random.Random(0)
    for _ in range(3):
        process = started(folder, *words)
        time.sleep(generator.uniform(0, 1.5))
        kill_all(process)
        if (folder / "killed/finished.json").exists():
            break
    done = tune(folder, *words)
    assert "continuing after step" in done.stderr
    assert_same(folder, "killed")


def test_a_signal_lets_the_step_end_and_saves(folder):
    words = [*RUN, "checkpoint_every_n_steps=1", "resume_from_checkpoint=auto", "output_dir=stopped"]
    process = started(folder, *words)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    output = (folder / "log.txt").read_text()
    assert "(SIGTERM); continue with resume_from_checkpoint=auto" in output and "Traceback" not in output
    tune(folder, *words)
    assert_same(folder, "stopped")


def test_another_number_of_processes_goes_on(folder):
    words = [*RUN, *SAVING, "output_dir=shrunk"]
    process = started(folder, "--nproc_per_node", "2", *words, "batch_size=4")
    kill_all(process)
    done = tune(folder, *words)
    assert "continuing after step" in done.stderr
    assert_same(folder, "shrunk", tolerance=5e-3)
