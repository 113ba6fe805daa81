"""A model small enough for tests: two layers, with weights and tokenizer in ``data/tiny/model``."""

from __future__ import annotations

from tokenpref._torchtune import TransformerDecoder, llama3_2

__all__ = ["TINY_SIZES", "tiny_llama"]

TINY_SIZES = {
    "vocab_size": 384,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "intermediate_dim": 64,
    "rope_base": 10000,
    "norm_eps": 1e-5,
}


def tiny_llama(num_layers: int = TINY_SIZES["num_layers"], max_seq_len: int = 256) -> TransformerDecoder:  # type: ignore[assignment]
    """A Llama of 31 k parameters with tied embeddings, for the ``tiny/*`` configs.

    Args:
        num_layers: number of layers; the weights in this package have 2.
        max_seq_len: tokens that the rotary cache covers.

    Raises:
        ValueError: for a number out of range.
    """
    for name, value, most in (("num_layers", num_layers, 1000), ("max_seq_len", max_seq_len, 2**20)):
        if not 1 <= value <= most:
            raise ValueError(f"{name} must be a whole number from 1 to {most}, got {value}")
    sizes = {**TINY_SIZES, "num_layers": num_layers}
    return llama3_2(**sizes, max_seq_len=max_seq_len, scale_factor=1, tie_word_embeddings=True)
