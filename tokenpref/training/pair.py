"""The contrastive pair on disk: a folder with ``pair.yaml`` and, for trained sides, their weights."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tokenpref.components import COMPONENT
from tokenpref.errors import ConfigError, DataError
from tokenpref.training.schema import Component

__all__ = [
    "METHODS",
    "PAIR_FILE",
    "SIDES",
    "ContrastivePair",
    "PairSide",
    "read_pair",
    "weights_digest",
    "write_pair",
]

FORMAT = "tokenpref-pair/1"
PAIR_FILE = "pair.yaml"
METHODS = ("prompt", "sft", "dpo")
SIDES = ("positive", "negative")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


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


def read_pair(folder: Path) -> ContrastivePair:
    """Read a pair's folder.

    Raises:
        DataError: if there is no finished pair, ``pair.yaml`` is damaged, the sides have different tokenizers or models, or a
            side's weights are missing or lie outside the folder.
    """
    file = folder / PAIR_FILE
    if not file.is_file():
        raise DataError(_unfinished(folder))
    try:
        record = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: is not valid YAML ({error}); build the pair anew") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise DataError(f"{file}: format is {found!r}, expected {FORMAT!r}; build the pair anew")
    try:
        return _read(folder, record)
    except (KeyError, TypeError, AttributeError) as error:
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


def _read(folder: Path, record: dict[str, Any]) -> ContrastivePair:
    file = folder / PAIR_FILE
    if record["method"] not in METHODS:
        raise DataError(f"{file}: method is {record['method']!r}, expected one of {', '.join(METHODS)}")
    base = _component("base", record["base"])
    for name in ("tokenizer", "model"):
        own = {side: record[side].get(name, record[name]) for side in SIDES}
        if own["positive"] != own["negative"]:
            raise DataError(
                f"{file}: the sides have different {'tokenizers' if name == 'tokenizer' else 'architectures'} "
                f"({_short(own['positive'])} and {_short(own['negative'])}); both must share one"
            )
    sides = {side: _side(folder, side, record[side], base) for side in SIDES}
    return ContrastivePair(
        folder=folder,
        method=record["method"],
        tokenizer=str(record["positive"].get("tokenizer", record["tokenizer"])),
        model=_component("model", record["positive"].get("model", record["model"])),
        positive=sides["positive"],
        negative=sides["negative"],
        record={key: value for key, value in record.items() if key != "config"},
    )


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def _component(key: str, node: Mapping[str, Any]) -> Component:
    return Component(key, str(node[COMPONENT]), {k: v for k, v in node.items() if k != COMPONENT})


def _side(folder: Path, side: str, node: Mapping[str, Any], base: Component) -> PairSide:
    prompt = node.get("prompt")
    if node.get("checkpoint") is None:
        kwargs = {**base.kwargs, "output_dir": str(folder)}
        return PairSide(Component(side, base.path, kwargs), prompt)
    checkpoint = (folder / str(node["checkpoint"])).resolve()
    if not checkpoint.is_relative_to(folder.resolve()):
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


def weights_digest(checkpointer: Component) -> str:
    """What a checkpoint's weights are, cheaply: names and sizes of its files, and a part of their bytes.

    Raises:
        ConfigError: if a file is missing.
    """
    hasher = hashlib.sha256()
    folder = Path(str(checkpointer.kwargs.get("checkpoint_dir", "")))
    files = checkpointer.kwargs.get("checkpoint_files")
    if not isinstance(files, list):  # torchtune also takes a pattern of names
        files = sorted(file.name for file in folder.glob("*") if file.suffix in WEIGHT_SUFFIXES)
    for name in files:
        file = folder / str(name)
        if not file.is_file():
            raise ConfigError(
                f"no file {file}: the weights are gone; build the pair anew, or restore the model"
            )
        with file.open("rb") as stream:
            size = file.stat().st_size
            hasher.update(f"{name}:{size};".encode())
            # The beginning (header), the middle and the end: trained weights differ everywhere.
            for at in (0, size // 2, max(size - 65536, 0)):
                stream.seek(at)
                hasher.update(stream.read(65536))
    return hasher.hexdigest()
