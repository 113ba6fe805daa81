"""Reads and writes the folders of transformers' causal language models."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tokenpref._files import WEIGHT_SUFFIXES, follow_umask
from tokenpref._paths import resolve_path
from tokenpref._sealed import MANIFEST
from tokenpref.errors import ConfigError
from tokenpref.models.described import model_of, read_config
from tokenpref.models.lazy_weights import LazyWeights
from tokenpref.models.names_on_disk import NamesOnDisk
from tokenpref.models.peft_format import ADAPTER_CONFIG, BASE_RECORD
from tokenpref.models.tensor_files import INDEX, TensorFiles

__all__ = ["CausalLMCheckpointer"]

log = logging.getLogger("tokenpref")

SHARD_BYTES = 5 * 10**9
"""The size above which weights are split into several files."""

_CONFIG = "config.json"
_OTHER_WEIGHTS = (*WEIGHT_SUFFIXES, ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
_NOT_COPIED = (ADAPTER_CONFIG, BASE_RECORD, MANIFEST)
_MOST_COPIED = 100 << 20


class CausalLMCheckpointer:
    """Reads the weights of any causal language model that transformers knows from its folder, and writes trained ones.

    Reads ``model.safetensors``, or the files that ``model.safetensors.index.json`` lists, under the model's own names. Tensors
    are read one at a time, when they are looked up. Code that comes with a folder is never run. Of a model that also sees images
    or hears sound, only the language model is read, and written as a model of its own.

    ``save_checkpoint`` writes what transformers' ``save_pretrained`` would: safetensors files of at most 5 GB, with an index if
    there are several. The other files of ``checkpoint_dir``, such as the config, the tokenizer and the licence, travel along.

    Args:
        checkpoint_dir: folder of the starting weights, with ``config.json``.
        output_dir: where ``epoch_N`` folders are written.
        checkpoint_files: names of the files with weights; None: ``model.safetensors``, or those that the index lists.

    Raises:
        ConfigError: if ``checkpoint_files`` is not a list of names.
    """

    def __init__(
        self, checkpoint_dir: str, output_dir: str, checkpoint_files: list[str] | None = None
    ) -> None:
        if checkpoint_files is not None and (
            not isinstance(checkpoint_files, list) or not all(isinstance(n, str) for n in checkpoint_files)
        ):
            raise ConfigError(
                f"checkpoint_files: expected a list of names of files, or null for the folder's own, found {checkpoint_files!r}"
            )
        self._folder, self._output = resolve_path(checkpoint_dir), resolve_path(output_dir)
        self._listed = checkpoint_files

    def load_checkpoint(self) -> dict[str, Any]:
        """The weights under the model's own names, without a head that equals the embedding if the model ties the two.

        Returns:
            ``{"model": weights}``; the weights are a mapping that reads a tensor each time it is looked up.

        Raises:
            ConfigError: if the folder's config or files cannot be read or do not fit together.
        """
        files, names = self._files, self._names
        origins = dict(names.origins)
        notes = self._settle_tied_head(origins)
        if names.others:
            notes.append(
                f"{self._folder}: {len(names.others)} tensors are not of the language model (such as {names.others[0]}); they "
                "are neither read nor written"
            )
        shapes = {
            name: (files.shapes[origin.sources[0][0]] if origin.converter is None else self._own[name].shape)
            for name, origin in origins.items()
        }
        # The model's own order, so that neighbours in a file are read one after another; what does not fit comes last.
        order = [name for name in self._own if name in shapes] + [n for n in shapes if n not in self._own]
        return {"model": LazyWeights({name: shapes[name] for name in order}, self._read, notes)}

    def save_checkpoint(
        self, state_dict: dict[str, Any], epoch: int, intermediate_checkpoint: bool = False
    ) -> None:
        """Write ``epoch_N`` in the output folder, over what an earlier attempt left there.

        Args:
            state_dict: ``{"model": weights}``, whole tensors by the model's own names.
            epoch: the number N.
            intermediate_checkpoint: as in torchtune's interface, where it also asks for the state of the training.

        Raises:
            ValueError: for an intermediate checkpoint, because this package writes the state of a training itself.
            OSError: if the disk refuses to write.
        """
        if intermediate_checkpoint:
            raise ValueError("CausalLMCheckpointer writes weights only; pass intermediate_checkpoint=False")
        folder = self._output / f"epoch_{epoch}"
        folder.mkdir(parents=True, exist_ok=True)
        for former in (*folder.glob("model*.safetensors"), folder / INDEX):
            former.unlink(missing_ok=True)
        weights = {name: tensor for name, tensor in state_dict["model"].items() if name not in self._tied}
        _write_weights(folder, self._names.on_disk(weights))
        self._copy_others(folder)

    @cached_property
    def _files(self) -> TensorFiles:
        return TensorFiles(self._folder, self._listed)

    @cached_property
    def _config(self) -> Any:
        """The folder's config as transformers reads it.

        Raises:
            ConfigError: if there is none, if transformers does not know the model, or if its weights are quantised.
        """
        config = read_config(self._folder, str(self._folder), "set checkpoint_dir to the folder of one")
        quantised = getattr(config, "quantization_config", None)
        if quantised is not None:
            method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
            raise ConfigError(
                f"{self._folder} is quantised ({method}), and quantised weights are not trained; set checkpoint_dir to the "
                "weights from which it was quantised"
            )
        return config

    @cached_property
    def _model(self) -> Any:
        """The language model on the meta device, which has names and shapes but no values."""
        with torch.device("meta"):
            return model_of(
                self._config.get_text_config(),
                str(self._folder / _CONFIG),
                "set checkpoint_dir to the folder of one",
            )

    @cached_property
    def _own(self) -> dict[str, Tensor]:
        """The model's tensors, without values."""
        return {name: t for name, t in self._model.state_dict().items() if name not in self._tied}

    @property
    def _tied(self) -> Mapping[str, str]:
        """Names of tensors that share their memory with another one, to its name."""
        tied: Mapping[str, str] = self._model.all_tied_weights_keys or {}
        return tied

    @cached_property
    def _names(self) -> NamesOnDisk:
        inside = self._config.get_text_config() is not self._config
        try:
            return NamesOnDisk(self._model, self._files.shapes, inside=inside)
        except ConfigError as error:
            raise ConfigError(f"{self._folder}: {error}") from error

    def _read(self, name: str) -> Tensor:
        if name in self._tied.values() and name not in self._names.origins:
            name = next(tied for tied, source in self._tied.items() if source == name)
        try:
            return self._names.make(name, self._files.read)
        except ConfigError as error:
            raise ConfigError(f"{self._folder}: {error}") from error

    def _settle_tied_head(self, origins: dict[str, Any]) -> list[str]:
        """Drop a head that equals the embedding from what is read (in place), if the model ties the two.

        Returns:
            Lines for the log.

        Raises:
            ConfigError: if they differ.
        """
        notes = []
        for tied, source in self._tied.items():
            if tied not in origins:
                continue
            origin = origins.pop(tied)
            if source not in origins:  # the files hold the shared tensor under the head's name only
                origins[source] = origin
                continue
            head, embedding = self._read(tied), self._read(source)
            if head.shape != embedding.shape or not torch.equal(head.to(embedding.dtype), embedding):
                raise ConfigError(
                    f"{self._folder} holds a head ({tied}) that differs from the embedding, and the model ties the two; set "
                    f"tie_word_embeddings to false in {_CONFIG}, or, if the embedding is the head, remove {tied} from the files"
                )
            notes.append(
                f"{self._folder} holds a head ({tied}) that equals the embedding; the model ties the two, so the head is dropped"
            )
        return notes

    def _copy_others(self, folder: Path) -> None:
        """Copy what lies beside the starting weights, and write the config of a language model that was part of a larger one."""
        for file in self._other_files():
            target = folder / file.relative_to(self._folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
        text = self._config.get_text_config()
        if text is not self._config:
            text.architectures = [type(self._model).__name__]
            text.save_pretrained(folder)

    def _other_files(self) -> Iterator[Path]:
        templates = self._folder / "additional_chat_templates"
        for file in (*sorted(self._folder.iterdir()), *sorted(templates.glob("*.jinja"))):
            if not file.is_file() or file.name.startswith(".") or file.name in _NOT_COPIED:
                continue
            if not file.name.endswith(_OTHER_WEIGHTS) and file.stat().st_size <= _MOST_COPIED:
                yield file


def _write_weights(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors to one file, or to numbered ones of at most ``SHARD_BYTES`` with an index."""
    shards = _shards(tensors)
    placed: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = (
            "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        )
        save_file(
            {name: tensors[name].contiguous() for name in names}, folder / file, metadata={"format": "pt"}
        )
        follow_umask(folder / file)
        placed |= dict.fromkeys(names, file)
    if len(shards) > 1:
        parameters, size = (sum(count(t) for t in tensors.values()) for count in (Tensor.numel, _nbytes))
        record = {"metadata": {"total_parameters": parameters, "total_size": size}, "weight_map": placed}
        (folder / INDEX).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _shards(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Names of the tensors of each file."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + _nbytes(tensor) > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += _nbytes(tensor)
    return shards


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
