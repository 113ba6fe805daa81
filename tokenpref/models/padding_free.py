"""Runs the sequences of a batch through a decoder one after another, without padding.

The layers of a decoder treat each position by itself, except for attention. A batch therefore enters as the N positions of all
sequences, each with its place in its own sequence. Only the attention needs to know where sequences begin. It gets this as
:class:`Segments`, which decoders pass on unread, also when they recompute checkpointed layers.

The state of a position depends only on the tokens up to it. A prompt that both answers of a pair share, and a common beginning
of the answers, therefore enters only once, and the attention uses it for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from torch import Tensor, nn

from tokenpref.models import varlen
from tokenpref.ops import AnswerRows

__all__ = ["PackedRows", "Segments", "attention_by_segment"]


_BOUND = 1024


@dataclass(frozen=True)
class Segments:
    """Where sequences begin and end in ``[N]`` positions.

    Args:
        lengths: of the sequences, in order; M tokens in total.
        members: ``[M]``, the position (of N) of each token of the sequences; None if M = N and each token has its own.
        firsts: ``[N]``, the first of the M tokens that each position is; None with ``members``.
        ends: ``[S + 1]`` (int32), 0 and where each of the S sequences ends among the M tokens.
        own_ends: ``[S + 1]`` (int32), 0 and where each sequence's own positions end among the N. They are the last ones of the
            sequence, because only beginnings are shared.
        bound: at least the longest length.
    """

    lengths: tuple[int, ...]
    members: Tensor | None = field(default=None, compare=False)
    firsts: Tensor | None = field(default=None, compare=False)
    ends: Tensor | None = field(default=None, compare=False)
    own_ends: Tensor | None = field(default=None, compare=False)
    bound: int = field(default=0, compare=False)

    def runs(self) -> Iterator[tuple[int, int]]:
        """Runs of sequences with equal length: their number and the length."""
        for length, group in groupby(self.lengths):
            yield len(list(group)), length


@dataclass(frozen=True)
class PackedRows:
    """The positions of a batch whose output is needed, one sequence after another.

    Args:
        tokens: ``[N]`` ids.
        positions: ``[N]``, places in their sequences.
        segments: the sequences.
        answers: ``[M]``, which of the N positions predict an answer's token, in the order of :class:`AnswerRows`.
    """

    tokens: Tensor
    positions: Tensor
    segments: Segments
    answers: Tensor

    @classmethod
    def of(cls, tokens: Tensor, labels: Tensor, rows: AnswerRows, sides: int = 1) -> PackedRows:
        """The positions up to the one that predicts a sequence's last label. A sequence without labels has none.

        A batch without any label keeps one position, because every rank must run the same forwards.

        Args:
            tokens: ``[B, L]`` ids.
            labels: ``[B, L]``, -100 where no token is scored.
            rows: the answer rows of these labels.
            sides: number of blocks of B / sides rows. The i-th rows of the blocks may have a common beginning, which enters once.
        """
        places = torch.arange(rows.mask.shape[1], device=tokens.device)
        lengths = torch.where(rows.mask, places + 1, 0).amax(1)
        if rows.index.numel() == 0:
            lengths[0] = 1
        inside = places < lengths[:, None]
        # Each sequence keeps its last position, so that the attention has a query in each.
        shared = _shared(tokens[:, :-1], inside, sides) & (places < lengths[:, None] - 1)
        own = inside & ~shared
        slots = (own.flatten().cumsum(0) - 1).view(own.shape)
        slots = torch.where(
            shared, slots.unflatten(0, (sides, -1))[:1].expand(sides, -1, -1).flatten(0, 1), slots
        )
        whole = tuple(n for n in lengths.tolist() if n)
        packed = tokens[:, :-1][own]
        kept = lengths > 0
        segments = Segments(
            whole,
            ends=_ends(lengths[kept]),
            own_ends=_ends(own.sum(1)[kept]),
            # Rounded up, because a compiled layer is compiled again for another bound.
            bound=-(-max(whole) // _BOUND) * _BOUND,
        )
        if packed.numel() < sum(whole):
            segments = replace(segments, members=slots[inside], firsts=own[inside].nonzero().squeeze(1))
        return cls(
            tokens=packed,
            positions=places.expand_as(own)[own],
            segments=segments,
            answers=nn.functional.pad(slots, (0, 1)).flatten()[rows.index],
        )


def _ends(lengths: Tensor) -> Tensor:
    return nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _shared(tokens: Tensor, inside: Tensor, sides: int) -> Tensor:
    """Positions ``[B, T]`` up to which a sequence equals that of the first block's row, which computes them."""
    blocks, within = (x.unflatten(0, (sides, -1)) for x in (tokens, inside))
    alike = (blocks == blocks[:1]) & within & within[:1]
    prefix = alike.cumprod(-1).bool()
    prefix[0] = False
    return prefix.flatten(0, 1)


def attention_by_segment(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
    *,
    scale: float | None = None,
    window: int | None = None,
    plain: bool = True,
) -> Tensor:
    """Causal attention inside each sequence.

    On a GPU, in half precision, it is one call of PyTorch's attention for sequences of different lengths. It is ``attention`` for
    every run of sequences of one length elsewhere.

    Args:
        q: queries ``[N, heads, d]``.
        k: keys ``[N, heads or fewer, d]``.
        v: values of the same shape.
        segments: the sequences.
        attention: causal attention of ``[B, heads, L, d]`` queries, keys and values.
        scale: factor of the products in ``attention``; None: ``1 / sqrt(d)``.
        window: how many keys back a query sees in ``attention``, its own included; None: all.
        plain: whether scale and window are all that ``attention`` does.

    Returns:
        ``[N, heads, d]``.
    """
    if plain and varlen.takes(q, v, window):
        return _in_one_call(q, k, v, segments, scale, window)
    return _run_by_run(q, k, v, segments, attention)


def _in_one_call(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float | None, window: int | None
) -> Tensor:
    """Queries are each position's own. Keys and values are those of whole sequences, with the beginnings that they share."""
    assert segments.ends is not None and segments.own_ends is not None, "PackedRows.of makes them"
    if segments.members is not None:
        k, v = (x.index_select(0, segments.members) for x in (k, v))
    return varlen.causal_attention(
        q, k, v, segments.own_ends, segments.ends, segments.bound, scale=scale, window=window
    )


# Lengths change with every batch, and a compiled layer would be compiled again for each set of lengths.
@torch.compiler.disable
def _run_by_run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    runs = list(segments.runs())
    sizes = [count * length for count, length in runs]
    own = (q, k, v)
    whole = own if segments.members is None else [x.index_select(0, segments.members) for x in own]
    # One split instead of slices, because the backward of a slice makes a tensor of the full size.
    parts = zip(*(x.split(sizes) for x in whole), strict=True)
    outputs = []
    for (count, length), part in zip(runs, parts, strict=True):
        output = attention(*(x.unflatten(0, (count, length)).transpose(1, 2) for x in part))
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    joined = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    return joined if segments.firsts is None else joined.index_select(0, segments.firsts)
