import math

import pytest
import torch
from support.scoring import check_golden, golden, pair_of

from tokenpref.losses import DPOLoss, TokenDPOLoss
from tokenpref.ops import token_stats_from_logits
from tokenpref.stats import PairStats, TokenStats

KL = frozenset({"kl_ref_policy"})


def gradient_of(loss, expected, needs=KL):
    logits = expected["logits"].clone().requires_grad_()
    pair = pair_of(
        token_stats_from_logits, logits, expected["ref"], expected["labels"], needs=loss.needs | needs
    )
    output = loss(pair)
    return output, torch.autograd.grad(output.losses.mean(), logits)[0]


@pytest.mark.parametrize("case", ["a", "b"])
@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"variant": "tdpo1"}, "tdpo1_b0.1"),
        ({"variant": "tdpo1", "beta": 0.5}, "tdpo1_b0.5"),
        ({"alpha": 0}, "tdpo2_a0_b0.1"),
        ({}, "tdpo2_a0.5_b0.1"),
        ({"alpha": 1, "beta": 0.5}, "tdpo2_a1_b0.5"),
    ],
)
def test_golden(case, settings, name, score):
    # The published rewards hold the KL for any alpha; with alpha 0 the loss does not ask for it.
    check_golden(TokenDPOLoss(**settings), golden("tdpo", f"{case}/"), name, score, more=KL)


@pytest.mark.parametrize("case", ["a", "b"])
def test_golden_sums_are_in_the_metrics(case, score):
    expected = golden("tdpo", f"{case}/")
    pair = pair_of(score, expected["logits"], expected["ref"], expected["labels"], needs=KL | {"ref"})
    metrics = TokenDPOLoss()(pair).metrics
    half = expected["kl_sum"].shape[0] // 2
    for side, rows in (("chosen", slice(None, half)), ("rejected", slice(half, None))):
        torch.testing.assert_close(
            metrics[f"kl_ref_policy/{side}"], expected["kl_sum"][rows], atol=1e-12, rtol=0
        )
        torch.testing.assert_close(metrics[f"logps/{side}"], expected["logps_sum"][rows], atol=1e-12, rtol=0)
    margin = metrics["kl_ref_policy/chosen"] - metrics["kl_ref_policy/rejected"]
    assert torch.equal(metrics["kl_ref_policy/margin"], margin)


def hand_pair():
    def answer(ratio, kl):
        return TokenStats(
            policy_logps=torch.tensor([ratio], dtype=torch.float64),
            ref_logps=torch.zeros(1, len(ratio), dtype=torch.float64),
            kl_ref_policy=torch.tensor([kl], dtype=torch.float64),
            mask=torch.ones(1, len(ratio), dtype=torch.bool),
        )

    return PairStats(answer([1.0, 2.0], [0.5, 0.25]), answer([-1.0], [2.0]))


def test_numbers_by_hand():
    # M = 3 and -1, F = 0.75 and 2.
    one = TokenDPOLoss(beta=0.5, variant="tdpo1")(hand_pair())
    # tdpo1: h = 3 + 1 - (2 - 0.75) = 2.75; rewards 0.5 * 3.75 and 0.5 * 1
    assert one.metrics["rewards/train_margins"].item() == 1.375
    assert one.losses.item() == pytest.approx(math.log1p(math.exp(-1.375)), abs=1e-15)
    assert (one.chosen_rewards.item(), one.rejected_rewards.item()) == (1.875, 0.5)
    # tdpo2, alpha 0.4: h = 4 - 0.4 * 1.25 = 3.5; the rewards are those of tdpo1
    two = TokenDPOLoss(beta=0.5, alpha=0.4)(hand_pair())
    assert two.metrics["rewards/train_margins"].item() == 1.75
    assert (two.chosen_rewards.item(), two.rejected_rewards.item()) == (1.875, 0.5)


