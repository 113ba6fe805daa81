"""Checks, before any weight is read, that every token id of a run has a row in the model's embedding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokenpref._paths import resolve_path
from tokenpref.data import Answer, Tokenizer
from tokenpref.data.samples import read_openings
from tokenpref.errors import ConfigError

__all__ = ["check_answer_ids", "check_token_ids"]

_MEND = "set the tokenizer that belongs to the model, name another token, or resize the model's embedding and its config.json"


def check_token_ids(tokenizer: Tokenizer, rows: int, *, openings: str | None = None) -> str | None:
    """Check the ids that a tokenizer adds: the end and beginning of a text, and padding.

    ``check_data_fits`` checks the ids of the data, including those of the chat template. Padding is masked by
    position, so a padding id without a row is replaced by one that has a row.

    Args:
        tokenizer: the run's tokenizer; its ``pad_id`` may be changed.
        rows: number of rows of the embedding.
        openings: text file of prompts for sampling, if any.

    Returns:
        A line for the log if another padding id is used.

    Raises:
        ConfigError: for any other id that has no row.
    """
    for name, token_id in _named_ids(tokenizer):
        if not 0 <= token_id < rows:
            raise ConfigError(
                f"tokenizer: {name} is token id {token_id} ({_text(tokenizer, token_id)}) and the model embeds {rows} tokens; "
                + _MEND
            )
    if tokenizer.vocab_size > rows and openings is not None:
        _check_openings(tokenizer, rows, openings)
    pad = tokenizer.pad_id
    if 0 <= pad < rows:
        return None
    try:
        tokenizer.pad_id = tokenizer.eos_id
    except AttributeError as error:
        raise ConfigError(
            f"tokenizer: pad_id is {pad}, the model embeds {rows} tokens, and pad_id cannot be changed ({error}); make it an id "
            f"below {rows}"
        ) from error
    return (
        f"tokenizer: the padding token is id {pad} ({_text(tokenizer, pad)}) and the model embeds {rows} tokens; sequences are "
        f"padded with the EOS token, id {tokenizer.eos_id}, instead: padding is masked, so results are the same"
    )


def check_answer_ids(answers: Iterable[Answer | None], rows: int, *, key: str) -> None:
    """Check that a model embeds every token of some answers.

    Args:
        answers: token ids and the index of the answer's first token; None for a filler.
        rows: number of rows of the embedding.
        key: config key of the component that made them.

    Raises:
        ConfigError: naming the highest id.
    """
    highest = max((max(answer[0], default=0) for answer in answers if answer is not None), default=0)
    if highest >= rows:
        raise ConfigError(f"{key}: it holds token id {highest} and the model embeds {rows} tokens; {_MEND}")


def _named_ids(tokenizer: Tokenizer) -> Iterator[tuple[str, int]]:
    yield "eos_token", tokenizer.eos_id
    if tokenizer.bos_id in tokenizer.encode_with_offsets("a")[0]:  # it is named, and added to texts as well
        yield "bos_token", int(tokenizer.bos_id or 0)
    for token_id in sorted(tokenizer.stop_ids - {tokenizer.eos_id}):
        yield "a further end of an answer (eos_token_id of generation_config.json or config.json)", token_id


def _check_openings(tokenizer: Tokenizer, rows: int, file: str) -> None:
    for number, opening in enumerate(read_openings(resolve_path(file)), start=1):
        highest = max(tokenizer.encode_with_offsets(opening)[0], default=0)
        if highest >= rows:
            raise ConfigError(
                f"sampling.prompts: opening {number} of {file} holds token id {highest} and the model embeds {rows} tokens; "
                + _MEND
            )


def _text(tokenizer: Tokenizer, token_id: int) -> str:
    return repr(tokenizer.decode_special(token_id))
