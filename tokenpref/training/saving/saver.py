"""Writes checkpoints and weights when they are due, and restores the state of a run."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tokenpref.distributed import World, first_not_finite
from tokenpref.errors import ConfigError, TokenprefError
from tokenpref.training.config.defaults import component_paths, without_defaults
from tokenpref.training.config.keys import TrainConfig
from tokenpref.training.saving.checkpoints import Progress, read_progress
from tokenpref.training.saving.hyperparameters import Hyperparameters
from tokenpref.training.saving.run_folder import RunFolder

__all__ = ["RowState", "Saver", "TrainState"]

log = logging.getLogger("tokenpref")

# Settings of a component that decide when results by row are computed, and not their values.
_WHEN = frozenset({"refresh", "every_n_steps"})
_DEFAULT = object()  # in comparisons of configs: a key that one of them lacks
_KEY_OF_SOURCE = {"weights": "token_weights", "anchors": "anchors"}
# Keys that define best.metric. If they change, the earlier value cannot be compared.
_DECIDES_BEST = ("best", "dataset_val", "loss_val", "sampling")


class RowState(Protocol):
    """A source of weights or anchors that keeps results by row. It is saved and restored by these two methods."""

    def state_dict(self) -> dict[str, Tensor]:
        """The results of this rank. Tensors of one name are concatenated over ranks along their first dimension."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore the results of all ranks."""
        ...


