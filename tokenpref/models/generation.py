"""Sampling from a decoder with a KV cache: batched, reproducible row by row, and safe under FSDP2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from tokenpref.distributed import World
from tokenpref.errors import TokenprefError
from tokenpref.models.decoder import Decoder, evaluating, uncompiled
from tokenpref.models.decoder_of import decoder_of

__all__ = ["sample", "sampling_probabilities"]

_ENDED, _RUNNING, _NOT_FINITE = range(
    3
)  # what a rank reports to the others after a token; the largest value counts


@torch.no_grad()
def sample(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    seeds: Sequence[int],
    max_new_tokens: int,
    eos_id: int,
    pad_id: int,
    world: World,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    batch_size: int = 32,
) -> list[list[int]]:
    """Continue prompts with tokens sampled from the model.

    For each token, a row draws one uniform number from a generator with the row's seed, and the inverse of the cumulative
    distribution gives the token. The sample therefore does not depend on the other rows, the batch size, or the number of
    ranks. Every rank runs the same number of forwards, independent of its prompts and their ends.

    Args:
        model: a torchtune decoder or a causal LM of transformers, sharded or not. Its modules' modes are restored and its caches
            are removed afterwards.
        prompts: this rank's token ids, each with at least one token; ranks may hold different numbers.
        seeds: one for each prompt.
        max_new_tokens: tokens to sample at most.
        eos_id: ends a row; it is kept as the row's last token.
        pad_id: any valid token id; fills the left of shorter prompts, unseen by attention.
        world: the run's processes.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among the k likeliest tokens only.
        top_p: sample among the fewest likeliest tokens that hold this much probability.
        batch_size: rows in one forward.

    Returns:
        The new tokens of each prompt.

    Raises:
        ValueError: for an empty prompt, a number out of range, or a prompt that with ``max_new_tokens`` exceeds
            the model's context.
        TokenprefError: if the model's logits are nan or infinite, or another rank's arguments were refused.
    """
    decoder = decoder_of(model)
    world.together(
        lambda: _check(decoder, prompts, seeds, max_new_tokens, temperature, top_k, top_p, batch_size)
    )
    choose = partial(_choose, temperature=temperature, top_k=top_k, top_p=top_p)
    outputs: list[list[int]] = []
    with evaluating(model), uncompiled():
        for index in range(world.max(-(-len(prompts) // batch_size))):
            part = slice(index * batch_size, (index + 1) * batch_size)
            uniforms = _uniforms(seeds[part], max_new_tokens)
            outputs += _sample_batch(decoder, prompts[part], uniforms, choose, eos_id, pad_id, world)
    return outputs


def sampling_probabilities(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Probabilities ``[B, V]`` (float64) that sampling draws from, after temperature, top-k and top-p.

    Args:
        logits: ``[B, V]``.
        temperature: above 0.
        top_k: keep the k likeliest tokens.
        top_p: of those, keep the fewest likeliest whose probabilities sum to at least this.

    Among equally likely tokens, those with the lower ids are kept, as in argmax; bfloat16 logits are often equal.
    """
    logits = logits.double()
    # Subtracted before the division, because a temperature near 0 would give inf - inf for large logits.
    probabilities = torch.softmax((logits - logits.amax(-1, keepdim=True)) / temperature, dim=-1)
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = probabilities.topk(top_k, dim=-1).values[:, -1:]
        above, level = probabilities > smallest, probabilities == smallest
        room = top_k - above.sum(-1, keepdim=True)
        probabilities = torch.where(above | (level & (level.cumsum(-1) <= room)), probabilities, 0)
    if top_p is not None and top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True, stable=True)
        ordered = ordered / ordered.sum(-1, keepdim=True)
        # A token is kept if the likelier ones do not reach top_p. At least one token is always kept.
        ordered = torch.where(ordered.cumsum(-1) - ordered < top_p, ordered, 0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered)
    return probabilities / probabilities.sum(-1, keepdim=True)


