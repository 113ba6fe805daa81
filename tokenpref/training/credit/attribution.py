"""Token weights from gradients at the embeddings: along the training, and as an estimator for a weight store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokenpref._checks import check_choice, check_number
from tokenpref.data import IGNORE_INDEX, PairBatch, PreferenceDataset
from tokenpref.errors import ConfigError, TrainingDiverged
from tokenpref.models.scoring import ScoringModel
from tokenpref.training.credit.gradients import token_importances
from tokenpref.training.credit.live import LiveModels, Refresh, RowCache
from tokenpref.weights.attribution import (
    NORMS,
    SPANS,
    GaussianPrior,
    MaxLogit,
    Target,
    attribution_weights,
)

__all__ = ["Attribution"]


class _AttributedWeights:
    """Computes weights from a model and its answers; shared by live attribution and the estimator."""

    kind = "weight"

    def __init__(
        self,
        target: Target | None = None,
        norm: str = "l1",
        span: str = "answer",
        mixture: float = 0.7,
        prior: Callable[[Tensor], Tensor] | None = None,
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

    def settings(self) -> dict[str, Any]:
        """Everything except the model that changes the weights, as plain data."""
        return {
            "target": _described(self.target),
            "norm": self.norm,
            "span": self.span,
            "mixture": self.mixture,
            "prior": _described(self.prior),
        }

    def weights(
        self, scorer: ScoringModel, tokens: Tensor, labels: Tensor, sides: tuple[str, ...]
    ) -> tuple[list[Tensor], list[int]]:
        """Weights of each row's answer, and the rows whose importances are not finite (their weights are nan)."""
        found = token_importances(scorer, tokens, labels, target=self.target, norm=self.norm, sides=sides)
        answer = labels != IGNORE_INDEX
        span = answer
        if self.span == "prompt_and_answer":
            places = torch.arange(labels.shape[1], device=labels.device)
            last = torch.where(answer, places, -1).amax(-1, keepdim=True)
            span = places <= last
        bad = (torch.where(span, found, 0).isfinite().logical_not()).any(-1)
        weights = attribution_weights(
            torch.where(bad[:, None], 0, found), answer, span, mixture=self.mixture, prior=self.prior
        )
        weights = torch.where(bad[:, None], torch.nan, weights)
        return [row[kept] for row, kept in zip(weights, answer, strict=True)], bad.nonzero()[:, 0].tolist()


class Attribution(_AttributedWeights):
    """Weights from attribution on the current model (TI-DPO, arXiv 2505.19653, Eq. 5 to 8), for ``token_weights``.

    It costs about half a DPO step: another forward pass of both answers, and a backward pass without parameter gradients, before
    the step builds its own graph.

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
        super().__init__(target, norm, span, mixture, prior)
        self._model = check_choice("model", model, ("policy", "reference"))
        self.asks_reference = model == "reference"
        self._cache: RowCache[list[Tensor]] = RowCache(Refresh(refresh, every_n_steps), list, list)
        self.state_dict, self.load_state_dict = self._cache.state_dict, self._cache.load_state_dict

    def bind(self, dataset: PreferenceDataset) -> None:
        """See :class:`tokenpref.training.credit.live.LiveScores`."""

    def score(self, batch: PairBatch, models: LiveModels) -> list[Tensor]:
        """See :class:`tokenpref.training.credit.live.LiveScores`.

        Raises:
            TrainingDiverged: on every rank, with the rows, if a gradient is not finite on any.
        """
        per_row = self._cache.get(batch.rows, models, lambda places: self._make(batch, models, places))
        nothing = [torch.zeros(0)] * len(batch.sides)
        by_pair = [nothing if found is None else found for found in per_row]
        return [pair[side] for side in range(len(batch.sides)) for pair in by_pair]

    def _make(self, batch: PairBatch, models: LiveModels, places: list[int]) -> list[list[Tensor]]:
        scorer = models.policy if self._model == "policy" else models.frozen("token_weights.model")
        # All rows of the batch, so that every rank runs the same forwards; each rank then uses the rows that it needs.
        weights, bad = self.weights(scorer, batch.tokens, batch.labels, batch.sides)
        pairs = len(batch.rows)
        _stop_if_any({batch.rows[row % pairs] for row in bad} - {-1}, models)
        return [[weights[side * pairs + place] for side in range(len(batch.sides))] for place in places]


def _stop_if_any(bad: set[int], models: LiveModels) -> None:
    if not models.world.any(bool(bad)):
        return
    rows = sorted(set().union(*models.world.gather_objects(bad)))
    raise TrainingDiverged(models.step + 1, f"the attribution of rows {rows} is nan or infinite", rows, rows)


def _described(component: Any) -> dict[str, Any]:
    """A component's class and settings."""
    kind = type(component)
    named = (
        {k: v for k, v in vars(component).items() if not k.startswith("_")}
        if hasattr(component, "__dict__")
        else {}
    )
    return {"_component_": f"{kind.__module__}.{kind.__qualname__}", **named}
