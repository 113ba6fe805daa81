from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpref.weights import (
    binary,
    exponential,
    normalized,
    random,
    rank_based,
    threshold,
    threshold_and_scale,
    uniform,
)

# Transform, settings that mean something else than the defaults, and the bounds of the weights on each side.
TRANSFORMS = {
    "exponential": (
        exponential,
        {"k": 2.0, "mu": 0.5, "lower": -1.0, "upper": 3.0},
        {
            "chosen": (2 * math.exp(-0.5), 2 * math.exp(1.5)),
            "rejected": (2 * math.exp(-1.5), 2 * math.exp(0.5)),
        },
    ),
    "rank_based": (rank_based, {"min_scale": 0.2, "max_scale": 1.9}, (0.2, 1.9)),
    "rank_based position": (
        rank_based,
        {"min_scale": 0.2, "max_scale": 1.9, "ties": "position"},
        (0.2, 1.9),
    ),
    "threshold_and_scale": (threshold_and_scale, {"min_val": -2.0, "max_val": 0.5}, (0.7, 1.3)),
    "threshold": (threshold, {"lower": -0.4, "upper": 0.6}, (-0.4, 0.6)),
    "binary": (binary, {"top_percent": 40}, (0, 1)),
    "binary position": (binary, {"top_percent": 40, "ties": "position"}, (0, 1)),
    "random": (random, {"seed": 3}, (0.7, 1.3)),
    "uniform": (uniform, {"value": 2.5}, (2.5, 2.5)),
}
RATIO_BASED = [name for name in TRANSFORMS if name not in ("random", "uniform")]
every = pytest.mark.parametrize("name", TRANSFORMS)
of_ratio = pytest.mark.parametrize("name", RATIO_BASED)
sides = st.sampled_from(["chosen", "rejected"])

Table = list[list[float]]


