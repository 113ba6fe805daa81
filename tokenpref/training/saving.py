"""When a run writes what: resumable checkpoints, weights at an epoch's end; and how it finds its place again."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tokenpref._torchtune import TransformerDecoder
from tokenpref.distributed import World
from tokenpref.errors import ConfigError
from tokenpref.training.checkpoints import Progress, read_progress
from tokenpref.training.config import TrainConfig
from tokenpref.training.run_folder import RunFolder

__all__ = ["RowState", "Saver", "TrainState"]

log = logging.getLogger("tokenpref")


class RowState(Protocol):
    """A source of weights or anchors that keeps results by row: it is saved and restored if it has these two methods."""

    def state_dict(self) -> dict[str, Tensor]:
        """What this rank keeps; tensors of a name are joined over ranks along their first dimension."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take what all ranks kept."""
        ...


@dataclass
class TrainState:
    """Everything that changes as a run goes, its place apart.

    Args:
        model: the policy.
        optimizer: its optimizer.
        scheduler: its schedule, if any.
        sources: sources of weights and anchors by name; those without ``state_dict`` keep nothing.
    """

    model: TransformerDecoder
    optimizer: Optimizer
    scheduler: LRScheduler | None
    sources: Mapping[str, Any]

    def rows(self) -> dict[str, Tensor]:
        """What the sources keep by row, on this rank."""
        return {
            f"{name}.{key}": value
            for name, source in self.sources.items()
            if hasattr(source, "state_dict")
            for key, value in source.state_dict().items()
        }

    def load_rows(self, state: Mapping[str, Tensor]) -> None:
        """Hand saved state back to the sources."""
        for name, source in self.sources.items():
            own = {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}
            if own and hasattr(source, "load_state_dict"):
                source.load_state_dict(own)


class Saver:
    """Writes checkpoints and weights when they are due.

    Args:
        config: the run's config.
        folder: its folder.
        world: its processes.
        facts: what has to be the same when the run continues: ``pairs_per_step``, ``steps_per_epoch``, ``data`` (fingerprint),
            ``reference`` (digest), ``seed``, ``shuffle``; and ``config``, whose differences are only said. The run's id
            joins them in what is written.
    """

    def __init__(
        self, config: TrainConfig, folder: RunFolder, world: World, facts: Mapping[str, Any]
    ) -> None:
        self._config, self._folder, self._world, self._facts = config, folder, world, dict(facts)
        self._saved_at = time.monotonic()

    def restore(self, checkpoint: Path, state: TrainState) -> Progress:
        """Continue from a checkpoint.

        Raises:
            ConfigError: if the run would see other pairs, or another reference, than the one that wrote it.
        """
        record = self._world.together(lambda: read_progress(checkpoint) if self._world.is_main else None)
        record = self._world.broadcast_object(record)
        self._compare(record["facts"], int(record["step"]), checkpoint)
        progress, rows = self._folder.checkpoints.load(
            checkpoint, state.model, state.optimizer, state.scheduler
        )
        try:
            state.load_rows(rows)
        except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
            raise ConfigError(
                f"resume_from_checkpoint: {checkpoint}: what it keeps of weights or anchors by row cannot be taken up "
                f"({type(error).__name__}: {error}); continue from another checkpoint"
            ) from error
        return progress

    def _compare(self, then: Mapping[str, Any], step: int, checkpoint: Path) -> None:
        now = self._facts
        mends = {
            "data": "set dataset as it was",
            "pairs_per_step": "set batch_size and gradient_accumulation_steps so that they are as many",
            "seed": "set it as it was",
            "shuffle": "set it as it was",
            "reference": "restore the weights of ref_checkpointer (or checkpointer)",
        }
        faults = [
            f"{key} is {now[key]!r} and was {then.get(key)!r} when {checkpoint} was written; {mend}, or start anew"
            for key, mend in mends.items()
            if now[key] != then.get(key)
        ]
        # Within the first epoch of both, where it ends does not matter.
        own, former = int(now["steps_per_epoch"]), then.get("steps_per_epoch")
        if own != former and (not isinstance(former, int) or step >= min(own, former)):
            faults.append(
                f"steps_per_epoch is {own} and was {former} when {checkpoint} was written, after step {step}; set "
                "max_steps_per_epoch as it was, or start anew"
            )
        if faults:
            raise ConfigError([f"resume_from_checkpoint: {fault}" for fault in faults])
        if self._world.is_main:
            for line in _differences(then.get("config", {}), now.get("config", {})):
                log.info(f"continuing with another setting: {line}")

    def after_step(
        self, progress: Progress, state: TrainState, checkpointer: Any, *, total_steps: int, stopping: bool
    ) -> None:
        """Write what is due after a step.

        Args:
            progress: where the run stands.
            state: what is saved.
            checkpointer: writes the policy's weights.
            total_steps: steps of the whole run.
            stopping: whether the run stops here, at somebody's wish.
        """
        steps_per_epoch, step = int(self._facts["steps_per_epoch"]), progress.step
        epoch_done, last = step % steps_per_epoch == 0, step == total_steps
        # Weights first: a run that is killed in between goes on from an earlier checkpoint and writes them again.
        if epoch_done or last:
            self._folder.export(checkpointer, state.model, (step - 1) // steps_per_epoch)
        if last:
            self._folder.checkpoints.settle()
        elif stopping or self._is_due(step, epoch_done):
            self._folder.checkpoints.save(
                state.model,
                state.optimizer,
                state.scheduler,
                progress,
                live=state.rows(),
                facts={**self._facts, "run": self._folder.run_id() if self._world.is_main else None},
                keep_last=self._config.keep_last,
                background=self._config.enable_async_checkpointing and not stopping,
            )
            self._saved_at = time.monotonic()

    def after_validation(
        self, metrics: Mapping[str, float], progress: Progress, state: TrainState, checkpointer: Any
    ) -> None:
        """Keep the weights if no validation before was better. Every process passes the same metrics.

        Args:
            metrics: what the validation found.
            progress: where the run stands; takes the best value.
            state: what is saved.
            checkpointer: writes the policy's weights.

        Raises:
            ConfigError: if the metric that decides is not among them.
        """
        best = self._config.best
        if best is None:
            return
        if best.metric not in metrics:
            raise ConfigError(
                f"best.metric: the validation has no {best.metric!r}; it has {', '.join(sorted(metrics))}"
            )
        value = metrics[best.metric]
        sign = 1 if best.goal == "max" else -1
        if not math.isfinite(value) or (progress.best is not None and sign * value <= sign * progress.best):
            return
        progress.best, progress.best_step = value, progress.step
        record = {"metric": best.metric, "value": value, "step": progress.step}
        self._folder.export_best(checkpointer, state.model, epochs=self._config.epochs, record=record)

    def _is_due(self, step: int, epoch_done: bool) -> bool:
        steps, minutes = self._config.checkpoint_every_n_steps, self._config.checkpoint_every_minutes
        if steps is None and minutes is None:
            return epoch_done
        due = steps is not None and step % steps == 0
        if minutes is not None:
            # The main process's clock decides: ranks must save together.
            late = self._world.is_main and time.monotonic() - self._saved_at >= 60 * minutes
            due = self._world.any(late) or due
        return due


def _differences(then: Any, now: Any, key: str = "") -> list[str]:
    """Settings that differ between two configs as plain data, one line each."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        names = sorted({*map(str, then), *map(str, now)})
        return [
            line
            for name in names
            for line in _differences(then.get(name), now.get(name), f"{key}.{name}" if key else name)
        ]
    return [] if then == now else [f"{key} is {now!r} and was {then!r}"]
