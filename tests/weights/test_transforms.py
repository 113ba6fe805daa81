import ast
import math

import pytest
import torch
from support.scoring import golden

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
from tokenpref.weights.transforms import TransformedWeights

GOLDEN = golden("tis_weights", "")
VECTORS = ("ties", "one", "two", "const")

TRANSFORMS = {
    "exponential": (exponential, {}),
    "rank_based": (rank_based, {}),
    "rank_based position": (rank_based, {"ties": "position"}),
    "threshold_and_scale": (threshold_and_scale, {}),
    "threshold": (threshold, {"lower": -0.4, "upper": 0.6}),
    "binary": (binary, {"top_percent": 40}),
    "binary position": (binary, {"top_percent": 40, "ties": "position"}),
    "random": (random, {}),
    "uniform": (uniform, {}),
}
every = pytest.mark.parametrize(("transform", "settings"), TRANSFORMS.values(), ids=TRANSFORMS)
sides = pytest.mark.parametrize("side", ["chosen", "rejected"])


def row(values):
    ratio = torch.as_tensor(values, dtype=torch.float64)[None]
    return ratio, torch.ones_like(ratio, dtype=torch.bool)


def close(found, expected, tolerance=1e-12):
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), atol=tolerance, rtol=0)


def parse(key):
    """Golden key -> transform and its settings."""
    for prefix, names in (
        ("threshold_and_scale", ("min_val", "max_val", "min_scale", "max_scale")),
        ("rank_based", ("min_scale", "max_scale")),
        ("threshold", ("lower", "upper")),
    ):
        if key.startswith(prefix):
            settings = dict(zip(names, ast.literal_eval(key.removeprefix(prefix)), strict=True))
            return TRANSFORMS[prefix][0], settings | ({"ties": "position"} if prefix == "rank_based" else {})
    assert key.startswith("binary")
    return binary, {"top_percent": float(key.removeprefix("binary")), "ties": "position"}


CODE_KEYS = [
    k.split("/", 1)
    for k in GOLDEN
    if k.split("/")[0] in VECTORS and k.split("/")[1].startswith(("binary", "rank", "thres"))
]


@pytest.mark.parametrize(("vector", "key"), CODE_KEYS)
def test_golden_of_the_released_code(vector, key):
    transform, settings = parse(key)
    ratio, mask = row(GOLDEN[f"{vector}/in"])
    close(transform(ratio, mask, side="chosen", **settings).weights[0], GOLDEN[f"{vector}/{key}"])
    # The rejected side sees the negated ratio.
    close(transform(-ratio, mask, side="rejected", **settings).weights[0], GOLDEN[f"{vector}/{key}"])


@pytest.mark.parametrize("vector", VECTORS)
def test_golden_of_the_papers_weights(vector):
    ratio, mask = row(GOLDEN[f"{vector}/in"])
    close(exponential(ratio, mask, side="chosen").weights[0], GOLDEN[f"{vector}/paper_chosen_k1_mu1"])
    close(exponential(ratio, mask, side="rejected").weights[0], GOLDEN[f"{vector}/paper_rejected_k1_mu-1"])


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("method", ["binary", "rank_based", "threshold", "threshold_and_scale"])
def test_golden_of_the_released_data_set(method, direction):
    # The file holds log pi- - log pi+; reversed, the sides change places and the models theirs.
    settings = {
        "binary": {"top_percent": 100, "ties": "position"},
        "rank_based": {"ties": "position"},
        "threshold": {"lower": -1, "upper": 1},
        "threshold_and_scale": {},
    }[method]
    for side in ("chosen", "rejected"):
        file_side = side if direction == "forward" else {"chosen": "rejected", "rejected": "chosen"}[side]
        ratio, mask = row(-GOLDEN[f"get_dataset/{file_side}_raw(log pi- - log pi+)"].double())
        weights = TRANSFORMS[method][0](ratio, mask, side=side, **settings).weights[0]
        close(weights, GOLDEN[f"get_dataset/{method}/{direction}/{side}"], 1e-7)  # the raw file is float32


