"""FSDP2 around torchtune's decoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.distributed.fsdp import FSDPModule

from tokenpref._torchtune import get_shard_conditions, shard_model
from tokenpref.distributed.world import World

__all__ = ["gradient_sync", "is_sharded", "shard", "unsharded"]


def is_sharded(model: nn.Module) -> bool:
    """True when FSDP2 manages the parameters of ``model``."""
    return isinstance(model, FSDPModule)


def shard(model: nn.Module, world: World, *, reshard_after_forward: bool = True) -> None:
    """Shard every decoder layer, then the rest with the root, over the world's mesh (in place).

    Embedding, final norm and output stay in the root's group: the token statistics run inside the root's
    forward, where these weights are whole, tied or not.

    Args:
        model: a torchtune decoder, on the meta device or loaded.
        world: a distributed world; a plain single process leaves the model as it is.
        reshard_after_forward: free the gathered weights after the forward (less memory, one gather more).
    """
    if world.mesh is None:
        return
    shard_model(
        model,
        [partial(get_shard_conditions, names_to_match=None)],
        cpu_offload=False,
        reshard_after_forward=reshard_after_forward,
        dp_mesh=world.mesh,
    )


def gradient_sync(model: nn.Module, enabled: bool) -> None:
    """Switch the reduction of gradients after backward on or off (off: they stay whole and accumulate)."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(enabled)


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Hold the root group's parameters (embedding, norm, output) whole for the time of the block."""
    if not isinstance(model, FSDPModule):
        yield
        return
    model.unshard()
    try:
        yield
    finally:
        model.reshard()
