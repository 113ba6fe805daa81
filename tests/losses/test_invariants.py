"""What every loss must hold: all losses of the package, found by looking, each under the properties that it claims."""

import importlib
import inspect
import math
import pkgutil
from dataclasses import fields

import pytest
import torch
from torch import nn

import tokenpref.losses
from tokenpref.losses import INVARIANTS, DPOLoss
from tokenpref.ops import token_stats_from_logits
from tokenpref.stats import NEEDS, STATISTICS, LossOutput, PairStats, TokenStats

# More settings than the defaults; a loss that is not named here is tested with its defaults.
SETTINGS = {
    "DPOLoss": [{}, {"beta": 0.3, "label_smoothing": 0.1}],
    "NLLLoss": [{}, {"side": "rejected"}],
    "TokenDPOLoss": [{}, {"variant": "tdpo1"}, {"alpha": 0}, {"alpha": 1, "beta": 0.5}],
    "TISDPOLoss": [
        {},
        {"alpha": 0.5},
        {"alpha": 1, "beta": 0.3},
        {"kl": "reference"},
        {"kl": "reference", "alpha": 0.5},
        {"kl": "reference", "alpha": 1},
    ],
    "TripletTIDPOLoss": [
        {},
        {"gamma": 0},
        {"gamma": 0, "alpha": 0.5},
        {"gamma": 0.5, "margin": 0, "length_normalization": "tokens"},
        {"gamma": 0.5, "alpha": 1, "length_normalization": "overlap", "anchor_grad": False},
    ],
}


def discover():
    for info in pkgutil.iter_modules(tokenpref.losses.__path__):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"tokenpref.losses.{info.name}")
        for name, cls in inspect.getmembers(module, inspect.isclass):
            if cls.__module__ == module.__name__ and issubclass(cls, nn.Module):
                yield from ((cls, settings) for settings in SETTINGS.get(name, [{}]))


ALL = list(discover())


def of(*claims):
    """The losses that claim all of these invariants."""
    chosen = [(cls, settings) for cls, settings in ALL if set(claims) <= cls(**settings).invariants]
    ids = [
        f"{cls.__name__}({', '.join(f'{k}={v}' for k, v in settings.items())})" for cls, settings in chosen
    ]
    return pytest.mark.parametrize(("cls", "settings"), chosen, ids=ids)


VALUES = ("policy_logps", *STATISTICS.values())


def random_side(rows=3, columns=5, seed=0, dtype=torch.float64):
    """All statistics of answers of unequal length, as a dict; junk outside the mask."""
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.rand(rows, columns, dtype=torch.float64, generator=generator).to(dtype)

    lengths = torch.tensor([columns, 1, columns - 2] * rows)[:rows]
    return {
        "policy_logps": -3 * draw(),
        "ref_logps": -3 * draw(),
        "weights": 0.2 + 1.6 * draw(),
        "kl_ref_policy": draw(),
        "kl_policy_ref": draw(),
        "entropy": 1 + draw(),
        "mask": torch.arange(columns) < lengths[:, None],
    }


def random_sides(dtype=torch.float64, rows=3):
    return {
        "chosen": random_side(rows, 5, 1, dtype),
        "rejected": random_side(rows, 4, 2, dtype),
        "anchor": random_side(rows, 6, 3, dtype),
    }


def build(sides, needs=NEEDS):
    """A pair from dicts; the anchor only if needed."""
    stats = {
        name: TokenStats(**values) for name, values in sides.items() if name != "anchor" or "anchor" in needs
    }
    return PairStats(**stats)


def leaves(sides):
    """A copy whose floating point tensors want gradients."""
    return {
        side: {k: v.clone().requires_grad_(v.is_floating_point()) for k, v in values.items()}
        for side, values in sides.items()
    }


def map_sides(sides, function):
    return {side: {k: function(k, v) for k, v in values.items()} for side, values in sides.items()}


def gradients(sides):
    return {(s, k): v.grad for s, values in sides.items() for k, v in values.items() if v.is_floating_point()}


