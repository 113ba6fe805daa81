"""Training steps: rate, memory, compilations, and what the GPU does in a step."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.drill.stage import Stage
from benchmarks.gpu import Cell, Training, peak_flops, seconds_of
from tokenpref.distributed import init_world

__all__ = ["Variant", "busy_ms", "plan", "steps"]


@dataclass(frozen=True)
class Variant:
    """A training to measure.

    Args:
        cell: what is trained.
        seconds: that it should take at most; it is skipped if fewer are left.
        profiled: whether one more step runs under the profiler.
    """

    cell: Cell
    seconds: float
    profiled: bool = False


def plan() -> list[Variant]:
    """On a GPU, in the order of importance."""
    real, equal = Cell("1b", lengths="unequal", pairs=16), Cell("1b")
    return [
        Variant(real, 20, profiled=True),
        Variant(replace(real, compiled=True), 60, profiled=True),
        Variant(replace(real, compiled=True, loss="tdpo2"), 45),
        Variant(replace(equal, compiled=True), 40),
        Variant(replace(real, loss="tdpo2"), 15),
        Variant(equal, 12),
        Variant(replace(real, precision="float8"), 20),
    ]


def tiny_plan() -> list[Variant]:
    """For a test: an equal and an unequal batch, eager."""
    equal = Cell("tiny", pairs=2, prompt=8, answer=24)
    return [Variant(replace(equal, lengths="unequal", loss="tdpo2"), 1, profiled=True), Variant(equal, 1)]


def steps(stage: Stage) -> None:
    """Every variant in turn, each from new weights."""
    for variant in tiny_plan() if stage.tiny else plan():
        name = variant.cell.name
        if stage.has_time(name, variant.seconds):
            with stage.part(name):
                _train(stage, variant)


def _train(stage: Stage, variant: Variant, warmup: int = 3, count: int = 8) -> None:
    cell = variant.cell
    count = 2 if stage.tiny else count
    torch._dynamo.reset()  # another variant's graphs count against the limit of recompilations
    gc.collect()  # a model refers to itself, and another variant's would count in the peak
    world = init_world(stage.device, process_group=cell.precision == "mixed")
    try:
        training = Training(cell, world)
        for step in range(warmup):
            training.step(step)
        before = _compilations()
        for step in range(warmup, warmup + count):
            training.step(step)
        compiled = {name: after - before[name] for name, after in _compilations().items()}
        found = training.found(warmup)
        stage.row("steps", **_about(cell), **_rates(cell, found), **compiled)
        stage.check(f"{cell.name}: first loss, from log 2", abs(found["losses"][0] - math.log(2)), most=1e-6)
        if variant.profiled:
            _profile(stage, training, warmup + count, statistics.median(found["step_s"]))
    finally:
        world.close()


def _about(cell: Cell) -> dict[str, Any]:
    layers = "compiled" if cell.compiled else "eager"
    return {"loss": cell.loss, "precision": cell.precision, "layers": layers, "lengths": cell.lengths}


def _rates(cell: Cell, found: dict[str, Any]) -> dict[str, Any]:
    seconds = seconds_of(cell, found)
    peak, _ = peak_flops(found["device"])
    return {
        "s/step": round(seconds, 4),
        "slowest s": round(max(found["step_s"]), 4),
        "first s": round(found["warmup_s"][0], 2),
        "tokens/s": round(found["tokens"] / seconds),
        "MFU %": None if peak is None else round(100 * found["flops"] / seconds / peak, 1),
        "peak GiB": round(found["peak_gib"], 2),
    }


def _compilations() -> dict[str, int]:
    """What torch.compile has done in this process so far."""
    counters = torch._dynamo.utils.counters
    return {
        "graphs compiled": counters["stats"]["unique_graphs"],
        "graph breaks": sum(counters["graph_break"].values()),
    }


def _profile(stage: Stage, training: Training, step: int, seconds: float) -> None:
    """How busy the device is in a step, how many kernels it starts, and which take longest."""
    on_gpu = stage.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        training.step(step)
    kernels = [
        (event.name, event.time_range.start / 1000, event.time_range.end / 1000)
        for event in profiler.events()
        if not getattr(event, "is_user_annotation", False)
        and (str(event.device_type).endswith("CUDA") if on_gpu else event.name.startswith("aten::"))
    ]
    busy = busy_ms([(start, end) for _, start, end in kernels])
    about = _about(training.cell)
    stage.row(
        "profile of a step",
        **about,
        **{"busy ms": round(busy, 2), "median step ms": round(seconds * 1000, 2)},
        **{"busy %": round(100 * busy / (seconds * 1000), 1), "kernels": len(kernels)},
    )
    totals: dict[str, list[float]] = {}
    for name, start, end in kernels:
        totals.setdefault(name, []).append(end - start)
    for name, times in sorted(totals.items(), key=lambda item: -sum(item[1]))[:10]:
        stage.row(
            "longest kernels",
            **{"loss": about["loss"], "layers": about["layers"], "kernel": name[:80].replace("|", "/")},
            **{"ms": round(sum(times), 2), "calls": len(times)},
        )


def busy_ms(intervals: Sequence[tuple[float, float]]) -> float:
    """The time that is covered by at least one interval."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
