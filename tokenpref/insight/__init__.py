"""Looking at what was computed: single rows of a weight store, token by token."""

from __future__ import annotations

from tokenpref.insight.token_view import Piece, group_tokens, html_page, row_limit, shade, terminal_text

__all__ = ["Piece", "group_tokens", "html_page", "row_limit", "shade", "terminal_text"]