def test_exponential_by_hand():
    ratio, mask = row([0.0, 1.0, 2.0, -3.0])
    chosen = exponential(ratio, mask, side="chosen", k=2.0, mu=0.5, lower=-1.0, upper=1.5)
    # 2 exp(0.5 x) of 0, 1, 1.5 (clipped), -1 (clipped)
    close(chosen.weights[0], [2.0, 2 * math.exp(0.5), 2 * math.exp(0.75), 2 * math.exp(-0.5)])
    assert chosen.clipped.tolist() == [[False, False, True, True]]
    rejected = exponential(ratio, mask, side="rejected", k=2.0, mu=0.5, lower=-1.0, upper=1.5)
    close(rejected.weights[0], [2.0, 2 * math.exp(-0.5), 2 * math.exp(-0.75), 2 * math.exp(0.5)])
    close(chosen.weights * rejected.weights, torch.full((1, 4), 4.0))  # k^2 at the same ratio


def test_rank_by_hand():
    # trust 3, 1, 1, 7: ranks 2, (0 + 1) / 2, the same, 3; of n - 1 = 3; onto [1, 4]: 1 + rank
    ratio, mask = row([3.0, 1.0, 1.0, 7.0])
    close(rank_based(ratio, mask, side="chosen", min_scale=1, max_scale=4).weights[0], [3.0, 1.5, 1.5, 4.0])
    by_position = rank_based(ratio, mask, side="chosen", min_scale=1, max_scale=4, ties="position")
    close(by_position.weights[0], [3.0, 1.0, 2.0, 4.0])
    close(rank_based(ratio, mask, side="rejected", min_scale=1, max_scale=4).weights[0], [2.0, 3.5, 3.5, 1.0])


def test_rank_of_a_single_token():
    ratio, mask = row([0.3])
    assert rank_based(
        ratio, mask, side="chosen", min_scale=0.2, max_scale=0.6
    ).weights.item() == pytest.approx(0.4)
    released = rank_based(ratio, mask, side="chosen", min_scale=0.2, max_scale=0.6, ties="position")
    assert released.weights.item() == 1.0


@pytest.mark.parametrize("ties", ["average", "position"])
def test_rank_mean_and_invariance(ties):
    ratio = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).round(
        decimals=1
    )
    mask = torch.arange(7) < torch.tensor([[7], [2], [5], [3]])
    weights = rank_based(ratio, mask, side="chosen", min_scale=0.5, max_scale=2.5, ties=ties).weights
    close(weights.sum(-1) / mask.sum(-1), [1.5] * 4)
    assert torch.equal(
        rank_based(ratio.exp() * 3, mask, side="chosen", min_scale=0.5, max_scale=2.5, ties=ties).weights,
        weights,
    )
    if ties == "average":  # negation mirrors the weights about the middle
        mirrored = rank_based(ratio, mask, side="rejected", min_scale=0.5, max_scale=2.5).weights
        close(weights + mirrored, torch.where(mask, 3.0, 0.0))


def test_threshold_is_idempotent_and_marks_what_it_cut():
    ratio, mask = row([-2.0, -0.5, 0.0, 0.5, 2.0])
    once = threshold(ratio, mask, side="chosen", lower=-0.5, upper=1.0)
    close(once.weights[0], [-0.5, -0.5, 0.0, 0.5, 1.0])
    assert once.clipped.tolist() == [[True, False, False, False, True]]
    assert torch.equal(
        threshold(once.weights, mask, side="chosen", lower=-0.5, upper=1.0).weights, once.weights
    )


def test_threshold_and_scale_by_hand():
    ratio, mask = row([-9.0, 0.0, 0.75, 9.0])
    chosen = threshold_and_scale(ratio, mask, side="chosen")
    # 0 -> the middle, 0.75 -> (0.75 + 1.5) / 3 = 3/4 of the way from 0.7 to 1.3
    close(chosen.weights[0], [0.7, 1.0, 1.15, 1.3])
    assert chosen.clipped.tolist() == [[True, False, False, True]]
    close(threshold_and_scale(ratio, mask, side="rejected").weights[0], [1.3, 1.0, 0.85, 0.7])


def test_binary_keeps_the_most_trusted():
    ratio, mask = row([0.1, 0.9, -0.3, 0.5, 0.0])
    # floor(5 * 50 / 100) = 2
    assert binary(ratio, mask, side="chosen", top_percent=50).weights.tolist() == [[0, 1, 0, 1, 0]]
    assert binary(ratio, mask, side="rejected", top_percent=50).weights.tolist() == [[0, 0, 1, 0, 1]]
    assert binary(ratio, mask, side="chosen", top_percent=0).weights.tolist() == [[0] * 5]
    assert binary(ratio, mask, side="chosen", top_percent=100).weights.tolist() == [[1] * 5]


