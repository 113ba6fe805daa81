"""Token statistics out of a torchtune decoder, with the LM head inside the root's forward.

FSDP2 hands a module its whole weights only inside a forward of that module. The head therefore runs inside a forward of the
root's (:func:`run_decoder`). It turns the last hidden states into per-token statistics there, so that ``[B, L, V]`` logits never
exist and FSDP2 reduces the head's gradient like any other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenpref._torchtune import TiedLinear, TransformerDecoder
from tokenpref.distributed import World, other_values, own_parts, register_forward
from tokenpref.models.activations import keep_dora_lean, keep_gates_lean
from tokenpref.models.adapters import adapter_names, adapters_off, has_adapters
from tokenpref.models.cpu import install_on_cpu
from tokenpref.models.padding_free import PackedRows, Segments, install_segments
from tokenpref.ops import AnswerRows, score_tokens
from tokenpref.ops.answers import check_shapes, needs_of_rows
from tokenpref.stats import TokenStats

__all__ = [
    "HeadJob",
    "ScoringModel",
    "check_head",
    "head_weight",
    "logits_of",
    "next_token_logits",
    "run_decoder",
]

HeadJob = Callable[[Tensor, Tensor], Any]
"""What to make of the last hidden states ``[B, L, D]`` and the head's weight ``[V, D]``."""

_METHOD = "run_with_head"


def check_head(model: TransformerDecoder) -> None:
    """Check that a decoder's logits are its last hidden states times the weight of its output layer.

    Raises:
        TypeError: for any other output layer (with a bias, soft-capped logits, adapters), whose numbers would differ, or for a
            decoder with a forward of its own.
    """
    output = model.output
    if not isinstance(output, (nn.Linear, TiedLinear)) or getattr(output, "bias", None) is not None:
        raise TypeError(
            f"the model's output layer is {type(output).__name__}; token statistics need a plain linear head "
            "without bias (nn.Linear or torchtune's TiedLinear)"
        )
    decoder, own = type(model), isinstance(model, TransformerDecoder)
    if own and (decoder.forward, decoder.unembed) != (TransformerDecoder.forward, TransformerDecoder.unembed):
        raise TypeError(
            f"{decoder.__name__} has a forward of its own; token statistics need that of torchtune's TransformerDecoder"
        )


def head_weight(model: TransformerDecoder) -> Tensor:
    """The head's weight ``[V, D]``; whole only while the root's parameters are gathered."""
    output = model.output
    weight: Tensor = output.tied_module.weight if isinstance(output, TiedLinear) else output.weight
    return weight


def run_decoder(
    model: TransformerDecoder,
    tokens: Tensor,
    job: HeadJob,
    *,
    mask: Tensor | Segments | None = None,
    input_pos: Tensor | None = None,
) -> Any:
    """One forward of a decoder that ends with ``job`` in place of the output layer.

    Args:
        model: a torchtune decoder, sharded or not.
        tokens: ``[B, L]`` ids.
        job: last hidden states ``[B, L, D]`` and the head's weight ``[V, D]``, which is whole inside the call alone, to what is
            returned. Under FSDP2 that has to be a tensor or a dict of tensors: their backward is hooked.
        mask: for the layers' attention.
        input_pos: positions ``[B, L]``.

    Raises:
        TypeError: see :func:`check_head`.
        ValueError: for more tokens than the model's context.
    """
    if _METHOD not in vars(model):
        check_head(model)
        setattr(model, _METHOD, MethodType(_run_with_head, model))
        register_forward(model, _METHOD)
    return getattr(model, _METHOD)(tokens, job, mask, input_pos)


def _run_with_head(
    model: TransformerDecoder,
    tokens: Tensor,
    job: HeadJob,
    mask: Tensor | Segments | None,
    input_pos: Tensor | None,
) -> Any:
    """torchtune's ``forward`` up to its output layer."""
    check_length(model, tokens.shape[1])
    hidden = model.tok_embeddings(tokens)
    for layer in model.layers:
        hidden = layer(hidden, mask=mask, input_pos=input_pos)
    return job(model.norm(hidden), head_weight(model))


