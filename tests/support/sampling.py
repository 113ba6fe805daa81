"""Sampling on spawned ranks; the functions must be importable by name."""

from __future__ import annotations

from typing import Any

from support import small
from tokenpref._torchtune import TransformerDecoder
from tokenpref.distributed import World, shard
from tokenpref.models.generation import sample

EOS, PAD = 60, 0


def _run(
    model: TransformerDecoder, prompts: list[list[int]], world: World, **settings: Any
) -> list[list[int]]:
    seeds = [sum(prompt) for prompt in prompts]
    return sample(model, prompts, seeds=seeds, eos_id=EOS, pad_id=PAD, world=world, **settings)


def on_ranks(world: World, cases: list[list[list[list[int]]]], settings: dict[str, Any]) -> dict[str, Any]:
    """What a sharded model does on this rank; several questions at once, since ranks take seconds to start.

    Args:
        world: the rank's world.
        cases: ``cases[i][rank]`` are prompts; the seed of a prompt is the sum of its ids.
        settings: further arguments of ``sample``.

    Returns:
        ``outputs`` of each case, a ``loss`` trained on afterwards, and the ``refusal`` when the prompt of the last
        rank alone is too long.
    """
    model = small.decoder(0)
    shard(model, list(model.layers), world)
    outputs = [_run(model, case[world.rank], world, **settings) for case in cases]
    refusal = "none"
    try:
        _run(model, [[1] * (63 if world.rank == world.size - 1 else 3)], world, max_new_tokens=2)
    except ValueError as error:
        refusal = f"{type(error).__name__}: {error}"
    loss = model(small.batch([0, 1]).tokens)[0].square().mean()
    loss.backward()  # it hangs or fails if sampling left the ranks apart
    return {"outputs": outputs, "refusal": refusal, "loss": loss.item()}
