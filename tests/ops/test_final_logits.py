"""Logits that are scaled and soft-capped: the function itself, and the head's statistics of them."""

import pytest
import torch
from support.heads import LABELS, blocks_of, make, total

from tokenpref.losses import TISDPOLoss, TokenDPOLoss
from tokenpref.ops import final_logits, linear_token_stats, score_tokens, token_stats_from_logits
from tokenpref.stats import PairStats, TokenStats

ALL = frozenset({"ref", "kl_ref_policy", "kl_policy_ref", "entropy"})
NAMES = ("policy_logps", "ref_logps", "kl_ref_policy", "kl_policy_ref", "entropy")
BUDGETS = (1e-6, 3e-4, 1)  # MiB: no block is kept, some are, all are
MAPS = {
    "scale": {"logit_scale": 0.0625},
    "cap": {"soft_cap": 1.5},
    "scale and cap": {"logit_scale": 2.5, "soft_cap": 3.0},
}


@pytest.fixture(params=MAPS.values(), ids=MAPS)
def of_model(request):
    """A model's scale and cap, as arguments."""
    return request.param


@pytest.fixture(params=[1, 200, 1 << 20], ids=["a column", "some columns", "all columns"], autouse=True)
def block_bytes(request):
    with blocks_of(request.param):
        yield request.param


def plainly(raw, logit_scale=1.0, soft_cap=None):
    """The definition, for autograd to differentiate."""
    scaled = logit_scale * raw
    return scaled if soft_cap is None else soft_cap * torch.tanh(scaled / soft_cap)


def test_it_is_the_formula_with_its_gradient(of_model):
    raw = (torch.randn(3, 4, 5, dtype=torch.float64) * 4).requires_grad_()
    found, expected = final_logits(raw, **of_model), plainly(raw, **of_model)
    torch.testing.assert_close(found, expected, atol=1e-13, rtol=0)
    gradients = [torch.autograd.grad(value.square().sum(), raw)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


def test_most_models_need_nothing():
    raw = torch.randn(2, 3, dtype=torch.bfloat16)
    assert final_logits(raw) is raw and final_logits(raw, logit_scale=1, soft_cap=None) is raw


def test_half_precision_is_rounded_once(of_model):
    raw = torch.linspace(-40, 40, 1001).to(torch.bfloat16)
    found = final_logits(raw, **of_model)
    assert found.dtype == torch.bfloat16
    rounded_once = plainly(raw.double(), **of_model).to(torch.bfloat16)
    assert (found == rounded_once).float().mean() > 0.99  # up to ties


def test_large_logits_reach_the_cap_and_have_no_gradient():
    raw = torch.tensor([-1e4, 1e4, torch.inf, 0.0], requires_grad=True)
    logits = final_logits(raw, soft_cap=30)
    assert logits.tolist() == [-30, 30, 30, 0]
    assert torch.autograd.grad(logits.sum(), raw)[0].tolist() == [0, 0, 0, 1]


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "30", True])
@pytest.mark.parametrize("name", ["logit_scale", "soft_cap"])
def test_other_numbers_are_refused(name, value):
    hidden, weight, _, _ = make()
    with pytest.raises(ValueError, match=f"{name} must be a finite number > 0, got {value!r}"):
        final_logits(torch.zeros(2), **{name: value})
    with pytest.raises(ValueError, match=f"{name} must be a finite number > 0, got {value!r}"):
        score_tokens(hidden[0], weight, LABELS[1].clamp(min=0), **{name: value})


def both_ways(inputs, of_model, needs=ALL, memory_mb=1.0, labels=LABELS):
    """Statistics from hidden states, and from the explicit logits of the same model."""
    hidden, weight, ref_hidden, ref_weight = inputs
    if not needs - {"entropy"}:
        ref_hidden = ref_weight = ref_logits = None
    else:
        ref_logits = plainly(ref_hidden @ ref_weight.T, **of_model)
    found = linear_token_stats(
        hidden, weight, ref_hidden, ref_weight, labels, needs=needs, memory_mb=memory_mb, **of_model
    )
    return found, token_stats_from_logits(
        plainly(hidden @ weight.T, **of_model), ref_logits, labels, needs=needs
    )


def check_gradients(values, inputs):
    ours, theirs = (torch.autograd.grad(value, inputs) for value in values)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=0)


@pytest.mark.parametrize("wanted", ["both", "hidden", "weight"])
@pytest.mark.parametrize(
    "needs",
    [set(), {"ref"}, {"entropy"}, {"ref", "kl_ref_policy"}, {"kl_policy_ref"}, ALL],
    ids=lambda n: "+".join(sorted(n)),
)
def test_values_and_gradients_equal_those_through_logits(of_model, wanted, needs):
    inputs = make()
    inputs[0].requires_grad_(wanted != "weight")
    inputs[1].requires_grad_(wanted != "hidden")
    for memory_mb in BUDGETS:
        found, expected = both_ways(inputs, of_model, frozenset(needs), memory_mb)
        for name in NAMES:
            if getattr(expected, name) is not None:
                torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-12, rtol=0)
        check_gradients((total(found), total(expected)), [x for x in inputs if x.requires_grad])


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
@pytest.mark.parametrize("loss", [TokenDPOLoss(), TISDPOLoss(alpha=0.5)], ids=["TDPO2", "TIS-DPO with KL"])
def test_losses_equal_those_through_logits(of_model, loss, frozen):
    inputs = make()
    inputs[1].requires_grad_(not frozen)
    weights = torch.linspace(0.5, 1.5, 6, dtype=torch.float64)[None]

    def side(stats, row):
        values = {name: getattr(stats, name)[row : row + 1] for name in ("mask", *loss.needs & set(NAMES))}
        reference = stats.ref_logps[row : row + 1]
        return TokenStats(
            policy_logps=stats.policy_logps[row : row + 1], ref_logps=reference, weights=weights, **values
        )

    for memory_mb in BUDGETS:
        found = both_ways(inputs, of_model, frozenset({"ref"}) | loss.needs - {"weights"}, memory_mb)
        values = [loss(PairStats(side(stats, 0), side(stats, 1))).losses for stats in found]
        torch.testing.assert_close(*values, atol=1e-12, rtol=0)
        check_gradients([value.sum() for value in values], [x for x in inputs if x.requires_grad])


