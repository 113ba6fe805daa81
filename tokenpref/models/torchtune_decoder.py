"""torchtune's decoders behind the seam of :mod:`tokenpref.models.decoder`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokenpref._torchtune import (
    MultiHeadAttention,
    Phi3RotaryPositionalEmbeddings,
    TiedLinear,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
    local_kv_cache,
)
from tokenpref.distributed import compute_dtype_of
from tokenpref.models import varlen
from tokenpref.models.adapted_linear import AdaptedLinear, to_interleaved
from tokenpref.models.agreement import (
    Agreement,
    compare_with_config,
    config_numbers,
    is_tied,
    pairs_interleaved,
)
from tokenpref.models.decoder import Decoder
from tokenpref.models.gemma2 import last_norm, logit_cap, restore_layers, window_of
from tokenpref.models.padding_free import PackedRows, Segments, attention_by_segment

__all__ = ["TorchtuneDecoder"]

# Names of a layer's linear modules in torchtune and in transformers.
_LINEARS = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
_FUSED_IN_PHI3 = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.w1", "mlp.w3")


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
    def soft_cap(self) -> float | None:
        """See :class:`Decoder`."""
        return logit_cap(self.module)

    @property
    def is_tied(self) -> bool:
        """See :class:`Decoder`."""
        return is_tied(self.module)

    @property
    def context(self) -> int:
        """See :class:`Decoder`."""
        return int(self.module.max_seq_len)

    @property
    def sampling_context(self) -> int:
        """See :class:`Decoder`."""
        window = window_of(self.module)
        return self.context if window is None else min(self.context, window)

    def numbers(self) -> dict[str, Any]:
        """See :class:`Decoder`."""
        return config_numbers(self.module)

    def compare(self, config: Mapping[str, Any], *, longest: int | None = None) -> Agreement:
        """See :class:`Decoder`."""
        return compare_with_config(config, self.module, longest=longest)

    def on_disk(self, name: str, layer: Any) -> AdaptedLinear:
        """See :class:`Decoder`."""
        out_dim, in_dim = int(layer.lora_b.weight.shape[0]), int(layer.lora_a.weight.shape[1])
        bias = getattr(layer, "bias", None) is not None
        if name == self.head_name:
            return AdaptedLinear(name, "lm_head", in_dim, out_dim, bias=bias)
        short = _short(name)
        if short not in _LINEARS:
            raise ValueError(
                f"{name} has an adapter, and PEFT's format knows no such layer; name {', '.join(_LINEARS)} or output"
            )
        ropes = (getattr(layer.attn, "pos_embeddings", None) for layer in self.layers)
        if short in _FUSED_IN_PHI3 and any(isinstance(r, Phi3RotaryPositionalEmbeddings) for r in ropes):
            raise ValueError(
                f"{name} is a part of one larger matrix in transformers' Phi-3 (qkv_proj, gate_up_proj), so its adapter cannot "
                "be written in PEFT's format; set lora_attn_modules=[output_proj] and apply_lora_to_mlp=false, or use "
                "tokenpref.models.causal_lm"
            )
        number = name.split(".")[1]
        return AdaptedLinear(
            name, f"model.layers.{number}.{_LINEARS[short]}", in_dim, out_dim, self._reordered(name), bias
        )

    def _reordered(self, name: str) -> int | None:
        """The heads of a layer whose rows are in another order in transformers; None if the order is the same."""
        heads = self._heads(name)
        interleaved = pairs_interleaved(self.module)
        if heads is not None and interleaved is None:
            raise ValueError(
                f"{name} has an adapter, and its rows' order in transformers is not known for its rotary embeddings; leave "
                "q_proj and k_proj out of lora_attn_modules, or use rotary embeddings of torchtune"
            )
        return heads if interleaved else None

    def _heads(self, name: str) -> int | None:
        """Heads of a projection to queries or keys; None for other layers."""
        short = _short(name)
        if short not in ("attn.q_proj", "attn.k_proj"):
            return None
        attention: Any = self.layers[int(name.split(".")[1])].attn
        return int(attention.num_heads if short == "attn.q_proj" else attention.num_kv_heads)

    def names_in_transformers(self) -> Collection[str]:
        """See :class:`Decoder`."""
        inside = [
            f"model.layers.{number}.{name}"
            for number in range(len(self.layers))
            for name in _LINEARS.values()
        ]
        return [*inside, "lm_head"]

    def from_torchtune(self, linear: AdaptedLinear, part: str, tensor: Tensor) -> Tensor:
        """See :class:`Decoder`."""
        if linear.bias and part == "magnitude":
            raise ValueError(
                f"torchtune wrote it, and {linear.name} has a bias, which torchtune scales with the magnitude unlike PEFT and "
                "this package; train an adapter here"
            )
        heads = self._heads(linear.name)
        return tensor if heads is None or part != "lora_b.weight" else to_interleaved(tensor, heads)

    @property
    def adapter_settings(self) -> Mapping[str, str]:
        """See :class:`Decoder`."""
        return {
            "rank": "model.lora_rank",
            "alpha": "model.lora_alpha",
            "dora": "model.use_dora",
            "layers": "model.lora_attn_modules and model.apply_lora_to_mlp",
        }

    @property
    def named_as_on_disk(self) -> bool:
        """torchtune has names of its own."""
        return False

    def check(self) -> None:
        """Check that the head is a plain linear layer, and the forward that of torchtune.

        Raises:
            TypeError: for any other output layer (with a bias, adapters), whose numbers would differ, or for a decoder with a
                forward of its own.
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

    def prepare(self) -> None:
        """See :class:`Decoder`."""
        restore_layers(self.module)

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
                "self-attention, which batches without padding need of all; set padding_free=false"
            )
        for layer in layers:
            layer.attn._attention_call = partial(
                _attention, layer.attn._attention_call, layer.attn.num_heads // layer.attn.num_kv_heads
            )
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
        normed: Tensor = last_norm(model)(hidden)
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


def _short(name: str) -> str:
    """``attn.q_proj`` for ``layers.0.attn.q_proj``; an empty text for names of another form."""
    match = re.fullmatch(r"layers\.\d+\.(\w+\.\w+)", name)
    return match[1] if match else ""


def _attention(
    inner: Any, groups: int, q: Tensor, k: Tensor, v: Tensor, *, mask: Any, dropout_p: float, is_causal: bool
) -> Tensor:
    """torchtune's attention function ``inner``, or attention inside each of the :class:`Segments`.

    Tensors are ``[N, heads, 1, d]`` then. torchtune repeats each key and value for its ``groups`` heads.
    """
    if not isinstance(mask, Segments):
        output: Tensor = inner(q, k, v, mask=mask, dropout_p=dropout_p, is_causal=is_causal)
        return output
    q, k, v = (x.squeeze(2) for x in (q, k, v))
    if varlen.takes(q, v, None):
        k, v = k[:, ::groups], v[:, ::groups]
    return attention_by_segment(
        q, k, v, mask, lambda q, k, v: inner(q, k, v, mask=None, dropout_p=dropout_p, is_causal=True)
    ).unsqueeze(2)
