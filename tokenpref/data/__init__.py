"""Preference pairs: sources, formats, tokenisation with character spans, collation and order."""

from __future__ import annotations

from tokenpref.data.chat import ChatTemplate, TemplateError, normalize_messages
from tokenpref.data.collate import IGNORE_INDEX, PairBatch, collate_pairs
from tokenpref.data.dataset import DataReport, PairExample, PairText, PreferenceDataset, preference_dataset
from tokenpref.data.order import epoch_order, step_micro_batches, steps_per_epoch
from tokenpref.data.sources import Rows, load_rows
from tokenpref.data.tokenization import EncodedAnswer, encode_chat_answer, encode_prompt, encode_text_answer
from tokenpref.data.tokenizers import JsonTokenizer, Tokenizer, adapt_tokenizer, tokenizer_json

__all__ = [
    "IGNORE_INDEX",
    "ChatTemplate",
    "DataReport",
    "EncodedAnswer",
    "JsonTokenizer",
    "PairBatch",
    "PairExample",
    "PairText",
    "PreferenceDataset",
    "Rows",
    "TemplateError",
    "Tokenizer",
    "adapt_tokenizer",
    "collate_pairs",
    "encode_chat_answer",
    "encode_prompt",
    "encode_text_answer",
    "epoch_order",
    "load_rows",
    "normalize_messages",
    "preference_dataset",
    "step_micro_batches",
    "steps_per_epoch",
    "tokenizer_json",
]
