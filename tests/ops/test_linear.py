import weakref

import pytest
import torch
from support.heads import LABELS, blocks_of, make, total
from torch.utils._python_dispatch import TorchDispatchMode

from tokenpref.ops import head, linear_token_stats, products, score_tokens, token_stats_from_logits
from tokenpref.ops.head import logit_budget

MIB = 2**20
ALL = frozenset({"ref", "kl_ref_policy", "kl_policy_ref", "entropy"})
BLOCKS = [1, 200, 1 << 20]  # bytes: a column at a time, several, all of them
BUDGETS = [1e-6, 3e-4, 1]  # MiB: no block is kept, some are, all are


@pytest.fixture(params=BLOCKS, autouse=True)
def block_bytes(request):
    with blocks_of(request.param):
        yield request.param


@pytest.mark.parametrize("memory_mb", BUDGETS)
@pytest.mark.parametrize("wanted", ["both", "hidden", "weight"])
@pytest.mark.parametrize(
    "needs",
    [set(), {"ref"}, {"entropy"}, {"ref", "kl_ref_policy"}, {"kl_policy_ref"}, ALL],
    ids=lambda n: "+".join(sorted(n)),
)
def test_values_and_gradients_equal_those_through_logits(memory_mb, wanted, needs):
    hidden, weight, ref_hidden, ref_weight = make()
    hidden.requires_grad_(wanted != "weight")
    weight.requires_grad_(wanted != "hidden")
    needs = frozenset(needs)
    reference = (ref_hidden, ref_weight) if needs - {"entropy"} else (None, None)
    ref_logits = ref_hidden @ ref_weight.T if needs - {"entropy"} else None
    expected = token_stats_from_logits(hidden @ weight.T, ref_logits, LABELS, needs=needs)
    got = linear_token_stats(hidden, weight, *reference, LABELS, needs=needs, memory_mb=memory_mb)
    for name in ("policy_logps", "ref_logps", "kl_ref_policy", "kl_policy_ref", "entropy"):
        if getattr(expected, name) is not None:
            torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=1e-12, rtol=0)
    inputs = [x for x in (hidden, weight) if x.requires_grad]
    gradients = [torch.autograd.grad(total(stats), inputs) for stats in (got, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)


@pytest.mark.parametrize("memory_mb", BUDGETS)
@pytest.mark.parametrize("name", ["kl_ref_policy", "kl_policy_ref", "entropy"])
@pytest.mark.parametrize(
    "rows",
    [slice(0, 3), slice(3, 8), slice(2, 5), slice(0, 8), slice(0, 0)],
    ids=["first", "last", "middle", "all", "none"],
)
def test_a_statistic_with_gradients_at_some_rows_only(memory_mb, name, rows):
    hidden, weight, ref_hidden, ref_weight = make()
    needs = frozenset({"ref", "kl_ref_policy", name})
    factors = torch.zeros(8, dtype=torch.float64)
    factors[rows] = torch.arange(1.0, 9.0, dtype=torch.float64)[rows]
    logits = token_stats_from_logits(hidden @ weight.T, ref_hidden @ ref_weight.T, LABELS, needs=needs)
    found = linear_token_stats(
        hidden, weight, ref_hidden, ref_weight, LABELS, needs=needs, memory_mb=memory_mb
    )
    gradients = []
    for stats in (found, logits):
        of_logps = (stats.policy_logps[stats.mask] * torch.arange(8.0)).sum()
        scalar = of_logps + (getattr(stats, name)[stats.mask] * factors).sum()
        gradients.append(torch.autograd.grad(scalar, (hidden, weight)))
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-11, rtol=0)


def test_a_kl_without_gradient_costs_no_product_of_the_reference():
    # As when it is only logged.
    hidden, weight = torch.randn(1, 9, 4, requires_grad=True), torch.randn(64, 4, requires_grad=True)
    needs = frozenset({"kl_ref_policy"})
    for loss, inner in (("policy_logps", {4}), ("kl_ref_policy", {3, 4})):
        stats = linear_token_stats(
            hidden,
            weight,
            torch.randn(1, 9, 3),
            torch.randn(64, 3),
            torch.arange(9)[None],
            needs=needs,
            memory_mb=1e-6,
        )
        with Watch() as watch:
            getattr(stats, loss).sum().backward()
        # Only the reference's products have an inner dimension of 3.
        assert {shape[1] for shape, _ in watch.products} >= inner
        assert (3 in {shape[1] for shape, _ in watch.products}) is (3 in inner)


