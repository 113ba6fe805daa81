"""Makes the weights of a micro-batch from scores of tokens: transform, normalisation, EOS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tokenpref.components import accepts
from tokenpref.data import IGNORE_INDEX, PairBatch, PreferenceDataset, ScoreSource
from tokenpref.errors import ConfigError, DataError
from tokenpref.stats import SIDES
from tokenpref.training.config.fields import Component
from tokenpref.weights import TransformedWeights, normalized

__all__ = ["KnownScores", "TokenWeights", "Weighing", "in_columns"]

_CHUNK = 1024  # answers transformed at a time


@dataclass(frozen=True)
class Weighing:
    """How raw scores become weights.

    Args:
        kind: what the scores are; see :data:`tokenpref.weights.SCORE_KINDS`.
        transform: a function of :mod:`tokenpref.weights.transforms`; None only for kind "weight".
        normalize: "none", or "answer": each answer's weights average one.
        eos_weight: weight of an EOS without a score.
        use_eos_score: False gives ``eos_weight`` to every EOS.

    Raises:
        ConfigError: if the kind needs a transform and has none, or the other way round.
    """

    kind: str
    transform: Component | None
    normalize: str
    eos_weight: float
    use_eos_score: bool = True

    def __post_init__(self) -> None:
        if self.kind == "weight" and self.transform is not None:
            raise ConfigError(
                "weight_transform: the scores are weights already (kind weight); set weight_transform=null, or "
                "kind: log_ratio if they are log ratios"
            )
        if self.kind != "weight" and self.transform is None:
            raise ConfigError(
                f"weight_transform: missing; scores of kind {self.kind} become weights through one, e.g. "
                "tokenpref.weights.transforms.exponential"
            )

    def __call__(
        self, scores: Sequence[Tensor], *, side: str, keys: Sequence[int], ends: Sequence[bool]
    ) -> list[tuple[Tensor, Tensor]]:
        """Weights of answers of one side.

        Args:
            scores: a vector for each answer, nan for a token without score.
            ends: whether each answer's last token is an EOS.
            side: "chosen" or "rejected".
            keys: a number that identifies each row, for random transforms.

        Returns:
            For each answer its weights, and which of them were clipped at a bound.

        Raises:
            ConfigError: if the transform refuses its settings.
        """
        padded = pad_sequence(list(scores), batch_first=True)
        lengths = torch.tensor([len(s) for s in scores])
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        scored = mask & ~padded.isnan()
        if not self.use_eos_score:
            last = torch.arange(padded.shape[1]) == lengths[:, None] - 1
            scored &= ~(last & torch.tensor(ends)[:, None])
        values = torch.where(scored, padded, 0)
        clipped = torch.zeros_like(mask)
        if self.transform is not None:
            ratio = -values if self.kind == "tis_release" else values
            named = {"keys": keys} if accepts(self.transform.target(), "keys") else {}
            values, clipped = self.transform.build(ratio, scored, side=side, **named)
        weights = torch.where(scored, values, torch.where(mask, self.eos_weight, 0.0))
        if self.normalize == "answer":
            weights = normalized(weights, mask)
        return [(w[:n], c[:n]) for w, c, n in zip(weights, clipped, lengths.tolist(), strict=True)]


class KnownScores:
    """Scores that are known before any model runs, such as those of a store: a source with ``load(dataset)``.

    Args:
        source: loads the scores of a data set.
    """

    whole_pairs = False
    runs_model = False

    def __init__(self, source: ScoreSource) -> None:
        self._source, self.kind = source, source.kind

    def bind(self, dataset: PreferenceDataset) -> None:
        """Load and check the scores of all pairs.

        Raises:
            DataError: for a score that is negative where the kind forbids it, or not finite, and if there are too few.
        """
        scores = self._source.load(dataset)
        if len(scores) != len(dataset):
            raise DataError(
                f"{type(self._source).__name__} gave scores of {len(scores)} pairs for {len(dataset)}"
            )
        has_eos, lengths = dataset.has_eos(), dataset.lengths() - dataset.starts()
        self._position = {row: i for i, row in enumerate(dataset.rows().tolist())}
        self.answers: dict[str, list[Tensor]] = {}
        for number, side in enumerate(SIDES):
            answers = [torch.from_numpy(np.asarray(pair[number])) for pair in scores]
            ends = has_eos[:, number].tolist()
            self._check(answers, lengths[:, number].tolist(), ends, dataset, side, self.kind)
            self.answers[side] = answers

    def score(self, batch: PairBatch, _models: Any = None) -> list[Tensor]:
        """See :class:`tokenpref.training.credit.live.TokenScores`."""
        nothing = torch.zeros(0)
        return [
            self.answers[side][self._position[row]] if row >= 0 else nothing for row, side in batch.answers
        ]

    @staticmethod
    def _check(
        answers: Sequence[Tensor],
        lengths: Sequence[int],
        ends: Sequence[bool],
        dataset: PreferenceDataset,
        side: str,
        kind: str,
    ) -> None:
        for index, (answer, length, has_eos) in enumerate(zip(answers, lengths, ends, strict=True)):
            if len(answer) != length:
                raise DataError(
                    f"{dataset.locate(index)}, {side}: {len(answer)} scores for {length} answer tokens"
                )
            absent = answer.isnan()
            if bool(absent[:-1].any()) or (bool(absent[-1:].any()) and not has_eos):
                token = int(absent.nonzero()[0])
                raise DataError(
                    f"{dataset.locate(index)}, {side}: token {token} has no score (nan); only EOS may have none"
                )
            bad = answer.isinf() | (answer < 0) if kind == "weight" else answer.isinf()
            if bool(bad.any()):
                token = int(bad.nonzero()[0])
                raise DataError(
                    f"{dataset.locate(index)}, {side}: token {token} has the score {float(answer[token])}; scores must be "
                    f"finite{' and, as weights, not negative' if kind == 'weight' else ''}"
                )


class TokenWeights:
    """Weights of a data set's answer tokens, made once before training from scores that are known.

    Args:
        dataset: the pairs.
        source: their scores, loaded.
        weighing: from scores to weights.

    Raises:
        ConfigError: if the transform refuses its settings.
    """

    def __init__(self, dataset: PreferenceDataset, source: KnownScores, weighing: Weighing) -> None:
        rows, has_eos = dataset.rows().tolist(), dataset.has_eos()
        self._position = {row: i for i, row in enumerate(rows)}
        self._sides: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for number, (side, answers) in enumerate(source.answers.items()):
            ends = has_eos[:, number].tolist()
            weighed: list[tuple[Tensor, Tensor]] = []
            for start in range(0, len(answers), _CHUNK):
                part = slice(start, start + _CHUNK)
                weighed += weighing(answers[part], side=side, keys=rows[part], ends=ends[part])
            self._sides[side] = weighed
        every = torch.cat([w for side in self._sides.values() for w, _ in side]).double()
        self.summary = (
            f"token weights of {len(dataset)} pairs: mean {every.mean():.3f}, "
            f"from {every.min():.3f} to {every.max():.3f}"
        )
        if bool((every < 0).any()):
            share = 100 * float((every < 0).double().mean())
            self.summary += f"; {share:.1f} % are negative, which reverses the gradient of these tokens"

    def __call__(self, batch: PairBatch) -> TransformedWeights:
        """Weights ``[2B, T]`` of a micro-batch, 0 outside the answers, and which of them were clipped at a bound."""
        nothing = (torch.zeros(0), torch.zeros(0, dtype=torch.bool))
        answers = [
            self._sides[side][self._position[row]] if row >= 0 else nothing for row, side in batch.answers
        ]
        return in_columns(answers, batch)


def in_columns(answers: Sequence[tuple[Tensor, Tensor]], batch: PairBatch) -> TransformedWeights:
    """Put vectors over answers into the columns ``[2B, T]`` of their tokens.

    Args:
        answers: weights and clipped marks of the 2B answers of a batch, in its order.
        batch: the batch.
    """
    mask = batch.labels[:, 1:] != IGNORE_INDEX
    device = batch.labels.device
    weights = torch.zeros(mask.shape, dtype=torch.float32, device=device)
    clipped = torch.zeros_like(mask)
    weights[mask] = torch.cat([w.to(device, torch.float32) for w, _ in answers])
    clipped[mask] = torch.cat([c.to(device) for _, c in answers])
    return TransformedWeights(weights, clipped)
