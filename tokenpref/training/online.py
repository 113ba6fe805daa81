"""Token weights from a pair of prompts on the reference model, scored batch by batch: no store, no further model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tokenpref.data import IGNORE_INDEX, PairBatch, PreferenceDataset
from tokenpref.errors import ConfigError
from tokenpref.models.scoring import ScoringModel
from tokenpref.weights import contrastive_log_ratios

__all__ = ["OnlinePrompts", "answer_batch", "prompted_answers"]

Answer = tuple[list[int], int]
"""Token ids of prompt and answer, and the index of the answer's first token."""


class OnlinePrompts:
    """log pi+ - log pi- of one model, the reference, under two prompts that stand before the data's own.

    Costs two forwards a step instead of a pass over the data beforehand.

    Args:
        positive_prompt: makes the model prefer good answers; used exactly as written.
        negative_prompt: makes it prefer bad ones.

    Raises:
        ConfigError: if the two are equal, or one is empty text.
    """

    kind = "log_ratio"

    def __init__(self, positive_prompt: str, negative_prompt: str) -> None:
        if not positive_prompt or not negative_prompt or positive_prompt == negative_prompt:
            raise ConfigError(
                "positive_prompt and negative_prompt must be two different texts, got "
                f"{positive_prompt!r} and {negative_prompt!r}"
            )
        self._prompts = (positive_prompt, negative_prompt)
        self._answers: dict[int, list[list[Answer]]] = {}
        self._ends: dict[str, dict[int, bool]] = {"chosen": {}, "rejected": {}}

    def bind(self, dataset: PreferenceDataset) -> None:
        """Tokenise the data's answers after both prompts."""
        for index, example in enumerate(dataset):
            self._ends["chosen"][example.row] = example.chosen_has_eos
            self._ends["rejected"][example.row] = example.rejected_has_eos
            self._answers[example.row] = [
                [prompted_answers(dataset, index, prompt)[side] for side in (0, 1)]
                for prompt in self._prompts
            ]

    def ends(self, side: str, rows: Sequence[int]) -> list[bool]:
        """Whether the answers of these rows end with an EOS; False for a filler."""
        return [self._ends[side].get(row, False) for row in rows]

    def score(self, scorer: ScoringModel, batch: PairBatch, pad_id: int) -> list[Tensor]:
        """Log ratios of the 2B answers of a batch, in its order; every rank runs the same two forwards.

        Args:
            scorer: the frozen model.
            batch: a micro-batch of the data that :meth:`bind` saw.
            pad_id: padding token.

        Raises:
            ConfigError: if an answer with its prompt is longer than the model's context.
        """
        device = batch.tokens.device
        sides = []
        for number in (0, 1):
            answers = [
                self._answers[row][number][side] if row >= 0 else ([pad_id, pad_id], 2)
                for side in (0, 1)
                for row in batch.rows
            ]
            check_context(answers, scorer)
            tokens, labels = answer_batch(answers, pad_id)
            sides.append((tokens.to(device), labels.to(device)))
        return contrastive_log_ratios(scorer.logps, scorer.logps, sides[0], sides[1])


def prompted_answers(dataset: PreferenceDataset, index: int, prompt: str | None) -> list[Answer]:
    """Both answers of a pair (chosen, rejected) as they stand in training, or after a side's prompt."""
    example = dataset[index]
    if prompt is None:
        return [(example.chosen_ids, example.chosen_start), (example.rejected_ids, example.rejected_start)]
    return [dataset.with_side_prompt(index, side, prompt) for side in ("chosen", "rejected")]


def answer_batch(answers: Sequence[Answer], pad_id: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels ``[N, L]`` of answers, padded on the right; labels are -100 on prompt and padding."""
    tokens = torch.full((len(answers), max(len(ids) for ids, _ in answers)), pad_id, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORE_INDEX)
    for row, (ids, start) in enumerate(answers):
        values = torch.tensor(ids, dtype=torch.int64)
        tokens[row, : len(ids)] = values
        labels[row, start : len(ids)] = values[start:]
    return tokens, labels


def check_context(answers: Sequence[Answer], scorer: ScoringModel) -> None:
    """Check that answers with their prompts fit the model's context.

    Raises:
        ConfigError: if one does not.
    """
    longest, limit = max(len(ids) for ids, _ in answers), scorer.model.max_seq_len
    if longest > limit:
        raise ConfigError(
            f"dataset: with the side's prompt in front the longest sequence has {longest} tokens and the model's context "
            f"is {limit}; set dataset.max_seq_len lower, or use a shorter prompt"
        )
