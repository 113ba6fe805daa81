"""Makes the padded tensors of a micro-batch from tokenised pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenpref.data.dataset import PairExample
from tokenpref.stats import SIDES

__all__ = ["IGNORE_INDEX", "AnchorBatch", "Answer", "PairBatch", "collate_anchors", "collate_pairs", "padded"]

Answer = tuple[list[int], int]
"""The token ids of prompt and answer, and the index of the answer's first token."""

IGNORE_INDEX = -100
"""The label of a token that is not scored, as in torchtune and PyTorch."""

# A filler needs one input token and one token to predict; more would only take time.
_FILLER_LENGTH = 2


@dataclass(frozen=True)
class PairBatch:
    """A micro-batch of B pairs as 2B padded sequences.

    Attributes:
        tokens: [2B, L] int64, rows 0..B-1 the chosen side, B..2B-1 the rejected side, padded on the right.
        labels: [2B, L] int64, -100 on prompt and padding; not shifted (``tokenpref.ops`` does that).
        real: [B] bool, False for a filler pair.
        rows: the row of each pair in the data set; -1 for a filler pair.
        num_pairs: number of real pairs.
        num_tokens: tokens of real pairs without padding; a prompt counts in both answers.
        sides: the sides of the rows, in order.
        row_sides: for a batch whose answers are no whole pairs: the side of each answer. ``rows`` then has one entry for each.
    """

    tokens: Tensor
    labels: Tensor
    real: Tensor
    rows: list[int]
    num_pairs: int
    num_tokens: int
    sides: tuple[str, ...] = SIDES
    row_sides: tuple[str, ...] = ()

    @property
    def answers(self) -> list[tuple[int, str]]:
        """The row in the data set (-1 for a filler) and the side of each row of ``tokens``."""
        if self.row_sides:
            return list(zip(self.rows, self.row_sides, strict=True))
        return [(row, side) for side in self.sides for row in self.rows]

    def only(self, side: str) -> PairBatch:
        """The rows of one side, cut to the longest of them, for a loss that uses no other side."""
        count = len(self.rows)
        part = slice(0, count) if side == self.sides[0] else slice(count, 2 * count)
        labels = self.labels[part]
        places = torch.arange(1, labels.shape[1] + 1, device=labels.device)
        lengths = torch.where(labels != IGNORE_INDEX, places, 0).amax(1)
        longest = max(int(lengths.max()), _FILLER_LENGTH)
        return replace(
            self,
            tokens=self.tokens[part, :longest],
            labels=labels[:, :longest],
            num_tokens=int(lengths[self.real].sum()),
            sides=(side,),
        )

    def with_anchors(self, anchors: AnchorBatch) -> PairBatch:
        """The pairs with their anchors as a third block of rows, for a single forward. The counts remain those of the pairs."""
        width = max(self.tokens.shape[1], anchors.tokens.shape[1])
        return replace(
            self,
            # Padding on the right is neither attended to nor scored, so any valid token id will do.
            tokens=torch.cat([_widened(t, width, 0) for t in (self.tokens, anchors.tokens)]),
            labels=torch.cat([_widened(t, width, IGNORE_INDEX) for t in (self.labels, anchors.labels)]),
            sides=(*self.sides, "anchor"),
        )

    def answer_ids(self, side: str) -> list[list[int]]:
        """The token ids of the answers of one side."""
        count = len(self.rows)
        labels = self.labels[self.sides.index(side) * count :][:count]
        return [row[row != IGNORE_INDEX].tolist() for row in labels]

    def to(self, device: torch.device | str) -> PairBatch:
        """The same batch with its tensors on a device."""
        tensors = {
            name: getattr(self, name).to(device, non_blocking=True) for name in ("tokens", "labels", "real")
        }
        return replace(self, **tensors)


