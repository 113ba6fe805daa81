"""Adapters of a decoder (LoRA and DoRA): which parameters are theirs, their first values, and computing without them.

torchtune's ``lora_*`` and ``qlora_*`` builders replace some linear layers ``W x`` by ``W x + (alpha / rank) B A x``. ``A`` and
``B`` are the adapter. DoRA also learns the length of each row of ``W + (alpha / rank) B A``, its *magnitude*. The rest of the
decoder is the *base*. Its tensors have the same names as in a decoder without adapters, so any checkpoint of the base fits.

A new adapter changes nothing, because ``B`` is zero and the magnitudes are the lengths of the rows of ``W``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4

from tokenpref._torchtune import DoRALinear, LoRALinear
from tokenpref.distributed import World, state_modules, state_parameters
from tokenpref.models.decoder_of import decoder_of
from tokenpref.models.peft_format import merged_weight

__all__ = [
    "adapter_layers",
    "adapter_names",
    "adapter_state",
    "adapters_off",
    "base_tensors",
    "check_adapters",
    "has_adapters",
    "initial_adapters",
    "merged",
]


def adapter_layers(decoder: nn.Module) -> dict[str, Any]:
    """The layers with an adapter (torchtune's LoRALinear or DoRALinear), by their names in the state dict."""
    return {
        name: module
        for name, module in state_modules(decoder).items()
        if callable(getattr(module, "adapter_params", None))
    }


def has_adapters(decoder: nn.Module) -> bool:
    """Whether a decoder has adapters."""
    return any(callable(getattr(module, "adapter_params", None)) for module in decoder.modules())


def adapter_names(decoder: nn.Module) -> list[str]:
    """Names of the adapters' parameters in the state dict, in the decoder's order."""
    return [
        f"{name}.{own}" for name, layer in adapter_layers(decoder).items() for own in layer.adapter_params()
    ]


def base_tensors(decoder: nn.Module) -> dict[str, Tensor]:
    """Names and tensors of the base: what a checkpoint of the base must hold.

    The hooks of a quantised decoder's ``state_dict`` would restore every weight, so they are not called.
    """
    adapters = set(adapter_names(decoder))
    quantised = any(isinstance(parameter, NF4Tensor) for parameter in decoder.parameters())
    own = state_parameters(decoder) if quantised else decoder.state_dict()
    return {name: tensor for name, tensor in own.items() if name not in adapters}


def adapter_state(decoder: nn.Module, world: World) -> dict[str, Tensor]:
    """The adapters' whole tensors, in main memory of the main process (an empty dict on the others).

    Every process must call it.
    """
    found: dict[str, Tensor] = {}
    for name, layer in adapter_layers(decoder).items():
        own = dict(layer.named_parameters())
        for part in layer.adapter_params():
            value = own[part].detach()
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            if world.is_main:
                found[f"{name}.{part}"] = whole.cpu()
    return found


@contextmanager
def adapters_off(decoder: nn.Module) -> Iterator[None]:
    """Let a decoder compute as its base does, inside the block.

    It works for any number of processes, and with activation checkpointing as long as the backward pass is inside the block too,
    because the backward pass computes layers again. ``torch.compile`` keeps one version of each layer for either state.
    """
    layers = list(adapter_layers(decoder).values())
    before = [layer.disabled for layer in layers]
    for layer in layers:
        layer.disabled = True
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.disabled = was


@torch.no_grad()
def initial_adapters(
    decoder: nn.Module,
    base: Mapping[str, Tensor],
    *,
    seed: int,
    compute_dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Tensor]:
    """First values of the adapters: random ``A`` as in the LoRA paper's code, zero ``B``, and magnitudes that change nothing.

    They depend on the seed and the base alone, so any number of processes starts from the same ones.

    Args:
        decoder: the decoder, also on the meta device.
        base: weights of the base, by their names in the decoder's state dict.
        seed: of the random numbers.
        compute_dtype: in which the decoder computes. Magnitudes are taken of the weights in this dtype, so that DoRA's quotient
            of a magnitude and a row's length is exactly one.
        device: where magnitudes are computed; the device of the training, whose sums they must equal.

    Returns:
        Tensors by their names in the decoder's state dict.
    """
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Tensor] = {}
    for name, layer in adapter_layers(decoder).items():
        down = torch.empty(layer.lora_a.weight.shape, dtype=torch.float32)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        found[f"{name}.lora_a.weight"] = down
        found[f"{name}.lora_b.weight"] = torch.zeros(layer.lora_b.weight.shape)
        if isinstance(layer, DoRALinear):
            weight = base[f"{name}.weight"].to(device, layer.weight.dtype)
            if isinstance(layer.weight, NF4Tensor):
                weight = to_nf4(weight, layer.weight.block_size, layer.weight.scaler_block_size)
            found[f"{name}.magnitude"] = torch.linalg.norm(weight.to(compute_dtype), dim=1).cpu()
    return found


@torch.no_grad()
def merged(state: Mapping[str, Tensor], decoder: nn.Module) -> dict[str, Tensor]:
    """Weights of a decoder without adapters that computes the same.

    Args:
        state: whole tensors of base and adapters.
        decoder: the decoder that they belong to.

    Returns:
        The base's tensors, with the adapters added to those that have one, in their own dtype.
    """
    adapters = set(adapter_names(decoder))
    found = {name: tensor for name, tensor in state.items() if name not in adapters}
    for name, layer in adapter_layers(decoder).items():
        _, scale, _ = _kind_of(layer)
        down, up = state[f"{name}.lora_a.weight"], state[f"{name}.lora_b.weight"]
        magnitude = state.get(f"{name}.magnitude")
        found[f"{name}.weight"] = merged_weight(state[f"{name}.weight"], down, up, scale, magnitude)
    return found


def check_adapters(decoder: nn.Module) -> None:
    """Check that a decoder's adapters are of a kind that can be trained and saved.

    Raises:
        ValueError: saying what is not supported and what to set instead.
    """
    view = decoder_of(decoder)
    if view.head_name in adapter_layers(decoder):
        raise ValueError(
            "the head has an adapter, and token statistics need a plain one; set apply_lora_to_output=false"
        )
    layers = adapter_layers(decoder)
    for name, layer in layers.items():
        if type(layer) not in (LoRALinear, DoRALinear):
            raise ValueError(
                f"{name} is a {type(layer).__name__}; adapters can be torchtune's LoRALinear or DoRALinear, so use a lora_ or "
                "qlora_ builder"
            )
        if layer.lora_a.weight.shape[0] < 1:
            raise ValueError(
                f"{name} has an adapter of rank 0, which cannot learn; set lora_rank to at least 1"
            )
    if len(kinds := {_kind_of(layer) for layer in layers.values()}) > 1:
        raise ValueError(
            f"its adapters differ: (rank, alpha / rank, DoRA) is one of {sorted(kinds)}; all adapters of a model must have the "
            "same"
        )


def _kind_of(layer: Any) -> tuple[int, float, bool]:
    """Rank, factor of the adapter's output, and whether it is DoRA."""
    rank = int(layer.lora_a.weight.shape[0])
    if isinstance(layer, DoRALinear):
        return rank, float(layer.scaling), True
    return rank, float(layer.alpha) / rank, False