def test_binary_ties_across_the_cut_share_one_fate():
    ratio, mask = row([2.0, 1.0, 1.0, 1.0, 0.0])
    # floor(5 * 60 / 100) = 3: two of the three ties are above the cut, more than half
    assert binary(ratio, mask, side="chosen", top_percent=60).weights.tolist() == [[1, 1, 1, 1, 0]]
    assert binary(ratio, mask, side="chosen", top_percent=60, ties="position").weights.tolist() == [
        [1, 0, 0, 0, 0]
    ]
    # floor(2) = 2: one of three, less than half
    assert binary(ratio, mask, side="chosen", top_percent=40).weights.tolist() == [[1, 0, 0, 0, 0]]


def test_random_depends_on_seed_row_side_and_token_only():
    mask = torch.arange(6) < torch.tensor([[6], [4], [5]])
    ratio = torch.zeros(3, 6)
    keys = torch.tensor([11, 5, 8])
    weights = random(ratio, mask, side="chosen", keys=keys).weights
    assert ((weights[mask] >= 0.7) & (weights[mask] <= 1.3)).all()
    assert torch.equal(random(ratio + 3, mask, side="chosen", keys=keys).weights, weights)
    alone = random(ratio[1:2], mask[1:2], side="chosen", keys=[5]).weights
    assert torch.equal(alone, weights[1:2])
    shifted = random(torch.zeros(1, 8), torch.arange(8)[None] % 7 >= 2, side="chosen", keys=[11]).weights
    assert torch.equal(shifted[0, 2:7], weights[0, :5])  # padding on the left does not count
    for other in (
        random(ratio, mask, side="rejected", keys=keys),
        random(ratio, mask, side="chosen", keys=keys, seed=1),
        random(ratio, mask, side="chosen"),
    ):
        assert (other.weights[mask] != weights[mask]).float().mean() > 0.9


def test_random_is_even():
    mask = torch.ones(100, 100, dtype=torch.bool)
    share = random(torch.zeros(100, 100).double(), mask, side="chosen", min_scale=0, max_scale=1).weights
    # 10 000 draws: standard errors 0.0029 (mean), 0.0008 (variance), 0.01 (correlation), 30 (count of a tenth)
    assert share.mean().item() == pytest.approx(1 / 2, abs=0.012)
    assert share.var().item() == pytest.approx(1 / 12, abs=0.004)
    for x, y in ((share[:, :-1], share[:, 1:]), (share[:-1], share[1:])):
        assert abs(torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1].item()) < 0.04
    assert (torch.histc(share, 10, 0, 1) - 1000).abs().max() < 120


def test_random_is_the_same_everywhere():
    # splitmix64 in exact integers
    def mix(x):
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    seed, key, side = 7, 123, 1
    state = mix(mix(mix(seed) + side) + key)
    expected = [(mix(state + n * 0x9E3779B97F4A7C15) >> 11) * 2.0**-53 for n in (1, 2, 3)]
    ratio, mask = row([0.0] * 3)
    weights = random(ratio, mask, side="rejected", min_scale=0, max_scale=1, seed=seed, keys=[key]).weights
    assert weights[0].tolist() == expected


def test_uniform():
    ratio, mask = row([5.0, -5.0])
    assert uniform(ratio, mask, side="chosen").weights.tolist() == [[1.0, 1.0]]
    assert uniform(ratio, mask, side="rejected", value=0.25).weights.tolist() == [[0.25, 0.25]]


@every
@sides
@pytest.mark.parametrize("bad", [0.0, 1e9, -1e9, math.inf, -math.inf, math.nan])
def test_padding_never_counts(transform, settings, side, bad):
    ratio = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(6) < torch.tensor([[6], [3], [1]])
    plain = transform(ratio, mask, side=side, **settings)
    dirty = transform(torch.where(mask, ratio, bad), mask, side=side, **settings)
    assert torch.equal(dirty.weights, plain.weights) and torch.equal(dirty.clipped, plain.clipped)
    assert plain.weights[~mask].count_nonzero() == 0 and not plain.clipped[~mask].any()
    short = transform(
        ratio[1:2, :3], mask[1:2, :3], side=side, **settings, **({"keys": [1]} if transform is random else {})
    )
    assert torch.equal(short.weights, plain.weights[1:2, :3])


