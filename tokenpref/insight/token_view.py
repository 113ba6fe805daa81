"""Shows answers with their tokens coloured by score, in the terminal and as HTML. Pure functions from rows to text.

Texts come from a data set and are not trusted: control and formatting characters are shown as escapes, so that they
reach neither the terminal nor the page, and HTML is escaped.
"""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokenpref.data import StoredRow
from tokenpref.errors import DataError

__all__ = ["Piece", "group_tokens", "html_page", "row_limit", "shade", "terminal_text", "visible"]

LIMIT_PERCENTILE = 95
MIN_LIMIT = 1e-3  # smaller differences are numerical noise and should look like it
PROMPT_CHARACTERS = 300

RGB = tuple[int, int, int]
# Blue and vermilion of Okabe and Ito's palette, which can be told apart with every common kind of colour blindness.
POSITIVE: RGB = (0, 114, 178)
NEGATIVE: RGB = (213, 94, 0)
MAX_ALPHA = 0.65  # keeps black text on the light page and white text on the dark page readable
DARK: RGB = (18, 18, 18)
LIGHT: RGB = (255, 255, 255)

EOS_MARK, EMPTY_MARK, NEWLINE_MARK = "<eos>", "<no text>", "⏎"
_HIDDEN = {
    "Cc",
    "Cf",
    "Cs",
    "Zl",
    "Zp",
}  # controls, formatting such as bidi overrides, surrogates, separators
_JOINERS = "\u200c\u200d"  # part of how words and emoji are written


@dataclass(frozen=True)
class _Meaning:
    """The formula of a kind of score, and the meaning of the two colours."""

    formula: str
    positive: str
    negative: str


_MEANINGS = {
    "log_ratio": _Meaning("log pi+ - log pi-", "pi+ prefers", "pi- prefers"),
    "tis_release": _Meaning("log pi- - log pi+", "pi- prefers", "pi+ prefers"),
    "weight": _Meaning("token weight", "above 0", "below 0"),
}


@dataclass(frozen=True)
class Piece:
    """Characters that are shown together.

    Args:
        text: the characters, as they stand in the data; a mark if the token has none.
        score: sum of the tokens' scores; NaN if one has none, None for text without a token.
        first: number of its first token, from 1; 0 without a token.
        count: its tokens: more than one when they are parts of one character.
        is_mark: whether ``text`` stands for a token without characters.
    """

    text: str
    score: float | None
    first: int = 0
    count: int = 0
    is_mark: bool = False


def group_tokens(text: str, scores: Sequence[float], spans: Sequence[tuple[int, int]]) -> list[Piece]:
    """Split an answer into pieces. Tokens whose characters overlap share a piece, with the sum of their scores.

    Args:
        text: the answer.
        scores: one for each token.
        spans: characters of ``text`` that each token covers, in the order of the text; an empty span has none.

    Returns:
        Pieces whose texts, marks left out, are ``text``.

    Raises:
        DataError: if scores and spans do not fit each other or the text.
    """
    _check_spans(text, scores, spans)
    pieces: list[Piece] = []
    end = index = 0
    while index < len(spans):
        start, stop = spans[index]
        first = index
        index += 1
        if start > end:
            pieces.append(Piece(text[end:start], None))
        end = max(end, start)
        if start == stop:
            pieces.append(Piece(_mark(spans, first), float(scores[first]), first + 1, 1, is_mark=True))
            continue
        while index < len(spans) and spans[index][0] < min(stop, spans[index][1]):
            stop = max(stop, spans[index][1])
            index += 1
        total = float(sum(scores[first:index]))
        pieces.append(Piece(text[max(start, end) : stop], total, first + 1, index - first))
        end = max(end, stop)
    if end < len(text):
        pieces.append(Piece(text[end:], None))
    return pieces


def _mark(spans: Sequence[tuple[int, int]], index: int) -> str:
    """The mark of a token without characters: the first one after all characters is EOS."""
    last = max((i for i, (start, stop) in enumerate(spans) if start < stop), default=-1)
    return EOS_MARK if index == last + 1 else EMPTY_MARK


def _check_spans(text: str, scores: Sequence[float], spans: Sequence[tuple[int, int]]) -> None:
    if len(scores) != len(spans):
        raise DataError(f"{len(scores)} scores for {len(spans)} tokens; estimate the weights again")
    before = 0
    for number, (start, stop) in enumerate(spans, 1):
        if not before <= start <= stop <= len(text):
            raise DataError(
                f"token {number} has characters {start} to {stop}, after one that begins at {before} in a text of "
                f"{len(text)} characters; estimate the weights again"
            )
        before = start


