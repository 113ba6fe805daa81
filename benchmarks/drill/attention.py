"""Attention over sequences of many lengths: one call for each length against one call for all, first and second time."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.drill.stage import Stage, timed
from tokenpref._torchtune import llama3_2
from tokenpref.models import varlen
from tokenpref.models.scoring import ScoringModel

__all__ = ["VARIANTS", "attention"]

HEADS, KV_HEADS, WIDTH = 32, 8, 64
"""Of Llama-3.2-1B."""

Attention = Callable[[Tensor, Tensor, Tensor, Sequence[int]], Tensor]
"""Queries ``[M, heads, d]``, keys and values ``[M, kv heads, d]`` of all sequences, their lengths; to ``[M, heads, d]``."""


def loop(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """One call for each sequence, with keys and values repeated for the heads of a group."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    parts = zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True)
    outputs = []
    for part in parts:
        one = (x.transpose(0, 1)[None] for x in part)
        outputs.append(F.scaled_dot_product_attention(*one, is_causal=True)[0].transpose(0, 1))
    return torch.cat(outputs)


def loop_with_flash(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """:func:`loop` with flash attention, which has no plan for each length."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return loop(q, k, v, lengths)


def one_call(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """One call for all sequences, as the package makes it on GPUs."""
    ends = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(q.device, torch.int32)
    return varlen.causal_attention(q, k, v, ends, ends, max(lengths))


VARIANTS: dict[str, Attention] = {"loop": loop, "loop with flash": loop_with_flash, "one call": one_call}
"""Ways to compute the attention of all sequences; each is a row of the table."""


CALLS = (0, 0, 1, 1, 2)
"""Which set of 16 lengths each call has: kernels or plans that are made for a length show as a slow first call."""
COLUMNS = ("first ms", "again ms", "other lengths ms", "those again ms", "more lengths ms")


def lengths_of(count: int, longest: int, seed: int) -> list[int]:
    """So many distinct lengths up to the longest."""
    return random.Random(seed).sample(range(longest // 12, longest), count)


def attention(stage: Stage) -> None:
    """Every variant alone on the same tensors, then a layer of the package."""
    longest = 64 if stage.tiny else 1200
    inputs = [_tensors(stage, lengths_of(16, longest, seed)) for seed in range(3)]
    for name, function in VARIANTS.items():
        if function is one_call and not varlen.takes(inputs[0][0][0], inputs[0][0][2], None):
            stage.skip(f"attention, {name}", "PyTorch's varlen_attn needs a CUDA device")
            continue
        with stage.part(f"attention, {name}"):
            _measure(stage, name, function, inputs)
    layers: dict[str, tuple[bool, bool | None]] = {
        "without padding, as the package chooses": (True, None),
        "without padding, one call for each length": (True, False),
        "padded": (False, None),
    }
    for name, (padding_free, takes) in layers.items():
        with stage.part(f"layer of the package, {name}"):
            # The second variant is what the package does where one call for all is not possible.
            one_by_one = patch.object(varlen, "takes", return_value=takes)
            with nullcontext() if takes is None else one_by_one:
                _layer(stage, name, padding_free, longest)


def _tensors(stage: Stage, lengths: list[int]) -> tuple[list[Tensor], list[int]]:
    generator = torch.Generator(stage.device).manual_seed(len(lengths))
    shapes = [(sum(lengths), heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    tensors = [
        torch.randn(shape, dtype=torch.bfloat16, device=stage.device, generator=generator) for shape in shapes
    ]
    return [x.requires_grad_() for x in tensors[:3]] + tensors[3:], lengths


def _both_ways(function: Attention, tensors: list[Tensor], lengths: list[int]) -> list[Tensor]:
    q, k, v, grad = tensors
    output = function(q, k, v, lengths)
    return [output.detach(), *torch.autograd.grad(output, [q, k, v], grad)]


def _measure(
    stage: Stage, name: str, function: Attention, inputs: list[tuple[list[Tensor], list[int]]]
) -> None:
    _record(
        stage, "attention of 16 lengths", name, [partial(_both_ways, function, *inputs[i]) for i in CALLS]
    )
    tensors, lengths = inputs[0]
    found = _both_ways(function, tensors, lengths)
    precise = [x.detach().float().requires_grad_(x.requires_grad) for x in tensors]
    with sdpa_kernel(SDPBackend.MATH):
        expected = _both_ways(loop, precise, lengths)
    for what, ours, theirs in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
        error = float((ours.float() - theirs).norm() / theirs.norm())
        stage.check(f"{name}, {what} against float32", error, most=0.02)


def _record(stage: Stage, table: str, variant: str, calls: Sequence[Callable[[], Any]]) -> None:
    times = {column: round(timed(call, stage.device), 2) for column, call in zip(COLUMNS, calls, strict=True)}
    stage.row(table, variant=variant, **times)


def _layer(stage: Stage, name: str, padding_free: bool, longest: int) -> None:
    """One layer in the shape of Llama-3.2-1B, scored as in training: forward and backward of 8 pairs of 16 lengths."""
    width, mlp = (64, 128) if stage.tiny else (2048, 8192)
    heads, kv_heads = (4, 2) if stage.tiny else (HEADS, KV_HEADS)
    with torch.device(stage.device):
        decoder = llama3_2(
            vocab_size=512,
            num_layers=1,
            num_heads=heads,
            num_kv_heads=kv_heads,
            embed_dim=width,
            intermediate_dim=mlp,
            max_seq_len=2048,
        ).to(torch.bfloat16)
        for module in decoder.modules():
            if hasattr(module, "rope_init"):
                module.rope_init()
    scorer = ScoringModel(decoder, padding_free=padding_free)

    def run(seed: int) -> None:
        lengths = lengths_of(16, longest, seed)
        tokens = torch.randint(0, 512, (16, max(lengths)), device=stage.device)
        labels = tokens.clone()
        for row, length in enumerate(lengths):
            labels[row, length:] = -100
        stats = scorer.token_stats(tokens, labels, needs=frozenset(), sides=2)
        stats.policy_logps.sum().backward()

    _record(stage, "layer with 16 lengths", name, [partial(run, seed) for seed in CALLS])
