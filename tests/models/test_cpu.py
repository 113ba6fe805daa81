"""Layers that keep less for the backward have the numbers of torchtune's."""

import pytest
import torch
from support import small
from support.onednn import needs_onednn
from support.saved import saved_bytes
from torch import nn
from torchtune.modules import FeedForward, RMSNorm
from torchtune.modules.peft import LoRALinear

from tokenpref.models import cpu
from tokenpref.models.cpu import install_on_cpu
from tokenpref.models.scoring import ScoringModel, logits_of


@pytest.fixture(autouse=True)
def several_pieces(monkeypatch):
    monkeypatch.setattr(cpu, "_ROWS", 16)


def kept_by(module, *inputs, **kwargs):
    """Bytes that a module's forward leaves for the backward, its input and weights apart, and its output with all gradients."""
    with saved_bytes([*inputs, *module.parameters(), *module.buffers()]) as kept:
        output = module(*inputs, **kwargs)
    towards = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    gradients = torch.autograd.grad((output * towards).sum(), [*inputs, *module.parameters()])
    return sum(size for size, _ in kept.values()), [output, *gradients]


def two(make):
    """A torchtune module and its lean twin."""
    plain, twin = make(), make()
    twin.load_state_dict(plain.state_dict())
    install_on_cpu(nn.ModuleList([twin]))
    install_on_cpu(nn.ModuleList([twin]))  # twice is once
    return plain, twin


def gates(dtype=torch.float32):
    def make():
        generator = torch.Generator().manual_seed(0)
        layers = [nn.Linear(*sizes, bias=False) for sizes in ((32, 48), (48, 32), (32, 48))]
        for layer in layers:
            nn.init.normal_(layer.weight, std=0.2, generator=generator)
        first, second, third = (layer.to(dtype) for layer in layers)
        return FeedForward(gate_proj=first, down_proj=second, up_proj=third)

    return make


def norm():
    module = RMSNorm(32, eps=1e-3)
    nn.init.normal_(module.scale)
    return module


def close(found, expected, dtype=torch.float32):
    tight = {"atol": 1e-13, "rtol": 1e-12} if dtype == torch.float64 else {"atol": 2e-6, "rtol": 2e-5}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **tight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gates_keep_two_of_four_tensors(dtype):
    plain, twin = two(gates(dtype))
    x = torch.randn(5, 7, 32, dtype=dtype, requires_grad=True)
    before, expected = kept_by(plain, x)
    after, found = kept_by(twin, x)
    of_one = 5 * 7 * 48 * x.element_size()
    # w1 x, silu(w1 x), w3 x and their product
    assert (before, after) == (4 * of_one, 2 * of_one)
    close(found, expected, dtype)
    with torch.no_grad():
        close([twin(x)], [plain(x)], dtype)


def test_gates_in_half_precision_keep_three_and_every_bit():
    plain, twin = two(gates(torch.bfloat16))
    x = torch.randn(5, 7, 32, dtype=torch.bfloat16, requires_grad=True)
    before, expected = kept_by(plain, x)
    after, found = kept_by(twin, x)
    assert 4 * after == 3 * before
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gates_of_frozen_weights():
    _, twin = two(gates())
    whole = kept_by(twin, x := torch.randn(40, 32, requires_grad=True))[1]
    twin.w1.weight.requires_grad_(False)
    twin.w2.weight.requires_grad_(False)
    output = twin(x)
    towards = torch.linspace(-1, 1, output.numel()).view(output.shape)
    found = torch.autograd.grad((output * towards).sum(), [x, twin.w3.weight])
    assert all(torch.equal(a, b) for a, b in zip(found, [whole[1], whole[4]], strict=True))
    only_weights = torch.autograd.grad((twin(x.detach()) * towards).sum(), twin.w3.weight)
    assert torch.equal(only_weights[0], whole[4])


