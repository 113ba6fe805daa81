"""The safetensors files of a Hugging Face folder, looked at as one set of tensors."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokenpref.errors import ConfigError

__all__ = ["INDEX", "TensorFiles"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_CONVERT = (
    "convert it: load it with transformers' AutoModelForCausalLM.from_pretrained(FOLDER, dtype='auto'), write it to another "
    "folder with save_pretrained, and copy the files of the tokenizer"
)


class TensorFiles:
    """The tensors of a folder's safetensors files. Building it reads the files' headers, and none of the data.

    Args:
        folder: a folder in the format of Hugging Face.
        files: names of its files; None: ``model.safetensors``, or the files that ``model.safetensors.index.json`` lists.

    Attributes:
        shapes: shape of each tensor, by name, in the order of the files.

    Raises:
        ConfigError: if there are no such files, if one is missing, cut off or damaged, if two hold a tensor of the same name, or
            if the index names a tensor that is not in its file.
    """

    def __init__(self, folder: Path, files: Sequence[str] | None = None) -> None:
        self.folder = folder
        self.shapes: dict[str, torch.Size] = {}
        self._file_of: dict[str, str] = {}
        indexed = {} if files is not None else _read_index(folder)
        names = list(files if files is not None else sorted(set(indexed.values())) or [SINGLE])
        for name in names:
            self._add(name)
        for tensor, name in indexed.items():
            if self._file_of.get(tensor) != name:
                raise ConfigError(
                    f"{folder / INDEX} says that {tensor!r} is in {name}, which does not hold it; download the folder again"
                )

    def _add(self, name: str) -> None:
        for tensor, shape in _header(self.folder / name).items():
            if tensor in self._file_of:
                raise ConfigError(
                    f"{self.folder}: {self._file_of[tensor]} and {name} both hold {tensor!r}; list the files of one model in "
                    "checkpoint_files, or download the folder again"
                )
            self._file_of[tensor] = name
            self.shapes[tensor] = shape

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by their names, in their own dtypes.

        Raises:
            ConfigError: if a file is gone or damaged.
        """
        by_file: defaultdict[str, list[str]] = defaultdict(list)
        for name in names:
            by_file[self._file_of[name]].append(name)
        found: dict[str, Tensor] = {}
        for file, held in by_file.items():
            # The file is mapped into memory while it is open, so it is opened again for each call.
            with _opened(self.folder / file) as stream:
                found |= {name: stream.get_tensor(name) for name in held}
        return found


def _read_index(folder: Path) -> dict[str, str]:
    """Names of files by the names of their tensors, from the index; none if the folder has a single file.

    Raises:
        ConfigError: if there is neither, or if the index is damaged.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file():  # as transformers, which prefers it
        return {}
    if not index.is_file():
        raise ConfigError(_no_weights(folder))
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        entries = {str(tensor): str(file) for tensor, file in names.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{index} cannot be read ({type(error).__name__}: {error}); download the folder again"
        ) from error
    if not entries:
        raise ConfigError(f"{index} lists no tensor; download the folder again")
    for file in sorted(set(entries.values())):
        if Path(file).name != file:
            raise ConfigError(
                f"{index} lists {file!r}, which is not the name of a file; download the folder again"
            )
        if not (folder / file).is_file():
            raise ConfigError(
                f"{index} lists {file}, which is not in the folder; download it, or the folder again"
            )
    return entries


def _no_weights(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is no folder; set checkpoint_dir to the folder of a model"
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if others:
        return (
            f"{folder} holds {', '.join(others[:3])}{', ...' if len(others) > 3 else ''} but neither {SINGLE} nor {INDEX}; "
            "download the folder again, or list the files in checkpoint_files"
        )
    pickled = sorted(file.name for file in folder.glob("*.bin")) + sorted(
        file.name for file in folder.glob("*.pth")
    )
    if pickled:
        return f"{folder} holds its weights as {pickled[0]}, and only safetensors files are read; {_CONVERT}"
    return (
        f"{folder} holds no weights ({SINGLE} or {INDEX}); download the folder again, or set checkpoint_dir"
    )


def _opened(file: Path) -> safe_open:
    """Open a file of safetensors.

    Raises:
        ConfigError: if it cannot be read.
    """
    if file.suffix != ".safetensors":
        raise ConfigError(f"{file} is no safetensors file, and only those are read; {_CONVERT}")
    try:
        return safe_open(file, framework="pt")
    except FileNotFoundError as error:
        raise ConfigError(f"{file} is missing; download it, or the folder again") from error
    except (SafetensorError, OSError) as error:
        pointer = file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs")
        mend = (
            "it is a pointer of Git LFS: run `git lfs pull` in its folder" if pointer else "download it again"
        )
        raise ConfigError(f"{file} is cut off or damaged ({error}); {mend}") from error


def _header(file: Path) -> dict[str, torch.Size]:
    """Shapes of a file's tensors by name."""
    with _opened(file) as stream:
        return {name: torch.Size(stream.get_slice(name).get_shape()) for name in stream.keys()}  # noqa: SIM118
