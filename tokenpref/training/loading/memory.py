"""Memory that this process took."""

from __future__ import annotations

import resource
import sys

import torch

__all__ = ["peak_memory_gib", "size_text"]


def peak_memory_gib(device: torch.device) -> float:
    """Highest memory so far in GiB: allocated on the GPU, or resident in RAM when computing on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak * 1024 / 2**30


def size_text(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
