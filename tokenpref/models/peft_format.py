"""Adapters on disk in the format of PEFT, written from a decoder's LoRA or DoRA layers and read back into them.

A folder holds ``adapter_model.safetensors`` and ``adapter_config.json``, which ``peft`` and ``vllm`` load over the base model.
Names are those of transformers. Rows of queries and keys are in transformers' order, which differs from torchtune's for models
like Llama.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokenpref._files import follow_umask, sampled_digest, weight_files, write_json
from tokenpref._sealed import check_if_sealed
from tokenpref._torchtune import Phi3RotaryPositionalEmbeddings, TransformerDecoder
from tokenpref.distributed import state_modules
from tokenpref.errors import ConfigError
from tokenpref.models.agreement import pairs_interleaved

__all__ = [
    "ADAPTER_CONFIG",
    "ADAPTER_WEIGHTS",
    "BASE_RECORD",
    "AdaptedLinear",
    "AdapterLayout",
    "Base",
    "PeftFolder",
    "merged_weight",
    "read_adapter",
    "write_adapter",
]

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
BASE_RECORD = "tokenpref_base.json"
"""Names the weights under an adapter. It lies beside PEFT's two files, and PEFT ignores it."""

_TORCHTUNE_WEIGHTS = "adapter_model.pt"  # torchtune writes this file beside PEFT's
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
_PARTS = {
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
        return (
            tensor if self.heads is None or part == "lora_a.weight" else _to_interleaved(tensor, self.heads)
        )


def _to_interleaved(tensor: Tensor, heads: int) -> Tensor:
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
    if not {"lora_a.weight", "lora_b.weight"} <= set(module.adapter_params()) <= set(_PARTS):
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
        f"{_PREFIX}{linear.hf_name}.{_PARTS[part]}": linear.to_hf_order(part, state[f"{linear.name}.{part}"])
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


# Settings of PEFT that do not change what a saved adapter computes, or that the tensors' names also tell.
_READ = frozenset(
    {
        "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "inference_mode", "layers_pattern",
        "layers_to_transform", "lora_alpha", "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size",
        "r", "revision", "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora",
    }
)  # fmt: skip
# Other initialisations (PiSSA, OLoRA, CorDA, LoftQ) also change the base, so the adapter does not belong to the unchanged one.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
_NOTHING: tuple[Any, ...] = (None, False, [], {}, "")
_TENSOR = re.compile(
    r"base_model\.model\.(?P<module>.+)\.(?P<part>lora_[AB]\.weight|lora_magnitude_vector)(?:\.weight)?"
)


@dataclass(frozen=True)
class PeftFolder:
    """What a folder in PEFT's format holds.

    Args:
        folder: the folder.
        rank: rank of the adapters.
        scaling: factor of ``B A``: ``alpha / rank``, or for rsLoRA ``alpha / sqrt(rank)``.
        dora: whether the adapters have magnitudes.
        base_path: folder or hub name of the base, if it is recorded.
        by_torchtune: whether torchtune wrote it. torchtune reorders the rows of B in queries and keys for every model, which is
            right for Llama-like ones only, and never the magnitudes.
        layers: tensors by the layer's name in transformers and PEFT's name of the part.
    """

    folder: Path
    rank: int
    scaling: float
    dora: bool
    base_path: str | None
    by_torchtune: bool
    layers: Mapping[str, Mapping[str, Tensor]]

    @classmethod
    def read(cls, folder: Path, key: str) -> PeftFolder:
        """Read a folder that this package, PEFT or torchtune wrote.

        Args:
            folder: the folder.
            key: what names it in the config, for errors.

        Raises:
            ConfigError: naming the folder: if a file is missing or damaged, for features that are not read, and for tensors that
                are missing, of a wrong shape or not finite.
        """
        where = f"{key}: {folder}"
        settings = _read_settings(folder, where)
        check_if_sealed(folder, key)
        layers = _read_tensors(folder, where)
        magnitudes = any("lora_magnitude_vector" in parts for parts in layers.values())
        # PEFT always writes use_dora, torchtune never does.
        dora = bool(settings.get("use_dora", magnitudes))
        rank, alpha = settings["r"], settings["lora_alpha"]
        _check_layers(layers, rank, dora, where)
        base = settings.get("base_model_name_or_path")
        return cls(
            folder=folder,
            rank=rank,
            scaling=alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank),
            dora=dora,
            base_path=base if isinstance(base, str) and base else None,
            by_torchtune="use_dora" not in settings
            and (magnitudes or (folder / _TORCHTUNE_WEIGHTS).is_file()),
            layers=layers,
        )

    def check_base(self, digest: str, key: str) -> None:
        """Compare the base that the folder records, if it records one, with another fingerprint.

        Raises:
            ConfigError: if they differ, or if the record is damaged.
        """
        recorded = self.recorded_base(key)
        if recorded is not None and recorded.digest != digest:
            raise ConfigError(
                f"{key}: {self.folder} is an adapter of other weights than these: it was trained over {recorded.path} "
                f"({', '.join(recorded.files)}); name those, or, if these are the same in other files, remove {BASE_RECORD}"
            )

    def recorded_base(self, key: str) -> Base | None:
        """The base that the folder records; None for folders that this package did not write.

        Raises:
            ConfigError: if the record is damaged.
        """
        file = self.folder / BASE_RECORD
        if not file.is_file():
            return None
        record = _read_json(file, f"{key}: {self.folder}")
        try:
            files = tuple(str(name) for name in record["files"])
            return Base(str(record["path"]), files, str(record["digest"]))
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"{key}: {file} is damaged ({type(error).__name__}: {error}); restore it, or remove it if you know that the "
                "adapter belongs to these weights"
            ) from error


