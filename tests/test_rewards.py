import json
import sys
from pathlib import Path

import pytest
import torch

from tokenpref.errors import ConfigError
from tokenpref.rewards import KeywordReward, VaderReward, ValenceReward, checked_rewards

SENTIMENT = Path(__file__).parents[1] / "data" / "sentiment"


@pytest.fixture(scope="module")
def vader():
    pytest.importorskip("vaderSentiment")
    return VaderReward()


def rows(name):
    return [
        json.loads(line) for line in (SENTIMENT / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def test_keywords_by_hand():
    reward = KeywordReward(positive=["good", "Fine"], negative=["bad"])
    texts = [
        " Good and fine.",  # 2 of 3 words
        "bad, GOOD, bad soup",  # (1 - 2) of 4 words
        "nothing here",
        "goodness",  # another word
        " ... ",  # no word
        "",
    ]
    assert reward(["good"] * 6, texts) == [2 / 3, -1 / 4, 0.0, 0.0, 0.0, 0.0]


def test_keyword_valence_marks_the_words():
    reward = KeywordReward(positive=["good"], negative=["bad"])
    assert reward.valence("A good, bad one") == [(2, 6, 1.0), (8, 11, -1.0)]
    assert reward.valence("none") == []


def test_keywords_that_say_nothing_are_refused():
    with pytest.raises(ValueError, match="positive and negative are both empty"):
        KeywordReward(positive=[], negative=[])
    with pytest.raises(ValueError, match="'good' is listed as positive and as negative"):
        KeywordReward(positive=["good"], negative=["GOOD", "bad"])


def test_one_text_for_each_prompt(vader):
    for reward in (KeywordReward(["good"], []), vader):
        with pytest.raises(ValueError, match="got 2 prompts and 1 completions"):
            reward(["a", "b"], ["good"])


def test_checked_rewards_are_plain_finite_numbers():
    prompts, texts = ["a", "b"], ["good", "bad"]
    assert checked_rewards(KeywordReward(["good"], ["bad"]), prompts, texts, "r") == [1.0, -1.0]
    assert checked_rewards(lambda p, t: torch.tensor([1, 2]), prompts, texts, "r") == [1.0, 2.0]
    for found, text in (
        ([1.0], r"got 1 \(0 of them not finite\)"),
        ([1.0, float("inf")], r"got 2 \(1 of them not finite\)"),
        (None, "got None"),
        (["x", 1.0], r"got \['x', 1.0\]"),
    ):
        with pytest.raises(ConfigError, match=rf"^r: expected 2 finite numbers, {text}"):
            checked_rewards(lambda p, t, found=found: found, prompts, texts, "r")


def test_rewards_with_valence_are_known_as_such(vader):
    assert isinstance(vader, ValenceReward) and isinstance(KeywordReward(["a"], []), ValenceReward)
    assert not isinstance(lambda prompts, completions: [], ValenceReward)


def test_vader_scores_the_completion_or_the_whole_text(vader):
    # VADER: s / sqrt(s^2 + 15), rounded to four digits. good has valence 1.9, bad -2.5.
    assert vader(["A bad start,"], [" good"]) == [round(1.9 / (1.9**2 + 15) ** 0.5, 4)]
    assert vader(["x"], [" bad"]) == [round(-2.5 / (2.5**2 + 15) ** 0.5, 4)]
    both = VaderReward(scope="text")
    assert both(["bad"], [" bad"]) == [round(-5.0 / (5.0**2 + 15) ** 0.5, 4)]
    assert vader(["x"], [""]) == [0.0]
    with pytest.raises(ValueError, match="scope must be 'completion' or 'text', got 'prompt'"):
        VaderReward(scope="prompt")


def test_vader_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ConfigError, match=r'pip install "tokenpref\[smollm2\]"'):
        VaderReward()


@pytest.mark.parametrize(("name", "count"), [("train", 602), ("eval", 122)])
def test_the_sentiment_data_hold_what_the_scorer_says(vader, name, count):
    data = rows(name)
    assert len(data) == count
    for side in ("chosen", "rejected"):
        scores = vader([row["prompt"] for row in data], [row[side] for row in data])
        assert scores == [row[f"{side}_reward"] for row in data]
    assert all(row["chosen_reward"] - row["rejected_reward"] >= 0.3 for row in data)


def test_valence_holds_the_words_that_the_score_comes_from(vader):
    text = 'A GOOD non-hero, (bad)! "Great" very fine:) :) goodness-me'
    spans = [(text[start:end], value) for start, end, value in vader.valence(text)]
    # Hyphens join, outer punctuation does not; "very" is a booster; "fine:)" loses its smile, the lone one counts.
    assert spans == [("GOOD", 1.9), ("bad", -2.5), ("Great", 3.1), ("fine", 0.8), (":)", 2.0)]


def test_valence_is_what_plain_sentences_add_up_to(vader):
    """Without negation, boosters, capitals, "but", "no" or marks, VADER's compound is s / sqrt(s^2 + 15) of the sum."""
    for text in (
        "a good sad happy-go story",
        "horror and love; the ending is great.",
        "they won a war and lost hope",
    ):
        total = sum(value for _, _, value in vader.valence(text))
        assert vader([""], [text]) == [round(total / (total**2 + 15) ** 0.5, 4)]


def test_shipped_valence_agrees_on_nearly_all_answers(vader):
    """The data were marked by a slightly different word rule (words end at a slash, a curly apostrophe, ...)."""
    answers = [(row[side], row[f"{side}_valence"]) for row in rows("eval") for side in ("chosen", "rejected")]
    same = sum([list(span) for span in vader.valence(text)] == spans for text, spans in answers)
    assert len(answers) == 244 and same >= 238


def test_openings_for_judging_are_in_no_data():
    openings = (SENTIMENT / "openings.txt").read_text(encoding="utf-8").splitlines()
    assert len(openings) == len(set(openings)) == 24
    prompts = {name: {row["prompt"] for row in rows(name)} for name in ("train", "eval")}
    assert prompts["train"].isdisjoint(prompts["eval"])
    assert (prompts["train"] | prompts["eval"]).isdisjoint(openings)
