"""The sources that a recipe attaches to a training: token weights, and anchors (third answers).

    trainer = PreferenceTrainer(cfg, recipe="recipes/ti_dpo_distributed", sources=(token_weights, anchors))

A :class:`Source` says which statistic it provides, which config keys it reads, and how it makes a function of micro-batches
from a data set. It is loaded only if the loss needs its statistic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tokenpref.data import (
    AnchorBatch,
    ColumnAnchors,
    PairBatch,
    PreferenceDataset,
    Tokenizer,
    collate_anchors,
)
from tokenpref.errors import ConfigError
from tokenpref.models.token_ids import check_answer_ids
from tokenpref.stats import SIDES
from tokenpref.training.config.fields import Component
from tokenpref.training.config.keys import TrainConfig, TripletConfig, WeightedConfig
from tokenpref.training.credit.live import AnchorSource, LiveModels, Refresh, RefreshedScores
from tokenpref.training.credit.weighing import KnownScores, TokenWeights, Weighing, in_columns
from tokenpref.training.step.metrics import Stopwatch
from tokenpref.training.step.pair_loss import BatchAnchors, BatchWeights
from tokenpref.weights import SCORE_KINDS, TransformedWeights

__all__ = ["Source", "SourceContext", "anchors", "as_source", "schema_with", "token_weights"]


@dataclass(frozen=True, kw_only=True)
class SourceContext:
    """The parts of a run that a source may use.

    Args:
        config: the run's config.
        tokenizer: the run's tokenizer.
        stopwatch: measures the time of a source in a step.
        vocabulary: returns the number of token ids that the model embeds.
        live: returns the current models. It works only after the run is set up, so not while a source is loaded.
        keep: registers a name and an object whose results by row are saved with the run.
        say: logs a line.
    """

    config: Any
    tokenizer: Tokenizer
    stopwatch: Stopwatch
    vocabulary: Callable[[], int]
    live: Callable[[], LiveModels]
    keep: Callable[[str, Any], None]
    say: Callable[[str], None]


def _no_faults(_config: TrainConfig) -> list[str]:
    return []


@dataclass(frozen=True, kw_only=True)
class Source:
    """A statistic that a recipe provides to a loss in addition to those of policy and reference.

    Args:
        statistic: "weights" or "anchor", as ``loss.needs`` names it.
        schema: the config with the keys that the source reads.
        load: makes a function of micro-batches from the run and a data set: :data:`BatchWeights` for "weights",
            :data:`BatchAnchors` for "anchor". It is called before any model is built, on every process.
        faults: returns the faults of a config, one line each.
    """

    statistic: str
    schema: type[TrainConfig]
    load: Callable[[SourceContext, PreferenceDataset], Any]
    faults: Callable[[TrainConfig], list[str]] = _no_faults


def schema_with(schema: type[TrainConfig], sources: Sequence[Source]) -> type[TrainConfig]:
    """The config class with the keys of a trainer's ``schema`` and of all its sources.

    Raises:
        TypeError: if none of these configs derives from all the others.
    """
    schemas = [schema, *(source.schema for source in sources)]
    widest = max(schemas, key=lambda one: len(one.__mro__))
    if not all(issubclass(widest, one) for one in schemas):
        names = ", ".join(one.__name__ for one in schemas)
        raise TypeError(f"one of the configs {names} has to derive from all the others")
    return widest


def as_source(named: Component) -> Any:
    """Build the source of scores that a config names. This is the only place that tells its forms apart.

    Args:
        named: a component with ``kind`` and either ``score(batch, models)`` or ``load(dataset)``.

    Returns:
        The source; see :class:`tokenpref.training.credit.live.TokenScores`.

    Raises:
        ConfigError: if it has neither.
    """
    source = named.build()
    kind = getattr(source, "kind", None)
    if kind not in SCORE_KINDS:
        raise ConfigError(
            f"{named.key} ({named.path}): its kind is {kind!r}; a source of scores says one of {', '.join(SCORE_KINDS)}"
        )
    if hasattr(source, "setup"):
        raise ConfigError(
            f"{named.key} ({named.path}): has the form that estimators had before, with setup(config, dataset, tokenizer, world) "
            "and score(answers). Give it score(batch, models) instead, which finds the tokens in the batch and the model in "
            "models.policy; bind(dataset) receives the data set, and settings() takes the place of describe(config)"
        )
    if hasattr(source, "load") and not hasattr(source, "bind"):
        return KnownScores(source)
    if hasattr(source, "score"):
        return source
    raise ConfigError(
        f"{named.key} ({named.path}): has neither a method score(batch, models) nor load(dataset); name a source of scores such "
        "as tokenpref.data.StoredScores, tokenpref.data.ColumnScores, tokenpref.training.OnlinePrompts or "
        "tokenpref.training.Attribution"
    )


def _load_weights(context: SourceContext, dataset: PreferenceDataset) -> BatchWeights:
    """Load the weights of all rows, or a function that scores each batch.

    Raises:
        TokenprefError: if the scores do not belong to the data, or the transform does not fit them.
    """
    config: WeightedConfig = context.config
    source = as_source(config.token_weights)
    weighing = Weighing(
        source.kind,
        config.weight_transform,
        config.normalize_weights,
        config.eos_weight,
        config.use_eos_score,
    )
    if config.reference == "cached" and getattr(source, "asks_reference", False):
        raise ConfigError(
            f"reference: cached keeps the reference's answers alone, and token_weights ({config.token_weights.path}) looks "
            "at the model; set reference=model"
        )
    if hasattr(source, "bind"):
        source.bind(dataset)
    if isinstance(source, KnownScores):
        weights = TokenWeights(dataset, source, weighing)
        context.say(weights.summary)
        return weights
    timed_as = getattr(source, "timed_as", "weights")
    scores = RefreshedScores(source) if isinstance(getattr(source, "refresh", None), Refresh) else source
    context.keep("weights", scores)
    ends = {
        side: dict(zip(dataset.rows().tolist(), dataset.has_eos()[:, number].tolist(), strict=True))
        for number, side in enumerate(SIDES)
    }

    def weigh(batch: PairBatch) -> TransformedWeights:
        with context.stopwatch.time(timed_as):
            vectors = [vector.cpu() for vector in scores.score(batch, context.live())]
        count = len(batch.rows)
        answers = []
        for number, side in enumerate(batch.sides):
            answers += weighing(
                vectors[number * count : (number + 1) * count],
                side=side,
                keys=batch.rows,
                ends=[ends[side].get(row, False) for row in batch.rows],
            )
        return in_columns(answers, batch)

    return weigh


def _anchors_missing(config: TrainConfig) -> list[str]:
    if getattr(config, "anchors", None) is not None:
        return []
    return [
        f"anchors: missing; {loss.key} ({loss.path}) compares with a third answer. Set anchors to "
        "tokenpref.training.AnchorSampler or tokenpref.data.ColumnAnchors, or switch its triplet off (gamma 0)"
        for loss in (config.loss, config.loss_val)
        if loss is not None and "anchor" in loss.build().needs
    ]


def _load_anchors(context: SourceContext, dataset: PreferenceDataset) -> BatchAnchors:
    """Load anchors from the data, or a function that samples them during training.

    Raises:
        TokenprefError: if the data has none where the config says so.
    """
    component = context.config.anchors
    assert component is not None  # _anchors_missing asked for it
    source: AnchorSource = component.build()
    missing = [name for name in ("bind", "answers") if not hasattr(source, name)]
    if missing:
        raise ConfigError(
            f"anchors ({component.path}): has no method {' and no '.join(missing)}; name a source of anchors such as "
            "tokenpref.training.AnchorSampler or tokenpref.data.ColumnAnchors"
        )
    source.bind(dataset)
    context.keep("anchors", source)
    ids = context.vocabulary()
    if isinstance(source, ColumnAnchors):  # they are there already, others are made as the training goes
        found = source.answers(dataset.rows().tolist(), None)
        check_answer_ids(found, ids, key=f"anchors (column {source.column!r})")

    def anchor(batch: PairBatch) -> AnchorBatch:
        with context.stopwatch.time("anchors"):
            answers = source.answers(batch.rows, context.live())
            check_answer_ids(answers, ids, key=f"anchors ({component.path})")
            return collate_anchors(answers, batch, context.tokenizer.pad_id)

    return anchor


token_weights = Source(statistic="weights", schema=WeightedConfig, load=_load_weights)
"""Weights from the config's ``token_weights``: stored, from columns of the data, or computed during training.

A user's component needs ``kind`` and either ``score(batch, models)``, as :class:`tokenpref.training.credit.live.TokenScores`
says, or ``load(dataset)``, as :class:`tokenpref.data.ScoreSource` says.
"""

anchors = Source(statistic="anchor", schema=TripletConfig, load=_load_anchors, faults=_anchors_missing)
"""Third answers from the config's ``anchors``.

A user's source needs ``bind(dataset)`` and ``answers(rows, models)``, as
:class:`tokenpref.training.credit.live.AnchorSource` says.
"""
