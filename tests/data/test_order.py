from __future__ import annotations

import numpy as np
import pytest

from tokenpref.data import (
    epoch_order,
    micro_batches_by_tokens,
    step_micro_batches,
    step_pairs,
    steps_per_epoch,
)


def test_order_is_a_pure_function_of_seed_and_epoch():
    first = epoch_order(50, seed=3, epoch=1, shuffle=True)
    np.testing.assert_array_equal(first, epoch_order(50, seed=3, epoch=1, shuffle=True))
    assert sorted(first) == list(range(50)) and first.dtype == np.int64
    assert first.tolist() != epoch_order(50, seed=3, epoch=2, shuffle=True).tolist()
    assert first.tolist() != epoch_order(50, seed=4, epoch=1, shuffle=True).tolist()
    assert epoch_order(4, seed=3, epoch=1, shuffle=False).tolist() == [0, 1, 2, 3]


def test_order_stays_what_it_was():
    # Fixed by Philox's definition; a change here would make resumed runs see other pairs.
    draws = np.random.Philox(key=np.array([7, 0], dtype=np.uint64)).random_raw(6)
    assert (
        epoch_order(6, seed=7, epoch=0, shuffle=True).tolist()
        == np.argsort(draws).tolist()
        == [4, 1, 3, 2, 5, 0]
    )


def test_full_step_gives_contiguous_slices():
    # 2 pairs * 2 micro-batches * 2 ranks = 8 positions; step 1 owns 8..15.
    def take(rank):
        return step_micro_batches(range(20), step=1, batch_size=2, accumulation=2, rank=rank, world_size=2)

    assert take(0) == [[8, 9], [12, 13]]
    assert take(1) == [[10, 11], [14, 15]]


@pytest.mark.parametrize(
    ("pairs", "expected"), [(1, [[[16], []], [[], []]]), (3, [[[16], [18]], [[17], []]])]
)
def test_short_last_step_is_spread(pairs, expected):
    take = [
        step_micro_batches(range(16 + pairs), step=2, batch_size=2, accumulation=2, rank=rank, world_size=2)
        for rank in range(2)
    ]
    assert take == expected


@pytest.mark.parametrize("num_rows", [6, 17, 23, 24, 25])
def test_union_depends_on_the_product_alone(num_rows):
    order = epoch_order(num_rows, seed=1, epoch=0, shuffle=True)
    unions = []
    for batch_size, accumulation, world_size in [
        (6, 1, 1),
        (2, 1, 3),
        (1, 2, 3),
        (3, 1, 2),
        (1, 6, 1),
        (1, 3, 2),
    ]:
        shape = {"batch_size": batch_size, "accumulation": accumulation, "world_size": world_size}
        steps = []
        for step in range(steps_per_epoch(num_rows, **shape)):
            micro = [step_micro_batches(order, step=step, rank=rank, **shape) for rank in range(world_size)]
            sizes = [len(rows) for rank in micro for rows in rank]
            assert len(sizes) == accumulation * world_size and max(sizes) <= batch_size
            assert max(sizes) - min(sizes) <= 1
            steps.append([row for k in range(accumulation) for rank in micro for row in rank[k]])
        assert [row for step in steps for row in step] == order.tolist()
        unions.append([sorted(step) for step in steps])
    assert all(union == unions[0] for union in unions)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"rank": 2}, "rank must be below world_size, got rank 2 of 2"),
        ({"step": 2}, "the epoch has 2 steps"),
        ({"step": -1}, "step must be"),
    ],
)
def test_arguments_out_of_range(change, message):
    arguments = {"step": 0, "batch_size": 2, "accumulation": 1, "rank": 0, "world_size": 2, **change}
    with pytest.raises(ValueError, match=message):
        step_micro_batches(range(8), **arguments)


def test_no_rows():
    with pytest.raises(ValueError, match="num_rows must be an integer of at least 1"):
        epoch_order(0, seed=0, epoch=0, shuffle=True)


def test_a_step_cut_by_tokens_by_hand():
    def take(rank, **changes):
        arguments = {"budget": 10, "world_size": 2, **changes}
        return micro_batches_by_tokens([30, 31, 32, 33, 34, 35], [2, 9, 4, 6, 6, 3], rank=rank, **arguments)

    # 9 to rank 0; 6 and (at 6 against 9) 6 to rank 1; 4 to rank 0; 3 to rank 1 (12 against 13); 2 to rank 0.
    assert take(0) == [[31], [32, 30]]
    assert take(1) == [[33, 35], [34]]
    assert take(0, world_size=1) == [[31], [33, 32], [34, 35], [30]]
    # Padded, 4 and 2 cost 8, and 6 and 3 twelve.
    assert take(0, padded=True) == [[31], [32, 30], []]
    assert take(1, padded=True) == [[33], [34], [35]]


def test_a_rank_without_pairs_has_as_many_micro_batches():
    assert micro_batches_by_tokens([7], [5], budget=5, rank=0, world_size=3) == [[7]]
    assert micro_batches_by_tokens([7], [5], budget=5, rank=2, world_size=3) == [[]]


def test_a_pair_above_the_budget_is_refused():
    with pytest.raises(ValueError, match="a pair has 6 tokens and a micro-batch may have 5"):
        micro_batches_by_tokens([7], [6], budget=5, rank=0, world_size=1)


def test_a_step_has_the_pairs_of_all_its_micro_batches():
    order = epoch_order(11, seed=1, epoch=0, shuffle=True)
    shape = {"batch_size": 2, "accumulation": 1, "world_size": 2}
    for step in range(3):
        micro = [step_micro_batches(order, step=step, rank=rank, **shape) for rank in range(2)]
        assert step_pairs(order, step=step, **shape) == [row for rank in micro for row in rank[0]]
