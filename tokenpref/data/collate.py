"""From tokenised pairs to the padded tensors of a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenpref.data.dataset import PairExample

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
    """

    tokens: Tensor
    labels: Tensor
    real: Tensor
    rows: list[int]
    num_pairs: int
    num_tokens: int

    def to(self, device: torch.device | str) -> PairBatch:
        """The same batch with its tensors on a device."""
        return PairBatch(
            tokens=self.tokens.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            real=self.real.to(device, non_blocking=True),
            rows=self.rows,
            num_pairs=self.num_pairs,
            num_tokens=self.num_tokens,
        )


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
