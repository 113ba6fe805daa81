"""Peak memory of this process."""

from __future__ import annotations

import resource
import sys

import torch

__all__ = ["peak_memory_gib"]


def peak_memory_gib(device: torch.device) -> float:
    """Highest memory so far in GiB: allocated on the GPU, or resident in RAM when computing on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak * 1024 / 2**30
