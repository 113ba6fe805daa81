"""Preference pairs: sources, formats, tokenisation with character spans, collation and order."""

from __future__ import annotations

from tokenpref.data.adapting import adapt_tokenizer
from tokenpref.data.chat import ChatTemplate, TemplateError, normalize_messages
from tokenpref.data.collate import (
    IGNORE_INDEX,
    AnchorBatch,
    Answer,
    PairBatch,
    collate_anchors,
    collate_pairs,
    padded,
)
from tokenpref.data.column_anchors import ColumnAnchors
from tokenpref.data.column_scores import SCORED_UNITS, ColumnScores
from tokenpref.data.dataset import (
    DataReport,
    PairExample,
    PairText,
    PreferenceDataset,
    WholeAnswer,
    preference_dataset,
)
from tokenpref.data.mixture import PairMixture
from tokenpref.data.order import (
    epoch_order,
    micro_batches_by_tokens,
    step_micro_batches,
    step_pairs,
    steps_per_epoch,
)
from tokenpref.data.sources import Rows, load_rows
from tokenpref.data.stored_scores import PairScores, ScoreSource, StoredScores, provenance
from tokenpref.data.tokenization import EncodedAnswer, encode_chat_answer, encode_prompt, encode_text_answer
from tokenpref.data.tokenizers import JsonTokenizer, Tokenizer, tokenizer_json
from tokenpref.data.weight_store import StoredRow, StoreWriter, WeightStore

__all__ = [
    "IGNORE_INDEX",
    "SCORED_UNITS",
    "AnchorBatch",
    "Answer",
    "ChatTemplate",
    "ColumnAnchors",
    "ColumnScores",
    "DataReport",
    "EncodedAnswer",
    "JsonTokenizer",
    "PairBatch",
    "PairExample",
    "PairMixture",
    "PairScores",
    "PairText",
    "PreferenceDataset",
    "Rows",
    "ScoreSource",
    "StoreWriter",
    "StoredRow",
    "StoredScores",
    "TemplateError",
    "Tokenizer",
    "WeightStore",
    "WholeAnswer",
    "adapt_tokenizer",
    "collate_anchors",
    "collate_pairs",
    "encode_chat_answer",
    "encode_prompt",
    "encode_text_answer",
    "epoch_order",
    "load_rows",
    "micro_batches_by_tokens",
    "normalize_messages",
    "padded",
    "preference_dataset",
    "provenance",
    "step_micro_batches",
    "step_pairs",
    "steps_per_epoch",
    "tokenizer_json",
]
