"""Where the prompt of two texts ends: between words, numbers and characters as Unicode has them."""

from __future__ import annotations

import unicodedata

import pytest

from tokenpref.data.boundary import shared_prefix

CASES = {
    "a Tamil vowel sign": ("பதில்: கீதம்", "பதில்: காதல்", "பதில்:"),
    "a Bengali word": ("নাম: কীর্তি", "নাম: কিরণ", "নাম:"),
    "letters of a conjunct": ("उत्तर: क्षमा", "उत्तर: क्या", "उत्तर:"),
    "Arabic with marks": ("س: مَا", "س: مُا", "س:"),
    "Hebrew after a mark of direction": ("A: \u200fאב", "A: \u200fאג", "A:"),
    "jamo of one syllable": ("Q: \u1112\u1161\u11ab", "Q: \u1112\u1169\u11ab", "Q:"),
    "syllables of a Korean word": ("Q: 한국어", "Q: 한국말", "Q:"),
    "Katakana": ("Q: カタカナ", "Q: カタログ", "Q:"),
    "a sign that lengthens": ("Q: らあ", "Q: らー", "Q:"),
    "letters beyond the basic plane": ("Q: 𐌰𐌱", "Q: 𐌰𐌲", "Q:"),
    "a Cyrillic word": ("О: слово", "О: слон", "О:"),
    "thousands": ("cost 1,000", "cost 1,250", "cost"),
    "thousands with a narrow space": ("cost 1\u202f000", "cost 1\u202f250", "cost"),
    "thousands with a space": ("cost 1 000 000 kr", "cost 1 000 250 kr", "cost"),
    "a number before other numbers": ("pick 3 12", "pick 3 45", "pick 3"),
    "kana of one syllable": ("A: きしゃ", "A: きしゅ", "A: き"),
    "a sign of a number": ("A: -5", "A: -7", "A:"),
    "an amount": ("A: $5", "A: $7", "A:"),
    "a share": ("A: 5%", "A: 5 kg", "A:"),
    "an exponent": ("A: x²", "A: x³", "A:"),
    "a power of ten": ("A: 1e-5", "A: 1e-7", "A:"),
    "digits of Arabic": ("A: ٣٫١٤", "A: ٣٫١٥", "A:"),
    "digits of full width": ("A: ３．１４", "A: ３．１５", "A:"),
    "a unit": ("A: 5km", "A: 5kg", "A:"),
    "a hyphen": ("a well-known", "a well-made", "a"),
    "a list": ("- one", "- two", "-"),
    "a time": ("at 12:30", "at 12:45", "at"),
    "a date": ("on 2020-01-02", "on 2020-01-03", "on"),
    "a version": ("v1.2.3 is", "v1.2.4 is", ""),
    "flags": ("A: 🇩🇪🇩🇪", "A: 🇩🇪🇩🇰", "A: 🇩🇪"),
    "a family": ("A: 👩‍👩‍👧", "A: 👩‍👩‍👦", "A:"),
    "a colour of skin": ("A: 👍🏽", "A: 👍🏿", "A:"),
    "a keycap": ("A: 1️⃣", "A: 1", "A:"),
    "a flag of tags": ("A: 🏴󠁧󠁢󠁥󠁮󠁧󠁿", "A: 🏴󠁧󠁢󠁳󠁣󠁴󠁿", "A:"),
    "a way to show": ("A: ❤️", "A: ❤", "A:"),
    "a line break of two characters": ("Q\r\nyes", "Q\ryes", "Q"),
    "after a line break of two characters": ("Q\r\nyes", "Q\r\nno", "Q\r\n"),
    "a space that does not break": ("A:\u00a0yes", "A:\u00a0no", "A:"),
    "a space of East Asia": ("A:\u3000良い", "A:\u3000悪い", "A:"),
    "an apostrophe": ("they don’t", "they don’", "they"),
    "Thai has no spaces between words": ("ภาษาไทยดี", "ภาษาไทยงาม", "ภาษาไทย"),
}


@pytest.mark.parametrize("name", CASES)
def test_boundaries(name):
    first, second, prompt = CASES[name]
    assert first[: shared_prefix(first, second)] == prompt
    assert shared_prefix(first, second) == shared_prefix(second, first)
    answers = [text[len(prompt) :] for text in (first, second)]
    assert not any(unicodedata.category(answer[0]).startswith("M") for answer in answers)


@pytest.mark.parametrize("unit", ["word ", "今", "1.", "\u0301", "🇩🇪", "\u200d", "\r\n", "x"])
def test_long_texts_take_little_time(unit):
    text = unit * (30_000 // len(unit))
    assert shared_prefix(text + "a", text + "b") <= len(text)
