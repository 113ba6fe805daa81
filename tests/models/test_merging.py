"""`tokenpref merge`: the merged weights are those of peft's merge_and_unload, file by file."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.peft_models import FAMILIES, TOKENS

from tokenpref._sealed import seal
from tokenpref.cli import main
from tokenpref.errors import TokenprefError
from tokenpref.models.merging import merge_adapter
from tokenpref.models.peft_format import ADAPTER_CONFIG, AdapterLayout, Base, write_adapter

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
LLAMA = FAMILIES["llama2"]


def base_folder(path, family=LLAMA, dtype=torch.float32, **kwargs):
    family.hf_model().to(dtype).save_pretrained(path, **kwargs)
    (path / "tokenizer.json").write_text("{}")
    (path / "chat_template.jinja").write_text("of the base")
    return path


def peft_folder(base, path, targets=("q_proj", "k_proj", "down_proj"), **settings):
    """An adapter of peft over a base, with values that change the model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=list(targets), init_lora_weights=False, **settings
    )
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1.2)
    model.save_pretrained(path, save_embedding_layers=False)
    return path


def unloaded(base, adapter):
    """What peft merges."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    return peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()


def tensors_of(folder):
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.mark.parametrize(
    "settings", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"]
)
def test_the_merged_weights_are_those_of_peft(settings, tmp_path):
    base = base_folder(tmp_path / "base", max_shard_size="20KB")
    files = sorted(file.name for file in base.glob("*.safetensors"))
    assert len(files) > 2
    adapter = peft_folder(base, tmp_path / "adapter", **settings)
    assert main(["merge", str(adapter), "-o", str(tmp_path / "merged")]) == 0
    merged = tmp_path / "merged"
    assert sorted(file.name for file in merged.glob("*.safetensors")) == files
    expected, own = unloaded(base, adapter), tensors_of(merged)
    wanted = expected.state_dict()
    assert own.keys() == tensors_of(base).keys() == wanted.keys()
    for name, tensor in own.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(merged).eval()
        torch.testing.assert_close(model(TOKENS).logits, expected(TOKENS).logits, rtol=0, atol=1e-4)
    assert (merged / "chat_template.jinja").read_text() == "of the base"
    assert not (merged / ADAPTER_CONFIG).exists()


def test_an_adapter_of_ours_merges_over_a_base_in_bfloat16(tmp_path):
    base = base_folder(tmp_path / "base", dtype=torch.bfloat16)
    decoder = LLAMA.decoder(transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_adapter(adapter, decoder.state_dict(), AdapterLayout.of(decoder), Base.of(base))
    (adapter / "tokenizer.json").write_text('{"of": "the adapter"}')
    merge_adapter(adapter, tmp_path / "merged")
    own = tensors_of(tmp_path / "merged")
    assert {tensor.dtype for tensor in own.values()} == {torch.bfloat16}
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wanted = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    assert all(torch.equal(own[name], wanted[name].bfloat16()) for name in own)
    assert (tmp_path / "merged" / "tokenizer.json").read_text() == '{"of": "the adapter"}'
    assert not (tmp_path / "merged" / "chat_template.jinja").exists()  # the adapter's tokenizer has none


def test_headers_and_other_tensors_stay_as_they_are(pair, tmp_path):
    base, adapter = pair
    weights = load_file(base / "model.safetensors")
    weights |= {
        "a.counter": torch.tensor(3),
        "a.mask": torch.tensor([True, False]),
        "an.empty": torch.zeros(0, 4),
    }
    save_file(weights, base / "model.safetensors", metadata={"format": "pt", "note": "kept"})
    merge_adapter(adapter, tmp_path / "merged")
    file = tmp_path / "merged" / "model.safetensors"
    with safe_open(file, framework="pt") as stream:
        assert stream.metadata() == {"format": "pt", "note": "kept"}
    changed = {name for name, tensor in load_file(file).items() if not torch.equal(tensor, weights[name])}
    adapted = ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
    assert changed == {f"model.layers.{n}.{name}.weight" for n in (0, 1) for name in adapted}
    assert file.stat().st_mode & 0o777 == (base / "config.json").stat().st_mode & 0o777


@pytest.fixture
def pair(tmp_path):
    base = base_folder(tmp_path / "base")
    return base, peft_folder(base, tmp_path / "adapter")


def change(file, **settings):
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def refused(fault, adapter, output, base=None):
    with pytest.raises(TokenprefError, match=fault):
        merge_adapter(adapter, output, base)
    assert sorted(p.name for p in output.parent.iterdir() if p.name.startswith(".")) == []


def test_bad_input_is_refused_by_name(pair, tmp_path, capsys):
    base, adapter = pair
    output = tmp_path / "merged"
    refused("--base: there is no folder", adapter, output, tmp_path / "nowhere")
    refused("exists; remove it", adapter, base)
    change(adapter / ADAPTER_CONFIG, base_model_name_or_path="meta-llama/Some-Model")
    refused("its base 'meta-llama/Some-Model' is no folder here.*--base", adapter, output)
    change(adapter / ADAPTER_CONFIG, base_model_name_or_path=None)
    refused("names no base; set --base", adapter, output)
    change(base / "config.json", quantization_config={"quant_method": "gptq"})
    refused(r"is quantised \(gptq\)", adapter, output, base)
    change(base / "config.json", quantization_config=None)
    change(adapter / ADAPTER_CONFIG, modules_to_save=["lm_head"])
    refused("modules_to_save is", adapter, output, base)
    change(adapter / ADAPTER_CONFIG, modules_to_save=None)
    assert main(["merge", str(adapter), "-o", str(output)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {adapter}")
    assert not output.exists()
    merge_adapter(adapter, output, base)  # nothing was left broken


def test_a_base_that_changed_since_a_run_exported_it_is_refused(pair, tmp_path):
    base, adapter = pair
    seal(base)
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    refused(f"{base} holds damaged weights: model.safetensors is not", adapter, tmp_path / "merged", base)


def test_a_base_of_another_shape_or_dtype_is_refused(pair, tmp_path):
    base, adapter = pair
    file = base / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.0.self_attn.q_proj.weight"
    for tensor, fault in (
        (torch.zeros(16, 32), r"of the shape \[32, 32\], and .* has \[16, 32\]"),
        (torch.zeros(32, 32, dtype=torch.int8), r"is quantised \(.*q_proj.weight is I8\)"),
        (torch.full((32, 32), 60000.0), None),
        (None, f"holds no {name}"),
    ):
        changed = {k: v for k, v in weights.items() if k != name} | ({} if tensor is None else {name: tensor})
        save_file(changed, file, metadata={"format": "pt"})
        if fault is None:
            merge_adapter(adapter, tmp_path / "large", base)
        else:
            refused(fault, adapter, tmp_path / "merged", base)
    file.write_bytes(b"no")
    refused("model.safetensors cannot be read", adapter, tmp_path / "merged", base)
    file.unlink()
    refused("has no \\*.safetensors", adapter, tmp_path / "merged", base)


def test_values_that_do_not_fit_the_dtype_are_refused(tmp_path):
    base = base_folder(tmp_path / "base", dtype=torch.float16)
    adapter = peft_folder(base, tmp_path / "adapter")
    change(adapter / ADAPTER_CONFIG, lora_alpha=1e9)
    refused("is not finite with the adapter merged in.*float16", adapter, tmp_path / "merged", base)


def test_the_base_that_the_adapter_records_is_compared(tmp_path):
    base, other = base_folder(tmp_path / "base"), tmp_path / "other"
    LLAMA.hf_model(seed=1).save_pretrained(other)
    decoder = LLAMA.decoder()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_adapter(adapter, decoder.state_dict(), AdapterLayout.of(decoder), Base.of(base))
    refused("is an adapter of other weights", adapter, tmp_path / "merged", other)
    base.rename(tmp_path / "moved")
    refused("is no folder here", adapter, tmp_path / "merged")
    merge_adapter(adapter, tmp_path / "merged", tmp_path / "moved")


def test_magnitudes_in_the_order_of_torchtune_are_refused(tmp_path):
    base = base_folder(tmp_path / "base")
    decoder = LLAMA.decoder(use_dora=True)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_adapter(adapter, decoder.state_dict(), AdapterLayout.of(decoder))
    config = json.loads((adapter / ADAPTER_CONFIG).read_text())
    del config["use_dora"]  # a key that torchtune does not write
    (adapter / ADAPTER_CONFIG).write_text(json.dumps(config))
    refused("was written by torchtune.*adapter_checkpoint", adapter, tmp_path / "merged", base)


def test_a_tied_head_cannot_be_merged(tmp_path):
    base = base_folder(tmp_path / "base", FAMILIES["llama3_2"])
    adapter = peft_folder(base, tmp_path / "adapter", targets=("q_proj", "lm_head"))
    refused("holds no lm_head.weight .the model ties its head", adapter, tmp_path / "merged", base)
