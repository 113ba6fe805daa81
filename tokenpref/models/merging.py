"""Merges an adapter folder into the weights of its base, tensor by tensor, without building a model."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokenpref._files import WEIGHT_SUFFIXES, sampled_digest, writing
from tokenpref._sealed import MANIFEST, check_if_sealed
from tokenpref.data.tokenizers import TOKENIZER_FILES, TOOL_TEMPLATE
from tokenpref.errors import TokenprefError
from tokenpref.models.adapted_linear import LLAMA_LIKE
from tokenpref.models.described import read_config
from tokenpref.models.larger_model import file_names_of
from tokenpref.models.peft_format import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_RECORD,
    merged_weight,
)
from tokenpref.models.peft_reader import PeftFolder

__all__ = ["merge_adapter"]

INDEX = "model.safetensors.index.json"
_KEY = "merge"
_PIECE = 16 << 20
_PLAIN_DTYPES = ("F64", "F32", "BF16", "F16")
_NOT_COPIED = (ADAPTER_CONFIG, BASE_RECORD, MANIFEST)
_OTHER_WEIGHTS = (*WEIGHT_SUFFIXES, ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")


def merge_adapter(adapter: Path, output: Path, base: Path | None = None) -> Path:
    """Write the base's weights with an adapter merged in, with the base's file names, tensor names and dtypes.

    One tensor of the base is in memory at a time. The config, the tokenizer and the chat template come along. The tokenizer of
    the adapter's folder, if it has one, replaces the base's.

    Args:
        adapter: an adapter folder of this package or of PEFT.
        output: folder to create; it appears only when it is complete.
        base: folder of the base; None: the one that the adapter names.

    Returns:
        The base's folder.

    Raises:
        TokenprefError: if ``output`` exists, the adapter cannot be read, the base is missing, quantised or another one, or the
            disk refuses to write.
    """
    if output.exists():
        raise TokenprefError(f"{output} exists; remove it or choose another --output")
    found = PeftFolder.read(adapter, _KEY)
    folder = _base_folder(found, base)
    check_if_sealed(folder, _KEY)
    files = _weight_files(folder)
    found = _named_as_in(found, folder, files)
    _check_base(found, folder, files)
    output.parent.mkdir(parents=True, exist_ok=True)
    with writing(output):
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        try:
            for name in files:
                _merge_file(folder / name, partial / name, found)
            _copy_others(folder, adapter, partial, files)
            partial.chmod(0o755)  # only the owner may read temporary folders
            partial.rename(output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


def _base_folder(found: PeftFolder, given: Path | None) -> Path:
    named = found.base_path
    if given is None and named is None:
        raise TokenprefError(
            f"{found.folder}: {ADAPTER_CONFIG} names no base; set --base to the base's folder"
        )
    folder = given if given is not None else Path(str(named)).expanduser()
    if folder.is_dir():
        return folder
    if given is not None:
        raise TokenprefError(f"--base: there is no folder {folder}; set it to the base's folder")
    raise TokenprefError(
        f"{found.folder}: its base {named!r} is no folder here; download the base, and set --base to its folder"
    )


def _weight_files(folder: Path) -> list[str]:
    """Names of the base's safetensors files: those of its index, or all."""
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise TokenprefError(
                f"{index} cannot be read ({type(error).__name__}: {error}); restore it"
            ) from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
                raise TokenprefError(f"{index} lists {name!r}, which is no file in {folder}; restore it")
        return names
    names = sorted(file.name for file in folder.glob("*.safetensors") if file.name != ADAPTER_WEIGHTS)
    if not names:
        raise TokenprefError(
            f"{folder} has no *.safetensors; the base must be a folder of transformers with its weights as safetensors"
        )
    return names


def _named_as_in(found: PeftFolder, folder: Path, files: list[str]) -> PeftFolder:
    """The adapter with its layers named as in the base's files, whose names are not always those of the loaded model.

    For example, the layers of a language model that is a part of a larger one have other names in its files.
    """
    shapes, _ = _tensors_of(folder, files)
    if all(f"{layer}.weight" in shapes for layer in found.layers) or "model_type" not in _config(folder):
        return found
    config = read_config(folder, str(folder), "set --base to the adapter's own base")
    names = file_names_of(config, shapes, str(folder))
    layers = {
        names.get(f"{layer}.weight", f"{layer}.weight").removesuffix(".weight"): parts
        for layer, parts in found.layers.items()
    }
    return replace(found, layers=layers)


