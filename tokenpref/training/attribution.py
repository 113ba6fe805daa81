"""Token weights from gradients at the embeddings: along the training, and as an estimator for a weight store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenpref._checks import check_choice, check_number
from tokenpref.data import IGNORE_INDEX, PairBatch, PreferenceDataset, Tokenizer, padded
from tokenpref.distributed import World
from tokenpref.errors import ConfigError, TokenprefError, TrainingDiverged
from tokenpref.models.scoring import ScoringModel
from tokenpref.ops import linear_token_stats
from tokenpref.stats import SIDES
from tokenpref.training.estimate import EstimateConfig
from tokenpref.training.live import LiveModels, Refresh, RowCache
from tokenpref.training.pair import weights_digest
from tokenpref.training.preflight import check_scored
from tokenpref.training.setup import build_scorer, read_weights
from tokenpref.weights.attribution import (
    NORMS,
    SPANS,
    GaussianPrior,
    MaxLogit,
    Target,
    TargetInputs,
    attribution_weights,
    importances,
)

__all__ = ["Attribution", "AttributionEstimator", "token_importances"]


def token_importances(
    scorer: ScoringModel,
    tokens: Tensor,
    labels: Tensor,
    *,
    target: Target,
    norm: str = "l1",
    sides: tuple[str, ...] = SIDES,
) -> Tensor:
    """Gradient of a target at every token's input embedding, as one number a token.

    One forward and the part of a backward that leads to the embeddings, in evaluation mode. Parameters' ``.grad``, the
    modules' modes and the random number generators are left as they were.

    Args:
        scorer: the model, sharded or not, frozen or not.
        tokens: ``[N, L]``, padded on the right.
        labels: ``[N, L]``, -100 outside the answers.
        target: what is differentiated.
        norm: see :func:`tokenpref.weights.attribution.importances`.
        sides: what the rows hold, in their order.

    Returns:
        ``[N, L]``, not negative; may hold nan or inf where the model does.

    Raises:
        ConfigError: if the target compares both answers of a pair and the rows are one side's, or if the model's embeddings
            cannot be hooked.
    """
    if target.needs_pair and sides[:2] != SIDES:
        raise ConfigError(
            f"target {type(target).__name__} compares both answers of a pair, and only {', '.join(map(repr, sides))} is "
            "there; use tokenpref.weights.attribution.AnswerLogp, or a loss that reads both answers"
        )
    places = torch.arange(labels.shape[1], device=labels.device)
    last = torch.where(labels != IGNORE_INDEX, places, 0).amax(-1)
    rows = torch.arange(labels.shape[0], device=labels.device)

    def job(hidden: Tensor, weight: Tensor) -> Tensor:
        # Detached: a custom backward would work out the head's gradient too, which nobody wants here.
        weight = weight.detach()

        def logps() -> Tensor:
            stats = linear_token_stats(
                hidden, weight, None, None, labels, needs=frozenset(), memory_mb=scorer.head_memory_mb
            )
            return stats.policy_logps

        inputs = TargetInputs(
            logits_at=lambda at: F.linear(hidden[rows, at], weight),
            logps=logps,
            labels=labels,
            last=last,
            sides=sides,
        )
        return target(inputs)

    with torch.enable_grad(), _evaluating(scorer.model), _hooked_embeddings(scorer.model) as found:
        value = scorer.run(tokens, job)
        if len(found) != 1:
            raise ConfigError(
                f"model: its embeddings cannot be hooked: tok_embeddings ran {len(found)} times in one forward; "
                "attribution needs a decoder that embeds its tokens once"
            )
        (gradient,) = torch.autograd.grad(value.sum(), found)
    return importances(gradient, found[0].detach(), norm)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _hooked_embeddings(model: nn.Module) -> Iterator[list[Tensor]]:
    """The embeddings of each forward inside the context, cut from what made them, as leaves that want a gradient."""
    embeddings = getattr(model, "tok_embeddings", None)
    if not isinstance(embeddings, nn.Module):
        raise ConfigError(
            f"model: {type(model).__name__} has no module tok_embeddings, so its embeddings cannot be hooked; attribution "
            "needs a torchtune decoder. Use stored weights, or another source in token_weights"
        )
    found: list[Tensor] = []

    def cut(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        found.append(output.detach().requires_grad_())
        return found[-1]

    handle = embeddings.register_forward_hook(cut)
    try:
        yield found
    finally:
        handle.remove()


class _AttributedWeights:
    """From a model and its answers to weights; what the two classes below share."""

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
        """Everything that changes the weights beside the model, as plain data."""
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
    """Weights from attribution on the model as it is (TI-DPO, arXiv 2505.19653, Eq. 5 to 8), for ``token_weights``.

    Costs about half a DPO step: one more forward of both answers and a backward without parameter gradients, before
    the step's own graph exists.

    Args:
        target: what is differentiated: MaxLogit (default), AnswerLogp or PreferenceMargin of
            :mod:`tokenpref.weights.attribution`, or a component of the user's own.
        norm: "l1", "l2" or "input_times_gradient".
        span: "answer": the answer's tokens share the weight, mean one; "prompt_and_answer": the prompt's take part, as in the
            released code, and the answer's mean is what is left.
        mixture: the paper's lambda: share of the attribution, in [0, 1]; the rest is the prior's.
        prior: default :class:`tokenpref.weights.attribution.GaussianPrior`.
        model: "policy", as it is at that step, or "reference", which is frozen.
        refresh: "every_step", "every_n_steps" or "once"; see :class:`tokenpref.training.live.Refresh`.
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
        """See :class:`tokenpref.training.live.LiveScores`."""

    def score(self, batch: PairBatch, models: LiveModels) -> list[Tensor]:
        """See :class:`tokenpref.training.live.LiveScores`.

        Raises:
            TrainingDiverged: on every rank, with the rows, if a gradient is not finite on any.
        """
        per_row = self._cache.get(batch.rows, models, lambda places: self._make(batch, models, places))
        nothing = [torch.zeros(0)] * len(batch.sides)
        by_pair = [nothing if found is None else found for found in per_row]
        return [pair[side] for side in range(len(batch.sides)) for pair in by_pair]

    def _make(self, batch: PairBatch, models: LiveModels, places: list[int]) -> list[list[Tensor]]:
        scorer = models.policy if self._model == "policy" else models.frozen("token_weights.model")
        # All rows of the batch, the same on every rank: which of them count is each rank's own affair.
        weights, bad = self.weights(scorer, batch.tokens, batch.labels, batch.sides)
        pairs = len(batch.rows)
        _stop_if_any({batch.rows[row % pairs] for row in bad} - {-1}, models)
        return [[weights[side * pairs + place] for side in range(len(batch.sides))] for place in places]


