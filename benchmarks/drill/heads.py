"""The head: its numbers against float64, and its time beside the matrix products that it cannot do without."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.cpu.heads import HEADS, Inputs, draw_inputs
from benchmarks.cpu.process import peak_mib, reset_peak, settled_mib
from benchmarks.drill.stage import Stage, timed
from tokenpref.ops import score_tokens

__all__ = ["NUMBERS", "SPEED", "head_numbers", "head_speed"]

NUMBERS: dict[str, dict[str, Any]] = {"eager": {}, "compiled": {"compiled": True}}
"""Ways to compute the head's statistics: further arguments of ``score_tokens``."""

NEEDS = (
    frozenset[str](),
    frozenset({"ref"}),
    frozenset({"ref", "kl_ref_policy"}),
    frozenset({"ref", "kl_policy_ref"}),
    frozenset({"entropy"}),
    frozenset({"ref", "kl_ref_policy", "kl_policy_ref", "entropy"}),
)
TOLERANCE = {"float32": (1e-5, 1e-4), "bfloat16": (0.02, 0.03)}
"""How far values and gradients may be from float64, relative to their norm."""
KEEPS_ALL, KEEPS_NOTHING = 4096.0, 1e-4
"""MiB of logits that are kept for the backward pass."""


def head_numbers(stage: Stage) -> None:
    """Every statistic, dtype, budget and number of rows of every variant."""
    vocab, width, rows = (500, 32, 37) if stage.tiny else (128_256, 256, 300)
    for variant, dtype in product(NUMBERS, TOLERANCE):
        if variant == "compiled" and stage.tiny and dtype != "float32":
            stage.skip(f"head, {variant}, {dtype}", "takes too long for a test")
            continue
        if not stage.has_time(f"head, {variant}, {dtype}", 10 if variant == "compiled" else 3):
            continue
        with stage.part(f"head, {variant}, {dtype}"):
            _numbers(stage, variant, dtype, vocab, width, rows)


def _numbers(stage: Stage, variant: str, dtype: str, vocab: int, width: int, rows: int) -> None:
    every = draw_inputs(rows, width, vocab, dtype, reference=True, device=stage.device)
    worst_value = worst_gradient = 0.0
    equal_bits = True
    cases = list(product(NEEDS, (rows, 1, 0)))
    if stage.tiny and variant == "compiled":
        cases = [(NEEDS[-1], rows)]
    for needs, count in cases:
        inputs = _first(every, count)
        kept, again = (
            _value_and_gradients(inputs, needs, memory_mb=memory, **NUMBERS[variant])
            for memory in (KEEPS_ALL, KEEPS_NOTHING)
        )
        equal_bits &= all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
        errors = [_error(a, b) for a, b in zip(kept, _truth(inputs, needs), strict=True)]
        worst_value, worst_gradient = max(worst_value, *errors[:-2]), max(worst_gradient, *errors[-2:])
    most_value, most_gradient = TOLERANCE[dtype]
    stage.row(
        "head against float64",
        variant=variant,
        dtype=dtype,
        **{"worst value": f"{worst_value:.1e}", "worst gradient": f"{worst_gradient:.1e}"},
        **{"kept and recomputed": "equal bits" if equal_bits else "differ"},
    )
    about = f"head, {variant}, {dtype}"
    stage.check(f"{about}: values", worst_value, most=most_value)
    stage.check(f"{about}: gradients", worst_gradient, most=most_gradient)
    stage.check(f"{about}: bits that the budget changes", float(not equal_bits), most=0)


def _first(inputs: Inputs, count: int) -> Inputs:
    """The first so many rows. The reference is near the policy, as in training."""
    hidden = inputs.hidden.detach()[:count]
    near = hidden + 0.05 * inputs.ref_hidden[:count]
    weight = inputs.weight.detach()
    return Inputs(
        hidden.requires_grad_(), weight.requires_grad_(), inputs.targets[:count], near, weight.detach()
    )


def _value_and_gradients(inputs: Inputs, needs: frozenset[str], **settings: Any) -> list[Tensor]:
    """The statistics in the order of their names, then the gradients of hidden states and head."""
    reference = {"ref_hidden": inputs.ref_hidden, "ref_head_weight": inputs.ref_weight}
    values = score_tokens(
        inputs.hidden,
        inputs.weight,
        inputs.targets,
        needs=needs,
        **(reference if needs - {"entropy"} else {}),
        **settings,
    )
    return _with_gradients(values, inputs)


