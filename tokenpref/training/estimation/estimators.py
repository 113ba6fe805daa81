"""Estimators of token scores: what scores every answer token for a weight store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from tokenpref._paths import resolve_path
from tokenpref.data import (
    PreferenceDataset,
    Tokenizer,
    padded,
)
from tokenpref.distributed import World
from tokenpref.errors import ConfigError, TokenprefError
from tokenpref.models.scoring import ScoringModel
from tokenpref.stats import SIDES
from tokenpref.training.config.faults import checkpoint_faults
from tokenpref.training.config.fields import Component, component, integer
from tokenpref.training.config.keys import ScoringConfig
from tokenpref.training.config.sanity import component_faults, own_component_faults
from tokenpref.training.credit.attribution import _AttributedWeights
from tokenpref.training.credit.prompts import check_context, prompted_answers
from tokenpref.training.estimation.pair_folder import ContrastivePair, read_pair
from tokenpref.training.loading.models import ModelMaker, weights_digest
from tokenpref.training.loading.preflight import check_scored
from tokenpref.weights import contrastive_log_ratios
from tokenpref.weights.attribution import (
    Target,
)

__all__ = ["AttributionEstimator", "ContrastiveEstimator", "EstimateConfig", "Estimator"]


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
        """See :class:`tokenpref.training.estimation.estimators.Estimator`."""
        model, checkpointer = config.runs("attribution")
        return {
            "name": "attribution",
            **self.settings(),
            "model": model.plain(),
            "weights": weights_digest(checkpointer),
        }

    def _maker(self, config: EstimateConfig, world: World) -> ModelMaker:
        model, checkpointer = config.runs("attribution")
        return ModelMaker(config, world, model=model, checkpointer=checkpointer)

    def check(
        self, config: EstimateConfig, dataset: PreferenceDataset, tokenizer: Tokenizer, world: World
    ) -> None:
        """See :class:`tokenpref.training.estimation.estimators.Estimator`.

        Raises:
            ConfigError: if the checkpoint's config.json describes another model, or a sequence or token id does not fit it.
        """
        _, reader = config.runs("attribution")
        maker = self._maker(config, world)
        check_scored(maker, {"checkpointer": reader}, tokenizer, data=(dataset, config.dataset))

    def setup(
        self, config: EstimateConfig, dataset: PreferenceDataset, tokenizer: Tokenizer, world: World
    ) -> None:
        """See :class:`tokenpref.training.estimation.estimators.Estimator`."""
        self._answers = [
            ((e.chosen_ids, e.chosen_start), (e.rejected_ids, e.rejected_start)) for e in dataset
        ]
        self._rows = dataset.rows().tolist()
        self._pad_id, self._world = tokenizer.pad_id, world
        self._scorer = self._maker(config, world).policy()

    def score(self, answers: Sequence[tuple[int, int]]) -> list[Tensor]:
        """See :class:`tokenpref.training.estimation.estimators.Estimator`.

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


@dataclass(frozen=True, kw_only=True)
class EstimateConfig(ScoringConfig):
    """What is scored, with what, and in which portions."""

    dataset: Component = component(positional=1, mixed=True)
    """The pairs whose answers are scored. A list of data sets is mixed."""
    estimator: Component = component()
    """Scores answer tokens: ``ContrastiveEstimator``, ``AttributionEstimator`` or your own."""
    model: Component | None = component(optional=True)
    """Builds the decoder that the estimator runs. With a contrastive pair: the model of its config."""
    checkpointer: Component | None = component(optional=True)
    """Reads the weights. With a contrastive pair: the checkpointer of its config, which reads the base model."""
    batch_tokens: int = integer(4096)
    """Tokens per batch, padding included. A longer sequence is a batch of its own."""
    shard_rows: int = integer(256)
    """Pairs per shard. An interrupted run loses at most one shard."""

    def runs(self, what: str) -> tuple[Component, Component]:
        """The model and the checkpointer, for an estimator that runs a model.

        Args:
            what: what runs it, for the error.

        Raises:
            ConfigError: if the config has none.
        """
        if self.model is None or self.checkpointer is None:
            key = "checkpointer" if self.model is not None else "model"
            raise ConfigError(
                f"{key}: missing; {what} runs the model that {key} names. Set model and checkpointer to those of the base model"
            )
        return self.model, self.checkpointer

    def faults(self) -> list[str]:
        """Faults that no single key shows."""
        return (
            super().faults()
            + checkpoint_faults(self.checkpointer, self.model)
            + component_faults(self.checkpointer)
            + own_component_faults(self.estimator)
        )


