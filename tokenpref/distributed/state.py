"""State of sharded and plain models: whole copies for export, and sharded files for resuming."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.optim import Optimizer
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4

from tokenpref._files import write_fault, writing
from tokenpref._sealed import Written
from tokenpref.distributed.float8_weights import plain_weights, refresh_float8_scales, unwrapped
from tokenpref.distributed.plain_writing import Arena, PlainWriter
from tokenpref.distributed.safe_reading import SafePlanner, SafeReader
from tokenpref.distributed.sharding import free_gathered_layers, reshard
from tokenpref.distributed.world import World
from tokenpref.errors import TokenprefError

__all__ = [
    "BackgroundWrite",
    "check_sharded",
    "first_not_finite",
    "full_state_dict",
    "load_full_state_dict",
    "load_sharded",
    "other_values",
    "own_parts",
    "sharded_state",
    "state_modules",
    "state_parameters",
    "write_sharded",
]


_CHECKPOINTED = "_checkpoint_wrapped_module."
"""What activation checkpointing adds to the names of modules. Names in a state dict do not have it."""


def state_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules by their names in the state dict."""
    return {name.replace(_CHECKPOINTED, ""): module for name, module in model.named_modules()}


def state_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by their names in the state dict, sharded or not, without a call of the state dict's hooks."""
    return {name.replace(_CHECKPOINTED, ""): parameter for name, parameter in model.named_parameters()}


def _trained(model: nn.Module) -> dict[str, Tensor] | None:
    """The trained parameters of a model that also has frozen ones, such as a base under adapters; None if it has none."""
    own = state_parameters(model)
    trained = {name: parameter.detach() for name, parameter in own.items() if parameter.requires_grad}
    return trained if len(trained) < len(own) else None


def full_state_dict(model: nn.Module, world: World) -> dict[str, Tensor]:
    """All parameters of ``model``, unsharded, on the CPU of the main process (an empty dict on the others).

    Every process must call it.
    """
    if not world.is_distributed:
        return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return plain_weights(get_model_state_dict(model, options=options))


def first_not_finite(model: nn.Module, world: World) -> str | None:
    """Name of the first weight with a value that is not finite, on any process; None if all are finite.

    Every process must call it. It reads the weights once and checks one number per tensor. If some weights are trained and
    others are frozen, as under adapters, only the trained ones are read.
    """
    shards: dict[str, Tensor] = {}
    weights = _trained(model) or model.state_dict()
    for name, tensor in plain_weights(weights).items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if type(local.detach()) is Tensor and local.is_floating_point() and local.numel():
            shards[name] = local.detach()
    norms = torch._foreach_norm(list(shards.values()), float("inf")) if shards else []
    finite = torch.stack([norm.double() for norm in norms]).isfinite().tolist() if norms else []
    bad = next((name for name, good in zip(shards, finite, strict=True) if not good), None)
    if not world.any(bad is not None):
        return None
    order = {name: place for place, name in enumerate(weights)}
    return min((name for name in world.gather_objects(bad) if name is not None), key=order.__getitem__)


@torch.no_grad()
def load_full_state_dict(model: nn.Module, state: Mapping[str, Tensor], world: World) -> None:
    """Copy whole tensors into ``model``, whose tensors must be materialised (sharded or not), one tensor at a time.

    The main process looks up a tensor when its turn comes. If ``state`` reads its tensors from files on demand, no process holds
    more than one whole tensor beside the model. NF4 weights are quantised as a whole on every process, so that their numbers do
    not depend on the number of processes.

    Args:
        model: target; each tensor keeps its own dtype and device.
        state: name to whole tensor on the main process, which broadcasts; ignored elsewhere.
        world: the run's processes.

    Raises:
        RuntimeError: on the main process, if names or shapes do not fit.
        Exception: on the main process, if a tensor cannot be looked up; the model then holds zeros from that tensor on.
        TokenprefError: on the other processes, if the main process fails.
    """
    reshard(model)
    own = _state_tensors(model)
    world.together(lambda: _check_names(own, state) if world.is_main else None)
    failure: Exception | None = None
    quantised: dict[str, Tensor] = {}
    for name, target in own.items():
        whole: Tensor | None = None
        if world.is_main and failure is None:
            try:
                whole = _fitting(name, state[name], target, world.device)
            except (
                Exception
            ) as error:  # raised after the loop, because the other processes already wait for the tensors
                failure = error
        if whole is None:
            whole = torch.zeros(target.shape, dtype=target.dtype, device=world.device)
        if world.is_distributed:
            torch.distributed.broadcast(whole, src=0)
        local = _local(target)
        if isinstance(local, NF4Tensor):
            quantised[name] = _own_nf4(whole, target, local, world)
        else:
            unwrapped(local).copy_(_own_rows(whole, target, world))
    world.together(lambda: _raise(failure))
    if (
        quantised
    ):  # replaced, because a tensor that was made on the meta device lacks the table of values of NF4
        model.load_state_dict(quantised, strict=False, assign=True)
    refresh_float8_scales(model)


