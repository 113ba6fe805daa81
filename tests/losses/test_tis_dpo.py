import math
from dataclasses import replace

import pytest
import torch
from support.scoring import check_golden, golden, pair_of

from tokenpref.losses import DPOLoss, TISDPOLoss, TokenDPOLoss
from tokenpref.ops import token_stats_from_logits
from tokenpref.stats import PairStats, TokenStats


def weights_of(expected, name):
    full = {
        "w": expected["weights"],
        "eos0": expected["weights_eos0"],
        "ones": torch.ones_like(expected["weights"]),
    }
    return full[name][:, 1:]


def outcome(loss, expected, weights, labels=None):
    logits = expected["logits"].clone().requires_grad_()
    labels = expected["labels"] if labels is None else labels
    pair = pair_of(
        token_stats_from_logits, logits, expected["ref"], labels, weights=weights, needs=loss.needs
    )
    output = loss(pair)
    return output, torch.autograd.grad(output.losses.mean(), logits)[0]


@pytest.mark.parametrize("case", ["a", "b"])
@pytest.mark.parametrize("weights", ["w", "eos0", "ones"])
@pytest.mark.parametrize(
    ("settings", "name"),
    [({}, "tis_b0.1"), ({"alpha": 0.5}, "tis_kl_a0.5_b0.1"), ({"alpha": 1, "beta": 0.3}, "tis_kl_a1_b0.3")],
)
def test_golden(case, weights, settings, name, score):
    expected = golden("tisdpo", f"{case}/")
    setting = f"{weights}/{name}"
    check_golden(TISDPOLoss(**settings), expected, setting, score, weights=weights_of(expected, weights))


@pytest.mark.parametrize("case", ["a", "b"])
def test_golden_weighted_kl_is_in_the_metrics_under_its_own_name(case, score):
    expected = golden("tisdpo", f"{case}/")
    loss = TISDPOLoss(alpha=0.5)
    weights = weights_of(expected, "w")
    pair = pair_of(
        score, expected["logits"], expected["ref"], expected["labels"], weights=weights, needs=loss.needs
    )
    metrics = loss(pair).metrics
    half = weights.shape[0] // 2
    for side, rows in (("chosen", slice(None, half)), ("rejected", slice(half, None))):
        weighted, plain = metrics[f"weighted_kl_policy_ref/{side}"], metrics[f"kl_policy_ref/{side}"]
        torch.testing.assert_close(weighted, expected["w/kl_sum"][rows], atol=1e-12, rtol=0)
        torch.testing.assert_close(plain, expected["ones/kl_sum"][rows], atol=1e-12, rtol=0)
        logps = metrics[f"logps/{side}"]
        torch.testing.assert_close(logps, expected["ones/logps_sum"][rows], atol=1e-12, rtol=0)


def hand_pair(weights=((1.0, 0.5), (2.0,))):
    def answer(ratio, kl, weight):
        row = [torch.tensor([values], dtype=torch.float64) for values in (ratio, kl, weight)]
        mask = torch.ones(1, len(ratio), dtype=torch.bool)
        return TokenStats(
            policy_logps=row[0],
            ref_logps=torch.zeros_like(row[0]),
            kl_policy_ref=row[1],
            weights=row[2],
            mask=mask,
        )

    return PairStats(answer([1.0, 2.0], [0.5, 1.0], weights[0]), answer([-1.0], [0.25], weights[1]))


def test_numbers_by_hand():
    # M = 1*1 + 0.5*2 = 2 and 2*(-1) = -2; K = 1*0.5 + 0.5*1 = 1 and 2*0.25 = 0.5
    plain = TISDPOLoss(beta=0.5)(hand_pair())
    assert plain.losses.item() == pytest.approx(math.log1p(math.exp(-2)), abs=1e-15)  # beta h = 0.5 * 4
    assert (plain.chosen_rewards.item(), plain.rejected_rewards.item()) == (1.0, -1.0)
    # alpha 0.4: h = 4 - 0.4 * (1 - 0.5) = 3.8; rewards 0.5 * (2 - 1) and 0.5 * (-2 - 0.5), without alpha
    centred = TISDPOLoss(beta=0.5, alpha=0.4)(hand_pair())
    assert centred.metrics["rewards/train_margins"].item() == pytest.approx(1.9, abs=1e-15)
    assert (centred.chosen_rewards.item(), centred.rejected_rewards.item()) == (0.5, -1.25)
    assert centred.metrics["weighted_kl_policy_ref/margin"].item() == 0.5
    assert "weighted_kl_policy_ref/margin" not in plain.metrics


def test_weight_metrics_by_hand():
    metrics = TISDPOLoss()(hand_pair()).metrics
    # weights 1, 0.5, 2: sum 3.5, squares 1 + 0.25 + 4 = 5.25; mean 7/6, variance 5.25/3 - 49/36 = 14/36
    assert metrics["weights/mean"].item() == pytest.approx(7 / 6, abs=1e-15)
    assert metrics["weights/std"].item() == pytest.approx(math.sqrt(14) / 6, abs=1e-15)
    assert metrics["weights/ess"].item() == pytest.approx(3.5**2 / (3 * 5.25), abs=1e-15)
    equal = TISDPOLoss()(hand_pair(((3.0, 3.0), (3.0,)))).metrics
    assert equal["weights/ess"].item() == 1.0 and equal["weights/std"].item() == 0.0
    assert TISDPOLoss()(hand_pair(((0.0, 0.0), (0.0,)))).metrics["weights/ess"].item() == 0.0