@every
@sides
def test_rows_without_tokens_and_without_columns(transform, settings, side):
    empty = transform(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool), side=side, **settings)
    assert empty.weights.tolist() == [[0.0] * 3] * 2 and not empty.clipped.any()
    assert transform(
        torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool), side=side, **settings
    ).weights.shape == (2, 0)


@every
def test_result_dtype_and_gradient(transform, settings):
    for given, kept in (
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ):
        ratio = torch.zeros(1, 3, dtype=given, requires_grad=True)
        result = transform(ratio, torch.ones(1, 3, dtype=torch.bool), side="chosen", **settings)
        assert isinstance(result, TransformedWeights)
        assert result.weights.dtype == kept and not result.weights.requires_grad
        assert result.clipped.dtype == torch.bool and result.clipped.shape == (1, 3)


@every
def test_faulty_tensors(transform, settings):
    ratio, mask = row([0.0, 1.0])
    with pytest.raises(
        ValueError, match="side must be one of 'chosen', 'rejected', got 'choosen'; did you mean 'chosen'"
    ):
        transform(ratio, mask, side="choosen", **settings)
    with pytest.raises(ValueError, match="mask must be a bool tensor"):
        transform(ratio, mask.long(), side="chosen", **settings)
    with pytest.raises(ValueError, match=r"one shape \[B, T\], got \[1, 1\] and \[1, 2\]"):
        transform(ratio[:, :1], mask, side="chosen", **settings)
    if transform not in (random, uniform):
        with pytest.raises(ValueError, match="not finite on an answer's token, first in row 0"):
            transform(ratio / 0, mask, side="chosen", **settings)


@pytest.mark.parametrize(
    ("transform", "settings", "message"),
    [
        (exponential, {"k": 0}, "k must be a finite number > 0, got 0"),
        (exponential, {"mu": -1}, "mu must be a finite number >= 0, got -1"),
        (exponential, {"lower": 2}, "lower < upper must hold, got lower=2.0, upper=1.5"),
        (rank_based, {"min_scale": 2}, "min_scale <= max_scale must hold, got min_scale=2.0, max_scale=1.3"),
        (rank_based, {"min_scale": -0.1}, "min_scale must be a finite number >= 0"),
        (rank_based, {"ties": "averag"}, "did you mean 'average'"),
        (threshold_and_scale, {"min_val": 1.5}, "min_val < max_val must hold"),
        (threshold_and_scale, {"max_scale": math.nan}, "max_scale must be a finite number"),
        (threshold, {"lower": 1, "upper": -1}, "lower < upper must hold"),
        (threshold, {"lower": -math.inf, "upper": 1}, "lower must be a finite number, got -inf"),
        (binary, {"top_percent": 101}, "top_percent must be a finite number >= 0 and <= 100, got 101"),
        (binary, {"top_percent": 50, "ties": "first"}, "ties must be one of"),
        (random, {"min_scale": 2}, "min_scale <= max_scale"),
        (random, {"seed": 1.5}, "seed must be an integer, got 1.5"),
        (random, {"keys": [1, 2]}, r"keys must hold one integer per row, \[1\], got \[2\]"),
        (uniform, {"value": -1}, "value must be a finite number >= 0"),
    ],
)
def test_faulty_settings(transform, settings, message):
    ratio, mask = row([0.0, 1.0])
    with pytest.raises(ValueError, match=message):
        transform(ratio, mask, side="chosen", **settings)


def test_normalized_by_hand():
    weights = torch.tensor([[1.0, 3.0, 9.0], [0.0, 0.0, 5.0]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    # mean of 1 and 3 is 2; the second answer's weights are all zero and stay so; junk outside the mask goes
    assert normalized(weights, mask).tolist() == [[0.5, 1.5, 0.0], [0.0, 0.0, 0.0]]
    with pytest.raises(ValueError, match=r"negative mean \(-0.5\) in row 0"):
        normalized(torch.tensor([[-1.0, 0.0]]), torch.tensor([[True, True]]))


def test_normalized_weights_of_any_size():
    # In float32 the first row's sum is infinite (the largest number is 3.4e38) and the second row's mean rounds to 0.
    weights = torch.tensor([[3e38, 3e38, 1.5e38, 0.0], [1e-45, 0.0, 0.0, 0.0]])
    found = normalized(weights, torch.ones(2, 4, dtype=torch.bool))
    # 3, 3, 1.5 and 0 have the mean 1.875
    close(found, [[1.6, 1.6, 0.8, 0.0], [4.0, 0.0, 0.0, 0.0]], 1e-6)
