"""From tokenised pairs to the padded tensors of a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokenpref.data.dataset import PairExample
from tokenpref.stats import SIDES

__all__ = ["IGNORE_INDEX", "PairBatch", "collate_pairs"]

IGNORE_INDEX = -100
"""Label of a token that is not scored; torchtune's and PyTorch's convention."""

# A filler answer needs one token to read and one to predict; more would only cost time.
_FILLER_LENGTH = 2


@dataclass(frozen=True)
class PairBatch:
    """A micro-batch of B pairs as 2B padded sequences.

    Attributes:
        tokens: [2B, L] int64, rows 0..B-1 the chosen side, B..2B-1 the rejected side, padded on the right.
        labels: [2B, L] int64, -100 on prompt and padding; not shifted (``tokenpref.ops`` does that).
        real: [B] bool, False for a filler pair.
        rows: row of each pair in the data set; -1 for a filler pair.
        num_pairs: number of real pairs.
        num_tokens: tokens of real pairs that are not padding, the prompt counted in both answers.
        sides: the sides that the rows hold, in their order.
    """

    tokens: Tensor
    labels: Tensor
    real: Tensor
    rows: list[int]
    num_pairs: int
    num_tokens: int
    sides: tuple[str, ...] = SIDES

    def only(self, side: str) -> PairBatch:
        """The rows of one side, cut to their longest; for a loss that reads no other."""
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

    def to(self, device: torch.device | str) -> PairBatch:
        """The same batch with its tensors on a device."""
        tensors = {
            name: getattr(self, name).to(device, non_blocking=True) for name in ("tokens", "labels", "real")
        }
        return replace(self, **tensors)


def collate_pairs(examples: Sequence[PairExample], pad_id: int, filler: bool = False) -> PairBatch:
    """Pad pairs on the right to the longest sequence among them.

    Args:
        examples: the pairs; may be empty with ``filler``.
        pad_id: token id of the padding. Causal attention keeps real tokens from seeing it and its labels are -100, so
            any valid id does.
        filler: give a rank without pairs one masked pair, so that it runs the same forward and backward as
            the other ranks. Without effect when there are pairs.

    Returns:
        The batch.

    Raises:
        ValueError: if there is no pair and no filler is asked for.
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
    tokens = torch.full((len(sides), max(len(ids) for ids, _ in sides)), pad_id, dtype=torch.int64)
    labels = torch.full_like(tokens, IGNORE_INDEX)
    for row, (ids, start) in enumerate(sides):
        values = torch.tensor(ids, dtype=torch.int64)
        tokens[row, : len(ids)] = values
        labels[row, start : len(ids)] = values[start:]
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
