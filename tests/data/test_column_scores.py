from __future__ import annotations

import re

import datasets
import numpy as np
import pytest

from tokenpref.data import ColumnScores, preference_dataset, tokenizer_json
from tokenpref.errors import DataError

NAN = float("nan")
# "hello| the| |yes" and "hello| |no": three and two answer tokens.
ROW = {"prompt": "hello", "chosen": " the yes", "rejected": " no"}
CHAT = {
    "prompt": [{"role": "user", "content": "hello"}],
    "chosen": [{"role": "assistant", "content": "yes the"}],
    "rejected": [{"role": "assistant", "content": "no"}],
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def load(tokenizer, write_jsonl):
    """Scores of rows, each with its weights: ``load([(chosen, rejected)], source, **dataset settings)``."""

    def read(weights, source, **settings):
        rows = [{**ROW, "chosen_weights": c, "rejected_weights": r} for c, r in weights]
        return source.load(preference_dataset(tokenizer, write_jsonl(rows), **settings))

    return read


def same(found, *expected):
    assert len(found) == len(expected)
    for pair, wanted in zip(found, expected, strict=True):
        for scores, numbers in zip(pair, wanted, strict=True):
            assert scores.dtype == np.float64
            np.testing.assert_array_equal(scores, numbers)


# --- per token ---------------------------------------------------------------------------------------------------


def test_per_token(load):
    found = load([([1, 2.5, 0], [3, 4]), ([1, 1, 1], [0.5, 0.25])], ColumnScores("weight", "token"))
    same(found, ([1, 2.5, 0], [3, 4]), ([1, 1, 1], [0.5, 0.25]))


def test_eos_has_the_score_it_is_given_or_none(load):
    source = ColumnScores("log_ratio", "token")
    found = load([([1, -2, 0], [3, 4, -5])], source, append_eos=True)
    same(found, ([1, -2, 0, NAN], [3, 4, -5]))


def test_release_rows_are_handed_on_as_they_are(load):
    found = load([([0.5, -2, 0], [3, -4])], ColumnScores("tis_release", "token"), append_eos=True)
    same(found, ([0.5, -2, 0, NAN], [3, -4, NAN]))


def test_release_rows_have_no_score_for_eos(load):
    with pytest.raises(
        DataError, match="has 4 scores and the answer 3 tokens before its EOS, which has no score"
    ):
        load([([1, 2, 3, 4], [1, 2])], ColumnScores("tis_release", "token"), append_eos=True)


@pytest.mark.parametrize("with_eos", [True, False])
@pytest.mark.parametrize(("limit", "kept"), [(3, 2), (4, 3)])
def test_a_cut_answer_uses_the_first_scores_of_the_whole(load, limit, kept, with_eos):
    # 1 prompt token; the chosen answer has 3 tokens and EOS: at 3 it loses " yes" and EOS, at 4 only its EOS. The rejected
    # one, 2 tokens and EOS, loses EOS at 3 and fits at 4.
    chosen, rejected = [1, 2, 3, 9][: 3 + with_eos], [4, 5, 8][: 2 + with_eos]
    found = load([(chosen, rejected)], ColumnScores("weight", "token"), append_eos=True, max_seq_len=limit)
    last = [] if limit == 3 else [8 if with_eos else NAN]
    same(found, ([1, 2, 3][:kept], [4, 5, *last]))


def test_a_list_for_the_cut_answer_alone_is_refused(load):
    message = (
        r"column 'chosen_weights': has 2 scores and the answer 3 tokens \(4 with EOS\).*whole one.*per: span"
    )
    with pytest.raises(DataError, match=message):
        load([([1, 2], [4, 5])], ColumnScores("weight", "token"), append_eos=True, max_seq_len=3)


@pytest.mark.parametrize(("append_eos", "lengths"), [(False, "3 tokens."), (True, "3 tokens (4 with EOS).")])
@pytest.mark.parametrize("found", [0, 2, 5])
def test_a_wrong_length_is_refused(load, append_eos, lengths, found):
    good = ([1, 2, 3], [1, 2])
    with pytest.raises(DataError) as error:
        load([good, ([1] * found, [1, 2])], ColumnScores("weight", "token"), append_eos=append_eos)
    message = str(error.value)
    assert (
        f"pairs.jsonl, row 1 (line 2), column 'chosen_weights': has {found} scores and the answer {lengths}"
        in message
    )
    assert "tokenizer, append_eos" in message and "per: span" in message


def test_without_eos_no_score_for_it_is_taken(load):
    with pytest.raises(DataError, match=r"has 4 scores and the answer 3 tokens\."):
        load([([1, 2, 3, 4], [1, 2])], ColumnScores("weight", "token"))


def test_whole_answers_are_tokenised_only_where_one_may_be_cut(tokenizer, write_jsonl, monkeypatch):
    rows = [{**ROW, "chosen_weights": [1, 2, 3], "rejected_weights": [4, 5]}]
    data = preference_dataset(tokenizer, write_jsonl(rows), append_eos=True)
    monkeypatch.setattr(data, "whole_answers", lambda index: pytest.fail("nothing was cut"))
    same(ColumnScores("weight", "token").load(data), ([1, 2, 3, NAN], [4, 5, NAN]))


# --- per span ----------------------------------------------------------------------------------------------------


def test_per_span(load):
    # " the" is 0..4, " " 4..5, "yes" 5..8. The first span covers "the", the second " y": "yes" has 1 of its characters there.
    found = load([([[1, 4, 2.2], [4, 6, 3.0]], [])], ColumnScores("log_ratio", "span"))
    same(found, ([2.2, 3.0, 3.0], [0, 0]))


def test_a_token_over_two_spans(load):
    # " the": 1 character of the first span and 2 of the second, (1 * 6 + 2 * 3) / 3 = 4; "yes": (2 * 1 + 1 * 4) / 3 = 2.
    found = load(
        [([[1, 2, 6], [2, 4, 3], [5, 7, 1], [7, 8, 4]], [[1, 3, -1.5]])], ColumnScores("log_ratio", "span")
    )
    same(found, ([4, 0, 2], [0, -1.5]))


@pytest.mark.parametrize(
    ("source", "untouched"),
    [
        (ColumnScores("weight", "span"), 1.0),
        (ColumnScores("log_ratio", "span"), 0.0),
        (ColumnScores("weight", "span", default=0.25), 0.25),
        (ColumnScores("log_ratio", "span", default=-2), -2.0),
    ],
)
def test_tokens_without_a_span(load, source, untouched):
    found = load([([[5, 8, 3]], [])], source, append_eos=True)
    same(found, ([untouched, untouched, 3, NAN], [untouched, untouched, NAN]))


def test_spans_of_a_cut_answer_that_reach_beyond_it(load):
    # "Ġthe Ġ" is left of the chosen answer; the span at 5..8 has no token, the one at 4..8 touches " " alone.
    found = load([([[1, 4, 2], [5, 8, 9], [4, 8, 5]], [])], ColumnScores("weight", "span"), max_seq_len=3)
    same(found, ([2, 5], [1, 1]))


def test_parts_of_a_character_share_its_span(write_jsonl):
    # " happy" 0..6, " " 6..7, four byte tokens of the emoji 7..8, " " 8..9, two byte tokens of "é" 9..10.
    row = {
        "prompt": "I am",
        "chosen": " happy 😀 é",
        "rejected": " sad",
        "good": [[1, 6, 2.0], [7, 8, 3.5]],
        "bad": [],
    }
    data = preference_dataset(
        tokenizer_json("package://data/tiny/model"), write_jsonl([row]), append_eos=True
    )
    found = ColumnScores("log_ratio", "span", chosen="good", rejected="bad").load(data)
    assert data[0].chosen_offsets[2:6] == [(7, 8)] * 4
    same(found, ([2, 0, 3.5, 3.5, 3.5, 3.5, 0, 0, 0, NAN], [0, 0, NAN]))


def test_a_token_that_begins_in_the_prompt_counts_with_its_own_part(tokenizer, write_jsonl):
    # "hel" + "lo yes" is "hello| |yes": of the first token the answer's text has "lo", its characters 0..2.
    row = {
        "prompt": "yes hel",
        "chosen": "lo yes",
        "rejected": " no",
        "chosen_weights": [[0, 1, 4]],
        "rejected_weights": [],
    }
    found = ColumnScores("weight", "span").load(preference_dataset(tokenizer, write_jsonl([row])))
    same(found, ([4, 1, 1], [1, 1]))


def test_the_sentiment_data_has_spans():
    data = preference_dataset(
        tokenizer_json("package://data/tiny/model"), "package://data/sentiment/eval.jsonl", max_rows=20
    )
    found = ColumnScores("log_ratio", "span", "chosen_valence", "rejected_valence").load(data)
    for index, scores in enumerate(found):
        for side, values in zip(("chosen", "rejected"), scores, strict=True):
            words = data.raw(index)[f"{side}_valence"]
            # Nothing is lost: every word's value is some token's.
            assert {v for _, _, v in words} <= set(values.tolist())


@pytest.mark.parametrize("span", [[-1, 2, 1], [0, 9, 1], [8, 9, 1], [3, 3, 1], [4, 2, 1]])
def test_a_span_outside_the_text_is_refused(load, span):
    message = f"row 1 (line 2), column 'chosen_weights': span 1 is [{span[0]}, {span[1]}), and must have 0 <= start < end <= 8"
    with pytest.raises(DataError, match=re.escape(message)):
        load([([], [[0, 3, 1]]), ([[0, 8, 1], span], [])], ColumnScores("weight", "span"))


def test_a_span_beyond_the_text_of_a_cut_answer_is_refused(load):
    with pytest.raises(DataError, match=r"span 0 is \[5, 9\)"):
        load([([[5, 9, 2]], [])], ColumnScores("weight", "span"), max_seq_len=3)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([[0, 3]], r"span 0 must be \[start, end, value\], found \[0, 3\]"),
        ([1.0, 2.0], r"span 0 must be \[start, end, value\], found 1\.0"),
        ([[0.5, 3, 1]], r"start and end of span 0 must be whole numbers, found \[0\.5, 3\.0, 1\.0\]"),
        ([[0, None, 1]], "start and end of span 0 must be whole numbers"),
        ([[0, 3, None]], "the value of span 0 must be a number, found None"),
        ([[0, 3, -0.5]], r"the value of span 0 is -0\.5, and weights must not be negative.*kind: log_ratio"),
        (
            2.0,
            r"must be a list of \[start, end, value\] with per: span, found 2\.0; one number an answer is per: pair",
        ),
    ],
)
def test_malformed_spans(load, spans, message):
    with pytest.raises(DataError, match=message):
        load([(spans, spans)], ColumnScores("weight", "span"))


