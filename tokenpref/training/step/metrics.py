"""Means over pairs, across micro-batches and ranks: numerators and denominators are summed, and divided last."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from tokenpref.distributed import World
from tokenpref.stats import LossOutput

__all__ = ["LogInterval", "MetricSums", "Stopwatch", "loss_metrics"]


class MetricSums:
    """Running sums of per-pair metrics."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, Tensor] = {}

    def add(self, values: Mapping[str, Tensor], real: Tensor) -> None:
        """Add a micro-batch.

        Args:
            values: name to ``[B]`` values, the same names on every rank.
            real: ``[B]``, False for the filler pair of a rank that had none.
        """
        count = real.sum()
        for name, value in values.items():
            total = torch.where(real, value.detach(), 0).sum().double()
            self._sums[name] = self._sums.get(name, 0) + total
            self._counts[name] = self._counts.get(name, 0) + count

    def merge(self, other: MetricSums) -> None:
        """Add another's sums to these."""
        for name, total in other._sums.items():
            self._sums[name] = self._sums.get(name, 0) + total
            self._counts[name] = self._counts.get(name, 0) + other._counts[name]

    def plain(self) -> dict[str, list[float]]:
        """Sum and count of each name as plain numbers, from which :meth:`from_plain` restores the same bits."""
        return {name: [float(total), int(self._counts[name])] for name, total in self._sums.items()}

    @classmethod
    def from_plain(cls, values: Mapping[str, Sequence[float]]) -> MetricSums:
        """Sums that :meth:`plain` gave, on the CPU."""
        sums = cls()
        for name, (total, count) in values.items():
            sums._sums[name] = torch.tensor(total, dtype=torch.float64)
            sums._counts[name] = torch.tensor(int(count))
        return sums

    def reduce(self, world: World) -> dict[str, float]:
        """Means over all pairs of all ranks. Every rank must call it."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        table = torch.stack([torch.stack([self._sums[n], self._counts[n].double()]) for n in names])
        sums, counts = world.sum(table).unbind(1)
        return {
            name: float(s / c) if c > 0 else math.nan for name, s, c in zip(names, sums, counts, strict=True)
        }


class LogInterval:
    """Metrics and speed since the last line of the log."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._sums, self._tokens, self._paused = MetricSums(), 0, 0.0
        self._start = time.perf_counter()

    def add(self, sums: MetricSums, tokens: int) -> None:
        """Add a step's sums and its tokens (of all ranks)."""
        self._sums.merge(sums)
        self._tokens += tokens

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Exclude the time inside from the speed, because evaluation and saving are not training."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def close(self, world: World) -> dict[str, float]:
        """Means over the interval's pairs and ``tokens_per_second``; starts the next interval. Every rank must call it."""
        metrics = self._sums.reduce(world)
        metrics["tokens_per_second"] = self._tokens / (time.perf_counter() - self._start - self._paused)
        self._restart()
        return metrics


class Stopwatch:
    """Wall-clock seconds of the parts of a step, on this rank."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._steps = 0
        self._running = True

    @contextmanager
    def time(self, part: str) -> Iterator[None]:
        """Measure the time inside under a name. "step" is the whole step and also counts the steps."""
        start = time.perf_counter()
        yield
        if self._running:
            self._seconds[part] = self._seconds.get(part, 0.0) + time.perf_counter() - start
            self._steps += part == "step"

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing counts inside."""
        self._running = False
        yield
        self._running = True

    def take(self) -> dict[str, float]:
        """``time/<part>``: mean seconds per step since the last call."""
        found = {f"time/{part}": seconds / max(self._steps, 1) for part, seconds in self._seconds.items()}
        self._seconds, self._steps = {}, 0
        return found


def loss_metrics(output: LossOutput) -> dict[str, Tensor]:
    """Per-pair metrics under TRL's names: loss, rewards, accuracy (strict), margin, and the loss's own."""
    chosen, rejected = output.chosen_rewards, output.rejected_rewards
    return {
        "loss": output.losses,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
        **output.metrics,
    }
