"""The contrastive pair on disk: a folder with ``pair.yaml`` and, for trained sides, their weights."""

from __future__ import annotations

import inspect
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from tokenpref._yaml import read_yaml
from tokenpref.components import COMPONENT, find_component
from tokenpref.errors import DataError
from tokenpref.training.config.fields import Component
from tokenpref.training.saving.checkpoints import MANIFEST, fault_of

__all__ = [
    "METHODS",
    "PAIR_FILE",
    "SIDES",
    "ContrastivePair",
    "PairSide",
    "check_weights",
    "nested_components",
    "read_pair",
    "write_pair",
]

FORMAT = "tokenpref-pair/1"
PAIR_FILE = "pair.yaml"
METHODS = ("prompt", "sft", "dpo")
SIDES = ("positive", "negative")
# What a pair may call without its reader's say: builders of models, and torchtune's checkpointers that read tensors only.
MODEL_PACKAGES = ("torchtune.models.", "tokenpref.models.")
CHECKPOINTERS = tuple(
    f"torchtune.training.FullModel{name}Checkpointer" for name in ("HF", "Meta", "TorchTune")
)
READS_WEIGHTS = ("checkpoint_dir", "checkpoint_files", "model_type", "output_dir", "safe_serialization")


@dataclass(frozen=True)
class PairSide:
    """One model of the pair.

    Args:
        checkpointer: reads its weights.
        prompt: stands before the data's prompts; None for none.
    """

    checkpointer: Component
    prompt: str | None


@dataclass(frozen=True)
class ContrastivePair:
    """A pair as ``pair.yaml`` describes it.

    Args:
        folder: the pair's folder.
        method: one of :data:`METHODS`.
        tokenizer: fingerprint of the tokenizer that both sides share.
        model: the architecture of both sides.
        positive: pi+.
        negative: pi-.
        record: the whole of ``pair.yaml`` but for the config that made it.
    """

    folder: Path
    method: str
    tokenizer: str
    model: Component
    positive: PairSide
    negative: PairSide
    record: dict[str, Any]

    @property
    def shares_weights(self) -> bool:
        """True when one model serves both sides, which then differ in their prompts."""
        return self.positive.checkpointer.kwargs == self.negative.checkpointer.kwargs


def write_pair(
    folder: Path,
    *,
    method: str,
    tokenizer: str,
    model: Component,
    base: Component,
    sides: Mapping[str, Mapping[str, Any]],
    config: Mapping[str, Any],
) -> None:
    """Write ``pair.yaml``; the last thing that a build does.

    Args:
        folder: the pair's folder.
        method: one of :data:`METHODS`.
        tokenizer: fingerprint of the tokenizer.
        model: architecture of both sides.
        base: checkpointer of the model that both sides started from.
        sides: for each of :data:`SIDES` ``checkpoint`` (a folder inside ``folder``, or None for the base) and ``prompt``.
        config: the config of the build.
    """
    record = {
        "format": FORMAT,
        "method": method,
        "tokenizer": tokenizer,
        "model": {COMPONENT: model.path, **model.kwargs},
        "base": {COMPONENT: base.path, **base.kwargs},
        **{side: dict(sides[side]) for side in SIDES},
        "config": dict(config),
    }
    temporary = folder / f"{PAIR_FILE}.tmp"
    temporary.write_text(yaml.safe_dump(record, sort_keys=False, allow_unicode=True), encoding="utf-8")
    os.replace(temporary, folder / PAIR_FILE)


def read_pair(folder: Path, trusted_components: Collection[str] = ()) -> ContrastivePair:
    """Read a pair's folder.

    ``pair.yaml`` may come from somebody else, and it names what is called: a model of torchtune or of this package, and one of
    torchtune's checkpointers. Anything else has to be trusted by the reader.

    Args:
        folder: the pair's folder.
        trusted_components: dotted paths of further models and checkpointers that the pair may name.

    Raises:
        DataError: if there is no finished pair, ``pair.yaml`` is damaged, names something to call that is not trusted, the
            sides have different tokenizers or models, or a side's weights are missing or lie outside the folder.
    """
    file = folder / PAIR_FILE
    if not file.is_file():
        raise DataError(_unfinished(folder))
    try:
        record = read_yaml(file)
    except ValueError as error:
        raise DataError(f"{file}: is not valid YAML ({error}); build the pair anew") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise DataError(f"{file}: format is {found!r}, expected {FORMAT!r}; build the pair anew")
    try:
        return _read(folder, record, trusted_components)
    except DataError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{file}: {error!r} is missing or of the wrong type; build the pair anew") from error


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


