"""The estimators of weight stores that configs name, and the config of an estimation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenpref._files import sampled_digest
from tokenpref._paths import resolve_path
from tokenpref.data import Tokenizer
from tokenpref.errors import ConfigError
from tokenpref.models.scoring import ScoringModel
from tokenpref.training.config.faults import adapter_faults, checkpoint_faults
from tokenpref.training.config.fields import Component, component, integer, text
from tokenpref.training.config.keys import ScoringConfig
from tokenpref.training.config.sanity import component_faults, own_component_faults
from tokenpref.training.credit.attribution import Attribution
from tokenpref.training.credit.live import LiveModels
from tokenpref.training.credit.prompts import ContrastiveScores
from tokenpref.training.estimation.pair_folder import ADAPTER_FILES, ContrastivePair, read_pair
from tokenpref.training.loading.models import ModelMaker, weights_digest
from tokenpref.training.loading.preflight import check_scored

__all__ = ["AttributionEstimator", "ContrastiveEstimator", "EstimateConfig", "OnlinePair"]

_STORE = "Write a store with recipes/estimate_weights_distributed and set token_weights to tokenpref.data.StoredScores"

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
    adapter_checkpoint: str | None = text(None)
    """Folder of a trained adapter that the estimator's model has, in PEFT's format. For models with adapters only. A
    contrastive pair brings its own."""
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
            + adapter_faults(self.model, self.adapter_checkpoint)
            + own_component_faults(self.estimator)
        )


class ContrastiveEstimator(ContrastiveScores):
    """log pi+ - log pi- of every answer token, from the pair that ``recipes/contrastive_reference_distributed`` built.

    The config's ``model`` and ``checkpointer`` are those of the base model that the pair was built from. If the sides are
    adapters, the base is loaded once, and the adapters take turns in it.

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
            ConfigError: if a file of a side is not as it was written, its config.json describes another model, or its adapter
                does not fit the model.
        """
        maker.world.together(lambda: self.pair.check(maker, tokenizer.fingerprint()))
        # What shares the base is checked with the config's own checkpointer.
        own = {
            reader.key: reader
            for name, reader in self._readers(maker).items()
            if self.pair.sides[name].checkpoint is not None
        }
        check_scored(maker, own, tokenizer)

    def own_nbytes(self, maker: ModelMaker) -> int:
        """Bytes of a process: the models of the sides, of which those without weights of their own share one, and adapters."""
        sides = self.pair.sides.values()
        models = sum(side.checkpoint is not None for side in sides) + self._opens_base()
        adapters = sum(side.adapter is not None for side in sides)
        return models * maker.reference_nbytes + adapters * maker.adapter_nbytes

    def _opens_base(self) -> bool:
        """Whether a training needs a model for sides without weights of their own."""
        return any(side.checkpoint is None for side in self.pair.sides.values())

    def describe(self, maker: ModelMaker) -> dict[str, Any]:
        """What decides the scores beside the data, for the record of a store."""

        def of(name: str, reader: Component) -> dict[str, Any]:
            side = self.pair.sides[name]
            weights = {"weights": weights_digest(reader)}
            if side.adapter is not None:
                weights["adapter"] = sampled_digest(side.adapter, ADAPTER_FILES)
            return {**weights, "prompt": side.prompt}

        return {
            "name": "contrastive",
            "method": self.pair.method,
            "model": maker.model.plain(),
            **{name: of(name, reader) for name, reader in self._readers(maker).items()},
        }

    def open(self, models: LiveModels) -> None:
        """Read the weights of both sides.

        Raises:
            ConfigError: if they do not fit the model.
        """
        maker = models.maker
        base: ScoringModel | None = None
        found: list[ScoringModel] = []
        for name, side in self.pair.sides.items():
            if side.checkpoint is not None:
                reader = self.pair.reader(name, maker.base)
                found.append(maker.side(reader, reader.key))
            else:
                base = base or self._base(models, name)
                found.append(self._over(base, name, models))
        self._scorers = found[0], found[1]

    def _base(self, models: LiveModels, side: str) -> ScoringModel:
        """The model whose base the sides without weights of their own share."""
        reader = self.pair.reader(side, models.maker.base)
        scorer: ScoringModel = models.maker.side(reader, reader.key)
        return scorer

    def _over(self, base: ScoringModel, side: str, models: LiveModels) -> ScoringModel:
        """The base with the adapter of a side, or by itself."""
        if self.pair.sides[side].adapter is None:
            return base
        world, maker = models.world, models.maker
        state = world.together(lambda: self.pair.read_adapter(side, maker.on_meta()) if world.is_main else {})
        return base.with_adapter(state, world)

    def scorers(self, models: LiveModels) -> tuple[ScoringModel, ScoringModel]:
        """Both sides of the pair."""
        if self._scorers is None:
            self.open(models)
        assert self._scorers is not None  # opened above
        return self._scorers


class OnlinePair(ContrastiveEstimator):
    """log pi+ - log pi- from a pair of adapters, for a training whose policy has adapters too. It needs no store.

    Every batch is scored with both adapters of the pair, which take the place of the policy's own for two forward passes. No
    second model is in memory. The policy's base must be the pair's, and its adapters must have the rank, alpha and layers of the
    pair's.

    Args:
        pair: the folder of a pair that ``recipes/contrastive_reference_distributed`` built of a model with adapters.

    Raises:
        DataError: if the pair is missing, half built or damaged.
        ConfigError: if its sides are no adapters.
    """

    def __init__(self, pair: str) -> None:
        super().__init__(pair)
        if any(side.adapter is None for side in self.pair.sides.values()):
            others = (
                "or set token_weights to tokenpref.training.OnlinePrompts with the pair's prompts"
                if self.pair.method == "prompt"
                else "or build the pair of a lora_ model"
            )
            raise ConfigError(
                f"pair: {self.pair.folder}: its sides are no adapters, which alone can be scored inside the policy. {_STORE}, "
                f"{others}"
            )

    def check_models(self, maker: ModelMaker, tokenizer: Tokenizer) -> None:
        """See :meth:`ContrastiveEstimator.check_models`.

        Raises:
            ConfigError: also if the policy has no adapters.
        """

        def check() -> None:
            if maker.adapters is None:
                raise ConfigError(
                    "token_weights: OnlinePair scores with the pair's adapters in the place of the policy's own, and "
                    f"{maker.model.key} ({maker.model.path}) makes a model without adapters. {_STORE}, or train with the pair's "
                    "lora_ model"
                )

        maker.world.together(check)
        super().check_models(maker, tokenizer)

    def _opens_base(self) -> bool:
        """The policy has the base."""
        return False

    def _base(self, models: LiveModels, side: str) -> ScoringModel:
        """The policy itself, in a training."""
        return models.policy if models.trained else super()._base(models, side)
