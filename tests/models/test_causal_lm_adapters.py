"""Adapters of transformers' causal LMs on disk: peft computes what the model computes, and its folders are read."""

import json

import pytest
import torch
from support.causal_folders import KINDS, WIDE, hf_model, seeing_model, write_folder
from support.peft_models import randomise
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4

from tokenpref.distributed import load_full_state_dict, single_process_world
from tokenpref.errors import ConfigError
from tokenpref.models import ScoringModel, causal_lm
from tokenpref.models.adapters import adapter_names, adapters_off, base_tensors
from tokenpref.models.decoder_of import decoder_of
from tokenpref.models.merging import merge_adapter
from tokenpref.models.peft_format import ADAPTER_CONFIG, AdapterLayout, write_adapter
from tokenpref.models.peft_reader import read_adapter

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
TOKENS = torch.randint(4, 384, (2, 24), generator=torch.Generator().manual_seed(5))  # longer than the windows
DORA = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    return {kind: write_folder(place / kind, kind) for kind in KINDS}


def adapted(folder, own=None, **lora):
    """The model of a folder with its weights and random adapters."""
    model = causal_lm(str(folder), {"rank": 4, "alpha": 8, **lora}).eval()
    own = transformers.AutoModelForCausalLM.from_pretrained(folder) if own is None else own
    state = {
        name: tensor for name, tensor in own.state_dict().items() if name not in own.all_tied_weights_keys
    }
    assert (
        base_tensors(model).keys() == state.keys()
    )  # the names of a model without adapters, biases included
    model.load_state_dict(state, strict=False)
    randomise(model)
    ScoringModel(model)  # as in training, DoRA's forward is the package's own
    return model


def logits(model):
    with torch.no_grad():
        return decoder_of(model).logits(TOKENS)


def logits_of(hf):
    with torch.no_grad():
        return hf.eval()(TOKENS).logits


def adapters(model):
    own = model.state_dict()
    return {name: own[name] for name in adapter_names(model)}


def written(model, folder):
    folder.mkdir()
    write_adapter(folder, model.state_dict(), AdapterLayout.of(model))
    return folder


@DORA
@pytest.mark.parametrize("kind", KINDS)
def test_peft_computes_what_the_model_computes(kind, dora, folders, tmp_path):
    """In one folder, over the base, and merged by us."""
    model = adapted(folders[kind], use_dora=dora)
    base, own = hf_model(kind), logits(model)
    assert (own - logits_of(base)).abs().max() > 0.05  # the adapters do something
    folder = written(model, tmp_path / "adapter")
    torch.testing.assert_close(
        logits_of(peft.PeftModel.from_pretrained(base, folder)), own, rtol=0, atol=1e-5
    )
    back = read_adapter(folder, model, "adapter_checkpoint")
    assert back.keys() == adapters(model).keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in adapters(model).items())
    merge_adapter(folder, tmp_path / "merged", folders[kind])
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged), own, rtol=0, atol=1e-5)


def of_peft(kind, folder, **settings):
    """An adapter folder that peft wrote, the base, and the logits of both together."""
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **settings)
    model = peft.get_peft_model(hf_model(kind), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1.2)
    found = logits_of(model)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder, found


