"""A proof that a model of transformers computes here what its own code computes; made at the start of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torchao.float8.float8_linear import Float8Linear

from tokenpref.errors import ConfigError, TokenprefError
from tokenpref.models.decoder import Decoder, evaluating, uncompiled
from tokenpref.models.padding_free import PackedRows
from tokenpref.models.transformers_attention import WITH_RULES
from tokenpref.ops import AnswerRows
from tokenpref.ops.answers import IGNORE_INDEX

__all__ = ["prove"]

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""The largest difference of logits that is rounding, as a part of the largest logit."""

_ROUGH_TOLERANCE = 0.1
"""The same in bfloat16 and float8 for the median of a position's difference, as a part of its logits' norm.

Rounding lets a mixture of experts choose other experts for a token now and then, which changes the logits of a few positions
much. Small models differed by 0.01 to 0.02, and by 0.27 or more where attention was wrong.
"""


@torch.no_grad()
def prove(decoder: Decoder, *, padding_free: bool) -> None:
    """Compare logits with those of the model's own forward and eager attention, on a few short sequences.

    Their lengths are below the window of most models, so what each layer's attention sees farther back is compared as a rule.

    Raises:
        ConfigError: if they differ, with the difference, or if the model fails.
    """
    proof = _Proof(decoder)
    with evaluating(decoder.module), uncompiled():
        expected = proof.head()
        if padding_free:
            proof.packed(expected)
        else:
            proof.padded(expected)


class _Proof:
    """Its parts, each of which raises ConfigError if it fails.

    Args:
        decoder: of a ``PreTrainedModel``.
    """

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._module: Any = decoder.module

    def head(self) -> Tensor:
        """Compare :meth:`Decoder.run` with the model's own forward; returns the logits ``[N, V]`` of the proof's rows."""
        tokens, rows = self._rows[0], self._rows[2]
        apart = [row[: n + 1] for row, n in zip(tokens, rows.mask.sum(1).tolist(), strict=True)]
        with self._attention_of("eager"):
            with self._failing("fails in its own forward"):
                own = [self._module(input_ids=row[None], use_cache=False).logits[0, :-1] for row in apart]
            padded = self._decoder.logits(tokens)[:, :-1][rows.mask]
            self._module.train()
            trained = self._decoder.logits(tokens)[:, :-1][rows.mask]
            self._module.eval()
        expected = torch.cat(own)
        self._compare(
            expected,
            padded,
            "makes its logits from its last hidden states in another way than by a linear head, a scale and a soft cap, so its "
            "token statistics would be wrong; use another model",
        )
        self._compare(
            padded,
            trained,
            "draws random numbers in training, so policy and reference would not agree; set its rates of noise, such as "
            "router_jitter_noise, to 0 in config.json",
        )
        return expected

    def padded(self, expected: Tensor) -> None:
        """Compare the attention that runs with the eager one; some releases of transformers leave soft caps out of the others."""
        tokens, rows = self._rows[0], self._rows[2]
        kind = self._module.config._attn_implementation
        with self._failing(f"fails with the attention {kind!r}"):
            found = self._decoder.logits(tokens)[:, :-1][rows.mask]
        self._compare(
            expected,
            found,
            f"computes something else with the attention {kind!r} than with eager attention; set padding_free=true, or use "
            "another release of transformers",
        )

    def packed(self, expected: Tensor) -> None:
        """Compare :meth:`Decoder.run_packed` with the model's own logits, and the keys that layers see with its masks."""
        tokens, labels, rows = self._rows
        packed = PackedRows.of(tokens, labels, rows, sides=2)
        with self._failing("cannot score sequences without padding; set padding_free=false"):
            found = self._decoder.run_packed(
                packed, lambda hidden, weight: self._decoder.final_logits(hidden[packed.answers], weight)
            )
            with self._attention_of(WITH_RULES):
                self._decoder.run(tokens[:1], lambda hidden, _weight: hidden)
        self._compare(
            expected, found, "computes something else where sequences are not padded; set padding_free=false"
        )

    @cached_property
    def _rows(self) -> tuple[Tensor, Tensor, AnswerRows]:
        decoder = self._decoder
        tokens, labels = _batch(decoder.vocabulary, decoder.context, decoder.head_weight.device)
        return tokens, labels, AnswerRows.of(labels)

    @contextmanager
    def _failing(self, fault: str) -> Iterator[None]:
        """Name the model in an error of its own code.

        Raises:
            ConfigError: for any error except one of memory.
        """
        try:
            yield
        except (TokenprefError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the model's own code may raise nearly anything
            said = (str(error).strip().splitlines() or [""])[0]
            raise ConfigError(
                f"model: {type(self._module).__name__} {fault} ({type(error).__name__}: {said})"
            ) from error

    def _compare(self, expected: Tensor, found: Tensor, fault: str) -> None:
        """Compare logits ``[N, V]`` of the proof's rows.

        Raises:
            ConfigError: if they differ by more than rounding.
        """
        dtype = next(
            (logits.dtype for logits in (expected, found) if logits.dtype not in _TOLERANCE), expected.dtype
        )
        if dtype not in _TOLERANCE or any(
            isinstance(module, Float8Linear) for module in self._module.modules()
        ):
            # The first row is right even where sequences mix, because it comes before the others.
            first = int(self._rows[2].mask[0].sum())
            wanted, difference = (
                (x - x.mean(-1, keepdim=True)).norm(dim=-1)[first:]
                for x in (expected.float(), (found - expected).float())
            )
            measured, most = float((difference / wanted.clamp(min=1e-6)).median()), _ROUGH_TOLERANCE
            said = f"At half of the positions, logits differ by {measured:.1e} of their norm or more"
        else:
            largest = expected.abs().max().clamp(min=1e-6)
            measured, most = float((expected - found).abs().max() / largest), _TOLERANCE[dtype]
            said = f"Logits differ by {measured:.1e} of the largest one"
        if not measured <= most:
            raise ConfigError(f"model: {type(self._module).__name__} {fault}. {said}")

    @contextmanager
    def _attention_of(self, implementation: str) -> Iterator[None]:
        before = self._module.config._attn_implementation
        self._module.set_attn_implementation(implementation)
        try:
            yield
        finally:
            self._module.set_attn_implementation(before)


def _batch(vocabulary: int, context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two pairs of short sequences whose answers begin alike: tokens and labels ``[4, 12]``, right padded."""
    lengths = torch.tensor([12, 7, 9, 10], device=device).clamp(max=context)
    places = torch.arange(12, device=device)
    tokens = (3 + places + 17 * torch.arange(4, device=device)[:, None]) * 7 % vocabulary
    tokens[2:, :4] = tokens[:2, :4]
    inside = places < lengths[:, None]
    return torch.where(inside, tokens, 0), torch.where(inside, tokens, IGNORE_INDEX)
