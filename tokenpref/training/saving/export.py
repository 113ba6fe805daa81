"""Writes the files beside exported weights: the tokenizer, template and settings that the model was trained with.

A checkpointer copies the files of the folder from which training started. But the weights may have another dtype now, the
tokenizer may come from another folder, and the config may have named other tokens or another chat template.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tokenpref._files import follow_umask
from tokenpref._paths import resolve_path
from tokenpref.data import JsonTokenizer, Tokenizer
from tokenpref.data.tokenizers import TOKENIZER_FILES, TOOL_TEMPLATE, named_template
from tokenpref.models.peft_format import Base
from tokenpref.models.tied_head import HEAD, HEAD_IN_FILES

__all__ = ["base_of", "describe_adapter", "describe_export", "forget_tied_head"]

log = logging.getLogger("tokenpref")

NAMED_TOKENS = ("eos", "bos", "pad")
TEMPLATE = "chat_template.jinja"
SETTINGS = "tokenizer_config.json"


def forget_tied_head(checkpointer: Any, state: Mapping[str, Tensor]) -> None:
    """Keep a checkpointer from looking for the head of a tied model whose file held one beside the embedding.

    Args:
        checkpointer: writes the weights.
        state: the weights under torchtune's names; those of a tied model have no head.
    """
    files = getattr(checkpointer, "_weight_map", None)  # torchtune's list of tensors by file
    if isinstance(files, dict) and HEAD not in state:
        files.pop(HEAD_IN_FILES, None)


def describe_export(folder: Path, state: Mapping[str, Tensor], tokenizer: Tokenizer | None) -> None:
    """Make the files beside exported weights describe the trained model.

    Args:
        folder: contains the weights, and the files that a checkpointer has copied.
        state: the weights.
        tokenizer: the tokenizer of the training; None if it is unknown.
    """
    for file in folder.glob("*.safetensors"):
        follow_umask(file)  # safetensors writes files that only their owner may read
    for file in folder.glob("*.index.json"):
        _keep_in_index(file)
    _write_dtype(folder, state)
    if tokenizer is None:
        return
    for name in ("config.json", "generation_config.json"):
        _write_ids(folder / name, tokenizer)
    _describe_tokenizer(folder, tokenizer)


def describe_adapter(folder: Path, base: Base | None, tokenizer: Tokenizer | None) -> None:
    """Write the tokenizer and the chat template of the training beside an adapter, so that its folder is complete.

    Args:
        folder: contains the adapter.
        base: the weights under it, whose tokenizer is copied; None if they are unknown.
        tokenizer: the tokenizer of the training, which takes precedence; None if it is unknown.
    """
    if base is not None:
        _copy_tokenizer(Path(base.path) / "tokenizer.json", folder)
    if tokenizer is not None:
        _describe_tokenizer(folder, tokenizer)


def base_of(config: Mapping[str, Any]) -> Base | None:
    """The weights from which a run's policy starts; None if its checkpointer is not one that reads from a folder.

    Args:
        config: the run's config as plain data.

    Raises:
        ConfigError: if a file of the weights is missing.
    """
    checkpointer = config.get("checkpointer")
    if not isinstance(checkpointer, Mapping) or not checkpointer.get("checkpoint_dir"):
        return None
    return Base.of(resolve_path(str(checkpointer["checkpoint_dir"])), checkpointer.get("checkpoint_files"))


def _describe_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    if isinstance(tokenizer, JsonTokenizer):
        if tokenizer.file is not None:
            _copy_tokenizer(tokenizer.file, folder)
        _write_tokens(folder, tokenizer)
        _write_template(folder, tokenizer.chat_template)
        _write_tool_template(folder, tokenizer)


def _keep_in_index(index: Path) -> None:
    """Keep only existing tensors in an index. torchtune lists all that it read, such as the head of a tied model."""
    record = _read(index)
    names = (record or {}).get("weight_map")
    # An index that was copied from the starting weights may list files that do not exist here.
    if (
        record is None
        or not isinstance(names, dict)
        or not all((index.parent / n).is_file() for n in names.values())
    ):
        return
    held = {file: _names_in(index.parent / file) for file in set(names.values())}
    record["weight_map"] = {name: file for name, file in names.items() if name in held[file]}
    if record["weight_map"] != names:
        _write(index, record)


def _names_in(file: Path) -> set[str]:
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as stream:
            return set(stream.keys())
    return set(torch.load(file, map_location="meta", mmap=True, weights_only=True))


def _write_dtype(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Set the weights' dtype in ``config.json`` if it has one, because transformers 5 loads weights in this dtype."""
    file = folder / "config.json"
    config = _read(file)
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if config is None or len(dtypes) != 1:
        return
    own = str(dtypes.pop()).removeprefix("torch.")
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    named = [(part, key) for part in parts for key in ("dtype", "torch_dtype") if part.get(key) is not None]
    former = sorted({str(part[key]) for part, key in named} - {own})
    if former:
        for part, key in named:
            part[key] = own
        _write(file, config)
        log.info(
            f"{folder.name}: the weights are {own}, so config.json now says so (before: {', '.join(former)})"
        )


