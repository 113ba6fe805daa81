"""Causal language models of transformers behind the seam of :mod:`tokenpref.models.decoder`.

transformers lets an attention function be registered by name, and hands it every keyword of the model's forward. Ours gets the
places of the sequences that way, so the code of the models stays as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tokenpref._torchtune import TiedLinear
from tokenpref._transformers import DynamicCache, PreTrainedModel
from tokenpref.distributed import state_modules
from tokenpref.errors import ConfigError
from tokenpref.models.adapted_linear import LLAMA_LIKE, AdaptedLinear
from tokenpref.models.agreement import Agreement, Difference
from tokenpref.models.decoder import Decoder
from tokenpref.models.described import parse_config
from tokenpref.models.larger_model import Place
from tokenpref.models.padding_free import PackedRows
from tokenpref.models.transformers_attention import ATTENTION, WITH_RULES, register_attention
from tokenpref.models.transformers_proof import prove

__all__ = ["TransformersDecoder", "remember_place", "tie_head"]

_PLACE = "place_in_larger_model"

_NO_LIMIT = 1 << 20
"""The context, in tokens, of models whose config names none because their positions have no end."""

_NOT_NUMBERS = frozenset(
    {
        "transformers_version",
        "architectures",
        "dtype",
        "torch_dtype",
        "use_cache",
        "auto_map",
        "task_specific_params",
        "initializer_range",
        "id2label",
        "label2id",
    }
)


class TransformersDecoder(Decoder):
    """A ``PreTrainedModel`` with a language model head, such as :func:`tokenpref.models.causal_lm` builds.

    Args:
        module: the model.

    Raises:
        TypeError: if it is of another kind.
    """

    module: PreTrainedModel

    def __init__(self, module: nn.Module) -> None:
        if not isinstance(module, PreTrainedModel):
            raise TypeError(
                f"{type(module).__name__} is neither a TransformerDecoder of torchtune nor a causal LM of transformers"
            )
        super().__init__(module)

    @property
    def _config(self) -> Any:
        return self.module.config.get_text_config()

    @property
    def _body(self) -> Any:
        """The model without its head.

        A language model whose class also serves inside a larger model, such as Llama 4, may be its own ``base_model``.
        """
        body = self.module.base_model
        if body is not self.module:
            return body
        return next(child for child in body.children() if isinstance(child, PreTrainedModel))

    @property
    def layers(self) -> nn.ModuleList:
        """See :class:`Decoder`.

        Raises:
            ConfigError: if they are not in one list.
        """
        lists = [child for child in self._body.children() if isinstance(child, nn.ModuleList)]
        if len(lists) != 1:
            raise ConfigError(
                f"model: {type(self._body).__name__} keeps its layers in {len(lists)} lists, and they are sharded and "
                "checkpointed from one list; use another model"
            )
        return lists[0]

    @property
    def embedding(self) -> nn.Embedding:
        """See :class:`Decoder`."""
        embedding: nn.Embedding = self.module.get_input_embeddings()
        return embedding

    @property
    def head_name(self) -> str:
        """See :class:`Decoder`."""
        return _head_name(self.module)

    @property
    def _head(self) -> Any:
        return getattr(self.module, self.head_name)

    @property
    def head_weight(self) -> Tensor:
        """See :class:`Decoder`."""
        head = self._head
        weight: Tensor = head.tied_module.weight if isinstance(head, TiedLinear) else head.weight
        return weight

    @property
    def logit_scale(self) -> float:
        """Granite divides its logits by ``logits_scaling``, Cohere multiplies them with ``logit_scale``."""
        divisor, factor = (
            getattr(self._config, "logits_scaling", None),
            getattr(self._config, "logit_scale", None),
        )
        return (1.0 if factor is None else float(factor)) / (1.0 if divisor is None else float(divisor))

    @property
    def soft_cap(self) -> float | None:
        """Gemma 2 bounds its logits by ``final_logit_softcapping``."""
        cap = getattr(self._config, "final_logit_softcapping", None)
        return None if cap is None else float(cap)

    @property
    def is_tied(self) -> bool:
        """See :class:`Decoder`."""
        return isinstance(self._head, TiedLinear)

    @property
    def context(self) -> int:
        """``max_position_embeddings``; models whose positions have no end, such as BLOOM and Mamba, have none."""
        limit = getattr(self._config, "max_position_embeddings", None)
        return _NO_LIMIT if limit is None else int(limit)

    def numbers(self) -> dict[str, Any]:
        """What ``config.json`` says of the model, apart from files, versions and token ids."""
        return _numbers(self._config)

    def compare(self, config: Mapping[str, Any], *, longest: int | None = None) -> Agreement:
        """See :class:`Decoder`. What is switched off for training, such as dropout, is not compared."""
        part = config.get("text_config")
        named = part if isinstance(part, Mapping) else config
        there, here = (
            _numbers(parse_config(config).get_text_config()),
            self.numbers(),
        )
        positions = (numbers.get("max_position_embeddings") for numbers in (there, here))
        fits = longest is not None and all(isinstance(n, int) and longest <= n for n in positions)
        same = {"max_position_embeddings"} if fits else set()
        return Agreement(
            [
                Difference(key, there.get(key), here.get(key), given=key in named)
                for key in sorted({*there, *here} - same)
                if there.get(key) != here.get(key)
            ]
        )

    @property
    def named_as_on_disk(self) -> bool:
        """transformers itself reads such folders."""
        return True

    def on_disk(self, name: str, layer: Any) -> AdaptedLinear:
        """The same order as in the model, and the same name unless the model is a part of a larger one."""
        out_dim, in_dim = int(layer.lora_b.weight.shape[0]), int(layer.lora_a.weight.shape[1])
        place, prefix = self._place, f"{self.module.base_model_prefix}."
        hf_name = name if place is None else f"{place.body}.{name.removeprefix(prefix)}"
        return AdaptedLinear(name, hf_name, in_dim, out_dim, bias=getattr(layer, "bias", None) is not None)

    @property
    def _place(self) -> Place | None:
        """The model's place in the larger model of its folder; None if the folder's model is this one."""
        return self.module.__dict__.get(_PLACE)

    def names_in_transformers(self) -> Collection[str]:
        """See :class:`Decoder`."""
        place = self._place
        return state_modules(self.module).keys() if place is None else place.modules

    def from_torchtune(self, linear: AdaptedLinear, part: str, tensor: Tensor) -> Tensor:
        """See :class:`Decoder`."""
        kind = self._config.model_type
        if kind not in LLAMA_LIKE or part == "magnitude":
            raise ValueError(
                f"torchtune wrote it, with rows of {linear.name} in another order than those of {kind} in transformers; use "
                "torchtune's builder of this model, or train an adapter here"
            )
        return tensor

    @property
    def adapter_settings(self) -> Mapping[str, str]:
        """See :class:`Decoder`."""
        return {
            "rank": "model.lora.rank",
            "alpha": "model.lora.alpha",
            "dora": "model.lora.use_dora",
            "layers": "model.lora.target_modules",
        }

    def check(self) -> None:
        """Check that the head is a linear layer without a bias; whether the logits are as expected is for :meth:`prove`.

        Raises:
            TypeError: if it is not.
        """
        head = self._head
        if not isinstance(head, (nn.Linear, TiedLinear)) or getattr(head, "bias", None) is not None:
            has = " with a bias" if isinstance(head, nn.Linear) else ""
            raise TypeError(
                f"the head of {type(self.module).__name__} is a {type(head).__name__}{has}; token statistics need a linear head "
                "without bias"
            )

    def prepare(self) -> None:
        """Nothing to change."""

    @torch.no_grad()
    def fill_buffers(self, device: torch.device) -> None:
        """Let transformers compute the buffers that are not in checkpoints, as its own loading does.

        It initialises whatever else the same module has, so weights have to be loaded afterwards.
        """
        for module in self.module.modules():
            if any(name in module._non_persistent_buffers_set for name in module._buffers):
                self.module._init_weights(module)

    def install_padding_free(self) -> None:
        """Let the model use our attention. Whether its numbers are right is for :meth:`prove`."""
        register_attention()
        self.module.set_attn_implementation(ATTENTION)

    @cached_property
    def _takes(self) -> frozenset[str]:
        """Names of the arguments of the model's forward."""
        return frozenset(inspect.signature(type(self._body).forward).parameters)

    def hidden(
        self, tokens: Tensor, *, mask: Any = None, positions: Tensor | None = None, cache: Any = None
    ) -> Tensor:
        """The model's own forward up to its head."""
        ours = self.module.config._attn_implementation in (ATTENTION, WITH_RULES)
        arguments: dict[str, Any] = {"use_cache": cache is not None}
        if cache is not None:
            arguments["cache" if "cache" in self._takes else "past_key_values"] = cache
        if ours:
            arguments["segments"] = mask
        elif mask is not None:
            # The last token attends to all that is no padding, which is all that transformers needs to know.
            arguments["attention_mask"] = mask[:, -1, : cache.get_seq_length() + tokens.shape[1]]
        output = self._body(input_ids=tokens, position_ids=positions, **arguments)
        hidden: Tensor = output.last_hidden_state
        return hidden

    def packed_hidden(self, packed: PackedRows) -> Tensor:
        """See :class:`Decoder`. Positions enter as one row of N tokens."""
        tokens, positions = packed.tokens[None], packed.positions[None]
        return self.hidden(tokens, mask=packed.segments, positions=positions).squeeze(0)

    @contextmanager
    def cache(self, rows: int, length: int, device: torch.device) -> Iterator[Any]:
        """A cache of transformers that keeps all keys, because our attention applies the windows of layers itself."""
        ours = self.module.config._attn_implementation == ATTENTION
        yield DynamicCache() if ours else DynamicCache(config=self._config)

    def prove(self, *, padding_free: bool) -> None:
        """See :func:`tokenpref.models.transformers_proof.prove`."""
        prove(self, padding_free=padding_free)


