"""Causal language models of transformers behind the seam of :mod:`tokenpref.models.decoder`.

transformers lets an attention function be registered by name, and hands it every keyword of the model's forward. Ours gets the
places of the sequences that way, so the code of the models stays as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.float8.float8_linear import Float8Linear

from tokenpref._torchtune import TiedLinear
from tokenpref._transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from tokenpref.distributed import state_modules
from tokenpref.errors import ConfigError, TokenprefError
from tokenpref.models.adapted_linear import LLAMA_LIKE, AdaptedLinear
from tokenpref.models.agreement import Agreement, Difference
from tokenpref.models.decoder import Decoder, evaluating
from tokenpref.models.described import parse_config
from tokenpref.models.larger_model import Place
from tokenpref.models.padding_free import PackedRows, Segments, attention_by_segment
from tokenpref.ops import AnswerRows
from tokenpref.ops.answers import IGNORE_INDEX

__all__ = ["TransformersDecoder", "remember_place", "tie_head"]

_PLACE = "place_in_larger_model"
_ATTENTION = "tokenpref"
"""The name under which transformers knows our attention."""

_WITH_RULES = "tokenpref_with_rules"
"""The name of the same attention that also compares the keys that it sees with those that the model wants it to see."""

_NO_LIMIT = 1 << 20
"""The context, in tokens, of models whose config names none because their positions have no end."""

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""The largest difference of logits that is rounding, as a part of the largest logit."""

_ROUGH_TOLERANCE = 0.1
"""The same in bfloat16 and float8 for the median of a position's difference, as a part of its logits' norm.

Rounding lets a mixture of experts choose other experts for a token now and then, which changes the logits of a few positions
much.
Small models differed by 0.01 to 0.02, and by 0.27 or more where attention was wrong.
"""

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
        AttentionInterface.register(_ATTENTION, _attention)
        AttentionInterface.register(_WITH_RULES, _attention_with_rules)
        AttentionMaskInterface.register(_WITH_RULES, _rule)
        self.module.set_attn_implementation(_ATTENTION)

    @cached_property
    def _takes(self) -> frozenset[str]:
        """Names of the arguments of the model's forward."""
        return frozenset(inspect.signature(type(self._body).forward).parameters)

    def hidden(
        self, tokens: Tensor, *, mask: Any = None, positions: Tensor | None = None, cache: Any = None
    ) -> Tensor:
        """The model's own forward up to its head."""
        ours = self.module.config._attn_implementation in (_ATTENTION, _WITH_RULES)
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
        ours = self.module.config._attn_implementation == _ATTENTION
        yield DynamicCache() if ours else DynamicCache(config=self._config)

    @torch.no_grad()
    def prove(self, *, padding_free: bool) -> None:
        """Compare logits with those of the model's own forward and eager attention, on a few short sequences.

        Their lengths are below the window of most models, so what each layer's attention sees farther back is compared as a rule.

        Raises:
            ConfigError: if they differ, with the difference, or if the model fails.
        """
        with evaluating(self.module), torch.compiler.set_stance("force_eager"):
            expected = self._prove_head()
            if padding_free:
                self._prove_packed(expected)
            else:
                self._prove_padded(expected)

    def _prove_head(self) -> Tensor:
        """Compare :meth:`run` with the model's own forward; returns the logits ``[N, V]`` of the proof's rows."""
        tokens, rows = self._proof[0], self._proof[2]
        apart = [row[: n + 1] for row, n in zip(tokens, rows.mask.sum(1).tolist(), strict=True)]
        with self._attention_of("eager"):
            with self._failing("fails in its own forward"):
                own = [self.module(input_ids=row[None], use_cache=False).logits[0, :-1] for row in apart]
            padded = self.logits(tokens)[:, :-1][rows.mask]
            self.module.train()
            trained = self.logits(tokens)[:, :-1][rows.mask]
            self.module.eval()
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

    def _prove_padded(self, expected: Tensor) -> None:
        """Compare the attention that runs with the eager one; some releases of transformers leave soft caps out of the others."""
        tokens, rows = self._proof[0], self._proof[2]
        kind = self.module.config._attn_implementation
        with self._failing(f"fails with the attention {kind!r}"):
            found = self.logits(tokens)[:, :-1][rows.mask]
        self._compare(
            expected,
            found,
            f"computes something else with the attention {kind!r} than with eager attention; set padding_free=true, or use "
            "another release of transformers",
        )

    def _prove_packed(self, expected: Tensor) -> None:
        """Compare :meth:`run_packed` with the model's own logits, and the keys that each layer sees with those it should see."""
        tokens, labels, rows = self._proof
        packed = PackedRows.of(tokens, labels, rows, sides=2)
        with self._failing("cannot score sequences without padding; set padding_free=false"):
            found = self.run_packed(
                packed, lambda hidden, weight: self.final_logits(hidden[packed.answers], weight)
            )
            with self._attention_of(_WITH_RULES):
                self.run(tokens[:1], lambda hidden, _weight: hidden)
        self._compare(
            expected, found, "computes something else where sequences are not padded; set padding_free=false"
        )

    @cached_property
    def _proof(self) -> tuple[Tensor, Tensor, AnswerRows]:
        tokens, labels = _proof_batch(self.vocabulary, self.context, self.head_weight.device)
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
        except Exception as error:
            said = (str(error).strip().splitlines() or [""])[0]
            raise ConfigError(
                f"model: {type(self.module).__name__} {fault} ({type(error).__name__}: {said})"
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
            isinstance(module, Float8Linear) for module in self.module.modules()
        ):
            # The first row is right even where sequences mix, because it comes before the others.
            first = int(self._proof[2].mask[0].sum())
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
            raise ConfigError(f"model: {type(self.module).__name__} {fault}. {said}")

    @contextmanager
    def _attention_of(self, implementation: str) -> Iterator[None]:
        before = self.module.config._attn_implementation
        self.module.set_attn_implementation(implementation)
        try:
            yield
        finally:
            self.module.set_attn_implementation(before)


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


