"""The contrastive pair on disk: a folder with ``pair.yaml`` and, for trained sides, their weights or adapters.

``pair.yaml`` is data. It says how the pair was made, where the weights, adapters and prompts of its sides are, and holds
fingerprints of the base model and the tokenizer. It names nothing that is called, because people pass pairs on. The config of the
recipe that uses a pair names the model and the checkpointer, and :meth:`ContrastivePair.check` compares them with the
fingerprints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

from tokenpref._sealed import write_file
from tokenpref._yaml import read_yaml
from tokenpref.errors import DataError
from tokenpref.models.decoder_of import decoder_of
from tokenpref.models.peft_format import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tokenpref.models.peft_reader import read_adapter
from tokenpref.training.config.fields import Component
from tokenpref.training.loading.models import ModelMaker, weights_digest

__all__ = ["METHODS", "PAIR_FILE", "SIDES", "ContrastivePair", "PairSide", "read_pair", "write_pair"]

FORMAT = "tokenpref-pair/2"
# It holds the components of model and checkpointer, where the present format holds fingerprints. They are only compared.
FORMER_FORMAT = "tokenpref-pair/1"
PAIR_FILE = "pair.yaml"
METHODS = ("prompt", "sft", "dpo")
SIDES = ("positive", "negative")
ADAPTER_FILES = (ADAPTER_WEIGHTS, ADAPTER_CONFIG)
SIDE_KEYS = ("checkpoint", "adapter", "prompt")


@dataclass(frozen=True)
class PairSide:
    """One side of a pair: the base model with a prompt, with an adapter, or with weights of the side's own.

    Args:
        checkpoint: folder of its weights; None for the weights of the base.
        prompt: precedes the data's prompts; None for none.
        adapter: folder of its adapter over the base, in PEFT's format; None for none.
    """

    checkpoint: Path | None
    prompt: str | None
    adapter: Path | None = None


@dataclass(frozen=True)
class ContrastivePair:
    """A pair as ``pair.yaml`` describes it.

    Args:
        folder: the pair's folder.
        method: one of :data:`METHODS`.
        tokenizer: fingerprint of the tokenizer of both sides.
        model: the numbers of the model of both sides, by their keys in ``config.json``. In the former format: its component.
        base: digest of the weights of the base; None if its checkpointer names no folder. In the former format: the component
            of the checkpointer.
        positive: pi+.
        negative: pi-.
    """

    folder: Path
    method: str
    tokenizer: str
    model: Mapping[str, Any]
    base: str | Mapping[str, Any] | None
    positive: PairSide
    negative: PairSide

    @property
    def sides(self) -> dict[str, PairSide]:
        """Both sides by name."""
        return dict(zip(SIDES, (self.positive, self.negative), strict=True))

    def read_adapter(self, side: str, decoder: nn.Module) -> dict[str, Tensor]:
        """The adapter of a side, by its names in a decoder with adapters of the same size (on any device).

        Raises:
            ConfigError: if a file is not as it was written, or the adapter does not fit the decoder.
        """
        folder = self.sides[side].adapter
        assert folder is not None  # whoever calls this has looked
        return read_adapter(folder, decoder, f"pair's {side} side")

    def reader(self, side: str, base: Component) -> Component:
        """The checkpointer that reads the weights of a side, which are the base's if it is an adapter.

        Args:
            side: one of :data:`SIDES`.
            base: the checkpointer of the base, from the config of the recipe.
        """
        checkpoint = self.sides[side].checkpoint
        if checkpoint is None:
            own: dict[str, Any] = {"output_dir": str(self.folder)}
        else:
            own = {
                "checkpoint_dir": str(checkpoint),
                "checkpoint_files": _weight_files(checkpoint),
                # torchtune's checkpointers make this folder and refuse the checkpoint's own; it is there already.
                "output_dir": str(checkpoint.parent),
            }
        return Component(f"pair's {side} side", base.path, {**base.kwargs, **own})

    def check(self, maker: ModelMaker, tokenizer: str) -> None:
        """Compare what a config names with the fingerprints of the pair.

        Args:
            maker: of the config's model and the weights of its checkpointer.
            tokenizer: fingerprint of the config's tokenizer.

        Raises:
            DataError: if one of them is not the pair's.
            ConfigError: if an adapter is damaged, or those of the config's model are of another rank, alpha or kind, or of other
                layers.
        """
        if tokenizer != self.tokenizer:
            raise DataError(
                f"{self.folder}: the pair was built with another tokenizer ({self.tokenizer[:12]}, here {tokenizer[:12]}); set "
                "tokenizer to the pair's"
            )
        if differing := self._other_model(maker):
            raise DataError(
                f"{self.folder}: the pair was built with another model ({differing}); set model to the pair's"
            )
        if maker.world.is_main:  # other nodes may not have the files
            self._check_base(maker.base)
            self._check_adapters(maker)

    def _other_model(self, maker: ModelMaker) -> str:
        """What differs between the pair's model and the config's, in words."""
        if isinstance(self.base, Mapping):  # the former format
            here = maker.model.plain()
            keys = sorted(self.model.keys() | here.keys())
        else:
            here = decoder_of(maker.on_meta()).numbers()
            keys = [key for key in self.model if key in here]
        return ", ".join(
            f"{key} is {self.model.get(key)!r:.60} there and {here.get(key)!r:.60} here"
            for key in keys
            if self.model.get(key) != here.get(key)
        )

    def _check_base(self, base: Component) -> None:
        there: Any
        here: Any
        if not isinstance(self.base, Mapping):
            there, here = self.base, base_digest(base)
        elif any(side.checkpoint is None for side in self.sides.values()):
            # The former format has no digest, so the base has to be where it was.
            there, here = (_place_of_weights(kwargs) for kwargs in (self.base, base.kwargs))
        else:
            return
        if there != here:
            raise DataError(
                f"{self.folder}: the pair was built from another base model ({there!s:.200}, here {here!s:.200}); set "
                "checkpointer to the pair's, or build the pair again"
            )

    def _check_adapters(self, maker: ModelMaker) -> None:
        names = [name for name, side in self.sides.items() if side.adapter is not None]
        if names and maker.adapters is None:
            raise DataError(
                f"{self.folder}: the sides of the pair are adapters, and {maker.model.key} ({maker.model.path}) makes a model "
                "without adapters; set model to the pair's lora_ or qlora_ builder"
            )
        for name in names:
            self.read_adapter(name, maker.on_meta())


def base_digest(base: Component) -> str | None:
    """The digest of a base model's weights; None if its checkpointer names no folder."""
    return weights_digest(base) if "checkpoint_dir" in base.kwargs else None


