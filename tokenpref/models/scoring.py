"""Token statistics out of a torchtune decoder, with the LM head inside the root's forward.

FSDP2 hands a module its whole weights only inside that module's forward. The head therefore runs where the decoder
calls its output layer: :class:`StatsHead` takes that place and turns the last hidden states into per-token
statistics, so that ``[B, L, V]`` logits never exist and FSDP2 reduces the head's gradient like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenpref._torchtune import TiedLinear, TransformerDecoder
from tokenpref.models.head_work import Head, HeadWork, PairsLoss, loss_by_groups, values_by_groups
from tokenpref.models.lean import keep_layers_lean
from tokenpref.models.padding_free import PackedRows, install_segments
from tokenpref.ops import DEFAULT_MEMORY_MB, HeadRoom
from tokenpref.stats import TokenStats

__all__ = ["ScoringModel", "StatsHead", "install_head", "logits_of", "next_token_logits"]

HeadJob = Callable[[Tensor, Tensor], Any]
"""What to make of the last hidden states ``[B, L, D]`` and the head's weight ``[V, D]``."""


class StatsHead:
    """Stands in for the decoder's output layer; returns logits unless a job is set.

    A plain object, not an ``nn.Module``: the names in the model's state dict stay as they are.

    Args:
        inner: the decoder's own output layer: ``nn.Linear`` without bias, or torchtune's ``TiedLinear``.

    Raises:
        TypeError: for any other output layer (soft-capped logits, adapters), whose numbers would differ.
    """

    def __init__(self, inner: nn.Linear | TiedLinear) -> None:
        if not isinstance(inner, (nn.Linear, TiedLinear)) or getattr(inner, "bias", None) is not None:
            raise TypeError(
                f"the model's output layer is {type(inner).__name__}; token statistics need a plain linear head "
                "without bias (nn.Linear or torchtune's TiedLinear)"
            )
        self.inner = inner
        self.job: HeadJob | None = None

    @property
    def weight(self) -> Tensor:
        """The head's weight ``[V, D]``; whole only while the root's parameters are gathered."""
        return self.inner.tied_module.weight if isinstance(self.inner, TiedLinear) else self.inner.weight

    def __call__(self, hidden: Tensor) -> Any:
        """Logits ``[B, L, V]``, or what the current job makes of ``hidden``."""
        if self.job is None:
            return F.linear(hidden, self.weight)
        return self.job(hidden, self.weight)


def install_head(model: TransformerDecoder) -> StatsHead:
    """Put a :class:`StatsHead` in the place of ``model.output`` (once; later calls return the same head).

    Raises:
        TypeError: see :class:`StatsHead`.
    """
    head = model.__dict__.get("_stats_head")
    if head is not None:
        return head
    head = StatsHead(model.output)
    if isinstance(model.output, nn.Module):
        # The layer stays registered, so that "output.weight" stays in the state dict; only its forward changes.
        model.output.forward = head.__call__
    else:
        model.output = head
    model.set_num_output_chunks(1)  # the decoder then returns [output(h)] without an upcast to float32
    model.__dict__["_stats_head"] = head
    return head


def logits_of(model: nn.Module, tokens: Tensor, **kwargs: Any) -> Tensor:
    """Logits ``[B, L, V]`` of a decoder in its own dtype, whether or not a head is installed.

    Args:
        model: a torchtune decoder.
        tokens: token ids ``[B, L]``.
        kwargs: handed to the decoder (``mask``, ``input_pos``).
    """
    output = model(tokens, **kwargs)
    return output[0] if isinstance(output, list) else output


def next_token_logits(model: TransformerDecoder, tokens: Tensor, **kwargs: Any) -> Tensor:
    """Logits ``[B, V]`` of the token after the last one; the head sees that position alone.

    Args:
        model: a torchtune decoder.
        tokens: token ids ``[B, L]``, left padded where they differ in length.
        kwargs: handed to the decoder (``mask``, ``input_pos``).
    """
    head = install_head(model)
    head.job = lambda hidden, weight: F.linear(hidden[:, -1], weight)
    try:
        logits: Tensor = model(tokens, **kwargs)[0]
    finally:
        head.job = None
    return logits