def test_frozen_layers_do_not_keep_their_input():
    _, twin = two(gates())
    twin.requires_grad_(False)
    x = torch.randn(5, 7, 32, requires_grad=True)
    with saved_bytes(twin.parameters()) as kept:
        output = twin(x.clone())
    assert sum(size for size, _ in kept.values()) == 2 * 5 * 7 * 48 * 4  # w1 x and w3 x
    (found,) = torch.autograd.grad(output.sum(), x)
    twin.requires_grad_(True)
    (expected,) = torch.autograd.grad(twin(x).sum(), x)
    assert torch.equal(found, expected)


@needs_onednn
@pytest.mark.parametrize("off", [False, True])
def test_a_layer_with_an_adapter_by_onednn(onednn, off):
    def make():
        layer = LoRALinear(32, 48, rank=2, alpha=4.0)
        layer.weight.requires_grad_(False)
        nn.init.normal_(layer.lora_b.weight, std=0.1)
        layer.disabled = off
        return layer

    plain, twin = two(make)
    x = torch.randn(5, 7, 32, requires_grad=True)
    outputs = [layer(x) for layer in (plain, twin)]
    assert any(type(f).__name__ == "_LinearBackward" for f, _ in _history(outputs[1].grad_fn))
    grads = []
    for layer, output in zip((plain, twin), outputs, strict=True):
        inputs = [x] if off else [x, layer.lora_a.weight, layer.lora_b.weight]
        grads.append(torch.autograd.grad(output.square().mean(), inputs))
    close([outputs[1], *grads[1]], [outputs[0], *grads[0]])
    with torch.no_grad():
        assert torch.equal(twin(x), outputs[1])


def _history(function):
    """A result's functions of autograd, with their inputs."""
    todo = [(function, 0)]
    while todo:
        found, place = todo.pop()
        if found is not None:
            yield found, place
            todo += found.next_functions


@pytest.mark.parametrize("change", ["adapter", "hook", "bias", "autocast"])
def test_gates_that_are_more_than_products_are_called(change):
    _, twin = two(gates())
    x, calls = torch.randn(40, 32), []
    if change == "adapter":
        twin.w3 = LoRALinear(32, 48, rank=2, alpha=4.0)
        nn.init.normal_(twin.w3.lora_b.weight)
    elif change == "hook":
        twin.w3.register_forward_hook(lambda *_: calls.append(1))
    elif change == "bias":
        twin.w3 = nn.Linear(32, 48)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=change == "autocast"):
        found, expected = twin(x), FeedForward.forward(twin, x)
    assert torch.equal(found, expected) and calls == [1, 1] * (change == "hook")


@needs_onednn
def test_gates_by_onednn(onednn):
    plain, twin = two(gates())
    x = torch.randn(5, 7, 32, requires_grad=True)
    found = kept_by(twin, x)[1]
    close(found, kept_by(plain, x)[1])
    with torch.no_grad():
        assert torch.equal(twin(x), found[0])  # equal models compute equal numbers


@needs_onednn
def test_a_linear_layer_by_onednn(onednn):
    plain, twin = two(lambda: nn.Linear(32, 48, bias=False))
    x = torch.randn(5, 7, 32, requires_grad=True)
    (before, expected), (after, found) = kept_by(plain, x), kept_by(twin, x)
    assert before == after == 0
    assert type(found[0].grad_fn.next_functions[0][0]).__name__ == "_LinearBackward"
    close(found, expected)
    with torch.no_grad():
        assert torch.equal(twin(x), found[0])
    towards = torch.linspace(-1, 1, found[0].numel()).view(found[0].shape)
    (of_weight,) = torch.autograd.grad((twin(x.detach()) * towards).sum(), twin.weight)
    twin.weight.requires_grad_(False)
    (of_x,) = torch.autograd.grad((twin(x) * towards).sum(), x)
    assert torch.equal(of_x, found[1]) and torch.equal(of_weight, found[2])


