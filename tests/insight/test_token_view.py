from __future__ import annotations

import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from tokenpref.data import StoredRow
from tokenpref.errors import DataError
from tokenpref.insight import Piece, group_tokens, html_page, row_limit, shade, terminal_text
from tokenpref.insight.token_view import MAX_ALPHA, MIN_LIMIT, NEGATIVE, POSITIVE, visible

METADATA = {
    "kind": "log_ratio",
    "estimator": {
        "name": "contrastive",
        "method": "prompt",
        "positive": {"weights": "a" * 64, "prompt": "Be kind."},
        "negative": {"weights": "b" * 64, "prompt": None},
    },
}
ANSI = re.compile("\x1b\\[[0-9;]*m")


def stored(chosen_text="good.", chosen=(2.0, -1.0), chosen_spans=((0, 4), (4, 5)), **changes):
    values = {
        "row": 7,
        "key": "0123456789abcdef",
        "prompt": "It was",
        "chosen_text": chosen_text,
        "rejected_text": "bad",
        "chosen": np.asarray(chosen, dtype=np.float32),
        "rejected": np.asarray([-0.5, 0.0], dtype=np.float32),
        "chosen_spans": list(chosen_spans),
        "rejected_spans": [(0, 3), (3, 3)],
    }
    return StoredRow(**(values | changes))


def page_text(page):
    """Text of a page as a browser has it, and its tags with their attributes."""
    texts, tags = [], []

    class Reader(HTMLParser):
        def handle_data(self, data):
            texts.append(data)

        def handle_starttag(self, tag, attrs):
            tags.append((tag, dict(attrs)))

    reader = Reader()
    reader.feed(page)
    reader.close()
    return "".join(texts), tags


def test_signs_have_two_hues_and_zero_has_none():
    assert shade(1.0, 2.0) == (POSITIVE, MAX_ALPHA / 2)
    assert shade(-1.0, 2.0) == (NEGATIVE, MAX_ALPHA / 2)
    assert shade(0.0, 2.0) is None and shade(math.nan, 2.0) is None and shade(None, 2.0) is None


def test_colours_saturate_at_the_limit():
    assert shade(2.0, 2.0) == shade(50.0, 2.0) == shade(math.inf, 2.0) == (POSITIVE, MAX_ALPHA)
    assert shade(-50.0, 2.0) == (NEGATIVE, MAX_ALPHA)


def test_the_limit_is_the_95th_percentile_of_both_answers():
    # |scores| sorted are 0, 1, ..., 20; position 0.95 * 20 = 19 holds 19.
    row = stored(chosen=np.arange(0, -11, -1), rejected=np.arange(11, 21))
    assert row_limit(row) == 19.0
    # 0.5, 0, 2, 1 sorted: 0, 0.5, 1, 2; position 0.95 * 3 = 2.85, so 1 + 0.85 * (2 - 1).
    assert row_limit(stored()) == pytest.approx(1.85)


def test_the_limit_keeps_noise_pale_and_passes_over_what_has_no_score():
    assert row_limit(stored(chosen=[1e-7, -1e-7], rejected=np.zeros(2))) == MIN_LIMIT
    assert row_limit(stored(chosen=[3.0, np.nan], rejected=np.asarray([3.0, np.inf]))) == 3.0
    assert row_limit(stored(chosen=[], rejected=np.zeros(0))) == MIN_LIMIT


def test_tokens_of_one_character_are_one_piece():
    # The emoji is two tokens with the same characters, and EOS has none: 0.5 + 0.25 = 0.75.
    pieces = group_tokens("a🙂b", [1.0, 0.5, 0.25, -1.0, 2.0], [(0, 1), (1, 2), (1, 2), (2, 3), (3, 3)])
    assert pieces == [
        Piece("a", 1.0, 1, 1),
        Piece("🙂", 0.75, 2, 2),
        Piece("b", -1.0, 4, 1),
        Piece("<eos>", 2.0, 5, 1, is_mark=True),
    ]


def test_overlapping_tokens_are_one_piece():
    # " é" and a part of "é" and "éx" share the é.
    pieces = group_tokens(" éxy", [1.0, 2.0, 4.0, 8.0], [(0, 2), (1, 2), (1, 3), (3, 4)])
    assert pieces == [Piece(" éx", 7.0, 1, 3), Piece("y", 8.0, 4, 1)]


def test_text_without_tokens_is_shown_without_a_score():
    pieces = group_tokens("abcdef", [1.0, 2.0], [(1, 2), (3, 4)])
    assert [(p.text, p.score) for p in pieces] == [
        ("a", None),
        ("b", 1.0),
        ("c", None),
        ("d", 2.0),
        ("ef", None),
    ]
    assert group_tokens("ab", [], []) == [Piece("ab", None)]
    assert group_tokens("", [], []) == []