# --- per span, conversations -------------------------------------------------------------------------------------


def test_spans_in_a_conversation_count_in_the_message(chat_tokenizer, write_jsonl):
    # "yes| the|<|im_end|>"
    row = {**CHAT, "chosen_weights": [[4, 7, 3]], "rejected_weights": [[0, 2, 2]]}
    found = ColumnScores("weight", "span").load(preference_dataset(chat_tokenizer, write_jsonl([row])))
    same(found, ([1, 3, NAN], [2, NAN]))


@pytest.fixture
def stripping_tokenizer(make_tokenizer_folder):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content | trim }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    return tokenizer_json(make_tokenizer_folder(config={"eos_token": "<|im_end|>"}), chat_template=template)


def test_white_space_stripped_at_the_end_has_no_token(stripping_tokenizer, write_jsonl):
    row = {**CHAT, "chosen": [{"role": "assistant", "content": "yes the \n"}]}
    row |= {"chosen_weights": [[0, 3, 2], [7, 9, 5]], "rejected_weights": []}
    data = preference_dataset(stripping_tokenizer, write_jsonl([row]))
    assert data.text(0).chosen == "yes the" and data.whole_answers(0)[0].written == "yes the \n"
    # "yes| the|<|im_end|>" and "no|<|im_end|>": places 7 and 8 of the message have no token.
    same(ColumnScores("weight", "span").load(data), ([2, 1, NAN], [1, NAN]))


