"""Tiny models of several families, in torchtune with adapters and in transformers, with the same random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchtune.models.convert_weights import hf_to_tune
from torchtune.models.gemma._component_builders import lora_gemma
from torchtune.models.gemma2._component_builders import lora_gemma2
from torchtune.models.gemma2._convert_weights import gemma2_hf_to_tune
from torchtune.models.llama2._component_builders import lora_llama2
from torchtune.models.llama3_1._component_builders import lora_llama3_1
from torchtune.models.llama3_2._component_builders import lora_llama3_2
from torchtune.models.mistral._component_builders import lora_mistral
from torchtune.models.phi3._component_builders import lora_phi3
from torchtune.models.phi3._convert_weights import phi3_hf_to_tune
from torchtune.models.qwen2._component_builders import lora_qwen2
from torchtune.models.qwen2._convert_weights import qwen2_hf_to_tune

from tokenpref._torchtune import TransformerDecoder

VOCAB, DIM, HEADS, KV_HEADS, MLP, LAYERS = 67, 32, 4, 2, 48, 2
TOKENS = torch.randint(4, VOCAB, (2, 9), generator=torch.Generator().manual_seed(5))
ALL = ["q_proj", "k_proj", "v_proj", "output_proj"]


@dataclass(frozen=True)
class Family:
    """One family: its classes in transformers, its LoRA builder, and the conversion of its weights."""

    hf: str
    builder: Callable[..., TransformerDecoder]
    convert: Callable[..., dict[str, Tensor]] = hf_to_tune
    head_dim: int = DIM // HEADS
    settings: tuple[tuple[str, Any], ...] = ()
    builder_settings: tuple[tuple[str, Any], ...] = ()
    tied: bool = False
    bias: bool = False

    def hf_model(self, seed: int = 0) -> Any:
        """The model in transformers, with weights that are large enough for logits that differ."""
        import transformers

        torch.manual_seed(seed)
        config = getattr(transformers, f"{self.hf}Config")(
            vocab_size=VOCAB,
            hidden_size=DIM,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            intermediate_size=MLP,
            max_position_embeddings=64,
            rms_norm_eps=1e-6,
            tie_word_embeddings=self.tied,
            initializer_range=0.15,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=3,
            attn_implementation="eager",
            **dict(self.settings),
        )
        model = getattr(transformers, f"{self.hf}ForCausalLM")(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, 0, 0.3)
            elif parameter.dim() == 1:
                parameter.data += 0.1 * torch.randn(parameter.shape)  # norms, which begin alike
        return model

    def decoder(
        self, hf_model: Any = None, *, rank: int = 4, alpha: float = 8, **kwargs: Any
    ) -> TransformerDecoder:
        """The decoder with adapters that change its function; ``hf_model`` gives its base."""
        settings = {"lora_attn_modules": ALL, "apply_lora_to_mlp": True, **kwargs}
        decoder = self.builder(
            vocab_size=VOCAB,
            num_layers=LAYERS,
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            embed_dim=DIM,
            intermediate_dim=MLP,
            max_seq_len=64,
            norm_eps=1e-6,
            lora_rank=rank,
            lora_alpha=alpha,
            **settings,
            **dict(self.builder_settings),
        )
        if hf_model is not None:
            weights = {k: v.clone() for k, v in hf_model.state_dict().items() if "rotary" not in k}
            if self.tied:
                weights.pop("lm_head.weight", None)
            decoder.load_state_dict(
                self.convert(weights, HEADS, KV_HEADS, DIM, **self._head_dim()), strict=False
            )
        randomise(decoder)
        return decoder.eval()

    def _head_dim(self) -> dict[str, int]:
        return {} if self.convert is phi3_hf_to_tune else {"head_dim": self.head_dim}


def randomise(decoder: TransformerDecoder, seed: int = 1) -> None:
    """Give a decoder's adapters values that change its function."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in decoder.modules():
            if not hasattr(module, "lora_a"):
                continue
            for part in (module.lora_a, module.lora_b):
                part.weight.normal_(0, 0.1, generator=generator)
            if hasattr(module, "magnitude"):
                module.initialize_dora_magnitude()
                module.magnitude.mul_(1 + 0.3 * torch.randn(module.magnitude.shape, generator=generator))


SCALED = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
FAMILIES = {
    "llama2": Family("Llama", lora_llama2),
    "llama3_1": Family(
        "Llama",
        lora_llama3_1,
        settings=(("rope_parameters", {**SCALED, "original_max_position_embeddings": 8192}),),
    ),
    "llama3_2": Family(
        "Llama",
        lora_llama3_2,
        settings=(("rope_parameters", {"rope_type": "default", "rope_theta": 500000.0}),),
        builder_settings=(("scale_factor", 1),),
        tied=True,
    ),
    "mistral": Family(
        "Mistral", lora_mistral, settings=(("sliding_window", None), ("head_dim", DIM // HEADS))
    ),
    "qwen2": Family(
        "Qwen2",
        lora_qwen2,
        qwen2_hf_to_tune,
        settings=(("rope_parameters", {"rope_type": "default", "rope_theta": 1000000.0}),),
        bias=True,
    ),
    "gemma": Family(
        "Gemma",
        lora_gemma,
        head_dim=16,
        settings=(("head_dim", 16),),
        builder_settings=(("head_dim", 16),),
        tied=True,
    ),
    "gemma2": Family(
        "Gemma2",
        lora_gemma2,
        gemma2_hf_to_tune,
        head_dim=16,
        settings=(
            ("head_dim", 16),
            ("final_logit_softcapping", 3.0),
            ("attn_logit_softcapping", 5.0),
            ("query_pre_attn_scalar", 16),
            ("sliding_window", 4),
        ),
        builder_settings=(
            ("head_dim", 16),
            ("final_capping_value", 3.0),
            ("hidden_capping_value", 5.0),
            ("query_pre_attn_scalar", 16),
            ("sliding_window_size", 4),
        ),
        tied=True,
    ),
    "phi3": Family("Phi3", lora_phi3, phi3_hf_to_tune, settings=(("sliding_window", None),)),
}
