"""Checks whether a decoder computes the function that a checkpoint's ``config.json`` describes.

Names and shapes of tensors are not enough. With another number of heads, rotary base or norm epsilon, the same weights
load without an error and compute something else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from torch import nn

from tokenpref._torchtune import (
    Gemma2Attention,
    Gemma2FinalNorm,
    GemmaNormEmbeddings,
    GemmaRMSNorm,
    Llama3ScaledRoPE,
    MultiHeadAttention,
    Phi3RotaryPositionalEmbeddings,
    Qwen2RotaryPositionalEmbeddings,
    RMSNorm,
    RotaryPositionalEmbeddings,
    TiedLinear,
    TransformerDecoder,
)
from tokenpref.models.gemma2 import logit_cap

__all__ = ["Agreement", "Difference", "compare_with_config", "config_numbers", "is_tied", "pairs_interleaved"]

FAMILIES = ("llama", "mistral", "qwen2", "phi3", "gemma", "gemma2")
"""Values of ``model_type`` with known defaults."""

_GEMMA = ("gemma", "gemma2")
_PLAIN_ROPE = (RotaryPositionalEmbeddings, Phi3RotaryPositionalEmbeddings, Qwen2RotaryPositionalEmbeddings)
_UNKNOWN = object()
# Factors that torchtune's decoders lack; models such as Granite or Cohere set them.
_NEUTRAL = {
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
}
_SAME_ACTIVATION = {
    "swish": "silu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_pytorch_tanh": "gelu_pytorch_tanh",
}


@dataclass(frozen=True)
class Difference:
    """A number that differs between ``config.json`` and the decoder.

    Args:
        key: its key in ``config.json``.
        file: the value in the file, or the default of transformers if the file has none.
        built: the value of the decoder.
        argument: the argument of torchtune's builders that sets it, if there is one.
        given: whether the file has the key.
    """

    key: str
    file: Any
    built: Any
    argument: str | None = None
    given: bool = True


@dataclass
class Agreement:
    """The result of a comparison.

    Args:
        differences: numbers that differ and change the function.
        notes: what could not be compared, and what matters only for longer sequences.
    """

    differences: list[Difference] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def compare_with_config(
    config: Mapping[str, Any], decoder: TransformerDecoder, *, longest: int | None = None
) -> Agreement:
    """Compare a decoder with the ``config.json`` of transformers.

    Args:
        config: the parsed file; the part ``text_config`` of one that describes several models.
        decoder: the model, on any device.
        longest: tokens of the longest sequence that it will see, if that is known: an attention window
            makes no difference to shorter ones.
    """
    if isinstance(config.get("text_config"), Mapping):
        config = config["text_config"]
    found = Agreement()
    family = str(config.get("model_type", "llama"))
    if family not in FAMILIES:
        found.notes.append(
            f"model_type {family!r} is not one of {', '.join(FAMILIES)}: only the numbers that these share were compared"
        )
    for key, argument, expected, built in _numbers(config, decoder, family):
        if expected is _UNKNOWN:
            continue
        if built is _UNKNOWN:
            found.notes.append(f"{key} was not compared: it cannot be read off the decoder")
        elif not _same(expected, built):
            found.differences.append(Difference(key, expected, built, argument, key.split(" ")[0] in config))
    _compare_rope(config, decoder, longest, found)
    _compare_windows(config, decoder, longest, found)
    positions = config.get("max_position_embeddings")
    if isinstance(positions, int) and longest is not None and longest > positions:
        found.notes.append(
            f"the longest sequence has {longest} tokens and max_position_embeddings is {positions}: the model has not been "
            "trained on the positions behind"
        )
    return found


def config_numbers(decoder: TransformerDecoder) -> dict[str, Any]:
    """The numbers of a decoder that decide what it computes, by their keys in ``config.json``, as plain data.

    Two decoders with the same numbers compute the same function of the same weights. What cannot be read off the decoder is
    left out.
    """
    found = {key: built for key, _, _, built in _numbers({}, decoder, "") if key not in _NEUTRAL}
    ropes = _ropes(decoder)
    found["rope_theta"] = _all_of(ropes, lambda rope: rope.base)
    found["rope_scaling"] = _all_of(ropes, lambda rope: getattr(rope, "scale_factor", None))
    found["sliding_window"] = _each(decoder, lambda layer: _gemma_only(layer.attn, "sliding_window_size"))
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in found.items()
        if value is not _UNKNOWN
    }


def is_tied(decoder: TransformerDecoder) -> bool:
    """Whether the head is the embedding."""
    return _tied(decoder) is True


def pairs_interleaved(decoder: TransformerDecoder) -> bool | None:
    """Whether rotary pairs lie side by side (0, 1, 0, 1, ...); False: in halves; None: not known."""
    kinds = {type(rope) for rope in _ropes(decoder)}
    if kinds and kinds <= {RotaryPositionalEmbeddings, Llama3ScaledRoPE}:
        return True
    if kinds and kinds <= {Phi3RotaryPositionalEmbeddings, Qwen2RotaryPositionalEmbeddings}:
        return False
    return None


def _numbers(
    config: Mapping[str, Any], decoder: TransformerDecoder, family: str
) -> list[tuple[str, str | None, Any, Any]]:
    """Key, builder's argument, the file's value and the decoder's of everything that is one number or word."""
    known = family in FAMILIES
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    whole = isinstance(heads, int) and isinstance(hidden, int) and heads > 0
    head_dim = _first(config.get("head_dim"), hidden // heads if whole else _UNKNOWN)  # type: ignore[operator]
    eps = 1e-5 if family == "phi3" else 1e-6

    def given(key: str, default: Any = _UNKNOWN) -> Any:
        return _first(config.get(key), default)

    rows: list[tuple[str, str | None, Any, Any]] = [
        ("hidden_size", "embed_dim", given("hidden_size"), _read(lambda: decoder.tok_embeddings.embedding_dim)),
        ("vocab_size", "vocab_size", given("vocab_size"), _read(lambda: decoder.tok_embeddings.num_embeddings)),
        ("num_hidden_layers", "num_layers", given("num_hidden_layers"), _read(lambda: len(decoder.layers))),
        ("num_attention_heads", "num_heads", given("num_attention_heads"), _of_attention(decoder, "num_heads")),
        (
            "num_key_value_heads",
            "num_kv_heads",
            given("num_key_value_heads", given("num_attention_heads")),
            _of_attention(decoder, "num_kv_heads"),
        ),
        ("head_dim", "head_dim", head_dim, _of_attention(decoder, "head_dim")),
        (
            "intermediate_size",
            "intermediate_dim",
            given("intermediate_size"),
            _each(decoder, lambda layer: layer.mlp.w1.weight.shape[0]),
        ),
        ("rms_norm_eps", "norm_eps", given("rms_norm_eps", eps if known else _UNKNOWN), _norm_eps(decoder)),
        ("hidden_act", None, _activation(config, family), _each(decoder, _activation_of)),
        (
            "tie_word_embeddings",
            "tie_word_embeddings",
            given("tie_word_embeddings", family in _GEMMA if known else _UNKNOWN),
            _tied(decoder),
        ),
        *_biases(config, decoder, family),
        (
            "attn_logit_softcapping",
            "hidden_capping_value",
            config.get("attn_logit_softcapping", 50.0 if family == "gemma2" else None),
            _each(decoder, lambda layer: _gemma_only(layer.attn, "softcapping")),
        ),
        (
            "final_logit_softcapping",
            "final_capping_value",
            config.get("final_logit_softcapping", 30.0 if family == "gemma2" else None),
            logit_cap(decoder),
        ),
        (
            "query_pre_attn_scalar",
            "query_pre_attn_scalar",
            _query_scalar(config, family),
            _each(decoder, lambda layer: _query_scalar_of(layer.attn)),
        ),
        ("model_type", None, "gemma" if family in _GEMMA else "not gemma", _norm_family(decoder)),
        ("no_rope_layers", None, _rotary_layers(config, decoder), _read(lambda: _has_rope(decoder))),
    ]  # fmt: skip
    rows += [(key, None, given(key, neutral), neutral) for key, neutral in _NEUTRAL.items()]
    return rows


def _first(value: Any, default: Any) -> Any:
    return default if value is None else value


def _read(value: Callable[[], Any]) -> Any:
    """A value of a decoder that may be built differently from torchtune's."""
    try:
        return value()
    except (AttributeError, TypeError, IndexError):
        return _UNKNOWN


def _each(decoder: TransformerDecoder, of: Callable[[Any], Any]) -> Any:
    """The value that all layers share; a tuple of values if they differ."""
    found = _read(lambda: list(dict.fromkeys(of(layer) for layer in decoder.layers)))
    if found is _UNKNOWN or not found or _UNKNOWN in found:
        return _UNKNOWN
    return found[0] if len(found) == 1 else tuple(found)


def _of_attention(decoder: TransformerDecoder, name: str) -> Any:
    return _each(decoder, lambda layer: getattr(layer.attn, name))


def _norm_eps(decoder: TransformerDecoder) -> Any:
    norms = [m for m in decoder.modules() if isinstance(m, (RMSNorm, GemmaRMSNorm, nn.RMSNorm))]
    found = list(dict.fromkeys(norm.eps for norm in norms))
    if not found:
        return _UNKNOWN
    return found[0] if len(found) == 1 else tuple(found)


def _activation(config: Mapping[str, Any], family: str) -> Any:
    if family in _GEMMA:
        # Gemma's first files say "gelu" but mean its approximation, which transformers computes too.
        named = config.get("hidden_activation") or "gelu_pytorch_tanh"
    else:
        named = config.get("hidden_act", "silu" if family in FAMILIES else None)
    return _UNKNOWN if named is None else _SAME_ACTIVATION.get(str(named), named)


def _activation_of(layer: Any) -> Any:
    activation = layer.mlp.activation
    if isinstance(activation, nn.SiLU):
        return "silu"
    if isinstance(activation, nn.GELU):
        return "gelu_pytorch_tanh" if activation.approximate == "tanh" else "gelu"
    return "relu" if isinstance(activation, nn.ReLU) else _UNKNOWN


def _tied(decoder: TransformerDecoder) -> Any:
    if isinstance(decoder.output, TiedLinear):
        return True
    if not isinstance(decoder.output, nn.Module) or not hasattr(decoder.output, "weight"):
        return _UNKNOWN
    return decoder.output.weight is getattr(decoder.tok_embeddings, "weight", None)


def _biases(
    config: Mapping[str, Any], decoder: TransformerDecoder, family: str
) -> list[tuple[str, str | None, Any, Any]]:
    def has(*path: str) -> Any:
        def of(layer: Any) -> bool:
            module = layer
            for name in path:
                module = getattr(module, name)
            return getattr(module, "bias", None) is not None

        return _each(decoder, of)

    default = False if family in FAMILIES else _UNKNOWN
    attention = _first(config.get("attention_bias"), default)
    # Qwen 2 has no key for it: its queries, keys and values have biases, its outputs have none.
    query = True if family == "qwen2" else attention
    rows = [
        (f"attention_bias (of {name[0]})", None, query, has("attn", name))
        for name in ("q_proj", "k_proj", "v_proj")
    ]
    return [
        *rows,
        ("attention_bias (of the output)", None, False if family == "qwen2" else attention, has("attn", "output_proj")),
        ("mlp_bias", None, _first(config.get("mlp_bias"), default), has("mlp", "w1")),
    ]  # fmt: skip


def _gemma_only(attention: Any, name: str) -> Any:
    if isinstance(attention, Gemma2Attention):
        return getattr(attention, name)
    return None if type(attention) is MultiHeadAttention else _UNKNOWN


def _query_scalar(config: Mapping[str, Any], family: str) -> Any:
    """Queries are divided by the root of this."""
    multiplier = config.get("attention_multiplier")  # Granite
    if isinstance(multiplier, float) and multiplier > 0:
        return round(multiplier**-2, 6)
    if family == "gemma2":
        return _first(config.get("query_pre_attn_scalar"), 256)
    return config.get("query_pre_attn_scalar", _UNKNOWN)


def _query_scalar_of(attention: Any) -> Any:
    if isinstance(attention, Gemma2Attention):
        return round(attention.scaling**-2, 6)
    return attention.head_dim if type(attention) is MultiHeadAttention else _UNKNOWN


def _norm_family(decoder: TransformerDecoder) -> Any:
    """Gemma multiplies embeddings by the root of their size, and norms by one plus their weight."""
    scaled = isinstance(decoder.tok_embeddings, GemmaNormEmbeddings)
    shifted = isinstance(decoder.norm, (GemmaRMSNorm, Gemma2FinalNorm))
    if scaled and shifted:
        return "gemma"
    if type(decoder.tok_embeddings) is nn.Embedding and isinstance(decoder.norm, (RMSNorm, nn.RMSNorm)):
        return "not gemma"
    return _UNKNOWN


def _has_rope(decoder: TransformerDecoder) -> tuple[int, ...]:
    return tuple(int(layer.attn.pos_embeddings is not None) for layer in decoder.layers)


def _rotary_layers(config: Mapping[str, Any], decoder: TransformerDecoder) -> Any:
    given = config.get("no_rope_layers")  # despite its name: 1 where there are rotary embeddings
    if isinstance(given, Sequence) and len(given):
        return tuple(given)
    return _read(lambda: (1,) * len(decoder.layers))


def _ropes(decoder: TransformerDecoder) -> list[Any]:
    ropes = _read(lambda: [layer.attn.pos_embeddings for layer in decoder.layers])
    return [] if ropes is _UNKNOWN else [rope for rope in ropes if rope is not None]


def _compare_rope(
    config: Mapping[str, Any], decoder: TransformerDecoder, longest: int | None, found: Agreement
) -> None:
    """Base, scaling and share of rotary embeddings, in the spelling of transformers 4 and of 5, or both."""
    ropes = _ropes(decoder)
    given = {key: config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key)}
    found.differences += [
        Difference(key, node, "rotary embeddings")
        for key, node in given.items()
        if not isinstance(node, Mapping)
    ]
    given = {key: node for key, node in given.items() if isinstance(node, Mapping)}
    for key, node in list(given.items()):
        if any(isinstance(value, Mapping) for value in node.values()):
            found.notes.append(f"{key} was not compared: it differs among the layers")
            del given[key]
    bases = {"rope_theta": config.get("rope_theta")}
    bases |= {f"{key}.rope_theta": node.get("rope_theta") for key, node in given.items()}
    bases = {key: base for key, base in bases.items() if base is not None}
    if not bases and config.get("model_type", "llama") in FAMILIES:
        bases = {"rope_theta": 10000.0}
    built = _all_of(ropes, lambda rope: rope.base)
    if built is _UNKNOWN:
        found.notes.append("rope_theta was not compared: it cannot be read off the decoder")
    else:
        found.differences += [
            Difference(key, base, built, "rope_base", "." in key or key in config)
            for key, base in bases.items()
            if not _same(base, built)
        ]
    for key, node in given.items() or (("rope_scaling", {}),):
        _compare_scaling(key, node, config, ropes, longest, found)
    share = {key: node.get("partial_rotary_factor") for key, node in given.items()}
    factor = config.get("partial_rotary_factor") or next((v for v in share.values() if v), 1.0)
    rotated = _each(decoder, lambda layer: layer.attn.pos_embeddings.dim / layer.attn.head_dim)
    if rotated is not _UNKNOWN and not _same(factor, rotated):
        found.differences.append(Difference("partial_rotary_factor", factor, rotated))


