"""PyTorch's attention for sequences of different lengths in one call, on GPUs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["causal_attention", "takes"]

_WIDEST_HEAD = 256


def takes(q: Tensor, v: Tensor, window: int | None) -> bool:
    """Whether :func:`causal_attention` can compute this. Its kernels are for GPUs and half precision.

    Args:
        q: queries ``[N, heads, d]``.
        v: values ``[M, heads or fewer, d]``.
        window: see there.
    """
    return (
        q.device.type == "cuda"
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] == v.shape[-1] <= _WIDEST_HEAD
        and _function() is not None
        and (window is None or "window_size" in _parameters())
    )


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends_q: Tensor,
    ends_k: Tensor,
    bound: int,
    *,
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention of each sequence's last queries to all keys up to their own.

    Args:
        q: queries ``[N, heads, d]``, those of one sequence after those of another.
        k: keys ``[M, heads or fewer, d]``, at least as many of each sequence as queries.
        v: values of the same shape.
        ends_q: ``[S + 1]`` (int32), 0 and where each of the S sequences ends among the queries.
        ends_k: the same among the keys.
        bound: at least the number of keys of the longest sequence.
        scale: factor of the products; None: ``1 / sqrt(d)``.
        window: how many keys back a query sees, its own included; None: all.

    Returns:
        ``[N, heads, d]``.
    """
    function, known = _function(), _parameters()
    assert function is not None, "takes() says so"
    arguments: dict[str, Any] = {"scale": scale}
    if "window_size" in known:
        arguments["window_size"] = (-1 if window is None else window - 1, 0)
    else:
        arguments["is_causal"] = True
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in known:
            arguments["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    output: Tensor = function(q, k, v, ends_q, ends_k, bound, bound, **arguments)
    return output


@cache
def _function() -> Callable[..., Any] | None:
    """``torch.nn.attention.varlen.varlen_attn``; None if this PyTorch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    found: Callable[..., Any] = varlen_attn
    return found


@cache
def _parameters() -> frozenset[str]:
    """Names of its arguments, which grew from release to release."""
    function = _function()
    return frozenset() if function is None else frozenset(inspect.signature(function).parameters)
