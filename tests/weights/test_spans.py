from __future__ import annotations

import numpy as np
import pytest

from tokenpref.weights import values_of_tokens


def test_space_in_front_of_a_word_dilutes_nothing():
    # " the" with a span on "the" only: (3 * 2.2) / 3.
    assert values_of_tokens([(0, 4), (4, 8)], [(1, 4)], [2.2], default=-1.0).tolist() == [2.2, -1.0]


def test_a_token_over_two_spans_has_their_mean_by_characters():
    # Token 2..8 shares 1 character with the first span and 3 with the second: (1 * 4 + 3 * 8) / 4 = 7.
    found = values_of_tokens([(0, 2), (2, 8), (8, 9)], [(0, 3), (5, 9)], [4.0, 8.0], default=0.0)
    assert found.tolist() == [4.0, 7.0, 8.0]
    other_order = values_of_tokens([(0, 2), (2, 8), (8, 9)], [(5, 9), (0, 3)], [8.0, 4.0], default=0.0)
    assert found.tolist() == other_order.tolist()


def test_characters_in_several_spans_count_for_each():
    # Characters 0..2 in the first span, 0..4 in the second: (2 * 6 + 4 * 3) / 6 = 4.
    assert values_of_tokens([(0, 4)], [(0, 2), (0, 4)], [6.0, 3.0], default=0.0).tolist() == [4.0]


def test_parts_of_one_character_each_have_its_value():
    tokens = [(0, 1), (1, 2), (1, 2), (1, 2), (1, 2)]
    assert values_of_tokens(tokens, [(1, 2)], [-3.1], default=0.5).tolist() == [0.5, -3.1, -3.1, -3.1, -3.1]


def test_a_token_without_characters_has_the_default():
    # A special token inside a span shares no character with it; spans that only touch its place do not either.
    assert values_of_tokens([(2, 2), (0, 2)], [(0, 4)], [5.0], default=1.0).tolist() == [1.0, 5.0]
    assert values_of_tokens([(2, 4)], [(0, 2), (4, 6)], [5.0, 5.0], default=1.0).tolist() == [1.0]


@pytest.mark.parametrize(
    ("tokens", "spans", "values", "expected"),
    [([], [(0, 1)], [2.0], []), ([(0, 1)], [], [], [7.0]), ([], [], [], [])],
)
def test_nothing_to_carry_over(tokens, spans, values, expected):
    found = values_of_tokens(tokens, spans, values, default=7.0)
    assert found.tolist() == expected and found.dtype == np.float64


def test_splitting_a_span_changes_nothing():
    rng = np.random.default_rng(0)
    ends = np.cumsum(rng.integers(1, 6, size=12)).tolist()
    tokens = list(zip([0, *ends[:-1]], ends, strict=True))
    whole = values_of_tokens(tokens, [(3, 20), (22, 30)], [1.5, -2.0], default=0.0)
    split = values_of_tokens(tokens, [(3, 9), (9, 20), (22, 30)], [1.5, 1.5, -2.0], default=0.0)
    np.testing.assert_allclose(whole, split, rtol=0, atol=1e-15)
