"""Sampled hidden reward against KL along training, for each training method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.planted.constructions import fit, load
from benchmarks.planted.task import Language, Pairs, Settings, answer_rewards, make_prompts, sample_answers
from tokenpref.data import IGNORE_INDEX, PairBatch
from tokenpref.losses import DPOLoss, TISDPOLoss, TokenDPOLoss
from tokenpref.models.reference import FrozenReference
from tokenpref.models.scoring import ScoringModel
from tokenpref.training.config.fields import Component
from tokenpref.training.credit.weighing import Weighing, in_columns
from tokenpref.training.evaluation.intervals import mean_interval
from tokenpref.training.step.pair_loss import BatchWeights

__all__ = ["ARMS", "Arm", "run_arm", "sign_check"]

SIDES = ("chosen", "rejected")
Scores = list[tuple[Tensor, Tensor]]


def _transform(name: str, **kwargs: Any) -> Component:
    return Component("weight_transform", f"tokenpref.weights.transforms.{name}", kwargs)


EXPONENTIAL = _transform("exponential")


@dataclass(frozen=True)
class Arm:
    """A training method.

    Args:
        title: its name in tables.
        loss: makes the loss from beta.
        scores: where log ratios come from: "dpo" (the DPO pair on the same data), "swapped" (the same with pi+ and pi-
            exchanged), "oracle" (the hidden reward itself), "none".
        transform: from log ratios to weights; None for a loss without weights.
        normalize: "answer" or "none".
    """

    title: str
    loss: Callable[[float], nn.Module]
    scores: str = "none"
    transform: Component | None = None
    normalize: str = "answer"


ARMS: dict[str, Arm] = {
    "dpo": Arm("DPO", DPOLoss),
    "tdpo2": Arm("TDPO2, alpha 0.5", lambda beta: TokenDPOLoss(beta, alpha=0.5)),
    "tis_raw": Arm("TIS-DPO, DPO pair, raw", TISDPOLoss, "dpo", EXPONENTIAL, "none"),
    "tis": Arm("TIS-DPO, DPO pair, mean one", TISDPOLoss, "dpo", EXPONENTIAL),
    "tis_kl": Arm(
        "TIS-DPO, DPO pair, mean one, TDPO2's KL",
        lambda beta: TISDPOLoss(beta, alpha=0.5, kl="reference"),
        "dpo",
        EXPONENTIAL,
    ),
    "oracle": Arm("TIS-DPO, hidden reward, mean one", TISDPOLoss, "oracle", EXPONENTIAL),
    "random": Arm(
        "TIS-DPO, random weights in [0, 2], mean one",
        TISDPOLoss,
        "none",
        _transform("random", min_scale=0.0, max_scale=2.0),
    ),
    "swapped": Arm("TIS-DPO, DPO pair SWAPPED, mean one", TISDPOLoss, "swapped", EXPONENTIAL),
}


def arm_scores(arm: Arm, pairs: Pairs, dpo_scores: Scores) -> Scores:
    """Log ratios of an arm's pairs; zeros where the arm looks at none."""
    if arm.scores == "dpo":
        return dpo_scores
    if arm.scores == "swapped":
        return [(-chosen, -rejected) for chosen, rejected in dpo_scores]
    truth = [tuple(torch.from_numpy(side).float() for side in pair) for pair in pairs.rewards]
    if arm.scores == "oracle":
        return truth  # type: ignore[return-value]
    return [tuple(torch.zeros_like(side) for side in pair) for pair in truth]  # type: ignore[misc]


def weights_of(arm: Arm, scores: Scores) -> list[list[Tensor]] | None:
    """Weights of every pair, ``[side][pair]``, through the library's own path; None for a loss without weights."""
    if arm.transform is None:
        return None
    weighing = Weighing("log_ratio", arm.transform, arm.normalize, eos_weight=1.0)
    keys, ends = list(range(len(scores))), [False] * len(scores)
    return [
        [
            weights
            for weights, _ in weighing([pair[number] for pair in scores], side=side, keys=keys, ends=ends)
        ]
        for number, side in enumerate(SIDES)
    ]


def weigher(weights: list[list[Tensor]] | None) -> BatchWeights:
    """What a training step asks for the weights of a batch."""
    if weights is None:
        return lambda batch: None

    def weigh(batch: PairBatch) -> Any:
        answers = [side[row] for side in weights for row in batch.rows]
        return in_columns([(w, torch.zeros_like(w, dtype=torch.bool)) for w in answers], batch)

    return weigh


