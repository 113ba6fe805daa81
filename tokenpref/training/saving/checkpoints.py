"""Checkpoints: written under a temporary name, sealed with a manifest, renamed last, and read only if sealed and intact."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tokenpref._files import follow_umask, sync, write_json, writing
from tokenpref._sealed import Written, fault_of, read_record, seal, write_file
from tokenpref.distributed import (
    BackgroundWrite,
    World,
    check_sharded,
    load_sharded,
    sharded_state,
    write_sharded,
)
from tokenpref.errors import ConfigError, DataError
from tokenpref.training.saving.hyperparameters import (
    Hyperparameters,
    plain,
    record_fault,
    replay_schedule,
    schedule_state,
)

__all__ = ["PROGRESS", "Checkpoints", "Progress", "read_progress", "step_of"]

PROGRESS = "progress.json"
RANDOM = "random.safetensors"
LIVE = "live.safetensors"
LATEST = "latest"
_BACKGROUND_NICENESS = 10

log = logging.getLogger("tokenpref")


@dataclass
class Progress:
    """The progress of a run: together with weights and optimizer state, enough to resume it.

    Args:
        step: optimizer steps done.
        num_tokens: tokens seen.
        best: the best value of the metric that decides which weights are kept as best; None before the first.
        best_step: after which step it was measured.
    """

    step: int = 0
    num_tokens: int = 0
    best: float | None = None
    best_step: int = 0


class Checkpoints:
    """The checkpoints of a run's folder.

    Args:
        path: folder of the checkpoints; it need not exist.
        world: the run's processes.
    """

    def __init__(self, path: Path, world: World) -> None:
        self.path = path
        self.world = world
        self._pending: Future[None] | None = None
        self._writer: _BackgroundWriter | None = None

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest intact checkpoint, and the faults of newer ones. On the main process."""
        faults: list[str] = []
        for folder in reversed(self.named()):
            fault = fault_of(folder)
            if fault is None:
                return folder, faults
            faults.append(f"{folder}: {fault}")
        return None, faults

    def named(self) -> list[Path]:
        """All checkpoints that were once complete, the oldest first."""
        found = [
            p for p in self.path.glob("step_*") if p.is_dir() and p.name.removeprefix("step_").isdecimal()
        ]
        return sorted(found, key=step_of)

    def save(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
        progress: Progress,
        *,
        live: Mapping[str, Tensor],
        facts: Mapping[str, Any],
        built: Hyperparameters,
        keep_last: int,
        background: bool = False,
    ) -> None:
        """Write a checkpoint. Until it is complete, sealed and synced to the disk, the previous one stays the newest.

        Args:
            model: the policy.
            optimizer: its optimizer.
            scheduler: its schedule, if any.
            progress: where the run stands.
            live: state of this rank that belongs to rows of the data; that of all ranks is written as one.
            facts: plain data of the run, compared when it continues.
            built: the optimizer's settings as the config made them.
            keep_last: checkpoints to keep.
            background: copy everything and write it while training continues, after waiting for an earlier background save. A
                failure is raised by the next call, or by :meth:`settle`.
        """
        self.settle()
        # Named now, because the background write must not depend on the run's later state.
        name = f"step_{progress.step}"
        partial = self.path / f"{name}.partial"
        self._on_main(lambda: self._emptied(partial))
        state = sharded_state(model, optimizer)
        everyone = self.world.gather_objects((_random_state(), dict(live)))
        record = {
            **vars(progress),
            "scheduler": schedule_state(scheduler),
            "optimizer": built.record(),
            "facts": dict(facts),
        }

        def finish(written: Mapping[str, Written]) -> None:
            with writing(f"{partial}: the checkpoint"):
                write_json(partial / PROGRESS, record)
                states = {f"{k}_{rank}": v for rank, (own, _) in enumerate(everyone) for k, v in own.items()}
                save_file(states, partial / RANDOM)
                save_file(_merged([own for _, own in everyone]), partial / LIVE)
                for file in (partial / RANDOM, partial / LIVE):
                    follow_umask(file)
                self._publish(partial, name, keep_last, written)

        if background:
            if self._writer is None:
                self._writer = _BackgroundWriter(self.world)
            then = finish if self.world.is_main else None
            self._pending = self._writer.submit(partial, state, then)
        else:
            written = write_sharded(partial, state, self.world)
            self._on_main(lambda: finish(written))

    def remove(self) -> None:
        """Remove all checkpoints, complete or not, but nothing else in their folder. On the main process."""
        with writing(self.path):
            for folder in (*self.path.glob("step_*.partial"), *self.named()):
                shutil.rmtree(folder)
            (self.path / LATEST).unlink(missing_ok=True)
            if not any(self.path.iterdir()):
                self.path.rmdir()

    @property
    def saving(self) -> bool:
        """Whether a background save is running in this process."""
        return self._pending is not None and not self._pending.done()

    def settle(self) -> None:
        """Wait for a save in the background. Every process must call it.

        Raises:
            TokenprefError: on every process, if it failed on one.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            self.world.together(pending.result)

    def close(self) -> None:
        """Wait for a background save without the other processes. A failure is logged."""
        pending, self._pending = self._pending, None
        if pending is not None:
            wait_for([pending])
            if error := pending.exception():
                log.warning(f"a checkpoint could not be written: {error}")
        if self._writer is not None:
            self._writer.close()

    def _publish(self, partial: Path, name: str, keep_last: int, written: Mapping[str, Written]) -> None:
        """Seal a folder, rename it, update ``latest``, and remove the oldest checkpoints."""
        seal(partial, written)
        final = self.path / name
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        sync(self.path)
        write_file(self.path / LATEST, f"{name}\n".encode())
        # A later one is damaged, or the run would have resumed from it. It must not displace a good one.
        former = [folder for folder in self.named() if step_of(folder) < step_of(final)]
        for old in former[: max(0, len(former) + 1 - keep_last)]:
            shutil.rmtree(old)

    def _emptied(self, partial: Path) -> None:
        """An empty folder to write to, after removing unfinished saves, which would keep filling the disk."""
        with writing(f"{partial}: the checkpoint"):
            for unfinished in self.path.glob("step_*.partial"):
                shutil.rmtree(unfinished)
            partial.mkdir(parents=True)

    def _on_main(self, action: Callable[[], None]) -> None:
        """Run on the main process. A failure there (a full disk) is raised on all processes."""
        self.world.together(lambda: action() if self.world.is_main else None)
        self.world.barrier()

    def load(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
        *,
        built: Hyperparameters,
        same_config: bool,
    ) -> tuple[Progress, dict[str, Tensor]]:
        """Continue from a checkpoint: fills model, optimizer, scheduler and random number generators.

        Changed settings of the optimizer and the schedule come from this run; everything else comes from the checkpoint.

        Args:
            folder: an intact checkpoint.
            model: the policy.
            optimizer: a fresh optimizer.
            scheduler: a fresh schedule, if any.
            built: the fresh optimizer's settings.
            same_config: whether the config of optimizer, schedule and length is the one that the checkpoint was written with.

        Returns:
            Where the run stood, and the state of rows of all ranks.

        Raises:
            ConfigError: if only one of the checkpoint and this run has a scheduler, or the optimizer is of another class.
        """
        record = read_progress(folder)
        schedule, former = record["scheduler"], record["optimizer"]
        if (schedule is None) != (scheduler is None):
            raise ConfigError(
                f"lr_scheduler: {folder} was written {'without' if schedule is None else 'with'} one"
            )
        if fault := built.fault(former):
            raise ConfigError(f"optimizer: {folder} was {fault}; set optimizer as it was, or start a new run")
        if scheduler is not None:
            _check_schedule(folder, schedule, scheduler)
        self.world.together(lambda: check_sharded(folder))

        def settle(groups: list[dict[str, Any]]) -> None:
            built.settle(groups, former, same_config=same_config)

        load_sharded(folder, model, optimizer, settle)
        if scheduler is not None:
            unchanged = same_config and built.is_as(former)
            replay_schedule(optimizer, scheduler, built, record["step"], schedule if unchanged else None)
        random_states, live = _read_tensors(folder, RANDOM), _read_tensors(folder, LIVE)
        try:
            _restore_random(random_states, self.world.rank)
        except (RuntimeError, TypeError) as error:
            raise ConfigError(
                f"resume_from_checkpoint: {folder}: {RANDOM} holds no state of a random number generator ({error}); continue "
                "from another checkpoint"
            ) from error
        progress = Progress(**{f.name: record[f.name] for f in fields(Progress)})
        return progress, live


class _BackgroundWriter:
    """A thread that writes copies of the state, with its own process group.

    Args:
        world: the run's processes; each makes a writer at the same time.
    """

    def __init__(self, world: World) -> None:
        self._save = BackgroundWrite(world.aside())
        self._thread = ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="checkpoint", initializer=_step_back
        )

    def submit(
        self, folder: Path, state: dict[str, Any], then: Callable[[Mapping[str, Written]], None] | None
    ) -> Future[None]:
        """Copy the state and write it to the folder in the background. ``then`` runs afterwards on the same thread."""
        write_copy = self._save.take(folder, state)

        def write() -> None:
            written = write_copy()
            if then is not None:
                then(written)

        return self._thread.submit(write)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown()


def _step_back() -> None:
    """Give the training's threads priority, where threads have their own niceness."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _BACKGROUND_NICENESS)


