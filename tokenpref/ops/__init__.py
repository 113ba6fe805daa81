"""Token statistics from logits, or from hidden states and the LM head."""

from __future__ import annotations

from tokenpref.ops.answers import AnswerRows
from tokenpref.ops.final_logits import final_logits
from tokenpref.ops.linear import linear_token_stats, score_tokens
from tokenpref.ops.logits import token_stats_from_logits

__all__ = [
    "AnswerRows",
    "final_logits",
    "linear_token_stats",
    "score_tokens",
    "token_stats_from_logits",
]
