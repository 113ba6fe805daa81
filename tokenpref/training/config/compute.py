"""How models compute: precision, float8 and kept activations. The keys are those of torchtune and torchtitan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tokenpref.distributed import World
from tokenpref.models.activations import checkpointed_layers
from tokenpref.models.float8 import FLOAT8_RECIPES, Float8, check_float8_device, float8_layers
from tokenpref.training.config.fields import flag, integer, text

__all__ = ["DTYPES", "Compute", "ComputeConfig", "check_device", "check_model", "compute_faults"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Compute:
    """How one model computes.

    Args:
        dtype: dtype of the weights.
        compute_dtype: dtype in which FSDP2 gathers the weights and the layers compute; None for ``dtype``.
        float8: how linear layers multiply in float8; None for no float8.
        checkpoint_every: every n-th layer keeps only its input for the backward pass; None for no layer.
        offload: move what the layers keep to the CPU's memory.
    """

    dtype: torch.dtype
    compute_dtype: torch.dtype | None = None
    float8: Float8 | None = None
    checkpoint_every: int | None = None
    offload: bool = False

    @property
    def kept_dtype(self) -> torch.dtype:
        """Of hidden states."""
        return self.compute_dtype or self.dtype


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Keys of a training beside ``device``, ``dtype``, ``compile`` and ``fsdp_reshard_after_forward``."""

    compute_dtype: str | None = text(None, choices=("bf16",))
    """``bf16`` with ``dtype: fp32`` means float32 weights, gradients and optimizer state, and bfloat16 arithmetic. Null:
    ``dtype``."""
    enable_activation_checkpointing: bool = flag(False)
    """Recompute activations in the backward pass instead of keeping them."""
    ac_mode: str = text("full", choices=("full", "selective"))
    """Recompute in every layer, or in every ``ac_option``-th."""
    ac_option: int | None = integer(None)
    """For ``ac_mode: selective``: the n of "every n-th layer"."""
    enable_activation_offloading: bool = flag(False)
    """Move what activation checkpointing keeps to the CPU's memory. For CUDA only."""
    enable_fp8_training: bool = flag(False)
    """Multiply in float8 in all linear layers of policy and reference except the head."""
    fp8_recipe_name: str | None = text(None, choices=FLOAT8_RECIPES)
    """How float8 values are scaled. Null: tensorwise."""
    fp8_emulate: bool = flag(False)
    """Round to float8 and multiply in float32, for tests on machines without a GPU that can."""

    def compute_of(self, dtype: str, *, trainable: bool) -> Compute:
        """How the policy (``trainable``) or a model beside it computes.

        Both must give the same numbers for the same weights, so that a loss starts at log 2 and rounding cancels in
        log ratios. Float8 therefore applies to both. Frozen weights are stored in the dtype of the computation, except if FSDP2
        gathers the policy's weights in float8 (tensorwise). Rounding them to bfloat16 first would give other numbers.
        """
        own = DTYPES[dtype]
        compute_dtype = None if self.compute_dtype is None else DTYPES[self.compute_dtype]
        float8 = Float8(self.fp8_recipe_name or "tensorwise", self.fp8_emulate)
        used = float8 if self.enable_fp8_training else None
        if not trainable:
            if used is not None and used.recipe == "tensorwise":
                return Compute(dtype=own, compute_dtype=compute_dtype, float8=used)
            return Compute(dtype=compute_dtype or own, float8=used)
        every = self.ac_option if self.ac_mode == "selective" else 1
        return Compute(
            dtype=own,
            compute_dtype=compute_dtype,
            float8=used,
            checkpoint_every=every if self.enable_activation_checkpointing else None,
            offload=self.enable_activation_offloading,
        )


def compute_faults(config: ComputeConfig, *, dtype: str, device: str) -> list[str]:
    """Settings that contradict each other, for weights in ``dtype`` on ``device``."""
    return [
        *_precision_faults(config, dtype),
        *_activation_faults(config, device),
        *_float8_faults(config, dtype, device),
    ]


def _on_cpu(device: str) -> bool:
    return isinstance(device, str) and device.partition(":")[0] == "cpu"


def _precision_faults(config: ComputeConfig, dtype: str) -> list[str]:
    if config.compute_dtype is None or dtype != config.compute_dtype:
        return []
    return [
        f"compute_dtype: is {config.compute_dtype}, and so is dtype; set dtype=fp32 for float32 weights, or compute_dtype=null"
    ]


def _activation_faults(config: ComputeConfig, device: str) -> list[str]:
    faults = []
    enabled, selective = config.enable_activation_checkpointing, config.ac_mode == "selective"
    if selective and not enabled:
        faults.append(
            "ac_mode: is selective, but enable_activation_checkpointing is false; set that to true, or ac_mode=full"
        )
    if selective and config.ac_option is None:
        faults.append("ac_option: missing; ac_mode selective needs it: 2 checkpoints every second layer")
    if not selective and config.ac_option is not None:
        faults.append(
            f"ac_option: is {config.ac_option}, which only ac_mode selective reads; set ac_mode=selective, or null"
        )
    if config.enable_activation_offloading and _on_cpu(device):
        faults.append(
            f"enable_activation_offloading: takes activations from a GPU's memory, and device is {device}; set "
            "device=cuda, or enable_activation_offloading=false"
        )
    if config.enable_activation_offloading and (selective or not enabled):
        faults.append(
            "enable_activation_offloading: moves what full activation checkpointing keeps; set "
            "enable_activation_checkpointing=true and ac_mode=full, or enable_activation_offloading=false"
        )
    return faults


def _float8_faults(config: ComputeConfig, dtype: str, device: str) -> list[str]:
    if not config.enable_fp8_training:
        given: dict[str, Any] = {"fp8_recipe_name": config.fp8_recipe_name, "fp8_emulate": config.fp8_emulate}
        return [
            f"{key}: is {str(value).lower()}, but enable_fp8_training is false; set that to true, or remove {key}"
            for key, value in given.items()
            if value
        ]
    if config.fp8_emulate:
        return []
    if _on_cpu(device):
        return [
            f"enable_fp8_training: float8 products need a GPU, and device is {device}; set device=cuda, or "
            "enable_fp8_training=false (or fp8_emulate=true, for tests: slow)"
        ]
    row_scales = config.fp8_recipe_name not in (None, "tensorwise")
    if row_scales and dtype == "fp32" and config.compute_dtype is None:
        return [
            f"fp8_recipe_name: GPUs compute {config.fp8_recipe_name} in bfloat16 only, and dtype is fp32; set dtype=bf16, "
            "compute_dtype=bf16, or fp8_recipe_name=tensorwise"
        ]
    return []


def check_device(compute: Compute, world: World) -> None:
    """Check that the device of this process supports the settings.

    Raises:
        ConfigError: naming the key.
    """
    if compute.float8 is not None:
        check_float8_device(world.device, compute.float8)


def check_model(compute: Compute, model: nn.Module) -> None:
    """Check that the settings fit the model, without changing the model.

    Raises:
        ConfigError: naming the key.
    """
    if compute.float8 is not None:
        float8_layers(model)
    if compute.checkpoint_every is not None:
        checkpointed_layers(model, compute.checkpoint_every)
