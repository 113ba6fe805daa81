"""The time that the matrix products of a step would take alone, at the rates that this machine reaches.

Counted are the products that a step cannot do without: the layers' weights with every token that is not padding, a prompt once
for both answers, and the head with the tokens of answers; once in a forward, twice more in a backward. Nothing is computed
twice. Attention's own products are left out, so the floor lies a little too low.

    python -m benchmarks.cpu.floor RESULT.json '{"products": {"body": [4096, 256, 1024]}, "dtypes": ["float32"]}'
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.cpu.process import save
from benchmarks.cpu.work import Shape

__all__ = ["KINDS", "head_floor", "measure", "step_floor", "step_teraflop"]

KINDS = ("forward", "grad_input", "grad_weight")
"""The products of a linear layer with N rows, D inputs and V outputs; each has 2 N D V operations."""

TILES = (512, 2048)
PROBE = (64, 1024)  # rows and outputs of a product that never takes long
LONGEST_S = 2.0  # of one product
SECONDS = 1.0


def _rate(run: Callable[[], Any], operations: float, seconds: float) -> float:
    """Operations a second, the best of many runs."""
    run()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return operations / best


def measure(
    products: Mapping[str, Sequence[int]],
    dtypes: Sequence[str] = ("float32",),
    threads: int = 2,
    seconds: float = SECONDS,
) -> dict[str, dict[str, dict[str, float]]]:
    """Rates in operations a second.

    Args:
        products: name -> rows N, inputs D and outputs V of a linear layer.
        dtypes: what to compute in.
        threads: of torch.
        seconds: spent on each product.

    Returns:
        dtype -> name -> kind -> the best rate over all rows at once, in tiles, and of a small probe.
    """
    import torch

    from tokenpref.models.cpu import use_fast_products
    from tokenpref.ops.products import add_product, product

    use_fast_products()

    torch.set_num_threads(threads)
    rates: dict[str, dict[str, dict[str, float]]] = {}
    for dtype in dtypes:
        for name, (total, width, outputs) in products.items():
            best = dict.fromkeys(KINDS, 0.0)
            probe = (min(total, PROBE[0]), min(outputs, PROBE[1]))
            tiles = [(rows, outputs) for rows in sorted({min(total, tile) for tile in (*TILES, total)})]
            for rows, columns in [probe, *tiles]:
                kind = getattr(torch, dtype)
                x, w, y = (
                    torch.randn(size).to(kind) for size in ((rows, width), (columns, width), (rows, columns))
                )
                to_w = torch.empty_like(w)
                runs: dict[str, Callable[[], Any]] = {
                    "forward": partial(product, x, w.T),
                    "grad_input": partial(product, y, w),
                    "grad_weight": partial(add_product, to_w, y.T, x, begun=False),
                }
                for which, run in runs.items():
                    operations = 2.0 * rows * width * columns
                    # A CPU without a dtype's products would take minutes for what the probe says in a second.
                    if operations < LONGEST_S * best[which] or (rows, columns) == probe:
                        best[which] = max(best[which], _rate(run, operations, seconds / 3))
            rates.setdefault(dtype, {})[name] = best
    return rates


def _passes(mode: str) -> dict[str, dict[str, int]]:
    """How often each product of body and head is needed in a step of a mode."""
    body, head = dict.fromkeys(KINDS, 1), dict.fromkeys(KINDS, 1)
    if mode.endswith("ref"):  # a reference model runs beside the policy
        body["forward"] += 1
        head["forward"] += 1
    elif mode == "tdpo2-cached":  # its hidden states are kept, its logits are not
        head["forward"] += 1
    return {"body": body, "head": head}


def step_teraflop(shape: Shape, mode: str, positions: float, answers: float) -> float:
    """Operations of a step's needed products, in 10^12; see :func:`step_floor`."""
    size = {"body": positions * shape.body_weights, "head": answers * shape.head_weights}
    return sum(2 * size[part] * sum(times.values()) for part, times in _passes(mode).items()) / 1e12


def step_floor(
    shape: Shape, mode: str, positions: float, answers: float, rates: Mapping[str, Mapping[str, float]]
) -> float:
    """Seconds of a step's needed products.

    Args:
        shape: the model's sizes.
        mode: of a step, see :mod:`benchmarks.cpu.work`.
        positions: tokens that are not padding, the prompt counted once for both answers.
        answers: those of them that are scored.
        rates: "body" and "head" of :func:`measure` in the step's dtype.
    """
    size = {"body": positions * shape.body_weights, "head": answers * shape.head_weights}
    return sum(
        2 * size[part] * count / rates[part][kind]
        for part, times in _passes(mode).items()
        for kind, count in times.items()
    )


def head_floor(rows: int, width: int, vocab: int, rates: Mapping[str, float], *, reference: bool) -> float:
    """Seconds of the needed products of a head alone; ``reference``: with another model's logits."""
    times = {"forward": 1 + int(reference), "grad_input": 1, "grad_weight": 1}
    return sum(2.0 * rows * width * vocab * count / rates[kind] for kind, count in times.items())


if __name__ == "__main__":
    save(Path(sys.argv[1]), measure(**json.loads(sys.argv[2])))
