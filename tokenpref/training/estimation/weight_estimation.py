"""Scoring a data set's answer tokens and writing a weight store, as ``recipes/estimate_weights_distributed`` runs it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from omegaconf import DictConfig
from tqdm import tqdm

from tokenpref import __version__
from tokenpref.data import PreferenceDataset, StoredRow, StoreWriter, adapt_tokenizer, provenance
from tokenpref.distributed import init_world
from tokenpref.errors import ConfigError, DryRun
from tokenpref.training.config.fields import read_config
from tokenpref.training.estimation.estimators import EstimateConfig, Estimator
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
