"""Training with token weights: TIS-DPO, and any other loss that takes weights."""

from __future__ import annotations

from typing import ClassVar

from tokenpref.data import PairBatch, PreferenceDataset
from tokenpref.errors import ConfigError
from tokenpref.models.reference import FrozenReference
from tokenpref.training.config import WeightedConfig
from tokenpref.training.online import OnlinePrompts
from tokenpref.training.step import BatchWeights
from tokenpref.training.token_weights import TokenWeights, Weighing, in_columns
from tokenpref.training.trainer import PreferenceTrainer
from tokenpref.weights import SCORE_KINDS, TransformedWeights

__all__ = ["WeightedTrainer"]


class WeightedTrainer(PreferenceTrainer):
    """The trainer with weights from the config's ``token_weights``: a store, the data's columns, or a prompt pair online.

    A component of the user's own needs ``kind`` and ``load(dataset)``, as :class:`tokenpref.data.ScoreSource` says.
    """

    recipe: ClassVar[str] = "recipes/tis_dpo_distributed"
    schema: ClassVar[type[WeightedConfig]] = WeightedConfig
    provides: ClassVar[frozenset[str]] = PreferenceTrainer.provides | {"weights"}
    config: WeightedConfig

    def load_weights(self, dataset: PreferenceDataset) -> BatchWeights:
        """Weights of all rows at once, or a function that scores each batch.

        Raises:
            TokenprefError: if the scores do not belong to the data, or the transform does not fit them.
        """
        config = self.config
        source = config.token_weights.build()
        kind = getattr(source, "kind", None)
        if kind not in SCORE_KINDS:
            raise ConfigError(
                f"token_weights ({config.token_weights.path}): its kind is {kind!r}; a source of scores says one of "
                f"{', '.join(SCORE_KINDS)}"
            )
        weighing = Weighing(
            kind, config.weight_transform, config.normalize_weights, config.eos_weight, config.use_eos_score
        )
        if isinstance(source, OnlinePrompts):
            source.bind(dataset)
            return lambda batch: self._score_online(source, weighing, batch)
        if not hasattr(source, "load"):
            raise ConfigError(
                f"token_weights ({config.token_weights.path}): has no method load(dataset); name a source of scores such as "
                "tokenpref.data.StoredScores, tokenpref.data.ColumnScores or tokenpref.training.OnlinePrompts"
            )
        weights = TokenWeights(dataset, source, weighing)
        self._say(weights.summary)
        return weights

    def _score_online(
        self, source: OnlinePrompts, weighing: Weighing, batch: PairBatch
    ) -> TransformedWeights:
        reference = self.reference
        assert isinstance(reference, FrozenReference)  # a loss with weights needs "ref"
        ratios = [r.cpu() for r in source.score(reference.scorer, batch, self.tokenizer.pad_id)]
        half = len(batch.rows)
        answers = []
        for side, part in (("chosen", ratios[:half]), ("rejected", ratios[half:])):
            answers += weighing(part, side=side, keys=batch.rows, ends=source.ends(side, batch.rows))
        return in_columns(answers, batch)