# The entries of progress.json that are not counts.
_RECORDED: dict[str, tuple[tuple[type, ...], str]] = {
    "best": ((int, float, type(None)), "a number or null"),
    "scheduler": ((dict, type(None)), "a mapping or null"),
    "optimizer": ((dict, type(None)), "a mapping or null"),
    "facts": ((dict,), "a mapping"),
}


def read_progress(folder: Path) -> dict[str, Any]:
    """The description of a checkpoint in its files.

    Raises:
        ConfigError: if that cannot be what a run wrote.
    """
    file = folder / PROGRESS
    try:
        record = read_record(file, "continue from another checkpoint")
    except DataError as error:
        raise ConfigError(f"resume_from_checkpoint: {error}") from error
    names = (*(f.name for f in fields(Progress)), "scheduler", "optimizer", "facts")
    values = {name: record.get(name) for name in names}
    for name, value in values.items():
        kinds, wanted = _RECORDED.get(name, ((int,), "a whole number"))
        negative = kinds == (int,) and isinstance(value, int) and value < 0
        if not isinstance(value, kinds) or isinstance(value, bool) or negative:
            raise ConfigError(
                f"resume_from_checkpoint: {file}: {name} is {value!r}, expected {wanted}; continue from another checkpoint"
            )
    if fault := record_fault(values["optimizer"]):
        raise ConfigError(f"resume_from_checkpoint: {file}: {fault}; continue from another checkpoint")
    return values


