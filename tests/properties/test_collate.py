from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpref.data import IGNORE_INDEX, PairExample, collate_anchors, collate_pairs

# Few ids, so that answers hold the padding id, and sides and anchors are equal now and then.
ids = st.integers(0, 4)
pad_ids = st.integers(0, 4)


@st.composite
def sides(draw, prompt: list[int]) -> tuple[list[int], int]:
    """A prompt, now and then one token shorter as after a token over the boundary, and at least one answer token."""
    start = draw(st.integers(max(1, len(prompt) - 1), len(prompt)))
    return prompt[:start] + draw(st.lists(ids, min_size=1, max_size=6)), start


@st.composite
def examples(draw) -> PairExample:
    prompt = draw(st.lists(ids, min_size=1, max_size=5))
    chosen, rejected = draw(sides(prompt)), draw(sides(prompt))
    return PairExample(draw(st.integers(0, 10**6)), *chosen, *rejected, [], [], False, False, "")


batches = st.lists(examples(), min_size=1, max_size=5)


def of_side(example: PairExample, side: str) -> tuple[list[int], int]:
    return getattr(example, f"{side}_ids"), getattr(example, f"{side}_start")


@settings(max_examples=80)
@given(batches, pad_ids, st.booleans())
def test_every_row_holds_its_ids_then_padding_and_scores_its_answer(pairs, pad_id, filler):
    batch = collate_pairs(pairs, pad_id, filler=filler)
    rows = [of_side(pair, side) for side in ("chosen", "rejected") for pair in pairs]
    longest = max(len(tokens) for tokens, _ in rows)
    assert batch.tokens.shape == batch.labels.shape == (2 * len(pairs), longest)
    for (tokens, start), found, labels in zip(
        rows, batch.tokens.tolist(), batch.labels.tolist(), strict=True
    ):
        padding = longest - len(tokens)
        assert found == tokens + [pad_id] * padding
        # By position, never by id: answers may hold the padding id.
        assert labels == [IGNORE_INDEX] * start + tokens[start:] + [IGNORE_INDEX] * padding
    assert batch.rows == [pair.row for pair in pairs] and batch.num_pairs == len(pairs)
    assert batch.real.tolist() == [True] * len(pairs)
    assert batch.num_tokens == sum(len(tokens) for tokens, _ in rows)


@settings(max_examples=50)
@given(batches, pad_ids)
def test_answers_come_back_from_the_labels(pairs, pad_id):
    batch = collate_pairs(pairs, pad_id)
    for side in ("chosen", "rejected"):
        answers = [tokens[start:] for tokens, start in (of_side(pair, side) for pair in pairs)]
        assert batch.answer_ids(side) == batch.only(side).answer_ids(side) == answers


@settings(max_examples=50)
@given(batches, pad_ids)
def test_a_pair_does_not_depend_on_its_neighbours(pairs, pad_id):
    batch = collate_pairs(pairs, pad_id)
    for place, pair in enumerate(pairs):
        alone = collate_pairs([pair], pad_id)
        width = alone.tokens.shape[1]
        rows = [place, len(pairs) + place]
        assert torch.equal(batch.tokens[rows, :width], alone.tokens)
        assert torch.equal(batch.labels[rows, :width], alone.labels)
        assert (batch.labels[rows, width:] == IGNORE_INDEX).all()


@settings(max_examples=50)
@given(batches, pad_ids, st.sampled_from(["chosen", "rejected"]))
def test_one_side_alone_is_that_side_and_no_wider_than_it_needs(pairs, pad_id, side):
    batch = collate_pairs(pairs, pad_id)
    part = batch.only(side)
    lengths = [len(of_side(pair, side)[0]) for pair in pairs]
    assert part.sides == (side,) and part.tokens.shape == (len(pairs), max(lengths))
    first = 0 if side == "chosen" else len(pairs)
    assert torch.equal(part.tokens, batch.tokens[first : first + len(pairs), : max(lengths)])
    assert torch.equal(part.labels, batch.labels[first : first + len(pairs), : max(lengths)])
    assert (part.num_tokens, part.num_pairs, part.rows) == (sum(lengths), len(pairs), batch.rows)


@settings(max_examples=20)
@given(st.integers(0, 2**31))
def test_a_filler_scores_nothing(pad_id):
    filler = collate_pairs([], pad_id, filler=True)
    anchored = filler.with_anchors(collate_anchors([None], filler, pad_id))
    for batch, height in (
        (filler, 2),
        (filler.only("chosen"), 1),
        (filler.only("rejected"), 1),
        (anchored, 3),
    ):
        assert batch.tokens.shape == (height, 2) and (batch.tokens[:2] == pad_id).all()
        assert (batch.labels == IGNORE_INDEX).all()
        assert (batch.rows, batch.real.tolist(), batch.num_pairs, batch.num_tokens) == ([-1], [False], 0, 0)


@settings(max_examples=50)
@given(st.data(), batches, pad_ids)
def test_anchors_are_a_third_block_that_changes_nothing_else(data, pairs, pad_id):
    batch = collate_pairs(pairs, pad_id)
    # An anchor may be empty: its prompt alone.
    given_anchors = [
        (tokens[:start] + data.draw(st.lists(ids, max_size=8)), start)
        for tokens, start in (of_side(pair, "chosen") for pair in pairs)
    ]
    anchors = collate_anchors(given_anchors, batch, pad_id)
    whole = batch.with_anchors(anchors)
    answers = [tokens[start:] for tokens, start in given_anchors]
    assert whole.answer_ids("anchor") == answers
    assert (whole.rows, whole.num_pairs, whole.num_tokens) == (batch.rows, batch.num_pairs, batch.num_tokens)
    height, width = batch.tokens.shape
    assert torch.equal(whole.tokens[:height, :width], batch.tokens)
    assert torch.equal(whole.labels[:height, :width], batch.labels)
    assert (whole.labels[:height, width:] == IGNORE_INDEX).all()
    for side in ("chosen", "rejected"):
        assert whole.answer_ids(side) == batch.answer_ids(side)
        equal = [float(a == b) for a, b in zip(answers, batch.answer_ids(side), strict=True)]
        assert anchors.metrics[f"anchors/equal_{side}"].tolist() == equal
    assert anchors.metrics["anchors/tokens"].tolist() == [len(answer) for answer in answers]
    assert anchors.metrics["anchors/empty"].tolist() == [float(not answer) for answer in answers]
