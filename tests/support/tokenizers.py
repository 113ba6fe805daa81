"""Tokenizers that are trained in a moment."""

from __future__ import annotations

from pathlib import Path


def train_sentencepiece(folder: Path, lines: list[str], vocab_size: int) -> str:
    """A BPE model with byte fallback that changes no character; returns its file."""
    import sentencepiece

    (folder / "text.txt").write_text("".join(f"{line}\n" for line in lines) * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "model"),
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return str(folder / "model.model")
