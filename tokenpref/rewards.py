"""Rewards of sampled text.

A reward is any callable ``(prompts: list[str], completions: list[str]) -> list[float]``. It returns one finite number for each
completion; a larger number is better. A config names it by its dotted path: a function, or a class whose instance is called
(the config's other keys are its arguments). It may be in the current directory: ``_component_: my_rewards.length``.
A reward that knows which words its number comes from can also offer ``valence`` (see :class:`ValenceReward`).
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

from tokenpref.errors import ConfigError

__all__ = ["KeywordReward", "Reward", "VaderReward", "Valence", "ValenceReward", "checked_rewards"]

Reward = Callable[[list[str], list[str]], list[float]]
"""Maps prompts and as many completions to one number for each completion."""

Valence = tuple[int, int, float]
"""The first character of a stretch of text, the character after its last, and the value of the stretch."""


@runtime_checkable
class ValenceReward(Protocol):
    """A reward that can say which characters of a text it counts, which gives a ground truth for token credit."""

    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        """One number for each completion."""
        ...

    def valence(self, text: str) -> list[Valence]:
        """The stretches of a completion that count, in order, each with its own value."""
        ...


def checked_rewards(reward: Reward, prompts: list[str], completions: list[str], name: str) -> list[float]:
    """The rewards of completions, one finite number for each.

    Args:
        reward: any reward.
        prompts: text before each completion.
        completions: texts to score.
        name: how the error names the reward, such as ``sampling.reward (my_rewards.length)``.

    Raises:
        ConfigError: if the reward returns anything else.
    """
    expected = f"{name}: expected {len(completions)} finite numbers"
    values = reward(prompts, completions)
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{expected}, got {values!r:.80}") from error
    bad = sum(not math.isfinite(number) for number in numbers)
    if len(numbers) != len(completions) or bad:
        raise ConfigError(f"{expected}, got {len(numbers)} ({bad} of them not finite)")
    return numbers


class VaderReward:
    """VADER's compound sentiment of a text, -1 to 1 (Hutto and Gilbert, 2014; package vaderSentiment, MIT).

    Args:
        scope: "completion" scores the sampled text alone, "text" scores the prompt together with it.

    Raises:
        ConfigError: if vaderSentiment is not installed.
        ValueError: for another scope.
    """

    def __init__(self, scope: str = "completion") -> None:
        if scope not in ("completion", "text"):
            raise ValueError(f"scope must be 'completion' or 'text', got {scope!r}")
        try:
            from vaderSentiment.vaderSentiment import BOOSTER_DICT, SentimentIntensityAnalyzer
        except ImportError as error:
            raise ConfigError('VaderReward needs vaderSentiment: pip install "tokenpref[smollm2]"') from error
        self.scope = scope
        self._analyzer = SentimentIntensityAnalyzer()
        self._boosters = frozenset(BOOSTER_DICT)

    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        """Compound score of each completion.

        Raises:
            ValueError: if the lists differ in length.
        """
        pairs = _paired(prompts, completions)
        texts = [
            completion if self.scope == "completion" else prompt + completion for prompt, completion in pairs
        ]
        return [self._analyzer.polarity_scores(text)["compound"] for text in texts]

    def valence(self, text: str) -> list[Valence]:
        """Character spans of the words that the lexicon knows, with their valence (-4 to 4).

        Words are split as in VADER: at white space, without the punctuation around them, and with whole emoticons. Negation,
        intensifiers, capitals and exclamation marks, which change a word's value in its sentence, are ignored.
        """
        lexicon = self._analyzer.lexicon
        found = (
            (start, end, lexicon.get(word.lower()))
            for start, end, word in _vader_words(text)
            if word.lower() not in self._boosters
        )
        return [(start, end, float(value)) for start, end, value in found if value is not None]


class KeywordReward:
    """The share of positive words minus the share of negative words; needs no further package.

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
        """(positive - negative) / words of each completion; 0 for a text without words.

        Raises:
            ValueError: if the lists differ in length.
        """
        return [self._score(completion) for _, completion in _paired(prompts, completions)]

    def valence(self, text: str) -> list[Valence]:
        """Character spans of the listed words, with +1 or -1."""
        words = ((m.start(), m.end(), m.group().lower()) for m in _WORD.finditer(text))
        return [
            (start, end, 1.0 if word in self.positive else -1.0)
            for start, end, word in words
            if word in self.positive or word in self.negative
        ]

    def _score(self, text: str) -> float:
        words = len(_WORD.findall(text))
        return sum(value for _, _, value in self.valence(text)) / words if words else 0.0


_WORD = re.compile(r"[\w']+")


def _paired(prompts: list[str], completions: list[str]) -> Iterator[tuple[str, str]]:
    if len(prompts) != len(completions):
        raise ValueError(
            f"each completion needs one prompt: got {len(prompts)} prompts and {len(completions)} completions"
        )
    return zip(prompts, completions, strict=True)


def _vader_words(text: str) -> Iterator[tuple[int, int, str]]:
    for match in re.finditer(r"\S+", text):
        whole = match.group()
        word = whole.strip(string.punctuation)
        if len(word) <= 2:  # VADER's rule, so that ":)" stays whole
            yield match.start(), match.end(), whole
        else:
            start = match.start() + whole.index(word)
            yield start, start + len(word), word
