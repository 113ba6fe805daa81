"""Both ways from logits to token statistics under one signature, and the golden files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from support.heads import blocks_of
from tokenpref.ops import linear_token_stats, token_stats_from_logits
from tokenpref.stats import PairStats, TokenStats

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def by_head(block_bytes: int, memory_mb: float) -> Callable[..., TokenStats]:
    """``linear_token_stats`` as a function of logits: with the identity as head, hidden states are logits."""

    def score(logits: Tensor, ref: Tensor | None, labels: Tensor, **options: object) -> TokenStats:
        eye = torch.eye(logits.shape[-1], dtype=logits.dtype)
        ref_head = None if ref is None else eye
        with blocks_of(block_bytes):
            return linear_token_stats(logits, eye, ref, ref_head, labels, memory_mb=memory_mb, **options)

    return score


SCORERS: dict[str, Callable[..., TokenStats]] = {
    "logits": token_stats_from_logits,
    "head, a column at a time": by_head(1, 1e-6),
    "head, some blocks kept": by_head(100, 3e-4),
    "head, one block": by_head(1 << 20, 100),
}


def golden(name: str, prefix: str) -> dict[str, Tensor]:
    """Tensors of ``tests/golden/{name}.safetensors`` whose key starts with ``prefix``, without it."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def pair_of(
    score: Callable[..., TokenStats],
    logits: Tensor,
    ref: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    **options: object,
) -> PairStats:
    """A pair from rows 0..B-1 chosen and B..2B-1 rejected, each side scored alone."""
    half = labels.shape[0] // 2
    sides = [
        score(
            logits[rows],
            ref[rows],
            labels[rows],
            weights=None if weights is None else weights[rows],
            **options,
        )
        for rows in (slice(None, half), slice(half, None))
    ]
    return PairStats(*sides)


def check_golden(
    loss: nn.Module,
    expected: dict[str, Tensor],
    setting: str,
    score: Callable[..., TokenStats],
    *,
    weights: Tensor | None = None,
    more: frozenset[str] = frozenset(),
) -> None:
    """Compare losses, rewards and the gradient of the mean loss to 1e-12.

    Args:
        loss: the loss under test.
        expected: tensors of a golden case.
        setting: prefix of the expected results.
        score: one of ``SCORERS``.
        weights: token weights ``[2B, T]``.
        more: statistics to compute beyond what the loss needs.
    """
    logits = expected["logits"].clone().requires_grad_()
    pair = pair_of(
        score, logits, expected["ref"], expected["labels"], weights=weights, needs=loss.needs | more
    )
    output = loss(pair)
    (gradient,) = torch.autograd.grad(output.losses.mean(), logits)
    found = {
        "losses": output.losses,
        "chosen_rewards": output.chosen_rewards,
        "rejected_rewards": output.rejected_rewards,
        "grad": gradient,
    }
    for name, value in found.items():
        torch.testing.assert_close(
            value,
            expected[f"{setting}/{name}"],
            atol=1e-12,
            rtol=0,
            msg=lambda text, name=name: f"{name}: {text}",
        )