def test_only_the_first_empty_token_behind_the_text_is_eos():
    pieces = group_tokens("ab", [1.0, 2.0, 3.0, 4.0], [(0, 0), (0, 2), (2, 2), (2, 2)])
    assert [p.text for p in pieces] == ["<no text>", "ab", "<eos>", "<no text>"]
    assert [p.text for p in group_tokens("", [1.0], [(0, 0)])] == ["<eos>"]


@pytest.mark.parametrize(
    ("scores", "spans", "message"),
    [
        ([1.0], [(0, 1), (1, 2)], "1 scores for 2 tokens"),
        ([1.0], [(0, 3)], "token 1 has characters 0 to 3"),
        ([1.0], [(2, 1)], "token 1 has characters 2 to 1"),
        ([1.0, 1.0], [(1, 2), (0, 1)], "token 2 has characters 0 to 1, after one that begins at 1"),
    ],
)
def test_spans_that_do_not_fit(scores, spans, message):
    with pytest.raises(DataError, match=message):
        group_tokens("ab", scores, spans)


def test_an_error_names_the_row():
    with pytest.raises(DataError, match="row 7: 2 scores for 1 tokens"):
        terminal_text([stored(chosen_spans=[(0, 4)])], METADATA, color=False)


def test_text_without_colour():
    assert terminal_text([stored()], METADATA, color=False, top=2) == (
        "row 7, key 0123456789ab, log_ratio (log pi+ - log pi-)\n"
        "estimator contrastive, prompt, pi+ aaaaaaaaaaaa with prompt 'Be kind.', pi- bbbbbbbbbbbb\n"
        "\n"
        "prompt\n"
        "It was\n"
        "\n"
        "chosen\n"
        "good(+2.00).(-1.00)\n"
        '2 tokens, sum +1.00, mean +0.50, min -1.00 ".", max +2.00 "good"\n'
        "\n"
        "rejected\n"
        "bad(-0.50)<eos>(+0.00)\n"
        '2 tokens, sum -0.50, mean -0.25, min -0.50 "bad", max +0.00 <eos>\n'
        "\n"
        "largest\n"
        '  +2.00 "good", chosen token 1\n'
        '  -1.00 ".", chosen token 2\n'
    )


def test_terminal_colours_follow_sign_and_size():
    shown = terminal_text([stored()], METADATA, color=True, limit=1.0)
    # At the limit the hue has 0.65: 0.65 * (0, 114, 178) + 0.35 * 18 = (6, 80, 122), rounded.
    assert "\x1b[97;48;2;6;80;122mgood\x1b[0m" in shown
    # 0.65 * (213, 94, 0) + 0.35 * 18 = (145, 67, 6); at half of it 0.325 * (213, 94, 0) + 0.675 * 18 = (81, 43, 12).
    assert "\x1b[97;48;2;145;67;6m.\x1b[0m" in shown
    assert "\x1b[97;48;2;81;43;12mbad\x1b[0m<eos>\n" in shown
    # 0.65 * (0, 114, 178) + 0.35 * 255 = (89, 163, 205)
    light = terminal_text([stored()], METADATA, color=True, light=True, limit=1.0)
    assert "\x1b[30;48;2;89;163;205mgood\x1b[0m" in light
    legend = next(line for line in ANSI.sub("", shown).splitlines() if "prefers" in line)
    assert legend == "pi- prefers  -1  -0.5  0  +0.5  +1  pi+ prefers"


def test_a_newline_is_marked_and_broken():
    row = stored("a\nb\n", [1.0, 2.0, -3.0, 4.0], [(0, 1), (1, 2), (2, 3), (3, 4)])
    plain = terminal_text([row], METADATA, color=False)
    assert "\nchosen\na(+1.00)⏎(+2.00)\nb(-3.00)⏎(+4.00)\n4 tokens" in plain
    assert 'min -3.00 "b", max +4.00 "⏎"' in plain
    colored = terminal_text([row], METADATA, color=True)
    assert not re.search("\x1b\\[97[0-9;]*m[^\x1b]*\n", colored), (
        "a background must not run over a line's end"
    )
    assert "\nchosen\na⏎\nb⏎\n4 tokens" in ANSI.sub("", colored)


HOSTILE = "<script>alert('x')</script>&amp;\x1b[31mred\x07\x9b2J\r\u202egnp\ud800\t"
HARMLESS = "<script>alert('x')</script>&amp;\\x1b[31mred\\x07\\x9b2J\\r\\u202egnp\\ud800\\t"