def check_length(model: TransformerDecoder, longest: int) -> None:
    """Check that a sequence fits the model.

    Raises:
        ValueError: if it does not.
    """
    if longest > model.max_seq_len:
        raise ValueError(f"a sequence has {longest} tokens and the model's context is {model.max_seq_len}")


def logits_of(model: TransformerDecoder, tokens: Tensor, **kwargs: Any) -> Tensor:
    """Logits ``[B, L, V]`` of a decoder in its own dtype.

    Args:
        model: a torchtune decoder.
        tokens: token ids ``[B, L]``.
        kwargs: as in :func:`run_decoder` (``mask``, ``input_pos``).
    """
    logits: Tensor = run_decoder(model, tokens, F.linear, **kwargs)
    return logits


def next_token_logits(model: TransformerDecoder, tokens: Tensor, **kwargs: Any) -> Tensor:
    """Logits ``[B, V]`` of the token after the last one; the head sees that position alone.

    Args:
        model: a torchtune decoder.
        tokens: token ids ``[B, L]``, left padded where they differ in length.
        kwargs: as in :func:`run_decoder` (``mask``, ``input_pos``).
    """
    logits: Tensor = run_decoder(
        model, tokens, lambda hidden, weight: F.linear(hidden[:, -1], weight), **kwargs
    )
    return logits


class ScoringModel:
    """A decoder and its head: hidden states, log-probabilities and token statistics of batches.

    Args:
        model: a torchtune decoder, sharded or not.
        head_memory_mb: MiB of logits that are kept for the backward pass; see :func:`tokenpref.ops.linear_token_stats`.
        padding_free: score sequences one after another, so that nothing is computed for padding; see
            :mod:`tokenpref.models.padding_free`. False: padded batches, which any decoder takes.
        compiled: compile the passes over the head's logits; see :func:`tokenpref.ops.linear_token_stats`.

    Raises:
        TypeError: for a model without a plain linear head, or with an attention that only takes padded batches.
    """

    def __init__(
        self,
        model: TransformerDecoder,
        *,
        head_memory_mb: float | None = None,
        padding_free: bool = True,
        compiled: bool = False,
    ) -> None:
        check_head(model)
        self.model = model
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
            install_segments(model)

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
        return head_weight(self.model)

    def hidden(self, tokens: Tensor) -> Tensor:
        """Last hidden states ``[B, L, D]``, after the final norm."""
        with self.switched():
            hidden: Tensor = run_decoder(self.model, tokens, lambda hidden, _weight: hidden)
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
                memory_mb=self.head_memory_mb,
                compiled=self.compiled,
            )

        return rows.token_stats(self._on_answers(tokens, labels, rows, sides, job), ref_logps, weights)

    def _on_answers(self, tokens: Tensor, labels: Tensor, rows: AnswerRows, sides: int, job: HeadJob) -> Any:
        """One forward, in which ``job`` gets the hidden states ``[N, D]`` of the answers' positions."""
        if not self.padding_free:
            with self.switched():
                return run_decoder(self.model, tokens, lambda hidden, weight: job(rows.take(hidden), weight))
        packed = PackedRows.of(tokens, labels, rows, sides)
        check_length(self.model, max(packed.segments.lengths))
        with self.switched():
            return run_decoder(
                self.model,
                packed.tokens,
                lambda hidden, weight: job(hidden.squeeze(1).index_select(0, packed.answers), weight),
                mask=packed.segments,
                input_pos=packed.positions,
            )

    @torch.no_grad()
    def logps(self, tokens: Tensor, labels: Tensor, *, sides: int = 1) -> Tensor:
        """Log-probabilities ``[B, L-1]`` of the labelled tokens, without gradient; 0 elsewhere. ``sides`` as above."""
        return self.token_stats(tokens, labels, needs=frozenset(), sides=sides).policy_logps