def write_pair(
    folder: Path,
    *,
    method: str,
    tokenizer: str,
    model: Mapping[str, Any],
    base: str | None,
    sides: Mapping[str, Mapping[str, Any]],
    config: Mapping[str, Any],
) -> None:
    """Write ``pair.yaml``; the last thing that a build does.

    Args:
        folder: the pair's folder.
        method: one of :data:`METHODS`.
        tokenizer: fingerprint of the tokenizer.
        model: :meth:`tokenpref.models.decoder.Decoder.numbers` of the model of both sides.
        base: :func:`base_digest` of the checkpointer of the model that both sides started from.
        sides: for each of :data:`SIDES` its :data:`SIDE_KEYS`; those that are left out are None. ``checkpoint`` and ``adapter``
            are folders inside ``folder``. A side with neither is the base.
        config: the config of the build.
    """
    record = {
        "format": FORMAT,
        "method": method,
        "tokenizer": tokenizer,
        "model": dict(model),
        "base": base,
        **{side: dict(sides[side]) for side in SIDES},
        "config": dict(config),
    }
    write_file(folder / PAIR_FILE, yaml.safe_dump(record, sort_keys=False, allow_unicode=True).encode())


def read_pair(folder: Path) -> ContrastivePair:
    """Read a pair's folder. Nothing that ``pair.yaml`` names is imported or called.

    Args:
        folder: the pair's folder.

    Raises:
        DataError: if there is no finished pair, ``pair.yaml`` is damaged, or a side's weights are missing or lie outside the
            folder.
    """
    file = folder / PAIR_FILE
    if not file.is_file():
        raise DataError(_unfinished(folder))
    try:
        record = read_yaml(file)
    except ValueError as error:
        raise DataError(f"{file}: is not valid YAML ({error}); build the pair again") from error
    form = record.get("format") if isinstance(record, dict) else type(record).__name__
    if form not in (FORMAT, FORMER_FORMAT):
        raise DataError(f"{file}: format is {form!r}, expected {FORMAT!r}; build the pair again")
    mapping = (dict, "a mapping")
    shapes: dict[str, tuple[Any, str]] = {
        "method": (str, "text"),
        "tokenizer": (str, "text"),
        "model": mapping,
        "base": mapping if form == FORMER_FORMAT else ((str, type(None)), "text or null"),
        **dict.fromkeys(SIDES, mapping),
    }
    for key, (kind, words) in shapes.items():
        value = record.get(key)
        if not isinstance(value, kind) or value == {}:
            raise DataError(f"{file}: {key} is {value!r:.60}, expected {words}; build the pair again")
    if record["method"] not in METHODS:
        raise DataError(f"{file}: method is {record['method']!r}, expected one of {', '.join(METHODS)}")
    sides = [_side(file, side, record[side]) for side in SIDES]
    fingerprints = {key: record[key] for key in shapes if key not in SIDES}
    return ContrastivePair(folder, **fingerprints, positive=sides[0], negative=sides[1])