def row_limit(row: StoredRow) -> float:
    """The score at which colours saturate: the 95th percentile of the absolute scores of all tokens of both answers."""
    scores = np.abs(np.concatenate([row.chosen, row.rejected]).astype(np.float64))
    scores = scores[np.isfinite(scores)]
    return max(float(np.percentile(scores, LIMIT_PERCENTILE)), MIN_LIMIT) if scores.size else MIN_LIMIT


def shade(score: float | None, limit: float) -> tuple[RGB, float] | None:
    """The colour of a score and its opacity, which grows linearly up to ``limit``.

    Args:
        score: the score; None and NaN have no colour.
        limit: absolute score from which on the opacity is the largest.

    Returns:
        Blue for positive scores, vermilion for negative ones, with an opacity from 0 to 1; None without a colour.
    """
    if score is None or math.isnan(score) or score == 0:
        return None
    return (POSITIVE if score > 0 else NEGATIVE), MAX_ALPHA * min(abs(score) / limit, 1.0)


def visible(text: str, line_break: str = NEWLINE_MARK) -> str:
    r"""Text that is safe for a terminal or a page: hidden characters become escapes such as ``\x1b``.

    Args:
        text: untrusted text.
        line_break: what stands for a newline.
    """
    return "".join(
        line_break
        if c == "\n"
        else c.encode("unicode_escape").decode("ascii")
        if unicodedata.category(c) in _HIDDEN and c not in _JOINERS
        else c
        for c in text
    )


@dataclass(frozen=True)
class _Answer:
    name: str
    pieces: list[Piece]
    summary: str


@dataclass(frozen=True)
class _View:
    """A row, prepared for display."""

    title: str
    source: str
    prompt: str
    limit: float
    meaning: _Meaning
    answers: list[_Answer]
    top: list[str]


def _views(
    rows: Sequence[StoredRow], metadata: Mapping[str, Any], *, limit: float | None, full: bool, top: int
) -> Iterator[_View]:
    meaning = _MEANINGS[metadata["kind"]]
    for row in rows:
        sides = {
            "chosen": (row.chosen_text, row.chosen.astype(np.float64).tolist(), row.chosen_spans),
            "rejected": (row.rejected_text, row.rejected.astype(np.float64).tolist(), row.rejected_spans),
        }
        try:
            answers = [_Answer(name, group_tokens(*side), _summary(*side)) for name, side in sides.items()]
        except DataError as error:
            raise DataError(f"row {row.row}: {error}") from error
        cut = not full and len(row.prompt) > PROMPT_CHARACTERS
        yield _View(
            title=f"row {row.row}, key {visible(row.key[:12])}, {metadata['kind']} ({meaning.formula})",
            source=visible(_source(metadata)),
            prompt=f"…{row.prompt[-PROMPT_CHARACTERS:]}" if cut else row.prompt,
            limit=row_limit(row) if limit is None else limit,
            meaning=meaning,
            answers=answers,
            top=_largest(sides, top),
        )


def _source(metadata: Mapping[str, Any]) -> str:
    """The estimator and its pair, if the store's metadata names them."""
    estimator = metadata.get("estimator")
    if not isinstance(estimator, Mapping):
        return "" if estimator is None else f"estimator {estimator}"
    parts = [str(estimator[key]) for key in ("name", "method") if key in estimator]
    for key, name in (("positive", "pi+"), ("negative", "pi-")):
        side = estimator.get(key)
        if isinstance(side, Mapping):
            parts.append(f"{name} {str(side.get('weights', '?'))[:12]}")
            if side.get("prompt"):
                parts[-1] += f" with prompt {_shortened(str(side['prompt']))!r}"
    return f"estimator {', '.join(parts)}" if parts else ""


def _shortened(text: str, length: int = 60) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _token_text(text: str, spans: Sequence[tuple[int, int]], index: int) -> str:
    start, stop = spans[index]
    if start == stop:
        return _mark(spans, index)
    return f'"{visible(text[start:stop])}"'


