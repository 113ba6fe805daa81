"""Transfers values of character ranges to the tokens that cover these characters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["values_of_tokens"]


def values_of_tokens(
    tokens: Sequence[tuple[int, int]],
    spans: Sequence[tuple[int, int]],
    values: Sequence[float],
    *,
    default: float,
) -> np.ndarray:
    """Scores of tokens from scores of character ranges.

    With o(t, s) the number of characters that token t and span s share, a token that shares any has

        value(t) = sum_s o(t, s) v_s / sum_s o(t, s)

    Characters without a span, such as the space in front of a word, therefore do not change the value. A token over two spans
    gets their mean, weighted by its characters in each. Characters in several spans count once for each of them. Tokens
    that are parts of one character have that character's range, and each gets its value.

    Args:
        tokens: half-open character range of each token, in the text that the spans refer to; may be empty.
        spans: half-open character ranges with ``start < end``, in any order.
        values: value of each span.
        default: value of a token that no span touches.

    Returns:
        float64 ``[number of tokens]``.
    """
    token_starts, token_ends = np.asarray(tokens, dtype=np.int64).reshape(-1, 2).T
    starts, ends = np.asarray(spans, dtype=np.int64).reshape(-1, 2).T
    overlap = np.minimum(token_ends[:, None], ends) - np.maximum(token_starts[:, None], starts)
    overlap = np.maximum(overlap, 0).astype(np.float64)
    covered = overlap.sum(axis=1, keepdims=True)
    shares = overlap / np.where(
        covered > 0, covered, 1
    )  # divided first, so that the value of a single span stays exact
    result = shares @ np.asarray(values, dtype=np.float64).reshape(-1)
    return np.where(covered[:, 0] > 0, result, default)
