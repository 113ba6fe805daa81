"""Any causal language model that transformers knows, from the ``config.json`` of a folder."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tokenpref._paths import resolve_path
from tokenpref._torchtune import DoRALinear, FrozenNF4Linear, LoRALinear
from tokenpref.components import nearest
from tokenpref.errors import ConfigError
from tokenpref.models.described import model_of, read_config
from tokenpref.models.larger_model import place_of

__all__ = ["causal_lm"]

_LORA = {
    "rank": 8,
    "alpha": 16.0,
    "dropout": 0.0,
    "target_modules": "all-linear",
    "use_dora": False,
    "quantize_base": False,
}
# What these settings are called in PEFT and in torchtune.
_OTHER_NAMES = {
    "r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_attn_modules": "target_modules",
}
_NF4_GROUP = 64 * 256
"""How many numbers NF4 stores together."""
_ALL_LINEAR = "all-linear"


def causal_lm(path: str, lora: Mapping[str, Any] | None = None) -> nn.Module:
    """A causal language model of transformers, such as Qwen3, Gemma 3, OLMo 3 or SmolLM3, without its weights.

    The model is what ``config.json`` says. Of a model that also sees images or hears sound, it is the language model alone. Code
    that comes with a folder is never run. Dropout and the losses that train the routers of a mixture of experts are off, because
    policy and reference have to agree.

    Args:
        path: a folder with ``config.json``, or the name of a model on the Hugging Face hub.
        lora: puts adapters in. Its keys are ``rank`` (8), ``alpha`` (16), ``dropout`` (0), ``target_modules``, ``use_dora``
            (false) and ``quantize_base`` (false). ``target_modules`` is what it is in PEFT: a list of module names or of their
            last parts, such as ``[q_proj, v_proj]``, a regular expression for the whole name, or ``all-linear`` (the default)
            for every linear layer except the head. ``quantize_base`` stores the weights of the linear layers in 4 bits (NF4,
            as in QLoRA), except the head and layers without an adapter whose size NF4 cannot hold. None: no adapters; the whole
            model is trained.

    Raises:
        ConfigError: if there is no such model, if it is no causal language model, if it needs code of its own, or if ``lora``
            does not fit it.
    """
    from tokenpref.models.transformers_decoder import TransformersDecoder, remember_place, tie_head

    where, folder = f"model.path: {path}", resolve_path(path)
    mend = "name a folder with the config.json of one, or a model on the hub"
    whole = read_config(folder if folder.is_dir() else path, where, mend)
    config = whole.get_text_config()
    _switch_dropout_off(config)
    dtype = torch.get_default_dtype()
    model = model_of(config, where, "name the folder of one", dtype=dtype)
    for parameter in model.parameters():
        if parameter.is_floating_point():  # DeepSeek's routers stay float32, and FSDP2 shards one dtype only
            parameter.data = parameter.data.to(dtype)
    if getattr(config, "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation(
            "eager"
        )  # early releases of transformers 5 leave the soft cap out of the others
    if model.all_tied_weights_keys:
        tie_head(model)
    if lora is not None:
        _put_adapters(model, lora, TransformersDecoder(model).head_name)
        remember_place(model, place_of(model, whole, where))
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
    _check_targets(settings["target_modules"], linear, head)
    for name, old in linear.items():
        has_bias, fits_nf4 = old.bias is not None, old.weight.numel() % _NF4_GROUP == 0
        if _is_chosen(name, settings["target_modules"]):
            if settings["quantize_base"] and not fits_nf4:
                raise ConfigError(
                    f"model.lora.quantize_base: NF4 stores a weight in groups of {_NF4_GROUP:,} numbers, which do not divide the "
                    f"{old.out_features} x {old.in_features} numbers of {name}; set it to false"
                )
            layer = _adapted(old, settings)
        elif settings["quantize_base"] and fits_nf4:
            layer = FrozenNF4Linear(old.in_features, old.out_features, bias=has_bias)
        else:
            continue
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)


def _adapted(linear: nn.Linear, settings: Mapping[str, Any]) -> nn.Module:
    """A layer with an adapter, of the size of a linear one."""
    kind = DoRALinear if settings["use_dora"] else LoRALinear
    layer: nn.Module = kind(
        linear.in_features,
        linear.out_features,
        rank=settings["rank"],
        alpha=settings["alpha"],
        dropout=settings["dropout"],
        use_bias=linear.bias is not None,
        quantize_base=settings["quantize_base"],
    )
    return layer


def _checked(lora: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with defaults.

    Raises:
        ConfigError: for an unknown name, or a value that cannot be.
    """
    if not isinstance(lora, Mapping) or not lora:
        raise ConfigError(
            f"model.lora: is {lora!r}; set some of {', '.join(_LORA)}, such as lora={{rank: 8}}, or lora=null to train the whole "
            "model"
        )
    for name in lora:
        if name not in _LORA:
            meant = _OTHER_NAMES.get(name)
            hint = nearest(str(name), _LORA) if meant is None else f"; did you mean {meant!r}?"
            raise ConfigError(f"model.lora.{name}: there is no such setting{hint}; it has {', '.join(_LORA)}")
    settings = {**_LORA, **lora}
    rank, alpha, dropout = settings["rank"], settings["alpha"], settings["dropout"]
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ConfigError(f"model.lora.rank: is {rank!r}; set a whole number of at least 1")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha < math.inf:
        raise ConfigError(f"model.lora.alpha: is {alpha!r}; set a number above 0")
    if not isinstance(dropout, (int, float)) or isinstance(dropout, bool) or not 0 <= dropout < 1:
        raise ConfigError(f"model.lora.dropout: is {dropout!r}; set a number from 0 to below 1")
    for name in ("use_dora", "quantize_base"):
        if not isinstance(settings[name], bool):
            raise ConfigError(f"model.lora.{name}: is {settings[name]!r}; set true or false")
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
