"""Token statistics out of a decoder, with the LM head inside the root's forward; see :mod:`tokenpref.models.decoder`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tokenpref.distributed import World, other_values, own_parts
from tokenpref.models.activations import keep_dora_lean, keep_gates_lean
from tokenpref.models.adapters import adapter_names, adapters_off, has_adapters
from tokenpref.models.cpu import install_on_cpu
from tokenpref.models.decoder import HeadJob
from tokenpref.models.decoder_of import decoder_of
from tokenpref.models.padding_free import PackedRows
from tokenpref.ops import AnswerRows, score_tokens
from tokenpref.ops.answers import check_shapes, needs_of_rows
from tokenpref.stats import TokenStats

__all__ = ["ScoringModel", "logits_of"]


def logits_of(model: nn.Module, tokens: Tensor, **kwargs: Any) -> Tensor:
    """Logits ``[B, L, V]`` of a decoder in its own dtype.

    Args:
        model: a torchtune decoder or a causal LM of transformers.
        tokens: token ids ``[B, L]``.
        kwargs: as in :meth:`tokenpref.models.decoder.Decoder.run` (``mask``, ``positions``).
    """
    return decoder_of(model).logits(tokens, **kwargs)


class ScoringModel:
    """A decoder and its head: hidden states, log-probabilities and token statistics of batches.

    Args:
        model: a torchtune decoder or a causal LM of transformers, sharded or not.
        head_memory_mb: MiB of logits that are kept for the backward pass; see :func:`tokenpref.ops.linear_token_stats`.
        padding_free: score sequences one after another, so that nothing is computed for padding; see
            :mod:`tokenpref.models.padding_free`. False: padded batches, which any decoder takes.
        compiled: compile the passes over the head's logits; see :func:`tokenpref.ops.linear_token_stats`.

    Raises:
        TypeError: for a model without a plain linear head, or with an attention that only takes padded batches.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        head_memory_mb: float | None = None,
        padding_free: bool = True,
        compiled: bool = False,
    ) -> None:
        self.model = model
        self.decoder = decoder_of(model)
        self.decoder.check()
        self.head_memory_mb = head_memory_mb
        self.padding_free = padding_free
        self.compiled = compiled
        self.is_base = False
        self._other_adapter: Mapping[str, Tensor] | None = None
        keep_gates_lean(model)
        keep_dora_lean(model)
        if next(model.parameters()).device.type == "cpu":
            install_on_cpu(model)
        if padding_free:
            self.decoder.install_padding_free()

    def base(self) -> ScoringModel:
        """The same decoder, in the same memory, with its adapters switched off whenever this scores something.

        Raises:
            ValueError: if it has no adapters, because its base would then be itself.
        """
        if not has_adapters(self.model):
            raise ValueError("the model has no adapters that could be switched off")
        base = copy.copy(self)
        base.is_base = True
        return base

    def with_adapter(self, state: Mapping[str, Tensor], world: World) -> ScoringModel:
        """The same decoder, in the same memory, with the values of another adapter whenever this scores something.

        Beside the decoder, only these values are kept. They are in the decoder's place during a call and no longer, so a backward
        pass must not lie in between. Every process must call this.

        Args:
            state: whole tensors of an adapter of the same size on the main process, by their names in the decoder's state dict;
                ignored elsewhere.
            world: the run's processes.

        Raises:
            ValueError: if the model has no adapters.
        """
        if not has_adapters(self.model):
            raise ValueError("the model has no adapters that could have other values")
        other = copy.copy(self)
        other.is_base = False
        other._other_adapter = own_parts(self.model, adapter_names(self.model), state, world)
        return other

    def switched(self) -> AbstractContextManager[None]:
        """What the decoder's forward and backward pass run in.

        Adapters are off for a :meth:`base`, and have other values for a :meth:`with_adapter`.
        """
        if self.is_base:
            return adapters_off(self.model)
        if self._other_adapter is not None:
            return other_values(self.model, self._other_adapter)
        return nullcontext()

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What an optimizer updates and clipping bounds: the parameters that require a gradient.

        A :meth:`base` and a :meth:`with_adapter` have none.
        """
        if self.is_base or self._other_adapter is not None:
            return []
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def head_weight(self) -> Tensor:
        """``[V, D]``; whole only while the root's parameters are gathered."""
        return self.decoder.head_weight

    def hidden(self, tokens: Tensor) -> Tensor:
        """Last hidden states ``[B, L, D]``, after the final norm."""
        with self.switched():
            hidden: Tensor = self.decoder.run(tokens, lambda hidden, _weight: hidden)
        return hidden

    def answer_hidden(self, tokens: Tensor, labels: Tensor, *, sides: int = 1) -> Tensor:
        """Last hidden states ``[N, D]`` at the positions that predict the labelled tokens.

        Args:
            tokens: ``[B, L]`` ids, right padded.
            labels: ``[B, L]`` ids, -100 where no token is scored.
            sides: as in :meth:`token_stats`.

        Returns:
            Row by row, in the order of the tokens.
        """
        rows = AnswerRows.of(labels)
        hidden: Tensor = self._on_answers(tokens, labels, rows, sides, lambda hidden, _weight: hidden)
        return hidden

    def token_stats(
        self,
        tokens: Tensor,
        labels: Tensor,
        *,
        needs: frozenset[str],
        ref_logps: Tensor | None = None,
        ref_hidden: Tensor | None = None,
        ref_head_weight: Tensor | None = None,
        weights: Tensor | None = None,
        sides: int = 1,
    ) -> TokenStats:
        """Statistics of the labelled tokens; see :func:`tokenpref.ops.linear_token_stats`.

        Args:
            tokens: ``[B, L]`` ids, right padded.
            labels: ``[B, L]`` ids, -100 where no token is scored.
            needs: names of the statistics wanted beside the log-probabilities.
            ref_logps: the reference's per-token log-probabilities ``[B, L-1]``, if it scored itself.
            ref_hidden: the reference's last hidden states ``[N, D']`` as :meth:`answer_hidden` returns them, for the KL terms.
            ref_head_weight: the reference's head ``[V, D']``; None: the reference has this model's own head.
            weights: token weights ``[B, L-1]``.
            sides: what the B rows are made of: so many blocks, whose i-th rows answer one prompt. Where sequences are not padded,
                what they begin with alike is computed once.

        Returns:
            Token statistics with ``T = L - 1`` columns; gradients flow to the model.

        Raises:
            ValueError: for wrong shapes, unknown names in ``needs``, or a reference that does not serve them.
        """
        check_shapes(labels, {}, {"weights": weights, "ref_logps": ref_logps})
        computed = needs_of_rows(needs, ref_hidden, ref_logps)
        rows = AnswerRows.of(labels)

        def job(hidden: Tensor, weight: Tensor) -> dict[str, Tensor]:
            # The own head is whole in here alone, and again when FSDP2 gathers it for the backward pass.
            of_reference = weight if ref_hidden is not None and ref_head_weight is None else ref_head_weight
            return score_tokens(
                hidden,
                weight,
                rows.targets,
                ref_hidden=ref_hidden,
                ref_head_weight=of_reference,
                needs=computed,
                logit_scale=self.decoder.logit_scale,
                soft_cap=self.decoder.soft_cap,
                memory_mb=self.head_memory_mb,
                compiled=self.compiled,
            )

        return rows.token_stats(self._on_answers(tokens, labels, rows, sides, job), ref_logps, weights)

    def _on_answers(self, tokens: Tensor, labels: Tensor, rows: AnswerRows, sides: int, job: HeadJob) -> Any:
        """One forward, in which ``job`` gets the hidden states ``[N, D]`` of the answers' positions."""
        if not self.padding_free:
            with self.switched():
                return self.decoder.run(tokens, lambda hidden, weight: job(rows.take(hidden), weight))
        packed = PackedRows.of(tokens, labels, rows, sides)
        with self.switched():
            return self.decoder.run_packed(
                packed, lambda hidden, weight: job(hidden.index_select(0, packed.answers), weight)
            )

    @torch.no_grad()
    def logps(self, tokens: Tensor, labels: Tensor, *, sides: int = 1) -> Tensor:
        """Log-probabilities ``[B, L-1]`` of the labelled tokens, without gradient; 0 elsewhere. ``sides`` as above."""
        return self.token_stats(tokens, labels, needs=frozenset(), sides=sides).policy_logps