def _side(file: Path, side: str, node: Mapping[Any, Any]) -> PairSide:
    if strange := [key for key in node if key not in SIDE_KEYS]:
        raise DataError(
            f"{file}: {side} has {strange[0]!r}, and a side has only {', '.join(SIDE_KEYS)}; build the pair again"
        )
    for key, value in node.items():
        if value is not None and not isinstance(value, str):
            raise DataError(f"{file}: {side}.{key} is {value!r}, expected text or null; build the pair again")
    if node.get("checkpoint") is not None and node.get("adapter") is not None:
        raise DataError(
            f"{file}: {side} has a checkpoint and an adapter, and an adapter belongs to the base; build the pair again"
        )
    checkpoint, adapter = (_inside(file, side, key, node.get(key)) for key in ("checkpoint", "adapter"))
    if checkpoint is not None and not _weight_files(checkpoint):
        raise DataError(f"{checkpoint}: no weights of the {side} side there; build the pair again")
    if adapter is not None and not all((adapter / name).is_file() for name in ADAPTER_FILES):
        raise DataError(f"{adapter}: no adapter of the {side} side there; build the pair again")
    return PairSide(checkpoint, node.get("prompt"), adapter)


def _inside(file: Path, side: str, key: str, name: str | None) -> Path | None:
    """The folder that a side names, which must lie inside the pair's."""
    if name is None:
        return None
    folder = (file.parent / name).resolve()
    if file.parent.resolve() not in folder.parents:
        raise DataError(f"{file}: {side}.{key} {name!r} leaves the pair's folder")
    return folder


def _weight_files(checkpoint: Path) -> list[str]:
    return sorted(path.name for path in checkpoint.glob("*.safetensors"))


def _place_of_weights(kwargs: Mapping[str, Any]) -> tuple[str, Any]:
    return str(Path(str(kwargs.get("checkpoint_dir"))).absolute()), kwargs.get("checkpoint_files")


def _unfinished(folder: Path) -> str:
    command = "recipes/contrastive_reference_distributed"
    if not folder.is_dir():
        return f"{folder}: no contrastive pair there; build one with {command}"
    done = [side for side in SIDES if (folder / side / "finished.json").is_file()]
    begun = [side for side in SIDES if (folder / side).is_dir()]
    if not begun:
        return f"{folder}: is no contrastive pair (no {PAIR_FILE}); build one with {command}"
    state = ", ".join(f"{side} {'is done' if side in done else 'is not'}" for side in SIDES)
    return (
        f"{folder}: the pair is half built ({state}); run {command} again with the same config: it continues"
    )
