"""Models as their ``config.json`` describes them, by transformers; what it cannot make of one becomes an error of ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tokenpref.errors import ConfigError

__all__ = ["model_of", "parse_config", "read_config"]


def read_config(source: Path | str, where: str, mend: str) -> Any:
    """The config of a folder or of a model on the hub, as transformers reads it. No code that comes with it is run.

    Args:
        source: the folder, or the model's name.
        where: what named it, for the error.
        mend: what to do about it, for the error.

    Raises:
        ConfigError: if there is none, or if transformers does not know such a model.
    """
    from tokenpref._transformers import VERSION, AutoConfig

    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # a file of any content may raise nearly anything
        raise ConfigError(
            f"{where} gives no model that transformers {VERSION} knows ({_said(error)}); {mend}"
        ) from error


def parse_config(record: Mapping[str, Any]) -> Any:
    """The config of transformers that a parsed ``config.json`` is.

    Raises:
        ValueError: if it is none.
    """
    from tokenpref._transformers import CONFIG_MAPPING

    family = record.get("model_type")
    if family not in CONFIG_MAPPING:
        raise ValueError(f"transformers knows no model_type {family!r}")
    try:
        return CONFIG_MAPPING[family].from_dict(dict(record))
    except Exception as error:  # content of any kind may raise nearly anything
        raise ValueError(f"it is no config of a {family} ({_said(error)})") from error


def model_of(
    config: Any, where: str, mend: str, dtype: torch.dtype | None = None, *, sees: bool = False
) -> Any:
    """The causal language model that a config describes, on PyTorch's current default device, with random weights.

    Args:
        config: of a model, or of its language model.
        where: what named it, for the error.
        mend: what to do about it, for the error.
        dtype: of the weights; None: the config's.
        sees: whether it may also be a model that writes about images.

    Raises:
        ConfigError: if transformers makes no causal language model of it, or if its numbers do not fit together.
    """
    from tokenpref._transformers import VERSION, AutoModelForCausalLM, AutoModelForImageTextToText

    maker = AutoModelForCausalLM
    if sees and type(config) in AutoModelForImageTextToText._model_mapping:
        maker = AutoModelForImageTextToText
    try:
        with torch.random.fork_rng(devices=[]):  # a model's constructor may draw random numbers
            return maker.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # numbers that do not fit together may raise nearly anything
        raise ConfigError(
            f"{where} is a {config.model_type}, and transformers {VERSION} makes no causal language model of it "
            f"({_said(error)}); {mend}"
        ) from error


def _said(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = error.__cause__
    if cause is not None and lines:  # such as the field of a config and what is wrong with it
        lines[0] += f" {str(cause).strip().splitlines()[0]}" if str(cause).strip() else ""
    return lines[0] if lines else type(error).__name__
