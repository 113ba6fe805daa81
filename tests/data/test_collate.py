from __future__ import annotations

import pytest
import torch

from tokenpref.data import PairExample, collate_anchors, collate_pairs


def example(
    row: int, chosen: list[int], chosen_start: int, rejected: list[int], rejected_start: int
) -> PairExample:
    return PairExample(row, chosen, chosen_start, rejected, rejected_start, [], [], False, False, "")


def test_padding_labels_and_counts():
    batch = collate_pairs(
        [example(7, [5, 6, 7], 2, [5, 6, 8, 9], 2), example(3, [5, 1], 1, [4, 0, 3], 2)], pad_id=0
    )
    assert batch.tokens.tolist() == [[5, 6, 7, 0], [5, 1, 0, 0], [5, 6, 8, 9], [4, 0, 3, 0]]
    n = -100
    assert batch.labels.tolist() == [[n, n, 7, n], [n, 1, n, n], [n, n, 8, 9], [n, n, 3, n]]
    assert batch.tokens.dtype == batch.labels.dtype == torch.int64
    assert batch.real.tolist() == [True, True] and batch.rows == [7, 3]
    assert (batch.num_pairs, batch.num_tokens) == (2, 3 + 4 + 2 + 3)
    assert batch.answers == [(7, "chosen"), (3, "chosen"), (7, "rejected"), (3, "rejected")]
    assert batch.only("rejected").answers == [(7, "rejected"), (3, "rejected")]


def test_an_answer_token_equal_to_the_padding_id_is_scored():
    batch = collate_pairs([example(0, [5, 0], 1, [5, 1, 1], 1)], pad_id=0)
    assert batch.labels.tolist() == [[-100, 0, -100], [-100, 1, 1]]


def test_filler_scores_nothing():
    batch = collate_pairs([], pad_id=9, filler=True)
    assert batch.tokens.tolist() == [[9, 9], [9, 9]]
    assert bool((batch.labels == -100).all())
    assert (
        batch.real.tolist() == [False]
        and batch.rows == [-1]
        and (batch.num_pairs, batch.num_tokens) == (0, 0)
    )


def test_filler_adds_nothing_to_real_pairs():
    pairs = [example(0, [1, 2], 1, [1, 3], 1)]
    assert collate_pairs(pairs, 0, filler=True).rows == [0]


def test_no_pairs_without_filler():
    with pytest.raises(ValueError, match="filler=True"):
        collate_pairs([], pad_id=0)


def test_to_keeps_everything():
    batch = collate_pairs([example(0, [1, 2], 1, [1, 3], 1)], 0).to("cpu")
    assert batch.tokens.tolist() == [[1, 2], [1, 3]] and batch.rows == [0] and batch.num_tokens == 4


def test_one_side_alone_is_cut_to_its_longest():
    batch = collate_pairs(
        [example(7, [5, 6, 7], 2, [5, 6, 8, 9], 2), example(3, [5, 1], 1, [4, 0, 3], 2)], pad_id=0
    )
    chosen, rejected = batch.only("chosen"), batch.only("rejected")
    assert chosen.tokens.tolist() == [[5, 6, 7], [5, 1, 0]] and chosen.sides == ("chosen",)
    assert rejected.tokens.tolist() == [[5, 6, 8, 9], [4, 0, 3, 0]]
    assert (chosen.num_tokens, rejected.num_tokens) == (3 + 2, 4 + 3) and chosen.num_pairs == 2
    filler = collate_pairs([], pad_id=9, filler=True).only("rejected")
    assert filler.tokens.tolist() == [[9, 9]] and filler.num_tokens == 0


def test_anchors_are_padded_and_compared():
    pairs = collate_pairs(
        [example(0, [1, 2, 3], 1, [1, 2, 4, 5], 1), example(1, [1, 6], 1, [1, 7], 1)], pad_id=9
    )
    anchors = collate_anchors([([1, 2, 3], 1), ([1, 8], 2)], pairs, pad_id=9)
    assert anchors.tokens.tolist() == [[1, 2, 3], [1, 8, 9]]
    assert anchors.labels.tolist() == [[-100, 2, 3], [-100, -100, -100]]
    assert {name: values.tolist() for name, values in anchors.metrics.items()} == {
        "anchors/tokens": [2, 0],
        "anchors/empty": [0, 1],
        "anchors/equal_chosen": [1, 0],
        "anchors/equal_rejected": [0, 0],
    }
    whole = pairs.with_anchors(anchors)
    assert whole.sides == ("chosen", "rejected", "anchor") and whole.num_tokens == pairs.num_tokens
    assert whole.tokens.shape == whole.labels.shape == (6, 4)
    assert whole.labels[4:, 3].tolist() == [-100, -100]
    assert whole.answer_ids("anchor") == [[2, 3], []] and whole.answer_ids("rejected") == [[2, 4, 5], [7]]


def test_a_filler_has_an_anchor_without_tokens():
    filler = collate_pairs([], pad_id=0, filler=True)
    anchors = collate_anchors([None], filler, pad_id=0)
    assert anchors.tokens.shape == (1, 2) and (anchors.labels == -100).all()