def run(loss, sides):
    """Output and gradients of the summed loss with respect to every statistic."""
    sides = leaves(sides)
    output = loss(build(sides, loss.needs))
    output.losses.sum().backward()
    return output, gradients(sides)


def assert_same(ours, theirs, tolerance=1e-12):
    for name in ("losses", "chosen_rewards", "rejected_rewards"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), atol=tolerance, rtol=tolerance)
    assert ours.metrics.keys() == theirs.metrics.keys()
    for name, value in ours.metrics.items():
        torch.testing.assert_close(value, theirs.metrics[name], atol=tolerance, rtol=tolerance)


def test_all_losses_are_found():
    assert {cls.__name__ for cls, _ in ALL} >= {"DPOLoss", "NLLLoss", "TokenDPOLoss", "TISDPOLoss"}
    assert set(SETTINGS) <= {cls.__name__ for cls, _ in ALL}
    assert {cls.__name__ for cls, _ in ALL} <= set(tokenpref.losses.__all__)


@of()
def test_claims_and_needs_are_known(cls, settings):
    loss = cls(**settings)
    assert isinstance(loss.invariants, frozenset) and loss.invariants <= INVARIANTS
    assert isinstance(loss.needs, frozenset) and loss.needs <= NEEDS


@of()
def test_output_is_per_pair_finite_and_only_the_loss_has_a_gradient(cls, settings):
    output, _ = run(cls(**settings), random_sides())
    assert isinstance(output, LossOutput)
    for tensor in (output.losses, output.chosen_rewards, output.rejected_rewards, *output.metrics.values()):
        assert tensor.shape == (3,) and tensor.isfinite().all() and tensor.dtype == torch.float64
    assert output.losses.requires_grad
    rest = (output.chosen_rewards, output.rejected_rewards, *output.metrics.values())
    assert not any(tensor.requires_grad for tensor in rest)


@of()
def test_metrics_have_the_common_names(cls, settings):
    sides = random_sides()
    loss = cls(**settings)
    metrics = run(loss, sides)[0].metrics
    for side in getattr(loss, "sides", ("chosen", "rejected")):
        mask = sides[side]["mask"]
        sums = {k: torch.where(mask, v, 0).sum(-1) for k, v in sides[side].items()}
        for name, value in (
            ("logps", sums["policy_logps"]),
            ("kl_ref_policy", sums["kl_ref_policy"]),
            ("kl_policy_ref", sums["kl_policy_ref"]),
            ("entropy", sums["entropy"] / mask.sum(-1)),
        ):
            torch.testing.assert_close(metrics[f"{name}/{side}"], value, atol=1e-12, rtol=0)


@of()
def test_a_missing_statistic_is_named(cls, settings):
    loss = cls(**settings)
    for need in loss.needs:
        for side in ("chosen", "rejected"):
            sides = random_sides()
            if need == "anchor":
                del sides["anchor"]
            else:
                del sides[side][STATISTICS[need]]
            with pytest.raises(ValueError, match=f"'{need}'"):
                loss(build(sides))


@of()
def test_what_is_not_needed_does_not_count(cls, settings):
    loss = cls(**settings)
    kept = {"policy_logps", "mask", *(STATISTICS[need] for need in loss.needs - {"anchor"})}
    sides = random_sides()
    full, full_gradients = run(loss, sides)
    bare, bare_gradients = run(
        loss, {s: {k: v for k, v in values.items() if k in kept} for s, values in sides.items()}
    )
    assert torch.equal(full.losses, bare.losses)
    for key, gradient in full_gradients.items():
        if key[1] in kept:
            assert (gradient is None) == (bare_gradients[key] is None)
            assert gradient is None or torch.equal(gradient, bare_gradients[key])
        else:
            assert gradient is None


@of()
def test_no_gradient_to_reference_and_weights(cls, settings):
    _, grads = run(cls(**settings), random_sides())
    assert all(grads[side, name] is None for side in random_sides() for name in ("ref_logps", "weights"))