def _summary(text: str, scores: Sequence[float], spans: Sequence[tuple[int, int]]) -> str:
    scored = [index for index, score in enumerate(scores) if not math.isnan(score)]
    count = f"{len(scores)} token{'' if len(scores) == 1 else 's'}"
    if len(scored) < len(scores):
        count += f" ({len(scores) - len(scored)} without a score)"
    if not scored:
        return count
    total = sum(scores[i] for i in scored)
    low, high = min(scored, key=scores.__getitem__), max(scored, key=scores.__getitem__)
    return (
        f"{count}, sum {total:+.2f}, mean {total / len(scored):+.2f}, "
        f"min {scores[low]:+.2f} {_token_text(text, spans, low)}, "
        f"max {scores[high]:+.2f} {_token_text(text, spans, high)}"
    )


def _largest(sides: Mapping[str, tuple[str, list[float], list[tuple[int, int]]]], top: int) -> list[str]:
    found = [
        (abs(score), f"{score:+.2f} {_token_text(text, spans, index)}, {name} token {index + 1}")
        for name, (text, scores, spans) in sides.items()
        for index, score in enumerate(scores)
        if not math.isnan(score)
    ]
    return [line for _, line in sorted(found, key=lambda entry: -entry[0])[:top]]


def _number(score: float) -> str:
    return "no score" if math.isnan(score) else f"{score:+.2f}"


# Terminal


def terminal_text(
    rows: Sequence[StoredRow],
    metadata: Mapping[str, Any],
    *,
    color: bool,
    light: bool = False,
    limit: float | None = None,
    full: bool = False,
    top: int = 0,
) -> str:
    """Rows of a store as text for a terminal or a log.

    Args:
        rows: the rows.
        metadata: the store's metadata: ``kind``, and ``estimator`` if it is there.
        color: colour tokens with 24-bit ANSI sequences; without, each token is followed by its number.
        light: the terminal's background is light; chooses the colours of weak scores.
        limit: score at which colours saturate; None takes :func:`row_limit` for each row.
        full: the whole prompt and not only its end.
        top: number of tokens with the largest absolute scores to list under each row.

    Raises:
        DataError: if a row's scores, spans and texts do not fit each other.
    """
    ink = _Ink(color, light)
    return "\n".join(
        _terminal_row(view, ink) for view in _views(rows, metadata, limit=limit, full=full, top=top)
    )


@dataclass(frozen=True)
class _Ink:
    color: bool
    light: bool

    def style(self, text: str, code: str) -> str:
        """Style each line by itself, because a terminal would fill the rest of a line whose background is still set."""
        if not self.color:
            return text
        return "\n".join(f"\x1b[{code}m{line}\x1b[0m" if line else "" for line in text.split("\n"))

    def dim(self, text: str) -> str:
        return self.style(text, "2")

    def bold(self, text: str) -> str:
        return self.style(text, "1")

    def shaded(self, text: str, score: float | None, limit: float) -> str:
        found = shade(score, limit)
        if found is None:
            return text
        color, alpha = found
        ground, letters = (LIGHT, "30") if self.light else (DARK, "97")
        mixed = (round(alpha * c + (1 - alpha) * g) for c, g in zip(color, ground, strict=True))
        return self.style(text, f"{letters};48;2;{';'.join(map(str, mixed))}")


def _terminal_row(view: _View, ink: _Ink) -> str:
    lines = [ink.bold(view.title)]
    if view.source:
        lines.append(view.source)
    if ink.color:
        lines.append(_terminal_legend(view, ink))
    lines += ["", "prompt", ink.dim(visible(view.prompt, f"{NEWLINE_MARK}\n"))]
    for answer in view.answers:
        shown = "".join(_terminal_piece(piece, view.limit, ink) for piece in answer.pieces)
        lines += ["", ink.bold(answer.name), shown.removesuffix("\n"), answer.summary]
    if view.top:
        lines += ["", "largest", *(f"  {line}" for line in view.top)]
    return "\n".join(lines) + "\n"


def _terminal_legend(view: _View, ink: _Ink) -> str:
    steps = (-view.limit, -view.limit / 2, 0.0, view.limit / 2, view.limit)
    scale = "".join(ink.shaded(f" {step:+.3g} " if step else " 0 ", step, view.limit) for step in steps)
    return f"{view.meaning.negative} {scale} {view.meaning.positive}"