@DORA
@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        ("qwen3", "all-linear"),
        ("gemma3_text", ["q_proj", "v_proj"]),
        ("llama", r".*\.layers\.1\..*_proj"),
        ("phi3", ["qkv_proj", "layers.0.mlp.gate_up_proj"]),
        ("qwen2", "all-linear"),
    ],
)
def test_a_folder_of_peft_is_read(kind, targets, dora, folders, tmp_path):
    """The same target_modules put adapters on the same layers as in peft."""
    folder, expected = of_peft(kind, tmp_path / "peft", target_modules=targets, use_dora=dora)
    model = adapted(folders[kind], target_modules=targets, use_dora=dora)
    model.load_state_dict(read_adapter(folder, model, "adapter_checkpoint"), strict=False)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (["v_proj", "q_proj"], {"q_proj", "v_proj"}),
        (
            r".*layers\.1\.self_attn\.[qk]_proj",
            {"model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"},
        ),
    ],
)
def test_the_config_names_the_layers_as_peft_finds_them(targets, named, folders, tmp_path):
    adapted_model = adapted(folders["llama"], target_modules=targets)
    folder = written(adapted_model, tmp_path / "adapter")
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    assert set(config["target_modules"]) == named and config["task_type"] == "CAUSAL_LM"
    model = peft.PeftModel.from_pretrained(hf_model("llama"), folder)
    layers = {
        name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    own = AdapterLayout.of(adapted_model).linears
    assert layers == {f"base_model.model.{linear.hf_name}" for linear in own}


def test_a_bias_belongs_to_the_base(folders):
    model = adapted(folders["qwen2"], target_modules=["q_proj"])
    name = "model.layers.0.self_attn.q_proj.bias"
    assert name in base_tensors(model) and name not in adapter_names(model)
    assert torch.equal(model.state_dict()[name], hf_model("qwen2").state_dict()[name])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 2}, "has rank 4 .* set model.lora.rank=4"),
        ({"alpha": 16}, "has alpha 8 .* set model.lora.alpha=8"),
        ({"use_dora": True}, "is a LoRA adapter .* set model.lora.use_dora=false"),
        (
            {"target_modules": ["q_proj", "k_proj"]},
            "adapts q_proj, v_proj and the model k_proj, q_proj; set model.lora.target_modules",
        ),
        (
            {"target_modules": r".*layers\.1\..*[qv]_proj"},
            r"has an adapter for model.layers.0.self_attn.q_proj, unlike the model; set model.lora.target_modules",
        ),
    ],
)
def test_an_adapter_of_other_settings_is_refused(settings, said, folders, tmp_path):
    chosen = {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    folder = written(adapted(folders["qwen3"], **chosen), tmp_path / "adapter")
    with pytest.raises(ConfigError, match=said):
        read_adapter(folder, causal_lm(str(folders["qwen3"]), {**chosen, **settings}), "adapter_checkpoint")


@DORA
def test_a_quantised_base_computes_with_the_rounded_weights(dora, tmp_path):
    """NF4 holds all linear layers that it can, with a bias and without an adapter too, and not the head."""
    folder = write_folder(tmp_path / "wide", "qwen2", **WIDE)
    settings = {"rank": 4, "alpha": 8, "target_modules": ["q_proj", "down_proj"], "use_dora": dora}
    plain = adapted(folder, **settings)
    model = causal_lm(str(folder), {**settings, "quantize_base": True}).eval()
    quantised = {name for name, tensor in model.named_parameters() if isinstance(tensor, NF4Tensor)}
    assert quantised == {name for name in plain.state_dict() if name.endswith("_proj.weight")}
    own = plain.state_dict()
    load_full_state_dict(model, own, single_process_world())
    ScoringModel(model)
    plain.load_state_dict({name: to_nf4(own[name]).to(torch.float32) for name in quantised}, strict=False)
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-4)
    assert (logits(model) - logits(adapted(folder, **settings))).abs().max() > 1e-2
    with pytest.raises(
        ConfigError, match=r"quantize_base: NF4 .* the 32 x 32 numbers of model.layers.0.self_attn.q_proj"
    ):
        causal_lm(str(write_folder(tmp_path / "small", "llama")), {"quantize_base": True})


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({}, "model.lora: is {}; set some of rank, .* or lora=null"),
        ("all-linear", "model.lora: is 'all-linear'; set some of rank"),
        ({"r": 8}, "model.lora.r: there is no such setting; did you mean 'rank'"),
        ({"rank": 0}, "model.lora.rank: is 0; set a whole number of at least 1"),
        ({"alpha": float("inf")}, "model.lora.alpha: is inf; set a number above 0"),
        ({"target_modules": "*("}, r"model.lora.target_modules: '\*\(' is no regular expression"),
        (
            {"target_modules": ["q_proj", "w1"]},
            "'w1' names no linear layer of the model; these end in down_proj, gate_proj",
        ),
        ({"target_modules": ["lm_head"]}, "'lm_head' names no .* The head has no adapter"),
    ],
)
def test_settings_that_cannot_be_are_refused(lora, said, folders):
    with pytest.raises(ConfigError, match=said):
        causal_lm(str(folders["llama"]), lora)


