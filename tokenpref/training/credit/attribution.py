"""Token weights from gradients at the embeddings, for a training or for a weight store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokenpref._checks import check_choice, check_number
from tokenpref.data import IGNORE_INDEX, PairBatch
from tokenpref.errors import ConfigError, TokenprefError, TrainingDiverged
from tokenpref.training.credit.gradients import token_importances
from tokenpref.training.credit.live import LiveModels, Refresh
from tokenpref.weights.attribution import (
    NORMS,
    SPANS,
    GaussianPrior,
    MaxLogit,
    Target,
    attribution_weights,
)

__all__ = ["Attribution"]


class Attribution:
    """Weights from attribution on a model (TI-DPO, arXiv 2505.19653, Eq. 5 to 8), for a training or for a weight store.

    In a training it costs about half a DPO step: another forward pass of both answers, and a backward pass without parameter
    gradients, before the step builds its own graph. A store holds final weights (kind weight), each computed once by the
    config's model, so ``model`` and ``refresh`` do not matter there. Train on a store with ``weight_transform=null``.

    Args:
        target: what is differentiated: MaxLogit (default), AnswerLogp or PreferenceMargin of
            :mod:`tokenpref.weights.attribution`, or a component of the user's own.
        norm: "l1", "l2" or "input_times_gradient".
        span: "answer": the answer's tokens share the weight, mean one; "prompt_and_answer": the prompt's take part, as in the
            released code, and the answer's mean is what is left.
        mixture: the paper's lambda: share of the attribution, in [0, 1]; the rest is the prior's.
        prior: default :class:`tokenpref.weights.attribution.GaussianPrior`.
        model: "policy", as it is at that step, or "reference", which is frozen.
        refresh: "every_step", "every_n_steps" or "once"; see :class:`tokenpref.training.credit.live.Refresh`.
        every_n_steps: for "every_n_steps".

    Raises:
        ConfigError, ValueError: for a value out of its range.
    """

    kind = "weight"
    timed_as = "attribution"

    def __init__(
        self,
        target: Target | None = None,
        norm: str = "l1",
        span: str = "answer",
        mixture: float = 0.7,
        prior: Callable[[Tensor], Tensor] | None = None,
        model: str = "policy",
        refresh: str = "every_step",
        every_n_steps: int | None = None,
    ) -> None:
        self.target: Target = MaxLogit() if target is None else target
        if not callable(self.target) or not isinstance(getattr(self.target, "needs_pair", None), bool):
            raise ConfigError(
                f"target: must be a component with needs_pair (true or false) that can be called, such as "
                f"tokenpref.weights.attribution.MaxLogit; found {target!r}"
            )
        self.norm = check_choice("norm", norm, NORMS)
        self.span = check_choice("span", span, SPANS)
        self.mixture = check_number("mixture (lambda)", mixture, at_least=0, at_most=1)
        self.prior = GaussianPrior() if prior is None else prior
        if not callable(self.prior):
            raise ConfigError(
                f"prior: must be a component such as tokenpref.weights.attribution.GaussianPrior; found {prior!r}"
            )
        self._model = check_choice("model", model, ("policy", "reference"))
        self.asks_reference = model == "reference"
        self.refresh = Refresh(refresh, every_n_steps)
        self.whole_pairs = self.target.needs_pair

    def settings(self) -> dict[str, Any]:
        """Everything except the model that changes the weights, as plain data."""
        return {
            "name": "attribution",
            "target": _described(self.target),
            "norm": self.norm,
            "span": self.span,
            "mixture": self.mixture,
            "prior": _described(self.prior),
        }

    def score(self, batch: PairBatch, models: LiveModels) -> list[Tensor]:
        """See :class:`tokenpref.training.credit.live.TokenScores`.

        Raises:
            TrainingDiverged, TokenprefError: on every rank, with the rows, if a gradient is not finite on any.
        """
        scorer = models.policy if self._model == "policy" else models.frozen("token_weights.model")
        labels = batch.labels
        found = token_importances(
            scorer, batch.tokens, labels, target=self.target, norm=self.norm, sides=batch.sides
        )
        answer = labels != IGNORE_INDEX
        span = answer
        if self.span == "prompt_and_answer":
            places = torch.arange(labels.shape[1], device=labels.device)
            last = torch.where(answer, places, -1).amax(-1, keepdim=True)
            span = places <= last
        bad = (torch.where(span, found, 0).isfinite().logical_not()).any(-1)
        rows = {
            row for (row, _), is_bad in zip(batch.answers, bad.tolist(), strict=True) if is_bad and row >= 0
        }
        _stop_if_any(rows, models)
        weights = attribution_weights(
            torch.where(bad[:, None], 0, found), answer, span, mixture=self.mixture, prior=self.prior
        )
        return [row[kept] for row, kept in zip(weights, answer, strict=True)]


def _stop_if_any(bad: set[int], models: LiveModels) -> None:
    if not models.world.any(bool(bad)):
        return
    rows = sorted(set().union(*models.world.gather_objects(bad)))
    fault = f"the attribution of rows {rows} is nan or infinite"
    if not models.trained:
        raise TokenprefError(f"{fault}; inspect the model's weights")
    raise TrainingDiverged(models.step + 1, fault, rows, rows)


def _described(component: Any) -> dict[str, Any]:
    """A component's class and settings."""
    kind = type(component)
    named = (
        {k: v for k, v in vars(component).items() if not k.startswith("_")}
        if hasattr(component, "__dict__")
        else {}
    )
    return {"_component_": f"{kind.__module__}.{kind.__qualname__}", **named}