class ScoringModel:
    """A decoder and its head: hidden states, log-probabilities and token statistics of batches.

    Args:
        model: a torchtune decoder, sharded or not.
        head_memory_mb: MiB for logits; see :func:`tokenpref.ops.linear_token_stats`.
        padding_free: score sequences one after another, so that nothing is computed for padding; see
            :mod:`tokenpref.models.padding_free`. False: padded batches, which any decoder takes.
        compiled: compile the passes over the head's logits; see :func:`tokenpref.ops.linear_token_stats`.

    Raises:
        TypeError: for a model without a plain linear head, or with an attention that only takes padded batches.
    """

    def __init__(
        self,
        model: TransformerDecoder,
        *,
        head_memory_mb: float = DEFAULT_MEMORY_MB,
        padding_free: bool = True,
        compiled: bool = False,
    ) -> None:
        self.model = model
        self.head = install_head(model)
        self.head_memory_mb = head_memory_mb
        self.padding_free = padding_free
        self.compiled = compiled
        self._room = HeadRoom()
        keep_layers_lean(model)
        if padding_free:
            install_segments(model)

    @contextmanager
    def _job(self, job: HeadJob) -> Iterator[None]:
        self.head.job = job
        try:
            yield
        finally:
            self.head.job = None

    def run(self, tokens: Tensor, job: HeadJob, **kwargs: Any) -> Any:
        """One forward, in which ``job`` takes the head's place.

        Args:
            tokens: ``[B, L]`` ids, right padded.
            job: last hidden states ``[B, L, D]`` and the head's weight ``[V, D]``, whole inside the call alone, to what
                is returned. Under FSDP2 what it returns has to be a tensor or a dict of tensors: their backward is hooked.
            kwargs: handed to the decoder (``mask``, ``input_pos``).
        """
        with self._job(job):
            return self.model(tokens, **kwargs)[0]

    def hidden(self, tokens: Tensor) -> Tensor:
        """Last hidden states ``[B, L, D]``, after the final norm."""
        hidden: Tensor = self.run(tokens, lambda hidden, _weight: hidden)
        return hidden

    def answer_hidden(self, tokens: Tensor, labels: Tensor, *, sides: int = 1) -> Tensor:
        """Last hidden states ``[N, D]`` at the positions that predict the labelled tokens.

        Args:
            tokens: ``[B, L]`` ids, right padded.
            labels: ``[B, L]`` ids, -100 where no token is scored.
            sides: as in :meth:`token_stats`.

        Returns:
            Row by row, in the order of the tokens.
        """
        work = HeadWork(labels, frozenset(), sides)
        hidden: Tensor = self._answers(tokens, work, lambda hidden, _weight: hidden)
        return hidden

    def _answers(self, tokens: Tensor, work: HeadWork, job: HeadJob) -> Any:
        """One forward, in which ``job`` gets the hidden states ``[N, D]`` of the answers' positions."""
        if not self.padding_free:
            return self.run(tokens, lambda hidden, weight: job(work.rows.take(hidden), weight))
        packed = PackedRows.of(tokens, work.labels, work.rows, work.sides)
        longest = max(packed.segments.lengths)
        if longest > self.model.max_seq_len:
            raise ValueError(
                f"a sequence has {longest} tokens and the model's context is {self.model.max_seq_len}"
            )
        return self.run(
            packed.tokens,
            lambda hidden, weight: job(hidden.squeeze(1).index_select(0, packed.answers), weight),
            mask=packed.segments,
            input_pos=packed.positions,
        )

    def token_stats(
        self,
        tokens: Tensor,
        labels: Tensor,
        *,
        needs: frozenset[str],
        ref_logps: Tensor | None = None,
        ref_hidden: Tensor | None = None,
        ref_head_weight: Tensor | None = None,
        weights: Tensor | None = None,
        sides: int = 1,
    ) -> TokenStats:
        """Statistics of the labelled tokens; see :func:`tokenpref.ops.linear_token_stats`.

        Args:
            tokens: ``[B, L]`` ids, right padded.
            labels: ``[B, L]`` ids, -100 where no token is scored.
            needs: names of the statistics wanted beside the log-probabilities.
            ref_logps: the reference's per-token log-probabilities ``[B, L-1]``, if it scored itself.
            ref_hidden: the reference's last hidden states ``[N, D']`` as :meth:`answer_hidden` returns them, for the KL terms.
            ref_head_weight: the reference's head ``[V, D']``.
            weights: token weights ``[B, L-1]``.
            sides: what the B rows are made of: so many blocks, whose i-th rows answer one prompt. Where sequences are not padded,
                what they begin with alike is computed once.

        Returns:
            Token statistics with ``T = L - 1`` columns; gradients flow to the model.
        """
        work = HeadWork(
            labels,
            needs,
            ref_logps=ref_logps,
            ref_hidden=ref_hidden,
            ref_head_weight=ref_head_weight,
            weights=weights,
            sides=sides,
        )

        return self.stats_of(tokens, work)

    def stats_of(self, tokens: Tensor, work: HeadWork) -> TokenStats:
        """:meth:`token_stats` of what ``work`` asks for."""

        # A dict of tensors: FSDP2 looks for the tensors in a forward's output to hook its backward.
        def job(hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
            values_of = HeadWork.values if torch.is_grad_enabled() else values_by_groups
            return values_of(work, hidden, self._head(weight))

        return work.token_stats(self._answers(tokens, work, job))

    def pairs_loss(
        self, tokens: Tensor, work: HeadWork, loss: PairsLoss, *, together: bool = False
    ) -> Tensor:
        """The sum of a loss over the pairs of a batch, to go back from once.

        The loss is computed beside the head, for as many pairs at a time as leave in ``head_memory_mb`` what their backward
        needs, and its gradients of hidden states and head are known before the next pairs' logits are made.

        Args:
            tokens: ``[B, L]`` ids, right padded.
            work: what the loss needs of them.
            loss: from the statistics of some pairs to the scalar that they add.
            together: all pairs at once, for a loss that looks beyond a pair; otherwise the memory says how many come at a time.

        Returns:
            The sum, a scalar; gradients flow to the model.
        """

        def job(hidden: Tensor, weight: Tensor) -> Tensor:
            return loss_by_groups(work, hidden, self._head(weight), loss, together=together)

        total: Tensor = self._answers(tokens, work, job)
        return total

    def _head(self, weight: Tensor) -> Head:
        return Head(weight, self.head_memory_mb, self._room, self.compiled)

    @torch.no_grad()
    def logps(self, tokens: Tensor, labels: Tensor, *, sides: int = 1) -> Tensor:
        """Log-probabilities ``[B, L-1]`` of the labelled tokens, without gradient; 0 elsewhere. ``sides`` as above."""
        return self.token_stats(tokens, labels, needs=frozenset(), sides=sides).policy_logps