def _check_base(found: PeftFolder, folder: Path, files: list[str]) -> None:
    """Check that an adapter belongs to a base, and that the base's weights can be added to, before anything is written."""
    config = _config(folder)
    quantised = config.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
        raise TokenprefError(
            f"{folder} is quantised ({method}), and adapters are merged into plain weights only; set --base to the weights from "
            "which it was quantised"
        )
    recorded = found.recorded_base(_KEY)
    if recorded is not None:
        there = all((folder / name).is_file() for name in recorded.files)
        digest = sampled_digest(folder, recorded.files) if there else ""
        found.check_base(digest, _KEY)
    if found.by_torchtune and (found.dora or config.get("model_type") not in LLAMA_LIKE):
        raise TokenprefError(
            f"{found.folder} was written by torchtune, with the rows of some tensors in another order than the base's; train or "
            "evaluate with adapter_checkpoint set to it, which reads it, and merge what is exported then"
        )
    shapes, dtypes = _tensors_of(folder, files)
    for layer, parts in found.layers.items():
        name = f"{layer}.weight"
        wanted = [parts["lora_B.weight"].shape[0], parts["lora_A.weight"].shape[1]]
        if name not in shapes:
            tied = " (the model ties its head to the embedding)" if layer == "lm_head" else ""
            raise TokenprefError(
                f"{found.folder} has an adapter for {layer}, and {folder} holds no {name}{tied}; set --base to its own base"
            )
        if shapes[name] != wanted:
            raise TokenprefError(
                f"{found.folder} has an adapter for {layer} of the shape {wanted}, and {name} in {folder} has {shapes[name]}; "
                "set --base to its own base"
            )
        if dtypes[name] not in _PLAIN_DTYPES:
            raise TokenprefError(
                f"{folder} is quantised ({name} is {dtypes[name]}), and adapters are merged into plain weights only; set --base "
                "to the weights from which it was quantised"
            )


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise TokenprefError(
            f"{folder}: config.json cannot be read ({error}); the base must be a folder of transformers"
        ) from error
    return config if isinstance(config, dict) else {}


def _tensors_of(folder: Path, files: list[str]) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Shapes and dtypes of the base's tensors, from the files' headers."""
    shapes: dict[str, list[int]] = {}
    dtypes: dict[str, str] = {}
    for name in files:
        try:
            with safe_open(folder / name, framework="pt") as stream:
                for tensor in stream.keys():  # noqa: SIM118
                    part = stream.get_slice(tensor)
                    shapes[tensor], dtypes[tensor] = list(part.get_shape()), str(part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise TokenprefError(f"{folder / name} cannot be read ({error}); restore it") from error
    return shapes, dtypes


def _merge_file(source: Path, target: Path, found: PeftFolder) -> None:
    """Copy one file of weights with the adapters of its layers merged in.

    Shapes and dtypes stay, so the header of the file stays too, and tensors can be written one after another.
    """
    with (
        source.open("rb") as stream,
        safe_open(source, framework="pt") as tensors,
        target.open("wb") as output,
    ):
        length = stream.read(8)  # a file of safetensors: length of the header, header, data
        header = stream.read(int.from_bytes(length, "little"))
        output.write(length + header)
        records = {name: record for name, record in json.loads(header).items() if name != "__metadata__"}
        for name in sorted(records, key=lambda name: records[name]["data_offsets"]):
            start, end = records[name]["data_offsets"]
            parts = found.layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            if parts is None:
                _copy(stream, output, len(length) + len(header) + start, end - start)
            else:
                merged = _merged(name, tensors.get_tensor(name), parts, found.scaling)
                output.write(merged.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _copy(source: BinaryIO, target: BinaryIO, start: int, count: int) -> None:
    """Copy bytes between files."""
    source.seek(start)
    while count:
        piece = source.read(min(count, _PIECE))
        target.write(piece)
        count -= len(piece)


def _merged(name: str, weight: Tensor, parts: Mapping[str, Tensor], scaling: float) -> Tensor:
    down, up, magnitude = (parts.get(p) for p in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"))
    assert down is not None and up is not None  # PeftFolder.read checked this
    merged = merged_weight(weight, down, up, scaling, magnitude)
    if not bool(merged.isfinite().all()):
        raise TokenprefError(
            f"{name} is not finite with the adapter merged in; its values do not fit {str(weight.dtype).removeprefix('torch.')}, "
            "so convert the base to bfloat16 or float32 first"
        )
    return merged


def _copy_others(base: Path, adapter: Path, output: Path, weights: list[str]) -> None:
    """Copy everything of the base but weights, and then the adapter's tokenizer."""
    for file in sorted(base.iterdir()):
        weight = file.name.endswith(_OTHER_WEIGHTS) and file.name != INDEX
        if file.is_file() and not weight and file.name not in (*_NOT_COPIED, *weights):
            shutil.copyfile(file, output / file.name)
    names = (*TOKENIZER_FILES, TOOL_TEMPLATE)
    source = adapter if any((adapter / name).is_file() for name in names) else base
    for name in names:
        (output / name).unlink(missing_ok=True)
        if (source / name).is_file():
            (output / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, output / name)
