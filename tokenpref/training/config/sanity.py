"""Finds settings of components that cannot work, before anything of the run is built.

The bounds are far outside useful values. They catch typing errors, not unusual choices.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from tokenpref._torchtune import ModelType
from tokenpref.components import nearest
from tokenpref.errors import ConfigError, DataError
from tokenpref.training.config.fields import Component
from tokenpref.training.config.written import is_path_key

__all__ = ["component_faults", "folder_faults", "optimizer_faults", "own_component_faults"]

_OURS = ("tokenpref.", "torch.", "torchtune.", "torchao.")
# By an optimizer's argument: lower bound, upper bound, and whether the upper bound itself is allowed.
OPTIMIZER_BOUNDS: Mapping[str, tuple[float, float, bool]] = {
    "lr": (0.0, 1000.0, True),
    "weight_decay": (0.0, 1000.0, True),
    "eps": (0.0, 1.0, True),
    "momentum": (0.0, 1.0, True),
    "betas": (0.0, 1.0, False),
}
_MOST_STEPS = 2**31 - 1
LEAST_STEPS: Mapping[str, int] = {
    "wait_steps": 0, "warmup_steps": 0, "active_steps": 1, "num_cycles": 0, "num_warmup_steps": 0,
}  # fmt: skip
# The attributes that a recipe needs of a component's result, by key.
METHODS: Mapping[str, tuple[str, ...]] = {
    "checkpointer": ("load_checkpoint", "save_checkpoint"),
    "ref_checkpointer": ("load_checkpoint",),
    "lr_scheduler": ("step", "state_dict"),
    "metric_logger": ("log_config", "log_dict", "close"),
    "optimizer": ("step", "zero_grad"),
    "profiler": ("start", "step", "stop"),
}


def component_faults(component: Component | None) -> list[str]:
    """Faults of a checkpointer, scheduler, logger or profiler that its class and arguments show."""
    if component is None:
        return []
    faults = _nested_faults(component) or _missing_methods(component)
    if component.key == "profiler":
        faults += _step_faults(component, ("wait_steps", "warmup_steps", "active_steps", "num_cycles"))
    if component.key == "lr_scheduler":
        faults += _step_faults(component, ("num_warmup_steps",))
    for name in ("output_dir", "log_dir"):
        faults += folder_faults(f"{component.key}.{name}", component.kwargs.get(name))
    return faults + _log_file_faults(component) + _model_type_faults(component) + _resume_faults(component)


def _resume_faults(component: Component) -> list[str]:
    """Arguments with which torchtune's checkpointers look for other files than the run's."""
    if not component.path.startswith("torchtune.") or not component.key.endswith("checkpointer"):
        return []
    return [
        f"{component.key}.{name}: is {component.kwargs[name]!r}, and runs go on from checkpoints of this package's own; "
        "remove it and set resume_from_checkpoint=auto"
        for name in ("resume_from_checkpoint", "should_load_recipe_state", "recipe_checkpoint")
        if component.kwargs.get(name)
    ]


def _nested_faults(component: Component) -> list[str]:
    """Components among the arguments that cannot be built, or whose result does not fit the argument."""
    if not any(isinstance(value, Component) for value in component.kwargs.values()):
        return []
    return own_component_faults(component, build=component.arguments)


def _missing_methods(component: Component) -> list[str]:
    target = component.target()
    if not component.path.startswith(_OURS) or not isinstance(target, type):
        return []  # results of functions and of other packages' classes are checked when they exist
    missing = [name for name in METHODS.get(component.key, ()) if not hasattr(target, name)]
    if not missing:
        return []
    return [
        f"{component.key} ({component.path}): has no {' and no '.join(missing)}; name another component for {component.key}"
    ]


def _step_faults(component: Component, names: Iterable[str]) -> list[str]:
    faults = []
    for name in names:
        value = component.kwargs.get(name)
        if not isinstance(value, int) or isinstance(value, bool):
            continue  # a whole number or null, by the annotation
        if not LEAST_STEPS[name] <= value <= _MOST_STEPS:
            faults.append(
                f"{component.key}.{name}: expected a whole number from {LEAST_STEPS[name]} to {_MOST_STEPS}, found {value}"
            )
    return faults


def folder_faults(key: str, path: object) -> list[str]:
    """The fault of a folder that cannot be created: it or a parent is a file, or its name is empty."""
    if not isinstance(path, str):
        return []
    if not path.strip():
        return [f"{key}: expected the path of a folder, found {path!r}"]
    folder = Path(path).absolute()
    taken = next((above for above in (folder, *folder.parents) if above.exists()), folder)
    return [f"{key}: {taken} is a file; set a folder"] if taken.exists() and not taken.is_dir() else []


def _log_file_faults(component: Component) -> list[str]:
    folder, name = (component.kwargs.get(key) for key in ("log_dir", "filename"))
    if component.key != "metric_logger" or not isinstance(folder, str) or not isinstance(name, str):
        return []
    file = Path(folder) / name
    if name and (name.endswith("/") or file.is_dir()):
        return [f"metric_logger.filename: {file} is a folder; set the name of a file"]
    if file.parent != Path(folder) and not file.parent.is_dir():
        return [
            f"metric_logger.filename: there is no folder {file.parent}; set a plain name, or make that folder"
        ]
    return []


def _model_type_faults(component: Component) -> list[str]:
    """The fault of an unknown model name in a torchtune checkpointer."""
    name, known = component.kwargs.get("model_type"), ModelType.__members__
    if not component.path.startswith("torchtune.") or not isinstance(name, str) or name in known:
        return []
    return [
        f"{component.key} ({component.path}): it knows no {name!r}{nearest(name, known)} (model_type is one of "
        f"{', '.join(known)})"
    ]


def own_component_faults(component: Component | None, build: Any = None) -> list[str]:
    """Errors from building a component of this package, which is cheap if it opens no files."""
    if component is None or (build is None and not component.path.startswith("tokenpref.")):
        return []
    if build is None and any(map(is_path_key, component.kwargs)):
        return []  # it opens a store or a pair, which may not exist yet
    try:
        (build or component.callable)()
    except DataError as error:
        return [str(error)]  # it names the file
    except ConfigError as error:
        return [
            f if f.startswith(component.key) else f"{component.key} ({component.path}): {f}"
            for f in error.faults
        ]
    return []


def optimizer_faults(
    optimizer: Component | None, scheduler: Component | None, dtype: torch.dtype
) -> list[str]:
    """Rates and decays that are out of bounds or give weights that are not finite, and schedules that give such rates."""
    if optimizer is None:
        return []
    faults = [
        fault for name, value in optimizer.kwargs.items() for fault in _bound_faults(optimizer, name, value)
    ]
    if scheduler is not None:
        faults += [
            f"{scheduler.key}.{name}: expected a finite number of at most {_MOST_STEPS}, found {value}"
            for name, value in scheduler.kwargs.items()
            if isinstance(value, float) and not abs(value) <= _MOST_STEPS
        ]
    if optimizer.kwargs.get("maximize"):
        faults.append(f"{optimizer.key}.maximize: true would maximise the loss; set false")
    if faults or _missing_methods(optimizer):
        return faults + _missing_methods(optimizer)
    probe = nn.Parameter(torch.full((64, 64), 0.02, dtype=dtype))
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            built = optimizer.build(nn.ParameterList([probe]).parameters())
            return _probe(optimizer, built, probe) or _schedule_faults(scheduler, built)
    except ConfigError as error:
        return error.faults


def _bound_faults(optimizer: Component, name: str, value: Any) -> list[str]:
    numbers = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int | float)]
    low, high, inclusive = OPTIMIZER_BOUNDS.get(name, (-math.inf, math.inf, False))
    bad = [
        v for v in numbers if not (low <= v and (v < high or (inclusive and v == high)) and abs(v) < math.inf)
    ]
    if not bad:
        return []
    wanted = (
        "a finite number"
        if low == -math.inf
        else f"a number from {low:g} to {'' if inclusive else 'below '}{high:g}"
    )
    return [f"{optimizer.key}.{name}: expected {wanted}, found {bad[0]}"]


def _probe(optimizer: Component, built: Any, probe: nn.Parameter) -> list[str]:
    """Try one step on weights of a usual size."""
    if not hasattr(built, "step"):
        return []  # reported when the run builds it
    probe.grad = torch.full_like(probe, 1e-3)
    try:
        built.step()
    except (RuntimeError, TypeError, ValueError) as error:
        return [f"{optimizer.key} ({optimizer.path}): cannot take a step with these settings ({error})"]
    if bool(probe.isfinite().all()):
        return []
    return [
        f"{optimizer.key} ({optimizer.path}): one step with these settings makes weights that are not finite; lower them"
    ]


def _schedule_faults(scheduler: Component | None, optimizer: Any) -> list[str]:
    """Check the rates of a schedule of this package, torch or torchtune over a run of many steps."""
    if scheduler is None or not scheduler.path.startswith(_OURS):
        return []
    warmup = scheduler.kwargs.get("num_warmup_steps", 0)
    steps = max(1000, 2 * warmup if isinstance(warmup, int) else 0)
    built = scheduler.build(optimizer, num_training_steps=steps, last_epoch=-1)
    if not isinstance(built, LambdaLR):
        return []
    for step in (0, 1, *(steps * part // 7 for part in range(1, 7)), steps - 1):
        for factor in (rate(step) for rate in built.lr_lambdas):
            if not (math.isfinite(factor) and factor >= -1e-6):
                return [
                    f"{scheduler.key} ({scheduler.path}): the learning rate would be {factor} times optimizer.lr at step "
                    f"{step} of {steps}; check its arguments"
                ]
    return []
