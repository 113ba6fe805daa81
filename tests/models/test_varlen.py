"""Attention over sequences of different lengths in one call, with a stand-in for PyTorch's kernel, which needs a GPU."""

import pytest
import torch
from support import small
from torch._dynamo.testing import CompileCounterWithBackend
from torchtune.models.llama3 import llama3
from torchtune.models.qwen2 import qwen2

from tokenpref.models import varlen
from tokenpref.models.padding_free import PackedRows
from tokenpref.models.scoring import ScoringModel
from tokenpref.ops import AnswerRows

SIZES = {
    "vocab_size": small.VOCAB,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "max_seq_len": 64,
    "intermediate_dim": 48,
}


@torch.library.custom_op("tokenpref_test::attention", mutates_args={})
def one_call(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ends_q: torch.Tensor,
    ends_k: torch.Tensor,
    scale: float,
    window: int,
) -> torch.Tensor:
    return by_definition(q, k, v, ends_q, ends_k, scale, window)


def sequences(q, k, v, ends_q, ends_k, scale, window):
    """Of each sequence: places of its queries and keys, keys and values for every head, and the weights ``[heads, Q, K]``."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    for i in range(len(ends_q) - 1):
        a, b = slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])
        scores = torch.einsum("qhd,khd->hqk", q[a], k[b]) * scale
        count, total = scores.shape[1:]
        # The last queries of the sequence: the mask is aligned at the bottom right.
        back = torch.arange(total - count, total)[:, None] - torch.arange(total)
        seen = (back >= 0) & ((back <= window) if window >= 0 else torch.ones_like(back, dtype=torch.bool))
        yield a, b, k[b], v[b], scores.masked_fill(~seen, -torch.inf).softmax(-1)


def by_definition(q, k, v, ends_q, ends_k, scale, window):
    parts = sequences(q, k, v, ends_q, ends_k, scale, window)
    return torch.cat([torch.einsum("hqk,khd->qhd", weights, values) for *_, values, weights in parts])


@one_call.register_fake
def _(q, k, v, ends_q, ends_k, scale, window):
    return torch.empty_like(q)


def _keep(ctx, inputs, output):
    *tensors, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    q, k, v, ends_q, ends_k = ctx.saved_tensors
    return (*one_call_backward(grad, q, k, v, ends_q, ends_k, ctx.scale, ctx.window), None, None, None, None)


@torch.library.custom_op("tokenpref_test::attention_backward", mutates_args={})
def one_call_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ends_q: torch.Tensor,
    ends_k: torch.Tensor,
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    groups = q.shape[1] // k.shape[1]
    found = [torch.zeros_like(q), *(x.repeat_interleave(groups, 1) * 0 for x in (k, v))]
    for a, b, keys, values, weights in sequences(q, k, v, ends_q, ends_k, scale, window):
        of_weights = torch.einsum("qhd,khd->hqk", grad[a], values)
        of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale
        found[0][a] = torch.einsum("hqk,khd->qhd", of_scores, keys)
        found[1][b] = torch.einsum("hqk,qhd->khd", of_scores, q[a])
        found[2][b] = torch.einsum("hqk,qhd->khd", weights, grad[a])
    of_q, of_k, of_v = found
    return of_q, of_k.unflatten(1, (-1, groups)).sum(2), of_v.unflatten(1, (-1, groups)).sum(2)


@one_call_backward.register_fake
def _(grad, q, k, v, ends_q, ends_k, scale, window):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


one_call.register_autograd(_backward, setup_context=_keep)


def stand_in(q, k, v, ends_q, ends_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """PyTorch's ``varlen_attn``, for any device and dtype."""
    assert ends_q.dtype == ends_k.dtype == torch.int32
    assert window_size[1] == 0 and enable_gqa == (q.shape[1] != k.shape[1])
    return one_call(q, k, v, ends_q, ends_k, q.shape[-1] ** -0.5 if scale is None else scale, window_size[0])


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(varlen, "takes", lambda q, v, window: True)
    monkeypatch.setattr(varlen, "_function", lambda: stand_in)
    monkeypatch.setattr(varlen, "_parameters", lambda: frozenset({"window_size", "enable_gqa", "scale"}))


