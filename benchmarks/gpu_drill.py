"""Nine minutes on one GPU: do the numbers agree with the CPU's, and how fast are attention, head and training steps?

    python -m benchmarks.gpu_drill --out outputs/drill                             # all stages
    python -m benchmarks.gpu_drill --out outputs/drill --peer PATH                 # with TRL, from this environment or folder
    python -m benchmarks.gpu_drill --out outputs/drill --stages attention,steps    # these, added to what is there
    python -m benchmarks.gpu_drill --out outputs/drill --stages none --write-docs docs/results   # only the page gpu.md
    python -m benchmarks.gpu_drill --out outputs/drill --tiny                      # a test of itself on a CPU

Every result is appended to ``results.jsonl`` in the output folder as soon as it is there, and synced to the disk. Each stage runs
in a process of its own with a limit of its own. A stage that fails or does not end records its error, and the next one runs. The
exit code is 0 if all stages passed, and 1 if not. What cannot be measured here is skipped with its reason, and is no failure.

The plan on paper. No GPU has confirmed the expected times; a process takes about 10 s of each to import torch and to start CUDA.

========== ======= ==========================================================================================================
stage      limit s expected time and what it consists of
========== ======= ==========================================================================================================
environment     20 15: start 10, attention backends 2, cuDNN's plans 1, a product 0.1, the NCCL group 2
numbers         60 45: start 10, 36 cases eager 5, compiled in two dtypes 2 x 15
agreement       70 55: start 10, 8 tiny runs on both devices 12, one of them compiled 15, three trainings 9, samples and rest 9
attention       50 25: start 10, 16 plans of cuDNN at 0.02 to 0.4 s for three sets of lengths up to 10, all others 3
steps          190 175: start 10, models 5 each; eager 20, compiled 60, TDPO2 45, equal lengths 40; what does not fit is skipped
head            70 45: start 10, 14 heads at 5 x 0.1 s, four compilations of 6 s
trl             60 50: start 10, weights of 2.5 GB written 5 and read 6, our steps 5; TRL starts in 15 and trains in 9
all            520
========== ======= ==========================================================================================================
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.drill import report
from benchmarks.drill.agreement import agreement
from benchmarks.drill.attention import attention
from benchmarks.drill.environment import environment
from benchmarks.drill.heads import head_numbers, head_speed
from benchmarks.drill.peer import trl
from benchmarks.drill.stage import Log, Stage, TimeOver, described, time_limit
from benchmarks.drill.steps import steps

__all__ = ["STAGES", "Plan", "drill", "main", "run_stage"]

ROOT = Path(__file__).parents[1]
BUDGET_S = 540.0
TINY_LIMIT_S = 120.0
GRACE_S = 4.0
"""Seconds that a process gets to write what went wrong before it is killed."""


@dataclass(frozen=True)
class Plan:
    """A stage of the drill.

    Args:
        run: what it does.
        seconds: its limit, start of the process included.
        title: its heading on the page.
    """

    run: object
    seconds: float
    title: str


STAGES: dict[str, Plan] = {
    "environment": Plan(environment, 20, "Versions, device and attention backends"),
    "numbers": Plan(head_numbers, 60, "Numbers of the head"),
    "agreement": Plan(agreement, 70, "A tiny model on CPU and device"),
    "attention": Plan(attention, 50, "Attention over sequences of many lengths"),
    "steps": Plan(steps, 190, "Training steps of Llama-3.2-1B"),
    "head": Plan(head_speed, 70, "Time and memory of the head"),
    "trl": Plan(trl, 60, "DPO beside TRL"),
}
"""In the order in which they run."""


def run_stage(name: str, out: Path, *, device: str, tiny: bool, deadline: float, peer: Path | None) -> bool:
    """Run a stage in this process until its deadline, and return whether it passed."""
    log, begin = Log(out / "results.jsonl"), time.time()
    stage = Stage(name, device, tiny, deadline, log, out, peer)
    log.write(stage=name, kind="begin", limit=round(deadline - begin, 1), tiny=tiny, device=device)
    try:
        with time_limit(stage.left):
            STAGES[name].run(stage)  # type: ignore[operator]
    except TimeOver as error:
        stage.failures.append("time limit")
        log.write(stage=name, kind="error", name="time limit", **described(error))
    except Exception as error:  # it is recorded, and the drill continues
        stage.failures.append(type(error).__name__)
        log.write(stage=name, kind="error", name="stage", **described(error))
    _end(log, name, begin, stage.failures)
    return not stage.failures


def _end(log: Log, name: str, begin: float, failures: Sequence[str], *, skipped: bool = False) -> None:
    seconds = round(time.time() - begin, 1)
    log.write(
        stage=name, kind="end", ok=not failures, skipped=skipped, seconds=seconds, failures=list(failures)
    )


def _in_a_process(
    name: str, out: Path, *, device: str, tiny: bool, deadline: float, peer: Path | None
) -> bool:
    """:func:`run_stage` in a process of its own, which is killed if it does not end."""
    log, begin = Log(out / "results.jsonl"), time.time()
    command = [sys.executable, "-m", "benchmarks.gpu_drill", "--out", str(out.absolute())]
    command += ["--one", name, str(deadline), device]
    command += ["--tiny"] if tiny else []
    command += ["--peer", str(peer.absolute())] if peer is not None else []
    with (out / "log.txt").open("a", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(timeout=max(deadline - begin, 0) + GRACE_S)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    ended = [r for r in log.read() if r["stage"] == name and r["kind"] == "end" and r["at"] >= begin - 1]
    if ended:
        return bool(ended[-1]["ok"])
    message = (
        "killed, because it did not end" if code is None else f"ended with exit code {code}, see log.txt"
    )
    log.write(stage=name, kind="error", name="process", type="Process", message=message, frames=[])
    _end(log, name, begin, ["process"])
    return False


def drill(
    names: Sequence[str],
    out: Path,
    *,
    tiny: bool = False,
    budget_s: float = BUDGET_S,
    peer: Path | None = None,
) -> bool:
    """Run stages one after another, and return whether all of them passed.

    Args:
        names: of :data:`STAGES`.
        out: folder of the results.
        tiny: in this process, on the CPU, with tiny sizes.
        budget_s: seconds after which no stage begins; the last one gets what is left.
        peer: environment or folder with TRL.
    """
    out.mkdir(parents=True, exist_ok=True)
    log, start, passed = Log(out / "results.jsonl"), time.time(), True
    device = "cuda" if torch.cuda.is_available() and not tiny else "cpu"
    for name in names:
        limit = TINY_LIMIT_S if tiny else STAGES[name].seconds
        deadline = min(time.time() + limit, start + budget_s - (0 if tiny else GRACE_S))
        if deadline - time.time() < 1:
            log.write(stage=name, kind="begin", limit=0, tiny=tiny, device=device)
            log.write(stage=name, kind="skip", name="the whole stage", reason="no time is left")
            _end(log, name, time.time(), ["no time"], skipped=True)
            good = False
        else:
            run = run_stage if tiny else _in_a_process
            good = run(name, out, device=device, tiny=tiny, deadline=deadline, peer=peer)
        passed &= good
        print(f"{name}: {'passed' if good else 'FAILED'}, {time.time() - start:.0f} s so far", flush=True)
    return passed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run stages, and write the page if asked; 0 if all stages passed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_drill",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of results.jsonl and log.txt")
    parser.add_argument("--stages", default=",".join(STAGES), help="names with commas, or none; default: all")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds of all stages together")
    parser.add_argument("--peer", type=Path, help="environment, or folder of packages, that has TRL")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU, in this process")
    parser.add_argument(
        "--write-docs", type=Path, metavar="FOLDER", help="write the page gpu.md to this folder"
    )
    parser.add_argument("--one", nargs=3, metavar=("STAGE", "DEADLINE", "DEVICE"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.one:
        name, deadline, device = given.one
        good = run_stage(
            name, given.out, device=device, tiny=given.tiny, deadline=float(deadline), peer=given.peer
        )
        return int(not good)
    names = [] if given.stages == "none" else given.stages.split(",")
    if unknown := [name for name in names if name not in STAGES]:
        parser.error(
            f"--stages: no stage is named {', '.join(unknown)}; there are {', '.join(STAGES)}, and none"
        )
    passed = drill(names, given.out, tiny=given.tiny, budget_s=given.budget_s, peer=given.peer)
    if given.write_docs is not None:
        records = Log(given.out / "results.jsonl").read()
        given.write_docs.mkdir(parents=True, exist_ok=True)
        text = report.page(records, {name: plan.title for name, plan in STAGES.items()})
        (given.write_docs / "gpu.md").write_text(text, encoding="utf-8")
    return int(not passed)


if __name__ == "__main__":
    # An exception, so that whoever stops the drill also stops the process of its stage.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))
    sys.exit(main())
