"""From logits, or from hidden states and the LM head, to token statistics."""

from __future__ import annotations

from tokenpref.ops.answers import AnswerRows
from tokenpref.ops.linear import DEFAULT_MEMORY_MB, linear_token_stats, score_tokens
from tokenpref.ops.logits import token_stats_from_logits
from tokenpref.ops.room import HeadRoom

__all__ = [
    "DEFAULT_MEMORY_MB",
    "AnswerRows",
    "HeadRoom",
    "linear_token_stats",
    "score_tokens",
    "token_stats_from_logits",
]
