"""FSDP2 around a decoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torchao.dtypes.nf4tensor import NF4Tensor

from tokenpref.distributed.world import World

__all__ = [
    "compute_dtype_of",
    "free_gathered_layers",
    "gradient_sync",
    "is_sharded",
    "register_forward",
    "reshard",
    "shard",
    "unsharded",
]

_COMPUTE_DTYPE = "_compute_dtype"


def is_sharded(model: nn.Module) -> bool:
    """True when FSDP2 manages the parameters of ``model``."""
    return isinstance(model, FSDPModule)


def shard(
    model: nn.Module,
    layers: Sequence[nn.Module],
    world: World,
    *,
    reshard_after_forward: bool = True,
    compute_dtype: torch.dtype | None = None,
) -> None:
    """Shard every decoder layer, then the rest with the root, over the world's mesh (in place).

    Embedding, final norm and output layer stay in the root's group. The token statistics are computed inside the root's
    forward, where these weights are unsharded, tied or not.

    Args:
        model: a decoder, on the meta device or loaded.
        layers: its layers.
        world: a distributed world; without a mesh the model is not changed.
        reshard_after_forward: free the gathered weights after the forward (less memory, one more gather).
        compute_dtype: gather the weights in this dtype and compute in it; the shards, their gradients and the reduction of
            these keep their own precision, at least float32. None: the weights' own dtype.

    A quantised (NF4) model of one process is not sharded either: FSDP2 then only takes weights that consist of one tensor.

    Raises:
        ValueError: for a ``compute_dtype`` without a mesh (a world of one can have one, see :func:`init_world`), or for a
            quantised model of one process.
    """
    if world.mesh is None:
        if compute_dtype is not None:
            raise ValueError(
                "compute_dtype needs FSDP2 and so a world with a mesh; make it with init_world(process_group=True)"
            )
        return
    if world.size == 1 and any(isinstance(parameter, NF4Tensor) for parameter in model.parameters()):
        if compute_dtype is not None:
            raise ValueError("compute_dtype needs FSDP2, which cannot gather NF4 weights in a world of one")
        return
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=None if compute_dtype is None else torch.float32
    )
    for module in (*reversed(layers), model):
        fully_shard(module, mesh=world.mesh, reshard_after_forward=reshard_after_forward, mp_policy=policy)
    model.__dict__[_COMPUTE_DTYPE] = compute_dtype


def compute_dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype in which a model computes: its weights' dtype, unless :func:`shard` was given another."""
    chosen: torch.dtype | None = model.__dict__.get(_COMPUTE_DTYPE)
    return next(model.parameters()).dtype if chosen is None else chosen


def register_forward(model: nn.Module, method: str) -> None:
    """Let a method of a sharded model gather and reduce weights as its ``forward`` does; any other model stays as it is."""
    register_fsdp_forward_method(model, method)


def gradient_sync(model: nn.Module, enabled: bool) -> None:
    """Switch the reduction of gradients after the backward pass on or off. While off, they accumulate unsharded."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Keep the root group's parameters (embedding, norm, output) unsharded during the block."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def free_gathered_layers(model: nn.Module) -> None:
    """Free the gathered parameters of a model's layers, so that the next forward gathers their present values.

    The root's own parameters (embedding, norm, output) are left as they are.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule) and module is not model:
            module.reshard()


def reshard(model: nn.Module) -> None:
    """Free all gathered parameters of a model, those of the root too, so that its parameters are this process's parts."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
