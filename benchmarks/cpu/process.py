"""What a process can say of itself and its machine: memory, time, versions. Needs nothing of ours."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "StepClock",
    "busy_seconds",
    "machine",
    "peak_mib",
    "reset_peak",
    "rss_mib",
    "save",
    "settled_mib",
    "versions",
    "wait",
]


def _status(name: str) -> float:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {name}; this benchmark needs Linux")


def rss_mib() -> float:
    """Resident memory now."""
    return _status("VmRSS")


def settled_mib(device: str = "cpu") -> float:
    """Resident memory after all that loading left behind has gone back to the system: what is in use.

    Args:
        device: "cuda" for the memory that tensors have on the GPU.
    """
    gc.collect()
    if device == "cuda":
        import torch

        return torch.cuda.memory_allocated() / 2**20
    ctypes.CDLL(None).malloc_trim(0)
    return rss_mib()


def peak_mib(device: str = "cpu") -> float:
    """Highest resident memory, or allocated memory of the GPU, since :func:`reset_peak`."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    return _status("VmHWM")


def reset_peak(device: str = "cpu") -> None:
    """Let the highest memory count from here."""
    if device == "cuda":
        import torch

        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def wait(device: str) -> None:
    """Wait until a GPU has done all that it was given."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


class StepClock:
    """Wall and CPU seconds of every step (CPU: user and system, all threads).

    Args:
        device: "cuda" to wait for the GPU at the beginning and the end of a step.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self._start = (0.0, 0.0)

    def begin(self) -> None:
        """A step begins."""
        wait(self.device)
        self._start = time.perf_counter(), time.process_time()

    def end(self) -> None:
        """It is done."""
        wait(self.device)
        self.wall.append(time.perf_counter() - self._start[0])
        self.cpu.append(time.process_time() - self._start[1])

    def summary(self, tokens: Sequence[int], warmup: int) -> dict[str, Any]:
        """Times after the first ``warmup`` steps; ``tokens`` are those that each step is credited with."""
        wall, cpu, count = self.wall[warmup:], self.cpu[warmup:], sum(tokens[warmup:])
        return {
            "step_s": self.wall,
            "step_cpu_s": self.cpu,
            "warmup": warmup,
            "median_step_s": statistics.median(wall),
            "median_step_cpu_s": statistics.median(cpu),
            "timed_s": sum(wall),
            "tokens_per_s": count / sum(wall),
            "tokens_per_cpu_s": count / sum(cpu),
        }


def versions(*names: str) -> dict[str, str]:
    """Installed versions, of Python too; those that are missing are left out."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Processor, usable cores, memory and system; nothing that names the machine."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    about = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines) if v}
    flags = set(about.get("flags", "").split())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": about.get("model name", platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory, 1),
        "instructions": [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags],
        "system": f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver())}",
    }


def busy_seconds() -> float:
    """CPU seconds that all processes of the machine have used since it started."""
    fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq = (int(field) for field in fields[:7])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def save(path: Path, result: Any) -> None:
    """Write a result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1), encoding="utf-8")
