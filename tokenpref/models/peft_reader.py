"""Reads adapters in the format of PEFT: folders of this package, of PEFT and of torchtune."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from tokenpref._sealed import check_if_sealed
from tokenpref.errors import ConfigError
from tokenpref.models.decoder import Decoder
from tokenpref.models.decoder_of import decoder_of
from tokenpref.models.peft_format import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_RECORD,
    PARTS,
    AdapterLayout,
    Base,
)

__all__ = ["PeftFolder", "read_adapter"]

_TORCHTUNE_WEIGHTS = "adapter_model.pt"  # torchtune writes this file beside PEFT's
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


def read_adapter(folder: Path, decoder: nn.Module, key: str, *, base: str | None = None) -> dict[str, Tensor]:
    """Read an adapter folder for a model. Folders of this package, of PEFT and of torchtune are read.

    Args:
        folder: the folder.
        decoder: the model with adapters of the same layers, rank, alpha and kind, on any device.
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
    view = decoder_of(decoder)
    _check_fit(found, layout, view.adapter_settings, key)
    if base is not None:
        found.check_base(base, key)
    try:
        return dict(_in_own_order(found, layout, view))
    except ValueError as error:
        raise ConfigError(f"{key}: {folder}: {error}") from error


def _in_own_order(found: PeftFolder, layout: AdapterLayout, view: Decoder) -> Iterator[tuple[str, Tensor]]:
    for linear in layout.linears:
        for part in linear.shapes(layout.rank, layout.dora):
            tensor = found.layers[linear.hf_name][PARTS[part]]
            order = partial(view.from_torchtune, linear) if found.by_torchtune else linear.from_hf_order
            yield f"{linear.name}.{part}", order(part, tensor).contiguous()


def _check_fit(found: PeftFolder, layout: AdapterLayout, settings: Mapping[str, str], key: str) -> None:
    """Refuse an adapter of another size, scale or kind, or of other layers, than the model's."""
    where, own = f"{key}: {found.folder}", {linear.hf_name: linear for linear in layout.linears}
    if found.dora != layout.dora:
        kinds = {True: "DoRA", False: "LoRA"}
        raise ConfigError(
            f"{where} is a {kinds[found.dora]} adapter and the model's are {kinds[layout.dora]}; set "
            f"{settings['dora']}={str(found.dora).lower()}"
        )
    if found.rank != layout.rank:
        raise ConfigError(
            f"{where} has rank {found.rank} and the model's adapters have {layout.rank}; set {settings['rank']}={found.rank}"
        )
    alpha = found.scaling * found.rank
    if not math.isclose(alpha, layout.alpha, rel_tol=1e-6):
        raise ConfigError(
            f"{where} has alpha {alpha:g} and the model's adapters have {layout.alpha:g}; set {settings['alpha']}={alpha:g}"
        )
    if found.layers.keys() != own.keys():
        theirs, ours = (sorted({name.rpartition(".")[2] for name in names}) for names in (found.layers, own))
        if theirs != ours:
            fault = f"adapts {', '.join(theirs)} and the model {', '.join(ours)}"
        else:
            other = sorted(found.layers.keys() ^ own.keys())[0]
            fault = f"has {'an' if other in found.layers else 'no'} adapter for {other}, unlike the model"
        raise ConfigError(
            f"{where} {fault}; set {settings['layers']} so that the same layers are adapted, and name the adapter of this model"
        )
    for name, linear in own.items():
        for part, shape in linear.shapes(layout.rank, layout.dora).items():
            tensor = found.layers[name][PARTS[part]]
            if tuple(tensor.shape) != shape:
                raise ConfigError(
                    f"{where}: {name}.{PARTS[part]} has the shape {list(tensor.shape)} and the model needs {list(shape)}; name "
                    "an adapter of this model"
                )
