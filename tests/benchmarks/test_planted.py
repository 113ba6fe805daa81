"""The planted-reward benchmark: its measures, what it plants, and the signs on a very small setting."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/ is no part of the package

from benchmarks.planted import __main__ as command
from benchmarks.planted import constructions, frontier, report, task
from benchmarks.planted.measures import at_level, auc, average_ranks, spearman

SMALL = replace(
    task.Settings(),
    vocab=24,
    planted=4,
    distractors=2,
    temperature=0.25,
    width=16,
    layers=1,
    prompt_tokens=(2, 3),
    answer_tokens=(6, 8),
    sampled_tokens=8,
    pretrain_steps=100,
    pretrain_batch=32,
    pretrain_lr=1e-2,
    batch=32,
    heldout=64,
    pair_counts=(256,),
    min_steps=24,
    epochs=1,
    sft_lr=5e-3,
    dpo_lr=5e-3,
    frontier_pairs=256,
    frontier_lr=3e-3,
    checkpoints=(8, 24),
    samples=128,
    levels=(0.1, 0.2),
)


@pytest.fixture(scope="module")
def language():
    return task.Language(SMALL, seed=3)


@pytest.fixture(scope="module")
def base(language):
    return task.pretrain(language)


@pytest.fixture(scope="module")
def pairs(language, base):
    return task.make_pairs(language, base, 256, stream=0)


@pytest.fixture(scope="module")
def heldout(language, base):
    return task.make_pairs(language, base, 64, stream=1)


@pytest.fixture(scope="module")
def dpo_scores(base, pairs):
    ratios = constructions.log_ratios("dpo", SMALL, base.state_dict(), pairs, seed=0)
    return constructions.score_all(ratios, pairs)


def test_ranks_and_auc_by_hand():
    np.testing.assert_array_equal(average_ranks(np.array([3.0, 1.0, 3.0, 2.0])), [3.5, 1, 3.5, 2])
    # positives 2 and 1, negatives 1 and 0: of four comparisons three are won and one is tied.
    scores, positive = np.array([2.0, 1.0, 1.0, 0.0]), np.array([True, True, False, False])
    assert auc(scores, positive) == 3.5 / 4
    assert auc(-scores, positive) == 1 - 3.5 / 4
    assert auc(np.zeros(4), positive) == 0.5
    assert np.isnan(auc(scores, np.ones(4, dtype=bool)))


def test_auc_is_the_share_of_won_comparisons():
    rng = np.random.default_rng(0)
    scores, positive = rng.integers(0, 5, 40).astype(float), rng.random(40) < 0.4
    won = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    assert auc(scores, positive) == pytest.approx(np.mean(won), abs=1e-12)


def test_spearman_by_hand():
    # ranks 1 2 3 4 against 1 3 2 4: 1 - 6 (1 + 1) / (4 (16 - 1)) = 0.8
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([10.0, 30, 20, 40])) == pytest.approx(0.8)
    # ranks 1 2 3 against 1.5 1.5 3: covariance 1.5, variances 2 and 1.5
    assert spearman(np.array([1.0, 2, 3]), np.array([5.0, 5, 9])) == pytest.approx(1.5 / np.sqrt(3.0))
    assert np.isnan(spearman(np.ones(3), np.arange(3.0)))


def test_a_curve_is_read_between_its_checkpoints_only():
    curve = [(0.0, 1.0, 0.1), (2.0, 3.0, 0.3), (4.0, 3.5, 0.3)]
    assert at_level(curve, 0.5) == pytest.approx((1.5, 0.15))
    assert at_level(curve, 3.0) == pytest.approx((3.25, 0.3))
    assert at_level(curve, 4.1) is None


def test_a_third_of_the_planted_tokens_counts_after_half_of_the_vocabulary(language):
    content = language.reward[task.FIRST_CONTENT :, task.FIRST_CONTENT :]
    counts = (content != 0).sum(0)
    assert sorted(counts[counts > 0]) == [12, 24, 24, 24]
    assert set(np.nonzero(counts)[0] + task.FIRST_CONTENT) == set(language.planted)
    assert (content.max(0) > 0).sum() == (content.min(0) < 0).sum() == 2


def test_rewards_belong_to_the_token_and_the_one_before_it():
    reward = np.zeros((6, 6))
    reward[4, 5], reward[5, 5] = 1.0, -2.0
    np.testing.assert_array_equal(task.answer_rewards(reward, [0, 4], [5, 5, 3]), [1, -2, 0])


def test_styles_prefer_what_they_like(language):
    rng = np.random.default_rng(0)
    means = []
    for tilt in (-1, 0, 1):
        rows = language.sequences(rng, 400, 12, tilt)
        means.append(np.mean([task.answer_rewards(language.reward, row[:1], row[1:]).sum() for row in rows]))
    assert means[0] < means[1] < means[2]


def test_pairs_hold_their_truth_and_lean_to_it(language, pairs):
    example, (chosen, rejected) = pairs.examples[5], pairs.rewards[5]
    start = example.chosen_start
    again = task.answer_rewards(language.reward, example.chosen_ids[:start], example.chosen_ids[start:])
    np.testing.assert_array_equal(again, chosen)
    assert len(example.rejected_ids) - example.rejected_start == len(rejected)
    assert example.chosen_ids[0] == task.BOS
    assert not {task.GOOD, task.BAD} & set(example.chosen_ids[:start])
    assert {len(c) for c, _ in pairs.rewards} == {6, 7, 8}
    assert pairs.accuracy() > 0.75


def test_swapping_exchanges_answers_and_truth(pairs):
    other = task.swapped(pairs)
    assert other.examples[3].chosen_ids == pairs.examples[3].rejected_ids
    np.testing.assert_array_equal(other.rewards[3][0], pairs.rewards[3][1])
    assert task.swapped(other).examples == pairs.examples


def test_a_control_token_stands_behind_bos(pairs):
    batch = next(pairs.batches(4))
    tokens, labels = task.with_control(batch, task.GOOD)
    assert (tokens[:, 1] == task.GOOD).all() and torch.equal(tokens[:, 2:], batch.tokens[:, 1:])
    assert torch.equal(tokens[:, 1:][labels[:, 1:] != -100], batch.tokens[batch.labels != -100])


def test_perfect_and_opposite_scores(heldout):
    truth = [tuple(torch.from_numpy(side) for side in pair) for pair in heldout.rewards]
    measures = constructions.recovery(truth, heldout)
    assert (measures["planted"], measures["sign"]) == (1, 1)
    assert measures["spearman"] == pytest.approx(1)
    opposite = constructions.recovery([(-c, -r) for c, r in truth], heldout)
    assert (opposite["planted"], opposite["sign"]) == (1, 0)


@pytest.mark.parametrize("name", ["prompt", "sft", "dpo"])
def test_constructions_find_the_sign(name, base, pairs, heldout):
    ratios = constructions.log_ratios(name, SMALL, base.state_dict(), pairs, seed=0)
    measures = constructions.recovery(constructions.score_all(ratios, heldout), heldout)
    assert measures["sign"] > 0.6
    assert measures["spearman"] > 0.05


def test_controls_know_nothing(base, pairs, heldout):
    ratios = constructions.log_ratios("uniform", SMALL, base.state_dict(), pairs, seed=0)
    measures = constructions.recovery(constructions.score_all(ratios, heldout), heldout)
    assert (measures["planted"], measures["sign"], measures["spearman"]) == (0.5, 0.5, None)
    ratios = constructions.log_ratios("random", SMALL, base.state_dict(), pairs, seed=0)
    measures = constructions.recovery(constructions.score_all(ratios, heldout), heldout)
    assert abs(measures["spearman"]) < 0.1
    assert measures["mean_abs"] > 0.1


def test_weights_trust_the_right_tokens(pairs, dpo_scores):
    table = frontier.sign_check(dpo_scores, pairs)
    assert table["chosen+"] > table["chosen0"] > table["chosen-"]
    assert table["rejected-"] > table["rejected0"] > table["rejected+"]
    exchanged = frontier.sign_check([(-c, -r) for c, r in dpo_scores], pairs)
    assert exchanged["chosen+"] < exchanged["chosen-"]


def test_weights_reach_their_tokens(pairs, dpo_scores):
    weights = frontier.weights_of(frontier.ARMS["tis"], dpo_scores)
    batch = next(pairs.batches(3))
    placed = frontier.weigher(weights)(batch).weights
    mask = batch.labels[:, 1:] != -100
    assert torch.equal(placed[4][mask[4]], weights[1][1])  # second pair, rejected side
    assert (placed[~mask] == 0).all()
    torch.testing.assert_close(placed.sum(-1) / mask.sum(-1), torch.ones(6))


def test_oracle_weights_help_and_swapped_ones_harm(language, base, pairs, heldout):
    state = base.state_dict()
    truth = frontier.arm_scores(frontier.ARMS["oracle"], pairs, [])
    evaluate = frontier.Evaluation(language, constructions.load(SMALL, state, frozen=True), heldout)
    ends = {}
    for name, scores in (("oracle", truth), ("swapped", truth)):
        points = frontier.run_arm(frontier.ARMS[name], SMALL, state, pairs, scores, evaluate, 0)
        assert [p["step"] for p in points] == [0, 8, 24]
        assert points[0]["kl"] == 0 and 0 < points[1]["kl"] < points[2]["kl"]
        ends[name] = points[2]["reward"] - points[0]["reward"]
    assert ends["oracle"] > 0.3
    assert ends["swapped"] < ends["oracle"] - 0.3


def test_the_run_resumes_and_writes_its_page(tmp_path, monkeypatch, language, base):
    tiny = replace(
        SMALL, pretrain_steps=2, min_steps=1, pair_counts=(32,), frontier_pairs=32, checkpoints=(1, 2)
    )
    results = command.run(tiny, (1,), tmp_path)
    text = report.page(results)
    assert "| dpo | 32 |" in text and "TDPO2's KL" in text
    assert len(report.signs(results)) == 9

    def never(*args, **kwargs):
        raise AssertionError("a finished cell was computed again")

    monkeypatch.setattr(command, "log_ratios", never)
    monkeypatch.setattr(command, "run_arm", never)
    assert report.page(command.run(tiny, (1,), tmp_path)) == text
    with pytest.raises(SystemExit, match="other settings"):
        command.run(SMALL, (1,), tmp_path)
