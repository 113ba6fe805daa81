"""The attention that models of transformers run with: inside each sequence of a batch without padding, or over a padded batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenpref._transformers import AttentionInterface, AttentionMaskInterface
from tokenpref.errors import ConfigError
from tokenpref.models.padding_free import Segments, attention_by_segment

__all__ = ["ATTENTION", "WITH_RULES", "register_attention"]

ATTENTION = "tokenpref"
"""The name under which transformers knows this attention."""

WITH_RULES = "tokenpref_with_rules"
"""The name of the same attention that also compares the keys that it sees with those that the model wants it to see."""

_FARTHEST = 1 << 20
"""The distance in tokens up to which they are compared."""


def register_attention() -> None:
    """Let transformers know this attention by its two names. A second call has no effect."""
    AttentionInterface.register(ATTENTION, _attention)
    AttentionInterface.register(WITH_RULES, _attention_with_rules)
    AttentionMaskInterface.register(WITH_RULES, _rule)


def _attention(
    _module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    _mask: Any,
    *,
    segments: Segments | Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of ``[B, heads, L, d]`` queries; returns ``[B, L, heads, d]``.

    Args:
        q: queries.
        k: keys ``[B, heads or fewer, S, d]``.
        v: values.
        segments: the sequences in a row of N positions; or which of the S keys each of L queries sees ``[B, L, S or more]``;
            None: all keys up to its own.
        scaling: factor of the products; None: ``1 / sqrt(d)``.
        sliding_window: how many keys back a query sees, its own included; None: all.
        softcap: bounds the scores by ``softcap tanh(score / softcap)``.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        length, total = q.shape[2], k.shape[2]
        window = sliding_window if sliding_window is not None and sliding_window < total else None
        if mask is None and (window is not None or softcap is not None or length < total):
            mask = _seen(length, total, None, q.device)
        if window is not None and mask is not None:
            mask = mask & _seen(length, total, window, q.device)
        if softcap is not None:
            return _soft_capped(q, k, v, mask, scaling, softcap)
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )

    if isinstance(segments, Segments):
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))
        output = attention_by_segment(
            q, k, v, segments, attention, scale=scaling, window=sliding_window, plain=softcap is None
        )
        return output[None], None
    mask = None if segments is None else segments[:, None, :, : k.shape[2]]
    return attention(q, k, v, mask).transpose(1, 2).contiguous(), None


def _rule(*, mask_function: Callable[..., Tensor], **_: Any) -> Callable[..., Tensor]:
    """What transformers takes for a mask: the rule by which it would make one."""
    return mask_function


def _attention_with_rules(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **arguments: Any
) -> tuple[Tensor, None]:
    """:func:`_attention`, after comparing the keys that it sees with those that the model's mask lets it see.

    Raises:
        ConfigError: if they differ.
    """
    window = arguments.get("sliding_window")
    if not (_sees_window(mask, window, q.device) if callable(mask) else mask is None and window is None):
        seen = "all keys before it" if window is None else f"the last {window} keys"
        raise ConfigError(
            f"model: {type(module).__name__} does not see {seen} as attention without padding does, but others, such as those of "
            "its chunk; set padding_free=false"
        )
    return _attention(module, q, k, v, None, **arguments)


def _sees_window(rule: Callable[..., Tensor], window: int | None, device: torch.device) -> bool:
    """Whether a rule of transformers lets queries see the last ``window`` keys, their own included, or all without one."""
    far = [*range(8), *(2**power + offset for power in range(3, 20) for offset in (-1, 0, 1))]
    near = [] if window is None else [window + offset for offset in (-2, -1, 0, 1) if window + offset >= 0]
    back = torch.tensor(far + near, device=device)
    wanted = torch.ones_like(back, dtype=torch.bool) if window is None else back < window
    zero = back.new_zeros(())
    queries = [zero + _FARTHEST, zero + _FARTHEST - 1]
    past = all(
        torch.equal(rule(zero, zero, query, query - back).expand_as(back), wanted) for query in queries
    )
    return past and not any(bool(rule(zero, zero, query, query + 1)) for query in queries)


def _seen(length: int, total: int, window: int | None, device: torch.device) -> Tensor:
    """Which of ``total`` keys the last ``length`` positions see ``[L, S]``."""
    back = torch.arange(total - length, total, device=device)[:, None] - torch.arange(total, device=device)
    return back >= 0 if window is None else (back >= 0) & (back < window)


def _soft_capped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None, cap: float
) -> Tensor:
    """The attention of Gemma 2, which PyTorch's has no place for; it makes the ``[L, S]`` scores."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = cap * torch.tanh(scores / cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype) @ v
