"""An exported folder says what was trained: transformers loads the same function, template, tokens and dtype from it."""

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tokenpref._paths import data_root
from tokenpref.data import tokenizer_json
from tokenpref.training import PreferenceTrainer
from tokenpref.training.config.command_line import load_config
from tokenpref.training.saving.export import describe_export

TINY = data_root() / "data" / "tiny" / "model"
FEW = (
    "dataset.max_rows=8",
    "max_steps_per_epoch=1",
    "dataset_val=null",
    "run_val_every_n_steps=null",
    "log_stats=[]",
)
MINE = (
    "{%- for m in messages -%}<{{ m.role }}>{{ m.content }}{{ eos_token }}{%- endfor -%}\n"
    "{%- if add_generation_prompt %}<go>{% endif %}"
)
TALK = [
    {"role": "user", "content": "what?"},
    {"role": "assistant", "content": "that"},
    {"role": "user", "content": "so"},
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY, "model")
    return tmp_path / "model"


def change(file, **settings):
    record = (json.loads(file.read_text()) if file.is_file() else {}) | settings
    file.write_text(json.dumps({key: value for key, value in record.items() if value is not ...}))


def train(*words):
    trainer = PreferenceTrainer(
        load_config(
            ["--config", "tiny/dpo", "checkpointer.checkpoint_dir=model", "output_dir=out", *FEW, *words]
        )
    )
    try:
        trainer.setup()
        trainer.train()
    finally:
        trainer.close()
    return trainer, Path("out/epoch_0").absolute()