def test_the_backward_can_be_asked_twice():
    hidden, weight, ref_hidden, ref_weight = make()
    needs = frozenset({"ref", "kl_ref_policy"})
    stats = linear_token_stats(hidden, weight, ref_hidden, ref_weight, LABELS, needs=needs)
    first = torch.autograd.grad(total(stats), (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(total(stats), (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("memory_mb", BUDGETS)
def test_equal_models_have_no_divergence_and_no_gradient_of_it(memory_mb):
    hidden, weight, _, _ = (x.float() for x in make(vocab=101))
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    stats = linear_token_stats(
        hidden, weight, hidden.detach(), weight.detach(), LABELS, needs=ALL, memory_mb=memory_mb
    )
    assert not stats.kl_ref_policy.any() and not stats.kl_policy_ref.any() and not stats.log_ratio.any()
    for gradient in torch.autograd.grad(stats.kl_ref_policy.sum(), (hidden, weight)):
        assert not gradient.any()


def test_logits_far_apart_give_finite_numbers():
    """A target a hundred nats below the rest, and rows whose largest logit grows from block to block."""
    weight = torch.tensor([[-200.0], [0.0], [100.0], [250.0]], requires_grad=True)
    hidden = torch.ones(1, 3, 1, requires_grad=True)
    labels = torch.tensor([[-100, 0, 3]])
    for memory_mb in (1e-6, 1):
        stats = linear_token_stats(
            hidden, weight, None, None, labels, needs=frozenset({"entropy"}), memory_mb=memory_mb
        )
        assert stats.policy_logps.tolist() == [[-450.0, 0.0]] and stats.entropy.abs().max() < 1e-30
        gradients = torch.autograd.grad(stats.policy_logps.sum(), (hidden, weight))
        assert gradients[0].tolist() == [[[-450.0], [0.0], [0.0]]]
        assert gradients[1].flatten().tolist() == [1.0, 0.0, 0.0, -1.0]


@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_float32_divergences_are_close_to_float64(scale):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(1, 65, 32, generator=generator),
        torch.randn(3000, 32, generator=generator) / 4,
    )
    ref_hidden = hidden + scale * torch.randn(1, 65, 32, generator=generator)
    labels = torch.randint(3000, (1, 65), generator=generator)
    low, high = (
        linear_token_stats(
            *(x.to(d) for x in (hidden, weight, ref_hidden, weight)), labels, needs=ALL, memory_mb=0.1
        )
        for d in (torch.float32, torch.float64)
    )
    for name in ("policy_logps", "ref_logps", "kl_ref_policy", "kl_policy_ref", "entropy"):
        assert (getattr(low, name) - getattr(high, name)).abs().max() < 3e-6, name
        assert name.endswith("logps") or getattr(low, name).min() >= 0


def test_gradcheck_of_hidden_states_and_head():
    hidden, weight, ref_hidden, ref_weight = make()

    def function(h, w):
        return total(linear_token_stats(h, w, ref_hidden, ref_weight, LABELS, needs=ALL, memory_mb=3e-4))

    assert torch.autograd.gradcheck(function, (hidden, weight))


def test_a_frozen_head_gets_no_gradient_and_a_frozen_body_neither():
    hidden, weight, ref_hidden, ref_weight = make()
    total(linear_token_stats(hidden, weight.detach(), ref_hidden, ref_weight, LABELS, needs=ALL)).backward()
    assert hidden.grad is not None and weight.grad is None
    body = hidden.grad
    hidden.grad = None
    total(linear_token_stats(hidden.detach(), weight, ref_hidden, ref_weight, LABELS, needs=ALL)).backward()
    assert hidden.grad is None and weight.grad is not None
    total(linear_token_stats(hidden, weight, ref_hidden, ref_weight, LABELS, needs=ALL)).backward()
    assert torch.equal(hidden.grad, body)


def test_a_tied_head_adds_both_gradients():
    # The embedding is the head: its gradient is the head's plus the one through the hidden states.
    _, weight, ref_hidden, ref_weight = make()
    tokens = LABELS.clamp(min=0)
    hidden = torch.tanh(weight[tokens])
    stats = linear_token_stats(hidden, weight, ref_hidden, ref_weight, LABELS, needs=ALL, memory_mb=3e-4)
    expected = token_stats_from_logits(hidden @ weight.T, ref_hidden @ ref_weight.T, LABELS, needs=ALL)
    (ours,) = torch.autograd.grad(total(stats), weight, retain_graph=True)
    (theirs,) = torch.autograd.grad(total(expected), weight)
    torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)


@pytest.mark.parametrize("needs", [frozenset({"ref"}), frozenset({"kl_ref_policy"}), ALL])
def test_a_batch_without_answers_gives_zero_gradients_not_none(needs):
    hidden, weight, ref_hidden, ref_weight = make()
    stats = linear_token_stats(
        hidden, weight, ref_hidden, ref_weight, torch.full_like(LABELS, -100), needs=needs
    )
    total(stats).backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=0)


def test_no_gradient_mode_keeps_no_graph():
    hidden, weight, _, _ = make()
    with torch.no_grad():
        stats = linear_token_stats(hidden, weight, None, None, LABELS, needs=frozenset())
    assert not stats.policy_logps.requires_grad


@pytest.mark.parametrize("memory_mb", [0.01, 100])
def test_head_gradient_in_bfloat16_accumulates_in_float32(memory_mb):
    # 2048 tokens, each adding about the same small number: in bfloat16 the sum would stall long before the end.
    hidden = torch.ones(1, 2049, 1, dtype=torch.bfloat16)
    weight = torch.zeros(4, 1, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(1, 2049, dtype=torch.int64)
    stats = linear_token_stats(hidden, weight, None, None, labels, needs=frozenset(), memory_mb=memory_mb)
    stats.policy_logps.sum().backward()
    # p = 1/4 everywhere, target 0: 2048 * (1 - 1/4) = 1536 for the target, -2048 / 4 = -512 for the others
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.flatten().tolist() == [1536.0, -512.0, -512.0, -512.0]


@pytest.mark.parametrize("multiplies", [True, False], ids=["has bfloat16 products", "has none"])
def test_half_precision_is_close_to_float32(multiplies, monkeypatch):
    monkeypatch.setattr(products, "_multiplies", lambda dtype, device: multiplies or dtype != torch.bfloat16)
    low = make(torch.bfloat16)
    high = [x.detach().float().requires_grad_(x.requires_grad) for x in low]
    gradients = []
    for hidden, weight, ref_hidden, ref_weight in (low, high):
        stats = linear_token_stats(hidden, weight, ref_hidden, ref_weight, LABELS, needs=ALL, memory_mb=3e-4)
        assert stats.policy_logps.dtype == stats.kl_ref_policy.dtype == torch.float32
        gradients.append((stats.policy_logps, *torch.autograd.grad(total(stats), (hidden, weight))))
    for ours, theirs in zip(*gradients, strict=True):
        # bfloat16 has 8 bits: logits of about 4 are rounded by up to 1/128
        assert (ours.float() - theirs).norm() < 0.03 * theirs.norm()


class Watch(TorchDispatchMode):
    """Largest tensor that any operation returns, operations that were run, shapes of products, tensors that are made."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.operations = []
        self.products = []
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations.append(func.overloadpacket.__name__)
        if self.operations[-1] == "mm":
            self.products.append([tuple(factor.shape) for factor in args])
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
                self.made.append(weakref.ref(tensor))
        return out

    def alive(self):
        """Bytes of tensors that were made and are still there."""
        tensors = [tensor for ref in self.made if (tensor := ref()) is not None]
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def score_many(rows, memory_mb, needs=frozenset({"ref", "kl_ref_policy"}), dtype=torch.float32):
    """Statistics of rows over a vocabulary of 1,001 words, the inputs, and what was watched in the forward pass."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, ref_hidden, ref_weight = (
        torch.randn(size, 5, generator=generator).to(dtype) for size in (rows, 1001, rows, 1001)
    )
    hidden.requires_grad_(), weight.requires_grad_()
    with Watch() as watch:
        values = score_tokens(
            hidden,
            weight,
            torch.arange(rows) % 1001,
            ref_hidden=ref_hidden,
            ref_head_weight=ref_weight,
            needs=needs,
            memory_mb=memory_mb,
        )
    return values, (hidden, weight), watch


@pytest.mark.parametrize("block_bytes", [8192], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_stays_within_the_budget_and_does_not_grow_with_positions(dtype, block_bytes):
    for rows in (16, 64, 256):
        for budget in (20_000, 60_000):
            values, inputs, watch = score_many(rows, budget / MIB, dtype=dtype)
            others = (
                40 * 8 * rows + 2 * 1001 * 5 * dtype.itemsize
            )  # statistics and sums of rows, views of the heads
            assert watch.alive() <= 2 * budget + others
            assert watch.alive() >= min(budget, rows * 1001 * dtype.itemsize) / 2
            assert watch.largest <= max(block_bytes // 4, 1001 * 5)
            with Watch() as backward:
                torch.autograd.grad(sum(v.sum() for n, v in values.items() if n != "ref_logps"), inputs)
            assert backward.largest <= max(block_bytes // 4, 1001 * 5)
            # The forward pass never waits for a device.
            assert not {"nonzero", "_local_scalar_dense", "item"} & set(watch.operations)


@pytest.mark.parametrize("block_bytes", [8192], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_budget_changes_no_bit(dtype, block_bytes):
    # A default that depends on free memory must not make two runs differ.
    found = []
    for memory_mb in (1e-6, 0.03, None):
        values, inputs, _ = score_many(37, memory_mb, needs=ALL, dtype=dtype)
        loss = values["policy_logps"].sum() + sum(values[name][20:].sum() for name in ALL - {"ref"})
        found.append([*values.values(), *torch.autograd.grad(loss, inputs)])
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


def test_without_a_backward_pass_nothing_is_kept():
    for frozen in (True, False):
        hidden, weight = torch.randn(30, 5, requires_grad=frozen), torch.randn(1001, 5)
        with Watch() as watch:
            values = score_tokens(hidden, weight, torch.arange(30), memory_mb=100)
        assert values["policy_logps"].requires_grad is frozen
        assert watch.alive() < 30 * 1001 * 4 / 8


def test_the_default_budget_follows_the_head_and_the_free_memory(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(head, "free_memory", lambda device: 1600)
    assert logit_budget(None, 10, cpu) == 70 and logit_budget(None, 1000, cpu) == 100
    assert logit_budget(0.5, 10, cpu) == MIB // 2
    monkeypatch.setattr(head, "free_memory", lambda device: None)
    assert logit_budget(None, 1000, cpu) == 7000


def test_score_tokens_gives_rows():
    hidden, weight, ref_hidden, ref_weight = make()
    targets = torch.tensor([3, 0, 6])
    rows = score_tokens(
        hidden[0, :3], weight, targets, ref_hidden=ref_hidden[0, :3], ref_head_weight=ref_weight, needs=ALL
    )
    assert set(rows) == {"policy_logps", "ref_logps", "kl_ref_policy", "kl_policy_ref", "entropy"}
    log_p = (hidden[0, :3] @ weight.T).log_softmax(-1)
    torch.testing.assert_close(rows["policy_logps"], log_p[[0, 1, 2], targets], atol=1e-12, rtol=0)
    assert set(score_tokens(hidden[0, :3], weight, targets)) == {"policy_logps"}


def test_score_tokens_checks_its_arguments():
    hidden, weight, ref_hidden, ref_weight = make()
    rows, targets = hidden[0, :3], torch.tensor([3, 0, 6])
    with pytest.raises(ValueError, match=r"\['ref'\]"):
        score_tokens(rows, weight, targets, needs={"ref"})
    with pytest.raises(ValueError, match="without ref_head_weight"):
        score_tokens(rows, weight, targets, ref_hidden=ref_hidden[0, :3], needs={"ref"})
    with pytest.raises(ValueError, match=r"must agree in D, got \[3, 4\] and \[7, 3\]"):
        score_tokens(rows, ref_weight, targets)
    with pytest.raises(ValueError, match="hidden has 3 rows for 2 targets"):
        score_tokens(rows, weight, targets[:2])
    with pytest.raises(ValueError, match="differ in vocabulary: head_weight has 7 rows, ref_head_weight 6"):
        score_tokens(
            rows, weight, targets, ref_hidden=ref_hidden[0, :3], ref_head_weight=ref_weight[:6], needs={"ref"}
        )
    with pytest.raises(ValueError, match="memory_mb must be a number above 0, or None, got 0"):
        score_tokens(rows, weight, targets, memory_mb=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compiled", [False, True], ids=["op by op", "Triton"])
def test_cuda_equals_cpu(dtype, compiled):
    results = []
    for device in ("cpu", "cuda"):
        tensors = [x.detach().to(device).requires_grad_(x.requires_grad) for x in make(dtype)]
        stats = linear_token_stats(
            *tensors, LABELS.to(device), needs=ALL, memory_mb=3e-4, compiled=compiled and device == "cuda"
        )
        results.append([g.float().cpu() for g in torch.autograd.grad(total(stats), tensors[:2])])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() < (1e-5 if dtype == torch.float32 else 0.03) * theirs.norm()
