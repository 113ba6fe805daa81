"""Adapters on disk in the format of PEFT, written from a decoder's LoRA or DoRA layers. ``peft_reader`` reads them back.

A folder holds ``adapter_model.safetensors`` and ``adapter_config.json``, which ``peft`` and ``vllm`` load over the base model.
Names are those of transformers. Rows of queries and keys are in transformers' order, which differs from torchtune's for models
like Llama.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tokenpref._files import follow_umask, sampled_digest, weight_files, write_json
from tokenpref._torchtune import Phi3RotaryPositionalEmbeddings, TransformerDecoder
from tokenpref.distributed import state_modules
from tokenpref.errors import ConfigError
from tokenpref.models.agreement import pairs_interleaved

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "BASE_RECORD",
    "PARTS",
    "AdaptedLinear",
    "AdapterLayout",
    "Base",
    "merged_weight",
    "to_interleaved",
    "write_adapter",
]

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
BASE_RECORD = "tokenpref_base.json"
"""Names the weights under an adapter. It lies beside PEFT's two files, and PEFT ignores it."""

_PREFIX = "base_model.model."
# Names of a layer's linear modules in torchtune and in transformers.
_LINEARS = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_FUSED_IN_PHI3 = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.w1", "mlp.w3")
# Names of an adapter's tensors in torchtune and in PEFT.
PARTS = {
    "lora_a.weight": "lora_A.weight",
    "lora_b.weight": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
}


