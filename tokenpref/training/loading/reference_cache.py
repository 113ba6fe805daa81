"""Caches of the reference: every answer of a data set is scored once before training, by any number of processes.

A :class:`ReferenceCache` belongs to one data set. :func:`cached_references` opens several, after building missing parts
with one model, which is freed before it returns.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from tokenpref.components import COMPONENT
from tokenpref.data import IGNORE_INDEX, PairExample, PreferenceDataset, collate_pairs
from tokenpref.data.reference_store import ReferenceStore, ReferenceWriter, StoredAnswers, StoreLayout
from tokenpref.distributed import World, unsharded
from tokenpref.models.decoder_of import decoder_of
from tokenpref.models.reference import KL_STATISTICS, CachedReference
from tokenpref.models.scoring import ScoringModel
from tokenpref.training.config.keys import TrainConfig
from tokenpref.training.loading.memory import size_text
from tokenpref.training.loading.models import weights_digest

__all__ = ["ReferenceCache", "cache_folder", "cached_references", "plan_caches", "stored_kind"]

log = logging.getLogger("tokenpref")

_WORDS = {"logps": "log-probabilities", "hidden": "hidden states"}


def stored_kind(needs: frozenset[str]) -> str | None:
    """What to store of a reference for some statistics: ``logps``, or ``hidden`` for a KL, or None."""
    if needs & KL_STATISTICS:
        return "hidden"
    return "logps" if "ref" in needs else None


def cache_folder(config: TrainConfig) -> Path:
    """The folder of a run's caches; other runs may share it."""
    given = config.reference_cache_dir
    return Path(given if given is not None else f"{config.output_dir}/reference").absolute()


def plan_caches(
    config: TrainConfig, data: Mapping[str, tuple[PreferenceDataset, frozenset[str]]], world: World
) -> dict[str, ReferenceCache]:
    """The caches of a run, by the data set's key; empty without ``reference: cached``.

    Args:
        config: of the run.
        data: by their keys, data sets and the statistics needed of their batches.
        world: the run's processes.

    Raises:
        ConfigError: if another process is building one of the caches, or a file of the weights is missing.
    """
    return {
        key: ReferenceCache.plan(
            key,
            dataset,
            folder=cache_folder(config),
            kind=kind,
            job=partial(_job, config, dataset),
            world=world,
        )
        for key, (dataset, needs) in data.items()
        if config.reference == "cached" and (kind := stored_kind(needs)) is not None
    }


def _job(config: TrainConfig, dataset: PreferenceDataset) -> dict[str, Any]:
    """Everything that changes the reference's results, except what changes them by rounding only (batches, compilation)."""
    reader = config.ref_checkpointer or config.checkpointer
    folders = ("checkpoint_dir", "output_dir")
    compute = config.compute(trainable=False)
    return {
        "model": {COMPONENT: config.model.path, **config.model.kwargs},
        "reader": {COMPONENT: reader.path, **{k: v for k, v in reader.kwargs.items() if k not in folders}},
        "weights": weights_digest(reader),
        "dtype": str(compute.dtype),
        "compute_dtype": str(compute.compute_dtype),
        "float8": None if compute.float8 is None else asdict(compute.float8),
        "data": dataset.fingerprint(),
    }


