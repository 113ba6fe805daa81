"""Token weights from a pair of prompts on the reference model, scored batch by batch: no store, no further model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tokenpref.data import Answer, PairBatch, PreferenceDataset, padded
from tokenpref.errors import ConfigError
from tokenpref.models.scoring import ScoringModel
from tokenpref.models.token_ids import check_answer_ids
from tokenpref.training.credit.live import LiveModels
from tokenpref.weights import contrastive_log_ratios

__all__ = ["OnlinePrompts", "check_context", "prompted_answers"]


class OnlinePrompts:
    """log pi+ - log pi- of one model, the reference, under two prompts in front of the data's own prompts.

    It costs two forward passes per step instead of a pass over the data beforehand.

    Args:
        positive_prompt: makes the model prefer good answers; used exactly as written.
        negative_prompt: makes it prefer bad ones.

    Raises:
        ConfigError: if the two are equal, or one is empty text.
    """

    kind = "log_ratio"
    timed_as = "weights"
    asks_reference = True

    def __init__(self, positive_prompt: str, negative_prompt: str) -> None:
        if not positive_prompt or not negative_prompt or positive_prompt == negative_prompt:
            raise ConfigError(
                "positive_prompt and negative_prompt must be two different texts, got "
                f"{positive_prompt!r} and {negative_prompt!r}"
            )
        self._prompts = (positive_prompt, negative_prompt)
        self._answers: dict[int, list[list[Answer]]] = {}

    def bind(self, dataset: PreferenceDataset) -> None:
        """Tokenise the data's answers after both prompts."""
        for index, example in enumerate(dataset):
            self._answers[example.row] = [
                [prompted_answers(dataset, index, prompt)[side] for side in (0, 1)]
                for prompt in self._prompts
            ]

    def check_context(self, limit: int) -> None:
        """Check that every answer with its prompt fits a model's context of ``limit`` tokens.

        Raises:
            ConfigError: if the longest does not.
        """
        check_lengths([answer for row in self._answers.values() for side in row for answer in side], limit)

    def score(self, batch: PairBatch, models: LiveModels) -> list[Tensor]:
        """See :class:`tokenpref.training.credit.live.LiveScores`: every rank runs the same two forwards of the reference.

        Raises:
            ConfigError: if an answer with its prompt is longer than the model's context.
        """
        scorer = models.frozen("token_weights")
        filler: Answer = ([models.pad_id, models.pad_id], 2)
        sides: list[tuple[Tensor, Tensor]] = []
        for number in (0, 1):
            answers = [
                self._answers[row][number][side] if row >= 0 else filler
                for side in (0, 1)
                for row in batch.rows
            ]
            check_context(answers, scorer)
            tokens, labels = padded(answers, models.pad_id)
            sides.append((tokens.to(batch.tokens.device), labels.to(batch.tokens.device)))
        return contrastive_log_ratios(scorer.logps, scorer.logps, sides[0], sides[1])


def prompted_answers(dataset: PreferenceDataset, index: int, prompt: str | None) -> list[Answer]:
    """Both answers of a pair (chosen, rejected) as in training, or after a side's prompt."""
    example = dataset[index]
    if prompt is None:
        return [(example.chosen_ids, example.chosen_start), (example.rejected_ids, example.rejected_start)]
    return [dataset.with_side_prompt(index, side, prompt) for side in ("chosen", "rejected")]


def check_context(answers: Sequence[Answer], scorer: ScoringModel) -> None:
    """Check that answers with their prompts fit the model's context and vocabulary.

    Raises:
        ConfigError: if one does not.
    """
    check_lengths(answers, scorer.model.max_seq_len)
    check_answer_ids(
        answers, scorer.model.tok_embeddings.num_embeddings, key="dataset, with the side's prompt"
    )


def check_lengths(answers: Sequence[Answer], limit: int) -> None:
    """As :func:`check_context`, for a context of ``limit`` tokens."""
    longest = max(len(ids) for ids, _ in answers)
    if longest > limit:
        raise ConfigError(
            f"dataset: with the side's prompt in front the longest sequence has {longest} tokens and the model's context "
            f"is {limit}; set dataset.max_seq_len lower, or use a shorter prompt"
        )
