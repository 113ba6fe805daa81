import math

import pytest

from tokenpref._checks import check_choice, check_known, check_number, check_ordered


def test_choice_suggests_the_nearest():
    assert check_choice("variant", "tdpo1", ("tdpo1", "tdpo2")) == "tdpo1"
    with pytest.raises(
        ValueError,
        match=r"variant must be one of 'chosen', 'rejected', got 'choosen'; did you mean 'chosen'\?",
    ):
        check_choice("variant", "choosen", ("chosen", "rejected"))


def test_known_names_the_unknown_one():
    assert check_known("needs", ["a", "b"], {"a", "b", "c"}) == {"a", "b"}
    with pytest.raises(
        ValueError, match=r"needs has an unknown name 'reff' \(known: 'kl', 'ref'\); did you mean 'ref'"
    ):
        check_known("needs", {"reff", "kl"}, {"ref", "kl"})
    with pytest.raises(ValueError, match="needs must be a set of names, got the string 'ref'"):
        check_known("needs", "ref", {"ref"})


@pytest.mark.parametrize("value", [math.nan, math.inf, True, "0.1", None, 0, 1])
def test_number_refuses_what_is_no_number_or_out_of_bounds(value):
    with pytest.raises(ValueError, match=r"beta must be a finite number > 0 and < 1, got "):
        check_number("beta", value, above=0, below=1)


def test_number_bounds():
    assert check_number("x", 1) == 1.0
    assert check_number("x", 0, at_least=0, at_most=0) == 0.0
    with pytest.raises(ValueError, match="x must be a finite number <= 5, got 6"):
        check_number("x", 6, at_most=5)
    with pytest.raises(ValueError, match="x must be a finite number, got nan"):
        check_number("x", math.nan)


def test_order():
    check_ordered("low", 1, "high", 2)
    check_ordered("low", 1, "high", 1, strict=False)
    with pytest.raises(ValueError, match="low < high must hold, got low=1, high=1"):
        check_ordered("low", 1, "high", 1)
    with pytest.raises(ValueError, match="low <= high must hold, got low=2, high=1"):
        check_ordered("low", 2, "high", 1, strict=False)
