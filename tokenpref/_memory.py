"""Memory that this process may still take."""

from __future__ import annotations

import os
from pathlib import Path

import torch

__all__ = ["free_memory"]

_MEMINFO = Path("/proc/meminfo")


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process may still take; None where the system does not say.

    On a GPU this is the device's free memory and what PyTorch's caching allocator holds without using it. On a CPU it is this
    process's share of the machine's available memory.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if not _MEMINFO.is_file():
        return None
    available = next(line for line in _MEMINFO.read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(available.split()[1]) * 1024 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
