"""Builds and checks the data sets of a run, and makes the micro-batches of each step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from tokenpref.data import (
    PairBatch,
    PreferenceDataset,
    Tokenizer,
    collate_pairs,
    epoch_order,
    micro_batches_by_tokens,
    step_micro_batches,
    step_pairs,
    steps_per_epoch,
)
from tokenpref.distributed import World
from tokenpref.errors import ConfigError
from tokenpref.models.decoder import Decoder
from tokenpref.training.config.fields import Component
from tokenpref.training.config.keys import TrainConfig

__all__ = [
    "build_pairs",
    "check_data_fits",
    "check_pairs",
    "check_tokens_per_batch",
    "pair_batches",
    "planned_steps",
]

log = logging.getLogger("tokenpref")


def build_pairs(component: Component, tokenizer: Tokenizer, world: World) -> PreferenceDataset:
    """Build a data set of pairs, and log a line about it.

    Raises:
        ConfigError: if it has fewer pairs than the run has processes.
    """
    dataset: PreferenceDataset = world.together(lambda: component.build(tokenizer))
    check_pairs(dataset, component)
    if world.is_main:
        for part, own in zip(dataset.parts, component.parts, strict=False):
            log.info(f"{own.key}: {part.report.summary()}")
    if len(dataset) < world.size:
        raise ConfigError(
            f"{component.key}: {len(dataset)} pairs for {world.size} processes; "
            f"run with at most --nproc_per_node {len(dataset)}"
        )
    return dataset


def check_pairs(dataset: Any, component: Component) -> None:
    """Check that a component made a data set of this package.

    Raises:
        ConfigError: if it did not. torchtune's data sets, for example, do not record the characters of tokens.
    """
    if not isinstance(dataset, PreferenceDataset):
        raise ConfigError(
            f"{component.key} ({component.path}): makes a {type(dataset).__name__} of another kind; name "
            "tokenpref.data.preference_dataset, or a function of your own that calls it"
        )


def check_data_fits(dataset: PreferenceDataset, component: Component, decoder: Decoder) -> None:
    """Check that the model can process every sequence and token id of a data set.

    Raises:
        ConfigError: if a sequence is longer than the model's context, or an id lies outside its vocabulary.
    """
    longest = dataset.longest
    if longest > decoder.context:
        raise ConfigError(
            f"{component.key}: the longest sequence has {longest} tokens and the model's context is "
            f"{decoder.context}; set {component.key}.max_seq_len={decoder.context} or raise the model's"
        )
    highest = dataset.highest_id
    vocabulary = decoder.vocabulary
    if highest >= vocabulary:
        raise ConfigError(
            f"tokenizer: it makes token id {highest} ({dataset.tokenizer.decode_special(highest)!r}) of {component.key} and the "
            f"model embeds {vocabulary} tokens; set the tokenizer that belongs to the model"
        )


def planned_steps(config: TrainConfig, rows: int, world_size: int) -> int:
    """Optimizer steps of an epoch over ``rows`` pairs."""
    steps = steps_per_epoch(
        rows,
        batch_size=config.batch_size,
        accumulation=config.gradient_accumulation_steps,
        world_size=world_size,
    )
    return steps if config.max_steps_per_epoch is None else min(steps, config.max_steps_per_epoch)


@lru_cache(maxsize=2)
def _epoch_order(num_rows: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    return epoch_order(num_rows, seed=seed, epoch=epoch, shuffle=shuffle)


def check_tokens_per_batch(
    dataset: PreferenceDataset, component: Component, tokens: int | None, *, padded: bool
) -> None:
    """Check that every pair fits a micro-batch.

    Raises:
        ConfigError: naming the number that the longest pair needs.
    """
    longest = int(_pair_tokens(dataset, padded).max())
    if tokens is not None and longest > tokens:
        raise ConfigError(
            f"tokens_per_batch: {tokens}, and a pair of {component.key} has {longest} tokens"
            f"{' with its padding' if padded else ''}; set at least {longest}, or a lower {component.key}.max_seq_len"
        )


def _pair_tokens(dataset: PreferenceDataset, padded: bool, pairs: Sequence[int] | None = None) -> np.ndarray:
    """The numbers of tokens of some or all pairs. A step needs only those of its own pairs."""
    lengths = dataset.lengths(pairs)
    return 2 * lengths.max(1) if padded else lengths.sum(1)


def pair_batches(
    dataset: PreferenceDataset,
    world: World,
    *,
    pad_id: int,
    step: int,
    batch_size: int,
    accumulation: int = 1,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = False,
    tokens: int | None = None,
    padded: bool = False,
) -> list[PairBatch]:
    """The micro-batches of this rank in a step of an epoch, with fillers if it has no pair.

    With ``tokens`` the step's pairs are grouped by their lengths; see :func:`tokenpref.data.micro_batches_by_tokens`. The step
    has the same pairs as without.
    """
    order = _epoch_order(len(dataset), seed, epoch, shuffle)
    shape = {"batch_size": batch_size, "accumulation": accumulation, "world_size": world.size}
    if tokens is None:
        rows = step_micro_batches(order, step=step, rank=world.rank, **shape)
    else:
        pairs = step_pairs(order, step=step, **shape)
        rows = micro_batches_by_tokens(
            pairs,
            _pair_tokens(dataset, padded, pairs).tolist(),
            budget=tokens,
            rank=world.rank,
            world_size=world.size,
            padded=padded,
        )
    return [
        collate_pairs([dataset[i] for i in indices], pad_id, filler=not indices).to(world.device)
        for indices in rows
    ]
