"""torchtune's decoders behind the seam of :mod:`tokenpref.models.decoder`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenpref._torchtune import (
    MultiHeadAttention,
    TiedLinear,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
    local_kv_cache,
)
from tokenpref.distributed import compute_dtype_of
from tokenpref.models.agreement import Agreement, compare_with_config, config_numbers, is_tied
from tokenpref.models.decoder import Decoder
from tokenpref.models.padding_free import PackedRows, Segments, attention_by_segment

__all__ = ["TorchtuneDecoder"]


class TorchtuneDecoder(Decoder):
    """A ``TransformerDecoder``. Its layers pass ``mask`` on to the attention unread."""

    module: TransformerDecoder

    @property
    def layers(self) -> nn.ModuleList:
        """See :class:`Decoder`."""
        return self.module.layers

    @property
    def embedding(self) -> nn.Embedding:
        """See :class:`Decoder`."""
        embedding: nn.Embedding = self.module.tok_embeddings
        return embedding

    @property
    def head_weight(self) -> Tensor:
        """See :class:`Decoder`."""
        output = self.module.output
        weight: Tensor = output.tied_module.weight if isinstance(output, TiedLinear) else output.weight
        return weight

    @property
    def head_name(self) -> str:
        """See :class:`Decoder`."""
        return "output"

    @property
    def is_tied(self) -> bool:
        """See :class:`Decoder`."""
        return is_tied(self.module)

    @property
    def context(self) -> int:
        """See :class:`Decoder`."""
        return int(self.module.max_seq_len)

    def numbers(self) -> dict[str, Any]:
        """See :class:`Decoder`."""
        return config_numbers(self.module)

    def compare(self, config: Mapping[str, Any], *, longest: int | None = None) -> Agreement:
        """See :class:`Decoder`."""
        return compare_with_config(config, self.module, longest=longest)

    def check(self) -> None:
        """Check that the head is a plain linear layer, and the forward that of torchtune.

        Raises:
            TypeError: for any other output layer (with a bias, soft-capped logits, adapters), whose numbers would differ, or for
                a decoder with a forward of its own.
        """
        output = self.module.output
        if not isinstance(output, (nn.Linear, TiedLinear)) or getattr(output, "bias", None) is not None:
            raise TypeError(
                f"the model's output layer is {type(output).__name__}; token statistics need a plain linear head "
                "without bias (nn.Linear or torchtune's TiedLinear)"
            )
        decoder = type(self.module)
        if (decoder.forward, decoder.unembed) != (TransformerDecoder.forward, TransformerDecoder.unembed):
            raise TypeError(
                f"{decoder.__name__} has a forward of its own; token statistics need that of torchtune's TransformerDecoder"
            )

    def fill_buffers(self, device: torch.device) -> None:
        """Build the rotary tables, which are float32 for any dtype of the model."""
        # Some rotary embeddings build no table on the meta device.
        with torch.device("cpu" if device.type == "meta" else device):
            for module in self.module.modules():
                if hasattr(module, "rope_init"):
                    module.rope_init()
                    module.to(device)

    def install_padding_free(self) -> None:
        """Let the attention accept :class:`Segments` as its mask.

        Raises:
            TypeError: if a layer is not torchtune's plain causal self-attention.
        """
        if self.module.__dict__.get("_takes_segments"):
            return
        layers = [m for m in self.module.modules() if isinstance(m, TransformerSelfAttentionLayer)]
        strange = [
            type(layer.attn).__name__
            for layer in layers
            if not isinstance(layer.attn, MultiHeadAttention)
            or not layer.attn.is_causal
            or getattr(layer, "mask_mod", None) is not None
        ]
        if strange or len(layers) != len(self.layers):
            raise TypeError(
                f"the model has {len(self.layers)} layers, {len(layers) - len(strange)} of them with torchtune's causal "
                "self-attention, which batches without padding need of all; set padding_free=false (ScoringModel(..., "
                "padding_free=False))"
            )
        for layer in layers:
            layer.attn._attention_call = partial(_attention, layer.attn._attention_call)
        self.module.__dict__["_takes_segments"] = True

    def prove(self, *, padding_free: bool) -> None:
        """Nothing to compare: :meth:`check` and :meth:`install_padding_free` look at the code that runs."""

    def hidden(
        self, tokens: Tensor, *, mask: Any = None, positions: Tensor | None = None, cache: Any = None
    ) -> Tensor:
        """torchtune's ``forward`` up to its output layer."""
        model = self.module
        hidden = model.tok_embeddings(tokens)
        for layer in model.layers:
            hidden = layer(hidden, mask=mask, input_pos=positions)
        normed: Tensor = model.norm(hidden)
        return normed

    def packed_hidden(self, packed: PackedRows) -> Tensor:
        """See :class:`Decoder`. Positions enter as N rows of one token."""
        tokens, positions = packed.tokens[:, None], packed.positions[:, None]
        return self.hidden(tokens, mask=packed.segments, positions=positions).squeeze(1)

    @contextmanager
    def cache(self, rows: int, length: int, device: torch.device) -> Iterator[None]:
        """torchtune keeps its caches in the layers."""
        with local_kv_cache(
            self.module,
            batch_size=rows,
            device=device,
            dtype=compute_dtype_of(self.module),
            decoder_max_seq_len=length,
        ):
            yield None


def _attention(
    inner: Any, q: Tensor, k: Tensor, v: Tensor, *, mask: Any, dropout_p: float, is_causal: bool
) -> Tensor:
    """torchtune's attention function ``inner``, or inside each of the :class:`Segments` by it (``[N, heads, 1, d]`` each)."""
    if not isinstance(mask, Segments):
        output: Tensor = inner(q, k, v, mask=mask, dropout_p=dropout_p, is_causal=is_causal)
        return output
    return attention_by_segment(
        q.squeeze(2),
        k.squeeze(2),
        v.squeeze(2),
        mask,
        lambda q, k, v: inner(q, k, v, mask=None, dropout_p=dropout_p, is_causal=True),
    ).unsqueeze(2)