def _stop_if_any(bad: set[int], models: LiveModels) -> None:
    if not models.world.any(bool(bad)):
        return
    rows = sorted(set().union(*models.world.gather_objects(bad)))
    raise TrainingDiverged(models.step + 1, f"the attribution of rows {rows} is nan or infinite", rows, rows)


class AttributionEstimator(_AttributedWeights):
    """The same weights from one model that does not move, for ``recipes/estimate_weights_distributed``.

    The model is the config's ``model`` with the weights of its ``checkpointer``. The store holds final weights (kind weight):
    train with ``weight_transform=null``.

    Args:
        target: see :class:`Attribution`; likewise the others.
        norm: "l1", "l2" or "input_times_gradient".
        span: "answer" or "prompt_and_answer".
        mixture: the paper's lambda.
        prior: default :class:`tokenpref.weights.attribution.GaussianPrior`.

    Raises:
        ConfigError, ValueError: for a value out of its range.
    """

    def __init__(
        self,
        target: Target | None = None,
        norm: str = "l1",
        span: str = "answer",
        mixture: float = 0.7,
        prior: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(target, norm, span, mixture, prior)
        self.whole_pairs = self.target.needs_pair

    def describe(self, config: EstimateConfig) -> dict[str, Any]:
        """See :class:`tokenpref.training.estimate.Estimator`."""
        model, checkpointer = self._needed(config)
        return {
            "name": "attribution",
            **self.settings(),
            "model": {"_component_": model.path, **model.kwargs},
            "weights": weights_digest(checkpointer),
        }

    @staticmethod
    def _needed(config: EstimateConfig) -> tuple[Any, Any]:
        for key in ("model", "checkpointer"):
            if getattr(config, key) is None:
                raise ConfigError(f"{key}: missing; attribution runs the model that {key} names")
        return config.model, config.checkpointer

    def check(
        self, config: EstimateConfig, dataset: PreferenceDataset, tokenizer: Tokenizer, world: World
    ) -> None:
        """See :class:`tokenpref.training.estimate.Estimator`.

        Raises:
            ConfigError: if the checkpoint's config.json describes another model, or a sequence or token id does not fit it.
        """
        model, reader = self._needed(config)
        check_scored(
            model, config.dtype, {"checkpointer": reader}, tokenizer, world, data=(dataset, config.dataset)
        )

    def setup(
        self, config: EstimateConfig, dataset: PreferenceDataset, tokenizer: Tokenizer, world: World
    ) -> None:
        """See :class:`tokenpref.training.estimate.Estimator`."""
        model, checkpointer = self._needed(config)
        self._answers = [
            ((e.chosen_ids, e.chosen_start), (e.rejected_ids, e.rejected_start)) for e in dataset
        ]
        self._rows = dataset.rows().tolist()
        self._pad_id, self._world = tokenizer.pad_id, world
        state = read_weights(checkpointer.build(), "checkpointer", world)
        self._scorer = build_scorer(config, state, world, model=model)

    def score(self, answers: Sequence[tuple[int, int]]) -> list[Tensor]:
        """See :class:`tokenpref.training.estimate.Estimator`.

        Raises:
            TokenprefError: with the rows, if a gradient is not finite.
        """
        filler = ([self._pad_id] * 2, 2)
        given = [self._answers[index][side] for index, side in answers] or [filler] * 2
        tokens, labels = (t.to(self._world.device) for t in padded(given, self._pad_id))
        found = [side for _, side in answers]
        half = len(found) // 2
        whole = found == [0] * half + [1] * half  # true of the filler too
        weights, bad = self.weights(self._scorer, tokens, labels, SIDES if whole else ("chosen or rejected",))
        rows = {self._rows[answers[row][0]] for row in bad} if answers else set()
        if self._world.any(bool(rows)):
            named = sorted(set().union(*self._world.gather_objects(rows)))
            raise TokenprefError(
                f"the attribution of rows {named} is nan or infinite; inspect the model's weights"
            )
        return weights if answers else []


def _described(component: Any) -> dict[str, Any]:
    """A component's class and settings."""
    kind = type(component)
    named = (
        {k: v for k, v in vars(component).items() if not k.startswith("_")}
        if hasattr(component, "__dict__")
        else {}
    )
    return {"_component_": f"{kind.__module__}.{kind.__qualname__}", **named}
