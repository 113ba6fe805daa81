"""Adapters on disk in the format of PEFT, written from a model's LoRA or DoRA layers. ``peft_reader`` reads them back.

A folder holds ``adapter_model.safetensors`` and ``adapter_config.json``, which ``peft`` and ``vllm`` load over the base model.
Names are those of transformers. Rows of queries and keys are in transformers' order, which differs from torchtune's for decoders
like Llama's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenpref._files import follow_umask, sampled_digest, weight_files, write_json
from tokenpref.distributed import state_modules
from tokenpref.errors import ConfigError
from tokenpref.models.adapted_linear import AdaptedLinear
from tokenpref.models.decoder_of import decoder_of

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "BASE_RECORD",
    "PARTS",
    "AdapterLayout",
    "Base",
    "merged_weight",
    "write_adapter",
]

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
BASE_RECORD = "tokenpref_base.json"
"""Names the weights under an adapter. It lies beside PEFT's two files, and PEFT ignores it."""

_PREFIX = "base_model.model."
# Names of an adapter's tensors in torchtune and in PEFT.
PARTS = {
    "lora_a.weight": "lora_A.weight",
    "lora_b.weight": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
}


@dataclass(frozen=True)
class AdapterLayout:
    """The adapters of a model: their layers, size and scale.

    Args:
        rank: rank of every adapter.
        alpha: an adapter adds ``alpha / rank * B A`` to its layer's weight.
        dora: whether adapters also have a magnitude for each output (DoRA).
        linears: the layers with adapters, in the model's order.
        targets: the names that ``target_modules`` lists in PEFT's config.
    """

    rank: int
    alpha: float
    dora: bool
    linears: tuple[AdaptedLinear, ...]
    targets: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module, key: str = "model") -> AdapterLayout:
        """The layout of a model's adapters. The model may be on the meta device, sharded, or checkpoint its activations.

        Args:
            model: a decoder of one of torchtune's LoRA builders, or of a similar one, or a causal LM with adapters.
            key: the config key of the model, for errors.

        Raises:
            ConfigError: if the model has no adapters, or if PEFT's format has no place for them.
        """
        adapted: dict[str, Any] = {
            n: m for n, m in state_modules(model).items() if callable(getattr(m, "adapter_params", None))
        }
        if not adapted:
            raise ConfigError(
                f"{key}: the model has no adapters; name one of torchtune's lora_ builders, or set {key}.lora of "
                "tokenpref.models.causal_lm"
            )
        for name, module in adapted.items():
            if not {"lora_a.weight", "lora_b.weight"} <= set(module.adapter_params()) <= set(PARTS):
                raise ConfigError(
                    f"{key}: {name} has an adapter of the class {type(module).__name__}, and only LoRA and DoRA are written"
                )
        ranks = {int(module.lora_a.weight.shape[0]) for module in adapted.values()}
        alphas = {_alpha(module) for module in adapted.values()}
        kinds = {hasattr(module, "magnitude") for module in adapted.values()}
        if max(len(ranks), len(alphas), len(kinds)) > 1:
            raise ConfigError(
                f"{key}: its adapters have the ranks {sorted(ranks)}, the alphas {sorted(alphas)}"
                f"{' and are LoRA and DoRA' if len(kinds) > 1 else ''}; all adapters of a model must have the same"
            )
        view = decoder_of(model)
        try:
            linears = tuple(view.on_disk(name, module) for name, module in adapted.items())
        except ValueError as error:
            raise ConfigError(f"{key}: {error}") from error
        return cls(
            rank=ranks.pop(),
            alpha=alphas.pop(),
            dora=kinds.pop(),
            linears=linears,
            targets=_targets(linears, view.names_in_transformers()),
        )


def _alpha(module: Any) -> float:
    """torchtune's DoRA layers keep ``alpha / rank`` and no alpha."""
    if hasattr(module, "alpha"):
        return float(module.alpha)
    return round(float(module.scaling) * int(module.lora_a.weight.shape[0]), 6)


def _targets(linears: tuple[AdaptedLinear, ...], modules: Collection[str]) -> tuple[str, ...]:
    """The last parts of the names, if PEFT finds the same layers by them; otherwise the full names."""
    adapted = {linear.hf_name for linear in linears}
    shorts = tuple(dict.fromkeys(linear.hf_name.rpartition(".")[2] for linear in linears))
    found = {name for name in modules if name.rpartition(".")[2] in shorts}
    return shorts if found == adapted else tuple(linear.hf_name for linear in linears)


@dataclass(frozen=True)
class Base:
    """The weights under an adapter.

    Args:
        path: their folder.
        files: names of their files.
        digest: fingerprint of the files, see :func:`tokenpref._files.sampled_digest`.
    """

    path: str
    files: tuple[str, ...]
    digest: str

    @classmethod
    def of(cls, folder: Path, files: Any = None) -> Base:
        """The base in a folder.

        Args:
            folder: the checkpoint's folder.
            files: its files, as in a checkpointer's ``checkpoint_files``; if that is not a list, all files with weights count.

        Raises:
            ConfigError: if a file is missing.
        """
        names = weight_files(folder, files)
        return cls(str(folder), tuple(names), sampled_digest(folder, names))


def write_adapter(
    folder: Path, state: Mapping[str, Tensor], layout: AdapterLayout, base: Base | None = None
) -> None:
    """Write a model's adapters to PEFT's two files.

    Args:
        folder: an existing folder.
        state: whole tensors by their names in the decoder; tensors that belong to no adapter are ignored.
        layout: the adapters of the decoder.
        base: the weights under the adapters, which are named by path and fingerprint; None if they are unknown.

    Raises:
        TokenprefError: if the disk refuses to write.
    """
    tensors = {
        f"{_PREFIX}{linear.hf_name}.{PARTS[part]}": linear.to_hf_order(part, state[f"{linear.name}.{part}"])
        for linear in layout.linears
        for part in linear.shapes(layout.rank, layout.dora)
    }
    file = folder / ADAPTER_WEIGHTS
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"}
    )
    follow_umask(file)
    alpha = int(layout.alpha) if layout.alpha == int(layout.alpha) else layout.alpha
    record: dict[str, Any] = {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base.path if base is not None else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": layout.rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": list(layout.targets),
        "task_type": "CAUSAL_LM",
        "use_dora": layout.dora,
        "use_rslora": False,
    }
    write_json(folder / ADAPTER_CONFIG, record)
    if base is not None:
        write_json(
            folder / BASE_RECORD, {"path": base.path, "files": list(base.files), "digest": base.digest}
        )


def merged_weight(
    weight: Tensor, down: Tensor, up: Tensor, scaling: float, magnitude: Tensor | None = None
) -> Tensor:
    """The weight of a linear layer with its adapter merged in.

    Args:
        weight: ``[out, in]``.
        down: A, ``[rank, in]``.
        up: B, ``[out, rank]``.
        scaling: factor of ``B A``.
        magnitude: ``[out]``, for DoRA: the norm of each row of the merged weight.

    Returns:
        ``weight + scaling * B A``, for DoRA with its rows rescaled. Computed in float32 or better, in the dtype of ``weight``.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    merged = weight.to(dtype) + scaling * (up.to(dtype) @ down.to(dtype))
    if magnitude is not None:
        merged *= (magnitude.to(dtype) / torch.linalg.norm(merged, dim=1)).unsqueeze(1)
    return merged.to(weight.dtype)