@pytest.mark.parametrize("case", ["a", "b"])
def test_weights_of_one_are_dpo_bit_for_bit(case):
    expected = golden("tisdpo", f"{case}/")
    tis, tis_gradient = outcome(TISDPOLoss(), expected, weights_of(expected, "ones"))
    dpo, dpo_gradient = outcome(DPOLoss(), expected, None)
    assert torch.equal(tis.losses, dpo.losses) and torch.equal(tis_gradient, dpo_gradient)
    assert torch.equal(tis.chosen_rewards, dpo.chosen_rewards)


def test_eos_weight_of_zero_is_dpo_with_eos_masked():
    expected = golden("tisdpo", "b/")
    labels = expected["labels"]
    weights = torch.where(labels == 1, 0.0, 1.0).double()[:, 1:]
    tis, tis_gradient = outcome(TISDPOLoss(), expected, weights)
    dpo, dpo_gradient = outcome(DPOLoss(), expected, None, torch.where(labels == 1, -100, labels))
    torch.testing.assert_close(tis.losses, dpo.losses, atol=1e-12, rtol=0)
    torch.testing.assert_close(tis_gradient, dpo_gradient, atol=1e-12, rtol=0)


def test_a_constant_weight_is_another_beta():
    expected = golden("tisdpo", "b/")
    weights = torch.full_like(weights_of(expected, "ones"), 2.5)
    tis, tis_gradient = outcome(TISDPOLoss(beta=0.1), expected, weights)
    dpo, dpo_gradient = outcome(DPOLoss(beta=0.25), expected, None)
    torch.testing.assert_close(tis.losses, dpo.losses, atol=1e-12, rtol=0)
    torch.testing.assert_close(tis_gradient, dpo_gradient, atol=1e-12, rtol=0)


def test_with_alpha_1_it_is_the_difference_of_advantages_under_the_policy():
    # h = sum over chosen minus rejected of w_t (r_t - E_{z ~ policy} r_t(z))
    expected = golden("tisdpo", "b/")
    labels, weights = expected["labels"][:, 1:], weights_of(expected, "w")
    ratio = (expected["logits"].log_softmax(-1) - expected["ref"].log_softmax(-1))[:, :-1]
    mean = (expected["logits"].softmax(-1)[:, :-1] * ratio).sum(-1)
    taken = ratio.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    score = torch.where(labels != -100, weights * (taken - mean), 0).sum(-1)
    half = score.shape[0] // 2
    output, _ = outcome(TISDPOLoss(alpha=1), expected, weights)
    margin = output.metrics["rewards/train_margins"]
    torch.testing.assert_close(margin, 0.1 * (score[:half] - score[half:]), atol=1e-12, rtol=0)


def test_settings():
    assert TISDPOLoss().needs == {"ref", "weights"}
    assert TISDPOLoss(alpha=0.5).needs == {"ref", "weights", "kl_policy_ref"}
    with pytest.raises(ValueError, match="alpha must be a finite number >= 0, got -0.5"):
        TISDPOLoss(alpha=-0.5)
    with pytest.raises(ValueError, match="beta must be"):
        TISDPOLoss(beta=-1)


@pytest.mark.parametrize("alpha", [0.5, 1])
def test_reference_kl_with_unit_weights_is_tdpo2(alpha):
    expected = golden("tisdpo", "a/")
    ones = weights_of(expected, "ones")
    tis, tis_gradient = outcome(TISDPOLoss(alpha=alpha, kl="reference"), expected, ones)
    tdpo, tdpo_gradient = outcome(TokenDPOLoss(alpha=alpha), expected, None)
    assert tis.losses.equal(tdpo.losses) and tis.chosen_rewards.equal(tdpo.chosen_rewards)
    assert tis_gradient.equal(tdpo_gradient)


def test_reference_kl_is_not_weighted():
    # hand_pair's M: 2 and -2. F by kl_ref_policy: 0.3 + 0.1 on chosen, 0.7 on rejected; h = 4 - 0.5 (0.7 - 0.4) = 3.85
    pair = hand_pair()
    kl = [torch.tensor([[0.3, 0.1]], dtype=torch.float64), torch.tensor([[0.7]], dtype=torch.float64)]
    sides = [replace(side, kl_ref_policy=f) for side, f in zip((pair.chosen, pair.rejected), kl, strict=True)]
    output = TISDPOLoss(beta=1, alpha=0.5, kl="reference")(PairStats(*sides))
    assert output.metrics["rewards/train_margins"].item() == pytest.approx(3.85, abs=1e-15)
    assert output.rejected_rewards.item() == pytest.approx(-2 + 0.7, abs=1e-15)


def test_unknown_kl_is_refused():
    with pytest.raises(ValueError, match="did you mean 'reference'"):
        TISDPOLoss(alpha=0.5, kl="referense")