def _read(folder: Path, record: dict[str, Any], trusted: Collection[str]) -> ContrastivePair:
    file = folder / PAIR_FILE
    if record["method"] not in METHODS:
        raise DataError(f"{file}: method is {record['method']!r}, expected one of {', '.join(METHODS)}")
    for name in ("model", "base", *SIDES):
        if not isinstance(record[name], dict):
            raise DataError(f"{file}: {name} is {record[name]!r}, expected a mapping; build the pair anew")
    base = _component(file, "base", record["base"], trusted)
    _check_base(file, base)
    for name in ("tokenizer", "model"):
        own = {side: record[side].get(name, record[name]) for side in SIDES}
        if own["positive"] != own["negative"]:
            raise DataError(
                f"{file}: the sides have different {'tokenizers' if name == 'tokenizer' else 'architectures'} "
                f"({_short(own['positive'])} and {_short(own['negative'])}); both must share one"
            )
    model = _component(file, "model", record["positive"].get("model", record["model"]), trusted)
    sides = {side: _side(folder, side, record[side], base) for side in SIDES}
    return ContrastivePair(
        folder=folder,
        method=record["method"],
        tokenizer=str(record["positive"].get("tokenizer", record["tokenizer"])),
        model=model,
        positive=sides["positive"],
        negative=sides["negative"],
        record={key: value for key, value in record.items() if key != "config"},
    )


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def _component(file: Path, key: str, node: Mapping[str, Any], trusted: Collection[str]) -> Component:
    path = str(node[COMPONENT])
    known = _is_model(path) if key == "model" else path in CHECKPOINTERS
    if not known and path not in trusted:
        wanted = (
            "a model of torchtune.models or tokenpref.models"
            if key == "model"
            else f"one of {', '.join(CHECKPOINTERS)}"
        )
        raise DataError(
            f"{file}: {key} is {path!r}, which reading the pair would call, and not {wanted}; if you know and trust it, set "
            f"estimator.trusted_components=[{path}]"
        )
    component = Component(key, path, {str(k): v for k, v in node.items() if k != COMPONENT})
    if nested := nested_components(component):
        raise DataError(
            f"{file}: {nested[0]} names a component of its own, which a pair must not; build the pair anew"
        )
    return component


def _is_model(path: str) -> bool:
    """Whether a path names a function of a model library that makes a decoder, and not what its modules import."""
    if not path.startswith(MODEL_PACKAGES):
        return False  # not even imported
    try:
        target = find_component(path)
    except ValueError:
        return False
    function = (
        target.func if isinstance(target, partial) else target
    )  # torchtune's QLoRA builders are partials
    if not inspect.isfunction(function) or not f"{function.__module__}.".startswith(MODEL_PACKAGES):
        return False
    made = inspect.signature(function).return_annotation
    return getattr(made, "__name__", made) == "TransformerDecoder"


def nested_components(component: Component) -> list[str]:
    """Keys of a component's arguments that name components themselves."""
    return [
        f"{component.key}.{name}"
        for name, value in component.kwargs.items()
        if isinstance(value, Component) or _names_component(value)
    ]


def _names_component(value: Any) -> bool:
    if isinstance(value, Mapping):
        return COMPONENT in value or any(map(_names_component, value.values()))
    return isinstance(value, list) and any(map(_names_component, value))


def _check_base(file: Path, base: Component) -> None:
    """The checkpointer of both sides reads weights, in the folder that it names."""
    if base.path in CHECKPOINTERS:
        for name in sorted(base.kwargs.keys() - set(READS_WEIGHTS)):
            if base.kwargs[name]:
                raise DataError(
                    f"{file}: base.{name} is {base.kwargs[name]!r}, but a pair's checkpointer reads a model's weights and "
                    f"nothing else; build the pair anew with checkpointer.{name}=null"
                )
    files = base.kwargs.get("checkpoint_files", [])
    for name in files.values() if isinstance(files, Mapping) else files:
        if str(name) in ("", ".", "..") or Path(str(name)).name != str(name):
            raise DataError(
                f"{file}: base.checkpoint_files names {name!r}, which is no plain file name; build the pair anew"
            )


def _side(folder: Path, side: str, node: Mapping[str, Any], base: Component) -> PairSide:
    prompt = node.get("prompt")
    if prompt is not None and not isinstance(prompt, str):
        raise DataError(
            f"{folder / PAIR_FILE}: {side}.prompt is {prompt!r}, expected text or null; build the pair anew"
        )
    if node.get("checkpoint") is None:
        kwargs = {**base.kwargs, "output_dir": str(folder)}
        return PairSide(Component(side, base.path, kwargs), prompt)
    checkpoint = (folder / str(node["checkpoint"])).resolve()
    if folder.resolve() not in checkpoint.parents:
        raise DataError(
            f"{folder / PAIR_FILE}: {side}.checkpoint {node['checkpoint']!r} leaves the pair's folder"
        )
    files = sorted(path.name for path in checkpoint.glob("*.safetensors"))
    if not files:
        raise DataError(f"{checkpoint}: no weights of the {side} side there; build the pair anew")
    kwargs = {
        **base.kwargs,
        "checkpoint_dir": str(checkpoint),
        "checkpoint_files": files,
        # torchtune's checkpointers make this folder and refuse the checkpoint's own; it is there already.
        "output_dir": str(checkpoint.parent),
    }
    return PairSide(Component(side, base.path, kwargs), prompt)


def check_weights(pair: ContrastivePair) -> None:
    """Compare the weights of both sides with their manifests; a base model need not have one.

    Raises:
        DataError: if a file is not as it was written.
    """
    sides = [pair.positive] if pair.shares_weights else [pair.positive, pair.negative]
    for side in sides:
        folder = Path(str(side.checkpointer.kwargs.get("checkpoint_dir", "")))
        if (folder / MANIFEST).is_file() and (fault := fault_of(folder, others=True)):
            raise DataError(f"{folder}: {fault}; restore it from a copy, or build the pair anew")
