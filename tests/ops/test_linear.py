import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tokenpref.ops import linear_token_stats, score_tokens, token_stats_from_logits

ALL = frozenset({"ref", "kl_ref_policy", "kl_policy_ref", "entropy"})
LABELS = torch.tensor([[-100, -100, 3, 0, 4, 1, 6], [-100, 2, 2, 1, -100, -100, -100]])


def make(dtype=torch.float64, vocab=7, width=4, ref_width=3):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    hidden, weight = normal(2, 7, width).requires_grad_(), normal(vocab, width).requires_grad_()
    return hidden, weight, normal(2, 7, ref_width), normal(vocab, ref_width)


def total(stats):
    """A scalar in which every statistic counts differently at every token."""
    places = torch.arange(1, stats.mask.numel() + 1, device=stats.mask.device).view_as(stats.mask)
    mix = 3 * stats.policy_logps - 2 * stats.kl_ref_policy + stats.kl_policy_ref + 0.5 * stats.entropy
    return (places * mix).sum()


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_values_and_gradients_equal_those_through_logits(chunk_size):
    hidden, weight, ref_hidden, ref_weight = make()
    expected = token_stats_from_logits(hidden @ weight.T, ref_hidden @ ref_weight.T, LABELS, needs=ALL)
    got = linear_token_stats(hidden, weight, ref_hidden, ref_weight, LABELS, needs=ALL, chunk_size=chunk_size)
    for name in ("policy_logps", "ref_logps", "kl_ref_policy", "kl_policy_ref", "entropy"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=1e-12, rtol=0)
    gradients = [torch.autograd.grad(total(stats), (hidden, weight)) for stats in (got, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)


def test_gradcheck_of_hidden_states_and_head():
    hidden, weight, ref_hidden, ref_weight = make()

    def function(h, w):
        return total(linear_token_stats(h, w, ref_hidden, ref_weight, LABELS, needs=ALL, chunk_size=3))

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
    stats = linear_token_stats(hidden, weight, ref_hidden, ref_weight, LABELS, needs=ALL, chunk_size=2)
    expected = token_stats_from_logits(hidden @ weight.T, ref_hidden @ ref_weight.T, LABELS, needs=ALL)
    (ours,) = torch.autograd.grad(total(stats), weight, retain_graph=True)
    (theirs,) = torch.autograd.grad(total(expected), weight)
    torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)


def test_a_batch_without_answers_gives_zero_gradients_not_none():
    hidden, weight, ref_hidden, ref_weight = make()
    stats = linear_token_stats(
        hidden, weight, ref_hidden, ref_weight, torch.full_like(LABELS, -100), needs=ALL
    )
    total(stats).backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_no_gradient_mode_keeps_no_graph():
    hidden, weight, _, _ = make()
    with torch.no_grad():
        stats = linear_token_stats(hidden, weight, None, None, LABELS, needs=frozenset())
    assert not stats.policy_logps.requires_grad


@pytest.mark.parametrize("chunk_size", [1, 100])
def test_head_gradient_in_bfloat16_accumulates_in_float32(chunk_size):
    # 2048 tokens, each adding about the same small number: in bfloat16 the sum would stall long before the end.
    hidden = torch.ones(1, 2049, 1, dtype=torch.bfloat16)
    weight = torch.zeros(4, 1, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(1, 2049, dtype=torch.int64)
    stats = linear_token_stats(hidden, weight, None, None, labels, needs=frozenset(), chunk_size=chunk_size)
    stats.policy_logps.sum().backward()
    # p = 1/4 everywhere, target 0: 2048 * (1 - 1/4) = 1536 for the target, -2048 / 4 = -512 for the others
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.flatten().tolist() == [1536.0, -512.0, -512.0, -512.0]


def test_half_precision_is_close_to_float32():
    low = make(torch.bfloat16)
    high = [x.detach().float().requires_grad_(x.requires_grad) for x in low]
    gradients = []
    for hidden, weight, ref_hidden, ref_weight in (low, high):
        stats = linear_token_stats(hidden, weight, ref_hidden, ref_weight, LABELS, needs=ALL, chunk_size=2)
        assert stats.policy_logps.dtype == stats.kl_ref_policy.dtype == torch.float32
        gradients.append((stats.policy_logps, *torch.autograd.grad(total(stats), (hidden, weight))))
    for ours, theirs in zip(*gradients, strict=True):
        # bfloat16 has 8 bits: logits of about 4 are rounded by up to 1/128
        assert (ours.float() - theirs).norm() < 0.03 * theirs.norm()


class Watch(TorchDispatchMode):
    """Largest tensor that any operation returns, and the operations that were run."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations.append(func.overloadpacket.__name__)
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


def test_no_tensor_is_larger_than_a_chunk_of_logits_and_the_host_waits_once():
    batch, length, vocab, width, chunk = 2, 64, 101, 5, 8
    hidden = torch.randn(batch, length, width, requires_grad=True)
    weight = torch.randn(vocab, width, requires_grad=True)
    labels = torch.randint(vocab, (batch, length))
    with Watch() as watch:
        stats = linear_token_stats(
            hidden, weight, hidden.detach() + 1, weight.detach(), labels, needs=ALL, chunk_size=chunk
        )
        total(stats).backward()
    assert watch.largest == chunk * vocab  # 808, against 12928 for all logits
    assert watch.operations.count("nonzero") == 1
    assert "_local_scalar_dense" not in watch.operations


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
    with pytest.raises(ValueError, match="chunk_size must be an integer >= 1, got 0"):
        score_tokens(rows, weight, targets, chunk_size=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_equals_cpu(dtype):
    results = []
    for device in ("cpu", "cuda"):
        tensors = [x.detach().to(device).requires_grad_(x.requires_grad) for x in make(dtype)]
        stats = linear_token_stats(*tensors, LABELS.to(device), needs=ALL, chunk_size=2)
        results.append([g.float().cpu() for g in torch.autograd.grad(total(stats), tensors[:2])])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() < (1e-5 if dtype == torch.float32 else 0.03) * theirs.norm()
