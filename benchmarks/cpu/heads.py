"""One head alone: time and memory of a forward and backward from hidden states to token statistics, in a process of its own.

    python -m benchmarks.cpu.heads RESULT.json '{"name": "ours", "rows": 2048, "width": 512, "vocab": 32000}'

The gradients are those of the hidden states and of the head's weight. Memory is the highest in all repetitions less what inputs,
weights and these gradients take. Liger and TRL run in TRL's environment; nothing of ours is imported for them.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.cpu.process import peak_mib, reset_peak, save, settled_mib, versions

__all__ = ["COMPILED", "HEADS", "NATIVE", "PEERS", "Inputs", "draw_inputs", "measure"]

PAIRS = 4  # that the rows are taken for where a head wants whole pairs


@dataclass(frozen=True)
class Inputs:
    """What a head is given.

    Args:
        hidden: ``[N, D]``, with gradient.
        weight: ``[V, D]``, with gradient.
        targets: ``[N]``.
        ref_hidden: the reference's ``[N, D]``, where the KL is computed.
        ref_weight: the reference's ``[V, D]``.
    """

    hidden: Any
    weight: Any
    targets: Any
    ref_hidden: Any = None
    ref_weight: Any = None


# Each head returns a scalar to go back from: the sum of the log-probabilities, and of the KL where it has one; Liger, whose
# loss is inside, returns that.


def _ours(inputs: Inputs, *, kl: bool = False, compiled: bool = False, memory_mb: float | None = None) -> Any:
    from tokenpref.models.cpu import use_fast_products
    from tokenpref.ops import score_tokens

    use_fast_products()
    values = score_tokens(
        inputs.hidden,
        inputs.weight,
        inputs.targets,
        ref_hidden=inputs.ref_hidden,
        ref_head_weight=inputs.ref_weight,
        needs=frozenset({"ref", "kl_ref_policy"} if kl else ()),
        memory_mb=memory_mb,
        compiled=compiled,
    )
    return values["policy_logps"].sum() + (values["kl_ref_policy"].sum() if kl else 0)


def _eager(inputs: Inputs) -> Any:
    logps = (inputs.hidden @ inputs.weight.T).float().log_softmax(-1)
    return logps.gather(-1, inputs.targets[:, None]).sum()


def _eager_kl(inputs: Inputs) -> Any:
    # As TDPO's own code has it: probabilities of the reference, their logarithm, and the policy's log-softmax.
    import torch

    logps = (inputs.hidden @ inputs.weight.T).float().log_softmax(-1)
    with torch.no_grad():
        ref = (inputs.ref_hidden @ inputs.ref_weight.T).float().softmax(-1)
        ref_logps = ref.log()
    kl = (ref * (ref_logps - logps)).sum(-1)
    return logps.gather(-1, inputs.targets[:, None]).sum() + kl.sum()


def _liger(inputs: Inputs) -> Any:
    liger = importlib.import_module("liger_kernel.chunked_loss")
    loss = liger.LigerFusedLinearDPOLoss(compiled=False, use_ref_model=False)
    hidden = inputs.hidden.view(2 * PAIRS, -1, inputs.hidden.shape[-1])
    found = loss(inputs.weight, hidden, inputs.targets.view(2 * PAIRS, -1))
    return found[0] if isinstance(found, tuple) else found


def _trl(inputs: Inputs) -> Any:
    chunked = importlib.import_module("trl.kernels").ChunkedLogProbFunction
    size = importlib.import_module(
        "trl.trainer.utils"
    )._CHUNKED_LOGPROB_CHUNK_SIZE  # tokens of the vocabulary at a time, as its trainers have it
    wanted: tuple[str, ...] = ()  # nothing beside the log-probabilities
    found = chunked.apply(inputs.hidden, inputs.weight, None, inputs.targets, 1.0, size, None, 1.0, wanted)
    return found[0].sum()


HEADS: dict[str, Callable[[Inputs], Any]] = {
    "eager": _eager,
    "liger": _liger,
    "trl": _trl,
    "ours": _ours,
    "ours-128": partial(_ours, memory_mb=128.0),
    "ours-compiled": partial(_ours, compiled=True),
    "eager-kl": _eager_kl,
    "ours-kl": partial(_ours, kl=True),
    "ours-128-kl": partial(_ours, kl=True, memory_mb=128.0),
    "ours-compiled-kl": partial(_ours, kl=True, compiled=True),
}
"""Heads by name. Those that end in ``-kl`` compute the KL from a reference too; ``-128`` keep 128 MiB of logits a model."""

NATIVE = ("eager", "eager-kl", "liger", "trl")
"""Heads that multiply in the dtype that they are given, whatever the machine makes of it."""

COMPILED = ("ours-compiled", "ours-compiled-kl")
"""Our heads with compiled passes."""

PEERS = ("liger", "trl")
"""Heads that live in TRL's environment."""