@dataclass
class TrainState:
    """Everything that changes during a run, except its progress.

    Args:
        model: the policy.
        optimizer: its optimizer.
        scheduler: its schedule, if any.
        sources: sources of weights and anchors by name; those without ``state_dict`` keep nothing.

    Attributes:
        built: the optimizer's settings as the config made them; the state is made before the first step.
    """

    model: nn.Module
    optimizer: Optimizer
    scheduler: LRScheduler | None
    sources: Mapping[str, Any]
    built: Hyperparameters = field(init=False)

    def __post_init__(self) -> None:
        self.built = Hyperparameters.of(self.optimizer)

    def rows(self) -> dict[str, Tensor]:
        """The results by row that the sources of this rank keep."""
        return {
            f"{name}.{key}": value
            for name, source in self.sources.items()
            if hasattr(source, "state_dict")
            for key, value in source.state_dict().items()
        }

    def load_rows(self, state: Mapping[str, Tensor]) -> None:
        """Give saved state back to the sources."""
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
            ``reference`` (digest), ``seed``, ``shuffle``; for models with adapters ``base`` (digest) and ``adapters`` (rank,
            alpha, targets); and ``config``, whose differences are only logged. The run's id is written with them.
    """

    def __init__(
        self, config: TrainConfig, folder: RunFolder, world: World, facts: Mapping[str, Any]
    ) -> None:
        self._config, self._folder, self._world, self._facts = config, folder, world, dict(facts)
        self._saved_at = time.monotonic()

    def check(self, checkpoint: Path, total_steps: int) -> dict[str, Any]:
        """Compare a checkpoint with this run, before any weight is read.

        Args:
            checkpoint: the checkpoint's folder.
            total_steps: steps of the whole run.

        Returns:
            The checkpoint's description of itself.

        Raises:
            ConfigError: if the run would see other pairs, or another reference, than the one that wrote it, or ends before it.
        """
        record: dict[str, Any] = self._world.broadcast_object(
            self._world.together(lambda: read_progress(checkpoint) if self._world.is_main else {})
        )
        self._compare(record["facts"], record["step"], checkpoint)
        if record["step"] > total_steps:
            raise ConfigError(
                f"resume_from_checkpoint: {checkpoint} stands after step {record['step']} and this run has "
                f"{total_steps}; set epochs or max_steps_per_epoch higher, or continue from an earlier one"
            )
        return record

    def restore(self, checkpoint: Path, state: TrainState, total_steps: int) -> Progress:
        """Continue from a checkpoint: weights, optimizer state and progress come from it, settings from the config.

        Args:
            checkpoint: the checkpoint's folder.
            state: new state, which is filled.
            total_steps: steps of the whole run.

        Returns:
            Where the run stands.

        Raises:
            ConfigError: see :meth:`check`; also if its optimizer state or what it keeps by row does not fit.
        """
        facts = self.check(checkpoint, total_steps)["facts"]
        written_now = self._facts["config"]
        written_then = facts["config"] if isinstance(facts.get("config"), Mapping) else {}
        importable = {path for _, path in component_paths(written_now)}
        now, then = (
            without_defaults(type(self._config), config, importable) for config in (written_now, written_then)
        )
        as_long = (
            _same(then, now, "epochs") and facts.get("steps_per_epoch") == self._facts["steps_per_epoch"]
        )
        progress, rows = self._folder.checkpoints.load(
            checkpoint,
            state.model,
            state.optimizer,
            state.scheduler,
            built=state.built,
            same_config=as_long and _same(then, now, "optimizer", "lr_scheduler"),
        )
        if self._world.is_main:
            for key in _differences(then, now):
                line = f"{key} is {_shown(written_now, key)} and was {_shown(written_then, key)}"
                log.info(f"continuing with another setting: {line}; {_effect(line)}")
        for source, key in _KEY_OF_SOURCE.items():
            if _without(then.get(key), _WHEN) != _without(now.get(key), _WHEN):
                rows = self._drop(rows, source, key)
        try:
            state.load_rows(rows)
        except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
            raise ConfigError(
                f"resume_from_checkpoint: {checkpoint}: what it keeps of weights or anchors by row cannot be taken up "
                f"({type(error).__name__}: {error}); continue from another checkpoint"
            ) from error
        if progress.best is not None and not _same(then, now, *_DECIDES_BEST):
            self._say(
                f"best: the value of before ({progress.best:g}) was another measure's; the search for the best starts again"
            )
            progress.best = None
        return progress

    def _drop(self, rows: dict[str, Tensor], source: str, key: str) -> dict[str, Tensor]:
        """Drop the results of a source whose settings have changed."""
        of_source = (f"{source}.", f"{source}_val_")  # of training and of validation data
        kept = {name: tensor for name, tensor in rows.items() if not name.startswith(of_source)}
        if len(kept) < len(rows):
            self._say(
                f"{key}: has other settings than before; what was kept by row is computed again when it is needed"
            )
        return kept

    def _say(self, message: str) -> None:
        if self._world.is_main:
            log.info(message)

    def _compare(self, then: Mapping[str, Any], step: int, checkpoint: Path) -> None:
        now = self._facts
        mends = {
            "data": "set dataset as it was",
            "pairs_per_step": "set batch_size and gradient_accumulation_steps so that they are as many",
            "seed": "set it as it was",
            "shuffle": "set it as it was",
            "reference": "restore the weights of ref_checkpointer (or checkpointer)",
            "base": "a checkpoint of adapters needs the base that it was trained on: restore the weights of checkpointer",
            "adapters": "set model as it was",
        }
        faults = [
            f"{key} is {now.get(key)!r} and was {then.get(key)!r} when {checkpoint} was written; {mend}, or start a new run"
            for key, mend in mends.items()
            if now.get(key) != then.get(key)
        ]
        # Within the first epoch of both runs, the end of the epoch does not matter.
        own, former = int(now["steps_per_epoch"]), then.get("steps_per_epoch")
        if own != former and (not isinstance(former, int) or step >= min(own, former)):
            faults.append(
                f"steps_per_epoch is {own} and was {former} when {checkpoint} was written, after step {step}; set "
                "max_steps_per_epoch as it was, or start a new run"
            )
        if faults:
            raise ConfigError([f"resume_from_checkpoint: {fault}" for fault in faults])

    def after_step(
        self, progress: Progress, state: TrainState, checkpointer: Any, *, total_steps: int, stopping: bool
    ) -> None:
        """Write what is due after a step.

        Args:
            progress: where the run stands.
            state: what is saved.
            checkpointer: writes the policy's weights.
            total_steps: steps of the whole run.
            stopping: whether the run was asked to stop here.
        """
        steps_per_epoch, step = int(self._facts["steps_per_epoch"]), progress.step
        epoch_done, last = step % steps_per_epoch == 0, step == total_steps
        # Asked first, because every process must take part if the interval between checkpoints is in minutes.
        due = self._is_due(step, epoch_done) or stopping or last
        if epoch_done or due:
            self._refuse_not_finite(state.model, step)
        # Weights first: a run that is killed in between resumes from an earlier checkpoint and writes them again.
        if epoch_done or last:
            self._folder.export(checkpointer, state.model, (step - 1) // steps_per_epoch)
        if due:
            self._folder.checkpoints.save(
                state.model,
                state.optimizer,
                state.scheduler,
                progress,
                live=state.rows(),
                facts={**self._facts, "run": self._folder.run_id() if self._world.is_main else None},
                built=state.built,
                keep_last=self._config.keep_last,
                background=self._config.enable_async_checkpointing and not (stopping or last),
            )
            self._saved_at = time.monotonic()

    def export_again(self, state: TrainState, checkpointer: Any, total_steps: int) -> None:
        """Write the last epoch's weights again if they were removed, for a run that resumes from its end."""
        epoch = (total_steps - 1) // int(self._facts["steps_per_epoch"])
        there = self._world.is_main and (self._folder.path / f"epoch_{epoch}").is_dir()
        if not self._world.broadcast_object(there):
            self._say(f"epoch_{epoch} is not there any more: written again from the checkpoint")
            self._folder.export(checkpointer, state.model, epoch)

    def _refuse_not_finite(self, model: nn.Module, step: int) -> None:
        """Refuse to write weights that are not finite.

        Raises:
            TokenprefError: on every process, naming the first such tensor.
        """
        name = first_not_finite(model, self._world)
        if name is None:
            return
        # A background save has the weights of an earlier step, which were finite.
        self._folder.checkpoints.settle()
        raise TokenprefError(
            f"step {step}: the update made {name} not finite; these weights were not written, and what was written before stays. "
            f"Lower optimizer.lr or set clip_grad_norm, and go on from the last checkpoint of {self._folder.path} with "
            "resume_from_checkpoint=auto, or start a new run with another output_dir"
        )

    def after_validation(
        self, metrics: Mapping[str, float], progress: Progress, state: TrainState, checkpointer: Any
    ) -> None:
        """Keep the weights if no earlier validation was better. Every process passes the same metrics.

        Args:
            metrics: the metrics of the validation.
            progress: progress of the run, which records the best value.
            state: what is saved.
            checkpointer: writes the policy's weights.

        Raises:
            ConfigError: if the metric that decides is not among them.
            TokenprefError: if the weights to keep are not finite.
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
        self._refuse_not_finite(state.model, progress.step)
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


def _same(then: Mapping[str, Any], now: Mapping[str, Any], *keys: str) -> bool:
    return all(then.get(key) == now.get(key) for key in keys)


def _without(node: Any, keys: frozenset[str]) -> Any:
    return {k: v for k, v in node.items() if k not in keys} if isinstance(node, Mapping) else node


def _differences(then: Any, now: Any, key: str = "") -> Iterator[str]:
    """Dotted keys whose settings differ between two configs as plain data. How this start was requested is not a setting."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        for name in sorted({*map(str, then), *map(str, now)}):
            if key or name not in ("resume_from_checkpoint", "dry_run"):
                inner = f"{key}.{name}" if key else name
                yield from _differences(then.get(name, _DEFAULT), now.get(name, _DEFAULT), inner)
    elif then != now:
        yield key


def _shown(config: Any, key: str) -> str:
    """The value that a config names for a dotted key."""
    for name in key.split("."):
        if not isinstance(config, Mapping) or name not in config:
            return "at its default"
        config = config[name]
    return repr(config)


def _effect(line: str) -> str:
    """The effect of a changed setting on a resumed run."""
    if line.startswith("checkpointer.") and not line.startswith("checkpointer.output_dir"):
        return "the policy's weights come from the checkpoint"
    return "the new value is used"
