"""Finds the end of the prompt in two texts with a common beginning."""

from __future__ import annotations

import unicodedata

import regex

__all__ = ["shared_prefix"]

# Unicode's default boundaries of words, and of characters that consist of several code points (UAX 29).
_WORDS = regex.compile(r"(?w)\b")
_CHARACTERS = regex.compile(r"\X")
_SPACES = " \t\n"
_WINDOW = 500  # characters that are looked at on either side; a run of flags takes its square in time
# Characters between the digits of a number, a date, a time or a version. Unicode's rules know only the point and the comma.
_BETWEEN_DIGITS = frozenset(".,:/'\u2019-_\u00a0\u2009\u202f\u066b\u066c")
_HYPHENS = frozenset("-\u2010\u2011")
_EXPONENT = regex.compile(r"\d[eE][+-]\d")
# Groups of digits with spaces between them, as in 1 000 000: before a place, and after it.
_THOUSANDS = regex.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})*+$")
_THREE_DIGITS = regex.compile(r" \d{3}(?!\d)")
_SMALL_KANA = frozenset("ぁぃぅぇぉっゃゅょゎゕゖ")
_BEFORE_DIGITS = frozenset("+-\u2212\u00b1$\u00a3\u20ac\u00a5#.")
_AFTER_DIGITS = frozenset("%\u2030\u00b0\u066a")


def shared_prefix(chosen: str, rejected: str) -> int:
    """The length of the prompt that two texts share.

    This is the longest common prefix, shortened until both texts have a Unicode boundary there. It never ends inside a word, a
    number, an emoji, a line break of two characters or a character with combining marks. White space at its end, except a
    newline, belongs to the answers, as in the vocabularies of most models. Scripts without spaces between words may be split
    between any two characters.
    """
    end = _common_length(chosen, rejected)
    # Words and characters do not extend over a space, so it is enough to look at the text after the last one.
    start = max(0, *(chosen.rfind(space, 0, end) for space in _SPACES))
    places = _boundaries(chosen, start, end) & _boundaries(rejected, start, end)
    while start < end and (end not in places or _inside(chosen, end) or _inside(rejected, end)):
        end -= 1
    end = _without_blanks(chosen, end)
    thousands = _THOUSANDS.search(chosen, max(end - _WINDOW, 0), end)
    if thousands and all(_THREE_DIGITS.match(text, end) for text in (chosen, rejected)):
        end = _without_blanks(chosen, thousands.start())
    return end


def _without_blanks(text: str, end: int) -> int:
    """The place before the white space that ends at this place."""
    while 0 < end and (_is_blank(text[end - 1]) or _marks_blank(text[max(end - 2, 0) : end])):
        end -= 1
    return end


def _common_length(first: str, second: str) -> int:
    low, high = 0, min(len(first), len(second))
    while low < high:  # bisection, because comparing slices is fast
        middle = (low + high + 1) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _boundaries(text: str, start: int, end: int) -> set[int]:
    """Places from ``start`` to ``end`` where a word and a character end."""
    first = max(start, end - _WINDOW)
    stops = [at for at in (text.find(space, end, end + _WINDOW) for space in _SPACES) if at >= 0]
    part = text[first : min(stops, default=end + _WINDOW) + 1]
    words = {first + found.start() for found in _WORDS.finditer(part)}
    characters = {first + found.end() for found in _CHARACTERS.finditer(part)}
    # If the window begins inside a text without spaces, the text before it is unknown.
    return words & characters | {start}


def _inside(text: str, end: int) -> bool:
    """Whether a place is inside a word or number that Unicode's rules would split there."""
    if end == len(text):
        return False
    before, after = text[end - 1], text[end]
    if unicodedata.category(after) in ("Lm", "Sk") and before.isalnum():
        return True  # a mark of length or repetition belongs to its letter
    if after in _SMALL_KANA:
        return True
    if _is_word(before) and _is_word(after):
        return True
    if before.isdecimal() and after in _AFTER_DIGITS:
        return True
    if after.isdecimal() and before in _BEFORE_DIGITS and (end < 2 or not _is_word(text[end - 2])):
        return True
    if _EXPONENT.match(text, max(end - 3, 0)) or _EXPONENT.match(text, max(end - 2, 0)):
        return True
    # On both sides of a character between two digits, or of the hyphen in a word.
    for at in (end - 1, end):
        if 0 < at < len(text) - 1:
            sides = (text[at - 1], text[at + 1])
            if text[at] in _BETWEEN_DIGITS and all(side.isdecimal() for side in sides):
                return True
            if text[at] in _HYPHENS and all(_is_word(side) for side in sides):
                return True
    return False


def _is_word(char: str) -> bool:
    """Letters and digits of scripts with spaces between words, including superscripts and fractions."""
    return (
        (char.isalnum() or char in "_'\u2019\u207a\u207b")
        and ord(char) < 0x2E80
        and not _without_spaces(char)
    )


def _is_blank(char: str) -> bool:
    return char == "\t" or unicodedata.category(char) == "Zs"


def _marks_blank(text: str) -> bool:
    """Whether a text ends with a space and a direction mark, which belongs to the text after it."""
    return len(text) > 1 and unicodedata.category(text[-1]) == "Cf" and _is_blank(text[-2])


def _without_spaces(char: str) -> bool:
    """Whether a letter belongs to a script below U+2E80 without spaces between words: Thai, Lao, Myanmar, Khmer."""
    return "\u0e00" <= char <= "\u0eff" or "\u1000" <= char <= "\u109f" or "\u1780" <= char <= "\u17ff"
