"""The head's Triton kernels without a GPU: in Triton's interpreter, and by its compiler.

    TRITON_INTERPRET=1 python -m pytest tests/ops/test_triton_head.py    # runs the kernels on a CPU
    python -m pytest tests/ops/test_triton_head.py                       # compiles them for an H100

Triton comes with PyTorch for CUDA. Beside PyTorch for CPUs it can be installed by itself, and its interpreter needs numpy below
2.4. Where it is missing, these tests are skipped.
"""

import os
from importlib.util import find_spec

import pytest
import torch
from support.heads import LABELS, blocks_of, make, total

from tokenpref.ops import final_logits, head, linear_token_stats, score_tokens, token_stats_from_logits

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs Triton and TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="needs Triton without its interpreter")

ALL = frozenset({"ref", "kl_ref_policy", "kl_policy_ref", "entropy"})
NAMES = ("policy_logps", "ref_logps", "kl_ref_policy", "kl_policy_ref", "entropy")
MAPS = {"plain": {}, "scale and cap": {"logit_scale": 2.5, "soft_cap": 3.0}}


@pytest.fixture(params=MAPS.values(), ids=MAPS)
def of_model(request):
    return request.param


@pytest.fixture(autouse=True)
def blocks():
    """Several blocks; the interpreter takes milliseconds for each row of each."""
    with blocks_of(256):
        yield


@interpreted
def test_these_kernels_are_used():
    assert head._passes(True, torch.device("cpu")).__name__ == "tokenpref.ops.triton_head"
    assert head._passes(False, torch.device("cpu")).__class__.__name__ == "_TorchPasses"


