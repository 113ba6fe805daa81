"""Selects the rows to score from the labels, and scatters scored rows back to ``[B, T]``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from tokenpref._checks import check_known
from tokenpref.ops.closed_form import KL_STATISTICS
from tokenpref.stats import NEEDS, TokenStats

__all__ = ["AnswerRows", "check_needs", "check_reference", "check_shapes", "needs_of_rows"]

IGNORE_INDEX = -100


@dataclass(frozen=True)
class AnswerRows:
    """The positions whose next token belongs to an answer. All other positions are ignored.

    Args:
        index: ``[N]`` int64, row numbers in a flattened ``[B * L]``.
        targets: ``[N]`` int64, the token that each of them predicts.
        mask: ``[B, T]`` bool with T = L - 1.
    """

    index: Tensor
    targets: Tensor
    mask: Tensor

    @classmethod
    def of(cls, labels: Tensor) -> AnswerRows:
        """Rows of ``labels`` ``[B, L]``, -100 where nothing is scored: position t predicts label t + 1."""
        mask = labels[:, 1:] != IGNORE_INDEX
        index = F.pad(mask, (0, 1)).flatten().nonzero().squeeze(-1)
        return cls(index, labels.flatten()[index + 1], mask)

    def take(self, per_position: Tensor) -> Tensor:
        """Rows ``[N, X]`` of ``[B, L, X]``; the gradient of all other rows is exactly 0."""
        return per_position.flatten(0, 1).index_select(0, self.index)

    def put(self, values: Tensor) -> Tensor:
        """Scatter values ``[N]`` to their places in ``[B, T]``, with 0 elsewhere."""
        batch, columns = self.mask.shape
        flat = values.new_zeros(batch * (columns + 1)).index_copy(0, self.index, values)
        return flat.view(batch, columns + 1)[:, :-1]

    def token_stats(
        self, values: Mapping[str, Tensor], ref_logps: Tensor | None, weights: Tensor | None
    ) -> TokenStats:
        """:class:`TokenStats` from values of rows and from the caller's values ``[B, T]``."""
        fields = {name: self.put(value) for name, value in values.items()}
        if ref_logps is not None:
            fields["ref_logps"] = ref_logps
        return TokenStats(mask=self.mask, weights=weights, **fields)


def check_needs(needs: frozenset[str]) -> frozenset[str]:
    """The names that ops compute. "weights" and "anchor" are checked by the loss.

    Raises:
        ValueError: for an unknown name.
    """
    return check_known("needs", needs, NEEDS) - {"weights", "anchor"}


def check_reference(
    needs: frozenset[str], name: str, reference: Tensor | None, ref_logps: Tensor | None
) -> None:
    """Check that the reference's inputs suffice for ``needs`` and are given only once.

    Args:
        needs: names that ops compute.
        name: the argument that holds ``reference``.
        reference: the reference's logits or hidden states.
        ref_logps: its log-probabilities, if it scored itself.

    Raises:
        ValueError: otherwise.
    """
    if reference is not None and ref_logps is not None:
        raise ValueError(
            f"{name} and ref_logps were both given; pass {name} for the KL terms, ref_logps otherwise"
        )
    lacking = needs & KL_STATISTICS if reference is None else frozenset()
    if reference is None and ref_logps is None:
        lacking |= needs & {"ref"}
    if lacking:
        mend = f"pass {name}" if lacking & KL_STATISTICS else f"pass {name} or ref_logps"
        raise ValueError(
            f"needs names {sorted(lacking)}, which cannot be computed from the given inputs of the reference; {mend}"
        )


def needs_of_rows(
    needs: frozenset[str], ref_hidden: Tensor | None, ref_logps: Tensor | None
) -> frozenset[str]:
    """The statistics to compute from hidden states, after a check that the reference's inputs suffice.

    Raises:
        ValueError: for unknown names, or if the reference's inputs do not suffice.
    """
    computed = check_needs(needs)
    check_reference(computed, "ref_hidden", ref_hidden, ref_logps)
    return computed if ref_logps is None else computed - {"ref"}


def check_shapes(
    labels: Tensor,
    positions: Mapping[str, Tensor | None],
    per_token: Mapping[str, Tensor | None],
) -> None:
    """Check the leading shapes of all arguments against ``labels``.

    Args:
        labels: must be ``[B, L]``.
        positions: must be ``[B, L, ...]``.
        per_token: must be ``[B, L - 1]``.

    Raises:
        ValueError: for the first wrong shape.
    """
    if labels.dim() != 2:
        raise ValueError(f"labels must have the shape [B, L], got {list(labels.shape)}")
    batch, length = labels.shape
    for name, value in positions.items():
        if value is not None and (value.dim() != 3 or value.shape[:2] != labels.shape):
            raise ValueError(
                f"{name} must have the shape [{batch}, {length}, ...] of labels, got {list(value.shape)}"
            )
    for name, value in per_token.items():
        if value is None or value.shape == (batch, length - 1):
            continue
        hint = f"; pass {name}[:, 1:]" if value.shape == (batch, length) else ""
        raise ValueError(
            f"{name} must have the shape [B, T] = [{batch}, {length - 1}], in the columns of the predicted tokens, "
            f"got {list(value.shape)}{hint}"
        )
