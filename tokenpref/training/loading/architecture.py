"""Whether a config's model is the one whose weights its checkpointer reads; looked at before any weight is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from tokenpref.components import accepts
from tokenpref.errors import ConfigError
from tokenpref.models.agreement import Difference, pairs_interleaved
from tokenpref.models.decoder import Decoder
from tokenpref.models.decoder_of import decoder_of
from tokenpref.training.config.fields import Component

__all__ = ["check_architecture"]

CONFIG = "config.json"
# Families whose weights torchtune's Hugging Face checkpointer leaves in the order of halves.
_HALVES = ("QWEN2", "PHI3_MINI", "PHI4")
_HF_CHECKPOINTER = "FullModelHFCheckpointer"
_CAUSAL_LM_CHECKPOINTER = "CausalLMCheckpointer"
# Families of torchtune whose general builder has another name.
_GENERAL = {
    "code_llama2": "llama2",
    "llama3_3": "llama3_1",
    "qwen2_5": "qwen2",
    "phi4": "phi3",
}


def check_architecture(
    checkpointer: Component,
    model: Component,
    decoder: nn.Module,
    *,
    key: str = "checkpointer",
    longest: int | None = None,
) -> list[str]:
    """Compare a model with the ``config.json`` of the folder that its weights come from.

    Args:
        checkpointer: reads the weights.
        model: makes the decoder.
        decoder: what it made, on any device.
        key: what the checkpointer is called in messages.
        longest: tokens of the longest sequence that the model will see, if known.

    Returns:
        Lines for the log: what was not compared.

    Raises:
        ConfigError: naming every number that differs, or if ``config.json`` cannot be read.
    """
    folder = checkpointer.kwargs.get("checkpoint_dir")
    if not isinstance(folder, str):
        return [f"{key}: it names no checkpoint_dir, so the model was not compared with a {CONFIG}"]
    file = Path(folder) / CONFIG
    if not file.is_file():
        return [f"{key}: {file.parent} holds no {CONFIG}, so the model was not compared with it"]
    view = decoder_of(decoder)
    order = _names_fault(checkpointer, model, view, key)
    if order is not None:
        raise ConfigError(order)
    config = _read_config(file, key)
    try:
        found = view.compare(config, longest=longest)
    except ValueError as error:
        raise ConfigError(f"{key}: {file}: {error}; restore the checkpoint's") from error
    faults = [_said(difference, model) for difference in found.differences]
    order = _order_fault(checkpointer, decoder, key)
    if faults:
        mend = (
            f", or set {model.key}.path={folder}" if "path" in model.kwargs and view.named_as_on_disk else ""
        )
        raise ConfigError(
            f"model ({model.path}): is not the model that {file} ({key}) describes, and would compute another function with its "
            f"weights: {'; '.join(faults)}. If the model is right, change {CONFIG}: it is exported with the trained weights{mend}"
        )
    if order is not None:
        raise ConfigError(order)
    return [f"{key}: {note} ({file})" for note in found.notes]


def _read_config(file: Path, key: str) -> Mapping[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{key}: {file} is not valid JSON ({error}); restore the checkpoint's") from error
    if not isinstance(config, dict):
        raise ConfigError(
            f"{key}: {file} holds a JSON {type(config).__name__}, not an object; restore the checkpoint's"
        )
    return config


def _said(difference: Difference, model: Component) -> str:
    there = "there" if difference.given else "by default, the file naming none,"
    text = (
        f"{difference.key} is {_shown(difference.file)} {there} and {_shown(difference.built)} in the model"
    )
    argument = difference.argument
    if argument is None:
        return text
    mend = f"set {model.key}.{argument}={_shown(difference.file)}"
    if accepts(model.target(), argument):
        return f"{text} ({mend})"
    general = _general_builder(model.path)
    if general is None or not accepts(getattr(*general), argument):
        return text
    return f"{text} ({model.path} has no argument for it: use {'.'.join((general[0].__name__, general[1]))} and {mend})"


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " or ".join(map(_shown, value))
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _general_builder(path: str) -> tuple[Any, str] | None:
    """Module and name of torchtune's builder that takes every number of a family."""
    parts = path.split(".")
    if parts[:2] != ["torchtune", "models"] or len(parts) < 4:
        return None
    family = _GENERAL.get(parts[2], parts[2])
    module = import_module(f"torchtune.models.{family}")
    # Builders with adapters have a general builder of their own.
    adapted = parts[3].startswith(("lora_", "qlora_"))
    name = f"lora_{family}" if adapted else family
    return (module, name) if hasattr(module, name) else None


def _names_fault(checkpointer: Component, model: Component, decoder: Decoder, key: str) -> str | None:
    """Models of transformers and of torchtune give other names to the same tensors."""
    if decoder.named_as_on_disk and checkpointer.path.endswith(_HF_CHECKPOINTER):
        wanted, whose = f"tokenpref.models.{_CAUSAL_LM_CHECKPOINTER}", "torchtune's"
    elif not decoder.named_as_on_disk and checkpointer.path.endswith(_CAUSAL_LM_CHECKPOINTER):
        wanted, whose = f"torchtune.training.{_HF_CHECKPOINTER} with its model_type", "transformers'"
    else:
        return None
    return (
        f"{key}._component_: {checkpointer.path} reads weights under {whose} names, and {model.path} makes a model with others; "
        f"set it to {wanted}"
    )


def _order_fault(checkpointer: Component, decoder: nn.Module, key: str) -> str | None:
    """Weights of queries and keys are read in an order that rotary embeddings of one kind expect."""
    if not checkpointer.path.endswith(_HF_CHECKPOINTER):
        return None
    kind, interleaved = str(checkpointer.kwargs.get("model_type")), pairs_interleaved(decoder)
    if interleaved is None or interleaved != (kind in _HALVES):
        return None
    wanted = (
        f"one of {', '.join(_HALVES)}"
        if not interleaved
        else "the model's family (LLAMA2, LLAMA3, MISTRAL, GEMMA, ...)"
    )
    return (
        f"{key}.model_type: {kind} reads queries and keys in another order than the model's rotary embeddings expect; set it to "
        f"{wanted}"
    )
