"""Anchors sampled from the policy: the third answer of TI-DPO's triplet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tokenpref._checks import check_choice, check_number
from tokenpref.data import Answer, PreferenceDataset
from tokenpref.errors import ConfigError
from tokenpref.models.generation import sample
from tokenpref.training.credit.live import LiveModels, Refresh, RowCache

__all__ = ["AnchorSampler"]

STARTS = ("prompt", "chosen_prefix")


class AnchorSampler:
    """Answers that are sampled from the policy before a step.

    The noise of an answer depends on (seed, row, step) alone, so neither the batch nor the number of ranks changes it. The
    defaults of the sampling are those of TI-DPO's released code.

    Args:
        max_new_tokens: tokens to sample at most.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among the k likeliest tokens only; None for all.
        top_p: sample among the fewest likeliest tokens that hold this much probability; None for all.
        start: "prompt" samples a whole answer (the released code); "chosen_prefix" continues the beginning of the chosen
            answer (the paper's starting point), which is then also the beginning of the anchor.
        prefix_share: with "chosen_prefix": how much of the chosen answer's tokens (its EOS apart), in (0, 1].
        refresh: "every_step", "every_n_steps" or "once"; see :class:`tokenpref.training.credit.live.Refresh`.
        every_n_steps: for "every_n_steps".
        batch_size: number of answers sampled at a time.
        seed: seed of the noise.

    Raises:
        ConfigError: for a value out of its range.
    """

    def __init__(
        self,
        max_new_tokens: int = 64,
        temperature: float = 0.8,
        top_k: int | None = 50,
        top_p: float | None = 0.95,
        start: str = "prompt",
        prefix_share: float = 0.5,
        refresh: str = "every_step",
        every_n_steps: int | None = None,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            _check_whole(name, value, least=1)
        _check_whole("seed", seed, least=0)
        if top_k is not None:
            _check_whole("top_k", top_k, least=1)
        check_number("temperature", temperature, at_least=0)
        if top_p is not None:
            check_number("top_p", top_p, above=0, at_most=1)
        self._start = check_choice("start", start, STARTS)
        self._prefix_share = check_number("prefix_share", prefix_share, above=0, at_most=1)
        self._max_new_tokens, self._batch_size, self._seed = max_new_tokens, batch_size, seed
        self._sampling: dict[str, Any] = {"temperature": float(temperature), "top_k": top_k, "top_p": top_p}
        self._cache: RowCache[Answer] = RowCache(
            Refresh(refresh, every_n_steps),
            lambda answer: [torch.tensor(part, dtype=torch.int32) for part in (answer[0], [answer[1]])],
            lambda parts: (parts[0].tolist(), int(parts[1])),
        )
        self.state_dict, self.load_state_dict = self._cache.state_dict, self._cache.load_state_dict
        self._places: dict[int, int] = {}

    def bind(self, dataset: PreferenceDataset) -> None:
        """See :class:`tokenpref.training.credit.live.AnchorSource`."""
        self._dataset = dataset
        self._places = {example.row: index for index, example in enumerate(dataset)}
        self._longest = max(len(self._beginning(row)[0]) for row in self._places)

    def check_context(self, limit: int) -> None:
        """Check that every beginning with its sample fits a model's context of ``limit`` tokens.

        Raises:
            ConfigError: if the longest does not.
        """
        room = limit - self._longest
        if self._max_new_tokens > room:
            raise ConfigError(
                f"anchors.max_new_tokens: {self._max_new_tokens} after the longest beginning of {self._longest} tokens exceed "
                f"the model's context of {limit}; set at most {max(room, 0)}, or a shorter max_prompt_len"
            )

    def answers(self, rows: Sequence[int], models: LiveModels) -> list[Answer | None]:
        """See :class:`tokenpref.training.credit.live.AnchorSource`.

        Raises:
            ConfigError: if the longest prompt with ``max_new_tokens`` exceeds the model's context.
        """
        self.check_context(models.policy.decoder.context)
        return self._cache.get(
            rows, models, lambda places: self._sample([rows[place] for place in places], models)
        )

    def _sample(self, rows: list[int], models: LiveModels) -> list[Answer]:
        beginnings = [self._beginning(row) for row in rows]
        found = sample(
            models.policy.model,
            [ids for ids, _ in beginnings],
            seeds=[self._noise(row, models.step) for row in rows],
            max_new_tokens=self._max_new_tokens,
            eos_id=models.eos_id,
            pad_id=models.pad_id,
            world=models.world,
            batch_size=self._batch_size,
            **self._sampling,
        )
        return [(ids + new, start) for (ids, start), new in zip(beginnings, found, strict=True)]

    def _beginning(self, row: int) -> Answer:
        """The token ids to continue, and the index of the answer's first token."""
        index = self._places[row]
        if self._start == "prompt":
            prompt = self._dataset.prompt_ids(index)
            return prompt, len(prompt)
        example = self._dataset[index]
        count = len(example.chosen_ids) - example.chosen_start - example.chosen_has_eos
        kept = math.ceil(self._prefix_share * count)
        return example.chosen_ids[: example.chosen_start + kept], example.chosen_start

    def _noise(self, row: int, step: int) -> int:
        return int(np.random.SeedSequence([self._seed, row, step]).generate_state(1)[0])


def _check_whole(name: str, value: object, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be a whole number of at least {least}, got {value!r}")