def draw_inputs(
    rows: int, width: int, vocab: int, dtype: str, *, reference: bool, device: str = "cpu"
) -> Inputs:
    """Random hidden states, heads and targets; those of a reference too where a head computes the KL."""
    import torch

    generator = torch.Generator(device).manual_seed(0)

    def normal(size: tuple[int, int], scale: float) -> Any:
        # In place and in blocks: what is made on the way would stay in the heap and hide memory of the head.
        values = torch.empty(size, dtype=getattr(torch, dtype), device=device)
        for part in values.split(4096):
            part.normal_(0, scale, generator=generator)
        return values

    targets = torch.randint(0, vocab, (rows,), generator=generator, device=device)
    hidden = normal((rows, width), 1.0).requires_grad_()
    weight = normal((vocab, width), width**-0.5).requires_grad_()
    if not reference:
        return Inputs(hidden, weight, targets)
    return Inputs(hidden, weight, targets, normal((rows, width), 1.0), normal((vocab, width), width**-0.5))


def measure(
    name: str,
    rows: int,
    width: int,
    vocab: int,
    dtype: str = "float32",
    threads: int = 2,
    repeats: int = 4,
) -> dict[str, Any]:
    """Best time and highest memory of a head.

    Args:
        name: of :data:`HEADS`.
        rows: positions N.
        width: hidden size D.
        vocab: V.
        dtype: of hidden states and weights.
        threads: of torch.
        repeats: forwards and backwards.

    Returns:
        ``best_s``, ``times_s``, ``above_mib``, ``value`` (the scalar that comes out); or ``failed``, with the reason, where
        a peer's head cannot be imported or run here.
    """
    import torch

    torch.set_num_threads(threads)
    head, reference = HEADS[name], name.endswith("-kl")
    try:
        _once(
            head, draw_inputs(4 * PAIRS, width, 64, dtype, reference=reference)
        )  # libraries load, threads start
    except (ImportError, RuntimeError, NotImplementedError) as error:
        if name not in PEERS:
            raise
        return {"failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    inputs = draw_inputs(rows, width, vocab, dtype, reference=reference)
    base = settled_mib()
    reset_peak()
    times = []
    value = float("nan")
    for _ in range(repeats):
        start = time.perf_counter()
        value = _once(head, inputs)
        times.append(time.perf_counter() - start)
    gradients = sum(t.numel() * t.element_size() for t in (inputs.hidden, inputs.weight)) / 2**20
    return {
        "best_s": min(times),
        "times_s": times,
        "above_mib": peak_mib() - base - gradients,
        "inputs_mib": base,
        "value": value,
        "versions": versions("torch", "trl", "liger-kernel", "tokenpref"),
    }


def _once(head: Callable[[Inputs], Any], inputs: Inputs) -> float:
    import torch

    result = head(inputs)
    grads = torch.autograd.grad(result, (inputs.hidden, inputs.weight))
    del grads
    return float(result.detach())


if __name__ == "__main__":
    save(Path(sys.argv[1]), measure(**json.loads(sys.argv[2])))