def _proof_batch(vocabulary: int, context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Two pairs of short sequences whose answers begin alike: tokens and labels ``[4, 12]``, right padded."""
    lengths = torch.tensor([12, 7, 9, 10], device=device).clamp(max=context)
    places = torch.arange(12, device=device)
    tokens = (3 + places + 17 * torch.arange(4, device=device)[:, None]) * 7 % vocabulary
    tokens[2:, :4] = tokens[:2, :4]
    inside = places < lengths[:, None]
    return torch.where(inside, tokens, 0), torch.where(inside, tokens, IGNORE_INDEX)


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


def _attention(
    _module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    _mask: Any,
    *,
    segments: Segments | Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention of ``[B, heads, L, d]`` queries; returns ``[B, L, heads, d]``.

    Args:
        q: queries.
        k: keys ``[B, heads or fewer, S, d]``.
        v: values.
        segments: the sequences in a row of N positions; or which of the S keys each of L queries sees ``[B, L, S or more]``;
            None: all keys up to its own.
        scaling: factor of the products; None: ``1 / sqrt(d)``.
        sliding_window: how many keys back a query sees, its own included; None: all.
        softcap: bounds the scores by ``softcap tanh(score / softcap)``.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        length, total = q.shape[2], k.shape[2]
        window = sliding_window if sliding_window is not None and sliding_window < total else None
        if mask is None and (window is not None or softcap is not None or length < total):
            mask = _seen(length, total, None, q.device)
        if window is not None and mask is not None:
            mask = mask & _seen(length, total, window, q.device)
        if softcap is not None:
            return _soft_capped(q, k, v, mask, scaling, softcap)
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
        )

    if isinstance(segments, Segments):
        q, k, v = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))
        output = attention_by_segment(
            q, k, v, segments, attention, scale=scaling, window=sliding_window, plain=softcap is None
        )
        return output[None], None
    mask = None if segments is None else segments[:, None, :, : k.shape[2]]
    return attention(q, k, v, mask).transpose(1, 2).contiguous(), None


def _rule(*, mask_function: Callable[..., Tensor], **_: Any) -> Callable[..., Tensor]:
    """What transformers takes for a mask: the rule by which it would make one."""
    return mask_function


def _attention_with_rules(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **arguments: Any
) -> tuple[Tensor, None]:
    """:func:`_attention`, after comparing the keys that it sees with those that the model's mask lets it see.

    Raises:
        ConfigError: if they differ.
    """
    window = arguments.get("sliding_window")
    if not (_sees_window(mask, window, q.device) if callable(mask) else mask is None and window is None):
        seen = "all keys before it" if window is None else f"the last {window} keys"
        raise ConfigError(
            f"model: {type(module).__name__} does not see {seen} as attention without padding does, but others, such as those of "
            "its chunk; set padding_free=false"
        )
    return _attention(module, q, k, v, None, **arguments)


def _sees_window(rule: Callable[..., Tensor], window: int | None, device: torch.device) -> bool:
    """Whether a rule of transformers lets queries see the last ``window`` keys, their own included, or all without one."""
    far = [*range(8), *(2**power + offset for power in range(3, 20) for offset in (-1, 0, 1))]
    near = [] if window is None else [window + offset for offset in (-2, -1, 0, 1) if window + offset >= 0]
    back = torch.tensor(far + near, device=device)
    wanted = torch.ones_like(back, dtype=torch.bool) if window is None else back < window
    zero = back.new_zeros(())
    queries = [zero + _NO_LIMIT, zero + _NO_LIMIT - 1]
    past = all(
        torch.equal(rule(zero, zero, query, query - back).expand_as(back), wanted) for query in queries
    )
    return past and not any(bool(rule(zero, zero, query, query + 1)) for query in queries)


def _seen(length: int, total: int, window: int | None, device: torch.device) -> Tensor:
    """Which of ``total`` keys the last ``length`` positions see ``[L, S]``."""
    back = torch.arange(total - length, total, device=device)[:, None] - torch.arange(total, device=device)
    return back >= 0 if window is None else (back >= 0) & (back < window)


def _soft_capped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None, cap: float
) -> Tensor:
    """The attention of Gemma 2, which PyTorch's has no place for; it makes the ``[L, S]`` scores."""
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = cap * torch.tanh(scores / cap)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype) @ v
