"""The output folder of a run: whose it is, and its resumable checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tokenpref import __version__
from tokenpref._torchtune import TransformerDecoder
from tokenpref.distributed import World, full_state_dict, load_sharded, save_sharded
from tokenpref.errors import ConfigError

__all__ = ["Progress", "RunFolder", "config_fingerprint"]

RUN_FILE = "run.json"
FINISHED_FILE = "finished.json"
CHECKPOINTS = "checkpoints"
# Keys that change how a run is carried out or watched, not what it computes.
INCIDENTAL = frozenset(
    {
        "resume_from_checkpoint", "save_every_n_steps", "keep_last", "log_every_n_steps", "log_peak_memory_stats",
        "metric_logger", "profiler", "run_val_every_n_steps", "batch_size_val", "epochs", "max_steps_per_epoch",
        "dataset_val", "loss_val", "log_stats_val", "sampling",
    }
)  # fmt: skip


@dataclass
class Progress:
    """Where a run stands: enough, with the weights and the optimizer, to continue it.

    Args:
        step: optimizer steps done.
        num_tokens: tokens seen.
    """

    step: int = 0
    num_tokens: int = 0


def config_fingerprint(config: dict[str, Any]) -> str:
    """sha256 over what a config computes; incidental keys (logging, saving, length) are left out."""
    kept = {key: value for key, value in config.items() if key not in INCIDENTAL}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


class RunFolder:
    """An output folder that belongs to one run.

    Args:
        path: the folder; it need not exist.
        config: the run's config as plain data.
        recipe: name of the recipe, for the record.
        world: the run's processes; the main one alone touches the folder.
    """

    def __init__(self, path: Path, config: dict[str, Any], recipe: str, world: World) -> None:
        self.path = path
        self.world = world
        self._fingerprint = config_fingerprint(config)
        self._recipe = recipe

    @property
    def checkpoints(self) -> Path:
        """Folder of the resumable checkpoints."""
        return self.path / CHECKPOINTS

    def check(self, *, resume: bool) -> None:
        """Refuse a folder that another run owns, or a resume without a checkpoint. Writes nothing.

        Raises:
            ConfigError: on every rank.
        """

        def check() -> None:
            if not self.world.is_main:
                return
            owner = self._owner()
            if resume:
                if self.latest() is None:
                    raise ConfigError(
                        f"resume_from_checkpoint: no checkpoint in {self.checkpoints}; set output_dir to the folder "
                        "of the run to continue, or resume_from_checkpoint=false"
                    )
            elif owner is not None and owner["config"] != self._fingerprint:
                raise ConfigError(
                    f"output_dir: {self.path} holds another run ({owner['recipe']}, id {owner['id']}) with another "
                    "config; set another output_dir, or remove that folder"
                )

        self.world.together(check)

    @contextmanager
    def removed_on_failure(self) -> Iterator[None]:
        """Leave no empty folder behind for a run that never was (torchtune's checkpointers make it when they are built)."""
        fresh = not self.path.exists()
        try:
            yield
        except BaseException:
            if fresh and self.world.is_main and self.path.is_dir() and not any(self.path.iterdir()):
                self.path.rmdir()
            raise

    def export(self, checkpointer: Any, model: TransformerDecoder, epoch: int) -> None:
        """Write a model in its checkpointer's format to ``epoch_N``."""
        state = full_state_dict(model, self.world)
        if self.world.is_main:
            checkpointer.save_checkpoint({"model": state}, epoch=epoch, intermediate_checkpoint=False)
        self.world.barrier()

    def finish(self, export: str) -> None:
        """Mark the run as complete; ``export`` names the folder of its last weights."""
        if self.world.is_main:
            _write_json(self.path / FINISHED_FILE, {"weights": export})
        self.world.barrier()

    def finished(self) -> Path | None:
        """Folder of the last weights if this very run (same config) is complete; the same on every rank."""
        # The main process alone looks: files may appear while another process does.
        weights: Path | None = self.world.broadcast_object(self._finished() if self.world.is_main else None)
        return weights

    def _finished(self) -> Path | None:
        file = self.path / FINISHED_FILE
        owner = self._owner()
        if owner is None or owner["config"] != self._fingerprint or not file.is_file():
            return None
        return self.path / str(json.loads(file.read_text(encoding="utf-8"))["weights"])

    def claim(self, *, resume: bool) -> None:
        """Make the folder this run's. A run of the same config started anew replaces the earlier one's checkpoints."""
        if self.world.is_main and not resume:
            self.path.mkdir(parents=True, exist_ok=True)
            if self._owner() is not None:
                (self.path / FINISHED_FILE).unlink(missing_ok=True)
                for old in [self.checkpoints, *self.path.glob("epoch_*")]:
                    shutil.rmtree(old, ignore_errors=False) if old.exists() else None
            record = {
                "id": uuid.uuid4().hex,
                "recipe": self._recipe,
                "config": self._fingerprint,
                "tokenpref": __version__,
                "world_size": self.world.size,
            }
            _write_json(self.path / RUN_FILE, record)
        self.world.barrier()

    def claim_once(self) -> None:
        """Make the folder this run's unless it is already; nothing in it is removed."""
        # Decided by the main process alone: its file may appear while another process looks.
        if self.world.broadcast_object(self._owner() is None if self.world.is_main else None):
            self.claim(resume=False)

    def _owner(self) -> dict[str, Any] | None:
        path = self.path / RUN_FILE
        if not path.is_file():
            return None
        try:
            owner: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return {key: owner[key] for key in ("id", "recipe", "config")}
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"output_dir: {path} is damaged ({error}); set another output_dir") from error

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        found = [p for p in self.checkpoints.glob("step_*") if (p / "progress.json").is_file()]
        return max(found, key=lambda p: int(p.name.removeprefix("step_")), default=None)

    def save(
        self,
        model: TransformerDecoder,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
        progress: Progress,
        *,
        keep_last: int,
    ) -> Path:
        """Write a resumable checkpoint. It gets its name only when it is complete.

        Returns:
            Its folder.
        """
        final = self.checkpoints / f"step_{progress.step}"
        partial = self.checkpoints / f"step_{progress.step}.partial"
        if self.world.is_main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.world.barrier()
        save_sharded(partial, model, optimizer)
        self.world.barrier()
        if self.world.is_main:
            schedule = scheduler.state_dict() if scheduler is not None else None
            _write_json(partial / "progress.json", {**vars(progress), "scheduler": _plain(schedule)})
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for old in sorted(self.checkpoints.glob("step_*"), key=_step_of)[:-keep_last]:
                shutil.rmtree(old)
        self.world.barrier()
        return final

    def load(
        self, model: TransformerDecoder, optimizer: Optimizer, scheduler: LRScheduler | None
    ) -> Progress:
        """Continue from the newest checkpoint: fills model, optimizer and scheduler.

        Returns:
            Where the run stood.
        """
        latest = self.world.broadcast_object(self.latest() if self.world.is_main else None)
        load_sharded(latest, model, optimizer)
        record = json.loads((latest / "progress.json").read_text(encoding="utf-8"))
        schedule = record.pop("scheduler")
        if (schedule is None) != (scheduler is None):
            raise ConfigError(
                f"lr_scheduler: {latest} was written {'without' if schedule is None else 'with'} one"
            )
        if scheduler is not None:
            scheduler.load_state_dict(schedule)
        return Progress(**record)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_").removesuffix(".partial"))


def _plain(schedule: dict[str, Any] | None) -> dict[str, Any] | None:
    """A scheduler's state without the callables that LambdaLR lists (they come from the config)."""
    if schedule is None:
        return None
    plain = dict(schedule)
    if "lr_lambdas" in plain:
        plain["lr_lambdas"] = [None] * len(plain["lr_lambdas"])
    return plain


def _write_json(path: Path, record: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)