def test_white_space_stripped_at_the_beginning_is_refused(stripping_tokenizer, write_jsonl):
    row = {**CHAT, "chosen": [{"role": "assistant", "content": "\nyes the"}]}
    row |= {"chosen_weights": [[1, 4, 2]], "rejected_weights": []}
    data = preference_dataset(stripping_tokenizer, write_jsonl([row]))
    message = r"counts characters of '\\nyes the', but the chat template makes 'yes the' of it; store the message as"
    with pytest.raises(DataError, match=message):
        ColumnScores("weight", "span").load(data)


def test_torchtune_conversations(tiktoken_file, write_jsonl):
    from torchtune.models.llama3 import llama3_tokenizer

    # Llama 3 strips " no": its tokens are "n", "o" and the end of the turn, the message's characters 1 and 2.
    row = {**CHAT, "rejected": [{"role": "assistant", "content": " no"}]}
    row |= {"chosen_weights": [], "rejected_weights": [[2, 3, 4]]}
    data = preference_dataset(llama3_tokenizer(tiktoken_file), write_jsonl([row]))
    chosen, rejected = ColumnScores("weight", "span").load(data)[0]
    np.testing.assert_array_equal(rejected, [1, 4, NAN])
    assert (chosen[:-1] == 1).all() and np.isnan(chosen[-1])


