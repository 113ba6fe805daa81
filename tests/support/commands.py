"""The commands that users type, in processes of their own, and what they leave behind.

Most are forked from a server that has done their imports (:mod:`support.fork_server`), which saves seconds of processor time for
each process. ``fresh=True`` starts the installed command as a user's shell does.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from safetensors.torch import load_file

from support.fork_server import ForkedProcess, ForkServer
from tokenpref.data.cache import CACHE_VARIABLE

TUNE = str(Path(sys.executable).parent / "tune")
# Variables that change from test to test and that nothing reads while it is imported.
READ_LATE = {CACHE_VARIABLE, "PYTEST_CURRENT_TEST"}

Process = subprocess.Popen[bytes] | ForkedProcess
_servers: list[tuple[ForkServer, dict[str, str]]] = []


def start(
    folder: Path, *command: str, stdout: IO[Any], stderr: IO[Any] | None = None, fresh: bool = False
) -> Process:
    """Start a Python program in a session of its own, and do not wait for it.

    Args:
        folder: working directory.
        command: path of the program, such as ``TUNE``, and its arguments.
        stdout: an open file.
        stderr: an open file; that of stdout by default.
        fresh: do not fork the process from a server. An environment that differs from the server's does the same.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    stderr = stdout if stderr is None else stderr
    early = {name: value for name, value in environment.items() if name not in READ_LATE}
    if not fresh and not _servers:
        _servers.append((ForkServer(environment), early))
    if fresh or early != _servers[0][1]:
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=stdout, stderr=stderr, start_new_session=True
        )
    return _servers[0][0].start(command, folder=folder, environment=environment, stdout=stdout, stderr=stderr)


def run(folder: Path, *command: str, fresh: bool = False) -> subprocess.CompletedProcess[str]:
    """Start a Python program and wait for it; see :func:`start`."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        process = start(folder, *command, stdout=stdout, stderr=stderr, fresh=fresh)
        try:
            code = process.wait(timeout=300)
        except subprocess.TimeoutExpired:
            kill_all(process)
            raise
        texts = [file.seek(0) or file.read() for file in (stdout, stderr)]
    return subprocess.CompletedProcess(command, code, *texts)


def tune(folder: Path, *words: str, ok: bool = True, fresh: bool = False) -> subprocess.CompletedProcess[str]:
    """``tune run WORDS`` in a folder; asserts that it succeeds unless ``ok`` is False. See :func:`start` for ``fresh``."""
    done = run(folder, TUNE, "run", *words, fresh=fresh)
    if ok:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def kill_all(process: Process) -> None:
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
