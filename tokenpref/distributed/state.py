"""State of sharded and plain models: whole copies for export, sharded files for resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer

from tokenpref.distributed.world import World

__all__ = ["full_state_dict", "load_full_state_dict", "load_sharded", "save_sharded"]


def full_state_dict(model: nn.Module, world: World) -> dict[str, Tensor]:
    """The whole parameters of ``model`` on the CPU of the main process (an empty dict elsewhere).

    Every process must call it.
    """
    if not world.is_distributed:
        return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state: dict[str, Any] = get_model_state_dict(model, options=options)
    return state


def load_full_state_dict(model: nn.Module, state: dict[str, Tensor], world: World) -> None:
    """Copy whole parameters into ``model``, whose tensors are materialised already (sharded or not).

    Args:
        model: target; each tensor keeps its own dtype and device.
        state: name to whole tensor on the main process, which broadcasts; ignored elsewhere.
        world: the run's processes.

    Raises:
        RuntimeError: if names or shapes do not fit.
    """
    if not world.is_distributed:
        model.load_state_dict(state, strict=True)
        return
    own = model.state_dict()
    typed: dict[str, Any] = (
        {name: tensor.to(own[name].dtype) for name, tensor in state.items()} if world.is_main else {}
    )
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
    set_model_state_dict(model, typed, options=options)


def save_sharded(path: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Write model and optimizer to the folder ``path``, each process its own shards."""
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=path)


def load_sharded(path: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Read what :func:`save_sharded` wrote, into a model and a fresh optimizer, in place.

    The number of processes may differ from the one that wrote.
    """
    weights, state = get_state_dict(model, optimizer)
    stored: dict[str, Any] = {"model": weights, "optimizer": state}
    with torch.no_grad():
        dcp.load(stored, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=stored["model"], optim_state_dict=stored["optimizer"])