def _read_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Tensors of one of a checkpoint's files.

    Raises:
        ConfigError: if it is damaged.
    """
    try:
        return load_file(folder / name)
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"resume_from_checkpoint: {folder}: {name} cannot be read ({error}); continue from another checkpoint"
        ) from error


def step_of(path: Path) -> int:
    """The step after which a checkpoint was written, as its name says."""
    return int(path.name.removeprefix("step_"))


def _check_schedule(folder: Path, schedule: Mapping[str, Any], scheduler: LRScheduler) -> None:
    """Refuse the state of another kind of scheduler, which would be taken over attribute by attribute.

    Raises:
        ConfigError: naming what differs.
    """
    own = plain(schedule_state(scheduler))
    faults = [f"has no {name!r}" for name in own if name not in schedule]
    faults += [f"has {name!r}" for name in schedule if name not in own]
    faults += [
        f"has {name!r} as {schedule[name]!r}"
        for name in own
        if name in schedule and not _alike(schedule[name], own[name])
    ]
    if faults:
        raise ConfigError(
            f"lr_scheduler: {folder} was written with another kind of scheduler (it {faults[0]}); set lr_scheduler as it was"
        )


def _alike(stored: Any, own: Any) -> bool:
    """Whether a value read from JSON can be what was written for a value like ``own``."""
    numbers, lists = (int, float), (list, tuple)
    if stored is None or own is None:
        return True
    if isinstance(own, bool) or isinstance(stored, bool):
        return isinstance(own, bool) and isinstance(stored, bool)
    if isinstance(own, numbers):
        return isinstance(stored, numbers)
    if isinstance(own, lists):
        return isinstance(stored, list) and all(_alike(s, o) for s, o in zip(stored, own, strict=False))
    return isinstance(stored, type(own))


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