@needs_onednn
def test_linear_layers_that_are_something_else_stay_torchs(onednn):
    _, twin = two(lambda: nn.Linear(32, 48))
    assert "forward" not in vars(twin)  # with a bias
    _, twin = two(lambda: nn.Linear(32, 48, bias=False))
    x = torch.randn(40, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert twin(x).dtype == torch.bfloat16
    assert torch.equal(twin.double()(x.double()), nn.functional.linear(x.double(), twin.weight))
    with pytest.raises(RuntimeError, match="dtype"):
        twin(x)


@needs_onednn
def test_a_decoder_by_onednn_and_its_head(onednn):
    """The head's place is not taken by a linear layer's."""
    model, twin = small.decoder(0, dtype=torch.float32), small.decoder(0, dtype=torch.float32)
    tokens = torch.tensor([[5, 6, 7, 8], [1, 2, 3, 4]])
    scoring = ScoringModel(twin)
    assert twin.layers[0].attn.q_proj.forward.__func__ is cpu._linear
    torch.testing.assert_close(logits_of(twin, tokens), logits_of(model, tokens), atol=1e-5, rtol=1e-4)
    found = scoring.logps(tokens, tokens)
    expected = torch.log_softmax(logits_of(model, tokens), -1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_gates_of_another_dtype_fail_as_torchtunes_do():
    _, twin = two(gates())
    twin.w1.weight.data = twin.w1.weight.data.double()
    for forward in (twin, lambda x: FeedForward.forward(twin, x)):
        with pytest.raises(RuntimeError, match="dtype"):
            forward(torch.randn(40, 32))


def test_other_feed_forwards_stay_as_they_are():
    model = small.decoder(0)
    model.layers[0].mlp.activation = torch.nn.GELU()
    model.layers[1].mlp.w3 = None
    install_on_cpu(model)
    assert all("forward" not in vars(layer.mlp) for layer in model.layers)


def test_a_norm_keeps_a_number_a_row():
    plain, twin = two(norm)
    x = torch.randn(5, 7, 32, requires_grad=True)
    before, expected = kept_by(plain, x)
    after, found = kept_by(twin, x)
    assert after == 4 * 5 * 7 < before
    close(found, expected)


def test_a_frozen_norm_and_a_norm_of_what_has_no_gradient():
    _, twin = two(norm)
    _, whole = kept_by(twin, x := torch.randn(40, 32, requires_grad=True))
    towards = torch.linspace(-1, 1, x.numel()).view(x.shape)
    (of_scale,) = torch.autograd.grad((twin(x.detach()) * towards).sum(), twin.scale)
    twin.scale.requires_grad_(False)
    (of_x,) = torch.autograd.grad((twin(x) * towards).sum(), x)
    assert torch.equal(of_x, whole[1]) and torch.equal(of_scale, whole[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_norms_of_other_dtypes_are_torchtunes(dtype):
    x = torch.randn(3, 7, 4, 8, dtype=dtype)
    plain, twin = two(lambda: RMSNorm(8))
    assert torch.equal(twin(x), plain(x))


def test_a_model_gives_the_numbers_that_it_gave():
    plain, twin = (small.decoder(0, dtype=torch.float32) for _ in range(2))
    batch = small.batch([0, 1, 2])
    ScoringModel(twin)
    assert all("forward" in vars(layer.mlp) and "forward" in vars(layer.sa_norm) for layer in twin.layers)
    logits = [logits_of(model, batch.tokens) for model in (plain, twin)]
    gradients = [
        torch.autograd.grad(output.square().mean(), list(model.parameters()))
        for model, output in zip((plain, twin), logits, strict=True)
    ]
    close(gradients[1], gradients[0])
    assert plain.state_dict().keys() == twin.state_dict().keys()


def test_compiled_layers_are_torchtunes():
    """A compiler makes one piece of a layer's passes itself."""
    _, twin = two(gates())
    x = torch.randn(40, 32)
    compiled = torch.compile(lambda x: twin(x), backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), FeedForward.forward(twin, x))
