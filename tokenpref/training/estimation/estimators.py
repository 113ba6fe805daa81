"""The estimators of weight stores that configs name, and the config of an estimation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenpref._paths import resolve_path
from tokenpref.data import Tokenizer
from tokenpref.models.scoring import ScoringModel
from tokenpref.training.config.faults import checkpoint_faults
from tokenpref.training.config.fields import Component, component, integer
from tokenpref.training.config.keys import ScoringConfig
from tokenpref.training.config.sanity import component_faults, own_component_faults
from tokenpref.training.credit.attribution import Attribution
from tokenpref.training.credit.live import LiveModels
from tokenpref.training.credit.prompts import ContrastiveScores
from tokenpref.training.estimation.pair_folder import ContrastivePair, read_pair
from tokenpref.training.loading.models import ModelMaker, weights_digest
from tokenpref.training.loading.preflight import check_scored

__all__ = ["AttributionEstimator", "ContrastiveEstimator", "EstimateConfig"]

AttributionEstimator = Attribution
"""The name that configs of ``recipes/estimate_weights_distributed`` use."""


@dataclass(frozen=True, kw_only=True)
class EstimateConfig(ScoringConfig):
    """What is scored, with what, and in which portions."""

    dataset: Component = component(positional=1, mixed=True)
    """The pairs whose answers are scored. A list of data sets is mixed."""
    estimator: Component = component()
    """Source of the scores: ``ContrastiveEstimator``, ``AttributionEstimator``, any ``token_weights``, or your own."""
    model: Component | None = component(optional=True)
    """Builds the decoder that the estimator runs. With a contrastive pair: the model of its config."""
    checkpointer: Component | None = component(optional=True)
    """Reads the weights. With a contrastive pair: the checkpointer of its config, which reads the base model."""
    batch_tokens: int = integer(4096)
    """Tokens per batch, padding included. A longer sequence is a batch of its own."""
    shard_rows: int = integer(256)
    """Pairs per shard. An interrupted run loses at most one shard."""

    def faults(self) -> list[str]:
        """Faults that no single key shows."""
        return (
            super().faults()
            + checkpoint_faults(self.checkpointer, self.model)
            + component_faults(self.checkpointer)
            + own_component_faults(self.estimator)
        )


class ContrastiveEstimator(ContrastiveScores):
    """log pi+ - log pi- of every answer token, from the pair that ``recipes/contrastive_reference_distributed`` built.

    The config's ``model`` and ``checkpointer`` are those of the base model that the pair was built from.

    Args:
        pair: the pair's folder.

    Raises:
        DataError: if the pair is missing, half built or damaged.
    """

    def __init__(self, pair: str) -> None:
        self.pair: ContrastivePair = read_pair(resolve_path(pair))
        super().__init__((self.pair.positive.prompt, self.pair.negative.prompt))
        self._scorers: tuple[ScoringModel, ScoringModel] | None = None

    def _readers(self, maker: ModelMaker) -> dict[str, Component]:
        return {side: self.pair.reader(side, maker.base) for side in self.pair.sides}

    def check_models(self, maker: ModelMaker, tokenizer: Tokenizer) -> None:
        """Compare the pair with the run's model, checkpointer and tokenizer, before any weight is read. Every rank calls it.

        Raises:
            DataError: if one of them is not the pair's.
            ConfigError: if a file of a side is not as it was written, or its config.json describes another model.
        """
        maker.world.together(lambda: self.pair.check(maker, tokenizer.fingerprint()))
        readers = self._readers(maker).values()
        check_scored(maker, {reader.key: reader for reader in readers}, tokenizer)

    def describe(self, maker: ModelMaker) -> dict[str, Any]:
        """What decides the scores beside the data, for the record of a store."""
        return {
            "name": "contrastive",
            "method": self.pair.method,
            "model": maker.model.plain(),
            **{
                side: {"weights": weights_digest(reader), "prompt": self.pair.sides[side].prompt}
                for side, reader in self._readers(maker).items()
            },
        }

    def open(self, models: LiveModels) -> None:
        """Read the weights of both sides.

        Raises:
            ConfigError: if they do not fit the model.
        """
        maker = models.maker
        positive, negative = self._readers(maker).values()
        first = maker.side(positive, positive.key)
        self._scorers = first, first if self.pair.shares_weights else maker.side(negative, negative.key)

    def scorers(self, models: LiveModels) -> tuple[ScoringModel, ScoringModel]:
        """Both sides of the pair."""
        if self._scorers is None:
            self.open(models)
        assert self._scorers is not None  # opened above
        return self._scorers
