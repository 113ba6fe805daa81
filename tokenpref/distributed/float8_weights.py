"""Weights that FSDP2 gathers in float8: their scales, and the plain tensors inside."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp
from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor

__all__ = ["plain_weights", "refresh_float8_scales", "unwrapped"]


def refresh_float8_scales(model: nn.Module) -> None:
    """Compute the scales of all weights that are gathered in float8, with one reduction for all of them.

    It must be called after every change of the weights, because their shards are cast with these scales. A
    model without such weights is not changed.
    """
    precompute_float8_dynamic_scale_for_fsdp(model)


def plain_weights(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict with plain tensors instead of torchao's, sharing their memory."""
    return {name: _plain(tensor) for name, tensor in state.items()}


def unwrapped(tensor: Tensor) -> Tensor:
    """The plain tensor inside a weight that is gathered in float8; any other tensor itself."""
    return tensor._tensor if isinstance(tensor, WeightWithDynamicFloat8CastTensor) else tensor


def _plain(tensor: Any) -> Any:
    if isinstance(tensor, WeightWithDynamicFloat8CastTensor):
        return tensor._tensor
    if not isinstance(tensor, DTensor) or not isinstance(
        tensor._local_tensor, WeightWithDynamicFloat8CastTensor
    ):
        return tensor
    return DTensor.from_local(
        tensor._local_tensor._tensor,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
