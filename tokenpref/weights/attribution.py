r"""Token weights from gradient attribution (TI-DPO, arXiv 2505.19653): targets, importances, prior and mixture.

With e_i the input embedding of token i and a target f (a number for each row):

    I_i = || d f / d e_i ||             over a span of n tokens: I_norm = I / sum I
    P_j = exp(-((j - (n - 1) / 2) / s)^2 / 2),  j = 0..n-1
    w   = mixture * I_norm + (1 - mixture) * P,  then scaled to mean one over the span, and cut to the answer

The weight of a token is its importance as input, and multiplies the log ratio of predicting it, as in the authors' code.
Everything here is tensors; :mod:`tokenpref.training.attribution` runs the model.
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
    """What a target may look at; nothing is computed that it does not call for.

    Args:
        logits_at: positions ``[N]`` to logits ``[N, V]`` there.
        logps: the log-probabilities ``[N, L-1]`` of the labels, 0 where the label is -100.
        labels: ``[N, L]``, -100 outside the answers.
        last: ``[N]`` position of each row's last token.
        sides: the sides that the rows hold, in their order: ``("chosen", "rejected")`` is chosen rows, then rejected ones.
    """

    logits_at: Callable[[Tensor], Tensor]
    logps: Callable[[], Tensor]
    labels: Tensor
    last: Tensor
    sides: tuple[str, ...]


class Target(Protocol):
    """A number whose gradient says how much each input token matters. Named in configs by dotted path."""

    needs_pair: bool
    """Whether both answers of a pair have to be among the rows."""

    def __call__(self, inputs: TargetInputs) -> Tensor:
        """One number for each row (or pair); their sum is differentiated."""
        ...


class MaxLogit:
    """The largest logit at the end of the answer: the model's most confident prediction there (paper, Eq. 5).

    Args:
        position: "last_valid", at the row's last token, normally EOS (the authors' code); or "before_last", where that
            token is predicted (the paper): the last token then has no gradient and keeps the prior's share.

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
    """log pi(answer | prompt), summed over the answer's tokens. Its last token, which predicts nothing, has no gradient."""

    needs_pair = False

    def __call__(self, inputs: TargetInputs) -> Tensor:
        """``[N]``."""
        return inputs.logps().sum(-1)


class PreferenceMargin:
    """log pi(chosen) - log pi(rejected): what the objective raises. The reference's part is constant in the embeddings.

    The rejected answer's gradient is that of :class:`AnswerLogp` turned round, which the norms "l1" and "l2" cannot see:
    with them the two targets give the same weights. "input_times_gradient" keeps what raises the target: in the
    rejected answer the tokens that speak against it.
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
        sigma: its width as a fraction of the span's length: 0.25 in the paper, 0.125 in the authors' config.
        normalized: True sums to one over the span, with a width of at least one token (the code); False peaks at one,
            whatever the width (as the paper writes it), so that it outweighs importances that sum to one.

    Raises:
        ValueError: for a width that is not above 0.
    """

    sigma: float = 0.25
    normalized: bool = True

    def __post_init__(self) -> None:
        check_number("sigma", self.sigma, above=0)
        check_flag("normalized", self.normalized)

    def __call__(self, span: Tensor) -> Tensor:
        """Values on the tokens of ``span`` (``[N, L]`` bool), 0 elsewhere.

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
    """How much each token matters, from the gradient at its embedding.

    Args:
        gradient: ``[N, L, D]``.
        embeddings: ``[N, L, D]``, where the gradient was taken.
        norm: "l1" (paper and code) or "l2" of the gradient, or "input_times_gradient": the positive part of its product
            with the embedding, which is what the token adds to the target to first order.

    Returns:
        ``[N, L]``, not negative.

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
    """Weights from importances: mixed with a prior, mean one over the span, cut to the answer.

    Args:
        found: importances ``[N, L]``, not negative.
        answer: ``[N, L]`` bool, the answer's tokens.
        span: ``[N, L]`` bool, the tokens that share a row's weight; the answer is part of it.
        mixture: share of the importances (the paper's lambda), in [0, 1]; the rest is the prior's.
        prior: values ``[N, L]`` of a span; None for :class:`GaussianPrior`.

    Returns:
        ``[N, L]``: over each row's span they sum to its number of tokens before the cut to the answer. A row whose
        importances are all 0 has the prior alone; a span of one token has weight 1.

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
    # Nothing to attribute: the prior has all of it.
    mixed = torch.where(total > 0, mixed, beside)
    whole = mixed.sum(-1, keepdim=True)
    if bool(((whole == 0) & (count > 0)).any()):
        rows = ((whole == 0) & (count > 0)).nonzero()[:, 0].tolist()
        raise ValueError(
            f"rows {rows} have neither importances nor a prior: every token would weigh 0; set a wider sigma"
        )
    weights = mixed / torch.where(whole > 0, whole, 1) * count
    return torch.where(answer, weights, 0).to(found.dtype)
