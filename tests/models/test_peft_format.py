"""Adapters on disk: peft computes what the decoder computes, and folders of peft and torchtune are read back."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.peft_models import FAMILIES, TOKENS, randomise
from torchtune.modules.peft import get_lora_module_names
from torchtune.training import FullModelHFCheckpointer

from tokenpref._sealed import seal
from tokenpref.errors import ConfigError
from tokenpref.models.activations import keep_dora_lean
from tokenpref.models.peft_format import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    AdapterLayout,
    Base,
    write_adapter,
)
from tokenpref.models.peft_reader import read_adapter
from tokenpref.models.scoring import logits_of

peft = pytest.importorskip("peft")
LLAMA = FAMILIES["llama3_2"]
QUERIES = {"lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": False}


def logits(decoder):
    keep_dora_lean(decoder)  # as in every scoring model; a bias then means what it means in PEFT
    with torch.no_grad():
        return logits_of(decoder, TOKENS)


def adapters(decoder):
    return {n: t for n, t in decoder.state_dict().items() if "lora_" in n or n.endswith("magnitude")}


def written(decoder, folder, base=None):
    folder.mkdir(exist_ok=True)
    write_adapter(folder, decoder.state_dict(), AdapterLayout.of(decoder), base)
    return folder


def in_peft(hf_model, folder):
    model = peft.PeftModel.from_pretrained(hf_model, folder).eval()
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "phi3"])
def test_peft_computes_what_the_decoder_computes(name, dora, tmp_path):
    family = FAMILIES[name]
    hf_model = family.hf_model()
    decoder = family.decoder(hf_model, use_dora=dora)
    with torch.no_grad():
        base = hf_model(TOKENS).logits
    own = logits(decoder)
    assert (own - base).abs().max() > 0.05  # the adapters do something
    folder = written(decoder, tmp_path / "adapter")
    torch.testing.assert_close(in_peft(hf_model, folder), own, rtol=0, atol=1e-4)
    back = read_adapter(folder, family.decoder(use_dora=dora), "adapter_checkpoint")
    assert back.keys() == adapters(decoder).keys()
    assert all(torch.equal(back[n], t) for n, t in adapters(decoder).items())


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", ["llama3_2", "qwen2"])
def test_a_folder_of_peft_is_read(name, dora, tmp_path):
    family = FAMILIES[name]
    hf_model = family.hf_model()
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "k_proj", "up_proj"],
        use_dora=dora,
        init_lora_weights=False,
    )
    torch.manual_seed(3)
    model = peft.get_peft_model(hf_model, config).eval()
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_magnitude" in n:
                p.mul_(1.2)
        expected = model(TOKENS).logits
    model.save_pretrained(tmp_path)
    # torchtune adapts w1, w2 and w3 together, so the builder's other layers are replaced by plain ones.
    decoder = family.decoder(model.unload(), lora_attn_modules=["q_proj", "k_proj"], use_dora=dora)
    for layer in decoder.layers:
        for part in ("w1", "w2"):
            lora = getattr(layer.mlp, part)
            plain = torch.nn.Linear(lora.in_dim, lora.out_dim, bias=False)
            plain.weight = lora.weight
            setattr(layer.mlp, part, plain)
    missing = decoder.load_state_dict(read_adapter(tmp_path, decoder, "adapter_checkpoint"), strict=False)
    assert not missing.unexpected_keys
    torch.testing.assert_close(logits(decoder), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize(
    ("name", "model_type"), [("llama3_2", "LLAMA3_2"), ("qwen2", "QWEN2"), ("gemma", "GEMMA")]
)
def test_a_folder_of_torchtune_is_read(name, model_type, dora, tmp_path):
    """torchtune reorders B of every family like Llama's, and magnitudes of none: what it trained is restored."""
    family = FAMILIES[name]
    modules = {"lora_attn_modules": ["output_proj"]} if dora and family.bias else {}
    decoder = family.decoder(use_dora=dora, **modules)
    own = adapters(decoder)
    family.hf_model().save_pretrained(tmp_path / "model")
    checkpointer = FullModelHFCheckpointer(
        str(tmp_path / "model"), ["model.safetensors"], model_type, str(tmp_path / "out")
    )
    attention = modules.get("lora_attn_modules", ["q_proj", "k_proj", "v_proj", "output_proj"])
    # As torchtune's LoRA recipes do it.
    config = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": get_lora_module_names(attention, True, False),
        "peft_type": "LORA",
    }
    state = {"adapter": dict(own), "adapter_config": config}
    checkpointer.save_checkpoint(state, epoch=0, adapter_only=True)
    back = read_adapter(tmp_path / "out" / "epoch_0", decoder, "adapter_checkpoint")
    assert all(torch.equal(back[n], t) for n, t in own.items())