def test_an_adapter_of_another_width_is_refused(folders, tmp_path):
    folder = written(adapted(folders["qwen3"], target_modules=["q_proj"]), tmp_path / "adapter")
    other = write_folder(tmp_path / "other", "qwen3", hidden_size=64)
    with pytest.raises(
        ConfigError, match=r"lora_A.weight has the shape \[4, 32\] and the model needs \[4, 64\]"
    ):
        read_adapter(
            folder,
            causal_lm(str(other), {"rank": 4, "alpha": 8, "target_modules": ["q_proj"]}),
            "adapter_checkpoint",
        )


def test_folders_of_torchtune_are_read_where_its_order_is_right(folders, tmp_path):
    """torchtune reorders the rows of B in queries and keys for every family as for Llama's, and magnitudes for none."""
    for kind, dora, refused in (("llama", False, False), ("llama", True, True), ("qwen3", False, True)):
        model = adapted(folders[kind], use_dora=dora)
        folder = written(model, tmp_path / f"{kind}{dora}")
        config = json.loads((folder / ADAPTER_CONFIG).read_text())
        (folder / ADAPTER_CONFIG).write_text(json.dumps({k: v for k, v in config.items() if k != "use_dora"}))
        (folder / "adapter_model.pt").touch()  # torchtune writes this file too
        if refused:
            with pytest.raises(ConfigError, match="torchtune wrote it, with rows of .* in another order"):
                read_adapter(folder, model, "adapter_checkpoint")
        else:
            back = read_adapter(folder, model, "adapter_checkpoint")
            assert all(torch.equal(back[name], tensor) for name, tensor in adapters(model).items())


def test_an_adapter_of_a_part_is_named_as_in_the_whole_model(tmp_path):
    """transformers loads a model that also sees images from such a folder, and peft adapts its language model alone."""
    whole = seeing_model(tmp_path / "whole")
    state = {
        name.replace("model.language_model.", "model."): tensor
        for name, tensor in whole.state_dict().items()
        if name.startswith("model.language_model.")
    }
    for targets in ("all-linear", ["q_proj", "v_proj"]):
        model = causal_lm(str(tmp_path / "whole"), {"rank": 4, "alpha": 8, "target_modules": targets}).eval()
        assert base_tensors(model).keys() == state.keys()
        model.load_state_dict(state, strict=False)
        randomise(model)
        folder = written(model, tmp_path / f"adapter_of_{len(targets)}")
        own = logits(model)
        assert (own - logits_of(whole)).abs().max() > 0.05
        fresh = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
        in_peft = peft.PeftModel.from_pretrained(fresh, folder)
        assert not [name for name, _ in in_peft.named_parameters() if "vision" in name and "lora" in name]
        torch.testing.assert_close(logits_of(in_peft), own, rtol=0, atol=1e-5)
        back = read_adapter(folder, model, "adapter_checkpoint")
        assert all(torch.equal(back[name], tensor) for name, tensor in adapters(model).items())
        merge_adapter(folder, tmp_path / f"merged_{len(targets)}", tmp_path / "whole")
        merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"merged_{len(targets)}")
        torch.testing.assert_close(logits_of(merged), own, rtol=0, atol=1e-5)


def test_a_folder_whose_whole_model_cannot_be_made_has_no_names_for_adapters(tmp_path):
    seeing_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["vision_config"]["num_attention_heads"] = 3  # does not divide the width
    (tmp_path / "config.json").write_text(json.dumps(config))
    causal_lm(str(tmp_path))  # without adapters the whole model does not matter
    with pytest.raises(ConfigError, match=r"model.path: .* is a gemma3, and transformers .* makes no"):
        causal_lm(str(tmp_path), {"rank": 4})


@DORA
def test_compiled_layers_can_be_switched(dora, folders, tmp_path):
    folder = write_folder(tmp_path / "one", "qwen3", num_hidden_layers=1)
    model = adapted(folder, use_dora=dora)
    own = logits(model)
    with adapters_off(model):
        base = logits(model)
    plain = logits_of(transformers.AutoModelForCausalLM.from_pretrained(folder))
    torch.testing.assert_close(base, plain, rtol=0, atol=1e-5)
    for layer in decoder_of(model).layers:
        layer.compile(backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(logits(model), own, rtol=0, atol=1e-5)
        with adapters_off(model):
            torch.testing.assert_close(logits(model), base, rtol=0, atol=1e-5)
