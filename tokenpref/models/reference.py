"""What the policy is compared with: a second frozen model, the policy with its adapters switched off, or stored results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tokenpref.data import PairBatch
from tokenpref.data.reference_store import ReferenceStore
from tokenpref.distributed import unsharded
from tokenpref.models.scoring import ScoringModel
from tokenpref.ops import AnswerRows

__all__ = [
    "KL_STATISTICS",
    "CachedReference",
    "FrozenReference",
    "NoReference",
    "Reference",
    "ReferenceOutput",
]

KL_STATISTICS = frozenset({"kl_ref_policy", "kl_policy_ref"})


@dataclass(frozen=True)
class ReferenceOutput:
    """The reference's side of a micro-batch: its own log-probabilities, or what the KL terms are made from.

    Args:
        logps: per-token log-probabilities ``[2B, T]``.
        hidden: last hidden states ``[N, D]`` at the positions that predict the answers' tokens, as
            :meth:`tokenpref.models.ScoringModel.answer_hidden` returns them.
        head_weight: LM head ``[V, D]``, whole for as long as the context is open; None where it is the policy's own.
    """

    logps: Tensor | None = None
    hidden: Tensor | None = None
    head_weight: Tensor | None = None


class Reference(Protocol):
    """Anything that can stand for pi_ref: a frozen copy, a switched-off adapter, a cache."""

    provides: frozenset[str]
    """Statistics that it can serve, of ``ref``, ``kl_ref_policy``, ``kl_policy_ref``."""

    def outputs(self, batch: PairBatch, needs: frozenset[str]) -> AbstractContextManager[ReferenceOutput]:
        """The reference's side of ``batch``; the policy's forward and backward run inside the context."""
        ...


class FrozenReference:
    """A model that never trains: a second one, or the policy with its adapters switched off.

    Args:
        scorer: the frozen model, or :meth:`tokenpref.models.ScoringModel.base` of the policy.
        shares_head: whether the head is the policy's own, as in the second case. It is frozen then.
    """

    provides: frozenset[str] = KL_STATISTICS | {"ref"}

    def __init__(self, scorer: ScoringModel, *, shares_head: bool = False) -> None:
        self.scorer = scorer
        self.shares_head = shares_head

    @contextmanager
    def outputs(self, batch: PairBatch, needs: frozenset[str]) -> Iterator[ReferenceOutput]:
        """Hidden states and head while a KL is needed, log-probabilities when they suffice."""
        sides = len(batch.sides)
        if not needs & self.provides:
            yield ReferenceOutput()
        elif not needs & KL_STATISTICS:
            yield ReferenceOutput(logps=self.scorer.logps(batch.tokens, batch.labels, sides=sides))
        else:
            with torch.no_grad():
                hidden = self.scorer.answer_hidden(batch.tokens, batch.labels, sides=sides)
            if self.shares_head:
                yield ReferenceOutput(hidden=hidden)
                return
            # The backward recomputes the reference's logits from this weight: it stays whole until the context ends.
            with unsharded(self.scorer.model):
                yield ReferenceOutput(hidden=hidden, head_weight=self.scorer.head_weight.detach())


class CachedReference:
    """What a reference said of a data set, read from the disk: no model, and no forward.

    Args:
        store: its log-probabilities, or its last hidden states, of all answers.
        head_weight: for hidden states the LM head ``[V, D]``, on the device of the batches.
    """

    def __init__(self, store: ReferenceStore, head_weight: Tensor | None = None) -> None:
        self.store = store
        self._head_weight = head_weight
        self.provides: frozenset[str] = frozenset({"ref"}) | (
            KL_STATISTICS if head_weight is not None else frozenset()
        )

    @contextmanager
    def outputs(self, batch: PairBatch, needs: frozenset[str]) -> Iterator[ReferenceOutput]:
        """What is stored of the batch's answers.

        Raises:
            ValueError: if a statistic is needed that the store cannot give, or the batch is not of the store's data.
        """
        wanted = needs & FrozenReference.provides
        if lacking := sorted(wanted - self.provides):
            raise ValueError(
                f"{', '.join(lacking)} needed, but {self.store.layout.path} holds {self.store.layout.kind}; a KL needs hidden"
            )
        if not wanted:
            yield ReferenceOutput()
            return
        rows = AnswerRows.of(batch.labels)
        values = self._values(batch, rows).to(batch.labels.device)
        if self._head_weight is None:
            yield ReferenceOutput(logps=rows.put(values))
        else:
            yield ReferenceOutput(hidden=values, head_weight=self._head_weight)

    def _values(self, batch: PairBatch, rows: AnswerRows) -> Tensor:
        """``[N]`` or ``[N, D]``, answer by answer, as :class:`AnswerRows` has them."""
        width = self.store.width
        found = [torch.empty((0,) if width is None else (0, width), dtype=self.store.dtype)]
        answers = [(row, side) for side in batch.sides for row in batch.rows]
        for (row, side), count in zip(answers, rows.mask.sum(1).tolist(), strict=True):
            if row < 0:
                continue
            found.append(self.store.answer(row, side))
            if len(found[-1]) != count:
                raise ValueError(
                    f"the {side} answer of row {row} has {count} tokens and {len(found[-1])} in {self.store.layout.path}; it is "
                    "of another data set"
                )
        return torch.cat(found)


class NoReference:
    """For losses that compare the policy with nothing, such as a likelihood: no second model is loaded."""

    provides: frozenset[str] = frozenset()

    @contextmanager
    def outputs(self, batch: PairBatch, needs: frozenset[str]) -> Iterator[ReferenceOutput]:
        """Nothing.

        Raises:
            ValueError: if a statistic of the reference is needed.
        """
        if asked := sorted(needs & FrozenReference.provides):
            raise ValueError(f"{', '.join(asked)} needed, but this run has no reference")
        yield ReferenceOutput()
