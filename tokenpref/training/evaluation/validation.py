"""Validation during a training run, on held-out pairs and samples."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tokenpref._paths import resolve_path
from tokenpref.components import nearest
from tokenpref.data import PreferenceDataset, Tokenizer
from tokenpref.distributed import World
from tokenpref.models.reference import Reference
from tokenpref.models.scoring import ScoringModel
from tokenpref.stats import STATISTICS, PairStats, TokenStats
from tokenpref.training.config.keys import TrainConfig
from tokenpref.training.evaluation.intervals import mean_interval
from tokenpref.training.evaluation.measures import evaluate_pairs, paired_gain, sample_rewards
from tokenpref.training.step.metrics import loss_metrics
from tokenpref.training.step.pair_loss import BatchAnchors, BatchWeights

__all__ = ["Validation", "best_faults"]

SAMPLED = ("sample_tokens", "reward", "reward_low", "reward_high")
GAINED = ("reward_gain", "reward_gain_low", "reward_gain_high")
ANCHORED = ("anchors/tokens", "anchors/empty", "anchors/equal_chosen", "anchors/equal_rejected")


def best_faults(config: TrainConfig) -> list[str]:
    """The fault of a ``best.metric`` that no validation of the run has. Losses from other packages are not checked."""
    loss = config.loss_val or config.loss
    if config.best is None or config.best.metric is None or loss is None:
        return []
    if config.dataset_val is not None and not loss.path.startswith("tokenpref."):
        return []
    known = _pair_metrics(config) if config.dataset_val is not None else set()
    if config.sampling is not None:
        known |= {*SAMPLED, *(GAINED if config.sampling.compare_to is not None else ())}
    if config.best.metric in known:
        return []
    return [
        f"best.metric: the validation has no {config.best.metric!r}{nearest(config.best.metric, known)} (it has "
        f"{', '.join(sorted(known))})"
    ]


def _pair_metrics(config: TrainConfig) -> set[str]:
    """The names of metrics of held-out pairs, from the loss on two tokens that equal the reference's."""
    loss = (config.loss_val or config.loss).build()
    stats = config.log_stats if config.log_stats_val is None else config.log_stats_val
    needs = frozenset(loss.needs) | frozenset(stats or ())
    fields = {STATISTICS[name]: torch.ones(1, 2) for name in needs & STATISTICS.keys()}
    side = TokenStats(policy_logps=torch.ones(1, 2), mask=torch.ones(1, 2, dtype=torch.bool), **fields)
    output = loss(PairStats(chosen=side, rejected=side, anchor=side if "anchor" in needs else None))
    more = {"weights/clipped"} if "weights" in needs else set()
    return {*loss_metrics(output), *more, *(ANCHORED if "anchor" in needs else ())}


class Validation:
    """The measurements that a run makes at intervals, in addition to its training metrics.

    Args:
        config: the run's config: ``loss_val`` (default: the training loss), ``log_stats_val``, ``batch_size_val``, ``sampling``.
        dataset: held-out pairs, or None.
        tokenizer: the run's tokenizer.
        world: the run's processes.
        weigh: token weights of the held-out pairs, for a loss that takes them.
        anchor: their third answers, likewise.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: PreferenceDataset | None,
        tokenizer: Tokenizer,
        world: World,
        weigh: BatchWeights,
        anchor: BatchAnchors,
    ) -> None:
        self._config = config
        self._dataset = dataset
        self._tokenizer = tokenizer
        self._world = world
        self._weigh = weigh
        self._anchor = anchor
        self._loss = (config.loss_val or config.loss).build()
        stats = config.log_stats if config.log_stats_val is None else config.log_stats_val
        self.needs = frozenset(self._loss.needs) | frozenset(stats)

    def run(self, policy: ScoringModel, reference: Reference, *, step: int, folder: Path) -> dict[str, float]:
        """Measure.

        Args:
            policy: the model in training.
            reference: what it is compared with.
            step: optimizer steps done; names the file of samples.
            folder: the run's folder; samples go to ``samples/step_<step>.jsonl``.

        Returns:
            Metrics under the trainer's names (of ``loss_val``), and from samples ``reward`` with ``reward_low`` and
            ``reward_high`` (95 %), ``reward_gain`` likewise with ``sampling.compare_to``, ``sample_tokens`` (mean length).
        """
        config = self._config
        metrics: dict[str, float] = {}
        if self._dataset is not None:
            metrics |= evaluate_pairs(
                policy,
                reference,
                self._loss,
                self._dataset,
                self._world,
                batch_size=config.batch_size_val or config.batch_size,
                tokens=config.tokens_per_batch,
                padded=not config.padding_free,
                pad_id=self._tokenizer.pad_id,
                needs=self.needs,
                weigh=self._weigh,
                anchor=self._anchor,
            )
        if config.sampling is not None:
            metrics |= self._sample(policy, folder / "samples" / f"step_{step}.jsonl")
        return metrics

    def _sample(self, policy: ScoringModel, file: Path) -> dict[str, float]:
        sampling = self._config.sampling
        assert sampling is not None  # the caller looked
        records = sample_rewards(policy, self._tokenizer, sampling, self._world, seed=self._config.seed)
        found = {"reward": mean_interval([r["reward"] for r in records])}
        if sampling.compare_to is not None:
            found["reward_gain"] = paired_gain(records, resolve_path(sampling.compare_to))
        if self._world.is_main:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_suffix(".tmp")
            temporary.write_text(
                "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8"
            )
            temporary.replace(file)
        metrics = {"sample_tokens": sum(r["tokens"] for r in records) / len(records)}
        for name, (mean, low, high) in found.items():
            metrics |= {name: mean, f"{name}_low": low, f"{name}_high": high}
        return metrics
