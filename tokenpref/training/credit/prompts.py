"""Scores from two models, or from one model under two prompts: log pi+ - log pi- of every answer token."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tokenpref.data import Answer, PairBatch, PreferenceDataset, padded
from tokenpref.errors import ConfigError
from tokenpref.models.scoring import ScoringModel
from tokenpref.models.token_ids import check_answer_ids
from tokenpref.stats import SIDES
from tokenpref.training.credit.live import LiveModels
from tokenpref.weights import contrastive_log_ratios

__all__ = ["ContrastiveScores", "OnlinePrompts"]


class ContrastiveScores:
    """log pi+ - log pi- of every answer token. Subclasses say which models pi+ and pi- are.

    Args:
        prompts: precede the data's own prompts, for pi+ and for pi-; None for none.
    """

    kind = "log_ratio"
    whole_pairs = False

    def __init__(self, prompts: tuple[str | None, str | None]) -> None:
        self._prompts = prompts

    def bind(self, dataset: PreferenceDataset) -> None:
        """See :class:`tokenpref.training.credit.live.TokenScores`."""
        self._dataset = dataset
        self._places = {row: place for place, row in enumerate(dataset.rows().tolist())}

    def check_context(self, limit: int) -> None:
        """Check that every answer with its prompt fits a model's context of ``limit`` tokens.

        Raises:
            ConfigError: if the longest does not.
        """
        for prompt in self._prompts:
            _check_lengths([self._answer(row, side, prompt) for row in self._places for side in SIDES], limit)

    def scorers(self, models: LiveModels) -> tuple[ScoringModel, ScoringModel]:
        """pi+ and pi-."""
        raise NotImplementedError

    def score(self, batch: PairBatch, models: LiveModels) -> list[Tensor]:
        """See :class:`tokenpref.training.credit.live.TokenScores`.

        Raises:
            ConfigError: if an answer with its prompt is longer than the model's context.
        """
        scorers = self.scorers(models)
        filler: Answer = ([models.pad_id] * 2, 2)
        sides: list[tuple[Tensor, Tensor]] = []
        for prompt, scorer in zip(self._prompts, scorers, strict=True):
            answers = [self._answer(row, side, prompt) if row >= 0 else filler for row, side in batch.answers]
            _check_lengths(answers, scorer.decoder.context)
            check_answer_ids(answers, scorer.decoder.vocabulary, key="dataset, with the side's prompt")
            tokens, labels = padded(answers, models.pad_id)
            sides.append((tokens.to(batch.tokens.device), labels.to(batch.tokens.device)))
        return contrastive_log_ratios(scorers[0].logps, scorers[1].logps, sides[0], sides[1])

    def _answer(self, row: int, side: str, prompt: str | None) -> Answer:
        """An answer as in training, or after a prompt of the model's side."""
        place = self._places[row]
        if prompt is not None:
            return self._dataset.with_side_prompt(place, side, prompt)
        example = self._dataset[place]
        if side == "chosen":
            return example.chosen_ids, example.chosen_start
        return example.rejected_ids, example.rejected_start


class OnlinePrompts(ContrastiveScores):
    """log pi+ - log pi- of one model, the reference, under two prompts in front of the data's own prompts.

    It costs two forward passes per step instead of a pass over the data beforehand.

    Args:
        positive_prompt: makes the model prefer good answers; used exactly as written.
        negative_prompt: makes it prefer bad ones.

    Raises:
        ConfigError: if the two are equal, or one is empty text.
    """

    asks_reference = True

    def __init__(self, positive_prompt: str, negative_prompt: str) -> None:
        if not positive_prompt or not negative_prompt or positive_prompt == negative_prompt:
            raise ConfigError(
                "positive_prompt and negative_prompt must be two different texts, got "
                f"{positive_prompt!r} and {negative_prompt!r}"
            )
        super().__init__((positive_prompt, negative_prompt))
        self._tokenised: dict[tuple[int, str, str | None], Answer] = {}

    def _answer(self, row: int, side: str, prompt: str | None) -> Answer:
        # Kept, because a training asks for every answer once an epoch.
        key = (row, side, prompt)
        if key not in self._tokenised:
            self._tokenised[key] = super()._answer(row, side, prompt)
        return self._tokenised[key]

    def scorers(self, models: LiveModels) -> tuple[ScoringModel, ScoringModel]:
        """The reference, twice."""
        scorer = models.frozen("token_weights")
        return scorer, scorer


def _check_lengths(answers: Sequence[Answer], limit: int) -> None:
    longest = max(len(ids) for ids, _ in answers)
    if longest > limit:
        raise ConfigError(
            f"dataset: with the side's prompt in front the longest sequence has {longest} tokens and the model's context "
            f"is {limit}; set dataset.max_seq_len lower, or use a shorter prompt"
        )