def hostile_row():
    return stored(
        HOSTILE,
        [1.0],
        [(0, len(HOSTILE))],
        prompt=HOSTILE,
        key=HOSTILE,
        rejected_text=f"{HOSTILE}bad",
        rejected=np.asarray([1.0], dtype=np.float32),
        rejected_spans=[(len(HOSTILE), len(HOSTILE) + 3)],
    )


HOSTILE_METADATA = {"kind": "log_ratio", "estimator": {"name": HOSTILE, "positive": {"weights": HOSTILE}}}


@pytest.mark.parametrize("color", [True, False])
def test_control_characters_do_not_reach_the_terminal(color):
    shown = terminal_text([hostile_row()], HOSTILE_METADATA, color=color, top=5)
    rest = ANSI.sub("", shown) if color else shown
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800]", rest)
    assert "\x1b[31m" not in shown
    # The source line, the prompt, two answers, the chosen answer's smallest and largest token, the list.
    assert rest.count(HARMLESS) == 7


def test_markup_and_control_characters_do_not_reach_the_page():
    page = html_page([hostile_row()], HOSTILE_METADATA, top=5)
    text, tags = page_text(page)
    assert not {tag for tag, _ in tags} & {"script", "link", "img", "iframe"}
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800]", page)
    page.encode("utf-8")
    assert text.count(HARMLESS) == 7
    assert "&lt;script&gt;" in page and "<script" not in page


def test_joiners_stay_because_words_are_written_with_them():
    assert visible("👩\u200d💻 می\u200cخواهم") == "👩\u200d💻 می\u200cخواهم"


def test_a_page_colours_and_describes_every_token():
    row = stored("a🙂", [1.5, -1.0, 0.5, 0.0], [(0, 1), (1, 2), (1, 2), (2, 2)])
    text, tags = page_text(html_page([row], METADATA, limit=1.0))
    titled = [attributes for tag, attributes in tags if tag == "span" and "title" in attributes]
    # Opacities: 0.65 at the limit and 0.65 * |-1 + 0.5| = 0.325.
    assert titled[:3] == [
        {"title": "+1.50, token 1", "style": "background:rgba(0,114,178,0.650)"},
        {
            "title": "-0.50, tokens 2-3, sum of 2 tokens that overlap",
            "style": "background:rgba(213,94,0,0.325)",
        },
        {"class": "mark", "title": "+0.00, token 4"},
    ]
    assert '4 tokens, sum +1.00, mean +0.25, min -1.00 "🙂", max +1.50 "a"' in text
    assert "-1" in text and "pi- prefers" in text and "pi+ prefers" in text


def test_a_page_needs_nothing_else_and_holds_several_rows():
    page = html_page([stored(), stored(row=9)], METADATA, top=1)
    text, tags = page_text(page)
    assert ("meta", {"charset": "utf-8"}) in tags
    assert not re.search(r"https?:|src=|href=|url\(|@import", page)
    assert sum(tag == "section" for tag, _ in tags) == 2
    assert "row 7," in text and "row 9," in text
    assert "color-scheme: light dark" in page


def test_the_end_of_a_long_prompt():
    row = stored(prompt="x" * 50 + "y" * 300)
    for show in (
        html_page,
        lambda rows, metadata, **more: terminal_text(rows, metadata, color=False, **more),
    ):
        assert f"…{'y' * 300}" in show([row], METADATA) and "xy" not in show([row], METADATA)
        assert f"{'x' * 50}{'y' * 300}" in show([row], METADATA, full=True)


def test_tokens_without_a_score():
    row = stored(chosen=[2.0, np.nan])
    shown = terminal_text([row], METADATA, color=False, top=9)
    assert (
        'good(+2.00).(no score)\n2 tokens (1 without a score), sum +2.00, mean +2.00, min +2.00 "good"'
        in shown
    )
    assert "nan" not in shown
    assert '<span title="no score, token 2">.</span>' in html_page([row], METADATA)
    silent = stored("", [], [])
    assert "\nchosen\n\n0 tokens\n" in terminal_text([silent], METADATA, color=False)


@pytest.mark.parametrize(
    ("kind", "formula", "below", "above"),
    [
        ("log_ratio", "log pi+ - log pi-", "pi- prefers", "pi+ prefers"),
        ("tis_release", "log pi- - log pi+", "pi+ prefers", "pi- prefers"),
        ("weight", "token weight", "below 0", "above 0"),
    ],
)
def test_the_legend_says_what_the_colours_mean(kind, formula, below, above):
    shown = terminal_text([stored()], {"kind": kind}, color=True)
    assert f"{kind} ({formula})" in shown
    legend = shown.splitlines()[1]
    assert legend.startswith(f"{below} \x1b") and legend.endswith(f" {above}")
