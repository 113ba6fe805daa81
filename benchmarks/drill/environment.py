"""Versions, the card, the attention backends that it offers, and a process group of one."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cpu.process import machine, versions
from benchmarks.drill.stage import Stage, timed
from tokenpref.distributed import init_world

__all__ = ["environment"]

BACKENDS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")


def environment(stage: Stage) -> None:
    """Versions, device, attention backends, rate of a product, and the process group."""
    made = versions("tokenpref", "torch", "triton", "torchtune", "torchao", "transformers", "trl")
    stage.row("versions", **made, cuda=torch.version.cuda, cudnn=_cudnn())
    stage.row("device", **_device(stage.device))
    with stage.part("variable-length attention"):
        stage.row("attention functions", **_varlen())
    for width in (64, 128):
        with stage.part(f"attention backends, {width} numbers per head"):
            _backends(stage, width)
    with stage.part("matrix product"):
        _product(stage)
    with stage.part("process group of one"):
        _process_group(stage)


def _cudnn() -> int | None:
    return torch.backends.cudnn.version() if torch.cuda.is_available() else None


def _device(device: str) -> dict[str, Any]:
    if device == "cpu":
        return {"device": "CPU", "processor": machine()["processor"], "cores": machine()["cores"]}
    about = torch.cuda.get_device_properties(0)
    return {
        "device": about.name,
        "capability": f"{about.major}.{about.minor}",
        "memory GiB": round(about.total_memory / 2**30, 1),
        "multiprocessors": about.multi_processor_count,
    }


def _varlen() -> dict[str, str]:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return {"varlen_attn": "missing in this version of torch"}
    function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    return {"varlen_attn": ", ".join(inspect.signature(function).parameters)}


def _backends(stage: Stage, width: int) -> None:
    """Forward and backward of 512 tokens with every backend alone, and with torch's own choice."""
    heads, tokens = (4, 32) if stage.tiny else (32, 512)
    q, k, v = (
        torch.randn(4, heads, tokens, width, dtype=torch.bfloat16, device=stage.device, requires_grad=True)
        for _ in range(3)
    )

    def run() -> None:
        torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True).sum(), [q, k, v])

    every = [getattr(SDPBackend, name) for name in BACKENDS]
    for name, allowed in [*((b.name, [b]) for b in every), ("torch's choice", every)]:
        about = {"numbers per head": width, "backend": name.lower()}
        try:
            with sdpa_kernel(allowed):
                first = timed(run, stage.device)
                again = min(timed(run, stage.device) for _ in range(3))
        except RuntimeError as error:  # this is how torch says that a backend is not available
            about |= {"first ms": None, "again ms": None, "says": str(error).splitlines()[0][:80]}
        else:
            about |= {"first ms": round(first, 2), "again ms": round(again, 3)}
        stage.row("attention backends", **about)


def _product(stage: Stage) -> None:
    size = 256 if stage.tiny else 8192
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=stage.device) for _ in range(2))
    out: Tensor = torch.empty_like(a)
    run = partial(torch.mm, a, b, out=out)
    timed(run, stage.device)
    best = min(timed(run, stage.device) for _ in range(5))
    stage.row("product", size=size, ms=round(best, 3), **{"TFLOP/s": round(2 * size**3 / best / 1e9, 2)})


def _process_group(stage: Stage) -> None:
    world = init_world(stage.device, process_group=True)
    try:
        total = world.sum(torch.tensor([3.0], device=world.device))
        stage.check("sum over a process group of one", abs(float(total) - 3), most=0)
    finally:
        world.close()
