"""Any causal language model that transformers knows, from the ``config.json`` of a folder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tokenpref._paths import resolve_path
from tokenpref._torchtune import DoRALinear, LoRALinear
from tokenpref.components import nearest
from tokenpref.errors import ConfigError
from tokenpref.models.described import model_of, read_config

__all__ = ["causal_lm"]

_LORA = {"rank": 8, "alpha": 16.0, "dropout": 0.0, "target_modules": "all-linear", "use_dora": False}
_ALL_LINEAR = "all-linear"


def causal_lm(path: str, lora: Mapping[str, Any] | None = None) -> nn.Module:
    """A causal language model of transformers, such as Qwen3, Gemma 3, OLMo 3 or SmolLM3, without its weights.

    The model is what ``config.json`` says. Of a model that also sees images or hears sound, it is the language model alone. Code
    that comes with a folder is never run. Dropout and the losses that train the routers of a mixture of experts are off, because
    policy and reference have to agree.

    Args:
        path: a folder with ``config.json``, or the name of a model on the Hugging Face hub.
        lora: puts adapters in. Its keys are ``rank`` (8), ``alpha`` (16), ``dropout`` (0), ``target_modules`` and ``use_dora``
            (false). ``target_modules`` is what it is in PEFT: a list of module names or of their last parts, such as
            ``[q_proj, v_proj]``, a regular expression for the whole name, or ``all-linear`` (the default) for every linear layer
            except the head. None: no adapters; the whole model is trained.

    Raises:
        ConfigError: if there is no such model, if it is no causal language model, if it needs code of its own, or if ``lora``
            does not fit it.
    """
    from tokenpref.models.transformers_decoder import TransformersDecoder, tie_head

    where, folder = f"model.path: {path}", resolve_path(path)
    mend = "name a folder with the config.json of one, or a model on the hub"
    config = read_config(folder if folder.is_dir() else path, where, mend).get_text_config()
    _switch_dropout_off(config)
    dtype = torch.get_default_dtype()
    model = model_of(config, where, "name the folder of one", dtype=dtype)
    for parameter in model.parameters():
        if parameter.is_floating_point():  # DeepSeek's routers stay float32, and FSDP2 shards one dtype only
            parameter.data = parameter.data.to(dtype)
    if model.all_tied_weights_keys:
        tie_head(model)
    if lora is not None:
        _put_adapters(model, lora, TransformersDecoder(model).head_name)
    return model


def _switch_dropout_off(config: Any) -> None:
    """Set every dropout rate, and the weight of the routers' loss, to 0 (in place)."""
    for name, value in config.to_dict().items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
            setattr(config, name, 0.0)
    if hasattr(config, "output_router_logits"):
        config.output_router_logits = False


def _put_adapters(model: nn.Module, lora: Mapping[str, Any], head: str) -> None:
    """Replace linear layers by those with an adapter (in place)."""
    settings = _checked(lora)
    linear = {
        name: module for name, module in model.named_modules() if type(module) is nn.Linear and name != head
    }
    chosen = [name for name in linear if _is_chosen(name, settings["target_modules"])]
    _check_targets(settings["target_modules"], linear, head)
    kind = DoRALinear if settings["use_dora"] else LoRALinear
    for name in chosen:
        old = linear[name]
        parent, _, last = name.rpartition(".")
        layer = kind(
            old.in_features,
            old.out_features,
            rank=settings["rank"],
            alpha=settings["alpha"],
            dropout=settings["dropout"],
            use_bias=old.bias is not None,
        )
        setattr(model.get_submodule(parent), last, layer)


def _checked(lora: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with defaults.

    Raises:
        ConfigError: for an unknown name, or a value that cannot be.
    """
    for name in lora:
        if name not in _LORA:
            raise ConfigError(
                f"model.lora.{name}: there is no such setting{nearest(str(name), _LORA)}; it has {', '.join(_LORA)}"
            )
    settings = {**_LORA, **lora}
    rank, alpha, dropout = settings["rank"], settings["alpha"], settings["dropout"]
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ConfigError(f"model.lora.rank: is {rank!r}; set a whole number of at least 1")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not alpha > 0:
        raise ConfigError(f"model.lora.alpha: is {alpha!r}; set a number above 0")
    if not isinstance(dropout, (int, float)) or isinstance(dropout, bool) or not 0 <= dropout < 1:
        raise ConfigError(f"model.lora.dropout: is {dropout!r}; set a number from 0 to below 1")
    if not isinstance(settings["use_dora"], bool):
        raise ConfigError(f"model.lora.use_dora: is {settings['use_dora']!r}; set true or false")
    targets = settings["target_modules"]
    if not isinstance(targets, str):
        if not isinstance(targets, Sequence) or not targets or not all(isinstance(t, str) for t in targets):
            raise ConfigError(
                f"model.lora.target_modules: is {targets!r}; set a list of module names, a regular expression or {_ALL_LINEAR}"
            )
        settings["target_modules"] = list(targets)
    return settings


def _is_chosen(name: str, targets: str | Sequence[str]) -> bool:
    """Whether PEFT would put an adapter on a layer of this name."""
    if targets == _ALL_LINEAR:
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(f".{name}".endswith(f".{target}") for target in targets)


def _check_targets(targets: str | Sequence[str], linear: Mapping[str, nn.Module], head: str) -> None:
    """Check that each target names at least one layer.

    Raises:
        ConfigError: naming the linear layers that there are.
    """
    for target in [targets] if isinstance(targets, str) else targets:
        try:
            found = any(_is_chosen(name, target if isinstance(targets, str) else [target]) for name in linear)
        except re.error as error:
            raise ConfigError(
                f"model.lora.target_modules: {target!r} is no regular expression ({error})"
            ) from error
        if not found:
            kinds = sorted({name.rpartition(".")[2] for name in linear})
            of_head = (
                " The head has no adapter, because token statistics need a plain one."
                if target == head
                else ""
            )
            raise ConfigError(
                f"model.lora.target_modules: {target!r} names no linear layer of the model; these end in "
                f"{', '.join(kinds)}.{of_head}"
            )
