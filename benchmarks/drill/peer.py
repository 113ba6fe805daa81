"""DPO steps of TRL and of this package on the same weights and pairs, one after the other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu import ours, work
from benchmarks.cpu.process import reset_peak
from benchmarks.drill.stage import Stage

__all__ = ["python_of", "trl"]

ROOT = Path(__file__).parents[2]
TASKS = {
    "cuda": work.Task(
        "llama3.2-1b", "varied", length=1024, batch=8, steps=8, warmup=3, lr=1e-5, dtype="bfloat16"
    ),
    "cpu": work.Task("tiny", "varied", length=48, batch=2, steps=3, warmup=1),
}
"""By device. Lengths are log-uniform, see :class:`benchmarks.cpu.work.Task`."""
DIFFER = {"cuda": 0.02, "cpu": work.TOLERANCE}
"""How far the losses of a step may differ between the sides."""


def python_of(peer: Path) -> tuple[Path, dict[str, str]]:
    """The Python that has TRL, and what it needs in its environment.

    Args:
        peer: a virtual environment, or a folder of packages that this Python can import in addition to its own.

    Raises:
        FileNotFoundError: if it is neither.
    """
    python = peer / "bin" / "python"
    if python.exists():
        return python.absolute(), {}
    if (peer / "trl").is_dir():
        return Path(sys.executable), {"PYTHONPATH": os.pathsep.join([str(peer.absolute()), str(ROOT)])}
    raise FileNotFoundError(f"--peer: {peer} has neither bin/python nor the package trl")


def trl(stage: Stage) -> None:
    """Our side, then TRL's, with the reference as a second model in memory."""
    if stage.peer is None:
        stage.skip("TRL", "no --peer was given")
    task = TASKS[stage.device]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        work.write(folder, task, device=stage.device)
        settings: dict[str, Any] = {"mode": "ref", "fused_adamw": True, "device": stage.device}
        settings["threads"] = torch.get_num_threads()
        found: dict[str, dict[str, Any]] = {}
        with stage.part("our DPO"):
            found["tokenpref"] = ours.measure(folder, **settings)
            _record(stage, "tokenpref", found["tokenpref"])
        reset_peak(stage.device)  # frees what the GPU no longer needs
        if stage.peer is not None and stage.has_time("TRL's DPO", 20):
            with stage.part("TRL's DPO"):
                found["trl"] = _peer(stage, stage.peer, folder, settings)
                _record(stage, "trl", found["trl"])
    if len(found) == 2:
        mine, theirs = found["tokenpref"], found["trl"]
        worst = max(abs(a - b) for a, b in zip(mine["losses"], theirs["losses"], strict=True))
        stage.check("losses, from TRL's", worst, most=DIFFER[stage.device])
        stage.row(
            "tokenpref divided by TRL",
            **{"tokens/s": round(mine["tokens_per_s"] / theirs["tokens_per_s"], 2)},
            **{"peak memory": round(mine["memory_mib"]["peak"] / theirs["memory_mib"]["peak"], 2)},
        )


def _record(stage: Stage, side: str, found: dict[str, Any]) -> None:
    stage.row(
        "DPO beside TRL",
        side=side,
        version=found["versions"].get(side),
        **{"tokens/s": round(found["tokens_per_s"]), "median s/step": round(found["median_step_s"], 4)},
        **{"peak GiB": round(found["memory_mib"]["peak"] / 1024, 2)},
        **{"first loss": found["losses"][0], "last loss": found["losses"][-1]},
    )


def _peer(stage: Stage, peer: Path, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    python, variables = python_of(peer)
    result, log = folder / "peer.json", stage.folder / "trl.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [str(python), "-m", "benchmarks.cpu.peer", str(folder), str(result), json.dumps(settings)]
    with log.open("a", encoding="utf-8") as stream:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **variables},
            stdout=stream,
            stderr=subprocess.STDOUT,
            timeout=None if stage.tiny else max(stage.left - 2, 1),
        )
    if done.returncode:
        last = [
            line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()
        ]
        raise RuntimeError(f"TRL's process ended with {done.returncode}: {' / '.join(last[-3:])[:400]}")
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    return found
