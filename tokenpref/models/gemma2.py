"""Lets torchtune's Gemma 2 compute what Gemma 2 computes.

torchtune 0.6.1 departs from the model in three places:

* Its final norm caps the hidden states, where Gemma 2 caps the logits. :func:`last_norm` leaves the cap out, and
  :func:`logit_cap` gives it to the head.
* Its conversion of checkpoints exchanges the norm before the feed-forward (``pre_feedforward_layernorm``, read into
  ``mlp_scale``) and the norm after it (``post_feedforward_layernorm``, read into ``mlp_norm``). :func:`restore_layers` lets the
  layers use them as they are named in the checkpoint. The names in state dicts do not change, so torchtune's checkpointers write
  each norm to where it was read from.
* With a KV cache its sliding window counts from the first token of a call instead of the first one in the cache. Sampling is
  therefore limited to the window (:func:`window_of`).

Its builders for the 2B, 9B and 27B models have the values of the two caps exchanged. The comparison with ``config.json``
(:mod:`tokenpref.models.agreement`) refuses these and names the builder that takes the caps as arguments.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor, nn

from tokenpref._torchtune import (
    Gemma2Attention,
    Gemma2FinalNorm,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)

__all__ = ["last_norm", "logit_cap", "restore_layers", "window_of"]


def last_norm(model: TransformerDecoder) -> nn.Module:
    """The norm that gives a decoder's last hidden states, of any family."""
    norm: nn.Module = model.norm
    return norm.rms_norm if isinstance(norm, Gemma2FinalNorm) else norm


def logit_cap(model: TransformerDecoder) -> float | None:
    """The soft cap of a decoder's logits; None for a family without one."""
    norm = model.norm
    return norm.capping_value if isinstance(norm, Gemma2FinalNorm) else None


def restore_layers(model: TransformerDecoder) -> None:
    """Let the layers of a Gemma 2 use their feed-forward norms as the checkpoint names them (in place).

    Layers of other families are not changed; a second call has no effect.
    """
    for layer in _layers(model):
        layer.forward = MethodType(_forward, layer)


def window_of(model: TransformerDecoder) -> int | None:
    """The sliding window of a Gemma 2 in tokens; None for other families, and without a window."""
    windows = (layer.attn.sliding_window_size for layer in _layers(model))
    return min((window for window in windows if window is not None), default=None)


def _layers(model: TransformerDecoder) -> list[TransformerSelfAttentionLayer]:
    return [
        module
        for module in model.modules()
        if isinstance(module, TransformerSelfAttentionLayer) and isinstance(module.attn, Gemma2Attention)
    ]


def _forward(layer: Any, x: Tensor, *, mask: Any = None, input_pos: Tensor | None = None, **_: Any) -> Tensor:
    """torchtune's forward with the two norms of the feed-forward exchanged."""
    normed = layer.sa_norm(x)
    hidden = layer.sa_scale(layer.attn(normed, normed, mask=mask, input_pos=input_pos)) + x
    out: Tensor = hidden + layer.mlp_norm(layer.mlp(layer.mlp_scale(hidden)))
    return out
