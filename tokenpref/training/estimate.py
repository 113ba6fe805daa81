"""Scoring a data set's answer tokens and writing a weight store, as ``recipes/estimate_weights_distributed`` runs it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from tokenpref import __version__
from tokenpref._paths import resolve_path
from tokenpref.data import PreferenceDataset, Tokenizer, adapt_tokenizer, padded, provenance
from tokenpref.distributed import World, init_world
from tokenpref.errors import ConfigError, DataError, DryRun
from tokenpref.models.scoring import ScoringModel
from tokenpref.training.config.faults import checkpoint_faults
from tokenpref.training.config.fields import Component, component, integer, read_config
from tokenpref.training.config.keys import ScoringConfig
from tokenpref.training.config.sanity import component_faults, own_component_faults
from tokenpref.training.online import check_context, prompted_answers
from tokenpref.training.pair import ContrastivePair, PairSide, check_weights, read_pair, weights_digest
from tokenpref.training.preflight import check_scored
from tokenpref.training.setup import build_scorer, read_weights
from tokenpref.training.step.batches import check_pairs
from tokenpref.weights import StoredRow, StoreWriter, contrastive_log_ratios

__all__ = ["ContrastiveEstimator", "EstimateConfig", "Estimator", "WeightEstimation"]

log = logging.getLogger("tokenpref")

STORE = "weights"
SIDES = ("chosen", "rejected")


@dataclass(frozen=True, kw_only=True)
class EstimateConfig(ScoringConfig):
    """What is scored, with what, and in which portions."""

    dataset: Component = component(positional=1, mixed=True)
    estimator: Component = component()
    model: Component | None = component(optional=True)
    """For an estimator that runs one model, such as attribution; a contrastive pair brings its own."""
    checkpointer: Component | None = component(optional=True)
    """Reads that model's weights."""
    batch_tokens: int = integer(4096)
    """Tokens of a batch, padding included; a longer sequence is a batch of its own."""
    shard_rows: int = integer(256)
    """Pairs of a shard: what an interrupted run loses at most."""

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

    Args:
        pair: the pair's folder.
        trusted_components: dotted paths of models and checkpointers of your own that the pair may call; those of torchtune and
            of this package need no mention.

    Raises:
        DataError: if the pair is missing, half built or damaged, or names something to call that is not trusted.
    """

    kind = "log_ratio"

    def __init__(self, pair: str, trusted_components: Sequence[str] = ()) -> None:
        if isinstance(trusted_components, str):
            raise ConfigError(
                f"trusted_components: expected a list of dotted paths, found {trusted_components!r}"
            )
        self.pair: ContrastivePair = read_pair(resolve_path(pair), trusted_components)

    def describe(self, config: EstimateConfig) -> dict[str, Any]:
        """See :class:`Estimator`."""
        sides = {"positive": self.pair.positive, "negative": self.pair.negative}
        return {
            "name": "contrastive",
            "method": self.pair.method,
            "model": self.pair.record["model"],
            **{
                name: {"weights": weights_digest(side.checkpointer), "prompt": side.prompt}
                for name, side in sides.items()
            },
        }

    def check(
        self, config: EstimateConfig, dataset: PreferenceDataset, tokenizer: Tokenizer, world: World
    ) -> None:
        """See :class:`Estimator`.

        Raises:
            DataError: if the tokenizer is not the pair's.
            ConfigError: if a side's config.json describes another model, or a sequence or token id does not fit it.
        """
        if tokenizer.fingerprint() != self.pair.tokenizer:
            raise DataError(
                f"{self.pair.folder}: the pair was built with another tokenizer ({self.pair.tokenizer[:12]}, here "
                f"{tokenizer.fingerprint()[:12]}); set tokenizer to the pair's"
            )
        sides = {"positive": self.pair.positive, "negative": self.pair.negative}
        check_scored(
            self.pair.model,
            config.dtype,
            {f"pair's {name} side": side.checkpointer for name, side in sides.items()},
            tokenizer,
            world,
            data=(dataset, config.dataset),
        )

    def setup(
        self, config: EstimateConfig, dataset: PreferenceDataset, tokenizer: Tokenizer, world: World
    ) -> None:
        """See :class:`Estimator`.

        Raises:
            ConfigError: if a side's weights do not fit the model.
        """
        if world.is_main:
            model, reader = self.pair.model.path, self.pair.positive.checkpointer.path
            log.info(f"components of {self.pair.folder}: model={model}, checkpointer={reader}")
        self._dataset, self._pad_id, self._device = dataset, tokenizer.pad_id, world.device
        # Both sides before a weight of either is read.
        world.together(lambda: check_weights(self.pair) if world.is_main else None)
        self._positive = self._scorer(config, self.pair.positive, "positive", world)
        self._negative = (
            self._positive
            if self.pair.shares_weights
            else self._scorer(config, self.pair.negative, "negative", world)
        )

    def _scorer(self, config: EstimateConfig, side: PairSide, name: str, world: World) -> ScoringModel:
        key = f"pair's {name} side"
        state = read_weights(side.checkpointer.build(), key, world)
        return build_scorer(config, state, world, model=self.pair.model, key=key)

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


class WeightEstimation:
    """One pass over a data set: batches by length, spread over the ranks, shards written as they finish.

    Which answers share a batch depends on the data alone, so any number of ranks writes the same store. Writes
    ``output_dir/weights``; started again with the same config it goes on after the last whole shard.

    Args:
        cfg: merged config, as :func:`tokenpref.training.recipe_main` delivers it.

    Raises:
        ConfigError: with every fault of the config.
    """

    recipe: ClassVar[str] = "recipes/estimate_weights_distributed"

    def __init__(self, cfg: DictConfig) -> None:
        self.config = read_config(EstimateConfig, cfg)

    def run(self) -> Path:
        """Score what is missing.

        Returns:
            The store's folder.
        """
        config = self.config
        torch.manual_seed(config.seed)
        self.world = world = init_world(config.device)
        tokenizer = adapt_tokenizer(config.tokenizer.build())
        self.dataset: PreferenceDataset = world.together(lambda: config.dataset.build(tokenizer))
        check_pairs(self.dataset, config.dataset)
        self._say(f"dataset: {self.dataset.report.summary()}")
        self._lengths = self.dataset.lengths().tolist()
        self.estimator: Estimator = world.together(config.estimator.build)
        lacking = [
            name for name in ("kind", "describe", "setup", "score") if not hasattr(self.estimator, name)
        ]
        if lacking:
            raise ConfigError(
                f"estimator ({config.estimator.path}): has no {' and no '.join(lacking)}; name an estimator such as "
                "tokenpref.training.ContrastiveEstimator"
            )
        path = Path(config.output_dir).absolute() / STORE
        shards = -(-len(self.dataset) // config.shard_rows)
        job = {
            **provenance(self.dataset),
            "estimator": self.estimator.describe(config),
            "dtype": config.dtype,
            "batch_tokens": config.batch_tokens,
            "shard_rows": config.shard_rows,
            "tokenpref": __version__,
        }
        if hasattr(self.estimator, "check"):
            self.estimator.check(config, self.dataset, tokenizer, world)
        if config.dry_run:
            raise DryRun(f"dry run: nothing stands against this estimation, nothing was written to {path}")
        begun = world.broadcast_object(world.is_main and StoreWriter.is_begun(path))
        if not begun:
            # The models come before the folder: a pair that does not fit leaves nothing behind.
            self.estimator.setup(config, self.dataset, tokenizer, world)

        def look() -> tuple[StoreWriter | None, list[int]]:
            if not world.is_main:
                return None, []
            writer = StoreWriter(path, kind=self.estimator.kind, job=job, shards=shards)
            return writer, writer.missing()

        writer, found = world.together(look)
        missing: list[int] = world.broadcast_object(found)
        if len(missing) < shards:
            self._say(f"{shards - len(missing)} of {shards} shards are there already")
        if begun and missing:
            # What is there comes before the models: a damaged store is named before weights are read.
            self.estimator.setup(config, self.dataset, tokenizer, world)
        self._score(missing, writer)
        world.together(lambda: writer.finish() if writer is not None else None)
        self._say(f"weight store in {path}")
        return path

    def _score(self, shards: Sequence[int], writer: StoreWriter | None) -> None:
        world = self.world
        plan = {shard: self._batches(shard) for shard in shards}
        total = sum(
            self._tokens(answer) for batches in plan.values() for batch in batches for answer in batch
        )
        bar = tqdm(total=total, disable=not world.is_main, unit="tok", unit_scale=True, desc="scoring")
        for shard, batches in plan.items():
            found: dict[tuple[int, int], np.ndarray] = {}
            for start in range(0, len(batches), world.size):
                mine = batches[start + world.rank] if start + world.rank < len(batches) else []
                for answer, scores in zip(mine, self.estimator.score(mine), strict=True):
                    found[answer] = scores.float().cpu().numpy()
                bar.update(
                    sum(self._tokens(a) for batch in batches[start : start + world.size] for a in batch)
                )
            parts = world.gather_objects(found)
            whole = {answer: scores for part in parts for answer, scores in part.items()}
            world.together(partial(self._write, writer, shard, whole))
        bar.close()

    def _write(
        self, writer: StoreWriter | None, shard: int, scores: dict[tuple[int, int], np.ndarray]
    ) -> None:
        if writer is not None:
            writer.write(shard, [self._row(index, scores) for index in self._rows(shard)])

    def _rows(self, shard: int) -> range:
        size = self.config.shard_rows
        return range(shard * size, min((shard + 1) * size, len(self.dataset)))

    def _tokens(self, answer: tuple[int, int]) -> int:
        return self._lengths[answer[0]][answer[1]]

    def _batches(self, shard: int) -> list[list[tuple[int, int]]]:
        """The shard's answers, longest first, cut into batches of ``batch_tokens`` with their padding."""
        whole_pairs = bool(getattr(self.estimator, "whole_pairs", False))
        sides = ((0, 1),) if whole_pairs else ((0,), (1,))
        groups = [[(i, side) for side in some] for i in self._rows(shard) for some in sides]
        lengths = [max(self._tokens(answer) for answer in group) for group in groups]
        batches: list[list[tuple[int, int]]] = []
        width = 0
        for place in sorted(range(len(groups)), key=lambda p: (-lengths[p], groups[p])):
            if not batches or (len(batches[-1]) + len(groups[place])) * width > self.config.batch_tokens:
                batches.append([])
                width = lengths[place]
            batches[-1] += groups[place]
        return [sorted(batch, key=lambda a: a[1]) for batch in batches] if whole_pairs else batches

    def _row(self, index: int, scores: dict[tuple[int, int], np.ndarray]) -> StoredRow:
        example, texts = self.dataset[index], self.dataset.text(index)
        return StoredRow(
            row=example.row,
            key=example.key,
            prompt=texts.prompt,
            chosen_text=texts.chosen,
            rejected_text=texts.rejected,
            chosen=scores[index, 0],
            rejected=scores[index, 1],
            chosen_spans=example.chosen_offsets,
            rejected_spans=example.rejected_offsets,
        )

    def _say(self, message: str) -> None:
        if self.world.is_main:
            log.info(message)

    def close(self) -> None:
        """Leave the process group."""
        if hasattr(self, "world"):
            self.world.close()
