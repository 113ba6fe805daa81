"""Policy and reference over decoders of torchtune and transformers, and the models that come with the package."""

from tokenpref.data.reference_store import ReferenceStore
from tokenpref.models.causal_lm import causal_lm
from tokenpref.models.causal_lm_checkpointer import CausalLMCheckpointer
from tokenpref.models.reference import CachedReference, FrozenReference, Reference, ReferenceOutput
from tokenpref.models.scoring import ScoringModel, logits_of
from tokenpref.models.smollm2 import lora_smollm2_135m, smollm2_135m
from tokenpref.models.tiny import lora_tiny_llama, tiny_llama

__all__ = [
    "CachedReference",
    "CausalLMCheckpointer",
    "FrozenReference",
    "Reference",
    "ReferenceOutput",
    "ReferenceStore",
    "ScoringModel",
    "causal_lm",
    "logits_of",
    "lora_smollm2_135m",
    "lora_tiny_llama",
    "smollm2_135m",
    "tiny_llama",
]
