"""A tiny model on the CPU and on the device: losses, checkpoints, samples, attribution, and how often a step waits."""

from __future__ import annotations

import math
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.drill.stage import Stage
from benchmarks.gpu import Cell, Training, measure, pairs_of, scorer, tiny_plan
from tokenpref.distributed import World, single_process_world
from tokenpref.models.generation import sample
from tokenpref.training import PreferenceTrainer
from tokenpref.training.config.command_line import load_config
from tokenpref.training.credit.gradients import token_importances
from tokenpref.weights.attribution import MaxLogit

__all__ = ["HostReads", "agreement"]

PRECISE = Cell("tiny", pairs=4, lengths="unequal", precision="mixed")
"""Float32 weights, of which a scorer without FSDP2 computes in float32."""


def agreement(stage: Stage) -> None:
    """All comparisons in turn."""
    for cell in cells(stage.device):
        with stage.part(f"tiny, {cell.name}"):
            _losses(stage, cell)
    if stage.device != "cuda":
        stage.skip("tiny, offloaded activations", "are moved from a GPU's memory")
    with stage.part("save and resume"):
        _resume(stage)
    with stage.part("sampling"):
        _sampling(stage)
    with stage.part("attribution"):
        _attribution(stage)
    with stage.part("host reads of a step"):
        _host_reads(stage)


def cells(device: str) -> list[Cell]:
    """Every choice of precision, head and kept activations once."""
    if device != "cuda":
        return tiny_plan()
    offload = Cell("tiny", pairs=2, prompt=8, answer=24, kept="offload")
    return [*tiny_plan(), offload, replace(offload, kept="all", compiled=True)]


def _losses(stage: Stage, cell: Cell) -> None:
    """Six steps on the CPU and on the device. Float8 is emulated on the CPU."""
    on_cpu = replace(cell, kept="full" if cell.kept == "offload" else cell.kept, compiled=False)
    expected = measure(on_cpu, 4, 2, "cpu")["losses"]
    found = measure(cell, 4, 2, stage.device)["losses"]
    worst = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    first = abs(found[0] - math.log(2))
    stage.row(
        "losses of a tiny model",
        run=cell.name.removeprefix("tiny, "),
        **{"first loss from log 2": f"{first:.1e}", "worst difference from the CPU": f"{worst:.1e}"},
    )
    stage.check(f"{cell.name}: first loss, from log 2", first, most=1e-6)
    stage.check(f"{cell.name}: losses, from the CPU's", worst, most=0.02 * math.log(2))


@contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _run(stage: Stage, *overrides: str) -> None:
    words = ["--config", "tiny/tdpo", f"device={stage.device}", "run_val_every_n_steps=null", *overrides]
    trainer = PreferenceTrainer(load_config(words))
    try:
        trainer.setup()
        trainer.train()
    finally:
        trainer.close()


def _resume(stage: Stage) -> None:
    """A run of four steps, and one that starts from its checkpoint of the second step."""
    with tempfile.TemporaryDirectory() as folder, _inside(Path(folder)):
        four = "max_steps_per_epoch=4"
        _run(stage, "output_dir=whole", four, "checkpoint_every_n_steps=2", "keep_last=2")
        _run(stage, "output_dir=parts", four, "resume_from_checkpoint=whole/checkpoints/step_2")
        whole, parts = (_exported(Path(folder) / name) for name in ("whole", "parts"))
    worst = max(float((whole[name] - parts[name]).abs().max()) for name in whole)
    stage.row("save and resume", **{"worst difference of a weight": worst, "equal bits": worst == 0})
    # AdamW moves a weight by 1e-3 a step at most. Kernels that add atomically change the last bits.
    stage.check("resumed weights, from those of one run", worst, most=1e-4 if stage.device == "cuda" else 0)


def _exported(run: Path) -> dict[str, Tensor]:
    return load_file(next((run / "epoch_0").glob("*.safetensors")))


def _scorers(stage: Stage) -> Iterator[tuple[World, Any]]:
    for device in ("cpu", stage.device):
        world = single_process_world(device)
        cell = replace(PRECISE, precision="bf16")
        model = scorer(cell, world, trainable=True)
        model.model.float()
        for module in model.model.modules():
            if hasattr(module, "rope_init"):
                with torch.device(world.device):
                    module.rope_init()
        yield world, model


def _sampling(stage: Stage) -> None:
    """Greedy and random samples; the uniform numbers are drawn on the CPU, so that both devices have the same ones."""
    prompts = [[5, 6, 7], [9, 10, 11, 12, 13], [20]]
    answers: list[list[list[int]]] = []
    seconds = 0.0
    for world, model in _scorers(stage):
        start = time.perf_counter()
        answers.append(
            sample(
                model.model,
                prompts,
                seeds=[1, 2, 3],
                max_new_tokens=16,
                eos_id=1,
                pad_id=0,
                world=world,
                top_k=50,
            )
        )
        seconds = time.perf_counter() - start
    pairs = [(a, b) for one, two in zip(*answers, strict=True) for a, b in zip(one, two, strict=False)]
    different = sum(a != b for a, b in pairs)
    stage.row(
        "sampling", tokens=len(pairs), different=different, **{"ms per token": round(1000 * seconds / 16, 2)}
    )
    stage.check("sampled tokens that differ from the CPU's", different / len(pairs), most=0.1)


def _attribution(stage: Stage) -> None:
    """Gradients at the embeddings, in float32."""
    found = []
    for world, model in _scorers(stage):
        batch = pairs_of(PRECISE, 0, 384).to(world.device)
        found.append(token_importances(model, batch.tokens, batch.labels, target=MaxLogit()).cpu())
    error = float((found[1] - found[0]).norm() / found[0].norm())
    stage.check("attribution, from the CPU's", error, most=1e-4)


class HostReads(TorchDispatchMode):
    """Counts operations that read a device's number on the host, for which the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation, and count it if it is one of them."""
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select") or _to_host(func, args, kwargs or {}):
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def _to_host(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether this copies a tensor from a GPU to the CPU."""
    name, first = func.overloadpacket.__name__, args[0] if args else None
    if not isinstance(first, Tensor):
        return False
    if name == "_to_copy":
        target = kwargs.get("device")
        return first.is_cuda and target is not None and torch.device(target).type == "cpu"
    source = args[1] if name == "copy_" and len(args) > 1 else None
    return isinstance(source, Tensor) and source.is_cuda and not first.is_cuda


def _host_reads(stage: Stage) -> None:
    """Of the third step of a bfloat16 training; on CUDA also the synchronisations that torch itself reports."""
    cell = Cell("tiny", pairs=4, lengths="unequal", loss="tdpo2")
    training = Training(cell, single_process_world(stage.device))
    for step in range(2):
        training.step(step)
    with HostReads() as reads:
        training.step(2)
    stage.row("host reads of a step", total=sum(reads.counts.values()), **reads.counts)
    if stage.device != "cuda":
        stage.skip("synchronisations of a step", "torch reports them for CUDA only")
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            training.step(3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    count = sum("synchroniz" in str(warning.message) for warning in said)
    stage.row("synchronisations of a step", **{"reported by torch": count})
