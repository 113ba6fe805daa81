"""The numbers of config.json files as the models' makers publish them, and the builders that they belong to."""

from __future__ import annotations

from torchtune.models import gemma, llama2, llama3, llama3_1, llama3_2, mistral, phi3, qwen2, qwen2_5

from tokenpref.models import smollm2, smollm2_135m

LLAMA_3 = {
    "model_type": "llama",
    "attention_bias": False,
    "hidden_act": "silu",
    "mlp_bias": False,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
SCALING = {
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA_3_2_1B = {
    **LLAMA_3,
    "head_dim": 64,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "rope_scaling": {**SCALING, "factor": 32.0},
    "tie_word_embeddings": True,
}
LLAMA_8B = {
    **LLAMA_3,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "tie_word_embeddings": False,
}
MISTRAL_7B = {
    "model_type": "mistral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
}
QWEN_0_5B = {
    "model_type": "qwen2",
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
PHI_3_MINI = {
    "model_type": "phi3",
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "vocab_size": 32064,
}
GEMMA_2B = {
    "model_type": "gemma",
    "attention_bias": False,
    "head_dim": 256,
    "hidden_act": "gelu",
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "max_position_embeddings": 8192,
    "num_attention_heads": 8,
    "num_hidden_layers": 18,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "vocab_size": 256000,
}
FAMILIES = {
    "llama2": (
        llama2.llama2_7b,
        {
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
    ),
    "llama3": (llama3.llama3_8b, {**LLAMA_8B, "rope_scaling": None}),
    "llama3_1": (llama3_1.llama3_1_8b, {**LLAMA_8B, "rope_scaling": {**SCALING, "factor": 8.0}}),
    "llama3_2": (llama3_2.llama3_2_1b, LLAMA_3_2_1B),
    "llama3_2_3b": (
        llama3_2.llama3_2_3b,
        {
            **LLAMA_3_2_1B,
            "head_dim": 128,
            "hidden_size": 3072,
            "num_attention_heads": 24,
            "num_hidden_layers": 28,
        },
    ),
    "mistral": (mistral.mistral_7b, MISTRAL_7B),
    "qwen2": (qwen2.qwen2_0_5b, QWEN_0_5B),
    "qwen2_5": (qwen2_5.qwen2_5_0_5b, QWEN_0_5B),
    "qwen2_5_3b": (
        qwen2_5.qwen2_5_3b,
        {
            **QWEN_0_5B,
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_attention_heads": 16,
            "num_hidden_layers": 36,
        },
    ),
    "qwen2_5_7b": (
        qwen2_5.qwen2_5_7b_instruct,
        {
            **QWEN_0_5B,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_attention_heads": 28,
            "num_hidden_layers": 28,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
            "vocab_size": 152064,
        },
    ),
    "phi3": (phi3.phi3_mini, PHI_3_MINI),
    "gemma": (gemma.gemma_2b, GEMMA_2B),
    "smollm2": (smollm2_135m, smollm2._config(dict.fromkeys(
        [f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "padding")], 0
    ))),
}  # fmt: skip

# Models of transformers: what config.json says, and the number of parameters. Keys at the default of transformers are left out.
QWEN_3 = {
    "model_type": "qwen3",
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "vocab_size": 151936,
}
GEMMA_3 = {"model_type": "gemma3_text", "head_dim": 256, "query_pre_attn_scalar": 256}
CAUSAL_LMS = {
    "Qwen3-0.6B": (
        596_049_920,
        {
            **QWEN_3,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "tie_word_embeddings": True,
        },
    ),
    "Qwen3-1.7B": (
        1_720_574_976,
        {
            **QWEN_3,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "tie_word_embeddings": True,
        },
    ),
    "Qwen3-4B": (
        4_022_468_096,
        {
            **QWEN_3,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "tie_word_embeddings": True,
        },
    ),
    "Qwen3-8B": (
        8_190_735_360,
        {
            **QWEN_3,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_attention_heads": 32,
            "num_hidden_layers": 36,
            "tie_word_embeddings": False,
        },
    ),
    "gemma-3-1b-it": (
        999_885_952,
        {
            **GEMMA_3,
            "hidden_size": 1152,
            "intermediate_size": 6912,
            "max_position_embeddings": 32768,
            "num_attention_heads": 4,
            "num_hidden_layers": 26,
            "num_key_value_heads": 1,
            "sliding_window": 512,
            "vocab_size": 262144,
        },
    ),
    # The language model of a model that also sees images, which has 4,300,079,472 parameters in all.
    "gemma-3-4b-it": (
        3_880_263_168,
        {
            "model_type": "gemma3",
            "text_config": {
                **GEMMA_3,
                "hidden_size": 2560,
                "intermediate_size": 10240,
                "num_attention_heads": 8,
                "num_hidden_layers": 34,
                "num_key_value_heads": 4,
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                "sliding_window": 1024,
                "vocab_size": 262208,
            },
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": 1152,
                "image_size": 896,
                "intermediate_size": 4304,
                "num_attention_heads": 16,
                "num_hidden_layers": 27,
                "patch_size": 14,
                "vision_use_head": False,
            },
        },
    ),
    "Olmo-3-7B-Instruct": (
        7_298_011_136,
        {
            "model_type": "olmo3",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "max_position_embeddings": 65536,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 32,
            "rope_scaling": {
                "attention_factor": 1.2079441541679836,
                "beta_fast": 32,
                "beta_slow": 1,
                "factor": 8.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "yarn",
            },
            "rope_theta": 500000,
            "sliding_window": 4096,
            "vocab_size": 100278,
        },
    ),
    "SmolLM3-3B": (
        3_075_098_624,
        {
            "model_type": "smollm3",
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "max_position_embeddings": 65536,
            "no_rope_layer_interval": 4,
            "num_attention_heads": 16,
            "num_hidden_layers": 36,
            "num_key_value_heads": 4,
            "rope_theta": 5000000,
            "tie_word_embeddings": True,
            "vocab_size": 128256,
        },
    ),
}
