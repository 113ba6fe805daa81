r"""Token weights from gradient attribution (TI-DPO, arXiv 2505.19653): targets, importances, prior and mixture.

With e_i the input embedding of token i and a target f (a number for each row):

    I_i = || d f / d e_i ||             over a span of n tokens: I_norm = I / sum I
    P_j = exp(-((j - (n - 1) / 2) / s)^2 / 2),  j = 0..n-1
    w   = mixture * I_norm + (1 - mixture) * P,  then scaled to mean one over the span; 0 outside the answer

The weight of a token is its importance as an input, and it multiplies the log ratio of predicting the token, as in the
authors' code. This module works on tensors only; :class:`tokenpref.training.Attribution` runs the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tokenpref._checks import check_choice, check_flag, check_number

__all__ = [
    "NORMS",
    "SPANS",
    "AnswerLogp",
    "GaussianPrior",
    "MaxLogit",
    "PreferenceMargin",
    "Target",
    "TargetInputs",
    "attribution_weights",
    "importances",
]

NORMS = ("l1", "l2", "input_times_gradient")
SPANS = ("answer", "prompt_and_answer")


@dataclass(frozen=True)
class TargetInputs:
    """What a target may use. Logits and log-probabilities are computed only if the target calls for them.

    Args:
        logits_at: maps positions ``[N]`` to the logits ``[N, V]`` there.
        logps: returns the log-probabilities ``[N, L-1]`` of the labels, 0 where the label is -100.
        labels: ``[N, L]``, -100 outside the answers.
        last: ``[N]`` position of each row's last token.
        sides: the sides of the rows, in order: ``("chosen", "rejected")`` means all chosen rows, then all rejected ones.
    """

    logits_at: Callable[[Tensor], Tensor]
    logps: Callable[[], Tensor]
    labels: Tensor
    last: Tensor
    sides: tuple[str, ...]


class Target(Protocol):
    """A number whose gradient says how much each input token matters. Configs name it by its dotted path."""

    needs_pair: bool
    """Whether both answers of a pair have to be among the rows."""

    def __call__(self, inputs: TargetInputs) -> Tensor:
        """One number for each row (or pair); their sum is differentiated."""
        ...


class MaxLogit:
    """The largest logit at the end of the answer, which is the model's most confident prediction there (paper, Eq. 5).

    Args:
        position: "last_valid" is the row's last token, normally EOS (the authors' code). "before_last" is the position that
            predicts this token (the paper); the last token then has no gradient and keeps the prior's share.

    Raises:
        ValueError: for an unknown position.
    """

    needs_pair = False

    def __init__(self, position: str = "last_valid") -> None:
        self.position = check_choice("position", position, ("last_valid", "before_last"))

    def __call__(self, inputs: TargetInputs) -> Tensor:
        """``[N]``."""
        at = inputs.last if self.position == "last_valid" else (inputs.last - 1).clamp(min=0)
        return inputs.logits_at(at).amax(-1)


class AnswerLogp:
    """log pi(answer | prompt), summed over the answer's tokens. The last token predicts nothing, so it has no gradient."""

    needs_pair = False

    def __call__(self, inputs: TargetInputs) -> Tensor:
        """``[N]``."""
        return inputs.logps().sum(-1)


class PreferenceMargin:
    """log pi(chosen) - log pi(rejected), which the objective raises. The reference's part does not depend on the embeddings.

    The gradient at the rejected answer is that of :class:`AnswerLogp` with the opposite sign. The norms "l1" and "l2" ignore
    the sign, so with them the two targets give the same weights. "input_times_gradient" keeps the tokens that raise the
    target: in the rejected answer these are the tokens that speak against it.
    """

    needs_pair = True

    def __call__(self, inputs: TargetInputs) -> Tensor:
        """``[B]``."""
        chosen, rejected = inputs.logps().sum(-1).chunk(2)
        return chosen - rejected


