from dataclasses import replace

import numpy as np
import pytest
import torch
from support import small, workers

from tokenpref.distributed import single_process_world
from tokenpref.distributed.testing import run_distributed
from tokenpref.errors import TrainingDiverged
from tokenpref.losses import DPOLoss, NLLLoss, TokenDPOLoss, TripletTIDPOLoss
from tokenpref.training.step.train_step import train_step

ROWS = [0, 1, 2, 3, 4]


def alone(loss, split, **kwargs):
    return workers.one_step(single_process_world(), loss, [split], **kwargs)


def assert_same(one, other, tolerance=1e-12):
    assert one["pairs"] == other["pairs"] and one["tokens"] == other["tokens"]
    assert one["norm"] == pytest.approx(other["norm"], rel=1e-12)
    for name, value in one["metrics"].items():
        assert other["metrics"][name] == pytest.approx(value, rel=1e-12, abs=1e-12), name
    for name, tensor in one["state"].items():
        np.testing.assert_allclose(other["state"][name], tensor, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("loss", [TokenDPOLoss(), TripletTIDPOLoss(gamma=0.5)], ids=["tdpo", "triplet"])
@pytest.mark.parametrize("tied", [True, False])
def test_micro_batches_equal_one_batch(tied, loss):
    assert_same(alone(loss, [ROWS], tied=tied), alone(loss, [[0, 1], [2], [3, 4]], tied=tied))


def test_a_loss_sees_all_pairs_of_a_micro_batch():
    seen = []

    def loss(pair):
        seen.append(pair.chosen.mask.shape[0])
        return DPOLoss()(pair)

    loss.needs = DPOLoss().needs
    found = alone(loss, [[0, 1, 2], [3, 4]], tied=True)
    assert seen == [3, 2]
    assert_same(found, alone(DPOLoss(), [[0, 1, 2], [3, 4]], tied=True))


def test_a_loss_that_learns_sees_all_pairs_and_gets_its_gradient():
    class Learned(DPOLoss):
        def __init__(self):
            super().__init__()
            self.margin = torch.nn.Parameter(torch.zeros(()))

        def forward(self, pair):
            output = super().forward(pair)
            return replace(output, losses=output.losses + self.margin)

    loss = Learned()
    alone(loss, [[0, 1, 2], [3, 4]], tied=True)
    assert float(loss.margin.grad) == 1


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_leaving_out_the_side_that_a_loss_does_not_read_changes_nothing(side):
    loss, whole = NLLLoss(side), NLLLoss(side)
    whole.sides = ("chosen", "rejected")
    part, both = alone(loss, [[0, 1, 2], []], tied=True), alone(whole, [[0, 1, 2], []], tied=True)
    assert part["tokens"] < both["tokens"]
    assert_same({**part, "tokens": 0}, {**both, "tokens": 0})


def test_a_filler_micro_batch_adds_exactly_nothing():
    loss = TokenDPOLoss()
    whole, padded = alone(loss, [ROWS], tied=True), alone(loss, [ROWS, []], tied=True)
    assert whole["metrics"] == padded["metrics"]
    for name in whole["state"]:
        np.testing.assert_array_equal(whole["state"][name], padded["state"][name])


@pytest.mark.parametrize(
    ("loss", "tied", "reshard", "split"),
    [
        (TokenDPOLoss(), True, True, [[[0, 1, 2]], [[3, 4]]]),  # unequal pairs
        (
            TokenDPOLoss(variant="tdpo1"),
            False,
            True,
            [[[0, 1], [2]], [[3, 4], []]],
        ),  # a rank without pairs, two micros
        (NLLLoss("rejected"), True, True, [[[0, 1, 2]], [[3, 4]]]),  # one side alone
        (TripletTIDPOLoss(gamma=0.5), True, True, [[[0, 1], [2]], [[3, 4], []]]),
        (TripletTIDPOLoss(gamma=0.5, alpha=0.5), False, True, [[[0, 1, 2]], [[3, 4]]]),
        (TripletTIDPOLoss(gamma=0.5, anchor_grad=False), True, True, [[ROWS], [[]]]),
        (DPOLoss(), True, False, [[ROWS], [[]]]),  # a rank without any pair; the reference scores itself
    ],
)
def test_two_ranks_equal_one_process(loss, tied, reshard, split):
    one = alone(loss, [ROWS], tied=tied)
    two = run_distributed(workers.one_step, loss, split, tied, reshard)[0]
    assert_same(one, two)


def test_weights_change_and_only_the_policys():
    scorer, frozen = small.scorer(0), small.reference(1)
    before = [p.clone() for p in frozen.scorer.model.parameters()]
    start = [p.clone() for p in scorer.model.parameters()]
    optimizer = torch.optim.SGD(scorer.model.parameters(), lr=0.1)
    world = single_process_world()
    loss = TokenDPOLoss()
    train_step(
        scorer,
        frozen,
        loss,
        optimizer,
        [small.batch(ROWS)],
        world,
        step=1,
        needs=loss.needs,
        weigh=lambda b: None,
    )
    assert all(torch.equal(a, b) for a, b in zip(before, frozen.scorer.model.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(start, scorer.model.parameters(), strict=True))


def test_starting_at_the_reference_gives_log_two_and_no_reward_to_the_bit():
    scorer, frozen = small.scorer(0), small.reference(0)
    for loss in (DPOLoss(), TokenDPOLoss(), TokenDPOLoss(variant="tdpo1")):
        optimizer = torch.optim.SGD(scorer.model.parameters(), lr=0.0)
        result = train_step(
            scorer,
            frozen,
            loss,
            optimizer,
            [small.batch(ROWS)],
            single_process_world(),
            step=1,
            needs=loss.needs,
            weigh=lambda b: None,
        )
        metrics = result.sums.reduce(single_process_world())
        assert metrics["loss"] == float(torch.tensor(2.0, dtype=torch.float64).log())
        assert metrics["rewards/margins"] == 0.0 and metrics["rewards/accuracies"] == 0.0


def test_non_finite_loss_stops_before_the_update_and_names_the_row():
    scorer, frozen = small.scorer(0), small.reference(1)
    start = [p.clone() for p in scorer.model.parameters()]
    loss = DPOLoss()

    def spoiled(pair):
        output = loss(pair)
        return replace(output, losses=output.losses + torch.tensor([0.0, float("inf"), 0.0]))

    with pytest.raises(
        TrainingDiverged, match=r"step 3: the loss of rows \[8\] is not finite.*Rows.*\[7, 8, 9\]"
    ):
        train_step(
            scorer,
            frozen,
            spoiled,
            torch.optim.SGD(scorer.model.parameters(), lr=0.1),
            [small.batch([7, 8, 9])],
            single_process_world(),
            step=3,
            needs=loss.needs,
            weigh=lambda b: None,
        )
    assert all(torch.equal(a, b) for a, b in zip(start, scorer.model.parameters(), strict=True))


def test_nan_on_one_rank_stops_both():
    messages = run_distributed(workers.nan_on_one_rank, DPOLoss())
    for message in messages:
        assert message.startswith("unmoved: step 7: the loss of rows [1] is not finite")


def test_anchors_in_the_pairs_forward_or_in_their_own_give_the_same_loss():
    """And without gradient through them the anchor's rows move nothing."""
    joint, apart = (TripletTIDPOLoss(gamma=0.5, anchor_grad=grad) for grad in (True, False))
    one, two = alone(joint, [ROWS], tied=True), alone(apart, [ROWS], tied=True)
    assert one["metrics"] == pytest.approx(two["metrics"], rel=1e-12)
    assert one["norm"] != pytest.approx(two["norm"], rel=1e-3)
    assert one["metrics"]["anchors/empty"] == 2 / 5 and one["metrics"]["triplet/active"] > 0
    assert one["metrics"]["anchors/tokens"] == (0 + 4 + 2 + 0 + 4) / 5


def test_weights_and_anchors_come_before_any_graph():
    """All micro-batches are prepared while no gradient of this step exists."""
    scorer, loss = small.scorer(0), TripletTIDPOLoss()
    seen = []

    def watched(name, make):
        def look(batch):
            seen.append((name, all(p.grad is None for p in scorer.model.parameters())))
            return make(batch)

        return look

    train_step(
        scorer,
        small.reference(1),
        loss,
        torch.optim.SGD(scorer.model.parameters(), lr=0.1),
        [small.batch([0]), small.batch([1])],
        single_process_world(),
        step=1,
        needs=loss.needs,
        weigh=watched("weights", small.weights),
        anchor=watched("anchors", small.anchors),
    )
    assert seen == [("weights", True), ("anchors", True)] * 2
