"""How well each construction of the contrastive pair recovers the hidden reward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.planted.measures import auc, spearman
from benchmarks.planted.task import BAD, GOOD, WORLD, Pairs, Settings, new_model, swapped, with_control
from tokenpref.data import IGNORE_INDEX, PairBatch
from tokenpref.losses import DPOLoss, NLLLoss
from tokenpref.models.reference import FrozenReference, NoReference, Reference
from tokenpref.models.scoring import ScoringModel
from tokenpref.training.credit.gradients import token_importances
from tokenpref.training.step.pair_loss import BatchWeights
from tokenpref.training.step.train_step import train_step
from tokenpref.weights import (
    AnswerLogp,
    MaxLogit,
    answer_scores,
    attribution_weights,
    contrastive_log_ratios,
    random,
    uniform,
)
from tokenpref.weights.attribution import Target

__all__ = ["CONSTRUCTIONS", "PAIRS", "TRAINED", "LogRatios", "fit", "log_ratios", "recovery"]

CONSTRUCTIONS = (
    "prompt",
    "sft",
    "dpo",
    "attribution_max",
    "attribution_answer",
    "attribution_dpo",
    "random",
    "uniform",
)
PAIRS = ("prompt", "sft", "dpo")
TRAINED = ("sft", "dpo", "attribution_dpo")
LogRatios = Callable[[PairBatch], "list[Tensor]"]
"""log pi+ - log pi- of the 2B answers of a batch, in its order."""


def load(settings: Settings, state: dict[str, Tensor], *, frozen: bool = False) -> ScoringModel:
    """A model of its own with the given weights."""
    model = new_model(settings, 0)
    model.load_state_dict(state)
    model.requires_grad_(not frozen)
    return ScoringModel(model)


def fit(
    policy: ScoringModel,
    reference: Reference,
    loss: nn.Module,
    pairs: Pairs,
    *,
    lr: float,
    steps: int,
    batch: int,
    seed: int,
    weigh: BatchWeights = lambda batch: None,
    after_step: Callable[[int], None] = lambda step: None,
) -> ScoringModel:
    """Train a policy with the library's own step: AdamW, constant rate after 10 steps of warm-up, clipping at 1."""
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    for step, micro_batch in enumerate(pairs.shuffled(batch, steps, seed), start=1):
        train_step(
            policy,
            reference,
            loss,
            optimizer,
            [micro_batch],
            WORLD,
            step=step,
            needs=loss.needs,
            weigh=weigh,
            clip_grad_norm=1.0,
        )
        schedule.step()
        after_step(step)
    return policy


def log_ratios(
    construction: str, settings: Settings, base: dict[str, Tensor], pairs: Pairs, seed: int
) -> LogRatios:
    """Build the contrastive pair of a construction.

    Args:
        construction: one of :data:`CONSTRUCTIONS`.
        settings: sizes.
        base: weights of the base model: reference, start of training, and the model that is prompted.
        pairs: what the pair is trained on, where it is trained.
        seed: of the order of the pairs, and of the random scores.

    Returns:
        A function that scores answers; those of "random" and "uniform" are the library's control weights, less one, those of
        attribution the weights.
    """
    if construction in ("attribution_max", "attribution_answer"):
        target = MaxLogit("before_last") if construction == "attribution_max" else AnswerLogp()
        return attribution(load(settings, base, frozen=True), target)
    if construction in ("random", "uniform"):

        def control(batch: PairBatch) -> list[Tensor]:
            mask = batch.labels[:, 1:] != IGNORE_INDEX
            nothing = torch.zeros(mask.shape)
            if construction == "uniform":
                weights = uniform(nothing, mask, side="chosen").weights
            else:
                keys = [2 * row + side for side in (0, 1) for row in batch.rows]
                weights = random(nothing, mask, side="chosen", seed=seed, keys=keys).weights
            return answer_scores(weights - 1, batch.labels)

        return control
    if construction == "prompt":
        model = load(settings, base, frozen=True)
        return lambda batch: contrastive_log_ratios(
            model.logps, model.logps, with_control(batch, GOOD), with_control(batch, BAD)
        )
    steps = max(settings.min_steps, len(pairs.examples) * settings.epochs // settings.batch)

    def side(data: Pairs) -> ScoringModel:
        if construction == "sft":
            reference: Reference = NoReference()
            loss: nn.Module = NLLLoss("chosen")
        else:
            reference = FrozenReference(load(settings, base, frozen=True))
            loss = DPOLoss(settings.beta)
        lr = settings.sft_lr if construction == "sft" else settings.dpo_lr
        policy = load(settings, base)
        return fit(policy, reference, loss, data, lr=lr, steps=steps, batch=settings.batch, seed=seed)

    if construction == "attribution_dpo":
        return attribution(side(pairs), AnswerLogp())
    positive, negative = side(pairs), side(swapped(pairs))
    return lambda batch: contrastive_log_ratios(
        positive.logps, negative.logps, (batch.tokens, batch.labels), (batch.tokens, batch.labels)
    )


def attribution(scorer: ScoringModel, target: Target) -> LogRatios:
    """Weights from attribution alone (no prior) on one model. They are not negative: their size is what they say."""

    def weights(batch: PairBatch) -> list[Tensor]:
        found = token_importances(scorer, batch.tokens, batch.labels, target=target)
        answer = batch.labels != IGNORE_INDEX
        made = attribution_weights(found, answer, answer, mixture=1.0)
        return [row[kept] for row, kept in zip(made, answer, strict=True)]

    return weights


def score_all(ratios: LogRatios, pairs: Pairs) -> list[tuple[Tensor, Tensor]]:
    """Scores of all pairs, (chosen, rejected) each."""
    scored: list[tuple[Tensor, Tensor]] = []
    for batch in pairs.batches(128):
        scores, half = ratios(batch), len(batch.rows)
        scored += list(zip(scores[:half], scores[half:], strict=True))
    return scored


def recovery(scores: list[tuple[Tensor, Tensor]], pairs: Pairs) -> dict[str, Any]:
    """How scores agree with the hidden reward, over all tokens of both answers.

    Args:
        scores: log ratios of each pair.
        pairs: their truth.

    Returns:
        ``planted``: AUC of |log ratio| for "this token has a reward"; ``sign``: AUC of the log ratio for a positive
        against a negative reward; ``spearman``: rank correlation of log ratio and reward over all tokens (null for a
        constant score); ``mean_abs``: mean |log ratio| in nats.
    """
    ratio = np.concatenate([np.asarray(side, dtype=np.float64) for pair in scores for side in pair])
    truth = np.concatenate([side for pair in pairs.rewards for side in pair])
    planted = truth != 0
    correlation = spearman(ratio, truth)
    return {
        "planted": auc(np.abs(ratio), planted),
        "sign": auc(ratio[planted], truth[planted] > 0),
        "spearman": None if np.isnan(correlation) else correlation,
        "mean_abs": float(np.abs(ratio).mean()),
    }