# --- per pair ----------------------------------------------------------------------------------------------------


def test_per_pair_every_token_has_the_number(load):
    found = load([(2, 0.5), (0, 1)], ColumnScores("weight", "pair"), append_eos=True)
    same(found, ([2] * 4, [0.5] * 3), ([0] * 4, [1] * 3))


def test_one_column_for_both_sides(tokenizer, write_jsonl):
    data = preference_dataset(tokenizer, write_jsonl([{**ROW, "trust": -0.5}]))
    found = ColumnScores("log_ratio", "pair", chosen="trust", rejected="trust").load(data)
    same(found, ([-0.5] * 3, [-0.5] * 2))


def test_per_pair_takes_no_list(load):
    with pytest.raises(DataError, match=r"'chosen_weights': the value must be a number, found \[1\]"):
        load([([1], [2])], ColumnScores("weight", "pair"))


# --- all kinds ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "weights"),
    [
        (ColumnScores("tis_release", "token"), ([1, -2, 3], [4, 5])),
        (ColumnScores("log_ratio", "span"), ([[1, 4, -2]], [[1, 3, 7]])),
        (ColumnScores("log_ratio", "pair"), (-1, 2)),
    ],
)
def test_each_answer_keeps_its_scores_under_swap(load, source, weights):
    plain, swapped = (load([weights], source, append_eos=True, swap=swap)[0] for swap in (False, True))
    same([swapped], plain[::-1])


def test_scores_follow_rows_that_are_left_out(tokenizer, write_jsonl):
    rows = [{**ROW, "chosen_weights": w, "rejected_weights": w} for w in (1, 2, 3)]
    rows[1]["rejected"] = rows[1]["chosen"]
    data = preference_dataset(tokenizer, write_jsonl(rows), on_fault="drop")
    same(ColumnScores("weight", "pair").load(data), ([1] * 3, [1] * 2), ([3] * 3, [3] * 2))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, None, 2], "the score of token 1 must be a number, found None"),
        ([True, False, True], "the score of token 0 must be a number, found True"),
        (["1", "2", "3"], "the score of token 0 must be a number, found '1'"),
        ([1, 2, -0.5], r"the score of token 2 is -0\.5, and weights must not be negative.*kind: log_ratio"),
        (None, "'chosen_weights': has no value; fill it in"),
        ("1 2 3", "must be a list of numbers with per: token, found '1 2 3'"),
        (1.5, r"must be a list of numbers with per: token, found 1\.5; one number an answer is per: pair"),
    ],
)
def test_values_that_are_no_weights(load, weights, message):
    with pytest.raises(DataError, match=message):
        load([(weights, [1, 2])], ColumnScores("weight", "token"))


