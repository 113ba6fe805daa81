"""The commands that train a LoRA of a causal language model of transformers, and merge it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from support.causal_folders import hf_model, words, write_folder
from support.commands import run, tune

from tokenpref._sealed import fault_of

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def test_train_a_lora_and_merge_it(tmp_path):
    write_folder(tmp_path / "base", "qwen3")
    lora = {"rank": 4, "alpha": 8, "target_modules": "[q_proj,v_proj,down_proj]"}
    more = ("max_steps_per_epoch=3", "optimizer.lr=0.02", "dataset.max_rows=24")
    done = tune(
        tmp_path,
        "recipes/tdpo_distributed",
        "--config",
        "tiny/tdpo",
        *words("base", "out", **lora),
        *more,
    )
    said = done.stdout + done.stderr
    assert "trainable parameters: 1,536 of" in said and "the policy with its adapters switched off" in said
    epoch = tmp_path / "out" / "epoch_0"
    assert fault_of(epoch) is None and not list(epoch.rglob("model*.safetensors"))
    config = json.loads((epoch / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == {"q_proj", "v_proj", "down_proj"}
    assert config["base_model_name_or_path"] == str(tmp_path / "base")

    merge = run(
        tmp_path, str(Path(sys.executable).parent / "tokenpref"), "merge", "out/epoch_0", "-o", "merged"
    )
    assert merge.returncode == 0, merge.stderr
    ids = torch.randint(4, 384, (1, 24), generator=torch.Generator().manual_seed(5))
    trained = peft.PeftModel.from_pretrained(hf_model("qwen3"), epoch).eval()
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        base, own = hf_model("qwen3")(ids).logits, trained(ids).logits
        torch.testing.assert_close(merged(ids).logits, own, rtol=0, atol=1e-5)
    assert (own - base).abs().max() > 0.01