@st.composite
def answers(draw, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Ratios of any finite size, with ties, and any mask; behind the mask also what no ratio can be."""
    dtype = dtype or draw(st.sampled_from([torch.float32, torch.float64]))
    width = 32 if dtype == torch.float32 else 64
    finite = st.floats(allow_nan=False, allow_infinity=False, width=width) | st.sampled_from(
        [-1.0, 0.0, 0.5, 1.0]
    )
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 7))
    mask = draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length))
    values = [draw(finite if real else st.floats(width=width)) for real in mask]
    shape = (rows, length)
    return torch.tensor(values, dtype=dtype).view(shape), torch.tensor(mask).view(shape)


def weights(name: str, ratio: torch.Tensor, mask: torch.Tensor, side: str) -> torch.Tensor:
    transform, arguments, _ = TRANSFORMS[name]
    return transform(ratio, mask, side=side, **arguments).weights


@every
@settings(max_examples=30)
@given(answers(), sides)
def test_within_bounds_and_nothing_outside_the_mask(name, answer, side):
    ratio, mask = answer
    transform, arguments, bounds = TRANSFORMS[name]
    found, clipped = transform(ratio, mask, side=side, **arguments)
    low, high = bounds[side] if isinstance(bounds, dict) else bounds
    if arguments.get("ties") == "position" and transform is rank_based:
        high = max(high, 1.0)  # the released code's weight of an answer of one token
    slack = 4 * torch.finfo(found.dtype).eps * max(abs(low), abs(high))
    assert found.dtype == ratio.dtype and found.shape == clipped.shape == ratio.shape
    assert bool(found.isfinite().all())
    assert bool((found[mask] >= low - slack).all() and (found[mask] <= high + slack).all())
    assert bool((found[~mask] == 0).all()) and not bool(clipped[~mask].any())


@every
@settings(max_examples=20)
@given(answers(), sides, st.floats())
def test_what_stands_outside_the_mask_does_not_count(name, answer, side, other):
    ratio, mask = answer
    replaced = torch.where(mask, ratio, torch.tensor(other, dtype=ratio.dtype))
    assert torch.equal(weights(name, ratio, mask, side), weights(name, replaced, mask, side))


@every
@settings(max_examples=20)
@given(answers(), sides)
def test_rows_are_independent(name, answer, side):
    ratio, mask = answer
    transform, arguments, _ = TRANSFORMS[name]
    whole = transform(ratio, mask, side=side, **arguments)
    for row in range(len(ratio)):
        keys = {"keys": [row]} if transform is random else {}
        alone = transform(ratio[row : row + 1], mask[row : row + 1], side=side, **arguments, **keys)
        assert torch.equal(alone.weights[0], whole.weights[row])
        assert torch.equal(alone.clipped[0], whole.clipped[row])


@of_ratio
@settings(max_examples=30)
@given(answers(), sides)
def test_more_trust_never_weighs_less(name, answer, side):
    ratio, mask = answer
    trust = ratio if side == "chosen" else -ratio
    for values, found, real in zip(trust, weights(name, ratio, mask, side), mask, strict=True):
        in_order = found[real][values[real].argsort(stable=True)]
        assert bool((in_order.diff() >= 0).all())


@pytest.mark.parametrize("name", [name for name in RATIO_BASED if name != "exponential"])
@settings(max_examples=20)
@given(answers())
def test_the_rejected_side_sees_the_negated_ratio(name, answer):
    ratio, mask = answer
    assert torch.equal(weights(name, ratio, mask, "rejected"), weights(name, -ratio, mask, "chosen"))


@settings(max_examples=30)
@given(answers(torch.float64), st.floats(-3, 3), st.floats(0, 2))
def test_a_shift_of_the_ratio_is_a_factor_of_exponential_weights(answer, shift, mu):
    ratio, mask = answer
    ratio = torch.where(mask, ratio.clamp(-5, 5), 0)
    for side, sign in (("chosen", 1), ("rejected", -1)):
        unbounded = {"side": side, "mu": mu, "lower": -10.0, "upper": 10.0}
        plain = exponential(ratio, mask, **unbounded).weights
        shifted = exponential(ratio + shift, mask, **unbounded).weights
        torch.testing.assert_close(shifted, plain * math.exp(sign * mu * shift), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["rank_based", "rank_based position", "binary", "binary position"])
@settings(max_examples=20)
@given(st.lists(st.integers(-50, 50), min_size=1, max_size=8), st.integers(-1000, 1000), sides)
def test_only_the_order_counts_for_ranks(name, values, shift, side):
    # Whole numbers, so that neither the shift nor the cube makes two of them equal.
    ratio = torch.tensor([values], dtype=torch.float64)
    mask = torch.ones_like(ratio, dtype=torch.bool)
    found = weights(name, ratio, mask, side)
    for same_order in (ratio + shift, ratio * 7, ratio**3):
        assert torch.equal(weights(name, same_order, mask, side), found)


@pytest.mark.parametrize("ties", ["average", "position"])
@settings(max_examples=30)
@given(answers(torch.float64), sides, st.floats(0, 3), st.floats(0, 3))
def test_ranks_have_the_middle_as_their_mean(ties, answer, side, one, other):
    ratio, mask = answer
    low, high = sorted((one, other))
    found = rank_based(ratio, mask, side=side, min_scale=low, max_scale=high, ties=ties).weights
    for row, real in zip(found, mask, strict=True):
        if real.sum() > 1 or (real.any() and ties == "average"):
            assert row[real].mean().item() == pytest.approx((low + high) / 2, abs=1e-12)


@settings(max_examples=30)
@given(answers(), sides, st.floats(0, 100))
def test_binary_keeps_as_many_as_it_says_unless_there_are_ties(answer, side, top_percent):
    ratio, mask = answer
    found = binary(ratio, mask, side=side, top_percent=top_percent).weights
    for values, row, real in zip(ratio, found, mask, strict=True):
        if len(values[real].unique()) == real.sum():
            assert row.sum() == math.floor(int(real.sum()) * top_percent / 100)


@settings(max_examples=20)
@given(st.data(), sides, st.integers(-(2**63), 2**63 - 1))
def test_a_random_weight_depends_on_seed_row_and_number_alone(data, side, seed):
    rows, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    keys = data.draw(st.lists(st.integers(0, 2**40), min_size=rows, max_size=rows))
    mask = torch.ones(rows, length, dtype=torch.bool)
    whole = random(torch.zeros(rows, length), mask, side=side, seed=seed, keys=keys).weights
    for row, key in enumerate(keys):
        # The same answer alone, behind a prompt and before padding.
        padded = torch.nn.functional.pad(
            mask[:1], (data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3)))
        )
        alone = random(torch.ones(padded.shape), padded, side=side, seed=seed, keys=[key]).weights
        assert torch.equal(alone[padded], whole[row])


@settings(max_examples=100)
@given(st.data(), st.sampled_from([torch.float32, torch.float64]))
def test_normalised_weights_average_one_and_keep_their_ratios(data, dtype):
    ratio, mask = data.draw(answers(dtype))
    given_weights = ratio.abs()
    found = normalized(given_weights, mask)
    assert bool(found.isfinite().all()) and bool((found[~mask] == 0).all())
    eps = torch.finfo(dtype).eps
    for before, after, real in zip(given_weights.double(), found.double(), mask, strict=True):
        before, after = before[real], after[real]
        if not bool((before > 0).any()):
            assert bool((after == 0).all())
            continue
        assert after.mean().item() == pytest.approx(1, rel=16 * eps, abs=0)
        largest = before.argmax()
        expected = before / before[largest] * after[largest]
        torch.testing.assert_close(after, expected, rtol=16 * eps, atol=torch.finfo(dtype).tiny)
