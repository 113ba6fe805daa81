"""Compiled passes against those op by op, by the compiler that users have."""

import shutil

import pytest
import torch
from support import small
from support.heads import LABELS, make, total
from torch._dynamo.utils import counters

from tokenpref.losses import TokenDPOLoss
from tokenpref.models.head_work import HeadWork
from tokenpref.models.scoring import ScoringModel
from tokenpref.ops import linear_token_stats
from tokenpref.ops._blocks import plan_blocks
from tokenpref.stats import split_pair

ALL = frozenset({"ref", "kl_ref_policy", "kl_policy_ref", "entropy"})
NAMES = ("policy_logps", "ref_logps", "kl_ref_policy", "kl_policy_ref", "entropy")
BUDGETS = [0.0005, 0.002, 0.01, 1]  # MiB: several columns at a time, some of them kept, all kept

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")), reason="there is no C++ compiler"
)


@pytest.fixture(autouse=True)
def compiler():
    """A compiler that has seen nothing, and that never gives up in silence."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


def both(needs, memory_mb, *, dtype=torch.float64, frozen=False, same=False):
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
            memory_mb=memory_mb,
            compiled=compiled,
        )
        inputs = [x for x in (hidden, weight) if x.requires_grad]
        found.append((stats, torch.autograd.grad(total(stats), inputs)))
    return found


def assert_near(found, wanted, **tolerance):
    for name in NAMES:
        if getattr(wanted[0], name) is not None:
            torch.testing.assert_close(getattr(found[0], name), getattr(wanted[0], name), **tolerance)
    for ours, theirs in zip(found[1], wanted[1], strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@needs_compiler
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen head"])
@pytest.mark.parametrize(
    "needs",
    [frozenset(), frozenset({"ref", "kl_ref_policy"}), ALL],
    ids=lambda needs: "+".join(sorted(needs)) or "none",
)
def test_compiled_passes_give_what_those_op_by_op_give(needs, frozen):
    for memory_mb in BUDGETS:
        plain, compiled = both(needs, memory_mb, frozen=frozen)
        assert_near(compiled, plain, atol=1e-11, rtol=1e-11)
    assert counters["stats"]["unique_graphs"] > 0


@needs_compiler
@pytest.mark.parametrize("needs", [frozenset(), frozenset({"ref", "kl_ref_policy"})], ids=["none", "kl"])
def test_of_bfloat16_compiled_passes_round_no_more(needs):
    for memory_mb in BUDGETS:
        plain, compiled = both(needs, memory_mb, dtype=torch.bfloat16)
        for name in ("policy_logps", "kl_ref_policy"):
            if getattr(plain[0], name) is not None:
                ours, theirs = getattr(compiled[0], name), getattr(plain[0], name)
                assert ours.dtype == torch.float32
                torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-6)
        for ours, theirs in zip(compiled[1], plain[1], strict=True):
            # Each is rounded at the eighth bit, and so are blocks.
            assert (ours - theirs).norm() < 0.01 * theirs.norm()


@needs_compiler
def test_equal_models_have_no_divergence_and_no_gradient_of_it_compiled():
    for memory_mb in BUDGETS:
        _, (stats, _) = both(ALL, memory_mb, dtype=torch.float32, same=True)
        assert not stats.kl_ref_policy.any() and not stats.kl_policy_ref.any() and not stats.log_ratio.any()
        hidden, weight, _, _ = make(torch.float32, vocab=101)
        stats = linear_token_stats(
            hidden,
            weight,
            hidden.detach(),
            weight.detach(),
            LABELS,
            needs=frozenset({"kl_ref_policy"}),
            memory_mb=memory_mb,
            compiled=True,
        )
        for gradient in torch.autograd.grad(stats.kl_ref_policy.sum(), (hidden, weight)):
            assert not gradient.any()


@needs_compiler
def test_one_kernel_serves_all_sizes():
    def score(rows, vocab):
        hidden = torch.randn(1, rows + 1, 8, requires_grad=True)
        weight = torch.randn(vocab, 8, requires_grad=True)
        labels = torch.arange(rows + 1)[None]
        stats = linear_token_stats(hidden, weight, None, None, labels, needs=frozenset(), compiled=True)
        stats.policy_logps.sum().backward()
        return counters["stats"]["unique_graphs"]

    first = score(5, 40)
    assert [score(rows, vocab) for rows, vocab in ((6, 40), (30, 77), (17, 300))] == [first] * 3


@needs_compiler
def test_a_model_takes_compiled_passes_with_its_groups():
    # A budget for two or three pairs' logits, so that groups come one after another.
    batch, loss, found = small.batch([0, 1, 2, 3, 4]), TokenDPOLoss(), []
    for compiled in (False, True):
        model = small.decoder(0)
        scorer = ScoringModel(model, head_memory_mb=0.02, compiled=compiled)
        with small.reference(1).outputs(batch, loss.needs) as ref:
            work = HeadWork(
                batch.labels, loss.needs, 2, ref_hidden=ref.hidden, ref_head_weight=ref.head_weight
            )
            value = scorer.pairs_loss(
                batch.tokens, work, lambda stats, _: loss(split_pair(stats, batch.sides)).losses.sum()
            )
            value.backward()
        found.append((value.detach(), {n: p.grad for n, p in model.named_parameters()}))
        assert bool(counters["stats"]["unique_graphs"]) == compiled
    plain, compiled = found
    torch.testing.assert_close(compiled[0], plain[0], atol=1e-12, rtol=0)
    for name, gradient in plain[1].items():
        torch.testing.assert_close(compiled[1][name], gradient, atol=1e-12, rtol=1e-9, msg=name)


@pytest.mark.parametrize(("keep", "at_work"), [(1, 1), (2, 3)], ids=["log-probs", "kl"])
def test_plans_count_what_compiled_passes_hold(keep, at_work):
    rows, budget = 2048, 256 * 2**20
    blocks = plan_blocks(
        rows,
        128_256,
        models=keep,
        keep=keep,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        budget=budget,
        compiled=True,
    )
    # Logits as they are, two bytes each, in place of float32's: 16 MiB at work hold more columns.
    block = rows * blocks.columns * 2
    assert block * at_work <= keep * 8 * 2**20
    assert budget - block * (at_work + blocks.kept + 1) < 0 <= budget - block * (at_work + blocks.kept)
