"""How the tensors of a model's files become tensors of the model, by the rules that transformers itself has for it.

Most models have the same names in both places. A mixture of experts has one matrix for each expert on disk, and all of them in
one tensor in memory; some models were renamed; and in the folder of a model that also sees images, the names of the language
model have a prefix.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tokenpref.errors import ConfigError

__all__ = ["NamesOnDisk"]


@dataclass(frozen=True)
class _Origin:
    """What a tensor of the model is made of.

    Args:
        sources: names in the files, each with the pattern of the converter that takes it.
        converter: transformers' converter; None: the one source is the tensor.
        first: the name under which the converter knows its first result.
    """

    sources: tuple[tuple[str, str], ...]
    converter: Any = None
    first: str = ""


class NamesOnDisk:
    """The origin of each tensor of a model in its files.

    Args:
        model: a causal LM of transformers, on the meta device.
        names: names of the tensors in its files.
        inside: whether the model is the language model of a larger one, whose other parts are in the files too.

    Attributes:
        origins: by the names of the model's tensors; a tensor that the model does not have keeps its name in the files.
        others: names in the files that are not of the language model.
        conversions: the rules of transformers that were used.

    Raises:
        ConfigError: if two tensors of the files become the same tensor of the model.
    """

    def __init__(self, model: Any, names: Iterable[str], *, inside: bool = False) -> None:
        from tokenpref._transformers import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            get_model_conversion_mapping,
        )

        self.model = model
        self.origins: dict[str, _Origin] = {}
        self.others: list[str] = []
        self.conversions: list[Any] = []
        self._own = model.state_dict()
        rules = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self._converter_of = {pattern: rule for rule in self._converters for pattern in rule.source_patterns}
        ignored = _ignored_by(model)
        for name in sorted(names, key=dot_natural_key):
            own = _in_language_model(name) if inside else name
            if own is None:
                self.others.append(name)
                continue
            target, pattern = self._target(own)
            if target not in self._own and ignored is not None and ignored.search(target):
                continue
            self._add(name, target, pattern)
        self.conversions.sort(key=rules.index)  # they are undone in the opposite order

    def _target(self, name: str) -> tuple[str, str | None]:
        """The name of a tensor in the model (of its first one, if a converter makes several), and the converter's pattern."""
        target, pattern = self._apply_rules(name)
        target = self._with_prefix(target)
        if (
            target not in self._own and name in self._own
        ):  # as transformers, which does not rename what fits already
            return name, None
        return target, pattern

    def _apply_rules(self, name: str) -> tuple[str, str | None]:
        """All renamings one after another, and then the first converter that fits."""
        for rule in self._renamings:
            name, pattern = self._apply(rule, name)
        for rule in self._converters:
            name, pattern = self._apply(rule, name)
            if pattern is not None:
                return name, pattern
        return name, None

    def _apply(self, rule: Any, name: str) -> tuple[str, str | None]:
        renamed: tuple[str, str | None] = rule.rename_source_key(name)
        if renamed[1] is not None and rule not in self.conversions:
            self.conversions.append(rule)
        return renamed

    def _with_prefix(self, name: str) -> str:
        """A name with the prefix of the model's body added or removed, if the model has it that way."""
        from tokenpref._transformers import rename_source_key

        renamed: str = rename_source_key(name, [], [], self.model.base_model_prefix, self._own)[0]
        return renamed

    def _add(self, name: str, target: str, pattern: str | None) -> None:
        if pattern is None:
            if target in self.origins:
                former = self.origins[target].sources[0][0]
                raise ConfigError(
                    f"the files hold {former!r} and {name!r}, which are both the model's {target!r}; remove one of them"
                )
            self.origins[target] = _Origin(((name, ""),))
            return
        rule = self._converter_of[pattern]
        for made in rule.target_patterns:
            full = target.replace(rule.target_patterns[0], made)
            before = self.origins[full].sources if full in self.origins else ()
            self.origins[full] = _Origin((*before, (name, pattern)), rule, target)

    def make(self, name: str, read: Callable[[Iterable[str]], Mapping[str, Tensor]]) -> Tensor:
        """A tensor of the model.

        Args:
            name: its name in the model.
            read: reads tensors of the files.

        Raises:
            ConfigError: if it cannot be made of what the files hold.
        """
        origin = self.origins[name]
        tensors = read(source for source, _ in origin.sources)
        if origin.converter is None:
            return tensors[origin.sources[0][0]]
        converter = deepcopy(origin.converter)
        for source, pattern in origin.sources:
            converter.add_tensor(origin.first, source, pattern, tensors[source])
        named = f"{name!r} cannot be made of the {len(tensors)} tensors that the files hold for it"
        try:
            result = converter.convert(origin.first, model=self.model, config=self.model.config)
            # transformers 5.0 also returns errors.
            made = (result[0] if isinstance(result, tuple) else result)[name]
        except (RuntimeError, ValueError, KeyError, IndexError) as error:
            raise ConfigError(f"{named} ({error}); some are missing or have another shape") from error
        whole: Tensor = made[0] if isinstance(made, list) else made
        if whole.shape != self._own[name].shape:
            raise ConfigError(
                f"{named}: it would have the shape {list(whole.shape)}, and the model wants {list(self._own[name].shape)}; some "
                "are missing, or config.json has another number of experts"
            )
        return whole

    def on_disk(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors as the files hold them, from those of the model."""
        from tokenpref._transformers import revert_weight_conversion

        self.model._weight_conversions = self.conversions
        written: dict[str, Tensor] = revert_weight_conversion(self.model, dict(state))
        return written


def _ignored_by(model: Any) -> re.Pattern[str] | None:
    """Tensors of the files that transformers ignores although the model does not have them."""
    patterns = set(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.add(r"rotary_emb\.inv_freq")  # old files hold this buffer for each layer
    return re.compile("|".join(f"({pattern})" for pattern in sorted(patterns))) if patterns else None


def _in_language_model(name: str) -> str | None:
    """The name of a tensor in the language model of a larger model; None if it is not part of it."""
    if name.startswith("lm_head."):
        return name
    if name.startswith("model.language_model."):
        return name.replace("model.language_model.", "model.", 1)
    if not name.startswith("language_model."):
        return None
    own = name.removeprefix("language_model.")
    return own if own.startswith(("model.", "lm_head.")) else f"model.{own}"