def pairs(seed, rows=3, longest=20):
    """Random pairs that share prompts of several lengths: tokens and labels ``[2 rows, longest]``."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, small.VOCAB, (2 * rows, longest), generator=generator)
    labels = torch.full_like(tokens, -100)
    for row in range(rows):
        prompt = int(torch.randint(1, 8, (), generator=generator))
        for side in (row, row + rows):
            length = prompt + int(torch.randint(1, longest - 8, (), generator=generator))
            tokens[side, :prompt] = tokens[row, :prompt]
            labels[side, prompt:length] = tokens[side, prompt:length]
            tokens[side, length:] = 0
    return tokens, labels


@pytest.mark.parametrize("build", [llama3, qwen2])
@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_one_call_equals_a_call_for_each_sequence(build, sides, seed, request):
    torch.manual_seed(seed)
    scorer = ScoringModel(build(**SIZES).double())
    tokens, labels = pairs(seed)

    def numbers():
        scorer.model.zero_grad()
        logps = scorer.token_stats(tokens, labels, needs=frozenset(), sides=sides).policy_logps
        (logps * torch.arange(1, 1 + logps.shape[1])).sum().backward()
        return [logps.detach(), *(p.grad.clone() for p in scorer.model.parameters())]

    apart = numbers()
    request.getfixturevalue("as_on_a_gpu")
    for expected, found in zip(apart, numbers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_windows_and_grouped_heads(as_on_a_gpu, window):
    """Random queries, keys and values against whole masks."""
    tokens, labels = pairs(0)
    packed = PackedRows.of(tokens, labels, AnswerRows.of(labels), sides=2)
    segments = packed.segments
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(len(packed.tokens), heads, 8, generator=generator, dtype=torch.float64)
        for heads in (4, 2, 2)
    )
    members = segments.members
    found = varlen.causal_attention(
        q, k[members], v[members], segments.own_ends, segments.ends, segments.bound, scale=0.3, window=window
    )
    whole, start = [], 0
    for length in segments.lengths:
        at = members[start : start + length]
        scores = torch.einsum("qhd,khd->hqk", q[at], k[at].repeat_interleave(2, 1)) * 0.3
        back = torch.arange(length)[:, None] - torch.arange(length)
        unseen = (back < 0) if window is None else (back < 0) | (back >= window)
        whole.append(
            torch.einsum(
                "hqk,khd->qhd",
                scores.masked_fill(unseen, -torch.inf).softmax(-1),
                v[at].repeat_interleave(2, 1),
            )
        )
        start += length
    torch.testing.assert_close(found, torch.cat(whole)[segments.firsts], rtol=1e-12, atol=1e-12)


def test_every_sequence_has_a_query():
    """Equal answers share all but their last position."""
    tokens = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]])
    labels = torch.tensor([[-100, 6, 7, 8], [-100, 6, 7, 8]])
    packed = PackedRows.of(tokens, labels, AnswerRows.of(labels), sides=2)
    assert packed.segments.own_ends.tolist() == [0, 3, 4] and packed.segments.ends.tolist() == [0, 3, 6]


def test_layers_are_compiled_for_two_batches_alone(as_on_a_gpu):
    """The second batch has other lengths, and the code that is then compiled takes all further ones."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = llama3(**SIZES)
    counter = CompileCounterWithBackend("aot_eager")
    for layer in model.layers:
        layer.compile(backend=counter, fullgraph=True)
    scorer = ScoringModel(model)
    counts = []
    for seed in range(10):
        tokens, labels = pairs(seed)
        scorer.token_stats(tokens, labels, needs=frozenset(), sides=2).policy_logps.sum().backward()
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    assert counts[0] >= 1 and counts[1:] == [counts[1]] * 9


@pytest.mark.parametrize(
    ("device", "dtype", "width", "taken"),
    [
        ("cpu", torch.bfloat16, 8, False),
        ("meta", torch.bfloat16, 8, False),
    ],
)
def test_only_gpus_take_it(device, dtype, width, taken):
    q = torch.empty(3, 2, width, device=device, dtype=dtype)
    assert varlen.takes(q, q, None) is taken


def test_a_pytorch_without_groups_and_windows_gets_repeated_keys(monkeypatch):
    """PyTorch 2.10 has neither ``enable_gqa`` nor ``window_size``."""
    seen = {}

    def former(q, k, v, ends_q, ends_k, max_q, max_k, *, is_causal=False, scale=None):
        seen.update(is_causal=is_causal, heads=k.shape[1], bounds=(max_q, max_k))
        return q

    monkeypatch.setattr(varlen, "_function", lambda: former)
    monkeypatch.setattr(varlen, "_parameters", lambda: frozenset({"is_causal", "scale"}))
    q, k, ends = torch.ones(3, 4, 8), torch.ones(3, 2, 8), torch.tensor([0, 3], dtype=torch.int32)
    varlen.causal_attention(q, k, k, ends, ends, 5)
    assert seen == {"is_causal": True, "heads": 4, "bounds": (5, 5)}
