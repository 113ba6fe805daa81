"""Compiled passes against those op by op, by the compiler that users have."""

import shutil

import pytest
import torch
from support.heads import LABELS, blocks_of, make, total
from torch._dynamo.utils import counters

from tokenpref.ops import linear_token_stats

ALL = frozenset({"ref", "kl_ref_policy", "kl_policy_ref", "entropy"})
NAMES = ("policy_logps", "ref_logps", "kl_ref_policy", "kl_policy_ref", "entropy")

pytestmark = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")), reason="there is no C++ compiler"
)


@pytest.fixture(autouse=True)
def compiler():
    """A compiler that has seen nothing and never gives up in silence; several blocks, of which some are kept."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True), blocks_of(1024):
        yield


def both(needs, *, dtype=torch.float64, frozen=False, same=False, **of_model):
    """Statistics and gradients, op by op and compiled."""
    hidden, weight, ref_hidden, ref_weight = make(dtype, vocab=101)
    weight.requires_grad_(not frozen)
    if same:
        ref_hidden, ref_weight = hidden.detach(), weight.detach()
    if not needs - {"entropy"}:
        ref_hidden = ref_weight = None
    found = []
    for compiled in (False, True):
        stats = linear_token_stats(
            hidden,
            weight,
            ref_hidden,
            ref_weight,
            LABELS,
            needs=needs,
            memory_mb=0.002,
            compiled=compiled,
            **of_model,
        )
        inputs = [x for x in (hidden, weight) if x.requires_grad]
        found.append((stats, torch.autograd.grad(total(stats), inputs)))
    assert counters["stats"]["unique_graphs"]
    return found


@pytest.mark.parametrize(
    ("needs", "frozen", "of_model"),
    [
        (frozenset(), False, {}),
        (frozenset({"ref", "kl_ref_policy"}), True, {}),
        (ALL, False, {}),
        (ALL, False, {"logit_scale": 2.5, "soft_cap": 3.0}),
    ],
    ids=["log-probabilities", "KL, frozen head", "all", "all, scaled and capped"],
)
def test_compiled_passes_give_what_those_op_by_op_give(needs, frozen, of_model):
    plain, compiled = both(needs, frozen=frozen, **of_model)
    for name in NAMES:
        if getattr(plain[0], name) is not None:
            torch.testing.assert_close(
                getattr(compiled[0], name), getattr(plain[0], name), atol=1e-11, rtol=1e-11
            )
    for ours, theirs in zip(compiled[1], plain[1], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=1e-11)


def test_of_bfloat16_compiled_passes_round_no_more():
    plain, compiled = both(ALL, dtype=torch.bfloat16)
    for ours, theirs in zip(compiled[1], plain[1], strict=True):
        assert (ours.float() - theirs.float()).norm() < 0.01 * theirs.float().norm()


def test_equal_models_have_no_divergence_and_no_gradient_of_it():
    _, (stats, _) = both(ALL, dtype=torch.float32, same=True)
    assert not stats.kl_ref_policy.any() and not stats.kl_policy_ref.any() and not stats.log_ratio.any()


@pytest.mark.parametrize("of_model", [{}, {"logit_scale": 2.5, "soft_cap": 3.0}], ids=["plain", "capped"])
def test_one_kernel_serves_all_sizes(of_model):
    def score(rows, vocab):
        hidden = torch.randn(1, rows + 1, 8, requires_grad=True)
        weight = torch.randn(vocab, 8, requires_grad=True)
        labels = torch.arange(rows + 1)[None]
        stats = linear_token_stats(
            hidden, weight, None, None, labels, needs=frozenset(), compiled=True, **of_model
        )
        stats.policy_logps.sum().backward()
        return counters["stats"]["unique_graphs"]

    first = score(5, 40)
    assert [score(rows, vocab) for rows, vocab in ((6, 40), (30, 77), (17, 300))] == [first] * 3
