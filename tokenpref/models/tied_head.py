"""Handles checkpoints of models with a tied head that also contain a separate head.

DeepSpeed, FSDP and some tools that merge weights write such files. A head that equals the embedding can be ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from tokenpref.errors import ConfigError
from tokenpref.models.decoder_of import decoder_of

__all__ = ["HEAD", "HEAD_IN_FILES", "check_unread_head", "drop_tied_head", "head_hint"]

HEAD, EMBEDDING = "output.weight", "tok_embeddings.weight"
HEAD_IN_FILES = "lm_head.weight"


def drop_tied_head(state: MutableMapping[str, Tensor], model: nn.Module, key: str) -> str | None:
    """Remove the head from a tied model's weights (in place).

    Args:
        state: weights under torchtune's names.
        model: the model of the weights.
        key: config key of their checkpointer.

    Returns:
        A line for the log; None if there was no head.

    Raises:
        ConfigError: if the head is not the embedding.
    """
    if not decoder_of(model).is_tied or HEAD not in state or EMBEDDING not in state:
        return None
    _check_equal(state.pop(HEAD), state[EMBEDDING], key)
    return (
        f"{key}: the checkpoint holds a head ({HEAD_IN_FILES}) that equals the embedding; the model ties the two, so the head is "
        "dropped"
    )


def check_unread_head(checkpointer: Any, state: Mapping[str, Tensor], key: str) -> None:
    """Check a head that torchtune's checkpointer ignores without a check, as it does for tied models of Qwen.

    Raises:
        ConfigError: if the head is not the embedding.
    """
    read = getattr(checkpointer, "_weight_map", None)
    if not isinstance(read, dict) or HEAD_IN_FILES not in read or HEAD in state or EMBEDDING not in state:
        return
    for file in map(str, checkpointer._checkpoint_paths):
        if file.endswith(".safetensors"):
            with safe_open(file, framework="pt") as stream:
                head = stream.get_tensor(HEAD_IN_FILES) if HEAD_IN_FILES in stream.keys() else None  # noqa: SIM118
        else:
            head = torch.load(file, map_location="cpu", mmap=True, weights_only=True).get(HEAD_IN_FILES)
        if head is not None:
            _check_equal(head, state[EMBEDDING], key)


def head_hint(state: Mapping[str, Tensor], model: nn.Module) -> str:
    """A hint for an error about weights without a head, for a model that has one; otherwise an empty text."""
    if HEAD in state or HEAD not in model.state_dict():
        return ""
    return (
        f" The files hold no {HEAD_IN_FILES}, as those of models that tie the head to the embedding; if this one does, name a "
        "builder that ties them (tie_word_embeddings=true where it has that argument)."
    )


def _check_equal(head: Tensor, embedding: Tensor, key: str) -> None:
    if head.shape == embedding.shape and torch.equal(head.to(embedding.dtype), embedding):
        return
    raise ConfigError(
        f"{key}: the checkpoint holds a head ({HEAD_IN_FILES}) that differs from the embedding, and the model ties the two; name "
        "a builder that does not (tie_word_embeddings=false where it has that argument, in config.json too), or, if the "
        f"embedding is the head, remove {HEAD_IN_FILES} from the files"
    )
