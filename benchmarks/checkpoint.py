"""The cost of a checkpoint, compared with safetensors for the same bytes, and of a background save during ten steps.

    python -m benchmarks.checkpoint                    # the shape of SmolLM2-135M, some ten minutes on two idle cores
    python -m benchmarks.checkpoint --rounds 5 --write-docs

A round takes turns: safetensors writes and syncs model and optimizer state in one file; the run's own checkpoint (written,
synced, hashed, sealed, renamed); ten steps without a save; a save in the background and ten steps. A background save costs its
own call and what the steps beside it take longer than the median step without one. Steps after its end run beside nothing; the
difference of all ten is reported too, with its standard error: a machine's noise in ten steps may be larger than the cost.
Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import tables
from benchmarks.ti_dpo import WORLD, Steps
from tokenpref.losses import DPOLoss
from tokenpref.training.saving.checkpoints import Checkpoints, Progress

DOC = Path(__file__).parents[1] / "docs" / "results" / "checkpoint.md"
SYNC_LIMIT, BACKGROUND_LIMIT = 1.5, 0.5


class Saves:
    """The saves of a model and its optimizer in a folder.

    Args:
        steps: makes steps.
        folder: where to write.
        length: steps after a save in the background.
    """

    def __init__(self, steps: Steps, folder: Path, length: int) -> None:
        self.steps, self.folder, self.length = steps, folder, length
        folder.mkdir()
        self.checkpoints = Checkpoints(folder / "checkpoints", WORLD)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds, by name."""
        model, optimizer = self.steps.policy.model, self.steps.optimizer
        found = {name: p.detach() for name, p in model.named_parameters()}
        for name, parameter in model.named_parameters():
            found |= {f"{name}.{key}": value for key, value in optimizer.state[parameter].items()}
        return found

    def safetensors(self) -> None:
        """One new file, synced to the disk."""
        file = self.folder / "plain.safetensors"
        save_file(self.tensors(), file)
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)

    def checkpoint(self, *, background: bool = False) -> None:
        """The run's own."""
        self.checkpoints.save(
            self.steps.policy.model,
            self.steps.optimizer,
            None,
            Progress(step=self.steps.done),
            live={},
            facts={},
            keep_last=1,
            background=background,
        )

    def forget(self) -> None:
        """Remove all files, so that every save finds the same disk and the same memory."""
        shutil.rmtree(self.folder)
        self.folder.mkdir()

    def plain_steps(self) -> list[float]:
        """Seconds of steps alone."""
        return [self.steps.take(DPOLoss()) for _ in range(self.length)]

    def steps_after_a_save(self) -> tuple[list[float], int]:
        """Seconds of the call of a background save and of the steps after it, and the number of steps during the save."""
        times, beside = [seconds(lambda: self.checkpoint(background=True))], 0
        for _ in range(self.length):
            beside += self.checkpoints.saving
            times.append(self.steps.take(DPOLoss()))
        return times, beside


def seconds(action: Callable[[], None]) -> float:
    """Wall-clock seconds."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def report(
    found: dict[str, list[float]],
    plain: list[list[float]],
    saving: list[tuple[list[float], int]],
    length: int,
) -> str:
    """The table, and the differences of all steps."""
    own, other = (statistics.median(found[name]) for name in ("checkpoint", "safetensors"))
    step = statistics.median(time for times in plain for time in times)
    costs = [times[0] + sum(t - step for t in times[1 : beside + 1]) for times, beside in saving]
    cost = statistics.median(costs)
    rows = [
        ["safetensors, write and sync", f"{other:.2f}", "-", "-"],
        ["checkpoint", f"{own:.2f}", f"{own / other:.2f} x safetensors", f"{SYNC_LIMIT:g} x"],
        [
            "checkpoint in the background, including the slowdown of the steps meanwhile",
            f"{cost:.2f}",
            f"{cost / own:.2f} x checkpoint",
            f"{BACKGROUND_LIMIT:g} x",
        ],
    ]
    whole = [sum(times) - sum(alone) for alone, (times, _) in zip(plain, saving, strict=True)]
    error = statistics.stdev(whole) / len(whole) ** 0.5 if len(whole) > 1 else float("nan")
    calls = statistics.median(times[0] for times, _ in saving)
    singles = " ".join(f"{c:.2f}" for c in costs)
    return (
        tables.markdown(["save", "seconds", "ratio", "at most"], rows)
        + f"\n\nThe call that starts a background save takes {calls:.2f} s. At most {max(n for _, n in saving)} of the {length} "
        f"steps ran while it was being written (median step {step:.2f} s; cost in each round: {singles} s).\nAll {length} steps "
        f"together took {statistics.mean(whole):+.2f} s (standard error {error:.2f}) longer than {length} steps without a save."
    )


def main() -> None:
    """Time all variants in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument(
        "--folder", help="on the disk to measure; default: the system's place for temporary files"
    )
    parser.add_argument("--write-docs", action="store_true")
    arguments = parser.parse_args()
    steps = Steps(arguments.pairs)
    steps.take(DPOLoss())
    plain: list[list[float]] = []
    saving: list[tuple[list[float], int]] = []
    found: dict[str, list[float]] = {"safetensors": [], "checkpoint": []}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        saves = Saves(steps, Path(folder) / "saves", arguments.steps)
        size = sum(t.numel() * t.element_size() for t in saves.tensors().values())
        for round_ in range(arguments.rounds + 1):
            times = {}
            for name, save in (("safetensors", saves.safetensors), ("checkpoint", saves.checkpoint)):
                times[name] = seconds(save)
                saves.forget()
            plain.append(saves.plain_steps())
            saving.append(saves.steps_after_a_save())
            saves.checkpoints.settle()
            saves.forget()
            steps_s, (saving_s, beside) = plain[-1], saving[-1]
            print(", ".join(f"{k} {v:.2f} s" for k, v in times.items()), end=", ")
            print(
                f"steps {sum(steps_s):.2f} s, saving {sum(saving_s):.2f} s ({beside} beside it)", flush=True
            )
            if round_ == 0:  # it warms up
                plain, saving = [], []
                continue
            for name, value in times.items():
                found[name].append(value)
        saves.checkpoints.close()
    text = report(found, plain, saving, arguments.steps) + f"\nThe checkpoint has {size / 2**30:.2f} GiB."
    print(text)
    if arguments.write_docs:
        head = (
            "# What a checkpoint costs\n\n`python -m benchmarks.checkpoint --write-docs` measured this page: a model with the "
            "shape of SmolLM2-135M in float32, with AdamW's state.\n"
            f"Pairs per step: {arguments.pairs}. Values are medians of {arguments.rounds} rounds, in which the variants took "
            f"turns. Python {platform.python_version()}, torch {torch.__version__}, two cores.\n\n"
        )
        DOC.write_text(head + text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
