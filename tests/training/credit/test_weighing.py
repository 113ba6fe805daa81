"""From scores to the weights of a batch."""

import math

import numpy as np
import pytest
import torch
from support.evaluating import pairs, tokenizer

from tokenpref.data import collate_pairs, preference_dataset
from tokenpref.errors import ConfigError, DataError
from tokenpref.training.config.fields import Component
from tokenpref.training.credit.weighing import KnownScores, TokenWeights, Weighing
from tokenpref.training.step.pair_loss import clipped_share

EXPONENTIAL = Component("weight_transform", "tokenpref.weights.transforms.exponential", {})


class Source:
    """Scores of 1, 2, 3 ... on every answer's tokens, times a factor, with changes."""

    def __init__(self, kind="log_ratio", factor=0.1, change=None):
        self.kind, self.factor, self.change = kind, factor, change

    def load(self, dataset):
        scores = []
        for example in dataset:
            lengths = (
                len(example.chosen_ids) - example.chosen_start,
                len(example.rejected_ids) - example.rejected_start,
            )
            scores.append(tuple(self.factor * np.arange(1.0, n + 1) for n in lengths))
        if self.change is not None:
            self.change(scores)
        return scores


def weighing(kind="log_ratio", transform=EXPONENTIAL, normalize="none", eos_weight=1.0, **more):
    return Weighing(kind, None if kind == "weight" else transform, normalize, eos_weight, **more)


def weights_of(data, source, weighing):
    known = KnownScores(source)
    known.bind(data)
    return TokenWeights(data, known, weighing)


def test_each_token_has_its_weight_in_its_column():
    data = pairs(3)
    weights = weights_of(data, Source(), weighing())
    batch = collate_pairs([data[2], data[0]], pad_id=0)
    found = weights(batch)
    assert found.weights.shape == (4, batch.labels.shape[1] - 1)
    for row, (example, side, sign) in enumerate(
        ((data[2], "chosen", 1), (data[0], "chosen", 1), (data[2], "rejected", -1), (data[0], "rejected", -1))
    ):
        start = getattr(example, f"{side}_start")
        count = len(getattr(example, f"{side}_ids")) - start
        expected = torch.zeros(batch.labels.shape[1] - 1)
        # the weight of the answer's t-th token stands where that token is predicted: one column before it
        for t in range(count):
            expected[start - 1 + t] = math.exp(sign * 0.1 * (t + 1))
        torch.testing.assert_close(found.weights[row], expected)
    assert not found.clipped.any()


def test_clipped_share_counts_both_answers():
    data = pairs(1)
    # 0.6, 1.2, 1.8, ... against the upper bound 1.5: all from the third token on are cut
    weights = weights_of(data, Source(factor=0.6), weighing())
    batch = collate_pairs([data[0]], pad_id=0)
    counts = [
        len(data[0].chosen_ids) - data[0].chosen_start,
        len(data[0].rejected_ids) - data[0].rejected_start,
    ]
    expected = sum(max(n - 2, 0) for n in counts) / sum(counts)
    assert clipped_share(weights(batch), batch)["weights/clipped"].item() == pytest.approx(expected)


def test_release_scores_are_the_negated_log_ratio():
    data = pairs(2)
    batch = collate_pairs(list(data), pad_id=0)
    ours = weights_of(data, Source(factor=0.1), weighing())(batch).weights
    release = weights_of(data, Source("tis_release", factor=-0.1), weighing("tis_release"))(batch).weights
    assert ours.equal(release)


def test_mean_one():
    data = pairs(4)
    batch = collate_pairs(list(data), pad_id=0)
    weights = weights_of(data, Source(), weighing(normalize="answer"))(batch).weights
    mask = batch.labels[:, 1:] != -100
    torch.testing.assert_close(weights.sum(-1) / mask.sum(-1), torch.ones(8))


def test_eos_without_score_gets_its_own_weight():
    data = preference_dataset(tokenizer(), "package://data/tiny/eval.jsonl", max_rows=2, append_eos=True)

    def without_eos(scores):
        for pair in scores:
            for side in pair:
                side[-1] = np.nan

    batch = collate_pairs(list(data), pad_id=0)
    ends = [len(e.chosen_ids) - 2 for e in data]  # column of the last token's prediction
    for source, more in ((Source(change=without_eos), {}), (Source(), {"use_eos_score": False})):
        weights = weights_of(data, source, weighing(eos_weight=0.25, **more))(batch).weights
        assert [weights[row, end].item() for row, end in enumerate(ends)] == [0.25, 0.25]
        assert weights[0, ends[0] - 1].item() > 1
    scored = weights_of(data, Source(), weighing(eos_weight=0.25))(batch).weights
    assert scored[0, ends[0]].item() > 1


def test_a_filler_has_no_weight():
    data = pairs(2)
    batch = collate_pairs([], pad_id=0, filler=True)
    weights = weights_of(data, Source(), weighing())(batch)
    assert not weights.weights.any() and clipped_share(weights, batch)["weights/clipped"].item() == 0


def test_random_weights_belong_to_the_row():
    data = pairs(4)
    drawn = Component("weight_transform", "tokenpref.weights.transforms.random", {})
    weights = weights_of(data, Source(), weighing(transform=drawn))
    one = weights(collate_pairs([data[3]], pad_id=0)).weights[0]
    two = weights(collate_pairs([data[1], data[3]], pad_id=0)).weights[1]
    assert one[one > 0].equal(two[two > 0]) and one.any()


def put(value, token=0):
    def change(scores):
        scores[1][0][token] = value

    return change


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("weight", put(-0.5), r"row 1 \(line 2\), chosen: token 0 has the score -0.5; .*not negative"),
        ("weight", put(np.inf), "token 0 has the score inf"),
        ("log_ratio", put(-np.inf), "token 0 has the score -inf"),
        ("log_ratio", put(np.nan), "token 0 has no score .nan.; only EOS may have none"),
        ("log_ratio", put(np.nan, -1), "has no score"),  # the last token, but no EOS
        (
            "log_ratio",
            lambda s: s.__setitem__(1, (s[1][0][:-1], s[1][1])),
            "chosen: . scores for . answer tokens",
        ),
        ("log_ratio", lambda s: s.pop(), "gave scores of 2 pairs for 3"),
    ],
)
def test_bad_scores_are_refused(kind, change, message):
    with pytest.raises(DataError, match=message):
        weights_of(pairs(3), Source(kind, change=change), weighing(kind))


def test_kind_and_transform_must_fit():
    with pytest.raises(ConfigError, match="weight_transform: missing; scores of kind log_ratio"):
        Weighing("log_ratio", None, "none", 1.0)
    with pytest.raises(ConfigError, match="the scores are weights already"):
        Weighing("weight", EXPONENTIAL, "none", 1.0)


def test_negative_weights_of_a_transform_are_said():
    thresholds = Component(
        "weight_transform", "tokenpref.weights.transforms.threshold", {"lower": -1.0, "upper": 1.0}
    )
    weights = weights_of(pairs(2), Source(), weighing(transform=thresholds))
    assert "% are negative, which reverses the gradient of these tokens" in weights.summary