def test_a_kl_with_gradients_at_some_rows_only(of_model):
    inputs = make()
    factors = torch.tensor([0, 0, 3, 1, 2, 0, 0, 0], dtype=torch.float64)
    for memory_mb in BUDGETS:
        values = [
            (stats.policy_logps[stats.mask] * torch.arange(8.0)).sum()
            + (stats.kl_ref_policy[stats.mask] * factors).sum()
            for stats in both_ways(inputs, of_model, memory_mb=memory_mb)
        ]
        check_gradients(values, inputs[:2])


def test_a_tied_head_adds_both_gradients(of_model):
    _, weight, ref_hidden, ref_weight = make()
    hidden = torch.tanh(weight[LABELS.clamp(min=0)])
    found, expected = both_ways((hidden, weight, ref_hidden, ref_weight), of_model)
    gradients = [
        torch.autograd.grad(total(stats), weight, retain_graph=True)[0] for stats in (found, expected)
    ]
    torch.testing.assert_close(*gradients, atol=1e-11, rtol=0)


def test_gradcheck_of_hidden_states_and_head(of_model):
    hidden, weight, ref_hidden, ref_weight = make()

    def function(h, w):
        stats = linear_token_stats(
            h, w, ref_hidden, ref_weight, LABELS, needs=ALL, memory_mb=3e-4, **of_model
        )
        return total(stats)

    assert torch.autograd.gradcheck(function, (hidden, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_budget_changes_no_bit(of_model, dtype):
    found = []
    for memory_mb in BUDGETS:
        inputs = make(dtype, vocab=101)
        stats = linear_token_stats(*inputs, LABELS, needs=ALL, memory_mb=memory_mb, **of_model)
        found.append(
            [*(getattr(stats, name) for name in NAMES), *torch.autograd.grad(total(stats), inputs[:2])]
        )
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


def test_half_precision_is_close_to_float64(of_model):
    low = make(torch.bfloat16)
    high = [x.detach().double().requires_grad_(x.requires_grad) for x in low]
    found = []
    for inputs in (low, high):
        stats = linear_token_stats(*inputs, LABELS, needs=ALL, memory_mb=3e-4, **of_model)
        found.append((stats.policy_logps, *torch.autograd.grad(total(stats), inputs[:2])))
    assert found[0][0].dtype == torch.float32
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() < 0.03 * theirs.norm()


def test_equal_models_have_no_divergence_and_no_gradient_of_it(of_model):
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight, _, _ = make(dtype, vocab=101)
        stats = linear_token_stats(
            hidden, weight, hidden.detach(), weight.detach(), LABELS, needs=ALL, memory_mb=3e-4, **of_model
        )
        assert not stats.kl_ref_policy.any() and not stats.kl_policy_ref.any() and not stats.log_ratio.any()
        for gradient in torch.autograd.grad(stats.kl_ref_policy.sum(), (hidden, weight)):
            assert not gradient.any()


def test_a_certain_token_has_a_log_probability_of_exactly_zero(of_model):
    # The target's logit is computed by itself, the log-sum-exp from all logits of the block.
    hidden = torch.randn(33, 4, requires_grad=True)
    values = score_tokens(hidden, torch.randn(1, 4), torch.zeros(33, dtype=torch.int64), **of_model)
    assert not values["policy_logps"].any()


@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_logits_beyond_the_cap_give_finite_numbers_and_no_gradient(frozen):
    # 10,000 nats apart before the cap of 30, 60 nats after it.
    weight = torch.tensor([[-1e4], [1e4], [-1e4]], requires_grad=not frozen)
    hidden = torch.ones(2, 1, requires_grad=True)
    for memory_mb in BUDGETS:
        values = score_tokens(hidden, weight, torch.tensor([1, 2]), memory_mb=memory_mb, soft_cap=30.0)
        assert values["policy_logps"].tolist() == [0.0, -60.0]
        inputs = [x for x in (hidden, weight) if x.requires_grad]
        assert not any(g.any() for g in torch.autograd.grad(values["policy_logps"].sum(), inputs))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_positions_outside_the_answers_have_no_influence(of_model, bad):
    hidden, weight, ref_hidden, ref_weight = make()
    outside = torch.nn.functional.pad(LABELS[:, 1:] == -100, (0, 1), value=True)
    found = []
    for value in (0.0, bad):
        inputs = [hidden.detach().masked_fill(outside[..., None], value).requires_grad_(), weight]
        ref = ref_hidden.masked_fill(outside[..., None], value)
        stats = linear_token_stats(*inputs, ref, ref_weight, LABELS, needs=ALL, **of_model)
        found.append([*(getattr(stats, name) for name in NAMES), *torch.autograd.grad(total(stats), inputs)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert not found[1][-2][outside].any()
