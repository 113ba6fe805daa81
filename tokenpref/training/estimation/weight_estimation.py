"""Scoring a data set's answer tokens and writing a weight store, as ``recipes/estimate_weights_distributed`` runs it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from tokenpref import __version__
from tokenpref.data import (
    Answer,
    PairBatch,
    PreferenceDataset,
    StoredRow,
    StoreWriter,
    Tokenizer,
    adapt_tokenizer,
    padded,
    provenance,
)
from tokenpref.distributed import init_world
from tokenpref.errors import ConfigError, DryRun
from tokenpref.models.reference import FrozenReference, NoReference
from tokenpref.stats import SIDES
from tokenpref.training.config.fields import read_config
from tokenpref.training.credit.live import LiveModels
from tokenpref.training.credit.sources import as_source
from tokenpref.training.estimation.estimators import EstimateConfig
from tokenpref.training.loading.models import ModelMaker, weights_digest
from tokenpref.training.loading.preflight import check_scored
from tokenpref.training.step.batches import check_pairs

__all__ = ["WeightEstimation"]

log = logging.getLogger("tokenpref")

STORE = "weights"


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
        self._lengths, self._row_numbers = self.dataset.lengths().tolist(), self.dataset.rows().tolist()
        self.source = world.together(lambda: as_source(config.estimator))
        self._whole_pairs: bool = getattr(self.source, "whole_pairs", True)
        self.maker = self._maker() if getattr(self.source, "runs_model", True) else None
        if config.adapter_checkpoint is not None and (self.maker is None or hasattr(self.source, "open")):
            raise ConfigError(
                f"adapter_checkpoint: estimator ({config.estimator.path}) does not use it, because it opens models of its own or "
                "none; set adapter_checkpoint=null"
            )
        path = Path(config.output_dir).absolute() / STORE
        shards = -(-len(self.dataset) // config.shard_rows)
        job = {
            **provenance(self.dataset),
            "estimator": self._described(),
            "dtype": config.dtype,
            "batch_tokens": config.batch_tokens,
            "shard_rows": config.shard_rows,
            "tokenpref": __version__,
        }
        if self.maker is not None:
            if hasattr(self.source, "check_models"):
                self.source.check_models(self.maker, tokenizer)
            data = (self.dataset, config.dataset)
            check_scored(self.maker, {"checkpointer": self.maker.base}, tokenizer, data=data)
        if config.dry_run:
            raise DryRun(f"dry run: nothing stands against this estimation, nothing was written to {path}")
        begun = world.broadcast_object(world.is_main and StoreWriter.is_begun(path))
        if not begun:
            # The models come before the folder: a pair that does not fit leaves nothing behind.
            self._open(tokenizer)

        def look() -> tuple[StoreWriter | None, list[int]]:
            if not world.is_main:
                return None, []
            writer = StoreWriter(path, kind=self.source.kind, job=job, shards=shards)
            return writer, writer.missing()

        writer, found = world.together(look)
        missing: list[int] = world.broadcast_object(found)
        if len(missing) < shards:
            self._say(f"{shards - len(missing)} of {shards} shards are there already")
        if begun and missing:
            # What is there comes before the models: a damaged store is named before weights are read.
            self._open(tokenizer)
        self._score(missing, writer)
        world.together(lambda: writer.finish() if writer is not None else None)
        self._say(f"weight store in {path}")
        return path

    def _maker(self) -> ModelMaker:
        """Makes the model that the source runs.

        Raises:
            ConfigError: if the config names none.
        """
        config = self.config
        for key in ("model", "checkpointer"):
            if getattr(config, key) is None:
                raise ConfigError(
                    f"{key}: missing; estimator ({config.estimator.path}) runs the model that {key} names. Set model and "
                    "checkpointer; for a contrastive pair these are the base model's"
                )
        return ModelMaker(
            config,
            self.world,
            model=config.model,
            checkpointer=config.checkpointer,
            adapter=config.adapter_checkpoint,
        )

    def _described(self) -> dict[str, Any]:
        """What decides the scores beside the data, as plain data."""
        source, maker = self.source, self.maker
        if maker is not None and hasattr(source, "describe"):
            described: dict[str, Any] = source.describe(maker)
            return described
        settings = source.settings() if hasattr(source, "settings") else self.config.estimator.plain()
        if maker is None:
            return dict(settings)
        described = {**settings, "model": maker.model.plain(), "weights": weights_digest(maker.base)}
        adapter = self.world.broadcast_object(self.world.together(maker.adapter_digest))
        return described if adapter is None else {**described, "adapter": adapter}

    def _open(self, tokenizer: Tokenizer) -> None:
        """Give the source its data and its models."""
        source, maker, world = self.source, self.maker, self.world
        if hasattr(source, "bind"):
            world.together(lambda: source.bind(self.dataset))
        opens = hasattr(source, "open")
        policy: Any = None if maker is None or opens else maker.policy()
        self._models = LiveModels(
            policy=policy,
            reference=NoReference() if policy is None else FrozenReference(policy),
            world=world,
            pad_id=tokenizer.pad_id,
            eos_id=tokenizer.eos_id,
            step=0,
            maker=maker,
            trained=False,
        )
        if opens:
            source.open(self._models)

    def _scores(self, answers: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Scores of answers, given as (position, side). Without any the same forwards run, because other ranks may have some."""
        found: list[Tensor] = self.source.score(self._batch(answers), self._models)
        return found if answers else []

    def _batch(self, answers: Sequence[tuple[int, int]]) -> PairBatch:
        """Answers as a batch: of pairs if the source asks for whole ones, and otherwise of answers by themselves."""
        pad_id, device = self._models.pad_id, self.world.device
        given: list[Answer] = []
        for index, side in answers:
            example = self.dataset[index]
            given.append(
                (example.rejected_ids, example.rejected_start)
                if side
                else (example.chosen_ids, example.chosen_start)
            )
        rows = [self._row_numbers[index] for index, _ in answers]
        row_sides = tuple(SIDES[side] for _, side in answers)
        if not answers:
            given, rows, row_sides = [([pad_id] * 2, 2)] * 2, [-1, -1], SIDES
        if self._whole_pairs:
            rows, row_sides = rows[: len(rows) // 2], ()
        tokens, labels = padded(given, pad_id)
        return PairBatch(
            tokens=tokens.to(device),
            labels=labels.to(device),
            real=torch.tensor([row >= 0 for row in rows], device=device),
            rows=rows,
            num_pairs=len(rows),
            num_tokens=sum(len(ids) for ids, _ in given),
            sides=SIDES if self._whole_pairs else ("chosen or rejected",),
            row_sides=row_sides,
        )

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
                for answer, scores in zip(mine, self._scores(mine), strict=True):
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
        sides = ((0, 1),) if self._whole_pairs else ((0,), (1,))
        groups = [[(i, side) for side in some] for i in self._rows(shard) for some in sides]
        lengths = [max(self._tokens(answer) for answer in group) for group in groups]
        batches: list[list[tuple[int, int]]] = []
        width = 0
        for place in sorted(range(len(groups)), key=lambda p: (-lengths[p], groups[p])):
            if not batches or (len(batches[-1]) + len(groups[place])) * width > self.config.batch_tokens:
                batches.append([])
                width = lengths[place]
            batches[-1] += groups[place]
        return [sorted(batch, key=lambda a: a[1]) for batch in batches] if self._whole_pairs else batches

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
