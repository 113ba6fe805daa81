"""Resumable checkpoints: written aside, sealed with a manifest, named last; only a sealed and unharmed one is ever read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tokenpref._torchtune import TransformerDecoder
from tokenpref.distributed import World, load_sharded, save_sharded
from tokenpref.errors import ConfigError

__all__ = [
    "MANIFEST",
    "PROGRESS",
    "Checkpoints",
    "Progress",
    "fault_of",
    "read_progress",
    "seal",
    "write_json",
]

MANIFEST = "manifest.json"
PROGRESS = "progress.json"
RANDOM = "random.safetensors"
LIVE = "live.safetensors"
LATEST = "latest"
_BLOCK = 1 << 20


@dataclass
class Progress:
    """Where a run stands: enough, with the weights and the optimizer, to continue it.

    Args:
        step: optimizer steps done.
        num_tokens: tokens seen.
    """

    step: int = 0
    num_tokens: int = 0


class Checkpoints:
    """The checkpoints of a run's folder.

    Args:
        path: where they lie; it need not exist.
        world: the run's processes.
    """

    def __init__(self, path: Path, world: World) -> None:
        self.path = path
        self.world = world

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that is sealed and unharmed, and what is wrong with newer ones. On the main process."""
        faults: list[str] = []
        for folder in sorted(self._named(), key=_step_of, reverse=True):
            fault = fault_of(folder)
            if fault is None:
                return folder, faults
            faults.append(f"{folder}: {fault}")
        return None, faults

    def _named(self) -> list[Path]:
        return [
            p for p in self.path.glob("step_*") if p.is_dir() and p.name.removeprefix("step_").isdecimal()
        ]

    def save(
        self,
        model: TransformerDecoder,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
        progress: Progress,
        *,
        live: Mapping[str, Tensor],
        facts: Mapping[str, Any],
        keep_last: int,
    ) -> Path:
        """Write a checkpoint. Until it is whole, sealed and synced to the disk, the one before it stays the newest.

        Args:
            model: the policy.
            optimizer: its optimizer.
            scheduler: its schedule, if any.
            progress: where the run stands.
            live: state of this rank that belongs to rows of the data; that of all ranks is written as one.
            facts: plain data of the run, compared when it continues.
            keep_last: checkpoints to keep.

        Returns:
            Its folder.
        """
        final = self.path / f"step_{progress.step}"
        partial = self.path / f"step_{progress.step}.partial"
        self._on_main(lambda: _emptied(partial))
        save_sharded(partial, model, optimizer)
        everyone = self.world.gather_objects((_random_state(), dict(live)))

        def finish() -> None:
            schedule = scheduler.state_dict() if scheduler is not None else None
            record = {**vars(progress), "scheduler": _plain(schedule), "facts": dict(facts)}
            write_json(partial / PROGRESS, record)
            states = {f"{k}_{rank}": v for rank, (own, _) in enumerate(everyone) for k, v in own.items()}
            save_file(states, partial / RANDOM)
            save_file(_merged([own for _, own in everyone]), partial / LIVE)
            seal(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            _sync(self.path)
            (self.path / f"{LATEST}.tmp").write_text(final.name + "\n", encoding="utf-8")
            os.replace(self.path / f"{LATEST}.tmp", self.path / LATEST)
            for old in sorted(self._named(), key=_step_of)[:-keep_last]:
                shutil.rmtree(old)

        self._on_main(finish)
        return final

    def _on_main(self, action: Any) -> None:
        """Run on the main process; what fails there (a full disk) fails everywhere."""
        self.world.together(lambda: action() if self.world.is_main else None)
        self.world.barrier()

    def load(
        self, folder: Path, model: TransformerDecoder, optimizer: Optimizer, scheduler: LRScheduler | None
    ) -> tuple[Progress, dict[str, Tensor]]:
        """Continue from a checkpoint: fills model, optimizer, scheduler and random number generators.

        Args:
            folder: a checkpoint that is sealed and unharmed.
            model: the policy.
            optimizer: a fresh optimizer.
            scheduler: a fresh schedule, if any.

        Returns:
            Where the run stood, and the state of rows of all ranks.

        Raises:
            ConfigError: if only one of the checkpoint and this run has a scheduler.
        """
        record = read_progress(folder)
        schedule = record["scheduler"]
        if (schedule is None) != (scheduler is None):
            raise ConfigError(
                f"lr_scheduler: {folder} was written {'without' if schedule is None else 'with'} one"
            )
        load_sharded(folder, model, optimizer)
        if scheduler is not None:
            scheduler.load_state_dict(schedule)
        _restore_random(load_file(folder / RANDOM), self.world.rank)
        return Progress(record["step"], record["num_tokens"]), load_file(folder / LIVE)


def read_progress(folder: Path) -> dict[str, Any]:
    """What a checkpoint says about itself."""
    record: dict[str, Any] = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
    return record


def seal(folder: Path) -> None:
    """Write a manifest of all files, their sizes and checksums, and sync everything to the disk."""
    files = {}
    for file in _files(folder):
        _sync(file)
        files[file.relative_to(folder).as_posix()] = {"bytes": file.stat().st_size, "sha256": _digest(file)}
    write_json(folder / MANIFEST, {"files": files})
    _sync(folder / MANIFEST)
    _sync(folder)


def fault_of(folder: Path) -> str | None:
    """Why a folder must not be read as a checkpoint; None if it is sealed and every byte is as it was written."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        sizes = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except FileNotFoundError:
        return f"it has no {MANIFEST}: it was never finished"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} cannot be read ({type(error).__name__}: {error})"
    present = (
        {file.relative_to(folder).as_posix(): file for file in _files(folder)} if folder.is_dir() else {}
    )
    if missing := sorted(sizes.keys() - present.keys()):
        return f"{missing[0]} is missing"
    if surplus := sorted(present.keys() - sizes.keys()):
        return f"{surplus[0]} does not belong to it"
    for name, (size, digest) in sizes.items():
        found = present[name].stat().st_size
        if found != size:
            return f"{name} has {found} bytes and was written with {size}"
        if _digest(present[name]) != digest:
            return f"{name} is not what was written (its checksum differs)"
    return None


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write plain data in one piece: the old file or the new one, never half of it."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _files(folder: Path) -> Iterator[Path]:
    return (file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != MANIFEST)


def _digest(file: Path) -> str:
    hasher = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            hasher.update(block)
    return hasher.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _plain(schedule: dict[str, Any] | None) -> dict[str, Any] | None:
    """A scheduler's state without the callables that LambdaLR lists (they come from the config)."""
    if schedule is None:
        return None
    plain = dict(schedule)
    if "lr_lambdas" in plain:
        plain["lr_lambdas"] = [None] * len(plain["lr_lambdas"])
    return plain


def _random_state() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random(states: Mapping[str, Tensor], rank: int) -> None:
    """This rank's generators; a rank that the writing run did not have keeps its own."""
    if f"cpu_{rank}" in states:
        torch.set_rng_state(states[f"cpu_{rank}"])
    if f"cuda_{rank}" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[f"cuda_{rank}"])


def _merged(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The ranks' states as one: tensors of a name joined along their first dimension."""
    names = sorted({name for state in states for name in state})
    return {
        name: torch.cat([state[name].cpu() for state in states if name in state]).contiguous()
        for name in names
    }
