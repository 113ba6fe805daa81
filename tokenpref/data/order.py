"""Which pairs a step trains on: pure functions of the seed, the epoch and the step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["epoch_order", "step_micro_batches", "steps_per_epoch"]


def epoch_order(num_rows: int, *, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """Order of the rows in one epoch.

    The same on every rank, machine and NumPy version: row i gets the i-th raw 64-bit draw of a Philox generator keyed
    by (seed, epoch), and rows are sorted by their draws.

    Args:
        num_rows: number of rows, at least 1.
        seed: from 0 to 2**64 - 1.
        epoch: counted from 0.
        shuffle: False keeps the file's order.

    Returns:
        int64 array of shape [num_rows]: a permutation of 0 .. num_rows - 1.
    """
    _at_least(1, num_rows=num_rows)
    _at_least(0, seed=seed, epoch=epoch)
    if seed >= 2**64:
        raise ValueError(f"seed must be below 2**64, got {seed}")
    if not shuffle:
        return np.arange(num_rows, dtype=np.int64)
    draws = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_rows)
    return np.argsort(draws, kind="stable").astype(np.int64)


def steps_per_epoch(num_rows: int, *, batch_size: int, accumulation: int, world_size: int) -> int:
    """Optimiser steps in one epoch, a short last one included: ceil(rows / (batch_size * accumulation * world_size))."""
    _at_least(1, num_rows=num_rows, batch_size=batch_size, accumulation=accumulation, world_size=world_size)
    return -(-num_rows // (batch_size * accumulation * world_size))


def step_micro_batches(
    order: np.ndarray | Sequence[int],
    *,
    step: int,
    batch_size: int,
    accumulation: int,
    rank: int,
    world_size: int,
) -> list[list[int]]:
    """The micro-batches of one rank in one step of an epoch.

    A step owns ``batch_size * accumulation * world_size`` consecutive positions of the order. Micro-batch k of rank r is
    the ``k * world_size + r``-th of equally long consecutive slices, so all ranks together work through the order from left to
    right and the union over ranks and micro-batches depends only on the product of the three numbers. The last
    step of an epoch may be short: its pairs are spread over the same slices, whose lengths then differ by at
    most one, so no rank waits for another one that has all of them.

    Args:
        order: rows in the order of the epoch, shape [num_rows].
        step: step within the epoch, counted from 0.
        batch_size: pairs in a full micro-batch.
        accumulation: micro-batches in a step.
        rank: this process.
        world_size: number of processes.

    Returns:
        ``accumulation`` lists of at most ``batch_size`` rows; in a short last step some may be empty.

    Raises:
        ValueError: if a number is out of range or the epoch has no such step.
    """
    _at_least(1, batch_size=batch_size, accumulation=accumulation, world_size=world_size)
    _at_least(0, step=step, rank=rank)
    if rank >= world_size:
        raise ValueError(f"rank must be below world_size, got rank {rank} of {world_size}")
    total = steps_per_epoch(
        len(order), batch_size=batch_size, accumulation=accumulation, world_size=world_size
    )
    if step >= total:
        raise ValueError(f"the epoch has {total} steps, counted from 0; got step {step}")
    slices = accumulation * world_size
    pairs = order[step * batch_size * slices : (step + 1) * batch_size * slices]
    length, longer = divmod(len(pairs), slices)
    micro_batches = []
    for index in range(rank, slices, world_size):
        start = index * length + min(index, longer)
        micro_batches.append([int(row) for row in pairs[start : start + length + (index < longer)]])
    return micro_batches


def _at_least(minimum: int, **values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < minimum:
            raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
