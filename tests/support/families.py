"""Small models of the families of transformers that causal_lm is tested with.

The sizes make every part of a family matter: windows are shorter than the sequences, there are layers of every kind, logits are
scaled and soft-capped so much that leaving it out would be seen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

VOCAB = 97

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_WINDOW = {"sliding_window": 4, "layer_types": _MIXED}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_dropout": 0.5},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 4},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "ministral": _WINDOW,
    "gemma2": {**_WINDOW, "query_pre_attn_scalar": 5, "final_logit_softcapping": 1.5, "attn_logit_softcapping": 0.7},
    "gemma3_text": {**_WINDOW, "query_pre_attn_scalar": 5},
    "olmo2": {},
    "olmo3": _WINDOW,
    "smollm3": {**_WINDOW, "use_sliding_window": True, "no_rope_layers": [1, 0, 1]},
    "granite": {"logits_scaling": 0.5, "attention_multiplier": 0.3, "residual_multiplier": 0.7, "embedding_multiplier": 2.0},
    "phi3": {"sliding_window": 4, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
    "glm4": {},
    "cohere2": {**_WINDOW, "logit_scale": 2.5},
    "exaone4": {**_WINDOW, "sliding_window_pattern": 2},
    "seed_oss": {},
    "helium": {},
    "starcoder2": {"sliding_window": 4, "residual_dropout": 0.5, "embedding_dropout": 0.5},
    "gpt_neox": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
    "ernie4_5": {},
    "hunyuan_v1_dense": {},
    "lfm2": {"layer_types": ["full_attention"] * 3},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "output_router_logits": True},
    "mixtral": {"num_local_experts": 4, "sliding_window": 4, "router_jitter_noise": 0.0, "output_router_logits": True},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "head_dim": 4, "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8, "v_head_dim": 6, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
        "first_k_dense_replace": 1, "moe_intermediate_size": 16,
    },
}  # fmt: skip
"""Families whose sequences can be scored without padding, with the numbers that are not :data:`_SIZES`."""

PADDED: dict[str, tuple[str, dict[str, Any]]] = {
    "nemotron": ("nemotron", {}),
    "stablelm": ("stablelm", {}),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, **_WINDOW}),
    "lfm2 with convolutions": ("lfm2", {"layer_types": ["conv", "full_attention", "conv"], "conv_L_cache": 3}),
    "llama4_text": (
        "llama4_text",
        {"intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 2,
         "attention_chunk_size": 16, "no_rope_layers": [1, 0, 1]},
    ),
}  # fmt: skip
"""Families with attention that ours is not, or with layers that look beyond a sequence where others follow it, by a name."""


def config_of(family: str, settings: dict[str, Any] | None = None, **further: Any) -> Any:
    """The config of a small model.

    Args:
        family: a ``model_type``.
        settings: its own numbers; None: those of :data:`FAMILIES`.
        further: more of them.
    """
    from transformers import AutoConfig

    own = FAMILIES[family] if settings is None else settings
    return AutoConfig.for_model(family, **{**_SIZES, **own, **further})


def padded_config_of(name: str) -> Any:
    """The same for one of :data:`PADDED`."""
    return config_of(*PADDED[name])


def folder_of(folder: Path, config: Any) -> str:
    """Write ``config.json``, which is all that causal_lm reads; returns the folder's name."""
    config.save_pretrained(folder)
    return str(folder)


def randomise(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Give every parameter random values (in place), so large that all of them matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        # A tied head would repeat the last token for ever, and biases one token for all prompts.
        scale = 0.05 if "embed_" in name and "out" not in name or name.endswith("bias") else 0.25
        with torch.no_grad():
            parameter.copy_(scale * noise if parameter.dim() > 1 else parameter + scale * noise)
    return model


def own_model(config: Any, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:
    """A model as transformers makes it, with random weights, in evaluation mode and with eager attention."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64, attn_implementation="eager")
    randomise(model, seed).to(dtype).eval()
    return computing_in(model, dtype)


def causal_lm_of(folder: str, dtype: torch.dtype, lora: dict[str, Any] | None = None) -> torch.nn.Module:
    """What causal_lm makes in a dtype."""
    from tokenpref._torchtune import set_default_dtype
    from tokenpref.models import causal_lm

    with set_default_dtype(dtype):
        return causal_lm(folder, lora)


def ours(folder: str, own: Any, lora: dict[str, Any] | None = None) -> torch.nn.Module:
    """The model of causal_lm with the weights of :func:`own_model`, in evaluation mode."""
    model = causal_lm_of(folder, own.dtype, lora)
    state = {
        name: tensor for name, tensor in own.state_dict().items() if name not in own.all_tied_weights_keys
    }
    lacking, strange = model.load_state_dict(state, strict=False)
    assert not strange and all("lora" in name for name in lacking)
    return computing_in(model.eval(), own.dtype)


def computing_in(model: Any, dtype: torch.dtype) -> Any:
    """Let a model compute in a dtype (in place); returns it."""
    # The grouped products of PyTorch, with which transformers computes experts, have no float64.
    if dtype == torch.float64 and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model


class Float64(TorchFunctionMode):
    """Computes in float64 what models compute in float32 whatever their dtype, such as norms and softmax."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch with float64 wherever it is given float32."""
        if function is torch.Tensor.float:
            return args[0].double()
        wide = {torch.float32: torch.float64}
        args = [wide.get(a, a) if isinstance(a, torch.dtype) else a for a in args]
        kwargs = {k: wide.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        return function(*args, **kwargs)
