"""The processes of a run, and the few collective operations that the trainer needs."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tokenpref.errors import ConfigError, TokenprefError

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}

__all__ = ["World", "init_world", "launched_by_torchrun", "single_process_world"]


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Without a process group (``mesh`` is None) every collective returns its input, so one code path serves
    a laptop and a cluster.

    Args:
        rank: this process, from 0.
        size: number of processes.
        device: where this process computes.
        mesh: one-dimensional device mesh for FSDP2, or None in a plain single process.
        group: the process group of ``gather_objects``; None for all processes of the run.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh | None = None
    group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and prints."""
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        """True when a process group exists (it may have one member)."""
        return self.mesh is not None

    def sum(self, values: Tensor) -> Tensor:
        """Sum of ``values`` over all processes; every process must call it with the same shape."""
        if self.mesh is None:
            return values
        total = values.to(self.device, copy=True)
        dist.all_reduce(total, op=dist.ReduceOp.SUM)
        return total

    def any(self, flag: bool) -> bool:
        """True on all processes when ``flag`` is true on one of them."""
        return flag if self.mesh is None else self.max(int(flag)) > 0

    def max(self, value: int) -> int:
        """The largest ``value`` over all processes."""
        if self.mesh is None:
            return value
        highest = torch.tensor(value, dtype=torch.int64, device=self.device)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        return int(highest)

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.mesh is not None:
            dist.barrier()

    def broadcast_object(self, value: Any) -> Any:
        """The main process's ``value``, on every process."""
        if self.mesh is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every process's ``value``, in rank order, on every process."""
        if self.mesh is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def together(self, action: Callable[[], T]) -> T:
        """Run ``action`` on this process, and fail on all processes if it fails on one.

        This is for work that may fail on some ranks only (a file on one node's disk, a row in one rank's shard). Otherwise
        the other ranks would wait in the next collective until the timeout.

        Raises:
            Exception: this process's own exception.
            TokenprefError: where only another process failed; the message names the rank and its error.
        """
        failure: Exception | None = None
        result: T | None = None
        try:
            result = action()
        except Exception as error:  # raised again below, after the other ranks know
            failure = error
        messages = self.gather_objects(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, message in enumerate(messages):
            if message is not None:
                raise TokenprefError(f"rank {rank} failed: {message}")
        return result  # type: ignore[return-value]  # no failure: the action's own result

    def aside(self) -> World:
        """The same processes with a new group, for collectives on objects in another thread.

        Every process must call it. Threads that share one group would receive each other's messages.
        """
        return self if self.mesh is None else replace(self, group=dist.new_group(backend="gloo"))

    def close(self) -> None:
        """Leave the process group."""
        if self.mesh is not None and dist.is_initialized():
            dist.destroy_process_group()
            # DTensor's caches keep the mesh forever, and the mesh keeps its groups.
            getattr(self.mesh, "_pg_registry", {}).clear()


def launched_by_torchrun() -> bool:
    """True when ``torchrun`` started this process (as ``tune run --nproc_per_node`` does), even with one rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def single_process_world(device: str | torch.device = "cpu") -> World:
    """A world of this process alone, without a process group."""
    return World(rank=0, size=1, device=torch.device(device))


def init_world(device: str = "cpu", timeout_s: float = 1800.0, *, process_group: bool = False) -> World:
    """Join the run that ``torchrun`` started, or make a world of one process.

    Args:
        device: ``cpu`` or ``cuda``; a rank's GPU is its ``LOCAL_RANK``.
        timeout_s: seconds after which a collective that a rank never joins fails.
        process_group: make a process group for a single process too. Computing in another dtype than the weights' needs FSDP2.

    Returns:
        The world; its mesh lies on ``device`` (never on whatever accelerator the machine happens to have).

    Raises:
        ConfigError: if ``device`` is neither ``cpu`` nor ``cuda``, or there is no GPU.
    """
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"device: {device!r} is not supported; set device=cpu or device=cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: this machine has no usable GPU for {device!r}; set device=cpu")
    if not launched_by_torchrun():
        chosen = torch.device(kind, int(index or 0)) if kind == "cuda" else torch.device("cpu")
        if kind == "cuda":
            torch.cuda.set_device(chosen)
        return _world_of_one(chosen) if process_group else single_process_world(chosen)
    if kind == "cuda":
        here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(here)
    else:
        here = torch.device("cpu")
    _stop_with_the_launcher()
    _join_group(kind, timeout=timedelta(seconds=timeout_s))
    size = dist.get_world_size()
    return World(rank=dist.get_rank(), size=size, device=here, mesh=init_device_mesh(kind, (size,)))


def _world_of_one(device: torch.device) -> World:
    """A world of this process alone, with a process group and a mesh."""
    if device.type == "cuda":
        torch.cuda.init()  # otherwise the mesh would choose a GPU itself
    _join_group(device.type, store=dist.HashStore(), rank=0, world_size=1)
    return World(rank=0, size=1, device=device, mesh=init_device_mesh(device.type, (1,)))


def _join_group(device: str, **settings: Any) -> None:
    if not dist.is_initialized():
        dist.init_process_group(_BACKENDS[device], **settings)
        atexit.register(end_threads)


def end_threads() -> None:
    """Free closed process groups before the interpreter shuts down, because their threads end only then.

    gloo's threads free the tensors of a collective after it is done. If such a thread runs during the interpreter's shutdown,
    it aborts the process ("terminate called without an active exception"), so a training that succeeded ends with an error.
    ``destroy_process_group`` leaves the threads running while anything refers to the group. FSDP2's modules do so, in
    reference cycles.
    """
    gc.collect()


def _stop_with_the_launcher() -> None:
    """Ask Linux to send SIGTERM when torchrun dies. A killed torchrun cannot stop its workers, and they would keep the lock."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # the parent died in between
        os.kill(os.getpid(), signal.SIGTERM)
