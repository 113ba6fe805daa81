"""Everything that we take from torchtune 0.6.1, in one place.

torchtune is no longer developed: this list is what a move away from it would have to replace. No other module
of the package imports torchtune (a test reads the imports). Components named in configs by dotted path
(models, checkpointers, schedulers, loggers, the profiler) come on top; they are the user's choice.
"""

from __future__ import annotations

from torchtune.config._errors import InstantiationError
from torchtune.config._utils import _get_component_from_path as component_from_path
from torchtune.data import Message
from torchtune.models.convert_weights import tune_to_hf
from torchtune.models.gemma.gemma_norm_embedding import GemmaNormEmbeddings
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.models.gemma2._attention import Gemma2Attention
from torchtune.models.gemma2._component_builders import Gemma2FinalNorm
from torchtune.models.llama3_1._position_embeddings import Llama3ScaledRoPE
from torchtune.models.llama3_2 import llama3_2, lora_llama3_2
from torchtune.models.phi3._position_embeddings import Phi3RotaryPositionalEmbeddings
from torchtune.models.qwen2._positional_embeddings import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import (
    FeedForward,
    MultiHeadAttention,
    RMSNorm,
    RotaryPositionalEmbeddings,
    TiedLinear,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)
from torchtune.modules.common_utils import local_kv_cache
from torchtune.modules.low_precision import FrozenNF4Linear
from torchtune.modules.peft import DoRALinear, LoRALinear
from torchtune.training import (
    ModelType,
    OffloadActivations,
    get_lr,
    set_activation_checkpointing,
    set_default_dtype,
    validate_no_params_on_meta_device,
)

__all__ = [
    "DoRALinear",
    "FeedForward",
    "FrozenNF4Linear",
    "Gemma2Attention",
    "Gemma2FinalNorm",
    "GemmaNormEmbeddings",
    "GemmaRMSNorm",
    "InstantiationError",
    "Llama3ScaledRoPE",
    "LoRALinear",
    "Message",
    "ModelType",
    "MultiHeadAttention",
    "OffloadActivations",
    "Phi3RotaryPositionalEmbeddings",
    "Qwen2RotaryPositionalEmbeddings",
    "RMSNorm",
    "RotaryPositionalEmbeddings",
    "TiedLinear",
    "TransformerDecoder",
    "TransformerSelfAttentionLayer",
    "component_from_path",
    "get_lr",
    "llama3_2",
    "local_kv_cache",
    "lora_llama3_2",
    "set_activation_checkpointing",
    "set_default_dtype",
    "tune_to_hf",
    "validate_no_params_on_meta_device",
]
