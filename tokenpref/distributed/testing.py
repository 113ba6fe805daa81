"""Run a function on several gloo ranks of this machine, for tests of everything that talks between ranks."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from tokenpref.distributed.world import init_world

__all__ = ["run_distributed"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _work(
    environment: dict[str, str],
    rank: int,
    size: int,
    port: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    results: Any,
) -> None:
    os.environ.clear()
    os.environ.update(
        environment,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    world = init_world("cpu", timeout_s=120.0)
    try:
        results.put((rank, function(world, *args), None))
    except Exception:  # handed to the parent, which raises it
        results.put((rank, None, traceback.format_exc()))
    finally:
        world.close()


def run_distributed(
    function: Callable[..., Any], *args: Any, size: int = 2, timeout_s: float = 180.0
) -> list[Any]:
    """Call ``function(world, *args)`` on ``size`` gloo ranks, each a new process.

    The ranks come from Python's fork server. ``multiprocessing.set_forkserver_preload(["tokenpref.training"])``, said before the
    first call, spares each of them the seconds that this import takes.

    Args:
        function: a picklable function of a module; its first argument is the rank's :class:`World`.
        args: picklable further arguments.
        size: number of ranks.
        timeout_s: seconds after which a rank without an answer counts as hung.

    Returns:
        The results of the ranks, in rank order. Return plain numbers, numpy arrays or lists: a tensor would be lost
        when its process ends.

    Raises:
        AssertionError: with the rank's traceback, if one failed.
        queue.Empty: if a rank did not answer in time.
    """
    context = mp.get_context("forkserver")
    results = context.Queue()
    port = _free_port()
    workers = [
        context.Process(
            target=_work, args=(dict(os.environ), rank, size, port, function, args, results), daemon=True
        )
        for rank in range(size)
    ]
    for worker in workers:
        worker.start()
    try:
        answers: dict[int, Any] = {}
        for _ in workers:
            rank, value, failure = results.get(timeout=timeout_s)
            if failure is not None:
                raise AssertionError(f"rank {rank} failed:\n{failure}")
            answers[rank] = value
        return [answers[rank] for rank in range(size)]
    finally:
        for worker in workers:
            worker.join(timeout=5)
            if worker.is_alive():
                worker.terminate()