def same_for_transformers(trainer, written):
    """The exported folder as transformers reads it, against what the run had in memory."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(written)
    own = trainer.tokenizer
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (
        own.eos_id,
        own.bos_id,
        own.pad_id,
    )
    for generate in (True, False):
        shown = tokenizer.apply_chat_template(TALK, tokenize=False, add_generation_prompt=generate)
        assert shown == own.render_chat(TALK, generate)
    text = "Once upon a time, 12 cats"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == own.encode_with_offsets(text, False)[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(written)
    exported = load_file(written / "model-00001-of-00001.safetensors")
    assert model.dtype == exported["model.norm.weight"].dtype
    config = json.loads((written / "config.json").read_text())
    ends = config["eos_token_id"]
    assert own.eos_id in (ends if isinstance(ends, list) else [ends])
    assert config["pad_token_id"] == own.pad_id
    tokens = torch.tensor([own.encode_with_offsets(text, False)[0]])
    with torch.no_grad():
        theirs = model(tokens).logits.float()
        ours = trainer.policy.model.eval()(tokens)
    ours = torch.cat(ours, 1) if isinstance(ours, list) else ours
    torch.testing.assert_close(theirs.log_softmax(-1), ours.float().log_softmax(-1), atol=2e-4, rtol=2e-4)
    return tokenizer, model


def test_nothing_is_changed_where_everything_is_said_already(folder):
    trainer, written = train("tokenizer.path=model")
    same_for_transformers(trainer, written)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (written / name).read_bytes() == (folder / name).read_bytes()
    assert not (written / "chat_template.jinja").exists()


@pytest.mark.parametrize("place", ["none", "settings", "file", "legacy"])
def test_a_template_of_the_config_is_exported(folder, tmp_path, place):
    (tmp_path / "mine.jinja").write_text(MINE)
    former = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    if place != "settings":
        change(folder / "tokenizer_config.json", chat_template=...)
    if place == "file":
        (folder / "chat_template.jinja").write_text(former)
    if place == "legacy":
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": former}))
    trainer, written = train("tokenizer.path=model", "tokenizer.chat_template=mine.jinja")
    same_for_transformers(trainer, written)
    # What older versions of transformers read.
    assert (
        json.loads((written / "tokenizer_config.json").read_text())["chat_template"]
        == trainer.tokenizer.chat_template
    )


def test_a_template_that_transformers_would_not_find_is_put_where_it_looks(folder):
    template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    change(folder / "tokenizer_config.json", chat_template=...)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    same_for_transformers(*train("tokenizer.path=model"))


def test_named_templates_stay_where_the_default_one_was_trained_with(folder):
    template = json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
    named = [{"name": "default", "template": template}, {"name": "tool_use", "template": "x"}]
    change(folder / "tokenizer_config.json", chat_template=named)
    _, written = train("tokenizer.path=model")
    assert json.loads((written / "tokenizer_config.json").read_text())["chat_template"] == named


def test_a_template_for_tools_is_exported_beside_the_other_one(folder, tmp_path):
    transformers = pytest.importorskip("transformers")
    (folder / "chat_template.jinja").write_text(MINE)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools | length }} tools")
    tokenizer = tokenizer_json("model")
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert tokenizer.render_chat(TALK, False, tools=tools) == "1 tools"
    describe_export(tmp_path, {}, tokenizer)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for given in (None, tools):
        wanted = loaded.apply_chat_template(TALK, tools=given, tokenize=False)
        assert tokenizer_json(tmp_path).render_chat(TALK, False, tools=given) == wanted
        assert tokenizer.render_chat(TALK, False, tools=given) == wanted


def test_tokens_of_the_config_are_exported(folder):
    change(
        folder / "generation_config.json", eos_token_id=[0], pad_token_id=1, temperature=0.7, do_sample=True
    )
    change(folder / "special_tokens_map.json", eos_token={"content": "<|end|>"}, pad_token="<|pad|>")
    trainer, written = train(
        "tokenizer.path=model",
        "tokenizer.eos_token=<|user|>",
        "tokenizer.bos_token=<|end|>",
        "tokenizer.pad_token=<|end|>",
    )
    assert (trainer.tokenizer.eos_id, trainer.tokenizer.pad_id) != (0, 1)
    tokenizer, model = same_for_transformers(trainer, written)
    assert tokenizer.eos_token == "<|user|>"
    # It stops at the trained end and where it stopped before; what else the file says stays.
    assert model.generation_config.eos_token_id == [trainer.tokenizer.eos_id, 0]
    assert model.generation_config.temperature == 0.7 and model.generation_config.pad_token_id == 0


def test_a_tokenizer_without_padding_is_exported_with_what_it_was_padded_with(folder):
    change(folder / "tokenizer_config.json", pad_token=...)
    change(folder / "config.json", pad_token_id=None)
    trainer, written = train("tokenizer.path=model")
    tokenizer, _ = same_for_transformers(trainer, written)
    assert tokenizer.pad_token == tokenizer.eos_token


def test_the_tokenizer_that_was_trained_with_is_exported(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(TINY / "tokenizer.json", other / "tok.json")
    (other / "chat_template.jinja").write_text(MINE)
    for name in ("special_tokens_map.json", "added_tokens.json"):
        (folder / name).write_text("{}")
    words = ("tokenizer.eos_token=<|end|>", "tokenizer.pad_token=<|pad|>")
    trainer, written = train("tokenizer.path=other/tok.json", *words)
    same_for_transformers(trainer, written)
    names = {file.name for file in written.iterdir()}
    assert not names & {"special_tokens_map.json", "added_tokens.json", "tok.json"}
    assert (written / "chat_template.jinja").read_text() == MINE


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", "both", "none"])
@pytest.mark.parametrize(("trained", "name"), [("fp32", "float32"), ("bf16", "bfloat16")])
def test_the_named_dtype_is_the_weights(folder, caplog, key, trained, name):
    """transformers 5 loads the dtype that config.json names, and would round trained float32 weights to a former bfloat16."""
    state = load_file(folder / "model.safetensors")
    other = torch.bfloat16 if trained == "fp32" else torch.float32
    save_file({key: value.to(other) for key, value in state.items()}, folder / "model.safetensors")
    keys = {"both": ("dtype", "torch_dtype"), "none": ()}.get(key, (key,))
    named = {k: str(other).removeprefix("torch.") if k in keys else ... for k in ("dtype", "torch_dtype")}
    change(folder / "config.json", **named)
    with caplog.at_level("INFO", "tokenpref"):
        trainer, written = train(f"dtype={trained}", "optimizer.lr=1e-2")
    config = json.loads((written / "config.json").read_text())
    assert {k: config[k] for k in ("dtype", "torch_dtype") if k in config} == dict.fromkeys(keys, name)
    assert (f"the weights are {name}" in caplog.text) == bool(keys)
    if trained == "fp32":
        same_for_transformers(trainer, written)


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_weights_are_as_readable_as_their_neighbours(folder, tmp_path, mask):
    before = os.umask(mask)
    try:
        train("checkpoint_every_n_steps=1", "max_steps_per_epoch=2", "dataset.max_rows=16")
    finally:
        os.umask(before)
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file() and file.name != ".lock"]
    assert any(file.suffix == ".safetensors" for file in files)
    made = [file for file in files if not (folder / file.name).exists()]
    assert {stat.S_IMODE(file.stat().st_mode) for file in made} == {0o666 & ~mask}


def test_pickled_weights_and_indexes_of_other_files_are_exported_too(folder):
    state = load_file(folder / "model.safetensors")
    torch.save(
        {**state, "lm_head.weight": state["model.embed_tokens.weight"].clone()}, folder / "pytorch_model.bin"
    )
    (folder / "model.safetensors").unlink()
    other = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "consolidated.safetensors.index.json").write_text(json.dumps(other))
    _, written = train(
        "checkpointer.checkpoint_files=[pytorch_model.bin]", "checkpointer.safe_serialization=false"
    )
    names = json.loads((written / "pytorch_model.bin.index.json").read_text())["weight_map"]
    assert set(names) == set(torch.load(written / "model-00001-of-00001.bin")) == set(state)
    assert json.loads((written / "consolidated.safetensors.index.json").read_text()) == other


def test_best_weights_are_described_too(folder, tmp_path):
    (tmp_path / "mine.jinja").write_text(MINE)
    train(
        "tokenizer.path=model", "tokenizer.chat_template=mine.jinja", "run_val_every_n_steps=1", "best.metric=loss",
        "best.goal=min", "dataset_val=tokenpref.data.preference_dataset", "dataset_val.max_rows=4",
        "dataset_val.source=package://data/tiny/eval.jsonl", "dataset_val.format=explicit",
    )  # fmt: skip
    assert tokenizer_json(tmp_path / "out" / "best").chat_template == MINE


def test_a_damaged_neighbour_does_not_cost_the_weights(tmp_path, caplog):
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{")
    describe_export(tmp_path, {"a": torch.ones(1)}, tokenizer_json(TINY))
    assert (tmp_path / "config.json").read_text() == "{" and "is not valid JSON" in caplog.text
