import math

import pytest
import torch

from tokenpref.stats import NEEDS, STATISTICS, LossOutput, PairStats, TokenStats

MASK = torch.tensor([[True, True, False], [True, False, False]])


def stats(**values):
    return TokenStats(policy_logps=torch.full((2, 3), -1.0), mask=MASK, **values)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ["policy_logps", "kl_ref_policy", "kl_policy_ref", "entropy"])
def test_outside_the_mask_value_and_gradient_are_zero_whatever_stood_there(bad, name):
    value = torch.full((2, 3), -2.0).masked_fill(~MASK, bad).requires_grad_()
    kept = getattr(TokenStats(**{"policy_logps": torch.zeros(2, 3), "mask": MASK, name: value}), name)
    assert torch.equal(kept, torch.where(MASK, -2.0, 0.0))
    (kept * kept).sum().backward()
    assert torch.equal(value.grad, torch.where(MASK, -4.0, 0.0))  # d x^2 = 2 * -2


@pytest.mark.parametrize("name", ["ref_logps", "weights"])
def test_reference_and_weights_carry_no_gradient(name):
    kept = stats(**{name: torch.ones(2, 3, requires_grad=True)})
    assert not getattr(kept, name).requires_grad


@pytest.mark.parametrize(
    ("given", "kept"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_half_precision_becomes_float32_and_float64_stays(given, kept):
    assert stats(entropy=torch.ones(2, 3, dtype=given)).entropy.dtype == kept


def test_arguments_are_keywords():
    with pytest.raises(TypeError):
        TokenStats(torch.zeros(2, 3), mask=MASK)


@pytest.mark.parametrize("name", ["ref_logps", "weights", "kl_ref_policy", "kl_policy_ref", "entropy"])
def test_other_shapes_are_refused_by_name(name):
    with pytest.raises(ValueError, match=rf"{name} must have the mask's shape \[2, 3\], got \[2, 4\]"):
        stats(**{name: torch.zeros(2, 4)})


def test_mask_must_be_a_bool_matrix():
    with pytest.raises(ValueError, match="mask must be a bool tensor, got torch.int64"):
        TokenStats(policy_logps=torch.zeros(2, 3), mask=MASK.long())
    with pytest.raises(ValueError, match=r"shape \[B, T\], got \[3\]"):
        TokenStats(policy_logps=torch.zeros(3), mask=MASK[0])


def test_integers_are_refused():
    with pytest.raises(ValueError, match="weights must be a floating point tensor, got torch.int64"):
        stats(weights=torch.ones(2, 3, dtype=torch.int64))


@pytest.mark.parametrize("name", sorted(STATISTICS))
def test_require_returns_the_statistic_or_names_it(name):
    value = torch.full((2, 3), 0.5)
    assert torch.equal(stats(**{STATISTICS[name]: value}).require(name), value * MASK)
    with pytest.raises(ValueError, match=f"the statistic '{name}' .* is missing"):
        stats().require(name)


def test_log_ratio_and_lengths():
    both = stats(ref_logps=torch.full((2, 3), -1.5))
    assert torch.equal(both.log_ratio, torch.where(MASK, 0.5, 0.0))
    assert both.lengths.tolist() == [2, 1]
    with pytest.raises(ValueError, match="'ref'"):
        _ = stats().log_ratio


def test_needs_are_the_statistics_and_the_anchor():
    assert NEEDS == {"ref", "weights", "kl_ref_policy", "kl_policy_ref", "entropy", "anchor"}


def test_sides_may_differ_in_columns_but_not_in_rows():
    longer = TokenStats(policy_logps=torch.zeros(2, 5), mask=torch.ones(2, 5, dtype=torch.bool))
    assert PairStats(stats(), longer).anchor is None
    one = TokenStats(policy_logps=torch.zeros(1, 3), mask=MASK[:1])
    with pytest.raises(ValueError, match=r"same number of answers B, got .*'chosen': 2, 'rejected': 1"):
        PairStats(stats(), one)
    with pytest.raises(ValueError, match="'anchor': 1"):
        PairStats(stats(), longer, one)


def test_missing_anchor_is_named():
    with pytest.raises(ValueError, match="'anchor'"):
        PairStats(stats(), stats()).require_anchor()
    assert PairStats(stats(), stats(), both := stats()).require_anchor() is both


def test_output_detaches_all_but_the_losses():
    x = torch.ones(2, requires_grad=True)
    output = LossOutput(x * 2, x * 3, x * 4, {"m": x * 5})
    assert output.losses.requires_grad
    assert not any(
        t.requires_grad for t in (output.chosen_rewards, output.rejected_rewards, output.metrics["m"])
    )


def test_output_is_one_number_per_pair():
    x = torch.ones(2)
    with pytest.raises(ValueError, match=r"losses must be one number per pair, \[B\], got \[\]"):
        LossOutput(x.sum(), x, x)
    with pytest.raises(ValueError, match="rejected_rewards"):
        LossOutput(x, x, x.sum())
    with pytest.raises(ValueError, match="metric 'm'"):
        LossOutput(x, x, x, {"m": x.mean()})
