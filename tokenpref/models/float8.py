"""Linear layers that multiply in float8, by torchao."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training

from tokenpref.errors import ConfigError
from tokenpref.models.decoder_of import decoder_of

__all__ = ["FLOAT8_RECIPES", "Float8", "check_float8_device", "convert_to_float8", "float8_layers"]

FLOAT8_RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
# Ada Lovelace; Hopper is 9.0. Earlier GPUs cannot multiply float8.
_LEAST_CAPABILITY = (8, 9)
# The hardware requires both dimensions of a weight to be a multiple of this.
_MULTIPLE = 16


@dataclass(frozen=True)
class Float8:
    """How layers are computed in float8.

    Args:
        recipe: torchao's name for the kind of scales: one for a tensor, or one for each row.
        emulate: round to float8, then multiply in float32. This gives the same numbers without the speed, on any device.
    """

    recipe: str = "tensorwise"
    emulate: bool = False


def check_float8_device(device: torch.device, float8: Float8) -> None:
    """Check that a device can multiply float8.

    Raises:
        ConfigError: if it does not, with what was found.
    """
    if float8.emulate:
        return
    found = "it is a CPU"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= _LEAST_CAPABILITY:
            return
        found = f"{torch.cuda.get_device_name(device)} has {capability[0]}.{capability[1]}"
    raise ConfigError(
        f"enable_fp8_training: float8 products need a GPU of compute capability {_LEAST_CAPABILITY[0]}.{_LEAST_CAPABILITY[1]} or "
        f"higher, and {device}: {found}; set enable_fp8_training=false (or fp8_emulate=true, for tests: slow)"
    )


def float8_layers(model: nn.Module) -> list[str]:
    """Names of the layers that can be computed in float8.

    The head is left out, because token statistics use its weight and logits need the precision. Layers with a dimension that is
    not a multiple of 16 are left out too.

    Raises:
        ConfigError: if there is none, or if the model has adapters, whose layers are too small to gain and which torchao does not
            support.
    """
    if any(hasattr(module, "adapter_params") for module in model.modules()):
        raise ConfigError(
            "enable_fp8_training: the model has adapters (LoRA), and float8 training is for whole models; set "
            "enable_fp8_training=false, or a model without adapters"
        )
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    linear.pop(decoder_of(model).head_name, None)
    names = [name for name, module in linear.items() if not any(n % _MULTIPLE for n in module.weight.shape)]
    if not names:
        example = next(iter(linear.items()), None)
        shown = f"; {example[0]} is {list(example[1].weight.shape)}" if example else ""
        raise ConfigError(
            f"enable_fp8_training: of the model's {len(linear)} linear layers besides the head none has dimensions that are "
            f"multiples of {_MULTIPLE}{shown}; set enable_fp8_training=false, or another model"
        )
    return names


def convert_to_float8(model: nn.Module, float8: Float8, *, sharded: bool) -> list[str]:
    """Let a model's linear layers multiply in float8 (in place); weights keep names and dtype.

    Args:
        model: a decoder on the meta device or loaded, which is sharded and compiled afterwards.
        float8: the settings.
        sharded: whether FSDP2 will gather the weights: with one scale a tensor it then gathers them in float8.

    Returns:
        Names of the converted layers.

    Raises:
        ConfigError: see :func:`float8_layers`.
    """
    names = float8_layers(model)
    config = replace(
        Float8LinearConfig.from_recipe_name(float8.recipe),
        emulate=float8.emulate,
        enable_fsdp_float8_all_gather=sharded and float8.recipe == "tensorwise",
        # The gradient of a weight sums over tokens, and their number is not a multiple of 16 in general.
        pad_inner_dim=True,
    )
    chosen = frozenset(names)
    convert_to_float8_training(model, config=config, module_filter_fn=lambda _module, name: name in chosen)
    return names