def sign_check(scores: Scores, pairs: Pairs) -> dict[str, float]:
    """Mean exponential weight of planted tokens, by side and sign of the hidden reward.

    Args:
        scores: log ratios.
        pairs: their truth.

    Returns:
        ``chosen+``, ``chosen-``, ``rejected+``, ``rejected-``, and ``chosen0``, ``rejected0`` of the other tokens.
    """
    weights = weights_of(ARMS["tis_raw"], scores)
    assert weights is not None
    table = {}
    for number, side in enumerate(SIDES):
        values = torch.cat(weights[number]).double().numpy()
        truth = np.concatenate([pair[number] for pair in pairs.rewards])
        for name, where in (("+", truth > 0), ("-", truth < 0), ("0", truth == 0)):
            table[side + name] = float(values[where].mean())
    return table


class Evaluation:
    """Reward and KL of a policy on samples of its own, and KL on held-out chosen answers.

    Args:
        language: where the reward comes from.
        reference: the base model.
        heldout: held-out pairs.
    """

    def __init__(self, language: Language, reference: ScoringModel, heldout: Pairs) -> None:
        self.language, self.reference = language, reference
        self.prompts = make_prompts(language, language.settings.samples, stream=9)
        self.heldout = list(heldout.batches(256))

    @torch.no_grad()
    def __call__(self, policy: ScoringModel) -> dict[str, float]:
        """Means per answer: reward with its 95 % interval, KL(policy||ref) likewise, KL(ref||policy) on chosen answers."""
        settings = self.language.settings
        answers = sample_answers(
            policy.model, self.prompts, settings.sampled_tokens, 10_000 + self.language.seed
        )
        rewards = [
            float(answer_rewards(self.language.reward, prompt, answer).sum())
            for prompt, answer in zip(self.prompts, answers, strict=True)
        ]
        longest = max(map(len, self.prompts)) + settings.sampled_tokens
        tokens = torch.zeros(len(answers), longest, dtype=torch.int64)
        labels = torch.full_like(tokens, IGNORE_INDEX)
        for row, (prompt, answer) in enumerate(zip(self.prompts, answers, strict=True)):
            end = len(prompt) + len(answer)
            tokens[row, :end] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : end] = torch.tensor(answer)
        own = self._kl(policy, tokens, labels, "kl_policy_ref")
        chosen = [
            kl
            for batch in self.heldout
            for kl in self._kl(
                policy,
                batch.tokens[: len(batch.rows)],
                batch.labels[: len(batch.rows)],
                "kl_ref_policy",
            )
        ]
        reward, reward_low, _ = mean_interval(rewards)
        kl, kl_low, _ = mean_interval(own)
        return {
            "reward": reward,
            "reward_half": reward - reward_low,
            "kl": kl,
            "kl_half": kl - kl_low,
            "kl_ref_policy_chosen": float(np.mean(chosen)),
        }

    def _kl(self, policy: ScoringModel, tokens: Tensor, labels: Tensor, name: str) -> list[float]:
        stats = policy.token_stats(
            tokens,
            labels,
            needs=frozenset({"ref", name}),
            ref_hidden=self.reference.answer_hidden(tokens, labels),
            ref_head_weight=self.reference.head_weight,
        )
        return stats.require(name).double().sum(-1).tolist()


def run_arm(
    arm: Arm,
    settings: Settings,
    base: dict[str, Tensor],
    pairs: Pairs,
    dpo_scores: Scores,
    evaluate: Evaluation,
    seed: int,
    *,
    start: dict[str, float] | None = None,
) -> list[dict[str, float]]:
    """Train one arm; returns a point for the base model (``start``, if it is known) and for every checkpoint."""
    policy = load(settings, base)
    points = [start or {"step": 0, **evaluate(policy)}]

    def after_step(step: int) -> None:
        if step in settings.checkpoints:
            points.append({"step": step, **evaluate(policy)})

    fit(
        policy,
        FrozenReference(evaluate.reference),
        arm.loss(settings.beta),
        pairs,
        lr=settings.frontier_lr,
        steps=max(settings.checkpoints),
        batch=settings.batch,
        seed=seed,
        weigh=weigher(weights_of(arm, arm_scores(arm, pairs, dpo_scores))),
        after_step=after_step,
    )
    return points