def _terminal_piece(piece: Piece, limit: float, ink: _Ink) -> str:
    text = piece.text if piece.is_mark else visible(piece.text, f"{NEWLINE_MARK}\n")
    if piece.score is None:
        return ink.dim(text)
    if ink.color:
        return ink.shaded(text, piece.score, limit)
    body = text.removesuffix("\n")
    return f"{body}({_number(piece.score)}){text[len(body) :]}"


# HTML

_CSS = """\
:root { color-scheme: light dark; }
body { font: 16px/1.6 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.3em; } h2 { font-size: 1.1em; margin-top: 2em; } h3 { font-size: 1em; margin-bottom: 0.3em; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
.prompt, .none, .summary, .source { opacity: 0.7; }
.text span { border-radius: 2px; }
.mark { font-style: italic; }
.legend { display: flex; flex-wrap: wrap; align-items: center; gap: 0.6em; }
.scale { display: inline-flex; justify-content: space-between; width: 18em; padding: 0 0.4em; border-radius: 2px; }
"""


def html_page(
    rows: Sequence[StoredRow],
    metadata: Mapping[str, Any],
    *,
    limit: float | None = None,
    full: bool = False,
    top: int = 0,
) -> str:
    """Rows of a store as a self-contained page, without scripts, further files or network access.

    Args:
        rows: the rows.
        metadata: the store's metadata: ``kind``, and ``estimator`` if it is there.
        limit: score at which colours saturate; None takes :func:`row_limit` for each row.
        full: the whole prompt and not only its end.
        top: number of tokens with the largest absolute scores to list under each row.

    Raises:
        DataError: if a row's scores, spans and texts do not fit each other.
    """
    views = _views(rows, metadata, limit=limit, full=full, top=top)
    sections = "\n".join(_html_row(view) for view in views)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n<title>Token weights</title>\n'
        f"<style>\n{_CSS}</style>\n</head>\n<body>\n<h1>Token weights</h1>\n{sections}\n</body>\n</html>\n"
    )


def _html_row(view: _View) -> str:
    parts = [f"<section>\n<h2>{html.escape(view.title)}</h2>"]
    if view.source:
        parts.append(f'<p class="source">{html.escape(view.source)}</p>')
    parts.append(_html_legend(view))
    prompt = html.escape(visible(view.prompt, f"{NEWLINE_MARK}\n"))
    parts.append(f'<h3>prompt</h3>\n<p class="text prompt" dir="auto">{prompt}</p>')
    for answer in view.answers:
        shown = "".join(_html_piece(piece, view.limit) for piece in answer.pieces)
        parts.append(f'<h3>{answer.name}</h3>\n<p class="text" dir="auto">{shown}</p>')
        parts.append(f'<p class="summary">{html.escape(answer.summary)}</p>')
    if view.top:
        lines = "\n".join(f"<li>{html.escape(line)}</li>" for line in view.top)
        parts.append(f"<h3>largest</h3>\n<ol>\n{lines}\n</ol>")
    return "\n".join([*parts, "</section>"])


def _html_legend(view: _View) -> str:
    low, high = (_rgba(color, MAX_ALPHA) for color in (NEGATIVE, POSITIVE))
    middle = ", ".join(_rgba(color, 0.0) for color in (NEGATIVE, POSITIVE))
    return (
        f'<p class="legend">{view.meaning.negative} '
        f'<span class="scale" style="background:linear-gradient(to right, {low}, {middle}, {high})">'
        f"<span>{-view.limit:+.3g}</span><span>0</span><span>{view.limit:+.3g}</span></span> "
        f"{view.meaning.positive}</p>"
    )


def _rgba(color: RGB, alpha: float) -> str:
    return f"rgba({color[0]},{color[1]},{color[2]},{alpha:.3f})"


def _html_piece(piece: Piece, limit: float) -> str:
    text = html.escape(piece.text if piece.is_mark else visible(piece.text, f"{NEWLINE_MARK}\n"))
    if piece.score is None:
        return f'<span class="none" title="no token">{text}</span>'
    tokens = f"token {piece.first}"
    if piece.count > 1:
        tokens = (
            f"tokens {piece.first}-{piece.first + piece.count - 1}, sum of {piece.count} tokens that overlap"
        )
    mark = ' class="mark"' if piece.is_mark else ""
    found = shade(piece.score, limit)
    background = "" if found is None else f' style="background:{_rgba(*found)}"'
    return f'<span{mark} title="{_number(piece.score)}, {tokens}"{background}>{text}</span>'
