"""What the package asks of a language model, whichever library it comes from.

A model stays a plain module with its own parameter names. :func:`tokenpref.models.decoder_of.decoder_of` looks at it as a
:class:`Decoder`, of which there are two: :class:`~tokenpref.models.torchtune_decoder.TorchtuneDecoder` and
:class:`~tokenpref.models.transformers_decoder.TransformersDecoder`. No code outside this folder asks which one it has.

FSDP2 hands a module its whole weights only inside a forward of that module. The head therefore runs inside a forward of the
root's (:meth:`Decoder.run`). It turns the last hidden states into per-token statistics there, so that ``[B, L, V]`` logits never
exist and FSDP2 reduces the head's gradient like any other.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from tokenpref.distributed import register_forward
from tokenpref.models.adapted_linear import AdaptedLinear
from tokenpref.models.agreement import Agreement
from tokenpref.models.padding_free import PackedRows
from tokenpref.ops import final_logits

__all__ = ["Decoder", "HeadJob", "evaluating", "uncompiled"]

HeadJob = Callable[[Tensor, Tensor], Any]
"""What to make of the last hidden states ``[B, L, D]`` or ``[N, D]`` and the head's weight ``[V, D]``."""

_METHOD = "run_with_head"


class Decoder(ABC):
    """A causal language model: an embedding, layers, a final norm and a linear head. It keeps no state of its own.

    Args:
        module: the model, on any device, sharded or not.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    # --- its parts

    @property
    @abstractmethod
    def layers(self) -> nn.ModuleList:
        """The layers, which are sharded, checkpointed and compiled one by one."""

    @property
    @abstractmethod
    def embedding(self) -> nn.Embedding:
        """The module that embeds the tokens."""

    @property
    @abstractmethod
    def head_weight(self) -> Tensor:
        """The head's weight ``[V, D]``; whole only while the root's parameters are gathered."""

    @property
    @abstractmethod
    def head_name(self) -> str:
        """Name of the head's module, whether or not it has a weight of its own."""

    @property
    def logit_scale(self) -> float:
        """What the head's products are multiplied with; see :func:`tokenpref.ops.final_logits`."""
        return 1.0

    @property
    def soft_cap(self) -> float | None:
        """What bounds the logits; see :func:`tokenpref.ops.final_logits`."""
        return None

    @property
    @abstractmethod
    def is_tied(self) -> bool:
        """Whether the head is the embedding."""

    @property
    @abstractmethod
    def context(self) -> int:
        """The length of its context, in tokens."""

    @property
    def sampling_context(self) -> int:
        """The tokens of a sequence that it can sample correctly, prompt included."""
        return self.context

    @property
    def vocabulary(self) -> int:
        """The number of token ids that it embeds."""
        return int(self.embedding.num_embeddings)

    @property
    def width(self) -> int:
        """The size D of a hidden state."""
        return int(self.embedding.embedding_dim)

    @abstractmethod
    def numbers(self) -> dict[str, Any]:
        """The numbers that decide what it computes, by their keys in ``config.json``, as plain data."""

    @abstractmethod
    def compare(self, config: Mapping[str, Any], *, longest: int | None = None) -> Agreement:
        """Compare it with the ``config.json`` of a checkpoint.

        Args:
            config: the parsed file.
            longest: tokens of the longest sequence that it will see, if that is known.

        Raises:
            ValueError: if the file describes no model.
        """

    # --- its adapters on disk

    @abstractmethod
    def on_disk(self, name: str, layer: Any) -> AdaptedLinear:
        """A layer with an adapter as PEFT's format has it.

        Args:
            name: the layer's name in the state dict.
            layer: torchtune's LoRALinear or DoRALinear, or a similar one.

        Raises:
            ValueError: if PEFT's format has no place for this adapter, with what to do instead.
        """

    @abstractmethod
    def names_in_transformers(self) -> Collection[str]:
        """Names of its modules in transformers, among which PEFT looks for those that get an adapter."""

    @abstractmethod
    def from_torchtune(self, linear: AdaptedLinear, part: str, tensor: Tensor) -> Tensor:
        """A tensor of an adapter that torchtune wrote, with its output rows in this model's order.

        torchtune reorders the rows of B in queries and keys for every model, which is right for Llama-like ones only, and never
        the magnitudes.

        Args:
            linear: the layer.
            part: the tensor's name within the layer in torchtune.
            tensor: the tensor in the file.

        Raises:
            ValueError: if the order in this model is not known.
        """

    @property
    @abstractmethod
    def adapter_settings(self) -> Mapping[str, str]:
        """Names of the builder's arguments that set ``rank``, ``alpha``, ``dora`` and ``layers``, for errors."""

    @property
    @abstractmethod
    def named_as_on_disk(self) -> bool:
        """Whether its tensors have the names of a Hugging Face folder, and so another kind of checkpointer reads them."""

    # --- what it needs before it runs

    @abstractmethod
    def check(self) -> None:
        """Check that its logits are :func:`~tokenpref.ops.final_logits` of the last hidden states and the head's weight.

        Raises:
            TypeError: if they are something else.
        """

    @abstractmethod
    def prepare(self) -> None:
        """Change what the layers need before the first run (in place). A second call has no effect."""

    @abstractmethod
    def fill_buffers(self, device: torch.device) -> None:
        """Compute what no checkpoint holds, such as rotary tables, on a device. On the meta device only the shapes are right."""

    @abstractmethod
    def install_padding_free(self) -> None:
        """Let :meth:`run_packed` work (in place). Other uses are not changed; a second call has no effect.

        Raises:
            TypeError: if its attention is of a kind that cannot.
        """

    @abstractmethod
    def prove(self, *, padding_free: bool) -> None:
        """Compare what :meth:`run` and :meth:`run_packed` give with the model's own forward, where these are not the same code.

        Every process must call it once the weights are there.

        Args:
            padding_free: whether :meth:`run_packed` will be used.

        Raises:
            ConfigError: if they differ, with the difference.
        """

    # --- running it

    @abstractmethod
    def hidden(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Any = None,
    ) -> Tensor:
        """Last hidden states ``[B, L, D]``, after the final norm; to be called in :meth:`run` alone.

        Args:
            tokens: ``[B, L]`` ids.
            mask: ``[B, L, S]``, which of the S tokens so far each token attends to; None: all before it, and itself.
            positions: ``[B, L]``; None: 0 to L - 1.
            cache: what :meth:`cache` made.
        """

    @abstractmethod
    def packed_hidden(self, packed: PackedRows) -> Tensor:
        """Last hidden states ``[N, D]`` of packed rows; to be called in :meth:`run_packed` alone."""

    @abstractmethod
    def cache(self, rows: int, length: int, device: torch.device) -> Any:
        """A context manager: inside, what :meth:`run` computes of keys and values is kept for later calls.

        Its value is the ``cache`` for :meth:`run`.

        Args:
            rows: the number of sequences.
            length: tokens of a sequence at most.
            device: of the tokens.
        """

    def run(
        self,
        tokens: Tensor,
        job: HeadJob,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: Any = None,
    ) -> Any:
        """One forward that ends with ``job`` in place of the head.

        Args:
            tokens: ``[B, L]`` ids.
            job: last hidden states ``[B, L, D]`` and the head's weight ``[V, D]``, which is whole inside the call alone, to what
                is returned. Under FSDP2 that has to be a tensor or a dict of tensors: their backward is hooked.
            mask: see :meth:`hidden`.
            positions: see :meth:`hidden`.
            cache: see :meth:`hidden`.

        Raises:
            TypeError: see :meth:`check`.
            ValueError: for more tokens than the context.
        """
        self.check_length(tokens.shape[1])
        return self._inside(
            lambda: job(self.hidden(tokens, mask=mask, positions=positions, cache=cache), self.head_weight)
        )

    def run_packed(self, packed: PackedRows, job: HeadJob) -> Any:
        """The same for packed rows, of which ``job`` gets the last hidden states ``[N, D]``."""
        self.check_length(max(packed.segments.lengths))
        return self._inside(lambda: job(self.packed_hidden(packed), self.head_weight))

    def check_length(self, longest: int) -> None:
        """Check that a sequence fits the context.

        Raises:
            ValueError: if it does not.
        """
        if longest > self.context:
            raise ValueError(f"a sequence has {longest} tokens and the model's context is {self.context}")

    def final_logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Logits ``[..., V]`` of hidden states ``[..., D]`` in their own dtype."""
        return final_logits(
            nn.functional.linear(hidden, weight), logit_scale=self.logit_scale, soft_cap=self.soft_cap
        )

    def logits(self, tokens: Tensor, **kwargs: Any) -> Tensor:
        """Logits ``[B, L, V]``; arguments as in :meth:`run`."""
        logits: Tensor = self.run(tokens, self.final_logits, **kwargs)
        return logits

    def next_token_logits(self, tokens: Tensor, **kwargs: Any) -> Tensor:
        """Logits ``[B, V]`` of the token after the last one; the head sees that position alone. Arguments as in :meth:`run`."""
        logits: Tensor = self.run(
            tokens, lambda hidden, weight: self.final_logits(hidden[:, -1], weight), **kwargs
        )
        return logits

    def _inside(self, function: Callable[[], Any]) -> Any:
        """Call a function inside a forward of the root's."""
        if _METHOD not in vars(self.module):
            self.check()
            self.prepare()
            setattr(self.module, _METHOD, MethodType(_call, self.module))
            register_forward(self.module, _METHOD)
        return getattr(self.module, _METHOD)(function)


def _call(_module: nn.Module, function: Callable[[], Any]) -> Any:
    return function()


@contextmanager
def uncompiled() -> Iterator[None]:
    """A context in which compiled layers run as plain ones.

    Sampling, attribution and validation during a training call the layers in other modes and with other shapes than a training
    step, and PyTorch would compile the layers for each of these. Its limit of compilations counts all layers of a process
    together. Beyond the limit nothing is compiled any more, and the training itself would be slow from then on.
    """
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; each module's own mode afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
