import math

import pytest
import torch
from support.scoring import golden, pair_of
from torch import nn

from tokenpref.losses import DPOLoss, TISDPOLoss, TripletTIDPOLoss
from tokenpref.stats import PairStats, TokenStats

CODE = {"beta": 0.1, "alpha": 0.5, "gamma": 0.0}
PAPER = {"beta": 0.1, "gamma": 0.0}


def scored(score, expected, logits, loss, **options):
    """The pair of a golden case, without anchor."""
    weights = expected["weights"][:, 1:]
    needs = loss.needs - {"anchor"}
    return pair_of(
        score, logits, expected["ref"], expected["labels"], weights=weights, needs=needs, **options
    )


@pytest.mark.parametrize("case", ["a", "b"])
@pytest.mark.parametrize(
    ("settings", "name"), [(CODE, "base_tdpo2_a0.5_b0.1"), (PAPER, "paper_wdpo_b0.1")], ids=["code", "paper"]
)
def test_golden_without_triplet(case, settings, name, score):
    expected = golden("tidpo", f"{case}/")
    logits = expected["logits"].clone().requires_grad_()
    loss = TripletTIDPOLoss(**settings)
    output = loss(scored(score, expected, logits, loss))
    (gradient,) = torch.autograd.grad(output.losses.mean(), logits)
    found = {"losses": output.losses, "grad": gradient}
    found |= {"chosen_rewards": output.chosen_rewards, "rejected_rewards": output.rejected_rewards}
    compared = {k: v for k, v in found.items() if f"{name}/{k}" in expected}
    assert {"losses", "grad"} <= compared.keys()
    for key, value in compared.items():
        torch.testing.assert_close(value, expected[f"{name}/{key}"], atol=1e-12, rtol=0)


@pytest.mark.parametrize("case", ["a", "b"])
def test_golden_sums(case, score):
    """The margin is weighted; KL and log-probabilities are not."""
    expected = golden("tidpo", f"{case}/")
    loss = TripletTIDPOLoss(beta=1.0, alpha=0.5, gamma=0.0)
    pair = scored(score, expected, expected["logits"], loss)
    half = expected["labels"].shape[0] // 2
    for side, rows in ((pair.chosen, slice(None, half)), (pair.rejected, slice(half, None))):
        found = {
            "wtdpo_margin_sum": loss.log_ratio_sum(side),
            "wtdpo_kl_sum": side.kl_ref_policy.sum(-1),
            "wtdpo_logps_sum": side.policy_logps.sum(-1),
            "wdpo_margin_sum": loss.log_ratio_sum(side),
        }
        for name, value in found.items():
            if name in expected:
                torch.testing.assert_close(value, expected[name][rows], atol=1e-12, rtol=0)


def with_anchor(score, expected, logits, anchor_logits, loss):
    pair = scored(score, expected, logits, loss)
    ids, start = expected["triplet/anchor_ids"], int(expected["triplet/prompt_len"].flatten()[0])
    labels = expected["triplet/anchor_labels"] if "triplet/anchor_labels" in expected else ids.clone()
    labels = torch.where(torch.arange(labels.shape[1]) < start, -100, labels)
    labels = torch.where(labels == 0, -100, labels)  # padding
    anchor = score(anchor_logits, expected["triplet/anchor_ref"], labels, needs=frozenset({"ref"}))
    return PairStats(pair.chosen, pair.rejected, anchor)


