"""Folders of small causal language models of transformers, as they would be downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
FURTHER: dict[str, dict[str, Any]] = {
    "gemma3_text": {"sliding_window": 5, "query_pre_attn_scalar": 8},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}


def causal_lm(kind: str, dtype: torch.dtype = torch.bfloat16, **settings: Any) -> Any:
    """A random model of a family, by its ``model_type``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **{**SIZES, **FURTHER.get(kind, {}), **settings})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def saved(folder: Path, model: Any, shard: str = "20KB") -> dict[str, torch.Tensor]:
    """Write a model to a folder as transformers does, in shards of a size; returns its tensors by name."""
    model.save_pretrained(folder, max_shard_size=shard)
    return dict(model.state_dict())
