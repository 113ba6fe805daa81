"""Everything that we take from transformers, in one place.

It takes seconds to import, so modules that import this one are imported late.
"""

from __future__ import annotations

import transformers
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

VERSION: str = transformers.__version__

__all__ = [
    "VERSION",
    "AttentionInterface",
    "AutoConfig",
    "AutoModelForCausalLM",
    "DynamicCache",
    "LlamaMLP",
    "LlamaRMSNorm",
    "PreTrainedModel",
]
