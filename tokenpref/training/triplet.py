"""Training with token weights and anchors: TI-DPO, and any other loss that takes a third answer."""

from __future__ import annotations

from typing import ClassVar

from tokenpref.data import AnchorBatch, ColumnAnchors, PairBatch, PreferenceDataset, collate_anchors
from tokenpref.errors import ConfigError
from tokenpref.models.token_ids import check_answer_ids
from tokenpref.training.config.keys import TrainConfig, TripletConfig
from tokenpref.training.credit.live import AnchorSource
from tokenpref.training.step.pair_loss import BatchAnchors
from tokenpref.training.weighted import WeightedTrainer

__all__ = ["TripletTrainer"]


class TripletTrainer(WeightedTrainer):
    """The trainer with weights from ``token_weights`` and third answers from ``anchors``.

    A source of anchors of the user's own needs ``bind(dataset)`` and ``answers(rows, models)``, as
    :class:`tokenpref.training.credit.live.AnchorSource` says.
    """

    recipe: ClassVar[str] = "recipes/ti_dpo_distributed"
    schema: ClassVar[type[TripletConfig]] = TripletConfig
    provides: ClassVar[frozenset[str]] = WeightedTrainer.provides | {"anchor"}
    config: TripletConfig

    def _loss_faults(self, config: TrainConfig) -> list[str]:
        faults = super()._loss_faults(config)
        if faults or getattr(config, "anchors", None) is not None:
            return faults
        return [
            f"anchors: missing; {loss.key} ({loss.path}) compares with a third answer. Set anchors to "
            "tokenpref.training.AnchorSampler or tokenpref.data.ColumnAnchors, or switch its triplet off (gamma 0)"
            for loss in (config.loss, config.loss_val)
            if loss is not None and "anchor" in loss.build().needs
        ]

    def load_anchors(self, dataset: PreferenceDataset) -> BatchAnchors:
        """Anchors from the data, or sampled as the training goes.

        Raises:
            TokenprefError: if the data has none where the config says so.
        """
        component = self.config.anchors
        assert component is not None  # _loss_faults asked for it
        source: AnchorSource = component.build()
        missing = [name for name in ("bind", "answers") if not hasattr(source, name)]
        if missing:
            raise ConfigError(
                f"anchors ({component.path}): has no method {' and no '.join(missing)}; name a source of anchors such as "
                "tokenpref.training.AnchorSampler or tokenpref.data.ColumnAnchors"
            )
        source.bind(dataset)
        self.keep(dataset, "anchors", source)
        rows = self.maker.vocabulary
        if isinstance(source, ColumnAnchors):  # they are there already, others are made as the training goes
            found = source.answers(dataset.rows().tolist(), None)
            check_answer_ids(found, rows, key=f"anchors (column {source.column!r})")

        def anchors(batch: PairBatch) -> AnchorBatch:
            with self.stopwatch.time("anchors"):
                answers = source.answers(batch.rows, self.live())
                check_answer_ids(answers, rows, key=f"anchors ({component.path})")
                return collate_anchors(answers, batch, self.tokenizer.pad_id)

        return anchors
