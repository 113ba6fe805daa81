"""Training with token weights: TIS-DPO, and any other loss that takes weights."""

from __future__ import annotations

from typing import ClassVar

from tokenpref.data import PairBatch, PreferenceDataset
from tokenpref.errors import ConfigError
from tokenpref.stats import SIDES
from tokenpref.training.config.keys import WeightedConfig
from tokenpref.training.credit.live import LiveScores
from tokenpref.training.credit.weighing import TokenWeights, Weighing, in_columns
from tokenpref.training.step.pair_loss import BatchWeights
from tokenpref.training.trainer import PreferenceTrainer
from tokenpref.weights import SCORE_KINDS, TransformedWeights

__all__ = ["WeightedTrainer"]


class WeightedTrainer(PreferenceTrainer):
    """The trainer with weights from the config's ``token_weights``: stored, from the data's columns, or made as it goes.

    A component of the user's own needs ``kind`` and either ``load(dataset)``, as :class:`tokenpref.data.ScoreSource` says,
    or ``bind(dataset)`` and ``score(batch, models)``, as :class:`tokenpref.training.credit.live.LiveScores` says.
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
        if config.reference == "cached" and getattr(source, "asks_reference", False):
            raise ConfigError(
                f"reference: cached keeps the reference's answers alone, and token_weights ({config.token_weights.path}) looks "
                "at the model; set reference=model"
            )
        if hasattr(source, "score") and hasattr(source, "bind"):
            source.bind(dataset)
            self.keep(dataset, "weights", source)
            ends = {
                side: dict(zip(dataset.rows().tolist(), dataset.has_eos()[:, number].tolist(), strict=True))
                for number, side in enumerate(SIDES)
            }
            return lambda batch: self._score_live(source, weighing, ends, batch)
        if not hasattr(source, "load"):
            raise ConfigError(
                f"token_weights ({config.token_weights.path}): has neither a method load(dataset) nor bind(dataset) and "
                "score(batch, models); name a source of scores such as tokenpref.data.StoredScores, "
                "tokenpref.data.ColumnScores, tokenpref.training.OnlinePrompts or tokenpref.training.Attribution"
            )
        weights = TokenWeights(dataset, source, weighing)
        self._say(weights.summary)
        return weights

    def _score_live(
        self, source: LiveScores, weighing: Weighing, ends: dict[str, dict[int, bool]], batch: PairBatch
    ) -> TransformedWeights:
        with self.stopwatch.time(getattr(source, "timed_as", "weights")):
            scores = [vector.cpu() for vector in source.score(batch, self.live())]
        count = len(batch.rows)
        answers = []
        for number, side in enumerate(batch.sides):
            answers += weighing(
                scores[number * count : (number + 1) * count],
                side=side,
                keys=batch.rows,
                ends=[ends[side].get(row, False) for row in batch.rows],
            )
        return in_columns(answers, batch)