def _sample_batch(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    uniforms: Tensor,
    choose: Callable[[Tensor, Tensor], Tensor],
    eos_id: int,
    pad_id: int,
    world: World,
) -> list[list[int]]:
    # A rank without further prompts continues a padding token, because all ranks must run the same forwards.
    padded = list(prompts) or [[pad_id]]
    rows, longest, steps = len(padded), max(map(len, padded)), uniforms.shape[1]
    device = world.device
    tokens = torch.full((rows, longest), pad_id, dtype=torch.int64)
    for row, prompt in enumerate(padded):
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
    padding = torch.tensor([longest - len(prompt) for prompt in padded])
    mask, positions = _left_padded(padding, longest + steps)
    tokens, mask, positions, uniforms = (t.to(device) for t in (tokens, mask, positions, uniforms))
    drawn = torch.full((rows, steps), eos_id, dtype=torch.int64, device=device)
    alive = torch.full((rows,), len(prompts) > 0, dtype=torch.bool, device=device)
    with decoder.cache(rows, longest + steps, device) as cache:
        seen, start = tokens, 0
        for step in range(steps):
            end = longest + step
            logits = decoder.next_token_logits(
                seen, mask=mask[:, start:end], positions=positions[:, start:end], cache=cache
            )
            chosen = choose(logits, uniforms[:, step])
            drawn[:, step] = torch.where(alive, chosen, eos_id)
            alive = alive & (chosen != eos_id)
            if not _goes_on(logits, alive, world, step):
                break
            seen, start = drawn[:, step : step + 1], end
    return [_until_eos(row, eos_id) for row in drawn.tolist()[: len(prompts)]]


def _goes_on(logits: Tensor, alive: Tensor, world: World, step: int) -> bool:
    """Whether a row of any rank needs another token. The result and the error are the same on every rank."""
    finite = bool(logits.amax(-1).isfinite().all())
    state = world.max(_NOT_FINITE if not finite else _RUNNING if bool(alive.any()) else _ENDED)
    if state == _NOT_FINITE:
        raise TokenprefError(
            f"the model's logits for new token {step + 1} are nan or infinite, so there is nothing to sample from; "
            "check the checkpoint, or set dtype=fp32"
        )
    return state == _RUNNING


def _choose(
    logits: Tensor, uniforms: Tensor, *, temperature: float, top_k: int | None, top_p: float | None
) -> Tensor:
    """Next tokens ``[B]`` from logits ``[B, V]`` and one uniform number for each row."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = sampling_probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    return _inverse_cdf(probabilities, uniforms)


def _left_padded(padding: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Attention mask ``[B, length, length]`` and positions ``[B, length]`` of left-padded rows."""
    columns = torch.arange(length)
    real = columns >= padding[:, None]
    causal = columns[:, None] >= columns
    # Padding attends to itself: a row of the mask without any True would give nan, which spreads through the cache.
    mask = (causal & real[:, None, :]) | torch.eye(length, dtype=torch.bool)
    return mask, (columns - padding[:, None]).clamp(min=0)


def _inverse_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The token whose interval of the cumulative distribution contains the uniform number, ``[B]``."""
    cumulative = probabilities.cumsum(-1)
    target = uniforms[:, None] * cumulative[:, -1:]
    return (
        torch.searchsorted(cumulative, target, right=True).squeeze(-1).clamp(max=probabilities.shape[-1] - 1)
    )


def _uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """``[B, count]`` numbers in [0, 1), each row from its seed only. Without seeds, one unused row."""
    return torch.stack(
        [
            torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            for seed in seeds or [0]
        ]
    )


def _until_eos(tokens: list[int], eos_id: int) -> list[int]:
    return tokens[: tokens.index(eos_id) + 1] if eos_id in tokens else tokens


def _check(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    batch_size: int,
) -> None:
    if len(seeds) != len(prompts):
        raise ValueError(f"each prompt needs one seed: got {len(seeds)} seeds for {len(prompts)} prompts")
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt is empty; give each at least one token, such as BOS")
    if max_new_tokens < 1 or batch_size < 1:
        raise ValueError(
            f"max_new_tokens and batch_size must be at least 1, got {max_new_tokens} and {batch_size}"
        )
    if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(
            f"temperature must be at least 0, top_k at least 1 and top_p in (0, 1]; got {temperature}, {top_k}, {top_p}"
        )
    longest = max((len(prompt) for prompt in prompts), default=0) + max_new_tokens
    if longest > decoder.context:
        raise ValueError(
            f"prompt and {max_new_tokens} new tokens need {longest} positions, the model has {decoder.context}"
        )
    if longest > decoder.sampling_context:
        raise ValueError(
            f"prompt and {max_new_tokens} new tokens need {longest} positions, and the model samples correctly up to its sliding "
            f"window of {decoder.sampling_context} only; set a smaller max_new_tokens, or load it with "
            "tokenpref.models.causal_lm"
        )
