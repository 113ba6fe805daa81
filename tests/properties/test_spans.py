from __future__ import annotations

import json

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tokenpref.data import ColumnScores, encode_text_answer, preference_dataset
from tokenpref.data.tokenization import cut_to_length
from tokenpref.weights import values_of_tokens

# Words that vocabularies merge, characters of one to four bytes, emoji of several characters, combining marks, all
# kinds of white space, and anything else that UTF-8 can write.
WORDS = ["hello", " the", "he", "llo", "1", ".", "ß", "é", "e\u0301", "今天", "한"]
SPACES = [" ", "  ", "\n", "\t", "\u00a0", "\u3000", "\u2581", "\u2581a", "\0", "\x7f", "\ufeff"]
EMOJI = ["😀", "👩\u200d👩\u200d👧", "👍🏽", "🇩🇪", "❤\ufe0f"]
pieces = st.sampled_from(WORDS + SPACES + EMOJI) | st.text(st.characters(codec="utf-8"), max_size=3)
texts = st.lists(pieces, max_size=7).map("".join)
answers = st.lists(pieces, min_size=1, max_size=7).map("".join).filter(bool)
numbers = st.floats(-1e6, 1e6)


@st.composite
def prompts_and_answers(draw) -> tuple[str, str]:
    """Two texts, or one that is cut anywhere, so that tokens go over the boundary."""
    if draw(st.booleans()):
        return draw(texts), draw(answers)
    text = draw(answers)
    cut = draw(st.integers(0, len(text) - 1))
    return text[:cut], text[cut:]


def free_of_special(tokenizer, *parts: str) -> bool:
    """Whether no special token stands in the text: its characters belong to no text token, by design."""
    return not any(
        (name := tokenizer.decode_special(i)) and name in "".join(parts) for i in tokenizer.special_ids
    )


@settings(max_examples=60)
@given(prompts_and_answers(), st.booleans())
def test_every_character_of_an_answer_belongs_to_a_token(tokenizer, pair, append_eos):
    prompt, answer = pair
    assume(free_of_special(tokenizer, prompt, answer))
    encoded = encode_text_answer(tokenizer, prompt, answer, append_eos=append_eos)
    assert encoded.text == answer and len(encoded.spans) == len(encoded.ids) - encoded.start
    assert encoded.has_eos == append_eos
    spans = encoded.spans[:-1] if append_eos else encoded.spans
    covered = {place for start, end in spans for place in range(start, end)}
    assert covered == set(range(len(answer)))
    assert all(0 <= start <= end <= len(answer) for start, end in spans)
    # From left to right; two tokens share a character only where it takes several of them.
    for (start, end), (next_start, next_end) in zip(spans, spans[1:], strict=False):
        assert start <= next_start and end <= next_end and next_start >= min(end, len(answer)) - 1
    if append_eos:
        assert encoded.ids[-1] == tokenizer.eos_id and encoded.spans[-1] == (len(answer), len(answer))


@settings(max_examples=60)
@given(prompts_and_answers())
def test_prompt_tokens_say_nothing_of_the_answer(tokenizer, pair):
    prompt, answer = pair
    assume(free_of_special(tokenizer, prompt, answer))
    encoded = encode_text_answer(tokenizer, prompt, answer)
    ids, spans = tokenizer.encode_with_offsets(prompt + answer)
    # One text, tokenised once; the boundary is the only thing that the prompt decides.
    assert encoded.ids == ids
    assert all(end <= len(prompt) for _, end in spans[: encoded.start])
    # The space that SentencePiece puts before a text covers no character, and may be the answer's first token.
    assert all(end > len(prompt) or start == end == len(prompt) for start, end in spans[encoded.start :])
    first = spans[encoded.start]
    assert encoded.straddles == (first[0] < len(prompt) < first[1])


@settings(max_examples=60)
@given(texts)
def test_a_token_says_what_stands_in_its_span(byte_tokenizer, text):
    assume(free_of_special(byte_tokenizer, text))
    ids, spans = byte_tokenizer.encode_with_offsets(text, add_bos=False)
    assert byte_tokenizer.decode(ids) == text
    for token_id, (start, end) in zip(ids, spans, strict=True):
        said = byte_tokenizer.decode([token_id])
        # A part of a character is not text by itself.
        assert said == text[start:end] or ("\ufffd" in said and end > start)


@settings(max_examples=60)
@given(st.data(), texts, answers)
def test_special_tokens_written_in_a_text_cover_nothing(byte_tokenizer, data, before, after):
    special = data.draw(st.sampled_from(sorted(byte_tokenizer.special_ids)))
    name = byte_tokenizer.decode_special(special)
    assume(free_of_special(byte_tokenizer, before) and free_of_special(byte_tokenizer, after))
    assume(name not in before + name[:-1] and name not in name[1:] + after)
    ids, spans = byte_tokenizer.encode_with_offsets(before + name + after, add_bos=False)
    at = len(before)
    assert [span for i, span in zip(ids, spans, strict=True) if i in byte_tokenizer.special_ids] == [(at, at)]
    covered = {place for start, end in spans for place in range(start, end)}
    assert covered == set(range(at)) | set(range(at + len(name), at + len(name) + len(after)))