def _all_of(modules: Sequence[Any], of: Callable[[Any], Any]) -> Any:
    values = _read(lambda: list(dict.fromkeys(of(module) for module in modules)))
    if values is _UNKNOWN or not values:
        return _UNKNOWN
    return values[0] if len(values) == 1 else tuple(values)


def _compare_scaling(
    key: str,
    node: Mapping[str, Any],
    config: Mapping[str, Any],
    ropes: Sequence[Any],
    longest: int | None,
    found: Agreement,
) -> None:
    if not ropes or any(type(rope) not in (*_PLAIN_ROPE, Llama3ScaledRoPE) for rope in ropes):
        found.notes.append(f"{key} was not compared: the decoder's rotary embeddings are not torchtune's")
        return
    kind = node.get("rope_type") or node.get("type") or "default"
    if kind in ("linear", "llama3") and node.get("factor") == 1:
        kind = "default"
    trained = node.get("original_max_position_embeddings") or config.get("max_position_embeddings")
    if kind == "dynamic" and isinstance(trained, int) and longest is not None and longest <= trained:
        kind = "default"  # it begins to scale beyond the positions that the model was trained on
    scaled = [rope for rope in ropes if isinstance(rope, Llama3ScaledRoPE) and rope.scale_factor != 1]
    if kind != "llama3":
        if scaled:
            factor = _all_of(scaled, lambda rope: rope.scale_factor)
            file = None if kind == "default" else kind
            found.differences.append(Difference(f"{key}.factor", file, factor, "scale_factor"))
        elif kind != "default":
            named = f"{kind} with factor {node['factor']}" if "factor" in node else kind
            found.differences.append(Difference(f"{key}.rope_type", named, "default"))
        return
    if not all(isinstance(rope, Llama3ScaledRoPE) for rope in ropes):
        found.differences.append(Difference(f"{key}.rope_type", "llama3", "default"))
        return
    originally = node.get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
    wanted = {
        "factor": (node.get("factor"), "scale_factor"),
        "low_freq_factor": (node.get("low_freq_factor"), "low_freq_factor"),
        "high_freq_factor": (node.get("high_freq_factor"), "high_freq_factor"),
        "original_max_position_embeddings": (originally, "old_context_len"),
    }
    for name, (value, attribute) in wanted.items():
        built = _all_of(ropes, attrgetter(attribute))
        if value is not None and not _same(value, built):
            argument = "scale_factor" if name == "factor" else None
            found.differences.append(Difference(f"{key}.{name}", value, built, argument))


