"""What a decoder's layers keep for the backward: what they need, their inputs alone, or nothing on the GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from tokenpref._torchtune import (
    OffloadActivations,
    TransformerDecoder,
    set_activation_checkpointing,
)
from tokenpref.errors import ConfigError

__all__ = [
    "activation_offloading",
    "checkpoint_layers",
    "checkpointed_layers",
    "offload_layers",
]


def checkpointed_layers(model: TransformerDecoder, every: int) -> list[nn.Module]:
    """Every n-th layer of a decoder, as torchtune and torchtitan count: with 2 the second, the fourth, ...

    Raises:
        ConfigError: if it has fewer layers than that.
    """
    if every > len(model.layers):
        raise ConfigError(
            f"ac_option: is {every}, and the model has {len(model.layers)} layers, of which none would be checkpointed; set "
            f"it to at most {len(model.layers)}"
        )
    return list(model.layers)[every - 1 :: every]


def checkpoint_layers(model: TransformerDecoder, every: int = 1) -> None:
    """Let every n-th layer keep its input alone, and compute the rest again in the backward (in place).

    torchtune's own function for single layers counts over all models that it has seen, so that a second model of an odd number of
    layers gets others than the first.

    Raises:
        ConfigError: if no layer is chosen.
    """
    chosen = {id(layer) for layer in checkpointed_layers(model, every)}

    def policy(module: nn.Module, recurse: bool, **_: Any) -> bool:
        return recurse or id(module) in chosen

    set_activation_checkpointing(model, auto_wrap_policy=policy)


def activation_offloading() -> saved_tensors_hooks:
    """torchtune's way to keep activations in pinned memory of the CPU, on a stream of its own; for one model on CUDA."""
    hooks: saved_tensors_hooks = OffloadActivations()
    return hooks


def offload_layers(model: TransformerDecoder, hooks: saved_tensors_hooks) -> None:
    """Let ``hooks`` pack what the layers keep in training, and nothing else (in place).

    The head is left alone: it needs its tensors again at once.

    Args:
        model: a decoder with every layer checkpointed, so that the layers' inputs are all that there is to pack.
        hooks: see :func:`activation_offloading`.
    """
    entered: list[bool] = []

    def enter(_layer: nn.Module, _inputs: Any) -> None:
        entered.append(torch.is_grad_enabled())
        if entered[-1]:
            hooks.__enter__()

    def leave(_layer: nn.Module, _inputs: Any, _output: Any) -> None:
        if entered.pop():
            hooks.__exit__(None, None, None)

    for layer in model.layers:
        layer.register_forward_pre_hook(enter)
        layer.register_forward_hook(leave, always_call=True)