@pytest.mark.parametrize("case", ["a", "b"])
def test_tdpo2_without_alpha_is_dpo(case):
    expected = golden("tdpo", f"{case}/")
    dpo, dpo_gradient = gradient_of(DPOLoss(), expected)
    tdpo, tdpo_gradient = gradient_of(TokenDPOLoss(alpha=0), expected)
    assert torch.equal(tdpo.losses, dpo.losses) and torch.equal(tdpo_gradient, dpo_gradient)


def test_without_alpha_the_rewards_hold_a_kl_only_if_it_was_computed():
    expected = golden("tdpo", "b/")
    loss = TokenDPOLoss(alpha=0)
    assert loss.needs == {"ref"}
    bare, _ = gradient_of(loss, expected, needs=frozenset())
    dpo, _ = gradient_of(DPOLoss(), expected)
    assert torch.equal(bare.chosen_rewards, dpo.chosen_rewards)


@pytest.mark.parametrize("case", ["a", "b"])
def test_tdpo1_and_tdpo2_at_alpha_1_differ_in_the_chosen_gradient_only(case):
    expected = golden("tdpo", f"{case}/")
    one, one_gradient = gradient_of(TokenDPOLoss(variant="tdpo1"), expected)
    two, two_gradient = gradient_of(TokenDPOLoss(alpha=1), expected)
    assert torch.equal(one.losses, two.losses)
    half = one_gradient.shape[0] // 2
    assert torch.equal(one_gradient[half:], two_gradient[half:])
    assert (one_gradient[:half] - two_gradient[:half]).abs().max() > 1e-3


def test_tdpo2_chosen_gradient_is_dpos_up_to_the_pairs_factor():
    # s w (e_y - p) with s = -(beta / B) sigmoid(-beta h): only h differs from DPO's, so the rows are proportional.
    expected = golden("tdpo", "b/")
    half = expected["labels"].shape[0] // 2
    dpo, dpo_gradient = gradient_of(DPOLoss(), expected)
    two, two_gradient = gradient_of(TokenDPOLoss(), expected)
    factor = [torch.sigmoid(-o.metrics["rewards/train_margins"])[:, None, None] for o in (two, dpo)]
    torch.testing.assert_close(
        two_gradient[:half] / factor[0], dpo_gradient[:half] / factor[1], atol=1e-13, rtol=1e-10
    )


def test_tdpo1_is_the_difference_of_advantages_under_the_reference():
    # h = sum over chosen minus rejected of r_t - E_{z ~ ref} r_t(z)
    expected = golden("tdpo", "b/")
    labels = expected["labels"][:, 1:]
    ratio = (expected["logits"].log_softmax(-1) - expected["ref"].log_softmax(-1))[:, :-1]
    mean = (expected["ref"].softmax(-1)[:, :-1] * ratio).sum(-1)
    taken = ratio.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    score = torch.where(labels != -100, taken - mean, 0).sum(-1)
    half = score.shape[0] // 2
    output, _ = gradient_of(TokenDPOLoss(variant="tdpo1"), expected)
    margin = output.metrics["rewards/train_margins"]
    torch.testing.assert_close(margin, 0.1 * (score[:half] - score[half:]), atol=1e-12, rtol=0)


def test_settings():
    assert TokenDPOLoss().alpha == 0.5 and TokenDPOLoss().variant == "tdpo2"
    assert TokenDPOLoss().needs == TokenDPOLoss(variant="tdpo1").needs == {"ref", "kl_ref_policy"}


def test_faulty_settings():
    with pytest.raises(ValueError, match="variant 'tdpo1' has no alpha, got alpha=0.5"):
        TokenDPOLoss(variant="tdpo1", alpha=0.5)
    with pytest.raises(
        ValueError, match=r"variant must be one of 'tdpo1', 'tdpo2', got 'tpdo2'; did you mean 'tdpo2'\?"
    ):
        TokenDPOLoss(variant="tpdo2")
    with pytest.raises(ValueError, match="alpha must be a finite number >= 0, got -1"):
        TokenDPOLoss(alpha=-1)
    with pytest.raises(ValueError, match="beta must be"):
        TokenDPOLoss(beta=0)
