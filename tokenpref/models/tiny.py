"""A model small enough for tests: two layers, with weights and tokenizer in ``data/tiny/model``."""

from __future__ import annotations

from collections.abc import Sequence

from tokenpref._torchtune import TransformerDecoder, llama3_2, lora_llama3_2

__all__ = ["TINY_SIZES", "lora_tiny_llama", "tiny_llama"]

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
    _check_sizes(num_layers, max_seq_len)
    sizes = {**TINY_SIZES, "num_layers": num_layers}
    return llama3_2(**sizes, max_seq_len=max_seq_len, scale_factor=1, tie_word_embeddings=True)


def lora_tiny_llama(
    lora_attn_modules: Sequence[str],
    apply_lora_to_mlp: bool = False,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
    num_layers: int = 2,
    max_seq_len: int = 256,
) -> TransformerDecoder:
    """The model of :func:`tiny_llama` with adapters.

    Args:
        lora_attn_modules: attention's linear layers that get an adapter: ``q_proj``, ``k_proj``, ``v_proj``, ``output_proj``.
        apply_lora_to_mlp: whether the three linear layers of every MLP get one too.
        lora_rank: the rank of an adapter.
        lora_alpha: an adapter's output is multiplied by ``lora_alpha / lora_rank``.
        lora_dropout: as in torchtune; the recipes switch dropout off.
        use_dora: DoRA instead of LoRA.
        quantize_base: must be false, because this model is too small for NF4.
        num_layers: number of layers; the weights in this package have 2.
        max_seq_len: tokens that the rotary cache covers.

    Raises:
        ValueError: for a number out of range, or with ``quantize_base``.
    """
    _check_sizes(num_layers, max_seq_len)
    if quantize_base:
        raise ValueError(
            "quantize_base: NF4 stores a weight in groups of 16,384 numbers, and the weights of this model are smaller; set "
            "quantize_base=false"
        )
    sizes = {**TINY_SIZES, "num_layers": num_layers}
    return lora_llama3_2(
        list(lora_attn_modules),
        apply_lora_to_mlp,
        **sizes,
        max_seq_len=max_seq_len,
        scale_factor=1,
        tie_word_embeddings=True,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        use_dora=use_dora,
    )


def _check_sizes(num_layers: int, max_seq_len: int) -> None:
    for name, value, most in (("num_layers", num_layers, 1000), ("max_seq_len", max_seq_len, 2**20)):
        if not 1 <= value <= most:
            raise ValueError(f"{name} must be a whole number from 1 to {most}, got {value}")
