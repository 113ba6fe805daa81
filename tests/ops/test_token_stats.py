"""What holds for token_stats_from_logits and linear_token_stats alike (see the fixture ``score``)."""

import math

import pytest
import torch

GRADIENT_OF = ["policy_logps", "kl_ref_policy", "kl_policy_ref", "entropy"]


def test_numbers_by_hand(score):
    # Position 0 predicts the label at 1. p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2), target 0.
    log2 = math.log(2)
    logits = torch.tensor([[[2 * log2, log2, log2], [0.0, 0.0, 0.0]]], dtype=torch.float64)
    ref = torch.tensor([[[log2, log2, 2 * log2], [0.0, 0.0, 0.0]]], dtype=torch.float64)
    stats = score(
        logits, ref, torch.tensor([[-100, 0]]), needs={"ref", "kl_ref_policy", "kl_policy_ref", "entropy"}
    )
    assert stats.mask.tolist() == [[True]]
    assert stats.policy_logps.item() == pytest.approx(-log2, abs=1e-15)  # log 1/2
    assert stats.ref_logps.item() == pytest.approx(-2 * log2, abs=1e-15)  # log 1/4
    # KL(q||p) = 1/4 log(1/2) + 1/4 log 1 + 1/2 log 2 = log2 / 4, and KL(p||q) the same by symmetry
    assert stats.kl_ref_policy.item() == pytest.approx(log2 / 4, abs=1e-15)
    assert stats.kl_policy_ref.item() == pytest.approx(log2 / 4, abs=1e-15)
    # H = 1/2 log 2 + 2 * 1/4 * 2 log 2 = 3/2 log 2
    assert stats.entropy.item() == pytest.approx(1.5 * log2, abs=1e-15)


def test_values_equal_the_definitions(score, case, by_autograd, all_needs):
    stats = score(*case, needs=all_needs)
    for name, expected in by_autograd(*case).items():
        torch.testing.assert_close(getattr(stats, name), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("names", [[n] for n in GRADIENT_OF] + [GRADIENT_OF], ids="+".join)
def test_gradients_equal_autograd(score, case, by_autograd, all_needs, names):
    logits, ref, labels = case
    factors = torch.randn(len(names), 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def gradient(values):
        return torch.autograd.grad(
            sum((values[n] * f).sum() for n, f in zip(names, factors, strict=True)), leaf
        )[0]

    leaf = logits.clone().requires_grad_()
    expected = gradient(by_autograd(leaf, ref, labels))
    stats = score(leaf, ref, labels, needs=all_needs)
    torch.testing.assert_close(gradient({n: getattr(stats, n) for n in names}), expected, atol=1e-12, rtol=0)


def test_gradcheck(score, case, all_needs):
    logits, ref, labels = case

    def function(x):
        stats = score(x, ref, labels, needs=all_needs)
        return stats.policy_logps, stats.kl_ref_policy, stats.kl_policy_ref, stats.entropy

    assert torch.autograd.gradcheck(function, logits.requires_grad_())


def test_only_what_is_needed_is_computed(score, case):
    logits, ref, labels = case
    for needs in [set(), {"ref"}, {"kl_ref_policy"}, {"kl_policy_ref"}, {"entropy"}, {"ref", "entropy"}]:
        stats = score(logits, ref, labels, needs=frozenset(needs))
        present = {n for n in ("kl_ref_policy", "kl_policy_ref", "entropy") if getattr(stats, n) is not None}
        assert present | ({"ref"} if stats.ref_logps is not None else set()) == needs


def test_reference_is_the_default_need(score, case):
    stats = score(*case)
    assert stats.ref_logps is not None and stats.kl_ref_policy is None and stats.weights is None


def test_no_reference_is_needed_for_the_policy_alone(score, case):
    logits, ref, labels = case
    alone = score(logits, None, labels, needs=frozenset({"entropy", "weights", "anchor"}))
    assert alone.ref_logps is None
    torch.testing.assert_close(
        alone.policy_logps, score(logits, ref, labels).policy_logps, atol=1e-13, rtol=0
    )


def test_a_reference_may_score_itself(score, case):
    logits, ref, labels = case
    ref_logps = score(ref, None, labels, needs=frozenset()).policy_logps
    stats = score(logits, None, labels, ref_logps=ref_logps)
    torch.testing.assert_close(stats.ref_logps, score(logits, ref, labels).ref_logps, atol=1e-13, rtol=0)
    assert torch.equal(
        score(ref, None, labels, ref_logps=ref_logps).log_ratio, torch.zeros(3, 5, dtype=torch.float64)
    )


def test_missing_or_doubled_reference_is_an_error(score, case):
    logits, ref, labels = case
    ref_logps = torch.zeros(3, 5)
    with pytest.raises(ValueError, match=r"\['ref'\]"):
        score(logits, None, labels)
    with pytest.raises(ValueError, match=r"\['kl_ref_policy'\]"):
        score(logits, None, labels, needs={"ref", "kl_ref_policy"}, ref_logps=ref_logps)
    with pytest.raises(ValueError, match="both given"):
        score(logits, ref, labels, ref_logps=ref_logps)


def test_unknown_need_is_an_error(score, case):
    with pytest.raises(ValueError, match="'kl_ref_polcy' .*did you mean 'kl_ref_policy'"):
        score(*case, needs={"kl_ref_polcy"})


def test_wrong_shapes_are_errors(score, case):
    logits, ref, labels = case
    with pytest.raises(
        ValueError, match=r"weights must have the shape \[B, T\] = \[3, 5\].*\[3, 6\]; pass weights\[:, 1:\]"
    ):
        score(logits, ref, labels, weights=torch.ones(3, 6))
    with pytest.raises(ValueError, match=r"ref_logps must have the shape .*got \[3, 4\]$"):
        score(logits, None, labels, ref_logps=torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"of labels, got \[3, 5, 5\]"):
        score(logits[:, 1:], ref, labels)
    with pytest.raises(ValueError, match="ref_"):
        score(logits, ref[:, 1:], labels)
    with pytest.raises(ValueError, match=r"labels must have the shape \[B, L\]"):
        score(logits, ref, labels[0])


def test_weights_are_kept_masked_and_without_gradient(score, case):
    logits, ref, labels = case
    weights = torch.rand(3, 5, dtype=torch.float64, requires_grad=True)
    stats = score(logits, ref, labels, weights=weights)
    assert torch.equal(stats.weights, torch.where(labels[:, 1:] != -100, weights.detach(), 0))
    assert not stats.weights.requires_grad


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_nothing_outside_the_mask_is_touched(score, case, all_needs, bad):
    logits, ref, labels = case
    scored = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))[..., None]
    leaf = torch.where(scored, logits, bad).requires_grad_()
    bad_weights = torch.where(scored[:, :-1, 0], 1.0, bad).double()
    stats = score(leaf, torch.where(scored, ref, bad), labels, needs=all_needs, weights=bad_weights)
    clean_leaf = logits.clone().requires_grad_()
    clean = score(clean_leaf, ref, labels, needs=all_needs, weights=torch.ones(3, 5, dtype=torch.float64))
    for name in (*GRADIENT_OF, "ref_logps", "weights"):
        assert torch.equal(getattr(stats, name), getattr(clean, name))
    for result in (stats, clean):
        (result.policy_logps + result.kl_ref_policy + result.kl_policy_ref + result.entropy).sum().backward()
    assert torch.equal(leaf.grad, clean_leaf.grad)
    assert torch.equal(
        leaf.grad[~scored.expand_as(leaf)], torch.zeros(5 * 6 * 3 - 5 * 7, dtype=torch.float64)
    )


