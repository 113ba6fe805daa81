"""Folders of small causal LMs of transformers, with the tokenizer of the tiny model, and the words that train them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from tokenpref._paths import data_root

TINY = data_root() / "data" / "tiny" / "model"
SIZES: dict[str, Any] = {
    "vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "intermediate_size": 48, "max_position_embeddings": 256, "initializer_range": 0.2, "bos_token_id": None,
    "eos_token_id": 0, "pad_token_id": 1, "sliding_window": 8, "tie_word_embeddings": False,
}  # fmt: skip
# Tied models, windows, biases, and projections that are one matrix (Phi-3).
KINDS: dict[str, dict[str, Any]] = {
    "qwen3": {"tie_word_embeddings": True},
    "gemma3_text": {"tie_word_embeddings": True, "query_pre_attn_scalar": 8},
    "llama": {},
    "phi3": {},
    "qwen2": {},
}

WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "head_dim": 64,
    "intermediate_size": 256,
    "initializer_range": 0.1,
}
"""Sizes that NF4 can hold, and of which two processes can share the groups."""


def hf_model(kind: str, seed: int = 0, **further: Any) -> Any:
    """A model as transformers makes it, with weights that are large enough for logits that differ."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **{**SIZES, **KINDS[kind], **further})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, 0, 0.3)
    return model


def seeing_model(folder: Path) -> Any:
    """Write a Gemma 3 that also sees images; returns what transformers loads from the folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sees = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    text = {**SIZES, **KINDS["gemma3_text"]}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=sees, mm_tokens_per_image=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, 0, 0.2)
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def write_folder(folder: Path, kind: str, seed: int = 0, **further: Any) -> Path:
    """Write a model and its tokenizer."""
    hf_model(kind, seed, **further).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / name, folder / name)
    return folder


def words(base: Path | str, output: Path | str, **lora: Any) -> list[str]:
    """The words that let a config of the tiny model train a causal LM; ``lora`` are its settings of adapters, if any."""
    return [
        "model=tokenpref.models.causal_lm", f"model.path={base}", *(f"model.lora.{k}={v}" for k, v in lora.items()),
        "checkpointer=tokenpref.models.CausalLMCheckpointer", f"checkpointer.checkpoint_dir={base}",
        "~checkpointer.checkpoint_files", "~checkpointer.model_type", f"output_dir={output}",
    ]  # fmt: skip