@of()
@pytest.mark.parametrize("bad", [0.0, 7.0, math.inf, math.nan])
def test_padding_changes_nothing_whatever_stands_there(cls, settings, bad):
    def pad(name, value):
        extra = torch.zeros(3, 2, dtype=torch.bool) if name == "mask" else torch.full((3, 2), bad).double()
        return torch.cat([value, extra], dim=1)

    loss, sides = cls(**settings), random_sides()
    plain, plain_gradients = run(loss, sides)
    padded, padded_gradients = run(loss, map_sides(sides, pad))
    assert_same(padded, plain)
    for key, gradient in plain_gradients.items():
        if gradient is None:
            assert padded_gradients[key] is None
        else:
            assert torch.equal(padded_gradients[key][:, :-2], gradient)
            assert padded_gradients[key][:, -2:].count_nonzero() == 0
            assert gradient[~sides[key[0]]["mask"]].count_nonzero() == 0


@of()
def test_order_of_the_pairs_is_irrelevant(cls, settings):
    order = torch.tensor([2, 0, 1])
    loss, sides = cls(**settings), random_sides()
    plain, permuted = run(loss, sides)[0], run(loss, map_sides(sides, lambda _, v: v[order]))[0]
    expected = {f.name: getattr(plain, f.name) for f in fields(plain)}
    expected["metrics"] = {name: value[order] for name, value in plain.metrics.items()}
    assert_same(permuted, LossOutput(**{k: v if k == "metrics" else v[order] for k, v in expected.items()}))