@dataclass(frozen=True)
class ReferenceCache:
    """The results of a reference on one data set, complete or to be computed. Build it with :meth:`plan`.

    Args:
        key: the data set's key, for messages.
        examples: its pairs.
        layout: the files of the cache.
        complete: whether the cache is complete.
        missing: the missing shards.
    """

    key: str
    examples: Sequence[PairExample] | PreferenceDataset
    layout: StoreLayout
    complete: bool
    missing: tuple[int, ...]

    @classmethod
    def plan(
        cls,
        key: str,
        examples: Sequence[PairExample] | PreferenceDataset,
        *,
        folder: Path,
        kind: str,
        job: Callable[[], Mapping[str, Any]],
        world: World,
    ) -> ReferenceCache:
        """Look at the existing files, without writing anything.

        Args:
            key: what the data set is called in messages.
            examples: its pairs.
            folder: holds the caches of several references and data sets.
            kind: ``logps``, or ``hidden`` where a KL is needed.
            job: describes everything that would change the numbers, as plain data; called on the main process.
            world: the run's processes.

        Raises:
            ConfigError: if another process is building it.
        """
        answers = StoredAnswers.of(examples)

        # Only the main process looks, because files may appear meanwhile, and other nodes may not have the model's files.
        def look() -> tuple[Mapping[str, Any], bool, tuple[int, ...]] | None:
            if not world.is_main:
                return None
            described = job()
            layout = StoreLayout(folder, kind, described, answers)
            complete = layout.is_complete()
            if not complete:
                layout.refuse_if_locked()
            return described, complete, tuple(layout.missing())

        described, complete, missing = world.broadcast_object(world.together(look))
        return cls(key, examples, StoreLayout(folder, kind, described, answers), complete, missing)

    def nbytes(self, model: nn.Module, element: int) -> int:
        """The approximate size of the whole cache on disk.

        Args:
            model: the reference; the meta device will do.
            element: bytes of one of its numbers.
        """
        tokens = self.layout.answers.tokens
        if self.layout.kind == "logps":
            return tokens * max(element, 4)  # log-probabilities are at least float32
        return tokens * decoder_of(model).width * element + self.head_nbytes(model, element)

    def head_nbytes(self, model: nn.Module, element: int) -> int:
        """Bytes in the memory of a process: the LM head for hidden states, nothing for log-probabilities."""
        held = self.layout.kind == "hidden"
        decoder = decoder_of(model)
        return decoder.vocabulary * decoder.width * element if held else 0

    def forecast(self, model: nn.Module, element: int) -> tuple[int, str]:
        """Bytes still to be written, and a line about it for the log."""
        size, layout = self.nbytes(model, element), self.layout
        if self.complete:
            return 0, f"{self.key}: {_WORDS[layout.kind]} of the reference are in {layout.path}"
        there = layout.shards - len(self.missing)
        begun = f"; {there} of {layout.shards} shards are there already" if there else ""
        return size * len(self.missing) // layout.shards, (
            f"{self.key}: {_WORDS[layout.kind]} of the reference will be kept in {layout.path}, about {size_text(size)} for "
            f"{layout.answers.tokens:,} answer tokens, made by one forward over {layout.answers.sequence_tokens:,} tokens{begun}"
        )


def cached_references(
    caches: Sequence[ReferenceCache],
    load: Callable[[], ScoringModel],
    world: World,
    *,
    batch_size: int,
    pad_id: int,
) -> list[CachedReference]:
    """Open caches, after building what is missing of them. Every process must call it.

    A killed build continues with the next call, shard by shard, also with another number of processes.

    Args:
        caches: of a run's data sets.
        load: makes the reference. It is called if something is missing, and the model is freed before this returns.
        world: the run's processes, which share the shards.
        batch_size: pairs per process and forward.
        pad_id: padding token.

    Returns:
        A reference for each cache.

    Raises:
        ConfigError: if another process is building one of them.
        DataError: if a file is damaged; it is named.
    """
    built: dict[Path, float] = {}
    if any(not cache.complete for cache in caches):
        scorer = load()
        for cache in caches:
            # Two data sets may be the same.
            if not cache.complete and cache.layout.path not in built:
                start = time.perf_counter()
                _build(cache, scorer, world, batch_size=batch_size, pad_id=pad_id)
                built[cache.layout.path] = time.perf_counter() - start
        del scorer
        gc.collect()  # a model and its head refer to each other
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
    heads: dict[str, Tensor] = {}
    return [_opened(cache, heads, built.get(cache.layout.path), world) for cache in caches]


