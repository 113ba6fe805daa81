"""Runs that are killed or stopped from outside, as a cluster does it, and then go on."""

import random
import signal
import time

import pytest
from support.commands import TUNE, kill_all, logged, start, tune, weights

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


def started(folder, *words, fresh=False):
    """The command, once it has written its first checkpoint; its output goes to a file."""
    with (folder / "log.txt").open("w") as log:
        process = start(folder, TUNE, "run", *words, stdout=log, fresh=fresh)
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
    process = started(folder, *words, fresh=True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    output = (folder / "log.txt").read_text()
    assert "(SIGTERM); continue with resume_from_checkpoint=auto" in output and "Traceback" not in output
    tune(folder, *words)
    assert_same(folder, "stopped")


@pytest.mark.slow
def test_sigkill_while_saves_go_on_in_the_background(folder):
    words = [*RUN, *SAVING, "enable_async_checkpointing=true", "checkpoint_every_n_steps=1", "epochs=1"]
    two = ["--nproc_per_node", "2", *words]
    tune(folder, *two, "output_dir=whole_two")
    process = started(folder, *two, "output_dir=killed_two")
    kill_all(process)
    done = tune(folder, *two, "output_dir=killed_two")
    assert "continuing after step" in done.stderr
    for name, tensor in weights(folder, "killed_two").items():
        assert tensor.equal(weights(folder, "whole_two")[name]), name


@pytest.mark.parametrize(("ranks", "batch_size"), [(1, 6), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_another_number_of_processes_goes_on(folder, ranks, batch_size):
    """The same pairs a step, so the same steps but for the order of sums."""
    own = [*RUN, *SAVING, "epochs=2", f"output_dir=by_{ranks}"]
    process = started(folder, "--nproc_per_node", "2", *own, "batch_size=3")
    kill_all(process)
    launch = ["--nproc_per_node", str(ranks)] if ranks > 1 else []
    done = tune(folder, *launch, *own, f"batch_size={batch_size}")
    assert "continuing after step" in done.stderr
    tune(folder, *own, "batch_size=6", f"output_dir=whole_{ranks}", "resume_from_checkpoint=false")
    whole = {line["step"]: line["loss"] for line in logged(folder, f"whole_{ranks}")}
    mine = {line["step"]: line["loss"] for line in logged(folder, f"by_{ranks}")}
    assert max(mine) == max(whole)
    assert all(abs(loss - whole[step]) < 1e-3 for step, loss in mine.items())
    for name, tensor in weights(folder, f"by_{ranks}", 1).items():
        assert (tensor - weights(folder, f"whole_{ranks}", 1)[name]).abs().max() <= 5e-3, name


def test_workers_do_not_outlive_their_launcher(folder):
    """torchrun is killed and cannot tell them; they save at the step's end, stop, and let the folder go."""
    words = [*RUN, "checkpoint_every_n_steps=1", "resume_from_checkpoint=auto", "output_dir=orphans"]
    process = started(folder, "--nproc_per_node", "2", *words, "batch_size=4", fresh=True)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while (done := tune(folder, *words, ok=False)).returncode != 0:
        assert "another run is writing to" in done.stderr and time.monotonic() < deadline, done.stderr
    assert "continuing after step" in done.stderr
    assert_same(folder, "orphans", tolerance=5e-3)