@of()
def test_micro_batches_add_up(cls, settings):
    loss, sides = cls(**settings), random_sides(rows=4)
    whole, whole_gradients = run(loss, sides)
    parts = [
        run(loss, map_sides(sides, lambda _, v, rows=rows: v[rows])) for rows in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(torch.cat([p[0].losses for p in parts]), whole.losses, atol=1e-12, rtol=0)
    for key, gradient in whole_gradients.items():
        if gradient is not None:
            pieces = torch.cat([p[1][key] for p in parts])
            torch.testing.assert_close(pieces, gradient, atol=1e-12, rtol=0)


@of()
def test_gradcheck(cls, settings):
    loss, sides = cls(**settings), random_sides()

    def function(chosen, rejected):
        sides["chosen"]["policy_logps"], sides["rejected"]["policy_logps"] = chosen, rejected
        return loss(build(sides, loss.needs)).losses

    inputs = [sides[side]["policy_logps"].clone().requires_grad_() for side in ("chosen", "rejected")]
    assert torch.autograd.gradcheck(function, inputs)


@of()
def test_bfloat16_is_close_to_float32(cls, settings):
    loss = cls(**settings)
    low, high = run(loss, random_sides(torch.bfloat16))[0], run(loss, random_sides(torch.float32))[0]
    assert low.losses.dtype == torch.float32
    # up to 6 tokens of size 3, each rounded by 2^-9: 0.035 before beta
    torch.testing.assert_close(low.losses, high.losses, atol=2e-2, rtol=0)


@of()
def test_a_pair_without_tokens_is_finite_and_has_no_gradient(cls, settings):
    sides = map_sides(
        random_sides(), lambda k, v: v & torch.tensor([[True], [False], [True]]) if k == "mask" else v
    )
    output, grads = run(cls(**settings), sides)
    for tensor in (output.losses, *output.metrics.values()):
        assert tensor.isfinite().all()
    assert all(g[1].count_nonzero() == 0 for g in grads.values() if g is not None)


def at_reference(dtype=torch.float64):
    def same(values):
        zero = torch.zeros_like(values["policy_logps"])
        return {**values, "policy_logps": values["ref_logps"], "kl_ref_policy": zero, "kl_policy_ref": zero}

    return {side: same(values) for side, values in random_sides(dtype).items()}


@of("log2_at_reference")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_policy_equal_to_reference_gives_log_2_and_no_reward(cls, settings, dtype):
    output, _ = run(cls(**settings), at_reference(dtype))
    accuracy = output.chosen_rewards > output.rejected_rewards
    assert torch.equal(output.losses, torch.full((3,), math.log(2), dtype=output.losses.dtype))
    assert not output.chosen_rewards.any() and not output.rejected_rewards.any() and not accuracy.any()


@of("log2_at_reference")
def test_gradient_at_the_reference(cls, settings):
    # All KL gradients vanish there: chosen -(beta / 2B) w (e_y - q), rejected the opposite.
    loss = cls(**settings)
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(4, 4, 6, dtype=torch.float64, generator=generator).requires_grad_()
    labels = torch.tensor([[-100, 2, 3, 1], [-100, -100, 4, 1], [-100, 5, 1, -100], [-100, 0, 0, 2]])
    weights = torch.rand(4, 3, dtype=torch.float64, generator=generator)
    needs = loss.needs - {"anchor"}
    sides = [
        token_stats_from_logits(
            logits[rows], logits[rows].detach(), labels[rows], weights=weights[rows], needs=needs
        )
        for rows in (slice(0, 2), slice(2, 4))
    ]
    loss(PairStats(*sides, anchor=sides[0] if "anchor" in loss.needs else None)).losses.mean().backward()
    targets = labels[:, 1:].clamp(min=0)
    toward = nn.functional.one_hot(targets, 6) - logits.detach()[:, :-1].softmax(-1)
    factor = (weights if "weights" in loss.needs else 1) * (labels[:, 1:] != -100)
    smoothing = getattr(loss, "label_smoothing", 0.0)
    sign = torch.tensor([-1.0, -1.0, 1.0, 1.0], dtype=torch.float64)[:, None, None]
    expected = sign * (1 - 2 * smoothing) * loss.beta / (2 * 2) * factor[..., None] * toward
    torch.testing.assert_close(logits.grad[:, :-1], expected, atol=1e-14, rtol=0)
    assert logits.grad[:, -1].count_nonzero() == 0


@of("antisymmetric")
def test_swapping_the_sides_turns_the_margin_round(cls, settings):
    loss, sides = cls(**settings), random_sides()
    swapped = {**sides, "chosen": sides["rejected"], "rejected": sides["chosen"]}
    one, two = run(loss, sides)[0], run(loss, swapped)[0]
    margin = one.metrics["rewards/train_margins"]
    assert torch.equal(two.metrics["rewards/train_margins"], -margin)
    assert torch.equal(two.chosen_rewards, one.rejected_rewards)
    # l(h) - l(-h) = -beta h, less by the smoothing on both ends
    smoothing = getattr(loss, "label_smoothing", 0.0)
    torch.testing.assert_close(one.losses - two.losses, -(1 - 2 * smoothing) * margin, atol=1e-12, rtol=0)


@of("gradient_direction")
def test_chosen_tokens_go_up_and_rejected_ones_down(cls, settings):
    sides = random_sides()
    _, grads = run(cls(**settings), sides)
    chosen, rejected = grads["chosen", "policy_logps"], grads["rejected", "policy_logps"]
    assert (chosen[sides["chosen"]["mask"]] < 0).all() and (rejected[sides["rejected"]["mask"]] > 0).all()


@of("reward_margin_is_logit")
def test_the_reward_margin_is_the_training_logit(cls, settings):
    loss = cls(**settings)
    output, _ = run(loss, random_sides())
    margin = output.chosen_rewards - output.rejected_rewards
    torch.testing.assert_close(output.metrics["rewards/train_margins"], margin, atol=1e-12, rtol=0)
    smoothing = getattr(loss, "label_smoothing", 0.0)
    expected = (1 - smoothing) * torch.log1p(torch.exp(-margin)) + smoothing * torch.log1p(torch.exp(margin))
    torch.testing.assert_close(output.losses, expected, atol=1e-12, rtol=0)


@of("sums_over_tokens")
def test_tokens_add_up_in_any_order(cls, settings):
    loss, sides = cls(**settings), random_sides()
    whole = run(loss, sides)[0]
    assert_same(run(loss, map_sides(sides, lambda _, v: v.flip(1)))[0], whole)
    parts = [
        run(loss, map_sides(sides, lambda _, v, c=columns: v[:, c]))[0]
        for columns in (slice(0, 2), slice(2, None))
    ]
    for value in (
        lambda o: o.chosen_rewards,
        lambda o: o.rejected_rewards,
        lambda o: o.metrics["rewards/train_margins"],
    ):
        torch.testing.assert_close(value(parts[0]) + value(parts[1]), value(whole), atol=1e-12, rtol=0)


@of("vanishes_with_beta")
def test_loss_and_gradient_vanish_linearly_with_beta(cls, settings):
    found = [run(cls(**{**settings, "beta": beta}), random_sides()) for beta in (1e-4, 2e-4)]
    excess = [output.losses - math.log(2) for output, _ in found]
    assert excess[1].abs().max() < 1e-2
    torch.testing.assert_close(excess[1], 2 * excess[0], rtol=1e-2, atol=1e-9)
    slopes = [grads["chosen", "policy_logps"] for _, grads in found]
    torch.testing.assert_close(slopes[1], 2 * slopes[0], rtol=1e-2, atol=0)


@of("vanishes_with_beta")
@pytest.mark.parametrize("sign", [1, -1])
def test_margins_of_ten_thousand_do_not_overflow_in_float32(cls, settings, sign):
    loss = cls(**settings)
    sides = at_reference(torch.float32)
    for side, direction in (("chosen", sign), ("rejected", -sign)):
        values = sides[side]
        values["weights"] = torch.ones_like(values["weights"])
        first = torch.zeros_like(values["policy_logps"])
        first[:, 0] = direction * 5000 / loss.beta
        values["policy_logps"], values["ref_logps"] = first, torch.zeros_like(first)
    output, grads = run(loss, sides)
    smoothing = getattr(loss, "label_smoothing", 0.0)
    # softplus(-1e4) = 0 and softplus(1e4) = 1e4
    expected = 1e4 * (smoothing if sign > 0 else 1 - smoothing)
    torch.testing.assert_close(output.losses, torch.full((3,), expected), rtol=1e-6, atol=1e-6)
    assert all(gradient.isfinite().all() for gradient in grads.values() if gradient is not None)


@of("unit_weights_are_dpo")
def test_weights_of_one_are_dpo(cls, settings):
    loss = cls(**settings)
    sides = map_sides(random_sides(), lambda k, v: torch.ones_like(v) if k == "weights" else v)
    ours, our_gradients = run(loss, sides)
    dpo, dpo_gradients = run(DPOLoss(beta=loss.beta), sides)
    assert torch.equal(ours.losses, dpo.losses) and torch.equal(ours.chosen_rewards, dpo.chosen_rewards)
    for side in ("chosen", "rejected"):
        assert torch.equal(our_gradients[side, "policy_logps"], dpo_gradients[side, "policy_logps"])


@of("zero_weights_are_silent")
def test_a_token_of_weight_zero_is_silent(cls, settings):
    loss = cls(**settings)
    silent = map_sides(
        random_sides(), lambda k, v: v.index_fill(1, torch.tensor([1]), 0.0) if k == "weights" else v
    )
    louder = map_sides(
        silent, lambda k, v: v.index_fill(1, torch.tensor([1]), 4.0) if k not in ("weights", "mask") else v
    )
    one, grads = run(loss, silent)
    two, _ = run(loss, louder)
    assert torch.equal(one.losses, two.losses) and torch.equal(one.chosen_rewards, two.chosen_rewards)
    for gradient in grads.values():
        assert gradient is None or gradient[:, 1].count_nonzero() == 0


def test_a_loss_needs_no_base_class():
    class HingeLoss(nn.Module):
        needs = frozenset({"ref"})

        def forward(self, pair):
            scores = [side.log_ratio.sum(-1) for side in (pair.chosen, pair.rejected)]
            return LossOutput((1 - scores[0] + scores[1]).relu(), *scores)

    output, grads = run(HingeLoss(), random_sides())
    assert output.metrics == {} and not output.chosen_rewards.requires_grad
    assert grads["chosen", "policy_logps"] is not None
