"""The commands that users type, in subprocesses, and what they leave behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file

TUNE = str(Path(sys.executable).parent / "tune")


def tune(folder: Path, *words: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
    """``tune run WORDS`` in a folder; asserts that it succeeds unless ``ok`` is False."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [TUNE, "run", *words], cwd=folder, env=env, capture_output=True, text=True, timeout=300
    )
    if ok:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a command and everything below it; torchrun's workers have sessions of their own and would live on."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
    family = {process.pid}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    for pid in family:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def logged(folder: Path, run: str) -> list[dict[str, float]]:
    """Metrics of each logged line of a DiskLogger, in order; a run that went on has a file for each start."""
    files = sorted((folder / run / "logs").glob("*.txt"))
    assert files, f"no log of {run}"
    lines = [line for file in files for line in file.read_text().splitlines() if line.startswith("Step")]
    return [
        {
            "step": int(re.match(r"Step (\d+)", line)[1]),
            **{k: float(v) for k, v in re.findall(r"(\S+):(\S+)", line)},
        }
        for line in lines
    ]


def weights(folder: Path, run: str, epoch: int = 0) -> dict[str, torch.Tensor]:
    """The weights that a run exported."""
    return load_file(folder / run / f"epoch_{epoch}" / "model-00001-of-00001.safetensors")
