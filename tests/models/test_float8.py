"""Float8 layers: numbers worked by hand, which layers, and on what devices."""

import pytest
import torch
from support import small
from torch import nn
from torchtune.models.llama3_2 import llama3_2, lora_llama3_2

from tokenpref.errors import ConfigError
from tokenpref.models.float8 import Float8, check_float8_device, convert_to_float8, float8_layers
from tokenpref.models.scoring import ScoringModel

SIZES = {
    "vocab_size": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "max_seq_len": 64,
    "intermediate_dim": 48,
}
LAYERS = [
    f"layers.{i}.{name}"
    for i in range(2)
    for name in (
        *(f"attn.{p}" for p in ("q_proj", "k_proj", "v_proj", "output_proj")),
        "mlp.w1",
        "mlp.w2",
        "mlp.w3",
    )
]


def one_layer(recipe):
    """A decoder whose first query projection is the identity; returns that layer, in emulated float8."""
    model = small.decoder(0, dtype=torch.float32)
    layer = model.layers[0].attn.q_proj
    layer.weight.data.copy_(torch.eye(32))
    convert_to_float8(model, Float8(recipe, emulate=True), sharded=False)
    converted = model.layers[0].attn.q_proj
    assert converted.weight is layer.weight
    return converted


def test_one_scale_for_a_tensor_by_hand():
    """The largest number is 448, float8's own largest: the scale is 1, and every number goes to its nearest float8.

    From 256 on float8 (e4m3) steps by 32: 300 lies between 288 and 320. From 16 on by 2: 17 is a tie, to the even 16. Below
    2^-6 by 2^-9: 0.013 is 6.66 steps, so 7 steps.
    """
    x = torch.zeros(2, 32)
    x[0, :3] = torch.tensor([448.0, 300.0, 17.0])
    x[1, :2] = torch.tensor([6.8, 0.013])
    found = one_layer("tensorwise")(x)
    expected = torch.zeros(2, 32)
    expected[0, :3] = torch.tensor([448.0, 288.0, 16.0])
    expected[1, :2] = torch.tensor([7.0, 7 * 2**-9])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("recipe", ["rowwise", "rowwise_with_gw_hp"])
def test_a_scale_for_each_row_by_hand(recipe):
    """The second row has a scale of its own, 448 / 6.8 = 65.9, down to the power of two 64.

    0.013 * 64 = 0.832, where steps are 1/16: 13/16, over 64. 6.8 * 64 = 435.2, where they are 32: 448, over 64.
    """
    x = torch.zeros(2, 32)
    x[0, 0], x[1, :2] = 448.0, torch.tensor([6.8, 0.013])
    found = one_layer(recipe)(x)
    expected = torch.zeros(2, 32)
    expected[0, 0], expected[1, :2] = 448.0, torch.tensor([7.0, 13 / 16 / 64])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_a_layers_gradients_are_near_the_plain_layers(recipe):
    """Of 23 tokens. Float8 keeps 3 bits behind the leading one, of some gradients 2: products are off by some percent."""
    model = small.decoder(0, dtype=torch.float32)
    names = list(model.state_dict())
    plain = model.layers[1].mlp.w1
    convert_to_float8(model, Float8(recipe, emulate=True), sharded=False)
    rounded = model.layers[1].mlp.w1
    assert type(rounded) is not type(plain) and list(model.state_dict()) == names
    generator = torch.Generator().manual_seed(0)
    x, factors = (torch.randn(23, n, generator=generator) for n in (32, 48))
    found = []
    for layer in (plain, rounded):
        given = x.clone().requires_grad_()
        y = layer(given)
        found.append((y.detach(), *torch.autograd.grad((y * factors).sum(), (given, layer.weight))))
    distances = [float((a - b).norm() / a.norm()) for a, b in zip(*found, strict=True)]
    exact = recipe == "rowwise_with_gw_hp"
    assert all(5e-3 < d < 0.1 for d in distances[: 2 if exact else 3]), distances
    assert not exact or distances[2] < 1e-6


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_stays_as_it_is(tied):
    """Even where its sizes would allow it."""
    model = llama3_2(**SIZES, tie_word_embeddings=tied)
    assert convert_to_float8(model, Float8(emulate=True), sharded=False) == LAYERS
    assert tied or type(model.output) is nn.Linear
    assert type(model.layers[1].mlp.w2) is not nn.Linear


def test_layers_of_other_sizes_stay_as_they_are():
    model = llama3_2(**{**SIZES, "intermediate_dim": 40})
    assert float8_layers(model) == [name for name in LAYERS if ".attn." in name]


def test_a_model_without_such_layers_is_refused():
    model = llama3_2(**{**SIZES, "embed_dim": 24, "intermediate_dim": 40})
    with pytest.raises(
        ConfigError,
        match=r"of the model's 14 linear layers .* multiples of 16; layers.0.attn.q_proj is \[24, 24\]; set",
    ):
        float8_layers(model)


def test_a_model_with_adapters_is_refused():
    model = lora_llama3_2(lora_attn_modules=["q_proj"], lora_rank=4, lora_alpha=8, **SIZES)
    with pytest.raises(ConfigError, match="enable_fp8_training: the model has adapters"):
        convert_to_float8(model, Float8(emulate=True), sharded=False)


def test_devices(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    for capability, good in (((8, 0), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        check_float8_device(gpu, Float8(emulate=True))
        if good:
            check_float8_device(gpu, Float8())
        else:
            with pytest.raises(
                ConfigError, match="capability 8.9 or higher, and cuda:0: NVIDIA A100 has 8.0; set"
            ):
                check_float8_device(gpu, Float8())
    with pytest.raises(ConfigError, match="and cpu: it is a CPU"):
        check_float8_device(torch.device("cpu"), Float8())


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
    reason="no GPU that multiplies float8",
)
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_a_gpu_gives_the_emulations_numbers(recipe):
    """In bfloat16 and with 22 tokens, no multiple of 16."""
    tokens = small.batch([0, 1], length=11).tokens[:2].cuda()
    outputs = []
    for emulate in (False, True):
        model = small.decoder(0, dtype=torch.bfloat16).cuda()
        convert_to_float8(model, Float8(recipe, emulate), sharded=False)
        hidden = ScoringModel(model).hidden(tokens)
        (hidden.float() ** 3).sum().backward()
        outputs.append((hidden, model.layers[0].mlp.w1.weight.grad))
    for found, expected in zip(*outputs, strict=True):
        assert (found - expected).norm() < 0.02 * expected.norm()
