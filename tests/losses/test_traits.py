"""What the package asks of a loss: the attributes of one place, with their defaults."""

import pytest
from torch import nn

from tokenpref.losses import INVARIANTS, LossTraits, NLLLoss, TripletTIDPOLoss
from tokenpref.stats import SIDES


class Plain(nn.Module):
    """As little as a loss may say."""

    needs = frozenset({"ref"})


def with_(**attributes):
    return type("Mine", (Plain,), attributes)()


def test_a_loss_that_says_only_what_it_needs_has_the_defaults():
    assert LossTraits.of(Plain()) == LossTraits(needs=frozenset({"ref"}))
    assert LossTraits.of(Plain()).sides == SIDES and LossTraits.of(Plain()).anchor_grad


def test_what_a_loss_says_counts():
    assert LossTraits.of(NLLLoss("rejected")).sides == ("rejected",)
    found = LossTraits.of(TripletTIDPOLoss(anchor_grad=False))
    assert not found.anchor_grad and "anchor" in found.needs and found.invariants <= INVARIANTS
    assert LossTraits.of(with_(sides=["chosen"])).sides == ("chosen",)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (with_(sides="chosen"), "`sides` of a loss must be 'chosen', 'rejected' or both, found 'chosen'"),
        (with_(sides=("choosen",)), "found .'choosen',."),
        (with_(sides=()), r"found \(\)"),
    ],
)
def test_what_makes_no_sense_is_refused(loss, message):
    with pytest.raises(ValueError, match=message):
        LossTraits.of(loss)
