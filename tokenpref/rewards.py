"""Rewards of sampled text.

A reward is any callable ``(prompts: list[str], completions: list[str]) -> list[float]``; in a config it is named by
dotted path, as a function, or as a class whose instance is called.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from tokenpref.errors import ConfigError

__all__ = ["KeywordReward", "Reward", "VaderReward"]

Reward = Callable[[list[str], list[str]], list[float]]


class VaderReward:
    """VADER's compound sentiment of a text, -1 to 1 (Hutto and Gilbert, 2014; package vaderSentiment, MIT).

    Args:
        scope: "completion" scores the sampled text alone, "text" the prompt with it.

    Raises:
        ConfigError: if vaderSentiment is not installed.
        ValueError: for another scope.
    """

    def __init__(self, scope: str = "completion") -> None:
        if scope not in ("completion", "text"):
            raise ValueError(f"scope must be 'completion' or 'text', got {scope!r}")
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError as error:
            raise ConfigError('VaderReward needs vaderSentiment: pip install "tokenpref[smollm2]"') from error
        self.scope = scope
        self._analyzer = SentimentIntensityAnalyzer()

    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        """Compound score of each completion."""
        texts = (
            completions
            if self.scope == "completion"
            else [p + c for p, c in zip(prompts, completions, strict=True)]
        )
        return [self._analyzer.polarity_scores(text)["compound"] for text in texts]

    def valence(self, text: str) -> list[tuple[int, int, float]]:
        """Character spans of the words that the lexicon knows, with their valence (-4 to 4)."""
        lexicon = self._analyzer.lexicon
        found = ((m.start(), m.end(), lexicon.get(m.group().lower())) for m in re.finditer(r"[\w']+", text))
        return [(start, end, value) for start, end, value in found if value is not None]


class KeywordReward:
    """Share of positive minus share of negative words; needs nothing installed.

    Args:
        positive: words that count +1, compared without case.
        negative: words that count -1.

    Raises:
        ValueError: if both lists are empty or share a word.
    """

    def __init__(self, positive: Sequence[str], negative: Sequence[str]) -> None:
        self.positive = {word.lower() for word in positive}
        self.negative = {word.lower() for word in negative}
        if not self.positive | self.negative:
            raise ValueError("positive and negative are both empty; name at least one word")
        if both := self.positive & self.negative:
            raise ValueError(f"{sorted(both)[0]!r} is listed as positive and as negative")

    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        """(positive - negative) / words of each completion; 0 for a text without words."""
        return [self._score(text) for text in completions]

    def _score(self, text: str) -> float:
        words = re.findall(r"[\w']+", text.lower())
        good, bad = sum(w in self.positive for w in words), sum(w in self.negative for w in words)
        return (good - bad) / len(words) if words else 0.0
