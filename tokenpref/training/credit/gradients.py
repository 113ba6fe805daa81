"""Gradient attribution: how much each token of an answer moves a model's output."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokenpref.data import IGNORE_INDEX
from tokenpref.errors import ConfigError
from tokenpref.models.decoder import evaluating, uncompiled
from tokenpref.models.scoring import ScoringModel
from tokenpref.ops import linear_token_stats
from tokenpref.stats import SIDES
from tokenpref.weights.attribution import (
    Target,
    TargetInputs,
    importances,
)

__all__ = ["token_importances"]


def token_importances(
    scorer: ScoringModel,
    tokens: Tensor,
    labels: Tensor,
    *,
    target: Target,
    norm: str = "l1",
    sides: tuple[str, ...] = SIDES,
) -> Tensor:
    """The gradient of a target at every token's input embedding, as one number per token.

    This runs one forward pass and the part of a backward pass that leads to the embeddings, in evaluation mode. Parameters'
    ``.grad``, the modules' modes and the random number generators are not changed.

    Args:
        scorer: the model, sharded or not, frozen or not.
        tokens: ``[N, L]``, padded on the right.
        labels: ``[N, L]``, -100 outside the answers.
        target: what is differentiated.
        norm: see :func:`tokenpref.weights.attribution.importances`.
        sides: what the rows hold, in their order.

    Returns:
        ``[N, L]``, not negative; may hold nan or inf where the model does.

    Raises:
        ConfigError: if the target compares both answers of a pair and the rows are one side's, or if the model's embeddings
            cannot be hooked.
    """
    if target.needs_pair and sides[:2] != SIDES:
        raise ConfigError(
            f"target {type(target).__name__} compares both answers of a pair, and only {', '.join(map(repr, sides))} is "
            "there; use tokenpref.weights.attribution.AnswerLogp, or a loss that reads both answers"
        )
    places = torch.arange(labels.shape[1], device=labels.device)
    last = torch.where(labels != IGNORE_INDEX, places, 0).amax(-1)
    rows = torch.arange(labels.shape[0], device=labels.device)

    def job(hidden: Tensor, weight: Tensor) -> Tensor:
        # Detached, because a custom backward would also compute the head's gradient, which is not needed.
        weight = weight.detach()

        def logps() -> Tensor:
            stats = linear_token_stats(
                hidden,
                weight,
                None,
                None,
                labels,
                needs=frozenset(),
                logit_scale=scorer.decoder.logit_scale,
                soft_cap=scorer.decoder.soft_cap,
                memory_mb=scorer.head_memory_mb,
            )
            return stats.policy_logps

        inputs = TargetInputs(
            logits_at=lambda at: scorer.decoder.final_logits(hidden[rows, at], weight),
            logps=logps,
            labels=labels,
            last=last,
            sides=sides,
        )
        return target(inputs)

    with (
        torch.enable_grad(),
        scorer.switched(),
        evaluating(scorer.model),
        uncompiled(),
        _hooked_embeddings(scorer.decoder.embedding) as found,
    ):
        value = scorer.decoder.run(tokens, job)
        if len(found) != 1:
            raise ConfigError(
                f"model: its embedding ran {len(found)} times in one forward; "
                "attribution needs a decoder that embeds its tokens once"
            )
        (gradient,) = torch.autograd.grad(value.sum(), found)
    return importances(gradient, found[0].detach(), norm)


@contextmanager
def _hooked_embeddings(embedding: nn.Module) -> Iterator[list[Tensor]]:
    """The embeddings of each forward inside the context, detached, as leaves that require a gradient."""
    found: list[Tensor] = []

    def cut(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        found.append(output.detach().requires_grad_())
        return found[-1]

    handle = embedding.register_forward_hook(cut)
    try:
        yield found
    finally:
        handle.remove()