def _state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by their names in the state dict.

    The hooks of a quantised decoder's ``state_dict`` would restore every weight, so they are not called.
    """
    found: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        kept = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        for name, tensor in {**module._parameters, **kept}.items():
            if tensor is not None:
                found[(f"{path}.{name}" if path else name).replace(_CHECKPOINTED, "")] = tensor
    return found


def _check_names(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    faults = [f"no {name!r}" for name in own if name not in state]
    faults += [f"unexpected {name!r}" for name in state if name not in own]
    if faults:
        raise RuntimeError(f"the state dict does not fit the model: {'; '.join(faults)}")


def _fitting(name: str, whole: Tensor, target: Tensor, device: torch.device) -> Tensor:
    """A whole tensor in the dtype and on the device of the model's."""
    if whole.shape != target.shape:
        raise RuntimeError(
            f"the state dict does not fit the model: {name!r} has shape {list(whole.shape)}, and the model's has "
            f"{list(target.shape)}"
        )
    return whole.detach().to(device, target.dtype).contiguous()


def _raise(failure: Exception | None) -> None:
    if failure is not None:
        raise failure


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _own_rows(whole: Tensor, target: Tensor, world: World) -> Tensor:
    """This process's part of a whole tensor, split as FSDP2 splits."""
    if not isinstance(target, DTensor):
        return whole
    parts = whole.chunk(world.size)
    return parts[world.rank] if world.rank < len(parts) else whole[:0]


def _own_nf4(whole: Tensor, target: Tensor, local: NF4Tensor, world: World) -> Tensor:
    """This process's part of a weight, quantised as a whole."""
    rows = _own_rows(to_nf4(whole, local.block_size, local.scaler_block_size), target, world)
    return _as_shard(rows, target) if isinstance(target, DTensor) else rows


def _as_shard(mine: Tensor, like: DTensor) -> DTensor:
    """This process's part of an NF4 weight as a DTensor, without the operations on DTensors that NF4 lacks."""
    part = mine.new_zeros(mine.shape)  # memory of its own, so that the whole weight is freed
    part.copy_(mine)
    meta = TensorMeta(shape=like.shape, stride=like.stride(), dtype=like.dtype)
    spec = DTensorSpec(mesh=like.device_mesh, placements=like.placements, tensor_meta=meta)
    return DTensor(part, spec, requires_grad=False)


@torch.no_grad()
def own_parts(
    model: nn.Module, names: Iterable[str], state: Mapping[str, Tensor], world: World
) -> dict[str, Tensor]:
    """This process's parts of whole tensors, split as the parameters of these names are. Every process must call it.

    Args:
        model: the model with the parameters, sharded or not.
        names: names of parameters in its state dict.
        state: whole tensors by name on the main process; ignored elsewhere.
        world: the run's processes.

    Returns:
        New tensors by name, in the dtype and on the device of the parameters.
    """
    free_gathered_layers(model)
    own = state_parameters(model)
    found: dict[str, Tensor] = {}
    for name in names:
        parameter = own[name]
        if world.is_main:
            whole = state[name].detach().to(world.device, parameter.dtype)
        else:
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=world.device)
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            whole = _local(torch.distributed.tensor.distribute_tensor(whole, mesh, placements))
        elif world.is_distributed:
            torch.distributed.broadcast(whole, src=0)
        found[name] = whole.clone()
    return found


