import math

import pytest
import torch
from support.scoring import check_golden, golden

from tokenpref.losses import DPOLoss
from tokenpref.stats import PairStats, TokenStats


def answer(policy, ref):
    ones = torch.ones(1, len(policy), dtype=torch.bool)
    as_row = [torch.tensor([values], dtype=torch.float64) for values in (policy, ref)]
    return TokenStats(policy_logps=as_row[0], ref_logps=as_row[1], mask=ones)


@pytest.mark.parametrize("case", ["a", "b"])
@pytest.mark.parametrize(
    ("settings", "name"), [({}, "dpo_b0.1"), ({"beta": 0.3, "label_smoothing": 0.1}, "dpo_b0.3_ls0.1")]
)
def test_golden(case, settings, name, score):
    check_golden(DPOLoss(**settings), golden("tisdpo", f"{case}/"), name, score)


def test_numbers_by_hand():
    # M(chosen) = (-1 + 2) + (-2 + 3) = 2, M(rejected) = -3 + 1 = -2: h = 4, beta h = 2 with beta 1/2
    pair = PairStats(answer([-1.0, -2.0], [-2.0, -3.0]), answer([-3.0], [-1.0]))
    output = DPOLoss(beta=0.5)(pair)
    assert output.losses.item() == pytest.approx(math.log1p(math.exp(-2)), abs=1e-15)
    assert output.chosen_rewards.item() == 1.0 and output.rejected_rewards.item() == -1.0
    assert output.metrics["rewards/train_margins"].item() == 2.0
    assert output.metrics["logps/chosen"].item() == -3.0 and output.metrics["logps/rejected"].item() == -3.0
    # label smoothing 1/4: 3/4 softplus(-2) + 1/4 softplus(2)
    smooth = DPOLoss(beta=0.5, label_smoothing=0.25)(pair).losses.item()
    expected = 0.75 * math.log1p(math.exp(-2)) + 0.25 * math.log1p(math.exp(2))
    assert smooth == pytest.approx(expected, abs=1e-15)


def test_long_margins_are_exact_in_float64():
    # beta h = 21: log1p(exp(-21)) = 7.582560e-10; a softplus that turns linear at 20 gives 0 for the other side's rest
    output = DPOLoss(beta=1.0)(PairStats(answer([0.0], [21.0]), answer([0.0], [0.0])))
    assert output.losses.item() == 21 + math.log1p(math.exp(-21)) > 21


def test_needs_the_reference_only():
    assert DPOLoss().needs == {"ref"}


@pytest.mark.parametrize("beta", [0, -0.1, math.inf, math.nan, "0.1", True])
def test_beta_must_be_positive_and_finite(beta):
    with pytest.raises(ValueError, match="beta must be a finite number > 0, got"):
        DPOLoss(beta=beta)


@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 1, math.nan])
def test_label_smoothing_must_be_below_a_half(smoothing):
    with pytest.raises(ValueError, match="label_smoothing must be a finite number >= 0 and < 0.5, got"):
        DPOLoss(label_smoothing=smoothing)
