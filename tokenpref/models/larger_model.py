"""Where a language model lies in the larger model of its folder, such as one that also sees images.

A run trains the language model alone. ``peft`` loads its adapter over the folder, and there it finds the larger model, whose
layers have other names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tokenpref.errors import ConfigError
from tokenpref.models.described import model_of
from tokenpref.models.names_on_disk import NamesOnDisk

__all__ = ["Place", "file_names_of", "place_of"]


@dataclass(frozen=True)
class Place:
    """The place of a language model in a larger model.

    Args:
        body: the larger model's name for the language model without its head.
        modules: names of all modules of the larger model.
    """

    body: str
    modules: frozenset[str]


def larger_model_of(config: Any, where: str) -> Any:
    """The model that transformers loads from the folder of a config, on the meta device.

    Raises:
        ConfigError: if it makes none.
    """
    with torch.device("meta"):
        return model_of(config, where, "name the folder of a language model", sees=True)


def place_of(model: nn.Module, config: Any, where: str) -> Place | None:
    """The place of a language model in the model of its folder; None if it is that model.

    Args:
        model: a causal LM of transformers.
        config: the config of the folder.
        where: what named the folder, for errors.

    Raises:
        ConfigError: if it is no part of it.
    """
    if config.get_text_config() is config:
        return None
    larger = larger_model_of(config, where)
    if type(larger) is type(model):
        return None
    body = type(model.base_model)
    found = [name for name, module in larger.named_modules() if type(module) is body]
    if len(found) != 1:
        raise ConfigError(
            f"{where} is a {config.model_type}, which holds {len(found)} modules of the class {body.__name__}, so an adapter "
            "has no names there; set lora=null, or name the folder of a language model"
        )
    return Place(found[0], frozenset(name for name, _ in larger.named_modules()))


def file_names_of(config: Any, names: Iterable[str], where: str) -> dict[str, str]:
    """Names of tensors in the files of a folder, by their names in the model that transformers loads from it.

    Tensors that transformers makes of several others, or changes, are left out.

    Raises:
        ConfigError: if transformers makes no model of the config.
    """
    origins = NamesOnDisk(larger_model_of(config, where), names).origins
    return {name: origin.sources[0][0] for name, origin in origins.items() if origin.converter is None}
