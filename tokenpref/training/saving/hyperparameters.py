"""Decides which hyperparameters of a resumed run come from its config, and which from its checkpoint."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

__all__ = ["Hyperparameters", "plain", "record_fault", "replay_schedule", "schedule_state"]

Group = dict[str, Any]


@dataclass(frozen=True)
class Hyperparameters:
    """An optimizer's parameter groups as the config made them, before the first step.

    A checkpoint records them. When a run resumes, they separate two cases: a setting that the config changed gets its new value,
    and a value that the optimizer itself changes (some count their steps in a parameter group) comes from the checkpoint.

    Args:
        kind: class of the optimizer.
        groups: its parameter groups without the parameters.
    """

    kind: str
    groups: list[Group]

    @classmethod
    def of(cls, optimizer: Optimizer) -> Hyperparameters:
        """Copy the settings of an optimizer that has made no step and whose schedule has been built."""
        # A user's component may wrap an optimizer without being one; it only needs param_groups.
        kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
        return cls(kind, [_settings(group) for group in optimizer.param_groups])

    def record(self) -> dict[str, Any]:
        """The settings as plain data, for a checkpoint."""
        return {"class": self.kind, "groups": [plain(group) for group in self.groups]}

    def fault(self, then: Mapping[str, Any] | None) -> str | None:
        """The reason why the optimizer state of a checkpoint cannot be used; None if it can."""
        if then is None:
            return None
        if then["class"] != self.kind:
            return f"written by {then['class']}, and this run has {self.kind}"
        if len(then["groups"]) != len(self.groups):
            return f"written with {len(then['groups'])} parameter groups, and this run has {len(self.groups)}"
        return None

    def settle(self, stored: Sequence[Group], then: Mapping[str, Any] | None, *, same_config: bool) -> None:
        """Apply the settings that the config changed to the groups of a checkpoint, in place.

        Args:
            stored: the groups of the checkpoint.
            then: the result of :meth:`record` in the checkpoint; None in checkpoints of earlier versions.
            same_config: whether the config of the optimizer and its schedule is unchanged. It decides if there is no record.
        """
        groups = then["groups"] if then is not None else [None] * len(self.groups)
        for own, group, former in zip(self.groups, stored, groups, strict=True):
            for name, value in own.items():
                unchanged = same_config if former is None else former.get(name) == plain(value)
                if name not in group or not unchanged:
                    group[name] = copy.deepcopy(value)

    def is_as(self, then: Mapping[str, Any] | None) -> bool:
        """Whether a checkpoint was written with these settings; True if it has no record."""
        return then is None or self.record() == then


def record_fault(record: Mapping[str, Any] | None) -> str | None:
    """The reason why a checkpoint's record of settings is invalid; None if it is valid or missing."""
    if record is None:
        return None
    kind, groups = record.get("class"), record.get("groups")
    if not isinstance(kind, str):
        return f"optimizer.class is {kind!r}, expected the name of a class"
    if not isinstance(groups, list) or not all(isinstance(group, dict) for group in groups):
        return f"optimizer.groups is {groups!r}, expected a list of mappings"
    return None


def replay_schedule(
    optimizer: Optimizer,
    scheduler: LRScheduler,
    built: Hyperparameters,
    steps: int,
    stored: Mapping[str, Any] | None,
) -> None:
    """Advance a new schedule by some steps, as if it had been used from the first one.

    Every further step gets the rate that this config gives it in a run from the beginning, also if the config's
    rate, warm-up or length has changed.

    Args:
        optimizer: with the settings of the resumed run.
        scheduler: a new schedule.
        built: the optimizer's settings when the schedule was made.
        steps: optimizer steps done.
        stored: the schedule's state in the checkpoint, if the config of optimizer, schedule and length is as it was. A schedule
            that depends on more than the number of steps takes that state.
    """
    settled = [_settings(group) for group in optimizer.param_groups]
    for group, fresh in zip(optimizer.param_groups, built.groups, strict=True):
        group.update(copy.deepcopy(fresh))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for _ in range(steps):
            scheduler.step()
    if stored is not None and plain(schedule_state(scheduler)) != plain(stored):
        scheduler.load_state_dict(dict(stored))
        for group, settings in zip(optimizer.param_groups, settled, strict=True):
            group.update(settings)
        return
    for group, fresh, settings in zip(optimizer.param_groups, built.groups, settled, strict=True):
        for name, value in settings.items():
            of_schedule = name in ("lr", "initial_lr") or plain(group.get(name)) != plain(fresh.get(name))
            if not of_schedule:
                group[name] = value


def schedule_state(scheduler: LRScheduler | None) -> dict[str, Any] | None:
    """A scheduler's state without the callables that LambdaLR lists (they come from the config)."""
    if scheduler is None:
        return None
    state = dict(scheduler.state_dict())
    if "lr_lambdas" in state:
        state["lr_lambdas"] = [None] * len(state["lr_lambdas"])
    return state


def plain(value: Any) -> Any:
    """A setting after a round trip through JSON, for comparisons."""
    return json.loads(json.dumps(value, default=_unwrapped))


def _unwrapped(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else repr(value)


def _settings(group: Mapping[str, Any]) -> Group:
    return {str(name): copy.deepcopy(value) for name, value in group.items() if name != "params"}