@dataclass(frozen=True)
class AdaptedLinear:
    """A linear layer with an adapter.

    Args:
        name: its name in the decoder, such as ``layers.0.attn.q_proj``.
        hf_name: its name in transformers, such as ``model.layers.0.self_attn.q_proj``.
        in_dim: size of its input.
        out_dim: size of its output.
        heads: heads whose rows are in another order in transformers; None if the order is the same.
    """

    name: str
    hf_name: str
    in_dim: int
    out_dim: int
    heads: int | None

    def shapes(self, rank: int, dora: bool) -> dict[str, tuple[int, ...]]:
        """The shapes of the adapter's tensors, by torchtune's names within the layer."""
        shapes: dict[str, tuple[int, ...]] = {
            "lora_a.weight": (rank, self.in_dim),
            "lora_b.weight": (self.out_dim, rank),
        }
        return {**shapes, "magnitude": (self.out_dim,)} if dora else shapes

    def to_hf_order(self, part: str, tensor: Tensor) -> Tensor:
        """A tensor of the adapter with its output rows in transformers' order."""
        if self.heads is None or part == "lora_a.weight":
            return tensor
        return tensor.unflatten(0, (self.heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    def from_hf_order(self, part: str, tensor: Tensor) -> Tensor:
        """The inverse of :meth:`to_hf_order`."""
        return tensor if self.heads is None or part == "lora_a.weight" else to_interleaved(tensor, self.heads)


def to_interleaved(tensor: Tensor, heads: int) -> Tensor:
    """Rows of each head from halves (0, 0, ..., 1, 1, ...) to interleaved rotary pairs (0, 1, 0, 1, ...)."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


@dataclass(frozen=True)
class AdapterLayout:
    """The adapters of a decoder: their layers, size and scale.

    Args:
        rank: rank of every adapter.
        alpha: an adapter adds ``alpha / rank * B A`` to its layer's weight.
        dora: whether adapters also have a magnitude for each output (DoRA).
        linears: the layers with adapters, in the decoder's order.
        targets: the names that ``target_modules`` lists in PEFT's config.
        attention: heads of queries and of keys, by torchtune's name of the projection.
    """

    rank: int
    alpha: float
    dora: bool
    linears: tuple[AdaptedLinear, ...]
    targets: tuple[str, ...]
    attention: Mapping[str, int]

    @classmethod
    def of(cls, decoder: TransformerDecoder, key: str = "model") -> AdapterLayout:
        """The layout of a decoder's adapters. The decoder may be on the meta device, sharded, or checkpoint its activations.

        Args:
            decoder: a decoder of one of torchtune's LoRA builders, or of a similar one.
            key: the config key of the decoder, for errors.

        Raises:
            ConfigError: if the decoder has no adapters, or if PEFT's format has no place for them.
        """
        modules = state_modules(decoder)
        adapted: dict[str, Any] = {
            n: m for n, m in modules.items() if callable(getattr(m, "adapter_params", None))
        }
        if not adapted:
            raise ConfigError(f"{key}: the model has no adapters; name one of torchtune's lora_ builders")
        for name, module in adapted.items():
            _check_adapter(name, module, decoder, key)
        ranks = {int(module.lora_a.weight.shape[0]) for module in adapted.values()}
        alphas = {_alpha(module) for module in adapted.values()}
        kinds = {hasattr(module, "magnitude") for module in adapted.values()}
        if max(len(ranks), len(alphas), len(kinds)) > 1:
            raise ConfigError(
                f"{key}: its adapters have the ranks {sorted(ranks)}, the alphas {sorted(alphas)}"
                f"{' and are LoRA and DoRA' if len(kinds) > 1 else ''}; all adapters of a model must have the same"
            )
        linears = tuple(_linear(name, module, decoder, key) for name, module in adapted.items())
        attention = decoder.layers[0].attn
        return cls(
            rank=ranks.pop(),
            alpha=alphas.pop(),
            dora=kinds.pop(),
            linears=linears,
            targets=_targets(adapted, decoder, linears),
            attention={"q_proj": int(attention.num_heads), "k_proj": int(attention.num_kv_heads)},
        )


def _check_adapter(name: str, module: Any, decoder: TransformerDecoder, key: str) -> None:
    """Refuse an adapter that PEFT's format cannot hold.

    Raises:
        ConfigError: naming the layer.
    """
    kind = type(module).__name__
    if not {"lora_a.weight", "lora_b.weight"} <= set(module.adapter_params()) <= set(PARTS):
        raise ConfigError(
            f"{key}: {name} has an adapter of the class {kind}, and only LoRA and DoRA are written"
        )
    short = _short(name)
    if name != "output" and short not in _LINEARS:
        raise ConfigError(
            f"{key}: {name} has an adapter, and PEFT's format knows no such layer; name {', '.join(_LINEARS)} or output"
        )
    if hasattr(module, "magnitude") and getattr(module, "bias", None) is not None:
        raise ConfigError(
            f"{key}: {name} has a bias and a DoRA adapter. torchtune scales the bias with the magnitude and PEFT does not, so "
            "the trained adapter could not be written; set use_dora=false, or leave this layer out of lora_attn_modules"
        )
    ropes = (getattr(layer.attn, "pos_embeddings", None) for layer in decoder.layers)
    if short in _FUSED_IN_PHI3 and any(isinstance(rope, Phi3RotaryPositionalEmbeddings) for rope in ropes):
        raise ConfigError(
            f"{key}: {name} is a part of one larger matrix in transformers' Phi-3 (qkv_proj, gate_up_proj), so its adapter "
            "cannot be written in PEFT's format; set lora_attn_modules=[output_proj] and apply_lora_to_mlp=false"
        )


def _alpha(module: Any) -> float:
    """torchtune's DoRA layers keep ``alpha / rank`` and no alpha."""
    if hasattr(module, "alpha"):
        return float(module.alpha)
    return round(float(module.scaling) * int(module.lora_a.weight.shape[0]), 6)


def _short(name: str) -> str:
    """``attn.q_proj`` for ``layers.0.attn.q_proj``; an empty text for names of another form."""
    match = re.fullmatch(r"layers\.\d+\.(\w+\.\w+)", name)
    return match[1] if match else ""


def _linear(name: str, module: Any, decoder: TransformerDecoder, key: str) -> AdaptedLinear:
    out_dim, in_dim = int(module.lora_b.weight.shape[0]), int(module.lora_a.weight.shape[1])
    if name == "output":
        return AdaptedLinear(name, "lm_head", in_dim, out_dim, None)
    short, number = _short(name), int(name.split(".")[1])
    heads = None
    if short in ("attn.q_proj", "attn.k_proj"):
        interleaved = pairs_interleaved(decoder)
        if interleaved is None:
            raise ConfigError(
                f"{key}: {name} has an adapter, and its rows' order in transformers is not known for its rotary embeddings; "
                "leave q_proj and k_proj out of lora_attn_modules, or use rotary embeddings of torchtune"
            )
        attention: Any = decoder.layers[number].attn
        if interleaved:
            heads = int(attention.num_heads if short == "attn.q_proj" else attention.num_kv_heads)
    return AdaptedLinear(name, f"model.layers.{number}.{_LINEARS[short]}", in_dim, out_dim, heads)


def _targets(
    adapted: Collection[str], decoder: TransformerDecoder, linears: tuple[AdaptedLinear, ...]
) -> tuple[str, ...]:
    """Short names if all layers have the same adapters; otherwise the full names, which PEFT also accepts."""
    kinds = {_short(name) for name in adapted} - {""}
    alike = {f"layers.{number}.{kind}" for number in range(len(decoder.layers)) for kind in kinds}
    if alike <= set(adapted):
        return tuple(dict.fromkeys(linear.hf_name.rpartition(".")[2] for linear in linears))
    return tuple(linear.hf_name for linear in linears)


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
    """Write a decoder's adapters to PEFT's two files.

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