@settings(max_examples=60)
@given(prompts_and_answers(), st.booleans(), st.integers(2, 12) | st.none(), st.integers(1, 6) | st.none())
def test_cutting_keeps_the_end_of_the_prompt_and_the_beginning_of_the_answer(
    tokenizer, pair, append_eos, max_seq_len, max_prompt_len
):
    whole = encode_text_answer(tokenizer, *pair, append_eos=append_eos)
    cut, prompt_cut, answer_cut = cut_to_length(whole, max_seq_len, max_prompt_len)
    kept = cut.ids[: cut.start], cut.ids[cut.start :]
    assert prompt_cut == (cut.start < whole.start) and cut.start <= (max_prompt_len or cut.start)
    special = min(whole.num_special, cut.start)
    assert kept[0][:special] == whole.ids[:special]
    assert kept[0][special:] == whole.ids[whole.start - (cut.start - special) : whole.start]
    assert kept[1] == whole.ids[whole.start :][: len(kept[1])]
    assert cut.spans == whole.spans[: len(kept[1])]
    assert answer_cut == (len(kept[1]) < len(whole.ids) - whole.start)
    assert cut.has_eos == (whole.has_eos and not answer_cut)
    if max_seq_len is not None and cut.start <= max_seq_len:
        assert len(cut.ids) <= max_seq_len
        assert not answer_cut or len(cut.ids) == max_seq_len


@st.composite
def ranges(draw, length: int) -> list[tuple[int, int]]:
    """Half-open ranges within a text, which may overlap."""
    starts = draw(st.lists(st.integers(0, length - 1), max_size=5))
    return [(start, draw(st.integers(start + 1, length))) for start in starts]


def by_character(tokens, spans, values, default):
    """The mean over all pairs of a character of the token and a span that holds it."""
    found = []
    for start, end in tokens:
        held = [
            v
            for place in range(start, end)
            for (a, b), v in zip(spans, values, strict=True)
            if a <= place < b
        ]
        found.append(sum(held) / len(held) if held else default)
    return found


@settings(max_examples=60)
@given(st.data(), st.integers(1, 30), numbers)
def test_values_of_tokens_is_the_mean_over_characters(data, length, default):
    tokens, spans = data.draw(ranges(length)), data.draw(ranges(length))
    values = data.draw(st.lists(numbers, min_size=len(spans), max_size=len(spans)))
    found = values_of_tokens(tokens, spans, values, default=default)
    np.testing.assert_allclose(found, by_character(tokens, spans, values, default), rtol=1e-9, atol=1e-6)
    order = data.draw(st.permutations(range(len(spans))))
    other = values_of_tokens(tokens, [spans[i] for i in order], [values[i] for i in order], default=default)
    np.testing.assert_allclose(found, other, rtol=1e-9, atol=1e-6)


@settings(max_examples=60)
@given(st.data(), texts, answers, answers, st.booleans(), st.integers(4, 20) | st.none())
def test_scores_of_spans_arrive_at_the_tokens_of_their_characters(
    tmp_path_factory, byte_tokenizer, data, prompt, chosen, rejected, append_eos, max_seq_len
):
    assume(free_of_special(byte_tokenizer, prompt, chosen, rejected))
    assume(prompt and chosen != rejected and chosen.strip() and rejected.strip())
    given_scores = []
    for answer in (chosen, rejected):
        spans = data.draw(ranges(len(answer)))
        given_scores.append((spans, [data.draw(numbers) for _ in spans]))
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    for side, (spans, values) in zip(("chosen", "rejected"), given_scores, strict=True):
        row[f"{side}_weights"] = [[a, b, v] for (a, b), v in zip(spans, values, strict=True)]
    path = tmp_path_factory.getbasetemp() / "scored.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    dataset = preference_dataset(
        byte_tokenizer,
        str(path),
        add_bos=True,
        append_eos=append_eos,
        max_seq_len=max_seq_len,
        max_prompt_len=2,
    )
    found = ColumnScores("log_ratio", "span", default=-7.0).load(dataset)[0]
    example = dataset[0]
    for side, scores, (spans, values) in zip(("chosen", "rejected"), found, given_scores, strict=True):
        tokens = getattr(example, f"{side}_offsets")
        has_eos = getattr(example, f"{side}_has_eos")
        assert len(scores) == len(getattr(example, f"{side}_ids")) - getattr(example, f"{side}_start")
        assert not has_eos or np.isnan(scores[-1])
        count = len(tokens) - has_eos
        expected = by_character(tokens[:count], spans, values, -7.0)
        np.testing.assert_allclose(scores[:count], expected, rtol=1e-9, atol=1e-6)