def test_layers_that_differ_are_named_in_full(tmp_path):
    hf_model = LLAMA.hf_model()
    decoder = LLAMA.decoder(hf_model, **QUERIES)
    attention = decoder.layers[1].attn
    plain = torch.nn.Linear(32, 32, bias=False)
    plain.weight = attention.q_proj.weight
    attention.q_proj = plain
    folder = written(decoder, tmp_path)
    targets = json.loads((folder / ADAPTER_CONFIG).read_text())["target_modules"]
    assert "model.layers.0.self_attn.q_proj" in targets and len(targets) == 3
    torch.testing.assert_close(in_peft(hf_model, folder), logits(decoder), rtol=0, atol=1e-4)


def test_rslora_is_read_with_its_own_scale(tmp_path):
    hf_model = LLAMA.hf_model()
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"], use_rslora=True, init_lora_weights=False
    )
    torch.manual_seed(3)
    model = peft.get_peft_model(hf_model, config).eval()
    with torch.no_grad():
        expected = model(TOKENS).logits
    model.save_pretrained(tmp_path)
    decoder = LLAMA.decoder(model.unload(), alpha=12, **QUERIES)  # 6 / sqrt(4) = 12 / 4
    decoder.load_state_dict(read_adapter(tmp_path, decoder, "adapter_checkpoint"), strict=False)
    torch.testing.assert_close(logits(decoder), expected, rtol=0, atol=1e-4)
    with pytest.raises(ConfigError, match="alpha 12 .* 8; set model.lora_alpha=12"):
        read_adapter(tmp_path, LLAMA.decoder(**QUERIES), "adapter_checkpoint")


def test_wrapped_layers_are_written_under_their_own_names(tmp_path):
    from tokenpref._torchtune import TransformerSelfAttentionLayer, set_activation_checkpointing

    decoder = LLAMA.decoder(**QUERIES)
    plain = AdapterLayout.of(decoder)
    set_activation_checkpointing(decoder, auto_wrap_policy={TransformerSelfAttentionLayer})
    assert AdapterLayout.of(decoder) == plain


def test_what_cannot_be_written_is_refused():
    fault = r"layers.0.attn.q_proj is a part of one larger matrix in transformers' Phi-3.*tokenpref.models.causal_lm"
    with pytest.raises(ConfigError, match=fault):
        AdapterLayout.of(FAMILIES["phi3"].decoder())


def test_a_magnitude_of_torchtune_over_a_bias_is_refused(tmp_path):
    """torchtune multiplies the bias with the magnitude, so the adapter would compute something else here."""
    decoder = FAMILIES["qwen2"].decoder(use_dora=True)
    folder = written(decoder, tmp_path)
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    (folder / ADAPTER_CONFIG).write_text(json.dumps({k: v for k, v in config.items() if k != "use_dora"}))
    with pytest.raises(ConfigError, match=r"layers.0.attn.q_proj has a bias, .*train an adapter here"):
        read_adapter(folder, decoder, "adapter_checkpoint")


def test_ranks_that_differ_are_refused():
    decoder, other = LLAMA.decoder(**QUERIES), LLAMA.decoder(rank=2, **QUERIES)
    decoder.layers[1].attn.q_proj = other.layers[1].attn.q_proj
    with pytest.raises(ConfigError, match=r"ranks \[2, 4\].*all adapters of a model must have the same"):
        AdapterLayout.of(decoder)


def test_a_decoder_without_adapters_is_refused(tmp_path):
    decoder = LLAMA.decoder(lora_attn_modules=["q_proj"], apply_lora_to_mlp=False)
    for layer in decoder.layers:
        layer.attn.q_proj = torch.nn.Linear(32, 32, bias=False)
    with pytest.raises(ConfigError, match="has no adapters"):
        read_adapter(tmp_path, decoder, "adapter_checkpoint")


@pytest.fixture
def folder(tmp_path):
    decoder = LLAMA.decoder(**QUERIES)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights" * 100)
    return written(decoder, tmp_path / "adapter", Base.of(tmp_path / "model"))


