"""Held-out numbers: loss, accuracy, margins, KL, and the reward of samples."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tokenpref._paths import resolve_path
from tokenpref.data import PreferenceDataset, Tokenizer, steps_per_epoch
from tokenpref.data.samples import read_openings, read_samples
from tokenpref.distributed import World
from tokenpref.errors import DataError
from tokenpref.losses import Loss
from tokenpref.models.generation import sample
from tokenpref.models.reference import Reference
from tokenpref.models.scoring import ScoringModel
from tokenpref.rewards import checked_rewards
from tokenpref.training.config.keys import SamplingConfig
from tokenpref.training.evaluation.intervals import mean_interval
from tokenpref.training.saving.portions import Portions
from tokenpref.training.step.batches import pair_batches
from tokenpref.training.step.metrics import MetricSums, loss_metrics
from tokenpref.training.step.pair_loss import (
    BatchAnchors,
    BatchWeights,
    no_anchors,
    no_weights,
    score_pairs,
    what_is_read,
)

__all__ = ["evaluate_pairs", "paired_gain", "sample_rewards"]


@torch.no_grad()
def evaluate_pairs(
    policy: ScoringModel,
    reference: Reference,
    loss: Loss,
    dataset: PreferenceDataset,
    world: World,
    *,
    batch_size: int,
    pad_id: int,
    needs: frozenset[str],
    weigh: BatchWeights = no_weights,
    anchor: BatchAnchors = no_anchors,
    progress: str | None = None,
    portions: Portions | None = None,
    tokens: int | None = None,
    padded: bool = False,
) -> dict[str, float]:
    """Means over all pairs of a data set, for any number of ranks.

    Args:
        policy: model to evaluate; its training mode is restored afterwards.
        reference: the reference to compare with.
        loss: the loss whose value and rewards are reported.
        dataset: the pairs.
        world: the run's processes.
        batch_size: pairs per process and forward.
        pad_id: padding token.
        needs: statistics to compute.
        weigh: token weights of a batch, for a loss that takes them.
        anchor: third answers of a batch, likewise.
        progress: label of a progress bar on the main process; None for none.
        portions: stores finished batches; None stores nothing.
        tokens: largest number of tokens of a forward; None for as many as ``batch_size`` pairs have.
        padded: whether ``tokens`` counts padding.

    Returns:
        Metrics under the trainer's names, without prefix.
    """
    training = policy.model.training
    policy.model.eval()
    sums = MetricSums()
    steps = steps_per_epoch(len(dataset), batch_size=batch_size, accumulation=1, world_size=world.size)

    def measure(step: int) -> MetricSums:
        found = MetricSums()
        batches = pair_batches(
            dataset, world, pad_id=pad_id, step=step, batch_size=batch_size, tokens=tokens, padded=padded
        )
        for whole in batches:
            batch = what_is_read(loss, whole)
            output = score_pairs(policy, reference, batch, needs, weigh(batch), loss, anchors=anchor(batch))
            found.add(loss_metrics(output), batch.real)
        return found

    def measure_plain(step: int) -> dict[str, list[float]]:
        return measure(step).plain()

    try:
        for step in tqdm(
            range(steps), desc=progress, disable=progress is None or not world.is_main, leave=False
        ):
            if portions is None:
                sums.merge(measure(step))
            else:
                everyone = portions.do("held-out pairs", step, partial(measure_plain, step))
                sums.merge(MetricSums.from_plain(everyone[world.rank]))
    finally:
        policy.model.train(training)
    return sums.reduce(world)


def sample_rewards(
    policy: ScoringModel,
    tokenizer: Tokenizer,
    config: SamplingConfig,
    world: World,
    *,
    seed: int,
    portions: Portions | None = None,
) -> list[dict[str, Any]]:
    """Sample from the policy on given openings and score the samples.

    The noise of a sample depends on seed, opening and sample number only. Two models are therefore compared with the
    same noise, and the number of ranks changes nothing.

    Args:
        policy: model to sample from.
        tokenizer: its tokenizer.
        config: openings, number and form of the samples, and the reward.
        world: the run's processes.
        seed: of the noise.
        portions: stores finished batches; None stores nothing.

    Returns:
        On every rank, one dict for each opening and sample: ``prompt``, ``sample``, ``completion``, ``reward``,
        ``tokens`` (their number).

    Raises:
        DataError: if the openings file is empty, or an opening has no token.
        ConfigError: if the reward does not return one number for each sample.
    """
    path = resolve_path(config.prompts)
    openings = read_openings(path)
    jobs = [(row, number) for row in range(len(openings)) for number in range(config.num_samples)]
    ids = [tokenizer.encode_with_offsets(opening)[0] for opening in openings]
    for row, tokens in enumerate(ids):
        if not tokens:
            raise DataError(f"{path}: opening {row + 1} ({openings[row]!r}) has no token")

    def draw(mine: list[tuple[int, int]]) -> list[dict[str, Any]]:
        outputs = sample(
            policy.model,
            [ids[row] for row, _ in mine],
            seeds=[_sample_seed(seed, row, number) for row, number in mine],
            max_new_tokens=config.max_new_tokens,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            batch_size=config.batch_size,
            world=world,
        )
        texts = [tokenizer.decode([t for t in out if t != tokenizer.eos_id]) for out in outputs]
        return [
            {"row": row, "sample": number, "prompt": openings[row], "completion": text, "tokens": len(out)}
            for (row, number), text, out in zip(mine, texts, outputs, strict=True)
        ]

    records: list[dict[str, Any]] = []
    size = config.batch_size * world.size
    for number, start in enumerate(range(0, len(jobs), size)):
        mine = jobs[start : start + size][world.rank :: world.size]
        parts = (portions or Portions(world)).do("samples", number, partial(draw, mine))
        # In the same order of keys, also if they come from a file.
        names = ("row", "sample", "prompt", "completion", "tokens")
        records += [{name: record[name] for name in names} for part in parts for record in part]
    records.sort(key=lambda record: (record["row"], record["sample"]))
    return _with_rewards(records, config)


def _sample_seed(seed: int, row: int, number: int) -> int:
    return ((seed * 1_000_003 + row) * 1_000_003 + number) % 2**64  # what a generator takes


def _with_rewards(records: list[dict[str, Any]], config: SamplingConfig) -> list[dict[str, Any]]:
    prompts, completions = ([record[key] for record in records] for key in ("prompt", "completion"))
    name = f"sampling.reward ({config.reward.path})"
    rewards = checked_rewards(config.reward.callable(), prompts, completions, name)
    return [{**record, "reward": value} for record, value in zip(records, rewards, strict=True)]


def paired_gain(records: list[dict[str, Any]], baseline: Path) -> tuple[float, float, float]:
    """Mean gain in reward over a baseline's samples of the same openings, with its 95 % interval.

    Differences are taken sample by sample, with the same opening, and with the same noise if both were drawn with one seed and
    the same sampling settings. The interval is the normal interval over all differences.

    Args:
        records: what :func:`sample_rewards` returned.
        baseline: ``samples.jsonl`` of the other model.

    Returns:
        Mean difference, lower and upper bound.

    Raises:
        DataError: if the baseline cannot be read, or holds other openings or another number of samples.
    """
    other = read_samples(baseline)
    keys = [(r["prompt"], r["sample"]) for r in records]
    if keys != [(r["prompt"], r["sample"]) for r in other]:
        raise DataError(
            f"{baseline}: holds {len(other)} samples of other openings than the {len(records)} drawn here; "
            "compare evaluations with the same sampling.prompts and sampling.num_samples"
        )
    return mean_interval([r["reward"] - o["reward"] for r, o in zip(records, other, strict=True)])
