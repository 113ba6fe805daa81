"""What a resumable checkpoint costs: against safetensors writing the same bytes, and in the background of ten steps; one run.

    python -m benchmarks.checkpoint                    # the shape of SmolLM2-135M, some ten minutes on two idle cores
    python -m benchmarks.checkpoint --rounds 5 --write-docs

A round, by turns: safetensors writes and syncs model and optimizer state in one file; the run's own checkpoint (written, synced,
hashed, sealed, renamed); ten steps without a save; ten steps with a save in the background begun before them. A background
save's cost is what its ten steps took longer, its own copying included. Run it on an idle machine.
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
from tokenpref.training.checkpoints import Checkpoints, Progress

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

    def plain_steps(self) -> None:
        """Steps alone."""
        for _ in range(self.length):
            self.steps.take(DPOLoss())

    def steps_after_a_save(self) -> None:
        """Steps after a save that goes on beside them."""
        self.checkpoint(background=True)
        self.plain_steps()


def seconds(action: Callable[[], None]) -> float:
    """Wall-clock seconds."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    """Time everything by turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--folder", help="on the disk to measure; default: the system's place for temporary files"
    )
    parser.add_argument("--write-docs", action="store_true")
    arguments = parser.parse_args()
    steps = Steps(arguments.pairs)
    steps.take(DPOLoss())
    found: dict[str, list[float]] = {"safetensors": [], "checkpoint": [], "steps": [], "steps, saving": []}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        saves = Saves(steps, Path(folder) / "saves", arguments.steps)
        size = sum(t.numel() * t.element_size() for t in saves.tensors().values())
        for round_ in range(arguments.rounds + 1):  # the first warms up
            times = {"safetensors": seconds(saves.safetensors)}
            saves.forget()
            times["checkpoint"] = seconds(saves.checkpoint)
            saves.forget()
            times["steps"] = seconds(saves.plain_steps)
            times["steps, saving"] = seconds(saves.steps_after_a_save)
            rest = seconds(saves.checkpoints.settle)
            print(", ".join(f"{k} {v:.2f} s" for k, v in times.items()), f"then {rest:.2f} s", flush=True)
            saves.forget()
            if round_:
                for name, value in times.items():
                    found[name].append(value)
        saves.checkpoints.close()
    medians = {name: statistics.median(values) for name, values in found.items()}
    own = medians["checkpoint"]
    cost = statistics.median(b - a for a, b in zip(found["steps"], found["steps, saving"], strict=True))
    rows = [
        ["safetensors, write and sync", f"{medians['safetensors']:.2f}", "-", "-"],
        [
            "checkpoint",
            f"{own:.2f}",
            f"{own / medians['safetensors']:.2f} x safetensors",
            f"{SYNC_LIMIT:g} x",
        ],
        [
            f"checkpoint in the background, over {arguments.steps} steps",
            f"{cost:.2f}",
            f"{cost / own:.2f} x checkpoint",
            f"{BACKGROUND_LIMIT:g} x",
        ],
    ]
    text = tables.markdown(["save", "seconds", "ratio", "at most"], rows)
    singles = " ".join(f"{b - a:+.2f}" for a, b in zip(found["steps"], found["steps, saving"], strict=True))
    text += (
        f"\n\n{size / 2**30:.2f} GiB. {arguments.steps} steps took {medians['steps']:.1f} s without and "
        f"{medians['steps, saving']:.1f} s with a save beside them (differences of the rounds: {singles})."
    )
    print(text)
    if arguments.write_docs:
        head = (
            "# What a checkpoint costs\n\nWhat `python -m benchmarks.checkpoint --write-docs` measured: "
            "the shape of SmolLM2-135M, float32, with AdamW's state;\n"
            f"{arguments.pairs} pairs a step, {arguments.rounds} rounds by turns, medians. "
            f"Python {platform.python_version()}, torch {torch.__version__}, two cores.\n\n"
        )
        DOC.write_text(head + text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