def set_config(folder, **settings):
    file = folder / ADAPTER_CONFIG
    record = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({k: v for k, v in record.items() if v is not ...}))


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"peft_type": "IA3"}, "an adapter of the type 'IA3'"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern is"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"a_feature_of_tomorrow": 3}, "a_feature_of_tomorrow is 3"),
        ({"r": ...}, "r is None"),
        ({"r": True}, "r is True"),
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
        ({"r": 8}, r"matrices of the shapes \[4, 32\] and \[32, 4\], and r is 8"),
        ({"lora_alpha": 16}, "alpha 16 and the model's adapters have 8; set model.lora_alpha=16"),
        ({"use_dora": True}, "has no model.layers.0.self_attn.q_proj.lora_magnitude_vector"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_by_name(folder, settings, fault):
    set_config(folder, **settings)
    with pytest.raises(ConfigError, match=fault) as error:
        read_adapter(folder, LLAMA.decoder(**QUERIES), "adapter_checkpoint")
    assert str(error.value).startswith(f"adapter_checkpoint: {folder}")


def change_tensor(folder, change):
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    change(tensors)
    save_file(tensors, folder / ADAPTER_WEIGHTS)


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda t: t.pop(FIRST), "has no model.layers.0.self_attn.q_proj.lora_A.weight"),
        (lambda t: t[FIRST].fill_(float("nan")), f"{FIRST} is not finite"),
        (lambda t: t.update({FIRST: torch.zeros(4, 16)}), r"shape \[4, 16\] and the model needs \[4, 32\]"),
        (lambda t: t.update({FIRST: torch.zeros(4, 32, dtype=torch.int32)}), "is not finite"),
        (
            lambda t: t.update({"base_model.model.score.weight": torch.zeros(2)}),
            "holds base_model.model.score.weight",
        ),
        (lambda t: [t.pop(n) for n in list(t) if ".layers.1." in n], "has no adapter for model.layers.1"),
        (
            lambda t: [t.pop(n) for n in list(t) if "v_proj" in n],
            "adapts q_proj and the model q_proj, v_proj",
        ),
        (lambda t: t.clear(), "holds no tensors"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(folder, change, fault):
    change_tensor(folder, change)
    with pytest.raises(ConfigError, match=fault) as error:
        read_adapter(folder, LLAMA.decoder(**QUERIES), "adapter_checkpoint")
    assert str(error.value).startswith(f"adapter_checkpoint: {folder}")


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"rank": 2}, "rank 4 and the model's adapters have 2; set model.lora_rank=4"),
        ({"use_dora": True}, "a LoRA adapter and the model's are DoRA; set model.use_dora=false"),
        ({"lora_attn_modules": ["q_proj", "k_proj"]}, "adapts q_proj, v_proj and the model k_proj, q_proj"),
    ],
)
def test_an_adapter_of_another_builder_is_refused(folder, settings, fault):
    with pytest.raises(ConfigError, match=fault):
        read_adapter(folder, LLAMA.decoder(**{**QUERIES, **settings}), "adapter_checkpoint")


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda f: (f / ADAPTER_CONFIG).unlink(), f"has no {ADAPTER_CONFIG}"),
        (lambda f: (f / ADAPTER_CONFIG).write_text("{"), f"{ADAPTER_CONFIG} cannot be read"),
        (lambda f: (f / ADAPTER_CONFIG).write_text("[]"), f"{ADAPTER_CONFIG} holds a list"),
        (lambda f: (f / ADAPTER_WEIGHTS).unlink(), f"has no {ADAPTER_WEIGHTS}"),
        (lambda f: (f / ADAPTER_WEIGHTS).rename(f / "adapter_model.bin"), "adapter_model.bin is not read"),
        (lambda f: (f / ADAPTER_WEIGHTS).write_bytes(b"no"), f"{ADAPTER_WEIGHTS} cannot be read"),
        (lambda f: f.rename(f.with_name("gone")), "there is no such folder"),
    ],
)
def test_files_that_are_missing_or_damaged_are_named(folder, change, fault):
    change(folder)
    with pytest.raises(ConfigError, match=fault) as error:
        read_adapter(folder, LLAMA.decoder(**QUERIES), "adapter_checkpoint")
    assert str(error.value).startswith(f"adapter_checkpoint: {folder}")


def test_a_folder_that_changed_since_it_was_sealed_is_refused(folder):
    seal(folder)
    decoder = LLAMA.decoder(**QUERIES)
    assert read_adapter(folder, decoder, "adapter_checkpoint")
    change_tensor(folder, lambda tensors: tensors[FIRST].mul_(2))
    with pytest.raises(
        ConfigError, match=rf"holds damaged weights: {ADAPTER_WEIGHTS}.*remove .*manifest.json"
    ):
        read_adapter(folder, decoder, "adapter_checkpoint")


def test_an_adapter_of_other_weights_is_refused(folder, tmp_path):
    decoder = LLAMA.decoder(**QUERIES)
    base = Base.of(tmp_path / "model")
    assert read_adapter(folder, decoder, "adapter_checkpoint", base=base.digest)
    with (tmp_path / "model" / "model.safetensors").open("r+b") as file:
        file.write(b"W")
    other = Base.of(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"is an adapter of other weights.*model.safetensors"):
        read_adapter(folder, decoder, "adapter_checkpoint", base=other.digest)
    (folder / "tokenpref_base.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenpref_base.json is damaged"):
        read_adapter(folder, decoder, "adapter_checkpoint", base=base.digest)
    (folder / "tokenpref_base.json").unlink()
    assert read_adapter(folder, decoder, "adapter_checkpoint", base=other.digest)


def test_other_values_give_other_files(tmp_path):
    """A written adapter depends on the values, and reading gives back the ones written last."""
    decoder = LLAMA.decoder(**QUERIES)
    written(decoder, tmp_path)
    randomise(decoder, seed=9)
    written(decoder, tmp_path)
    back = read_adapter(tmp_path, decoder, "adapter_checkpoint")
    assert all(torch.equal(back[n], t) for n, t in adapters(decoder).items())