def _truth(inputs: Inputs, needs: frozenset[str]) -> list[Tensor]:
    """The same in float64, from the logits of all tokens."""
    precise = Inputs(
        inputs.hidden.detach().double().requires_grad_(),
        inputs.weight.detach().double().requires_grad_(),
        inputs.targets,
    )
    logps = (precise.hidden @ precise.weight.T).log_softmax(-1)
    ref_logps = (inputs.ref_hidden.double() @ inputs.ref_weight.double().T).log_softmax(-1)
    of = {
        "policy_logps": lambda: logps.gather(-1, inputs.targets[:, None])[:, 0],
        "ref": lambda: ref_logps.gather(-1, inputs.targets[:, None])[:, 0],
        "kl_ref_policy": lambda: (ref_logps.exp() * (ref_logps - logps)).sum(-1),
        "kl_policy_ref": lambda: (logps.exp() * (logps - ref_logps)).sum(-1),
        "entropy": lambda: -(logps.exp() * logps).sum(-1),
    }
    names = {"ref": "ref_logps"}
    values = {names.get(name, name): of[name]() for name in ("policy_logps", *needs)}
    return _with_gradients(values, precise)


def _with_gradients(values: dict[str, Tensor], inputs: Inputs) -> list[Tensor]:
    ordered = [values[name] for name in sorted(values)]
    total = sum(
        (index + 1.0) * (value * torch.linspace(0.5, 1.5, len(value), device=value.device)).sum()
        for index, value in enumerate(ordered)
        if value.requires_grad
    )
    gradients = torch.autograd.grad(total, [inputs.hidden, inputs.weight])  # type: ignore[arg-type]
    return [x.detach() for x in (*ordered, *gradients)]


def _error(found: Tensor, expected: Tensor) -> float:
    """The norm of the difference, relative to that of the expected tensor where this is above one."""
    if found.shape != expected.shape:
        return float("inf")
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1.0))


def _products(inputs: Inputs) -> Any:
    """The products alone: logits, and both gradients from a tensor of their size; with a reference its logits too."""
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    logits = hidden @ weight.T
    if inputs.ref_hidden is not None:
        _ = inputs.ref_hidden @ inputs.ref_weight.T
    return logits @ weight, logits.T @ hidden


def _ours(inputs: Inputs, **settings: Any) -> Any:
    return HEADS["ours"](inputs, kl=inputs.ref_hidden is not None, **settings)  # type: ignore[call-arg]


def _all_logits(inputs: Inputs) -> Any:
    return HEADS["eager" if inputs.ref_hidden is None else "eager-kl"](inputs)


SPEED: dict[str, Callable[[Inputs], Any]] = {
    "products alone": _products,
    "eager": _ours,
    "eager, keeps 128 MiB": partial(_ours, memory_mb=128.0),
    "eager, keeps 512 MiB": partial(_ours, memory_mb=512.0),
    "eager, keeps 2048 MiB": partial(_ours, memory_mb=2048.0),
    "compiled": partial(_ours, compiled=True),
    "compiled, keeps 2048 MiB": partial(_ours, compiled=True, memory_mb=2048.0),
    "all logits, plain PyTorch": _all_logits,
}
"""Heads whose time is measured; each is a row of the table, without and with a KL."""


def head_speed(stage: Stage) -> None:
    """Forward and backward in the shape of Llama-3.2-1B in bfloat16, with the full logits of PyTorch as a comparison."""
    rows, width, vocab = (64, 32, 384) if stage.tiny else (6144, 2048, 128_256)
    for kl in (False, True):
        inputs = draw_inputs(rows, width, vocab, "bfloat16", reference=kl, device=stage.device)
        for name, head in SPEED.items():
            about = f"head alone, {name}, {'with' if kl else 'without'} KL"
            if stage.tiny and "compiled" in name:
                stage.skip(about, "takes too long for a test")
                continue
            if not stage.has_time(about, 15 if "compiled" in name else 2):
                continue
            with stage.part(about):
                _speed(stage, name, head, inputs)


def _speed(stage: Stage, name: str, head: Callable[[Inputs], Any], inputs: Inputs) -> None:
    def run() -> None:
        value = head(inputs)
        if isinstance(value, Tensor):
            torch.autograd.grad(value, [inputs.hidden, inputs.weight])

    first = timed(run, stage.device)
    base = settled_mib(stage.device)
    reset_peak(stage.device)
    best = min(timed(run, stage.device) for _ in range(5))
    above = peak_mib(stage.device) - base
    stage.row(
        "head alone",
        head=name,
        KL="no" if inputs.ref_hidden is None else "yes",
        **{"first ms": round(first, 1), "best ms": round(best, 2), "MiB above inputs": round(above)},
    )
