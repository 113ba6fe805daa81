"""Everything that we take from transformers, in one place.

It takes seconds to import, so modules that import this one are imported late.
"""

from __future__ import annotations

import transformers
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

VERSION: str = transformers.__version__

__all__ = [
    "CONFIG_MAPPING",
    "VERSION",
    "AttentionInterface",
    "AttentionMaskInterface",
    "AutoConfig",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "DynamicCache",
    "LlamaMLP",
    "LlamaRMSNorm",
    "PreTrainedModel",
    "WeightConverter",
    "WeightRenaming",
    "dot_natural_key",
    "get_model_conversion_mapping",
    "rename_source_key",
    "revert_weight_conversion",
]
