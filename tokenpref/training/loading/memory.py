"""Memory that this process took, and that it may still take."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch

__all__ = ["free_memory", "peak_memory_gib", "size_text"]

_MEMINFO = Path("/proc/meminfo")


def peak_memory_gib(device: torch.device) -> float:
    """Highest memory so far in GiB: allocated on the GPU, or resident in RAM when computing on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak * 1024 / 2**30


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process may still take: of its GPU, or its share of the machine's RAM; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not _MEMINFO.is_file():
        return None
    available = next(line for line in _MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(available.split()[1]) * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def size_text(count: int) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
