from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpref.data import epoch_order, micro_batches_by_tokens, step_micro_batches, steps_per_epoch

seeds = st.integers(0, 2**64 - 1)
epochs = st.integers(0, 2**64 - 1)
small = st.integers(1, 6)


@settings(max_examples=100)
@given(st.integers(1, 300), seeds, epochs)
def test_an_epoch_is_a_permutation_and_a_pure_function_of_seed_and_epoch(num_rows, seed, epoch):
    order = epoch_order(num_rows, seed=seed, epoch=epoch, shuffle=True)
    assert order.dtype == np.int64 and sorted(order) == list(range(num_rows))
    np.random.seed(0)  # a state that somebody else's code changes
    np.testing.assert_array_equal(order, epoch_order(num_rows, seed=seed, epoch=epoch, shuffle=True))
    plain = epoch_order(num_rows, seed=seed, epoch=epoch, shuffle=False)
    np.testing.assert_array_equal(plain, np.arange(num_rows))


@settings(max_examples=100)
@given(st.integers(30, 300), seeds, epochs, st.integers(0, 63), st.booleans())
def test_another_seed_or_epoch_is_another_order(num_rows, seed, epoch, bit, of_seed):
    order = epoch_order(num_rows, seed=seed, epoch=epoch, shuffle=True)
    # One bit of one of the two is enough; 30! permutations leave no room for chance.
    flipped = (
        {"seed": seed ^ (1 << bit), "epoch": epoch}
        if of_seed
        else {"seed": seed, "epoch": epoch ^ (1 << bit)}
    )
    assert not np.array_equal(order, epoch_order(num_rows, **flipped, shuffle=True))


@settings(max_examples=100)
@given(st.integers(1, 120), seeds, epochs, small, small, small)
def test_every_row_once_an_epoch(num_rows, seed, epoch, batch_size, accumulation, world_size):
    order = epoch_order(num_rows, seed=seed, epoch=epoch, shuffle=True)
    shape = {"batch_size": batch_size, "accumulation": accumulation, "world_size": world_size}
    total = steps_per_epoch(num_rows, **shape)
    pairs_per_step = batch_size * accumulation * world_size
    seen: list[int] = []
    for step in range(total):
        ranks = [step_micro_batches(order, step=step, rank=rank, **shape) for rank in range(world_size)]
        assert all(len(micro_batches) == accumulation for micro_batches in ranks)
        sizes = [len(rows) for micro_batches in ranks for rows in micro_batches]
        assert max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1
        rows = [row for k in range(accumulation) for rank in range(world_size) for row in ranks[rank][k]]
        assert len(rows) == pairs_per_step or step == total - 1
        seen += rows
    # Not only each row once: all ranks together go through the order from left to right.
    assert seen == order.tolist()


@settings(max_examples=100)
@given(st.data(), st.integers(1, 120), seeds, st.integers(1, 24))
def test_a_step_depends_on_the_product_alone(data, num_rows, seed, product):
    def factors() -> dict[str, int]:
        batch_size = data.draw(st.sampled_from([n for n in range(1, product + 1) if product % n == 0]))
        rest = product // batch_size
        accumulation = data.draw(st.sampled_from([n for n in range(1, rest + 1) if rest % n == 0]))
        return {
            "batch_size": batch_size,
            "accumulation": accumulation,
            "world_size": rest // accumulation,
        }

    order = epoch_order(num_rows, seed=seed, epoch=0, shuffle=True)
    one, other = factors(), factors()
    assert steps_per_epoch(num_rows, **one) == steps_per_epoch(num_rows, **other)
    for step in range(steps_per_epoch(num_rows, **one)):
        unions = [
            sorted(
                row
                for rank in range(shape["world_size"])
                for rows in step_micro_batches(order, step=step, rank=rank, **shape)
                for row in rows
            )
            for shape in (one, other)
        ]
        assert unions[0] == unions[1]


@settings(max_examples=100)
@given(st.lists(st.integers(2, 50), min_size=1, max_size=40), small, st.integers(0, 60), st.booleans())
def test_a_step_cut_by_tokens_has_every_pair_once_within_the_budget(tokens, world_size, spare, padded):
    pairs, budget = [100 + i for i in range(len(tokens))], max(tokens) + spare
    ranks = [
        micro_batches_by_tokens(pairs, tokens, budget=budget, rank=rank, world_size=world_size, padded=padded)
        for rank in range(world_size)
    ]
    assert len({len(micro_batches) for micro_batches in ranks}) == 1 and ranks[0]
    assert sorted(row for rank in ranks for batch in rank for row in batch) == pairs
    count = dict(zip(pairs, tokens, strict=True))
    for batch in (batch for rank in ranks for batch in rank if batch):
        cost = len(batch) * max(count[row] for row in batch) if padded else sum(count[row] for row in batch)
        assert cost <= budget
    # Each pair went to the rank with the fewest tokens: no two differ by more than the longest pair.
    loads = [sum(count[row] for batch in rank for row in batch) for rank in ranks]
    assert max(loads) - min(loads) <= max(tokens)
