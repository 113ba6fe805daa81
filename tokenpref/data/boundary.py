"""Where the prompt ends in two texts that begin alike."""

from __future__ import annotations

import unicodedata

__all__ = ["shared_prefix"]


def shared_prefix(chosen: str, rejected: str) -> int:
    """Length of the prompt that two texts share.

    The longest common prefix, cut back so that it ends between words: never inside a word, a number or a character with
    combining marks; and white space other than a newline that stands at its end goes to the answers, as it does
    in the vocabularies of most models. Scripts written without spaces may be cut between any two characters.
    """
    end = 0
    while end < min(len(chosen), len(rejected)) and chosen[end] == rejected[end]:
        end += 1
    while 0 < end and _inside_word(chosen, end, rejected):
        end -= 1
    while 0 < end and chosen[end - 1] in " \t":
        end -= 1
    return end


def _inside_word(chosen: str, end: int, rejected: str) -> bool:
    following = [text[end] for text in (chosen, rejected) if end < len(text)]
    if (
        any(unicodedata.combining(char) or char in "\u200d\ufe0f" for char in following)
        or chosen[end - 1] == "\u200d"
    ):
        return True
    return _word_char(chosen[end - 1]) and any(_word_char(char) for char in following)


def _word_char(char: str) -> bool:
    return (char.isalnum() or char in "_'\u2019") and ord(char) < 0x2E80
