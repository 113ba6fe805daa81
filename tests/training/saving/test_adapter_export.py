"""A run with adapters exports what peft and transformers load: the trained logits and the same greedy tokens."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torchtune.training import FullModelHFCheckpointer

from tokenpref._sealed import MANIFEST, fault_of
from tokenpref.cli import main
from tokenpref.distributed import single_process_world
from tokenpref.errors import ConfigError
from tokenpref.models.peft_format import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_RECORD
from tokenpref.training import PreferenceTrainer
from tokenpref.training.config.command_line import load_config
from tokenpref.training.saving.run_folder import RunFolder

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
LORA = (
    "model._component_=tokenpref.models.lora_tiny_llama",
    "model.lora_attn_modules=[q_proj,k_proj,v_proj]",
    "model.apply_lora_to_mlp=true",
    "model.lora_rank=4",
    "model.lora_alpha=8",
    "optimizer.lr=0.02",
    "dataset.max_rows=16",
    "max_steps_per_epoch=2",
    "dataset_val=null",
    "run_val_every_n_steps=null",
    "log_stats=[]",
)
TALK = [{"role": "user", "content": "what?"}]
WHOLE = "model-00001-of-00001.safetensors"


def train(folder, *words):
    words = ["--config", "tiny/dpo", f"output_dir={folder}", *LORA, *words]
    trainer = PreferenceTrainer(load_config(words))
    try:
        trainer.setup()
        trainer.train()
    finally:
        trainer.close()
    return trainer, folder / "epoch_0"


@pytest.fixture(scope="module", params=["lora", "dora"])
def run(request, tmp_path_factory):
    """A run that also writes the merged model."""
    dora = f"model.use_dora={str(request.param == 'dora').lower()}"
    return train(tmp_path_factory.mktemp("run") / "out", dora, "save_adapter_weights_only=false")


def policy_logits(trainer, tokens):
    with torch.no_grad():
        found = trainer.policy.model.eval()(tokens)
    return (torch.cat(found, 1) if isinstance(found, list) else found).float()


def same(trainer, model, tokenizer):
    """The trained logits, and the same greedy continuation."""
    ids = tokenizer("Once upon a time", add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, policy_logits(trainer, ids), rtol=0, atol=1e-4)
    written = model.generate(
        input_ids=ids, do_sample=False, max_new_tokens=12, eos_token_id=None, pad_token_id=0
    )
    own = ids
    for _ in range(12):
        own = torch.cat([own, policy_logits(trainer, own)[:, -1:].argmax(-1)], 1)
    assert written.tolist() == own.tolist()


def base_of(folder):
    return json.loads((folder / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]


def test_peft_loads_the_adapter_over_its_base(run):
    trainer, folder = run
    base = transformers.AutoModelForCausalLM.from_pretrained(base_of(folder))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    same(trainer, peft.PeftModel.from_pretrained(base, folder), tokenizer)
    own = trainer.tokenizer
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (own.eos_id, own.pad_id)
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == own.render_chat(TALK, False)


def test_the_merged_model_is_written_beside_it(run):
    trainer, folder = run
    assert fault_of(folder) is None
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    merged = folder / "merged"
    same(trainer, transformers.AutoModelForCausalLM.from_pretrained(merged), tokenizer)
    assert transformers.AutoTokenizer.from_pretrained(merged).get_vocab() == tokenizer.get_vocab()
    assert f"merged/{WHOLE}" in json.loads((folder / MANIFEST).read_text())["files"]
    assert not (folder / WHOLE).exists() and not (merged / ADAPTER_CONFIG).exists()


def test_an_export_replaces_an_unfinished_one(run, tmp_path):
    trainer, folder = run
    names = {file.relative_to(folder) for file in folder.rglob("*")}
    own = RunFolder(tmp_path, {"save_adapter_weights_only": False}, "recipe", single_process_world())
    checkpointer = FullModelHFCheckpointer(
        str(Path(base_of(folder))), ["model.safetensors"], "LLAMA3_2", str(tmp_path)
    )
    checkpointer.load_checkpoint()
    for _ in range(2):
        own.export(checkpointer, trainer.policy.model, 0)
        (tmp_path / "epoch_0" / MANIFEST).unlink()
    again = {file.relative_to(tmp_path / "epoch_0") for file in (tmp_path / "epoch_0").rglob("*")}
    assert {Path("merged", WHOLE), Path(ADAPTER_CONFIG)} <= again < names
    assert Path("merged", ADAPTER_CONFIG) not in again


def test_merging_later_gives_the_same_weights(run, tmp_path):
    _, folder = run
    assert main(["merge", str(folder), "-o", str(tmp_path / "merged")]) == 0
    merged, exported = (
        load_file(tmp_path / "merged" / "model.safetensors"),
        load_file(folder / "merged" / WHOLE),
    )
    assert merged.keys() == exported.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, exported[name], rtol=1e-5, atol=1e-6)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template


def test_without_the_merged_model_the_folder_is_small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer, folder = train(tmp_path / "out")
    names = {file.name for file in folder.iterdir()}
    assert {
        ADAPTER_WEIGHTS,
        ADAPTER_CONFIG,
        BASE_RECORD,
        MANIFEST,
        "tokenizer.json",
        "tokenizer_config.json",
    } <= names
    assert not {"merged", "config.json", WHOLE, "model.safetensors", "model.safetensors.index.json"} & names
    assert fault_of(folder) is None
    config = json.loads((folder / ADAPTER_CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], Path(config["base_model_name_or_path"]).is_absolute()) == (
        4,
        8,
        True,
    )
    # A later training that starts from it continues where it ended.
    again, _ = train(
        tmp_path / "again", f"adapter_checkpoint={folder}", "optimizer.lr=1e-12", "max_steps_per_epoch=1"
    )
    tokens = torch.randint(4, 60, (1, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        policy_logits(again, tokens), policy_logits(trainer, tokens), rtol=0, atol=1e-5
    )


def test_an_adapter_of_other_weights_is_refused(run, tmp_path):
    _, folder = run
    kind = json.loads((folder / ADAPTER_CONFIG).read_text())["use_dora"]
    model = tmp_path / "model"
    model.mkdir()
    for file in Path(base_of(folder)).iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(bytes(weights))
    words = (
        f"adapter_checkpoint={folder}",
        f"checkpointer.checkpoint_dir={model}",
        f"model.use_dora={str(kind).lower()}",
    )
    with pytest.raises(ConfigError, match="adapter_checkpoint: .* is an adapter of other weights"):
        train(tmp_path / "other", *words)


def test_a_quantised_base_is_not_merged(tmp_path):
    words = (
        "model._component_=torchtune.models.llama3_2.qlora_llama3_2_1b",
        "save_adapter_weights_only=false",
    )
    with pytest.raises(
        ConfigError, match="save_adapter_weights_only: is false, .* quantised base.*tokenpref merge"
    ):
        train(tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()
