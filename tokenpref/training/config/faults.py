"""Faults of a config that concern more than one key."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from tokenpref._paths import resolve_path
from tokenpref.errors import ConfigError
from tokenpref.losses import LossTraits
from tokenpref.models import CausalLMCheckpointer
from tokenpref.models.tensor_files import TensorFiles
from tokenpref.training.config.fields import Component

__all__ = ["adapter_faults", "checkpoint_faults", "loss_faults", "transform_faults"]

_WITH_ADAPTERS = ("q_proj", "k_proj", "v_proj", "output_proj")


def checkpoint_faults(checkpointer: Component | None, model: Component | None) -> list[str]:
    """Missing folders or files of a checkpointer, with the command that prepares the model if there is one."""
    if checkpointer is None or "checkpoint_dir" not in checkpointer.kwargs:
        return []
    given, files = (checkpointer.kwargs.get(name) for name in ("checkpoint_dir", "checkpoint_files"))
    if not isinstance(given, str) or not given:
        return [f"{checkpointer.key}.checkpoint_dir: expected the path of a folder, found {given!r}"]
    if isinstance(files, list) and (strange := [name for name in files if not isinstance(name, str)]):
        return [f"{checkpointer.key}.checkpoint_files: expected names of files, found {strange[0]!r}"]
    if files in ([], {}):
        return [f"{checkpointer.key}.checkpoint_files: names no file; list the files of the weights"]
    folder = Path(given)
    if not folder.is_dir():
        command = getattr(model.target(), "prepare_command", None) if model is not None else None
        mend = f"prepare the model with `{command}`" if command else "download it, e.g. with `tune download`"
        return [
            f"{checkpointer.key}.checkpoint_dir: no folder at {folder.absolute()}; {mend}, or set another path"
        ]
    written = checkpointer.kwargs.get("output_dir")
    if isinstance(written, str) and folder.resolve() in (out := Path(written).resolve(), *out.parents):
        return [
            f"{checkpointer.key}.output_dir: {written} is the model's folder ({given}) or lies inside it, and what is written "
            "would be mixed with the model; set output_dir to another place"
        ]
    missing = [name for name in files if not (folder / name).is_file()] if isinstance(files, list) else []
    if missing:
        return [f"{checkpointer.key}.checkpoint_files: {missing[0]!r} is not in {folder.absolute()}"]
    if checkpointer.target() is CausalLMCheckpointer:
        return _weight_file_faults(checkpointer, folder, files)
    return []


def _weight_file_faults(checkpointer: Component, folder: Path, files: Any) -> list[str]:
    """What is wrong with the files of weights, as far as their headers tell."""
    if files is not None and not isinstance(files, list):
        return [
            f"{checkpointer.key}.checkpoint_files: expected a list of names, or null for all files of the folder, found {files!r}"
        ]
    try:
        TensorFiles(folder, files)
    except ConfigError as error:
        return [f"{checkpointer.key}.checkpoint_dir: {error}"]
    return []


def adapter_faults(model: Component | None, adapter: str | None) -> list[str]:
    """Settings of a builder's adapters that cannot be trained, and a missing folder of a trained adapter.

    Args:
        model: the builder; its arguments are named as torchtune's.
        adapter: the folder of ``adapter_checkpoint``.
    """
    faults = []
    if model is not None:
        given, key = model.kwargs, model.key
        faults += _target_faults(key, given.get("lora_attn_modules", ["q_proj"]))
        if _is_number(rank := given.get("lora_rank", 1)) and rank < 1:
            faults.append(f"{key}.lora_rank: is {rank}, and such an adapter cannot learn; set at least 1")
        if _is_number(alpha := given.get("lora_alpha", 1)) and not 0 < alpha < math.inf:
            faults.append(
                f"{key}.lora_alpha: is {alpha}, by which the adapter's output is multiplied; set a number above 0"
            )
        if given.get("apply_lora_to_output") is True:
            faults.append(
                f"{key}.apply_lora_to_output: an adapter of the head is not supported, because token statistics are computed "
                "from a plain head; set it to false"
            )
    if adapter is not None and not (folder := resolve_path(adapter)).is_dir():
        faults.append(
            f"adapter_checkpoint: no folder at {folder.absolute()}; set the folder of a trained adapter, or null"
        )
    return faults


def _target_faults(key: str, names: Any) -> list[str]:
    if not isinstance(names, list):
        return []  # its annotation refuses it
    if not names:
        return [f"{key}.lora_attn_modules: names no layer; name some of {', '.join(_WITH_ADAPTERS)}"]
    return [
        f"{key}.lora_attn_modules: {name!r} fits no module; name some of {', '.join(_WITH_ADAPTERS)} (the MLP's layers get "
        "adapters with apply_lora_to_mlp=true)"
        for name in names
        if name not in _WITH_ADAPTERS
    ]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def transform_faults(transform: Component | None) -> list[str]:
    """The faults of a transform's settings, found by applying it to three tokens."""
    if transform is None:
        return []
    ratios = torch.tensor([[0.0, 30.0, -30.0]])
    try:
        result = transform.build(ratios, torch.ones(1, 3, dtype=torch.bool), side="chosen")
    except ConfigError as error:
        return error.faults
    if not (
        isinstance(result, tuple) and len(result) == 2 and all(isinstance(r, torch.Tensor) for r in result)
    ):
        return [
            f"{transform.key} ({transform.path}): must return weights and the mask of clipped tokens, two tensors [B, T]; "
            f"found {type(result).__name__}"
        ]
    if not bool(result[0].isfinite().all()):
        return [
            f"{transform.key} ({transform.path}): makes weights that are not finite of the log ratios {ratios.tolist()[0]}: "
            f"{result[0].tolist()}; lower its bounds and factors"
        ]
    return []


def loss_faults(loss: Component | None, provides: frozenset[str], recipe: str) -> list[str]:
    """The faults of a loss's settings, and statistics that it needs but the recipe does not provide."""
    if loss is None:
        return []
    try:
        built = loss.build()
    except ConfigError as error:
        return error.faults
    try:
        needs = LossTraits.of(built).needs
    except ValueError as error:
        return [f"{loss.key} ({loss.path}): {error}"]
    if not isinstance(needs, frozenset):
        return [
            f"{loss.key} ({loss.path}): a loss must say what it needs as a frozenset `needs`, found {needs!r}"
        ]
    missing = sorted(needs - provides)
    if missing:
        return [
            f"{loss.key} ({loss.path}): needs {', '.join(map(repr, missing))}, which {recipe} does not provide "
            f"(it provides {', '.join(sorted(provides))}); use another loss or another recipe"
        ]
    return []