def test_padding_changes_nothing(score, case, all_needs):
    logits, ref, labels = case
    junk = torch.full((3, 2, 5), 9.0, dtype=torch.float64)
    for side in ("left", "right"):

        def pad(x, y, side=side):
            return torch.cat([y, x] if side == "left" else [x, y], dim=1)

        padded = score(
            pad(logits, junk), pad(ref, -junk), pad(labels, torch.full((3, 2), -100)), needs=all_needs
        )
        plain = score(*case, needs=all_needs)
        kept = slice(2, None) if side == "left" else slice(None, -2)
        for name in GRADIENT_OF:
            assert torch.equal(getattr(padded, name)[:, kept], getattr(plain, name))
            assert getattr(padded, name).count_nonzero() == getattr(plain, name).count_nonzero()


def test_shift_of_the_logits_and_order_of_the_vocabulary_are_irrelevant(score, case, all_needs):
    logits, ref, labels = case
    plain = score(*case, needs=all_needs)
    shifted = score(logits + 100, ref - 50, labels, needs=all_needs)
    order = torch.tensor([3, 0, 4, 1, 2])
    renamed = torch.where(labels == -100, -100, order.argsort()[labels.clamp(min=0)])
    permuted = score(logits[..., order], ref[..., order], renamed, needs=all_needs)
    for name in (*GRADIENT_OF, "ref_logps"):
        torch.testing.assert_close(getattr(shifted, name), getattr(plain, name), atol=1e-12, rtol=0)
        torch.testing.assert_close(getattr(permuted, name), getattr(plain, name), atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equal_models_give_exact_zeros(score, case, dtype, all_needs):
    logits, _, labels = case
    leaf = logits.to(dtype).requires_grad_()
    stats = score(leaf, logits.to(dtype), labels, needs=all_needs)
    zero = torch.zeros(3, 5, dtype=stats.policy_logps.dtype)
    assert torch.equal(stats.log_ratio, zero)
    assert torch.equal(stats.kl_ref_policy, zero) and torch.equal(stats.kl_policy_ref, zero)
    (stats.kl_ref_policy + stats.kl_policy_ref).sum().backward()
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_kl_is_positive_and_both_directions_agree_to_second_order(score, case, all_needs):
    logits, ref, labels = case
    mask = labels[:, 1:] != -100
    stats = score(logits, ref, labels, needs=all_needs)
    assert (stats.kl_ref_policy[mask] > 0).all() and (stats.kl_policy_ref[mask] > 0).all()
    step = 1e-4 * (logits - ref)
    near = score(ref + step, ref, labels, needs=all_needs)
    q = ref[:, :-1].softmax(-1)
    gap = step[:, :-1]
    variance = (q * gap.square()).sum(-1) - (q * gap).sum(-1).square()
    for kl in (near.kl_ref_policy, near.kl_policy_ref):
        torch.testing.assert_close(kl[mask], variance[mask] / 2, rtol=1e-2, atol=0)


def test_small_kl_in_float32_is_accurate(score):
    # Near p = q the naive sum of q (log q - log p) is off by the rounding of the log-sum-exps, about 1e-6 here.
    generator = torch.Generator().manual_seed(3)
    ref = torch.randn(1, 9, 400, dtype=torch.float64, generator=generator) * 3
    logits = ref + 1e-3 * torch.randn(1, 9, 400, dtype=torch.float64, generator=generator)
    labels = torch.arange(9)[None]
    needs = frozenset({"kl_ref_policy", "kl_policy_ref"})
    exact = score(logits.float().double(), ref.float().double(), labels, needs=needs)
    got = score(logits.float(), ref.float(), labels, needs=needs)
    assert exact.kl_ref_policy.max() < 2e-6
    for name in needs:
        torch.testing.assert_close(getattr(got, name).double(), getattr(exact, name), atol=5e-9, rtol=0)


def test_gaps_of_a_thousand_stay_finite_in_float32(score, all_needs):
    logits = torch.tensor([[[1000.0, 0.0, -1000.0]] * 3], requires_grad=True)
    ref = torch.tensor([[[-1000.0, 0.0, 1000.0]] * 3])
    stats = score(logits, ref, torch.tensor([[-100, 0, 2]]), needs=all_needs)
    assert stats.policy_logps.tolist() == [[0.0, -2000.0]]
    assert stats.ref_logps.tolist() == [[-2000.0, 0.0]]
    assert stats.kl_ref_policy.tolist() == [[2000.0, 2000.0]] and stats.kl_policy_ref.tolist() == [
        [2000.0, 2000.0]
    ]
    (stats.policy_logps + stats.kl_ref_policy + stats.kl_policy_ref + stats.entropy).sum().backward()
    assert logits.grad.isfinite().all()


def test_half_precision_is_close_to_float32_and_statistics_are_float32(score, case, all_needs):
    logits, ref, labels = (case[0].bfloat16(), case[1].bfloat16(), case[2])
    low, high = logits.clone().requires_grad_(), logits.float().requires_grad_()
    got = score(low, ref, labels, needs=all_needs)
    expected = score(high, ref.float(), labels, needs=all_needs)
    for stats in (got, expected):
        (stats.policy_logps.sum() + 0.5 * stats.kl_ref_policy.sum() + stats.kl_policy_ref.sum()).backward()
    for name in (*GRADIENT_OF, "ref_logps"):
        assert getattr(got, name).dtype == torch.float32
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=1e-5, rtol=1e-5)
    assert low.grad.dtype == torch.bfloat16
    torch.testing.assert_close(low.grad.float(), high.grad, atol=1e-2, rtol=2e-2)