class Estimator(Protocol):
    """Scores answer tokens; named in the config by dotted path.

    With a method ``check`` of ``setup``'s arguments, what can be refused without weights is refused first, in a dry run too.
    """

    kind: str
    """What the scores are; see :data:`tokenpref.weights.SCORE_KINDS`."""

    def describe(self, config: EstimateConfig) -> dict[str, Any]:
        """Everything about the estimator that would change its scores, as plain data."""
        ...

    def setup(
        self, config: EstimateConfig, dataset: PreferenceDataset, tokenizer: Tokenizer, world: World
    ) -> None:
        """Load models and check that they fit the data."""
        ...

    def score(self, answers: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Scores of answers, each given as (position in the data set, 0 for chosen or 1 for rejected).

        Every rank calls it equally often; an empty list asks for the same forwards without a result. With an
        attribute ``whole_pairs`` that is true, every list holds pairs: their chosen answers, then their rejected ones.
        """
        ...


class ContrastiveEstimator:
    """log pi+ - log pi- of every answer token, from the pair that ``recipes/contrastive_reference_distributed`` built.

    The config's ``model`` and ``checkpointer`` are those of the base model that the pair was built from.

    Args:
        pair: the pair's folder.

    Raises:
        DataError: if the pair is missing, half built or damaged.
    """

    kind = "log_ratio"

    def __init__(self, pair: str) -> None:
        self.pair: ContrastivePair = read_pair(resolve_path(pair))

    def describe(self, config: EstimateConfig) -> dict[str, Any]:
        """See :class:`Estimator`."""
        model, base = config.runs("a contrastive pair")
        return {
            "name": "contrastive",
            "method": self.pair.method,
            "model": model.plain(),
            **{
                name: {"weights": weights_digest(self.pair.reader(name, base)), "prompt": side.prompt}
                for name, side in self.pair.sides.items()
            },
        }

    def check(
        self, config: EstimateConfig, dataset: PreferenceDataset, tokenizer: Tokenizer, world: World
    ) -> None:
        """See :class:`Estimator`.

        Raises:
            DataError: if model, checkpointer or tokenizer are not the pair's.
            ConfigError: if a file of a side is not as it was written, a side's config.json describes another model, or a sequence
                or token id does not fit it.
        """
        model, base = config.runs("a contrastive pair")
        maker = ModelMaker(config, world, model=model)
        self.pair.check(maker, base, tokenizer.fingerprint())
        readers = [self.pair.reader(side, base) for side in self.pair.sides]
        check_scored(
            maker, {reader.key: reader for reader in readers}, tokenizer, data=(dataset, config.dataset)
        )

    def setup(
        self, config: EstimateConfig, dataset: PreferenceDataset, tokenizer: Tokenizer, world: World
    ) -> None:
        """See :class:`Estimator`.

        Raises:
            ConfigError: if a side's weights do not fit the model.
        """
        model, base = config.runs("a contrastive pair")
        self._dataset, self._pad_id, self._device = dataset, tokenizer.pad_id, world.device
        maker = ModelMaker(config, world, model=model)
        positive, negative = (self.pair.reader(side, base) for side in self.pair.sides)
        self._positive = maker.side(positive, positive.key)
        self._negative = self._positive if self.pair.shares_weights else maker.side(negative, negative.key)

    def score(self, answers: Sequence[tuple[int, int]]) -> list[Tensor]:
        """See :class:`Estimator`."""
        sides = [
            self._batch(answers, side.prompt, scorer)
            for side, scorer in ((self.pair.positive, self._positive), (self.pair.negative, self._negative))
        ]
        ratios = contrastive_log_ratios(self._positive.logps, self._negative.logps, sides[0], sides[1])
        return ratios if answers else []

    def _batch(
        self, answers: Sequence[tuple[int, int]], prompt: str | None, scorer: ScoringModel
    ) -> tuple[Tensor, Tensor]:
        filler = ([self._pad_id] * 2, 2)
        sequences = [prompted_answers(self._dataset, i, prompt)[side] for i, side in answers] or [filler]
        check_context(sequences, scorer)
        tokens, labels = padded(sequences, self._pad_id)
        return tokens.to(self._device), labels.to(self._device)
