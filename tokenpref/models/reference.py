"""What the policy is compared with: an interface, and its first form, a second frozen copy of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tokenpref.data import PairBatch
from tokenpref.distributed import unsharded
from tokenpref.models.scoring import ScoringModel

__all__ = ["KL_STATISTICS", "FrozenReference", "NoReference", "Reference", "ReferenceOutput"]

KL_STATISTICS = frozenset({"kl_ref_policy", "kl_policy_ref"})


@dataclass(frozen=True)
class ReferenceOutput:
    """The reference's side of a micro-batch: its own log-probabilities, or what the KL terms are made from.

    Args:
        logps: per-token log-probabilities ``[2B, T]``.
        hidden: last hidden states ``[N, D]`` at the positions that predict the answers' tokens, as
            :meth:`tokenpref.models.ScoringModel.answer_hidden` returns them.
        head_weight: LM head ``[V, D]``, whole for as long as the context is open.
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
    """A second model that never trains.

    Args:
        scorer: the frozen model.
    """

    provides: frozenset[str] = KL_STATISTICS | {"ref"}

    def __init__(self, scorer: ScoringModel) -> None:
        self.scorer = scorer

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
            # The backward recomputes the reference's logits from this weight: it stays whole until the context ends.
            with unsharded(self.scorer.model):
                yield ReferenceOutput(hidden=hidden, head_weight=self.scorer.head.weight.detach())


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