@pytest.mark.parametrize("kind", ["weight", "log_ratio", "tis_release"])
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), NAN])
def test_scores_must_be_finite(tokenizer, tmp_path, kind, bad):
    # JSON has no such numbers; Parquet does.
    rows = [{**ROW, "chosen_weights": [1.0, 2.0, 3.0], "rejected_weights": [1.0, bad]}]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "pairs.parquet"))
    data = preference_dataset(tokenizer, str(tmp_path / "pairs.parquet"))
    with pytest.raises(
        DataError,
        match=re.escape(f"'rejected_weights': the score of token 1 is {bad}; scores must be finite"),
    ):
        ColumnScores(kind, "token").load(data)


@pytest.mark.parametrize(("side", "column"), [("chosen", "chosen_weigths"), ("rejected", "none")])
def test_a_missing_column(tokenizer, write_jsonl, side, column):
    data = preference_dataset(tokenizer, write_jsonl([{**ROW, "chosen_weights": 1, "rejected_weights": 1}]))
    with pytest.raises(DataError) as error:
        ColumnScores("weight", "pair", **{side: column}).load(data)
    message = str(error.value)
    assert f"has no column '{column}' with the scores of the {side} answers" in message
    assert (
        "prompt, chosen, rejected, chosen_weights, rejected_weights" in message
        and f"token_weights.{side}" in message
    )
    assert ("did you mean 'chosen_weights'?" in message) is (column == "chosen_weigths")


def test_rows_alike_are_counted(load):
    good, short, negative = ([1, 2, 3], [1, 2]), ([1, 2, 3], [1]), ([1, -2, 3], [1, 2])
    with pytest.raises(DataError) as error:
        load([good, short, negative, short, short], ColumnScores("weight", "token"))
    message = str(error.value)
    assert "row 1 (line 2), column 'rejected_weights': has 1 scores and the answer 2 tokens" in message
    assert message.endswith("[wrong length: 3 rows in all: 1, 3, 4] [other faults: 1 negative weight]")


def test_many_rows_alike_are_not_all_listed(load):
    with pytest.raises(DataError, match=r"\[no scores: 7 rows in all: 0, 1, 2, 3, 4, \.\.\.\]$"):
        load([(None, 1)] * 7 + [(1, 1)], ColumnScores("weight", "pair"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "weights"}, "kind must be one of 'weight', .*got 'weights'; did you mean 'weight'"),
        ({"per": "tokens"}, "per must be one of 'token', .*got 'tokens'; did you mean 'token'"),
        ({"kind": "tis_release", "per": "span"}, "tis_release has one number a token, got per: span"),
        ({"kind": "tis_release", "per": "pair"}, "tis_release has one number a token, got per: pair"),
        ({"default": 1.0}, r"default: 1\.0 is .* but per is token; set default: null or per: span"),
        ({"per": "pair", "default": 0}, "but per is pair"),
        ({"per": "span", "default": -0.5}, r"default must be a finite number >= 0\.0, got -0\.5"),
        ({"per": "span", "kind": "log_ratio", "default": NAN}, "default must be a finite number, got nan"),
        ({"chosen": ""}, "chosen must be the name of a column, got ''"),
        ({"rejected": None}, "rejected must be the name of a column, got None"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        ColumnScores(**{"kind": "weight", "per": "token", **arguments})


# --- whole answers -----------------------------------------------------------------------------------------------


def test_whole_answers(tokenizer, write_jsonl):
    data = preference_dataset(
        tokenizer, write_jsonl([{**ROW, "chosen_complete": True}]), max_seq_len=3, swap=True
    )
    rejected, chosen = data.whole_answers(0)
    assert (chosen.num_tokens, chosen.has_eos, chosen.text, chosen.written) == (
        4,
        True,
        " the yes",
        " the yes",
    )
    assert (rejected.num_tokens, rejected.has_eos, rejected.text) == (2, False, " no")
    assert len(data[0].rejected_offsets) == 2 and not data[0].rejected_has_eos
