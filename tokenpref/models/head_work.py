"""What a micro-batch asks of the LM head, whole or for some of its pairs at a time.

A loss is one number a pair. So a group of pairs can go all the way, from logits to the loss and back to the gradients of hidden
states and head, before the next group's logits are made: what the backward needs of the vocabulary is kept for one group
alone, and mostly fits where that of the whole micro-batch would have to be computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tokenpref.ops import AnswerRows, HeadRoom, score_tokens
from tokenpref.ops.answers import check_shapes, needs_of_rows
from tokenpref.ops.linear import fits, sums_in_place
from tokenpref.stats import TokenStats

__all__ = ["Head", "HeadWork", "PairsLoss", "loss_by_groups", "values_by_groups"]

PairsLoss = Callable[[TokenStats, slice], Tensor]
"""What some pairs, rows side by side as in the micro-batch, add to a step's loss: a scalar; the slice says which pairs.

Gradients reach the model alone: what else it is made of gets none where pairs come in groups.
"""


@dataclass(frozen=True)
class Head:
    """The policy's head, as long as its weight is whole.

    Args:
        weight: ``[V, D]``.
        memory_mb: MiB for logits; see :func:`tokenpref.ops.linear_token_stats`.
        room: memory that stays from step to step.
        compiled: whether the passes over its logits are compiled.
    """

    weight: Tensor
    memory_mb: float
    room: HeadRoom
    compiled: bool = False


@dataclass(frozen=True)
class HeadWork:
    """What the statistics of some rows are made of, beside the policy's hidden states and head.

    Args:
        labels: ``[B, L]`` ids, -100 where no token is scored.
        needs: statistics wanted beside the log-probabilities; held are those that are computed from hidden states.
        sides: blocks that the B rows consist of; the i-th rows of all blocks are a pair.
        ref_logps: ``[B, L-1]``, if the reference scored itself.
        ref_hidden: the reference's last hidden states ``[N, D']`` of the scored positions, row by row.
        ref_head_weight: its head ``[V, D']``.
        weights: token weights ``[B, L-1]``.

    Raises:
        ValueError: for wrong shapes, unknown names in ``needs``, or a reference that does not serve them.
    """

    labels: Tensor
    needs: frozenset[str]
    sides: int = 1
    ref_logps: Tensor | None = None
    ref_hidden: Tensor | None = None
    ref_head_weight: Tensor | None = None
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        given = {"weights": self.weights, "ref_logps": self.ref_logps}
        check_shapes(self.labels, {}, given)
        object.__setattr__(self, "needs", needs_of_rows(self.needs, self.ref_hidden, self.ref_logps))

    @cached_property
    def rows(self) -> AnswerRows:
        """The scored positions."""
        return AnswerRows.of(self.labels)

    @property
    def pairs(self) -> int:
        """How many there are."""
        return self.labels.shape[0] // self.sides

    @cached_property
    def _counts(self) -> list[int]:
        """Scored positions of each row."""
        counts: list[int] = self.rows.mask.sum(1).tolist()
        return counts

    def values(self, hidden: Tensor, head: Head, add_to: Tensor | None = None) -> dict[str, Tensor]:
        """Statistics ``[N]`` from the policy's hidden states ``[N, D]``; ``add_to`` as in :func:`tokenpref.ops.score_tokens`."""
        return score_tokens(
            hidden,
            head.weight,
            self.rows.targets,
            ref_hidden=self.ref_hidden,
            ref_head_weight=self.ref_head_weight,
            needs=self.needs,
            memory_mb=head.memory_mb,
            room=head.room,
            add_to=add_to,
            compiled=head.compiled,
        )

    def token_stats(self, values: Mapping[str, Tensor]) -> TokenStats:
        """These in their places."""
        return self.rows.token_stats(values, self.ref_logps, self.weights)

    def of_pairs(self, pairs: slice) -> HeadWork:
        """The same for some of the pairs."""

        def rows(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.unflatten(0, (self.sides, -1))[:, pairs].flatten(0, 1)

        labels = rows(self.labels)
        assert labels is not None
        return replace(
            self,
            labels=labels,
            ref_logps=rows(self.ref_logps),
            ref_hidden=None if self.ref_hidden is None else torch.cat(self.parts(self.ref_hidden, pairs)),
            weights=rows(self.weights),
        )

    def parts(self, per_position: Tensor, pairs: slice) -> list[Tensor]:
        """Views of ``[N, X]``: the scored positions of some pairs, a side each."""
        found = []
        for side in range(self.sides):
            first = side * self.pairs
            start = sum(self._counts[: first + pairs.start])
            count = sum(self._counts[first + pairs.start : first + pairs.stop])
            found.append(per_position[start : start + count])
        return found

    def groups(self, hidden: Tensor, head: Head) -> list[slice]:
        """As few groups of neighbouring pairs as keep all that their backwards need, but at least a pair each.

        One group where the head's gradient is rounded, as sums over groups must not be. Whether anything wants a gradient does
        not matter: policy and reference shall make the same products, so that equal models give equal numbers (but for a loss
        that takes all pairs together: its policy's products are those of all rows).
        """
        if not sums_in_place(hidden, head.weight):
            return self.whole()
        sizes = [sum(self._counts[pair :: self.pairs]) for pair in range(self.pairs)]
        groups, start = [], 0
        for pair in range(1, self.pairs):
            rows = sum(sizes[start : pair + 1])
            if not fits(rows, hidden, head.weight, self.needs, head.memory_mb, compiled=head.compiled):
                groups.append(slice(start, pair))
                start = pair
        return [*groups, slice(start, self.pairs)]

    def whole(self) -> list[slice]:
        """All pairs in one group."""
        return [slice(0, self.pairs)]


def values_by_groups(work: HeadWork, hidden: Tensor, head: Head) -> dict[str, Tensor]:
    """:meth:`HeadWork.values` of all pairs, without gradient, from the products that :func:`loss_by_groups` makes."""
    groups = work.groups(hidden, head)
    if len(groups) == 1:
        return work.values(hidden, head)
    found: dict[str, Tensor] = {}
    for group in groups:
        part = work.of_pairs(group)
        for name, values in part.values(torch.cat(work.parts(hidden, group)), head).items():
            own = found.setdefault(name, values.new_empty(hidden.shape[0]))
            _put(values, work.parts(own, group))
    return found


def loss_by_groups(
    work: HeadWork, hidden: Tensor, head: Head, loss: PairsLoss, *, together: bool = False
) -> Tensor:
    """The sum of what ``loss`` makes of all pairs, a scalar to go back from (once).

    Args:
        work: of the micro-batch.
        hidden: the policy's last hidden states ``[N, D]`` of its scored positions.
        head: the policy's head.
        loss: is called once for each group of pairs, in their order; its graph is gone when the next one's begins.
        together: one group of all pairs, whatever the memory holds.
    """
    # A frozen body wants the head's gradient alone: the gradient of the hidden states, which groups make, would be for nothing.
    together |= torch.is_grad_enabled() and not hidden.requires_grad
    groups = work.whole() if together else work.groups(hidden, head)
    if len(groups) == 1:
        return loss(work.token_stats(work.values(hidden, head)), groups[0])
    total = hidden.new_zeros(())
    grad_hidden, grad_weight = torch.zeros_like(hidden), None
    for group in groups:
        own, of_states, of_weight = _one_group(work, group, hidden, head, loss, grad_weight)
        total = total + own
        grad_weight = of_weight if grad_weight is None else grad_weight
        if of_states is not None:
            _put(of_states, work.parts(grad_hidden, group))
    settled: Tensor = _Settled.apply(hidden, head.weight, total, grad_hidden, grad_weight)
    return settled


def _one_group(
    work: HeadWork, group: slice, hidden: Tensor, head: Head, loss: PairsLoss, grad_weight: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A group's part of the loss, its gradient of the group's hidden states, and that of the head unless it was added to one.

    A function of its own, so that nothing of the graph, and of what it keeps, is left when the next group begins.
    """
    part = work.of_pairs(group)
    states = torch.cat(work.parts(hidden.detach(), group)).requires_grad_()
    # The first group makes the head's gradient, the others add to it.
    weight = head.weight.detach().requires_grad_(head.weight.requires_grad and grad_weight is None)
    values = part.values(states, replace(head, weight=weight), add_to=grad_weight)
    own = loss(part.token_stats(values), group)
    if not own.requires_grad:  # no gradient is wanted, or these pairs have none
        return own, None, None
    wanted = [states, weight] if weight.requires_grad else [states]
    of_states, *of_weight = torch.autograd.grad(own, wanted, allow_unused=True)
    return own.detach(), of_states, of_weight[0] if of_weight else None


def _put(values: Tensor, places: Sequence[Tensor]) -> None:
    for value, place in zip(values.split([len(place) for place in places]), places, strict=True):
        place.copy_(value)


class _Settled(torch.autograd.Function):
    """A loss whose gradients of hidden states and head are known."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        total: Tensor,
        grad_hidden: Tensor,
        grad_weight: Tensor | None,
    ) -> Tensor:
        # Not saved for autograd's hooks, which would copy the head's gradient to where activations are offloaded.
        ctx.grads = (grad_hidden, grad_weight)
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("this loss was gone back from before, and its gradients went with that")
        grads, ctx.grads = ctx.grads, None
        return *(None if own is None else own.mul_(grad) for own in grads), None, None, None
