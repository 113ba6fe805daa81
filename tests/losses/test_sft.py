import pytest
import torch

from tokenpref.losses import NLLLoss
from tokenpref.stats import PairStats, TokenStats


def pair():
    chosen = torch.tensor([[-1.0, -2.0, -6.0], [-4.0, 0.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    rejected = torch.tensor([[-3.0], [-5.0], [-7.0]], requires_grad=True)
    mask = torch.tensor([[True] * 3, [True, False, False], [False] * 3])
    return (
        chosen,
        rejected,
        PairStats(
            TokenStats(policy_logps=chosen, mask=mask),
            TokenStats(policy_logps=rejected, mask=torch.ones(3, 1, dtype=torch.bool)),
        ),
    )


def test_mean_over_the_answers_tokens():
    chosen, rejected, stats = pair()
    output = NLLLoss()(stats)
    # (1 + 2 + 6) / 3 = 3; 4 / 1; no token: 0
    assert output.losses.tolist() == [3.0, 4.0, 0.0]
    output.losses.sum().backward()
    assert chosen.grad.tolist() == [[pytest.approx(-1 / 3)] * 3, [-1, 0, 0], [0, 0, 0]]
    assert rejected.grad is None


def test_the_other_side():
    chosen, rejected, stats = pair()
    output = NLLLoss(side="rejected")(stats)
    assert output.losses.tolist() == [3.0, 5.0, 7.0]
    output.losses.sum().backward()
    assert rejected.grad.tolist() == [[-1.0]] * 3 and chosen.grad is None


def test_a_likelihood_has_no_reward_and_no_margin():
    output = NLLLoss()(pair()[2])
    assert output.chosen_rewards.tolist() == output.rejected_rewards.tolist() == [0.0] * 3
    assert "rewards/train_margins" not in output.metrics
    assert output.metrics["logps/chosen"].tolist() == [-9.0, -4.0, 0.0]
    assert "logps/rejected" not in output.metrics  # the side that it does not read may not have been scored


def test_needs_nothing():
    assert NLLLoss().needs == frozenset()


def test_side_is_checked():
    with pytest.raises(
        ValueError, match="side must be one of 'chosen', 'rejected', got 'reject'; did you mean 'rejected'"
    ):
        NLLLoss(side="reject")