def _compare_windows(
    config: Mapping[str, Any], decoder: TransformerDecoder, longest: int | None, found: Agreement
) -> None:
    """An attention window that differs from the decoder's matters only for sequences longer than the window."""
    window = config.get("sliding_window")
    # Qwen 2 names a window but uses it only if another key says so.
    if not config.get("use_sliding_window", config.get("model_type") != "qwen2"):
        window = None
    built = _each(decoder, lambda layer: _gemma_only(layer.attn, "sliding_window_size"))
    if window is not None and (isinstance(window, bool) or not isinstance(window, int)):
        found.differences.append(Difference("sliding_window", window, None))
        return
    if built is _UNKNOWN:
        if window is not None:
            found.notes.append("sliding_window was not compared: it cannot be read off the decoder")
        return
    own = [size for size in (built if isinstance(built, tuple) else (built,)) if size is not None]
    if (own or [None]) == [window]:
        return
    shortest = min(size for size in (window, *own) if size is not None)
    if longest is None or longest > shortest:
        own_text = own[0] if own else None
        if longest is None:
            found.notes.append(
                f"sliding_window is {window} and the decoder's is {own_text}: sequences of more than {shortest} tokens are "
                "computed differently"
            )
        else:
            found.differences.append(
                Difference(f"sliding_window (with sequences of {longest} tokens)", window, own_text)
            )


def _same(file: Any, built: Any) -> bool:
    numbers = (int, float)
    if isinstance(file, bool) or isinstance(built, bool):
        return file is built
    if isinstance(file, numbers) and isinstance(built, numbers):
        return math.isclose(file, built, rel_tol=1e-6)
    return bool(file == built)
