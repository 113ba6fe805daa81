"""Optimizer, logger and profiler, built from their components."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tokenpref.errors import ConfigError
from tokenpref.training.config.fields import Component

__all__ = ["build_logger", "build_optimizer", "build_profiler", "build_scheduler"]


def build_optimizer(component: Component, parameters: Iterable[nn.Parameter]) -> Optimizer:
    """The optimizer of a model's trainable parameters.

    Raises:
        ConfigError: if the component makes something else.
    """
    return _of_kind(component, component.build(parameters), "param_groups", "step", "zero_grad")


def build_scheduler(component: Component | None, optimizer: Optimizer, steps: int) -> LRScheduler | None:
    """The schedule of an optimizer's learning rate over a run of so many steps; None without a component."""
    if component is None:
        return None
    scheduler: LRScheduler = component.build(optimizer, num_training_steps=steps, last_epoch=-1)
    return scheduler


def build_logger(component: Component) -> Any:
    """A metric logger, as torchtune's are.

    Raises:
        ConfigError: if the component makes something else.
    """
    return _of_kind(component, component.build(), "log_config", "log_dict", "close")


def build_profiler(component: Component | None) -> Any:
    """A profiler, of the pair that torchtune's setup function returns; None without a component.

    Raises:
        ConfigError: if the component makes something else.
    """
    built = component.build() if component is not None else None
    profiler = built[0] if isinstance(built, tuple) and built else built
    return None if component is None else _of_kind(component, profiler, "start", "step", "stop")


def _of_kind(component: Component, built: Any, *names: str) -> Any:
    missing = [name for name in names if not hasattr(built, name)]
    if missing:
        raise ConfigError(
            f"{component.key} ({component.path}): makes a {type(built).__name__}, which has no {' and no '.join(missing)}; name "
            f"another component for {component.key}"
        )
    return built