@contextmanager
def other_values(model: nn.Module, parts: Mapping[str, Tensor]) -> Iterator[None]:
    """Let parameters of a model's layers have other values inside the block. They are changed in place and restored bit by bit.

    Args:
        model: the model, sharded or not.
        parts: values from :func:`own_parts`, by the parameters' names in the state dict.
    """
    # FSDP2 computes with gathered copies for as long as it keeps them, so they are freed after every change.
    free_gathered_layers(model)
    parameters = state_parameters(model)
    own = {name: _local(parameters[name]).detach() for name in parts}
    before = {name: tensor.clone() for name, tensor in own.items()}
    try:
        _copy_all(parts, own)
        yield
    finally:
        free_gathered_layers(model)
        _copy_all(before, own)


@torch.no_grad()
def _copy_all(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in source.items():
        target[name].copy_(tensor)


@contextmanager
def _plain_failures(what: str, *, writes: bool = False) -> Iterator[None]:
    """Raise the cause of PyTorch's exception, which is not an ``Exception`` and hides its cause in a table.

    Args:
        what: what failed.
        writes: whether it was a write, whose failure the operating system explains.

    Raises:
        TokenprefError: on every rank, with the first rank's cause.
    """
    try:
        yield
    except CheckpointException as error:
        rank, (cause, _) = min(error.failures.items())
        if writes and isinstance(cause, Exception) and (fault := write_fault(cause)):
            raise TokenprefError(f"{what}: {fault}") from error
        text = str(cause).strip().splitlines() or [""]
        raise TokenprefError(f"{what} (rank {rank}: {type(cause).__name__}: {text[0]})") from error


def sharded_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """This process's shards for :func:`write_sharded`, without a copy. Every process must call it.

    Frozen parameters are left out: they come from the checkpoint that the run started from.
    """
    trained = _trained(model)
    if trained is not None:
        return {"model": trained, "optimizer": get_optimizer_state_dict(model, optimizer)}
    weights, state = get_state_dict(model, optimizer)
    return {"model": plain_weights(weights), "optimizer": state}


def write_sharded(path: Path, state: dict[str, Any], world: World) -> dict[str, Written]:
    """Write the shards of all processes to the folder ``path``; every process calls it.

    Args:
        path: an empty folder.
        state: from :func:`sharded_state`.
        world: the processes.

    Returns:
        The shards of all processes by file name, with checksums that were computed while they were written.

    Raises:
        TokenprefError: on every process, if one of them cannot write.
    """
    writer = PlainWriter(path)
    with _plain_failures(f"{path}: the checkpoint cannot be written", writes=True):
        dcp.save(state, storage_writer=writer, process_group=world.group)
    return _of_all(writer, world)


def _of_all(writer: PlainWriter, world: World) -> dict[str, Written]:
    return {
        name: written for files in world.gather_objects(writer.written) for name, written in files.items()
    }


class BackgroundWrite:
    """A save in two parts: everything is copied to memory while the training waits, and another thread writes it.

    Args:
        world: the processes, with a group of their own for that thread (:meth:`World.aside`).
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._memory = Arena()

    def take(self, path: Path, state: dict[str, Any]) -> Callable[[], dict[str, Written]]:
        """Copy the shards of this process; every process must call it, in the training thread.

        Args:
            path: an empty folder.
            state: from :func:`sharded_state`.

        Returns:
            A function that writes them to the folder. Call it in another thread, on every process, before the next copy. It
            returns the same as :func:`write_sharded`.

        Raises:
            TokenprefError: on every process, if one of them cannot copy.
        """
        writer = PlainWriter(path, self._memory)
        with _plain_failures(f"{path}: the checkpoint cannot be written", writes=True):
            dcp.save(state, storage_writer=writer, process_group=self._world.group)

        def write() -> dict[str, Written]:
            def flush() -> None:
                with writing(f"{path}: the checkpoint"):
                    writer.flush()

            self._world.together(flush)
            return _of_all(writer, self._world)

        return write


def check_sharded(path: Path) -> None:
    """Check the index of a folder that :func:`write_sharded` wrote, before any process reads anything else.

    PyTorch itself would look for another index and print its own failure.

    Raises:
        TokenprefError: if it is damaged, or contains something that no checkpoint of this package contains.
    """
    try:
        SafeReader(path).read_metadata()
    except Exception as error:  # a damaged pickle may raise nearly anything, which becomes our error
        raise TokenprefError(
            f"{path}: the checkpoint cannot be read ({type(error).__name__}: {error})"
        ) from error


def load_sharded(
    path: Path,
    model: nn.Module,
    optimizer: Optimizer,
    settle: Callable[[list[dict[str, Any]]], None] | None = None,
) -> None:
    """Read what :func:`write_sharded` wrote, into a model and a fresh optimizer, in place.

    The number of processes may differ from the one that wrote.

    Args:
        path: the checkpoint's folder.
        model: target.
        optimizer: a new optimizer of the same kind. Its own parameter groups decide which parameters a group has.
        settle: changes the settings of the checkpoint's parameter groups before the optimizer gets them.

    Raises:
        TokenprefError: if the state is damaged or belongs to another kind of optimizer.
    """
    stored = sharded_state(model, optimizer)
    own_groups: list[dict[str, Any]] = stored["optimizer"]["param_groups"]
    names = SafeReader(path).read_metadata().state_dict_metadata
    _check_optimizer_state(path, names, stored["model"], stored["optimizer"]["state"], len(own_groups))
    # Only the settings of the checkpoint: another version of PyTorch may have further ones.
    groups = [
        {k: v for k, v in group.items() if f"optimizer.param_groups.{number}.{k}" in names and k != "params"}
        for number, group in enumerate(own_groups)
    ]
    wanted = {"model": stored["model"], "optimizer": {**stored["optimizer"], "param_groups": groups}}
    with torch.no_grad(), _plain_failures(f"{path}: the checkpoint cannot be read"):
        dcp.load(wanted, storage_reader=SafeReader(path), planner=SafePlanner())
    if settle is not None:
        settle(groups)
    merged = [{**own, **group} for own, group in zip(own_groups, groups, strict=True)]
    state = {**wanted["optimizer"], "param_groups": merged}
    if _trained(model) is None:
        set_state_dict(model, optimizer, model_state_dict=wanted["model"], optim_state_dict=state)
    else:  # the weights were read into the parameters themselves
        set_optimizer_state_dict(model, optimizer, state)
    refresh_float8_scales(model)


def _check_optimizer_state(
    path: Path, names: Iterable[str], parameters: Iterable[str], own: Mapping[str, Any], groups: int
) -> None:
    """Compare the kinds of state that a checkpoint and an optimizer keep.

    Raises:
        TokenprefError: naming the state that only one of them has, or the numbers of parameter groups.
    """
    prefixes = {f"optimizer.state.{parameter}." for parameter in parameters}
    found, numbers = set(), set()
    for name in names:
        if name.startswith("optimizer.param_groups."):
            numbers.add(name.split(".")[2])
        elif name.startswith("optimizer.state."):
            ends = (at + 1 for at, letter in enumerate(name) if letter == "." and name[: at + 1] in prefixes)
            found |= {name[end:].split(".")[0] for end in ends}
    mine = {str(kind) for state in own.values() for kind in state}
    faults = [f"it has no {kind!r}, which this optimizer needs" for kind in sorted(mine - found)]
    faults += [f"it has {kind!r}, which this optimizer does not use" for kind in sorted(found - mine)]
    if len(numbers) != groups:
        faults.append(f"it has {len(numbers)} parameter groups, and this optimizer has {groups}")
    if faults:
        raise TokenprefError(
            f"optimizer: {path} was written by another kind of optimizer ({'; '.join(faults)}); set optimizer as it was, or "
            "start a new run from the exported weights"
        )
