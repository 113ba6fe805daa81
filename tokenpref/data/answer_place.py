"""Finds the text of an answer in what a chat template writes for it.

The text is not searched for, because it may also occur in the answer's reasoning, in a header or in the prompt. Instead the
conversation is rendered once more with marks around the answer's text, and the marks show where the template writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenpref.data.chat import reasoning_key

__all__ = ["AnswerPlace", "Frame", "call_end", "place_answer", "reasoning_end"]

# Digits pass through strip, upper and tojson unchanged.
_BEFORE, _AFTER = "71834026195540386217", "93057281640826143759"


def _marks(written: str) -> tuple[str, str]:
    """Two marks that do not occur in a text."""
    marks = [_BEFORE, _AFTER]
    for place in (0, 1):
        while marks[place] in written:
            marks[place] += "0"
    return marks[0], marks[1]


Render = Callable[[Mapping[str, Any]], "str | None"]
"""What the template writes after the prompt for an answer; None if it refuses the answer or changes the prompt."""


@dataclass(frozen=True)
class Frame:
    """What a template writes around an answer's text.

    Attributes:
        before: what it writes between the prompt and the text, such as an empty thinking block.
        after: what it writes after the text, such as the end of the turn.
    """

    before: str
    after: str


@dataclass(frozen=True)
class AnswerPlace:
    """The half-open range of characters of the answer's text, in what the template writes after the prompt.

    Attributes:
        start: the first character.
        end: the position after the last character.
        frame: what the template writes around the text, if it may write the same around other answers; otherwise None.
    """

    start: int
    end: int
    frame: Frame | None = None


def place_answer(
    written: str, answer: Mapping[str, Any], render: Render, known: Frame | None = None
) -> AnswerPlace | None:
    """Find the answer's text in what a template wrote for the answer.

    Args:
        written: what the template writes after the prompt for this answer.
        answer: the message; its content is not only white space.
        render: gives the same for another message.
        known: a frame that was found for another answer. It is tried first, which can save a rendering.

    Returns:
        The place; None if the template does not write the text, or if the marks do not show where. If only the end of the
        text can be found (a template that takes a thinking block out of the text and writes it again), the place begins with
        what the template writes first.
    """
    content: str = answer["content"]
    if known is not None and written == known.before + content + known.after:
        return AnswerPlace(len(known.before), len(written) - len(known.after), known)
    return _between_marks(written, answer, render) or _before_mark(written, answer, render)


def _between_marks(written: str, answer: Mapping[str, Any], render: Render) -> AnswerPlace | None:
    """The place from marks on both sides of the text. Both are found unless the template looks at the text itself."""
    left, right = _marks(written)
    marked = render({**answer, "content": left + answer["content"].strip() + right})
    if marked is None or marked.count(left) != 1 or marked.count(right) != 1:
        return None
    before, _, rest = marked.partition(left)
    inner, found, after = rest.partition(right)
    start, end = len(before), len(written) - len(after)
    if not found or start > end or not (written.startswith(before) and written.endswith(after)):
        return None
    if written[start:end].strip() != inner.strip():
        return None
    return AnswerPlace(start, end, Frame(before, after))


def _before_mark(written: str, answer: Mapping[str, Any], render: Render) -> AnswerPlace | None:
    """The place from a mark after the text."""
    content: str = answer["content"]
    _, mark = _marks(written)
    marked = render({**answer, "content": content.rstrip() + mark})
    if marked is None:
        return None
    before, found, after = marked.rpartition(mark)
    end = len(written) - len(after)
    if not found or len(before) > end or not (written.startswith(before) and written.endswith(after)):
        return None
    if written[len(before) : end].strip():
        return None
    for text in (content, content.rstrip(), content.strip()):
        if written[:end].endswith(text):
            return AnswerPlace(end - len(text), end)
    return AnswerPlace(0, end)


def reasoning_end(written: str, answer: Mapping[str, Any], render: Render) -> int | None:
    """The end of an answer's reasoning in what the template writes after the prompt; None if unknown."""
    key = reasoning_key(answer)
    if key is None or not isinstance(answer[key], str):
        return None
    _, mark = _marks(written)
    before, found, _ = (render({**answer, key: answer[key].rstrip() + mark}) or "").partition(mark)
    return len(before) if found and written.startswith(before) else None


def call_end(written: str, answer: Mapping[str, Any], render: Render) -> int | None:
    """Where the end of the turn begins, after calls and reasoning, by what a plain answer ends with. None if unknown."""
    mark, _ = _marks(written)
    _, found, after = (render({"role": answer["role"], "content": mark}) or "").partition(mark)
    return len(written) - len(after) if found and after and written.endswith(after) else None