@interpreted
@pytest.mark.parametrize("wanted", ["both", "hidden", "weight"])
@pytest.mark.parametrize(
    "needs",
    [set(), {"ref"}, {"entropy"}, {"ref", "kl_ref_policy"}, {"kl_policy_ref"}, ALL],
    ids=lambda n: "+".join(sorted(n)),
)
def test_values_and_gradients_equal_those_through_logits(of_model, wanted, needs):
    hidden, weight, ref_hidden, ref_weight = make()
    hidden.requires_grad_(wanted != "weight")
    weight.requires_grad_(wanted != "hidden")
    needs = frozenset(needs)
    ref_logits = final_logits(ref_hidden @ ref_weight.T, **of_model) if needs - {"entropy"} else None
    reference = (None, None) if ref_logits is None else (ref_hidden, ref_weight)
    expected = token_stats_from_logits(
        final_logits(hidden @ weight.T, **of_model), ref_logits, LABELS, needs=needs
    )
    inputs = [x for x in (hidden, weight) if x.requires_grad]
    found = linear_token_stats(
        hidden,
        weight,
        *reference,
        LABELS,
        needs=needs,
        memory_mb=3e-4,  # some of the blocks are kept
        compiled=True,
        **of_model,
    )
    for name in NAMES:
        if getattr(expected, name) is not None:
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-12, rtol=0)
    gradients = [torch.autograd.grad(total(stats), inputs) for stats in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained head", "frozen head"])
def test_lower_precision_is_as_close_as_op_by_op(of_model, dtype, frozen):
    needs = frozenset({"ref", "kl_ref_policy"}) if frozen else ALL
    found = []
    for compiled in (False, True):
        hidden, weight, other, _ = make(dtype, vocab=301, width=16, ref_width=16)
        weight.requires_grad_(not frozen)
        ref_hidden, ref_weight = hidden.detach() + 0.1 * other, weight.detach()
        with blocks_of(8192):
            stats = linear_token_stats(
                hidden, weight, ref_hidden, ref_weight, LABELS, needs=needs, compiled=compiled, **of_model
            )
        inputs = [x for x in (hidden, weight) if x.requires_grad]
        found.append(
            [
                *(v.detach() for name in NAMES if (v := getattr(stats, name)) is not None),
                *torch.autograd.grad(total(stats), inputs),
            ]
        )
    for one, other in zip(*found, strict=True):
        tolerance = 0.01 if torch.bfloat16 in (dtype, one.dtype) else 2e-6
        assert (one.float() - other.float()).norm() <= tolerance * other.float().norm() + 1e-6


@interpreted
def test_equal_models_have_no_divergence_and_no_gradient_of_it(of_model):
    hidden, weight, _, _ = (x.detach().float() for x in make(vocab=17))
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    stats = linear_token_stats(
        *inputs, hidden.detach(), weight.detach(), LABELS, needs=ALL, compiled=True, **of_model
    )
    assert not stats.kl_ref_policy.any() and not stats.kl_policy_ref.any() and not stats.log_ratio.any()
    for gradient in torch.autograd.grad(stats.kl_ref_policy.sum(), inputs):
        assert not gradient.any()


@interpreted
@pytest.mark.parametrize("rows", [slice(0, 3), slice(2, 5), slice(0, 0)], ids=["first", "middle", "none"])
def test_a_kl_with_gradients_at_some_rows_only(rows):
    hidden, weight, ref_hidden, ref_weight = make()
    factors = torch.zeros(8, dtype=torch.float64)
    factors[rows] = 2.0
    gradients = []
    for compiled in (False, True):
        stats = linear_token_stats(
            hidden, weight, ref_hidden, ref_weight, LABELS, needs=ALL, compiled=compiled
        )
        scalar = (stats.kl_ref_policy[stats.mask] * factors).sum() + stats.policy_logps.sum()
        gradients.append(torch.autograd.grad(scalar, (hidden, weight)))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


@interpreted
def test_the_backward_can_be_asked_twice_and_a_batch_may_have_no_answers(of_model):
    hidden, weight, ref_hidden, ref_weight = make()
    for labels in (LABELS, torch.full_like(LABELS, -100)):
        stats = linear_token_stats(
            hidden, weight, ref_hidden, ref_weight, labels, needs=ALL, compiled=True, **of_model
        )
        first = torch.autograd.grad(total(stats), (hidden, weight), retain_graph=True)
        second = torch.autograd.grad(total(stats), (hidden, weight))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@interpreted
def test_logits_far_apart_give_finite_numbers():
    weight = torch.tensor([[-200.0], [0.0], [100.0], [250.0]], requires_grad=True)
    hidden = torch.ones(2, 1, requires_grad=True)
    values = score_tokens(hidden, weight, torch.tensor([0, 3]), needs=frozenset({"entropy"}), compiled=True)
    assert values["policy_logps"].tolist() == [-450.0, 0.0] and values["entropy"].abs().max() < 1e-30
    gradients = torch.autograd.grad(values["policy_logps"].sum(), (hidden, weight))
    assert gradients[1].flatten().tolist() == [1.0, 0.0, 0.0, -1.0]


POINTERS = {
    "columns": "*i64",
    "width": "i32",
    **dict.fromkeys(("total", "own", "gap", "ref_total", "ref_gap", "growth"), "*fp64"),
}


@compiled
@pytest.mark.parametrize(("dtype", "wide"), [("bf16", "fp32"), ("fp32", "fp32"), ("fp64", "fp64")])
@pytest.mark.parametrize("cap", [0.0, 30.0], ids=["plain", "capped"])
def test_they_compile_for_a_gpu(dtype, wide, cap):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tokenpref.ops import triton_head

    constants = {"SCALE": 1.0, "CAP": cap, "DOUBLE": wide == "fp64", "TILE": 1024}
    kernels = {"_add_block": {"HAS_REF", "OWN", "GAP", "REF_GAP", "PRECISE"}, "_exponentials": set(),
               "_gradient": {"LOGPS", "REF_POLICY", "POLICY_REF", "ENTROPY"}}  # fmt: skip
    for name, flags in kernels.items():
        kernel = getattr(triton_head, name)
        given = {**constants, **dict.fromkeys(flags, True)}
        signature = {
            argument: "constexpr"
            if argument in given
            else POINTERS.get(
                argument, f"*{dtype if argument.endswith('raw') or argument == 'out' else wide}"
            )
            for argument in kernel.arg_names
        }
        made = triton.compile(
            ASTSource(kernel, signature, constexprs=given),
            target=GPUTarget("cuda", 90, 32),
            options={"enable_fp_fusion": False},
        )
        assert made.asm["cubin"]