def _write_ids(file: Path, tokenizer: Tokenizer) -> None:
    """Set the ids of training. Generation then stops at the trained EOS, and at the earlier end tokens."""
    config = _read(file)
    if config is None:
        return
    before = dict(config)
    ends = config.get("eos_token_id")
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if tokenizer.eos_id not in listed:
        config["eos_token_id"] = [tokenizer.eos_id, *listed] if listed else tokenizer.eos_id
    if tokenizer.bos_id is not None:
        config["bos_token_id"] = tokenizer.bos_id
    config["pad_token_id"] = tokenizer.pad_id
    if config != before:
        _write(file, config)


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """Replace a folder's tokenizer files by those beside another ``tokenizer.json``."""
    for name in TOKENIZER_FILES:
        file = source if name == "tokenizer.json" else source.parent / name
        (folder / name).unlink(missing_ok=True)
        if file.is_file():
            shutil.copyfile(file, folder / name)


def _write_tokens(folder: Path, tokenizer: JsonTokenizer) -> None:
    ids = (tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id)
    tokens = {
        f"{kind}_token": tokenizer.decode_special(token_id)
        for kind, token_id in zip(NAMED_TOKENS, ids, strict=True)
        if token_id is not None
    }
    if not (folder / SETTINGS).exists():
        # Without a class transformers uses the model's default class, which may split text differently from the file.
        _write(folder / SETTINGS, {"tokenizer_class": "PreTrainedTokenizerFast", **tokens})
    for name in (SETTINGS, "special_tokens_map.json"):
        settings = _read(folder / name)
        if settings is None:
            continue
        changed = {key: token for key, token in tokens.items() if _content(settings.get(key)) != token}
        if changed:
            _write(folder / name, {**settings, **changed})


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _write_template(folder: Path, template: str | None) -> None:
    """Write the chat template to the two places where transformers looks, unless it is already there."""
    if template is None:
        return
    settings = _read(folder / SETTINGS) or {}
    file = folder / TEMPLATE
    found = (
        file.read_text(encoding="utf-8")
        if file.is_file()
        else named_template(settings.get("chat_template"), "default")
    )
    if found == template:
        return
    file.write_text(template, encoding="utf-8", newline="")
    _write(folder / SETTINGS, {**settings, "chat_template": template})
    (folder / "chat_template.json").unlink(missing_ok=True)
    shutil.rmtree(
        folder / "additional_chat_templates", ignore_errors=True
    )  # such as a template for tools, which would be preferred


def _write_tool_template(folder: Path, tokenizer: JsonTokenizer) -> None:
    """Write the template for tools where transformers looks for it, unless it is already there."""
    settings = _read(folder / SETTINGS) or {}
    default = folder / TEMPLATE
    found = None if default.is_file() else named_template(settings.get("chat_template"), "tool_use")
    if tokenizer.chat_template is None or tokenizer.tool_template in (None, found):
        return
    file = folder / TOOL_TEMPLATE
    file.parent.mkdir(exist_ok=True)
    file.write_text(tokenizer.tool_template, encoding="utf-8", newline="")
    # Without this file transformers would use the other template for every conversation.
    default.write_text(tokenizer.chat_template, encoding="utf-8", newline="")


def _read(file: Path) -> dict[str, Any] | None:
    """A JSON object; None if there is none. An unreadable file is not changed, because the weights matter more."""
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        log.warning(f"{file} is not valid JSON ({error}); it is not changed")
        return None
    return found if isinstance(found, dict) else None


def _write(file: Path, record: Mapping[str, Any]) -> None:
    """Write atomically, also over a read-only file."""
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, file)
