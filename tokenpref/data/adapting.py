"""Any tokenizer as this package's Tokenizer."""

from __future__ import annotations

from tokenpref.data.tokenizers import Tokenizer

__all__ = ["adapt_tokenizer"]


def adapt_tokenizer(tokenizer: object) -> Tokenizer:
    """The tokenizer of this package for what a config's ``tokenizer:`` built.

    Args:
        tokenizer: one of this package's, or torchtune's (tiktoken: Llama 3; SentencePiece: Llama 2, Mistral, Gemma,
            Phi 3; byte-level BPE: Qwen 2 and 2.5, Phi 4; HuggingFaceBaseTokenizer), or your own class with
            the methods of :class:`Tokenizer`, which is returned as it is.

    Raises:
        ConfigError: if it is none of these.
    """
    if isinstance(tokenizer, Tokenizer):
        return tokenizer
    # Imported here because it imports torchtune, which a data set with a tokenizer.json does not need.
    from tokenpref.data.torchtune_tokenizers import adapt_torchtune

    return adapt_torchtune(tokenizer)