def _opened(
    cache: ReferenceCache, heads: dict[str, Tensor], seconds: float | None, world: World
) -> CachedReference:
    """A finished cache; stores of one model share its head."""
    layout = cache.layout
    store = world.together(lambda: ReferenceStore.open(layout, rank=world.rank, world_size=world.size))
    if layout.kind == "hidden" and store.head_digest not in heads:
        heads[store.head_digest] = world.together(lambda: store.head_weight(world.device))
    if world.is_main:
        what = f"{cache.key}: {_WORDS[layout.kind]} of the reference, {size_text(store.nbytes)} on the disk"
        if seconds is None:
            log.info(f"{what}, read from {layout.path}")
        else:
            log.info(f"{what}, made in {seconds:.1f} s, in {layout.path}")
    return CachedReference(store, heads[store.head_digest] if layout.kind == "hidden" else None)


def _build(
    cache: ReferenceCache, scorer: ScoringModel, world: World, *, batch_size: int, pad_id: int
) -> None:
    """Write the missing shards of a cache and seal it."""
    layout, writer = cache.layout, ReferenceWriter(cache.layout)
    try:
        missing = world.broadcast_object(world.together(lambda: writer.begin() if world.is_main else None))
        written = _score_shards(cache, missing, writer, scorer, world, batch_size, pad_id)
        dtype, width = torch.promote_types(scorer.head_weight.dtype, torch.float32), None
        if layout.kind == "hidden":
            with unsharded(scorer.model):  # in the dtype of the arithmetic, as the hidden states are
                whole = scorer.head_weight.detach()
                dtype, width = whole.dtype, whole.shape[1]
                written |= world.together(lambda: writer.write_head(whole) if world.is_main else {})
        files = {name: size for part in world.gather_objects(written) for name, size in part.items()}
        world.together(lambda: writer.seal(files, dtype=dtype, width=width) if world.is_main else None)
    finally:
        writer.close()


def _score_shards(
    cache: ReferenceCache,
    missing: Sequence[int],
    writer: ReferenceWriter,
    scorer: ScoringModel,
    world: World,
    batch_size: int,
    pad_id: int,
) -> dict[str, int]:
    """Write this process's share of the missing shards. Returns the names and sizes of its files."""
    layout, files = cache.layout, dict[str, int]()
    # The same for every shard: a sharded model needs the same number of forwards on every rank.
    forwards = -(-layout.shard_pairs // batch_size)
    total = sum(len(layout.pairs(shard)) for shard in missing)
    bar = tqdm(total=total, disable=not world.is_main, unit="pair", desc=f"reference of {cache.key}")
    for start in range(0, len(missing), world.size):
        dealt = missing[start : start + world.size]
        shard = dealt[world.rank] if world.rank < len(dealt) else None
        answers: list[Tensor] = []
        for number in range(forwards):
            mine = [] if shard is None else _part(layout.pairs(shard), number, forwards)
            if mine or world.is_distributed:
                answers += _score(scorer, [cache.examples[i] for i in mine], layout.kind, pad_id, world)
            bar.update(sum(len(_part(layout.pairs(s), number, forwards)) for s in dealt))
        files |= world.together(partial(_write, writer, shard, answers))
    bar.close()
    return files


def _write(writer: ReferenceWriter, shard: int | None, answers: Sequence[Tensor]) -> dict[str, int]:
    return {} if shard is None else writer.write(shard, answers)


def _part(pairs: range, number: int, of: int) -> list[int]:
    """One of several parts of almost equal length."""
    return [int(position) for position in np.array_split(np.asarray(pairs), of)[number]]


@torch.no_grad()
def _score(
    scorer: ScoringModel, examples: Sequence[PairExample], kind: str, pad_id: int, world: World
) -> list[Tensor]:
    """The reference's results for some pairs: chosen and rejected answers in turn, in main memory."""
    batch = collate_pairs(examples, pad_id, filler=True).to(world.device)
    mask = batch.labels[:, 1:] != IGNORE_INDEX
    if kind == "hidden":
        values = scorer.answer_hidden(batch.tokens, batch.labels, sides=2)
    else:
        values = scorer.logps(batch.tokens, batch.labels, sides=2)[mask]
    answers = values.cpu().split(mask.sum(1).tolist())
    count = len(examples)
    return [answers[place] for pair in range(count) for place in (pair, count + pair)]