def test_a_batch_without_answers_stays_in_the_graph(score, case, all_needs):
    logits, ref, labels = case
    leaf = logits.clone().requires_grad_()
    stats = score(leaf, ref, torch.full_like(labels, -100), needs=all_needs)
    assert torch.equal(stats.policy_logps, torch.zeros(3, 5, dtype=torch.float64))
    stats.policy_logps.sum().backward()
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_sequences_of_one_position_have_no_columns(score, all_needs):
    leaf = torch.zeros(2, 1, 3, requires_grad=True)
    stats = score(leaf, torch.zeros(2, 1, 3), torch.zeros(2, 1, dtype=torch.int64), needs=all_needs)
    assert stats.policy_logps.shape == (2, 0)
    stats.policy_logps.sum().backward()
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_reference_gets_no_gradient(score, case, all_needs):
    logits, ref, labels = case
    ref = ref.requires_grad_()
    stats = score(logits.requires_grad_(), ref, labels, needs=all_needs)
    sum(getattr(stats, n).sum() for n in GRADIENT_OF).backward()
    assert ref.grad is None


def test_second_derivatives_are_refused(score, case):
    logits, ref, labels = case
    leaf = logits.requires_grad_()
    (gradient,) = torch.autograd.grad(score(leaf, ref, labels).policy_logps.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        gradient.sum().backward()