def _read_json(file: Path, where: str) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{where} has no {file.name}; name a folder that PEFT, torchtune or this package wrote"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: {file.name} cannot be read ({error}); restore it") from error
    if not isinstance(record, dict):
        raise ConfigError(f"{where}: {file.name} holds a {type(record).__name__}, not a mapping; restore it")
    return record


def _read_settings(folder: Path, where: str) -> dict[str, Any]:
    """PEFT's config, with ``r`` and ``lora_alpha`` checked."""
    if not folder.is_dir():
        raise ConfigError(f"{where}: there is no such folder; name the folder of an adapter")
    settings = _read_json(folder / ADAPTER_CONFIG, where)
    if settings.get("peft_type", "LORA") != "LORA":
        raise ConfigError(
            f"{where} is an adapter of the type {settings['peft_type']!r}, and only LORA (with or without DoRA) is read"
        )
    unread = [
        f"{name} is {value!r}"
        for name, value in settings.items()
        if name not in _READ and name not in ("bias", "init_lora_weights") and value not in _NOTHING
    ]
    if settings.get("bias", "none") != "none":
        unread.append(f"bias is {settings['bias']!r}")
    if settings.get("init_lora_weights") not in _PLAIN_STARTS:
        unread.append(f"init_lora_weights is {settings['init_lora_weights']!r}")
    if unread:
        raise ConfigError(
            f"{where} uses what is not read: {'; '.join(unread)}. Merge it with PEFT (merge_and_unload), or "
            "train an adapter without it"
        )
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ConfigError(
            f"{where}: r is {rank!r} in {ADAPTER_CONFIG}, expected a whole number of at least 1"
        )
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise ConfigError(f"{where}: lora_alpha is {alpha!r} in {ADAPTER_CONFIG}, expected a number")
    return settings


def _read_tensors(folder: Path, where: str) -> dict[str, dict[str, Tensor]]:
    file = folder / ADAPTER_WEIGHTS
    if not file.is_file():
        hint = " (adapter_model.bin is not read)" if (folder / "adapter_model.bin").is_file() else ""
        raise ConfigError(
            f"{where} has no {ADAPTER_WEIGHTS}{hint}; save the adapter with safe_serialization=True"
        )
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{where}: {file.name} cannot be read ({error}); restore it") from error
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _TENSOR.fullmatch(name)
        if match is None:
            raise ConfigError(f"{where} holds {name}, which is no tensor of a LoRA or DoRA layer")
        if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            raise ConfigError(
                f"{where}: {name} is not finite; its training diverged, so take an earlier adapter"
            )
        layers.setdefault(match["module"], {})[match["part"]] = tensor
    if not layers:
        raise ConfigError(f"{where}: {file.name} holds no tensors; restore it")
    return layers


