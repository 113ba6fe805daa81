"""What layers keep for the backward changes memory and no number."""

import pytest
import torch
from support import small
from support.saved import saved_bytes
from torch.autograd.graph import saved_tensors_hooks

from tokenpref._torchtune import OffloadActivations
from tokenpref.errors import ConfigError
from tokenpref.models.activations import (
    activation_offloading,
    checkpoint_layers,
    checkpointed_layers,
    keep_dora_lean,
    offload_layers,
)
from tokenpref.models.padding_free import PackedRows
from tokenpref.models.scoring import ScoringModel
from tokenpref.models.tiny import tiny_llama
from tokenpref.ops import AnswerRows

BATCH = small.batch([0, 1, 2])


def gradients(model):
    """Of something with hidden states and the head in it, in float64."""
    ScoringModel(model).token_stats(
        BATCH.tokens, BATCH.labels, needs=frozenset()
    ).policy_logps.sum().backward()
    return [p.grad for p in model.parameters()]


def is_wrapped(layer):
    return "_checkpoint_wrapped_module" in dict(layer.named_children())


@pytest.mark.parametrize("every", [1, 2])
def test_checkpointing_changes_no_bit(every):
    plain, lean = small.decoder(0), small.decoder(0)
    checkpoint_layers(lean, every)
    assert [is_wrapped(layer) for layer in lean.layers] == [every == 1, True]
    assert list(lean.state_dict()) != [] and all(
        torch.equal(a, b) for a, b in zip(gradients(plain), gradients(lean), strict=True)
    )


def test_every_third_layer_counts_anew_in_each_model():
    for _ in range(2):
        model = tiny_llama(num_layers=7)
        assert checkpointed_layers(model, 3) == [model.layers[2], model.layers[5]]


def test_too_few_layers():
    with pytest.raises(
        ConfigError,
        match="ac_option: is 3, and the model has 2 layers, of which none would be checkpointed; set it to at most 2",
    ):
        checkpoint_layers(small.decoder(0), 3)


def test_only_the_inputs_of_layers_are_offloaded():
    """With all layers checkpointed these are two tensors ``[N, 1, D]``; the head's are left alone, and no number changes."""
    packed = []

    def pack(tensor):
        packed.append(list(tensor.shape))
        return tensor.clone()

    plain, lean = small.decoder(0), small.decoder(0)
    checkpoint_layers(lean)
    offload_layers(lean, saved_tensors_hooks(pack, lambda tensor: tensor))
    expected, found = gradients(plain), gradients(lean)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    positions = PackedRows.of(BATCH.tokens, BATCH.labels, AnswerRows.of(BATCH.labels)).tokens
    assert packed == [[*positions.shape, 1, 32]] * 2
    ScoringModel(lean).logps(BATCH.tokens, BATCH.labels)
    assert len(packed) == 2  # nothing is kept, and nothing packed, without a gradient


def test_a_layer_that_fails_leaves_the_hooks(monkeypatch):
    """Otherwise everything that the process saves afterwards would be packed."""
    packed = []
    model = small.decoder(0)
    offload_layers(
        model, saved_tensors_hooks(lambda tensor: packed.append(1) or tensor, lambda tensor: tensor)
    )
    monkeypatch.setattr(model.layers[1].mlp.w2, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ScoringModel(model).hidden(BATCH.tokens)
    before = len(packed)
    torch.ones(3, requires_grad=True).exp().sum().backward()
    assert before > 0 and len(packed) == before


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="activations are moved from a GPU, and there is none"
)
def test_offloading_on_a_gpu_changes_no_bit():
    plain, lean = small.decoder(0).cuda(), small.decoder(0).cuda()
    checkpoint_layers(lean)
    hooks = activation_offloading()
    assert isinstance(hooks, OffloadActivations)
    offload_layers(lean, hooks)
    tokens = BATCH.tokens.cuda()
    for _ in range(2):  # a second forward finds everything fetched
        for model in (plain, lean):
            model.zero_grad()
            (ScoringModel(model).hidden(tokens) ** 3).sum().backward()
        for one, other in zip(plain.parameters(), lean.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("off", [True, False])
def test_dora_has_torchtunes_numbers_and_keeps_no_matrix(new, off):
    plain, twin = (small.lora_decoder(dora=True, new=new).layers[0].attn.q_proj for _ in range(2))
    keep_dora_lean(torch.nn.ModuleList([twin]))
    x = torch.randn(5, 7, 32, dtype=torch.float64, requires_grad=True)
    found = []
    for layer in (plain, twin):
        layer.disabled = off
        with saved_bytes([x, *layer.parameters()]) as kept:
            output = layer(x)
        wanted = [x] if off else [x, layer.lora_a.weight, layer.lora_b.weight, layer.magnitude]
        found.append([output, *torch.autograd.grad(output.square().sum(), wanted)])
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other)
    assert all(tensor.shape != (32, 32) for _, tensor in kept.values())