@pytest.mark.parametrize("case", ["a", "b"])
@pytest.mark.parametrize("margin", [0.1, 0.001, 50.0])
def test_golden_triplet(case, margin, score):
    """Mean over pairs of gamma * hinge: the release adds the batch mean to every pair, which has the same mean."""
    expected = golden("tidpo", f"{case}/")
    logits = expected["logits"].clone().requires_grad_()
    anchor_logits = expected["triplet/anchor_logits"].clone().requires_grad_()
    plain, triplet = TripletTIDPOLoss(gamma=0), TripletTIDPOLoss(gamma=1, margin=margin)
    pair = with_anchor(score, expected, logits, anchor_logits, triplet)
    without, output = plain(pair), triplet(pair)
    value = output.metrics["triplet/loss"]
    name = f"triplet/m{margin:g}" if f"triplet/m{margin:g}/loss" in expected else f"triplet/m{margin}"
    torch.testing.assert_close(value.mean(), expected[f"{name}/loss"].squeeze(), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(output.losses, without.losses + value, atol=1e-12, rtol=0)
    if not value.any():
        return
    grads = torch.autograd.grad((output.losses - without.losses).mean(), (anchor_logits, logits))
    for found, key in zip(grads, ("grad_anchor", "grad_cr"), strict=True):
        torch.testing.assert_close(found, expected[f"{name}/{key}"], atol=1e-12, rtol=0)


def answer(ratios, mask=None, weights=None):
    values = torch.tensor([ratios], dtype=torch.float64).requires_grad_()
    mask = (
        torch.ones(values.shape, dtype=torch.bool) if mask is None else torch.tensor([mask], dtype=torch.bool)
    )
    weights = torch.ones_like(values) if weights is None else torch.tensor([weights], dtype=torch.float64)
    stats = TokenStats(policy_logps=values, ref_logps=torch.zeros_like(values), mask=mask, weights=weights)
    return stats, values


def hand_pair():
    chosen, b = answer([0.0, 1.0, 2.0], mask=[False, True, True])
    rejected, c = answer([-1.0, -1.0, 3.0])
    anchor, d = answer([0.5, 0.0, 9.0], mask=[True, True, False])
    return PairStats(chosen, rejected, anchor), b, c, d


@pytest.mark.parametrize(
    ("normalization", "near", "far"),
    [("none", 4.25, 3.25), ("tokens", 4.25 / 2, 3.25 / 3), ("overlap", 4.25 / 2, 3.25 / 2)],
)
def test_triplet_by_hand(normalization, near, far):
    # packed: chosen 1 2, rejected -1 -1 3, anchor 0.5 0
    # to chosen (0.5 - 1)^2 + (0 - 2)^2 = 4.25; to rejected (0.5 + 1)^2 + (0 + 1)^2 = 3.25, the third is beyond the anchor
    pair, b, c, d = hand_pair()
    loss = TripletTIDPOLoss(beta=0.5, gamma=0.2, margin=0.3, length_normalization=normalization)
    output = loss(pair)
    metrics = {k: v.item() for k, v in output.metrics.items()}
    assert metrics["triplet/distance/chosen"] == pytest.approx(near, abs=1e-15)
    assert metrics["triplet/distance/rejected"] == pytest.approx(far, abs=1e-15)
    assert metrics["triplet/loss"] == pytest.approx(near - far + 0.3, abs=1e-15)
    assert metrics["triplet/active"] == 1.0
    # M = 3 and 1: beta h = 1
    expected = math.log1p(math.exp(-1)) + 0.2 * (near - far + 0.3)
    assert output.losses.item() == pytest.approx(expected, abs=1e-15)
    if normalization == "none":
        output.losses.sum().backward()
        slope = -0.5 / (1 + math.exp(1))
        # chosen -2 (d - b), rejected +2 (d - c), anchor 2 (d - b) - 2 (d - c), all times gamma
        torch.testing.assert_close(
            b.grad, torch.tensor([[0, slope + 0.2 * 1.0, slope + 0.2 * 4.0]], dtype=torch.float64)
        )
        torch.testing.assert_close(
            c.grad, torch.tensor([[-slope + 0.2 * 3.0, -slope + 0.2 * 2.0, -slope]], dtype=torch.float64)
        )
        torch.testing.assert_close(
            d.grad, torch.tensor([[0.2 * (-1.0 - 3.0), 0.2 * (-4.0 - 2.0), 0]], dtype=torch.float64)
        )


def test_no_gradient_through_the_anchor_when_it_is_switched_off():
    pair, b, _, d = hand_pair()
    with_gradient, without = TripletTIDPOLoss(), TripletTIDPOLoss(anchor_grad=False)
    assert torch.equal(with_gradient(pair).losses, without(pair).losses)
    without(pair).losses.sum().backward()
    assert d.grad is None and b.grad.any()


def test_at_the_reference_the_triplet_is_its_margin_and_has_no_gradient():
    sides = [answer([0.0] * n) for n in (3, 2, 4)]
    output = TripletTIDPOLoss(gamma=0.5, margin=0.2)(PairStats(*(stats for stats, _ in sides)))
    assert output.losses.item() == math.log(2) + 0.5 * 0.2
    (output.losses - math.log(2)).sum().backward()
    plain = 0.1 / 2  # beta sigmoid(0), the margin's own part
    assert torch.equal(sides[0][1].grad, torch.full((1, 3), -plain, dtype=torch.float64))
    assert not sides[2][1].grad.any()


def triplet_of(chosen, rejected, anchor, **settings):
    pair = PairStats(*(answer(values)[0] for values in (chosen, rejected, anchor)))
    return TripletTIDPOLoss(**settings)(pair).metrics["triplet/loss"].item()


def test_special_anchors():
    one, two = [0.5, -1.0], [2.0, 1.0]
    far = 1.5**2 + 2.0**2
    assert triplet_of(one, two, one, margin=0.1) == 0.0  # far away from rejected: closed
    assert triplet_of(one, two, one, margin=7.0) == pytest.approx(7.0 - far, abs=1e-15)
    assert triplet_of(one, two, two, margin=0.1) == pytest.approx(far + 0.1, abs=1e-15)
    assert triplet_of(one, one, one, margin=0.1) == 0.1
    assert triplet_of(one, two, [2.0], margin=0.0) == pytest.approx(1.5**2, abs=1e-15)  # margin 0 is not off
    values = [triplet_of(one, two, [1.0, 0.5], margin=m) for m in (0, 0.5, 1, 5)]
    assert values == sorted(values)


@pytest.mark.parametrize("normalization", ["none", "tokens", "overlap"])
def test_an_anchor_without_tokens_costs_its_margin_and_moves_nothing(normalization):
    chosen, b = answer([1.0, 2.0])
    rejected, _ = answer([0.0, 1.0])
    anchor, d = answer([3.0], mask=[False])
    pair = PairStats(chosen, rejected, anchor)
    output = TripletTIDPOLoss(gamma=1.0, margin=0.25, length_normalization=normalization)(pair)
    assert output.metrics["triplet/loss"].item() == 0.25
    (output.losses - DPOLoss()(pair).losses).sum().backward()
    assert not b.grad.any() and not d.grad.any()


def test_columns_of_the_answer_do_not_matter():
    """Log ratios are compared by their place in the answer: a common prompt or other padding changes nothing."""

    def shifted(ratios, by, width):
        padding = [7.0] * by
        rest = [7.0] * (width - by - len(ratios))
        mask = [False] * by + [True] * len(ratios) + [False] * len(rest)
        return answer([*padding, *ratios, *rest], mask=mask)[0]

    loss = TripletTIDPOLoss(margin=1.0)
    plain = loss(PairStats(shifted([1.0, 2.0], 0, 2), shifted([0.5], 0, 1), shifted([0.0, 0.3, 1.0], 0, 3)))
    moved = loss(PairStats(shifted([1.0, 2.0], 3, 8), shifted([0.5], 1, 4), shifted([0.0, 0.3, 1.0], 5, 9)))
    assert torch.equal(plain.losses, moved.losses)


def test_paper_form_is_tis_dpo_with_the_same_weights():
    generator = torch.Generator().manual_seed(0)

    def side(columns):
        values = [torch.rand(3, columns, dtype=torch.float64, generator=generator) for _ in range(3)]
        mask = torch.ones(3, columns, dtype=torch.bool)
        return TokenStats(policy_logps=-values[0], ref_logps=-values[1], weights=values[2], mask=mask)

    pair = PairStats(side(4), side(5))
    assert torch.equal(TripletTIDPOLoss(gamma=0)(pair).losses, TISDPOLoss()(pair).losses)


def test_needs_and_settings():
    assert TripletTIDPOLoss().needs == {"ref", "weights", "anchor"}
    assert TripletTIDPOLoss(gamma=0).needs == {"ref", "weights"}
    assert TripletTIDPOLoss(gamma=0, alpha=0.5).needs == {"ref", "weights", "kl_ref_policy"}
    assert isinstance(TripletTIDPOLoss(), nn.Module)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": -0.1}, "gamma must be a finite number >= 0, got -0.1"),
        ({"margin": -1}, "margin must be a finite number >= 0, got -1"),
        ({"alpha": -1}, "alpha must be"),
        ({"beta": 0}, "beta must be"),
        ({"length_normalization": "token"}, "did you mean 'tokens'"),
        ({"anchor_grad": "no"}, "anchor_grad must be true or false, got 'no'"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        TripletTIDPOLoss(**settings)