def _check_layers(layers: Mapping[str, Mapping[str, Tensor]], rank: int, dora: bool, where: str) -> None:
    """Check that every layer has the parts of its kind, and that their shapes have the rank of the config."""
    wanted = ("lora_A.weight", "lora_B.weight", *(("lora_magnitude_vector",) if dora else ()))
    for layer, parts in layers.items():
        for part in wanted:
            if part not in parts:
                raise ConfigError(f"{where} has no {layer}.{part}; restore {ADAPTER_WEIGHTS}")
        if surplus := sorted(parts.keys() - set(wanted)):
            raise ConfigError(f"{where} holds {layer}.{surplus[0]}, and {ADAPTER_CONFIG} says use_dora=false")
        down, up, magnitude = (
            parts.get(part) for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
        )
        assert down is not None and up is not None  # checked above
        if down.dim() != 2 or up.dim() != 2 or down.shape[0] != rank or up.shape[1] != rank:
            raise ConfigError(
                f"{where}: {layer} has matrices of the shapes {list(down.shape)} and {list(up.shape)}, and r is {rank} in "
                f"{ADAPTER_CONFIG}; restore both files"
            )
        if magnitude is not None and magnitude.shape != up.shape[:1]:
            raise ConfigError(
                f"{where}: {layer}.lora_magnitude_vector has the shape {list(magnitude.shape)}, expected {[up.shape[0]]}"
            )


def read_adapter(
    folder: Path, decoder: TransformerDecoder, key: str, *, base: str | None = None
) -> dict[str, Tensor]:
    """Read an adapter folder for a decoder. Folders of this package, of PEFT and of torchtune are read.

    Args:
        folder: the folder.
        decoder: the decoder with adapters of the same layers, rank, alpha and kind, on any device.
        key: what names the folder in the config, for errors.
        base: fingerprint of the weights under the decoder's adapters (:attr:`Base.digest`); it is compared with the folder's
            record, if there is one. None: not compared.

    Returns:
        All tensors of the adapters by their names in the decoder, on the CPU, in the dtype of the file.

    Raises:
        ConfigError: naming the folder, if it cannot be read or does not fit the decoder.
    """
    layout = AdapterLayout.of(decoder)
    found = PeftFolder.read(folder, key)
    _check_fit(found, layout, key)
    if base is not None:
        found.check_base(base, key)
    return dict(_in_torchtune_order(found, layout))


def _in_torchtune_order(found: PeftFolder, layout: AdapterLayout) -> Iterator[tuple[str, Tensor]]:
    for linear in layout.linears:
        for part in linear.shapes(layout.rank, layout.dora):
            tensor = found.layers[linear.hf_name][_PARTS[part]]
            if not found.by_torchtune:
                tensor = linear.from_hf_order(part, tensor)
            elif part == "lora_b.weight" and (heads := layout.attention.get(linear.name.rpartition(".")[2])):
                tensor = _to_interleaved(tensor, heads)
            yield f"{linear.name}.{part}", tensor.contiguous()


def _check_fit(found: PeftFolder, layout: AdapterLayout, key: str) -> None:
    """Refuse an adapter of another size, scale or kind, or of other layers, than the decoder's."""
    where, own = f"{key}: {found.folder}", {linear.hf_name: linear for linear in layout.linears}
    if found.dora != layout.dora:
        kinds = {True: "DoRA", False: "LoRA"}
        raise ConfigError(
            f"{where} is a {kinds[found.dora]} adapter and the model's are {kinds[layout.dora]}; set "
            f"model.use_dora={str(found.dora).lower()}"
        )
    if found.rank != layout.rank:
        raise ConfigError(
            f"{where} has rank {found.rank} and the model's adapters have {layout.rank}; set model.lora_rank={found.rank}"
        )
    alpha = found.scaling * found.rank
    if not math.isclose(alpha, layout.alpha, rel_tol=1e-6):
        raise ConfigError(
            f"{where} has alpha {alpha:g} and the model's adapters have {layout.alpha:g}; set model.lora_alpha={alpha:g}"
        )
    if found.layers.keys() != own.keys():
        theirs, ours = (sorted({name.rpartition(".")[2] for name in names}) for names in (found.layers, own))
        if theirs != ours:
            fault = f"adapts {', '.join(theirs)} and the model {', '.join(ours)}"
        else:
            other = sorted(found.layers.keys() ^ own.keys())[0]
            fault = f"has {'an' if other in found.layers else 'no'} adapter for {other}, unlike the model"
        raise ConfigError(
            f"{where} {fault}; set model.lora_attn_modules and model.apply_lora_to_mlp so that the same layers are adapted, and "
            "name the adapter of this model"
        )
    for name, linear in own.items():
        for part, shape in linear.shapes(layout.rank, layout.dora).items():
            tensor = found.layers[name][_PARTS[part]]
            if tuple(tensor.shape) != shape:
                raise ConfigError(
                    f"{where}: {name}.{_PARTS[part]} has the shape {list(tensor.shape)} and the model needs {list(shape)}; name "
                    "an adapter of this model"
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