@dataclass(frozen=True)
class GaussianPrior:
    """A bell over the span, highest at its centre.

    Args:
        sigma: the width as a fraction of the span's length: 0.25 in the paper, 0.125 in the authors' config.
        normalized: with True the values sum to one over the span, and the width is at least one token (the code). With False
            the peak is one for any width (as the paper writes it), so the prior outweighs importances that sum to one.

    Raises:
        ValueError: for a width that is not above 0.
    """

    sigma: float = 0.25
    normalized: bool = True

    def __post_init__(self) -> None:
        check_number("sigma", self.sigma, above=0)
        check_flag("normalized", self.normalized)

    def __call__(self, span: Tensor) -> Tensor:
        """The prior on the tokens of ``span`` (``[N, L]`` bool), and 0 elsewhere.

        Returns:
            ``[N, L]`` float64.
        """
        count = span.sum(-1, keepdim=True).double()
        place = span.cumsum(-1).double() - 1
        width = self.sigma * count
        width = width.clamp(min=1) if self.normalized else width.clamp(min=torch.finfo(torch.float64).tiny)
        bell = torch.where(span, torch.exp(-(((place - (count - 1) / 2) / width) ** 2) / 2), 0)
        return (
            bell / bell.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
            if self.normalized
            else bell
        )


def importances(gradient: Tensor, embeddings: Tensor, norm: str = "l1") -> Tensor:
    """The importance of each token, from the gradient at its embedding.

    Args:
        gradient: ``[N, L, D]``.
        embeddings: ``[N, L, D]``, where the gradient was taken.
        norm: "l1" (paper and code) or "l2" of the gradient, or "input_times_gradient": the positive part of its product
            with the embedding, which is the token's first-order contribution to the target.

    Returns:
        ``[N, L]``, non-negative.

    Raises:
        ValueError: for an unknown norm.
    """
    check_choice("norm", norm, NORMS)
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    gradient = gradient.to(dtype)
    if norm == "l1":
        return gradient.abs().sum(-1)
    if norm == "l2":
        return gradient.square().sum(-1).sqrt()
    return (gradient * embeddings.to(dtype)).sum(-1).clamp(min=0)


def attribution_weights(
    found: Tensor,
    answer: Tensor,
    span: Tensor,
    *,
    mixture: float = 1.0,
    prior: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Weights from importances: mixed with a prior, scaled to mean one over the span, and 0 outside the answer.

    Args:
        found: importances ``[N, L]``, non-negative.
        answer: ``[N, L]`` bool, the answer's tokens.
        span: ``[N, L]`` bool, the tokens that share a row's weight; the answer is part of it.
        mixture: share of the importances (the paper's lambda), in [0, 1]; the rest is the prior's.
        prior: values ``[N, L]`` of a span; None for :class:`GaussianPrior`.

    Returns:
        ``[N, L]``. Before values outside the answer are set to 0, the weights of a span sum to its number of tokens. A row
        whose importances are all 0 gets the prior alone. A span of one token has weight 1.

    Raises:
        ValueError: for a mixture outside [0, 1], or importances that are negative or not finite; the message names the rows.
    """
    check_number("mixture (lambda)", mixture, at_least=0, at_most=1)
    bad = (torch.where(span, found, 0) < 0) | ~torch.where(span, found, 0).isfinite()
    if bool(bad.any()):
        raise ValueError(
            f"the importances of rows {sorted(set(bad.nonzero()[:, 0].tolist()))} are negative, nan or infinite"
        )
    count = span.sum(-1, keepdim=True)
    share = torch.where(span, found, 0).double()
    total = share.sum(-1, keepdim=True)
    beside = (prior or GaussianPrior())(span)
    mixed = mixture * share / torch.where(total > 0, total, 1) + (1 - mixture) * beside
    # Without importances the prior gets the whole share.
    mixed = torch.where(total > 0, mixed, beside)
    whole = mixed.sum(-1, keepdim=True)
    if bool(((whole == 0) & (count > 0)).any()):
        rows = ((whole == 0) & (count > 0)).nonzero()[:, 0].tolist()
        raise ValueError(
            f"rows {rows} have neither importances nor a prior: every token would weigh 0; set a wider sigma"
        )
    weights = mixed / torch.where(whole > 0, whole, 1) * count
    return torch.where(answer, weights, 0).to(found.dtype)