@dataclass(frozen=True)
class AnchorBatch:
    """Third answers to the prompts of a micro-batch.

    Attributes:
        tokens: [B, L] int64, padded on the right.
        labels: [B, L] int64, -100 on prompt and padding.
        metrics: [B] each: ``anchors/tokens`` (length of the answer), ``anchors/empty``, ``anchors/equal_chosen``,
            ``anchors/equal_rejected`` (1 or 0).
    """

    tokens: Tensor
    labels: Tensor
    metrics: dict[str, Tensor]


def collate_anchors(answers: Sequence[Answer | None], batch: PairBatch, pad_id: int) -> AnchorBatch:
    """Pad the anchors of a micro-batch, and compare them with the answers of their pairs.

    Args:
        answers: an anchor for each pair; None for a filler.
        batch: the pairs.
        pad_id: token id of the padding.

    Returns:
        The anchors, on the batch's device.
    """
    filler: Answer = ([pad_id] * _FILLER_LENGTH, _FILLER_LENGTH)
    given = [filler if answer is None else answer for answer in answers]
    tokens, labels = padded(given, pad_id)
    ids = [ids[start:] for ids, start in given]
    metrics = {
        "anchors/tokens": [float(len(answer)) for answer in ids],
        "anchors/empty": [float(not answer) for answer in ids],
        **{
            f"anchors/equal_{side}": [float(a == b) for a, b in zip(ids, batch.answer_ids(side), strict=True)]
            for side in SIDES
        },
    }
    device = batch.tokens.device
    return AnchorBatch(
        tokens.to(device),
        labels.to(device),
        {name: torch.tensor(values, device=device) for name, values in metrics.items()},
    )


def padded(answers: Sequence[Answer], pad_id: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels ``[N, L]`` of answers, padded on the right; labels are -100 on prompt and padding."""
    # Without a second token there is no column to score, and all ranks must run the same forwards.
    width = max(_FILLER_LENGTH, *(len(ids) for ids, _ in answers))
    tokens = torch.full((len(answers), width), pad_id, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORE_INDEX)
    for row, (ids, start) in enumerate(answers):
        values = torch.tensor(ids, dtype=torch.int64)
        tokens[row, : len(ids)] = values
        labels[row, start : len(ids)] = values[start:]
    return tokens, labels


def _widened(values: Tensor, width: int, fill: int) -> Tensor:
    return F.pad(values, (0, width - values.shape[1]), value=fill)


def collate_pairs(examples: Sequence[PairExample], pad_id: int, filler: bool = False) -> PairBatch:
    """Pad pairs on the right to the longest sequence among them.

    Args:
        examples: the pairs; may be empty with ``filler``.
        pad_id: token id of the padding. Real tokens do not attend to it, because attention is causal, and its labels are
            -100. Any valid id will do.
        filler: give a rank without pairs one masked pair, so that it runs the same forward and backward pass as
            the other ranks. It has no effect if there are pairs.

    Returns:
        The batch.

    Raises:
        ValueError: if there is no pair and ``filler`` is False.
    """
    if not examples:
        if not filler:
            raise ValueError(
                "no pairs to collate; pass filler=True to get a masked pair for a rank that has none"
            )
        return _filler_batch(pad_id)
    sides = [(e.chosen_ids, e.chosen_start) for e in examples] + [
        (e.rejected_ids, e.rejected_start) for e in examples
    ]
    tokens, labels = padded(sides, pad_id)
    return PairBatch(
        tokens=tokens,
        labels=labels,
        real=torch.ones(len(examples), dtype=torch.bool),
        rows=[e.row for e in examples],
        num_pairs=len(examples),
        num_tokens=sum(len(ids) for ids, _ in sides),
    )


def _filler_batch(pad_id: int) -> PairBatch:
    tokens = torch.full((2, _FILLER_LENGTH), pad_id, dtype=torch.int64)
    return PairBatch(
        tokens=tokens,
        labels=torch.full_like(tokens, IGNORE_INDEX),
        real=torch.zeros(1, dtype=torch.bool),
        rows=[-1],
        num_pairs=0,
        num_tokens=0,
    )
