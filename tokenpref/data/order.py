"""Which pairs a step trains on: pure functions of the seed, the epoch and the step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = [
    "epoch_order",
    "micro_batches_by_tokens",
    "step_micro_batches",
    "step_pairs",
    "steps_per_epoch",
    "weighted_selection",
]


def epoch_order(num_rows: int, *, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """The order of the rows in an epoch.

    It is the same on every rank, machine and NumPy version: row i gets the i-th raw 64-bit draw of a Philox generator keyed
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


def weighted_selection(num_rows: int, weight: float) -> np.ndarray | None:
    """Positions that an epoch sees of rows with a weight: 2.0 sees each twice, 0.5 a fixed half.

    The half is the same at every start, whatever the run's seed is: its rows are drawn by :func:`epoch_order` with seed 0.

    Args:
        num_rows: number of rows, at least 1.
        weight: above 0.

    Returns:
        int64 positions in ascending order within each round; None if every row is seen once.
    """
    _at_least(1, num_rows=num_rows)
    if weight == 1:
        return None
    rounds = int(weight)
    part = epoch_order(num_rows, seed=0, epoch=0, shuffle=True)[: round((weight - rounds) * num_rows)]
    return np.concatenate([*[np.arange(num_rows, dtype=np.int64)] * rounds, np.sort(part)])


def steps_per_epoch(num_rows: int, *, batch_size: int, accumulation: int, world_size: int) -> int:
    """Optimiser steps in one epoch, a short last one included: ceil(rows / (batch_size * accumulation * world_size))."""
    _at_least(1, num_rows=num_rows, batch_size=batch_size, accumulation=accumulation, world_size=world_size)
    return -(-num_rows // (batch_size * accumulation * world_size))


def step_pairs(
    order: np.ndarray | Sequence[int], *, step: int, batch_size: int, accumulation: int, world_size: int
) -> list[int]:
    """The pairs of all ranks in one step of an epoch: the next ``batch_size * accumulation * world_size`` of the order.

    Args:
        order: rows in the order of the epoch, shape [num_rows].
        step: step within the epoch, counted from 0.
        batch_size: pairs in a full micro-batch.
        accumulation: micro-batches in a step.
        world_size: number of processes.

    Raises:
        ValueError: if a number is out of range or the epoch has no such step.
    """
    _at_least(1, batch_size=batch_size, accumulation=accumulation, world_size=world_size)
    _at_least(0, step=step)
    total = steps_per_epoch(
        len(order), batch_size=batch_size, accumulation=accumulation, world_size=world_size
    )
    if step >= total:
        raise ValueError(f"the epoch has {total} steps, counted from 0; got step {step}")
    size = batch_size * accumulation * world_size
    return [int(row) for row in order[step * size : (step + 1) * size]]


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
    right, and the union over ranks and micro-batches depends only on the product of the three numbers. The last
    step of an epoch may be short. Its pairs are then spread over the same slices, whose lengths differ by at
    most one, so no rank waits for another one with all the pairs.

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
    pairs = step_pairs(
        order, step=step, batch_size=batch_size, accumulation=accumulation, world_size=world_size
    )
    _check_rank(rank, world_size)
    slices = accumulation * world_size
    length, longer = divmod(len(pairs), slices)
    micro_batches = []
    for index in range(rank, slices, world_size):
        start = index * length + min(index, longer)
        micro_batches.append(pairs[start : start + length + (index < longer)])
    return micro_batches


def micro_batches_by_tokens(
    pairs: Sequence[int],
    tokens: Sequence[int],
    *,
    budget: int,
    rank: int,
    world_size: int,
    padded: bool = False,
) -> list[list[int]]:
    """Split a step's pairs into micro-batches of at most ``budget`` tokens, with about the same load on all ranks.

    The longest pairs come first. Each goes to the rank with the fewest tokens so far, and there into the first micro-batch where
    it fits. Pairs of similar length are therefore together. Every rank has the same number of micro-batches (with empty ones
    at the end). This is a pure function of its arguments, so every rank computes the shares of all ranks.

    Args:
        pairs: rows of the step, of all ranks.
        tokens: tokens of each of them, both answers together; with ``padded`` twice those of its longer answer.
        budget: largest number of tokens of a micro-batch.
        rank: this process.
        world_size: number of processes.
        padded: every sequence costs as many tokens as the longest of its micro-batch.

    Returns:
        Lists of rows, at least one.

    Raises:
        ValueError: if a pair alone has more tokens than ``budget``.
    """
    _at_least(1, budget=budget, world_size=world_size)
    _check_rank(rank, world_size)
    if len(pairs) != len(tokens):
        raise ValueError(f"{len(tokens)} numbers of tokens for {len(pairs)} pairs")
    longest = max(tokens, default=0)
    if longest > budget:
        raise ValueError(f"a pair has {longest} tokens and a micro-batch may have {budget}")
    shares: list[list[int]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for place in sorted(range(len(pairs)), key=lambda place: (-tokens[place], place)):
        least = loads.index(min(loads))
        shares[least].append(place)
        loads[least] += tokens[place]
    cuts = [_cut([tokens[place] for place in share], budget, padded) for share in shares]
    own = [[int(pairs[shares[rank][i]]) for i in batch] for batch in cuts[rank]]
    return own + [[] for _ in range(max(1, *map(len, cuts)) - len(own))]


def _cut(tokens: Sequence[int], budget: int, padded: bool) -> list[list[int]]:
    """The indices of descending numbers, each in the first group where it fits."""
    groups: list[list[int]] = []
    for index, count in enumerate(tokens):
        for group in groups:
            # The first one of a group is the longest.
            cost = (len(group) + 1) * tokens[group[0]] if padded else sum(tokens[i] for i in group) + count
            if cost <= budget:
                group.append(index)
                break
        else:
            groups.append([index])
    return groups


def _check_rank(rank: int, world_size: int) -> None:
    _at_least(0, rank=rank)
    if rank >= world_size:
        raise ValueError(f"rank must be below world_size, got rank {rank} of {world_size}")


def _at_least(minimum: int, **values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < minimum:
            raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")
