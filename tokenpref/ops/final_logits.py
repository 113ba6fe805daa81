"""The scale and the soft cap that some models apply to the products of hidden states and LM head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenpref._checks import check_number
from tokenpref.ops.closed_form import accumulation_dtype

__all__ = ["LogitMap", "final_logits"]


@dataclass(frozen=True)
class LogitMap:
    """The function from raw logits to final logits, and its derivative.

    Args:
        scale: factor of the raw logits, above 0.
        soft_cap: bound that the final logits approach, above 0. None: no bound.

    Raises:
        ValueError: for other numbers.
    """

    scale: float = 1.0
    soft_cap: float | None = None

    def __post_init__(self) -> None:
        check_number("logit_scale", self.scale, above=0)
        if self.soft_cap is not None:
            check_number("soft_cap", self.soft_cap, above=0)

    def logits(self, raw: Tensor) -> Tensor:
        """Final logits in the accumulation dtype, or ``raw`` itself where nothing has to be done."""
        if self.soft_cap is None and self.scale == 1:
            return raw
        wide = raw.to(accumulation_dtype(raw.dtype))
        if self.soft_cap is None:
            return wide * self.scale
        return torch.tanh(wide * (self.scale / self.soft_cap)) * self.soft_cap

    def through_cap_(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """``gradient`` times the derivative of the soft cap, ``1 - (logits / soft_cap)^2``, in place.

        The scale is not applied. A caller multiplies the gradients of statistics ``[N]`` by it, which are far fewer numbers.
        """
        if self.soft_cap is None:
            return gradient
        return gradient.addcmul_(gradient, (logits / self.soft_cap).square_(), value=-1)


def final_logits(raw: Tensor, *, logit_scale: float = 1.0, soft_cap: float | None = None) -> Tensor:
    """The logits of a model whose LM head is followed by a scale and a soft cap.

    ``soft_cap * tanh(logit_scale * raw / soft_cap)``, or ``logit_scale * raw`` without a cap. Gemma 2 has a ``soft_cap``
    (``final_logit_softcapping`` in config.json, 30). Cohere's models have a ``logit_scale`` of that name in config.json, and
    Granite's have one of 1 / ``logits_scaling``.

    Args:
        raw: ``hidden @ head_weight.T``, of any shape.
        logit_scale: factor of the raw logits, above 0.
        soft_cap: bound that the final logits approach, above 0. None: no bound.

    Returns:
        A tensor of the shape and dtype of ``raw``: ``raw`` itself with ``logit_scale`` 1 and no cap. The arithmetic is in float32
        for half precision. Gradients flow to ``raw``.

    Raises:
        ValueError: for a ``logit_scale`` or ``soft_cap`` that is not a finite number above 0.
    """
    return LogitMap(logit_scale, soft_cap).logits(raw).to(raw.dtype)