def _numbers(config: Any) -> dict[str, Any]:
    """What a config of transformers says of a model, apart from files, versions and token ids."""
    named: dict[str, Any] = config.to_dict()
    return {
        key: value
        for key, value in named.items()
        if not (
            key in _NOT_NUMBERS or key.startswith("_") or key.endswith("_token_id") or _is_switched_off(key)
        )
    }


def _is_switched_off(key: str) -> bool:
    """Whether a key of a config is a rate of dropout or asks for the routers' loss, which no training here uses."""
    return "dropout" in key or key.endswith("pdrop") or key == "output_router_logits"


def _head_name(module: PreTrainedModel) -> str:
    """The attribute of a causal LM that makes logits: what the body is not."""
    names = [name for name in ("lm_head", "embed_out", "output", "head") if hasattr(module, name)]
    if len(names) != 1:
        raise TypeError(f"{type(module).__name__} has no head by a known name, such as lm_head")
    return names[0]


def remember_place(module: PreTrainedModel, place: Place | None) -> None:
    """Note the place of a model in the larger model of its folder, which names its adapters on disk (in place)."""
    module.__dict__[_PLACE] = place


def tie_head(module: PreTrainedModel) -> None:
    """Let a head that shares the embedding's weight have none of its own (in place).

    A tensor with two names would be sharded, counted and written twice.
    """
    name = _head_name(module)
    delattr(module, name)
    setattr(module, name, TiedLinear(module.get_input_embeddings()))
