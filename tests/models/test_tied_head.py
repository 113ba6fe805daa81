"""Files that hold a head beside the embedding that it is tied to, in each of the layouts that people bring."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tokenpref._paths import data_root
from tokenpref.errors import ConfigError
from tokenpref.training import PreferenceTrainer
from tokenpref.training.config.command_line import load_config

TINY = data_root() / "data" / "tiny" / "model"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
FEW = (
    "dataset.max_rows=8",
    "max_steps_per_epoch=1",
    "dataset_val=null",
    "run_val_every_n_steps=null",
    "log_stats=[]",
)


@pytest.fixture
def tied(tmp_path, monkeypatch):
    """Writes a copy of the tiny model with a head of its own, and returns what a config has to say of its files."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY, "model")
    folder = tmp_path / "model"
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()

    def write(layout, factor=1.0):
        whole = {**state, HEAD: factor * state[EMBEDDING]}
        if layout == "one file":
            save_file(whole, folder / "model.safetensors")
            return ["checkpointer.checkpoint_files=[model.safetensors]"]
        if layout == "bin":
            torch.save(whole, folder / "pytorch_model.bin")
            return ["checkpointer.checkpoint_files=[pytorch_model.bin]"]
        if layout == "torchtune":
            from torchtune.models.convert_weights import hf_to_tune

            torch.save(hf_to_tune(whole, num_heads=4, num_kv_heads=2, dim=32), folder / "weights.pt")
            return [
                "checkpointer=torchtune.training.FullModelTorchTuneCheckpointer",
                "checkpointer.checkpoint_dir=model",
                "checkpointer.checkpoint_files=[weights.pt]",
                "checkpointer.model_type=LLAMA3_2",
                "checkpointer.output_dir=out",
            ]
        # The head has a shard to itself.
        parts = {
            "model-00001-of-00002.safetensors": state,
            "model-00002-of-00002.safetensors": {HEAD: whole[HEAD]},
        }
        for name, part in parts.items():
            save_file(part, folder / name)
        index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return [f"checkpointer.checkpoint_files=[{', '.join(parts)}]"]

    return write


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


@pytest.mark.parametrize("layout", ["one file", "bin", "torchtune", "shards"])
def test_an_equal_head_is_dropped_and_the_export_loads(tied, tmp_path, caplog, layout):
    with caplog.at_level("INFO", "tokenpref"):
        train(*tied(layout))
    assert caplog.text.count("equals the embedding") == 1
    written = tmp_path / "out" / "epoch_0"
    index = written / "model.safetensors.index.json"
    if layout == "torchtune":
        assert "output.weight" not in torch.load(written / "model-00001-of-00001.bin", weights_only=True)
        return
    assert HEAD not in json.loads(index.read_text())["weight_map"]
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(written)
    exported = load_file(written / "model-00001-of-00001.safetensors")
    assert model.lm_head.weight.equal(exported[EMBEDDING]) and HEAD not in exported


@pytest.mark.parametrize("layout", ["one file", "bin", "torchtune", "shards"])
def test_another_head_is_refused(tied, layout):
    with pytest.raises(ConfigError, match=r"checkpointer: .*lm_head.weight.* differs from the embedding"):
        train(*tied(layout, factor=1.5))


QWEN = (
    "model=torchtune.models.qwen2.qwen2", "model.vocab_size=384", "model.num_layers=2", "model.num_heads=4",
    "model.num_kv_heads=2", "model.embed_dim=32", "model.intermediate_dim=64", "model.max_seq_len=256",
    "model.tie_word_embeddings=true", "model.rope_base=10000", "checkpointer.model_type=QWEN2",
    "checkpointer.checkpoint_files=[model.safetensors]",
)  # fmt: skip


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_a_head_that_torchtunes_reader_leaves_out_is_compared_too(tmp_path, monkeypatch, factor):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    config = transformers.Qwen2Config(
        vocab_size=384, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.Qwen2ForCausalLM(config).save_pretrained("model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    state = load_file(tmp_path / "model" / "model.safetensors")
    save_file({**state, HEAD: factor * state[EMBEDDING]}, tmp_path / "model" / "model.safetensors")
    if factor != 1:
        with pytest.raises(ConfigError, match="differs from the embedding"):
            train(*QWEN)
        return
    train(*QWEN)
    index = json.loads((tmp_path / "out" / "epoch_0" / "model.safetensors.index.json").read_text())
    assert HEAD not in index["weight_map"]


def test_an_untied_builder_needs_a_head(tied, tmp_path):
    words = tied("one file")
    state = load_file(tmp_path / "model" / "model.safetensors")
    del state[HEAD]
    save_file(state, tmp_path / "model" / "model.safetensors")
    untied = (
        "model=torchtune.models.llama3_2.llama3_2", "model.vocab_size=384", "model.num_layers=2", "model.num_heads=4",
        "model.num_kv_heads=2", "model.embed_dim=32", "model.intermediate_dim=64", "model.max_seq_len=256",
        "model.rope_base=10000", "model.scale_factor=1", "model.tie_word_embeddings=false",
    )  # fmt: skip
    with pytest.raises(ConfigError, match="tie_word_embeddings is true there and false in the model"):
        train(*words, *untied)
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": False}))
    with pytest.raises(ConfigError, match="The files hold no lm_head.weight, as those of models that tie"):
        train(*words, *untied)
