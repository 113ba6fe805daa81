"""Which activations a decoder's layers keep for the backward pass: all, only their inputs, or none on the GPU."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torchao.dtypes.nf4tensor import linear_nf4

from tokenpref._torchtune import (
    DoRALinear,
    FeedForward,
    OffloadActivations,
    RMSNorm,
    set_activation_checkpointing,
)
from tokenpref.errors import ConfigError
from tokenpref.models.decoder_of import decoder_of

__all__ = [
    "activation_offloading",
    "checkpoint_layers",
    "checkpointed_layers",
    "gated_feed_forward",
    "keep_dora_lean",
    "keep_gates_lean",
    "is_rms_norm",
    "is_swiglu",
    "offload_layers",
    "projections",
]


def checkpointed_layers(model: nn.Module, every: int) -> list[nn.Module]:
    """Every n-th layer of a decoder, counted as in torchtune and torchtitan: with 2 the second, the fourth, ...

    Raises:
        ConfigError: if it has fewer layers than that.
    """
    layers = list(decoder_of(model).layers)
    if every > len(layers):
        raise ConfigError(
            f"ac_option: is {every}, and the model has {len(layers)} layers, of which none would be checkpointed; set "
            f"it to at most {len(layers)}"
        )
    return layers[every - 1 :: every]


def checkpoint_layers(model: nn.Module, every: int = 1) -> None:
    """Let every n-th layer keep only its input and recompute the rest in the backward pass (in place).

    torchtune's function for single layers counts over all models that it has seen. After a model with an odd number of
    layers, the next model would get other layers than the first.

    Raises:
        ConfigError: if no layer is chosen.
    """
    chosen = {id(layer) for layer in checkpointed_layers(model, every)}

    def policy(module: nn.Module, recurse: bool, **_: Any) -> bool:
        return recurse or id(module) in chosen

    set_activation_checkpointing(model, auto_wrap_policy=policy)


def activation_offloading() -> saved_tensors_hooks:
    """torchtune's hooks that keep activations in pinned memory of the CPU, on a separate stream; for one model on CUDA."""
    hooks: saved_tensors_hooks = OffloadActivations()
    return hooks


def offload_layers(model: nn.Module, hooks: saved_tensors_hooks) -> None:
    """Let ``hooks`` pack only the tensors that the layers keep in training (in place).

    The head is not changed, because it needs its tensors again at once.

    Args:
        model: a decoder with all layers checkpointed, so that only the layers' inputs are packed.
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

    for layer in decoder_of(model).layers:
        layer.register_forward_pre_hook(enter)
        layer.register_forward_hook(leave, always_call=True)


def keep_gates_lean(model: nn.Module) -> None:
    """Let SwiGLU layers keep only the two factors of ``silu(gate x) * up x``, so three tensors instead of four (in place)."""
    for module in model.modules():
        if is_swiglu(module):
            module.forward = MethodType(gated_feed_forward, module)


def keep_dora_lean(model: nn.Module) -> None:
    """Let DoRA layers compute the lengths of their rows without autograd and without an identity matrix (in place).

    A bias is added as it is, as in the paper and in PEFT; torchtune multiplies it with the magnitude too.

    torchtune multiplies ``A`` and ``B`` with an identity matrix as large as the input, because FSDP1 gathers weights in calls of
    modules only. FSDP2 gathers those of a whole decoder layer.
    """
    for module in model.modules():
        if type(module) is DoRALinear:
            module.forward = MethodType(_dora_linear, module)


def _dora_linear(layer: DoRALinear, x: Tensor) -> Tensor:
    """``m / |W + s B A| (W + s B A) x + b`` of ``[..., D]``, with the lengths of the rows as constants of the backward pass."""
    weight, scaling = layer.weight, layer.scaling
    product: Tensor = linear_nf4(x, weight) if layer._quantize_base else nn.functional.linear(x, weight)
    base = product if layer.bias is None else product + layer.bias
    if layer.disabled:
        return base
    with torch.no_grad():
        change = layer.lora_b.weight @ layer.lora_a.weight
        length = torch.linalg.norm(weight.to(x.dtype) + scaling * change, dim=1).to(x.dtype)
    ratio = layer.magnitude / length
    return (ratio - 1) * product + ratio * layer.lora_b(layer.lora_a(layer.dropout(x))) * scaling + base


def is_swiglu(layer: nn.Module) -> bool:
    """Whether a layer is ``down (silu(gate x) * up x)``, by the code of torchtune or of transformers."""
    if type(layer) is FeedForward:
        return layer.w3 is not None and type(layer.activation) is nn.SiLU and not layer.activation.inplace
    return _is_copy(layer, "LlamaMLP") and type(layer.act_fn).__name__ in ("SiLU", "SiLUActivation")


def is_rms_norm(layer: nn.Module) -> bool:
    """Whether a layer is ``weight * x / sqrt(mean(x^2) + eps)``, by the code of torchtune or of transformers."""
    return type(layer) is RMSNorm or _is_copy(layer, "LlamaRMSNorm")


def _is_copy(layer: nn.Module, name: str) -> bool:
    """Whether a layer of transformers runs the code of Llama's layer ``name``, which many other models have copies of."""
    if not type(layer).__module__.startswith("transformers."):
        return False
    from tokenpref import _transformers

    copied, own = (
        getattr(_transformers, name).forward.__code__,
        getattr(type(layer).forward, "__code__", None),
    )
    parts = ("co_code", "co_names", "co_consts")
    return own is not None and all(getattr(own, part) == getattr(copied, part) for part in parts)


def projections(layer: Any) -> tuple[Any, Any, Any]:
    """The linear layers ``gate``, ``up`` and ``down`` of a SwiGLU layer, by the names of torchtune or of transformers."""
    if isinstance(layer, FeedForward):
        return layer.w1, layer.w3, layer.w2
    return layer.gate_proj, layer.up_proj, layer.down_proj


def gated_feed_forward(layer: nn.Module, x: Tensor) -> Tensor:
    """``down (silu(gate x) * up x)`` of ``[..., D]``."""
    gate, up, down = projections(layer)
    output: Tensor = down(_Gated.apply(gate(x), up(x)))
    return output


class _Gated(torch.autograd.Function):
    """``silu(gate) * up``, with the arithmetic of autograd's own backward."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), nn.functional.silu(gate).mul_(grad)
