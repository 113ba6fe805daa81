"""What users may feed the package by mistake or in malice: each is one error, nothing runs and nothing is left behind."""

from __future__ import annotations

import gzip
import importlib.util
import json
import logging
import os
import pickle
import re
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
import yaml
from pyarrow import parquet
from safetensors.torch import load_file, save_file

import tokenpref.cli
from tokenpref._paths import data_root
from tokenpref._sealed import MANIFEST, seal
from tokenpref.errors import USER_ERROR_EXIT
from tokenpref.models import lora_tiny_llama
from tokenpref.models.peft_format import AdapterLayout, Base, write_adapter
from tokenpref.training import ContrastiveReference, PreferenceTrainer, TripletTrainer, WeightEstimation
from tokenpref.training.config.command_line import load_config
from tokenpref.training.saving.checkpoints import PROGRESS

TRAINED = "model-00001-of-00001.safetensors"
TRACE = "it_ran"  # what hostile input would make
TINY = data_root() / "data" / "tiny"
FEW = ("dataset.max_rows=16", "batch_size=4", "log_stats=[]", "run_val_every_n_steps=null")
KEPT = ("token_weights.refresh=once", "anchors.refresh=once", "token_weights.every_n_steps=null")
RECIPES = {
    "tdpo": ("tdpo_distributed", "tiny/tdpo", (*FEW, "dataset_val=null")),
    "tis": ("tis_dpo_distributed", "tiny/tis_dpo", (*FEW, "dataset_val=null", "token_weights.path=store")),
    "columns": (
        "tis_dpo_distributed",
        "tiny/tis_dpo",
        ("token_weights=tokenpref.data.ColumnScores", "token_weights.kind=weight", "weight_transform=null"),
    ),
    "ti": ("ti_dpo_distributed", "tiny/ti_dpo", (*FEW, "dataset_val=null", *KEPT)),
    "pair": (
        "contrastive_reference_distributed",
        "tiny/contrastive_reference",
        ("dataset.max_rows=4", "batch_size=4"),
    ),
    "estimate": (
        "estimate_weights_distributed",
        "tiny/estimate_weights",
        ("estimator.pair=pair", "dataset.max_rows=8"),
    ),
    "evaluate": ("evaluate_distributed", "tiny/evaluate", ("dataset.max_rows=4",)),
}
Prepare = Callable[[Path], None]


@dataclass(frozen=True)
class Bad:
    """A bad input.

    Args:
        name: of the test.
        command: a key of ``RECIPES``, or "show-weights".
        says: pattern of the error.
        words: further words of the command line.
        needs: good things to copy into the folder first: "pair", "store", "kept", "run" or "ti_run".
        prepare: makes the input.
    """

    name: str
    command: str
    says: str
    words: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    prepare: Prepare = field(default=lambda folder: None)


# --- how input is spoilt --------------------------------------------------------------------------------------


def both(*prepares: Prepare) -> Prepare:
    return lambda folder: [prepare(folder) for prepare in prepares] and None


def config(text: str) -> Prepare:
    return lambda folder: (folder / "my.yaml").write_text(text)


def rows(*lines: Any) -> Prepare:
    """``rows.jsonl``: dictionaries, and lines as they are."""
    content = b"".join(
        (line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines
    )
    return lambda folder: (folder / "rows.jsonl").write_bytes(content)


def write(name: str, content: bytes) -> Prepare:
    def prepare(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)

    return prepare


def remove(name: str) -> Prepare:
    return lambda folder: (folder / name).unlink()


def cut(name: str, share: float = 0.5) -> Prepare:
    def prepare(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(share * len(data))])

    return prepare


def flip(name: str, at: float = 0.5) -> Prepare:
    def prepare(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[int(at * len(data))] ^= 1
        (folder / name).write_bytes(bytes(data))

    return prepare


def record(name: str, change: Callable[[dict[str, Any]], Any]) -> Prepare:
    """Change a JSON or YAML file."""

    def prepare(folder: Path) -> None:
        file = folder / name
        # YAML would read some numbers of JSON, such as 1e-05, as text.
        found = (json.loads if name.endswith(".json") else yaml.safe_load)(file.read_text())
        change(found)
        file.write_text(json.dumps(found) if name.endswith(".json") else yaml.safe_dump(found))

    return prepare


class Hostile:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (TRACE, "w"))


STEP, TI_STEP = "run/checkpoints/step_2", "ti_run/checkpoints/step_2"


def sealed(change: Prepare, step: str = STEP) -> Prepare:
    """Change a checkpoint and seal it anew, as an attacker would; only what reads its files stands in the way."""

    def prepare(folder: Path) -> None:
        change(folder)
        (folder / step / MANIFEST).unlink()
        seal(folder / step)

    return prepare


def progress(**changes: Any) -> Prepare:
    return sealed(record(f"{STEP}/{PROGRESS}", lambda r: r.update(changes)))


def index(change: Callable[[Any], Any]) -> Prepare:
    """Change the pickled index of a checkpoint."""

    def prepare(folder: Path) -> None:
        file = folder / STEP / ".metadata"
        found = pickle.loads(file.read_bytes())
        change(found)
        file.write_bytes(pickle.dumps(found))

    return sealed(prepare)


def another_shape(found: Any) -> None:
    name = "model.tok_embeddings.weight"
    stored = found.state_dict_metadata[name]
    stored.size = torch.Size([10**12, stored.size[1]])


def half_a_tensor(found: Any) -> None:
    (chunk,) = found.state_dict_metadata["model.tok_embeddings.weight"].chunks
    chunk.sizes = torch.Size([1, chunk.sizes[1]])


def elsewhere(path: str) -> Callable[[Any], None]:
    def change(found: Any) -> None:
        for place in found.storage_data.values():
            place.relative_path = path

    return change


def shard(change: Callable[[pyarrow.Table], pyarrow.Table]) -> Prepare:
    """Change the table of a store's shard; the store's own record of it is changed too."""

    def prepare(folder: Path) -> None:
        file = folder / "store" / "shard-00000.parquet"
        parquet.write_table(change(parquet.read_table(file)), file)
        record("store/metadata.json", lambda r: r.pop("files", None))(folder)

    return prepare


def column(name: str, values: Callable[[list[Any]], list[Any]], kind: Any = None) -> Prepare:
    """Change a column of a shard, of its own type or another."""

    def change(table: pyarrow.Table) -> pyarrow.Table:
        new = pyarrow.array(values(table[name].to_pylist()), kind or table.schema.field(name).type)
        return table.set_column(table.column_names.index(name), name, new)

    return shard(change)


def shorter(name: str, count: int) -> Prepare:
    return column(name, lambda old: [values[:-count] for values in old])


def model(change: Callable[[Path], None]) -> Prepare:
    """A copy of the tiny model, spoilt."""

    def prepare(folder: Path) -> None:
        shutil.copytree(TINY / "model", folder / "model")
        change(folder / "model")

    return prepare


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Prepare:
    def changed(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors")

    return model(changed)


def adapter(change: Prepare = lambda folder: None) -> Prepare:
    """``adapter``, a folder in PEFT's format for the tiny model with the settings of ``ADAPTED``."""

    def prepare(folder: Path) -> None:
        decoder = lora_tiny_llama(["q_proj", "v_proj"], lora_rank=4, lora_alpha=8)
        (folder / "adapter").mkdir()
        base = Base.of(TINY / "model", ["model.safetensors"])
        write_adapter(folder / "adapter", decoder.state_dict(), AdapterLayout.of(decoder), base)
        change(folder)

    return prepare


def other_file(name: str) -> Prepare:
    """Hostile weights in a pickle."""
    return model(lambda folder: torch.save(Hostile(), folder / name))


def header(length: int) -> Callable[[Path], None]:
    return lambda folder: (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + b'{"a":1}')


# --- the table ------------------------------------------------------------------------------------------------

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdefg", "bcdefgh", strict=True)
)
MINE = ("--config", "my.yaml")
LEAN = ("enable_activation_checkpointing=true",)
EMULATED = ("enable_fp8_training=true", "fp8_emulate=true")
SIZES = {
    "vocab_size": 384,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 24,
    "max_seq_len": 256,
}
ODD_SIZES = (
    "model=torchtune.models.llama3_2.llama3_2",
    *(f"model.{name}={value}" for name, value in SIZES.items()),
    "model.intermediate_dim=40",
)
ADAPTERS = (
    "model=torchtune.models.llama3_2.lora_llama3_2",
    "model.lora_attn_modules=[q_proj]",
    "model.lora_rank=4",
    "model.lora_alpha=8",
    *ODD_SIZES[1:],
)
GOOD = {"prompt": "It was", "chosen": " good and warm.", "rejected": " bad and cold."}
CSV = ("dataset.source=rows.csv", "dataset.format=auto", "dataset.max_rows=null")
ROWS = ("dataset.source=rows.jsonl", "dataset.format=auto", "dataset.max_rows=null")
VOTES = (
    "dataset.format=labelled",
    "dataset.column_map={first: chosen, second: rejected}",
    "dataset.labels={column: vote, first: 1, second: 2}",
)
SCHEDULER = (
    "lr_scheduler._component_=tokenpref.training.get_constant_schedule_with_warmup",
    "lr_scheduler.num_warmup_steps=2",
)
KEPT_REFERENCE = ("reference=cached", "reference_cache_dir=kept")
CHECKPOINT = (f"resume_from_checkpoint={STEP}", *SCHEDULER)
MODEL = ("checkpointer.checkpoint_dir=model",)
EVIL = write("evil.py", f"open('{TRACE}', 'w')\n".encode())
REACHES_OUT = b"{{ ''.__class__.__mro__[1].__subclasses__() }}"
CAUSAL = ("model=tokenpref.models.causal_lm",)
IN_FOLDER = (
    *CAUSAL,
    "model.path=llm",
    "checkpointer=tokenpref.models.CausalLMCheckpointer",
    "checkpointer.checkpoint_dir=llm",
    "~checkpointer.checkpoint_files",
)
CONTENTS = b"{%% for m in messages %%}{{ m.content%s }}{%% endfor %%}"
WRITES_ON = b"{% for i in range(100000) %}{{ 'a' * 100000 }}{% endfor %}"


def shard_of_cache(folder: Path, name: str = "shard-00001-*") -> str:
    """A file of the one store in ``kept``."""
    (file,) = (folder / "kept").rglob(name)
    return file.relative_to(folder).as_posix()


def conversations(last_role: str) -> Prepare:
    """``rows.jsonl`` with one pair of conversations."""
    sides = {
        s: [{"role": "user", "content": "a"}, {"role": last_role, "content": s}]
        for s in ("chosen", "rejected")
    }
    return rows(sides)


def answers(chosen: dict, rejected: dict, **columns: Any) -> Prepare:
    """``rows.jsonl`` with one pair of assistant's messages."""
    sides = {"chosen": chosen, "rejected": rejected}
    messages = {side: [{"role": "assistant", **message}] for side, message in sides.items()}
    return rows({"prompt": [{"role": "user", "content": "a"}], **messages, **columns})


def with_scores(*chosen: Any) -> Prepare:
    return rows(*({**GOOD, "chosen_weights": c, "rejected_weights": 1.0} for c in chosen))


CONFIGS = [
    Bad("unknown key", "tdpo", "batchsize: unknown key; did you mean 'batch_size'", ("batchsize=3",)),
    Bad("misspelt argument", "tdpo", "loss.betta: TokenDPOLoss takes no such argument; did you mean 'beta'", ("loss.betta=1",)),
    Bad("several faults", "tdpo", "(?s)2 faults.*  - batch_size: .*'many'.*  - epochs: .*found 0",
        ("batch_size=many", "epochs=0")),
    Bad("flag as text", "tdpo", "shuffle: expected true or false, found 'perhaps'", ("shuffle=perhaps",)),
    Bad("flag of a component as text", "tdpo",
        'dataset.swap must be true or false, got "false"; set swap=false without quotation marks', ('dataset.swap="false"',)),
    Bad("flag of torch's as text", "tdpo", 'optimizer.fused must be true, false or null, got "maybe"',
        ("optimizer.fused=maybe",)),
    Bad("number of a component as text", "tdpo", 'optimizer.lr must be a number, got "fast"', ("optimizer.lr=fast",)),
    Bad("no betas", "tdpo", r"optimizer.betas must be a list of 2 values \(a number, a number\), got \[\]",
        ("optimizer.betas=[]",)),
    Bad("list of a component as text", "evaluate",
        r'sampling.reward.positive must be a list \(text each\), got "good"; set positive=\[good\]',
        ("sampling.reward.positive=good",)),
    Bad("unknown user's home", "tdpo",
        "output_dir: '~nobody_here/x' is in the home directory of a user 'nobody_here', .* write ./~nobody_here",
        ("output_dir=~nobody_here/x",)),
    Bad("name that no disk takes", "tdpo", "output_dir: has a name of 300 bytes", (f"output_dir={'x' * 300}",)),
    Bad("nan", "tdpo", "clip_grad_norm: expected a number above 0, found nan", ("clip_grad_norm=.nan",)),
    Bad("infinity", "tdpo", "checkpoint_every_minutes: expected a number above 0, found inf",
        ("checkpoint_every_minutes=.inf",)),
    Bad("negative", "tdpo", "seed: expected a whole number of at least 0, found -1", ("seed=-1",)),
    Bad("huge batch", "tdpo", "batch_size: expected a whole number of at most .*, found 1000000000000",
        ("batch_size=1000000000000",)),
    Bad("huge seed", "tdpo", "seed: expected a whole number of at most .*, found 1000000000000000000000000000000",
        (f"seed=1{'0' * 30}",)),
    Bad("number of 5000 digits", "tdpo", "my.yaml is not valid YAML: Exceeds the limit", MINE,
        prepare=config(f"seed: {'9' * 5000}\n")),
    Bad("fp16", "tdpo", "dtype: expected one of fp32, bf16, found 'fp16'.*use bf16 or fp32", ("dtype=fp16",)),
    Bad("no such precision", "tdpo", "compute_dtype: expected one of bf16, found 'fp8'", ("compute_dtype=fp8",)),
    Bad("bfloat16 over bfloat16", "tdpo", "compute_dtype: is bf16, and so is dtype; set dtype=fp32",
        ("compute_dtype=bf16", "dtype=bf16")),
    Bad("selective without checkpointing", "tdpo", "ac_mode: is selective, but enable_activation_checkpointing is false",
        ("ac_mode=selective", "ac_option=2")),
    Bad("selective of how many layers", "tdpo", "ac_option: missing; ac_mode selective needs it",
        (*LEAN, "ac_mode=selective")),
    Bad("every nth of all layers", "tdpo", "ac_option: is 2, which only ac_mode selective reads", (*LEAN, "ac_option=2")),
    Bad("every third of two layers", "tdpo", "ac_option: is 3, and the model has 2 layers, of which none would be checkpointed",
        (*LEAN, "ac_mode=selective", "ac_option=3")),
    Bad("offloading on a CPU", "tdpo", "enable_activation_offloading: takes activations from a GPU's memory, and device is cpu",
        (*LEAN, "enable_activation_offloading=true")),
    Bad("offloading of whole layers", "tdpo", "enable_activation_offloading: moves what full activation checkpointing keeps",
        ("enable_activation_offloading=true", "device=cuda")),
    Bad("float8 on a CPU", "tdpo", "enable_fp8_training: float8 products need a GPU, and device is cpu.*fp8_emulate=true",
        ("enable_fp8_training=true",)),
    Bad("float8 recipe without float8", "tdpo", "fp8_recipe_name: is rowwise, but enable_fp8_training is false",
        ("fp8_recipe_name=rowwise",)),
    Bad("emulation of nothing", "tdpo", "fp8_emulate: is true, but enable_fp8_training is false", ("fp8_emulate=true",)),
    Bad("no such float8 recipe", "tdpo",
        "fp8_recipe_name: expected one of tensorwise, rowwise, rowwise_with_gw_hp, found 'blockwise'",
        ("enable_fp8_training=true", "fp8_recipe_name=blockwise")),
    Bad("rows in float32", "tdpo", "fp8_recipe_name: GPUs compute rowwise in bfloat16 only, and dtype is fp32",
        ("enable_fp8_training=true", "fp8_recipe_name=rowwise", "device=cuda")),
    Bad("float8 of odd sizes", "tdpo", r"of the model's 14 linear layers besides the head none has .* is \[24, 24\]",
        (*EMULATED, *ODD_SIZES)),
    Bad("float8 with adapters", "tdpo", "enable_fp8_training: the model has adapters", (*EMULATED, *ADAPTERS)),
    Bad("float8 in an evaluation", "evaluate", "enable_fp8_training: unknown key", ("enable_fp8_training=true",)),
    Bad("no such device", "tdpo", "device: 'abacus' is not supported; set device=cpu", ("device=abacus",)),
    Bad("beta refused", "tdpo", "loss .*beta must be a finite number > 0.*got -0.1", ("loss.beta=-0.1",)),
    Bad("learning rate refused", "tdpo", "optimizer.lr: expected a number from 0 to 1000, found -1", ("optimizer.lr=-1",)),
    Bad("no loss", "tdpo", "loss: missing; the recipe needs it", ("loss=null",)),
    Bad("no component", "tdpo", "model: expected a mapping with _component_, found 'llama'", ("~model", "model=llama")),
    Bad("not importable", "tdpo", "'tokenpref.losses.TokenDPOLos' cannot be imported.*did you mean 'TokenDPOLoss'",
        ("loss=tokenpref.losses.TokenDPOLos",)),
    Bad("not callable", "tdpo", "'math.pi' is a float, not something to call", ("loss=math.pi",)),
    Bad("component that does not parse", "tdpo", "'my_loss.Mine' cannot be imported.*SyntaxError.*my_loss.py, line 1",
        ("loss=my_loss.Mine",), prepare=lambda f: (f / "my_loss.py").write_text("class Mine(:\n")),
    Bad("component path of spaces", "tdpo", "' ' cannot be imported", ("loss._component_=' '",)),
    Bad("no loss at all", "tdpo", "loss .collections.Counter.: a loss must say what it needs", ("loss=collections.Counter",)),
    Bad("loss of another recipe", "tdpo", "needs 'weights', which recipes/tdpo_distributed does not provide",
        ("loss=tokenpref.losses.TISDPOLoss",)),
    Bad("a list", "tdpo", "my.yaml must hold a mapping of keys, found a ListConfig", MINE, prepare=config("- 1\n- 2\n")),
    Bad("no YAML", "tdpo", "my.yaml is not valid YAML", MINE, prepare=config("a: [1\n")),
    Bad("YAML that runs", "tdpo", "my.yaml is not valid YAML.*python/object/apply:os.system", MINE,
        prepare=config(f"a: !!python/object/apply:os.system ['touch {TRACE}']\n")),
    Bad("YAML that opens", "tdpo", "my.yaml is not valid YAML.*python/object/new:io.open", MINE,
        prepare=config(f"a: !!python/object/new:io.open ['{TRACE}', 'w']\n")),
    Bad("override that runs", "tdpo", "overrides cannot be merged.*python/object/apply",
        (f"seed=!!python/object/apply:os.system ['touch {TRACE}']",)),
    Bad("billion laughs", "tdpo", "my.yaml is not valid YAML: its aliases.*stand for more than", MINE, prepare=config(LAUGHS)),
    Bad("an alias of itself", "tdpo", "my.yaml is not valid YAML: .*contains itself", MINE, prepare=config("a: &a [*a]\n")),
    Bad("too deep", "tdpo", "my.yaml is not valid YAML: it is nested deeper than 50 levels", MINE,
        prepare=config("a: " + "[" * 5000 + "]" * 5000)),
    Bad("config with other bytes", "tdpo", "my.yaml is not valid YAML", MINE, prepare=write("my.yaml", b"a: \xff\xfe\n")),
    Bad("config with NUL", "tdpo", "my.yaml is not valid YAML.*special characters", MINE,
        prepare=write("my.yaml", b"a: \x00\n")),
    Bad("no config", "tdpo", "no file 'nowhere' here and none of that name", ("--config", "nowhere")),
    Bad("config is a folder", "tdpo", "--config: .*sub cannot be read .Is a directory", ("--config", "sub"),
        prepare=lambda f: (f / "sub").mkdir()),
    Bad("interpolation to nothing", "tdpo", "the config cannot be resolved: .*nowhere", ("seed=${nowhere}",)),
    Bad("interpolation in a circle", "tdpo", "the config cannot be resolved: .*", ("seed=${epochs}", "epochs=${seed}")),
    Bad("unknown resolver", "tdpo", "the config cannot be resolved: .*Unsupported interpolation type eval",
        ("seed=${eval:1+1}",)),
    Bad("mandatory value", "tdpo", "the config cannot be resolved: Missing mandatory value: seed", MINE,
        prepare=config("seed: ???\n")),
    Bad("override with no value", "tdpo", "'seed=\\?\\?\\?': \\?\\?\\? is no value", ("seed=???",)),
    Bad("override without =", "tdpo", "'batch_size': an override is written key=value", ("batch_size",)),
    Bad("override of a bad key", "tdpo", "'=1': an override is written key=value", ("=1",)),
    Bad("override of another shape", "tdpo", "log_stats: expected a list of ref, .*, found .'a': 1.",
        ("log_stats={a: 1}",)),
    Bad("a number for a folder", "tdpo", "checkpointer.checkpoint_dir must be text, got 3",
        ("checkpointer.checkpoint_dir=3",)),
    Bad("a number for a file", "tdpo", "checkpointer.checkpoint_files must be a list .text each. or .*, got .3.",
        ("checkpointer.checkpoint_files=[3]",)),
    Bad("a weight of nothing", "tdpo", "weight must be a number above 0 and at most 1000, got 0", ("dataset.weight=0",)),
    Bad("a cache that is a file", "tdpo", "the cache of tokenised data in .*not_a_folder cannot be written.*set cache_dir: null",
        ("dataset.cache_dir=not_a_folder",), prepare=write("not_a_folder", b"")),
    Bad("a slice without rows", "tdpo", "split 'train\\[99:\\]' selects no row \\(train has 1\\)",
        (*ROWS, "dataset.split=train[99:]"), prepare=rows(GOOD)),
    Bad("a slice that is none", "tdpo", "split: 'train\\[:x%\\]' cannot be read", (*ROWS, "dataset.split=train[:x%]"),
        prepare=rows(GOOD)),
    Bad("a slice of several splits of one file", "tdpo", "'train\\+test' names 2 splits, and .*rows.jsonl is one",
        (*ROWS, "dataset.split=train+test"), prepare=rows(GOOD)),
    Bad("CSV with a field too many", "tdpo", "rows.csv, row 0 \\(line 2\\) has 4 fields and the header 3", CSV,
        prepare=write("rows.csv", b"prompt,chosen,rejected\nq,a,b,c\n")),
    Bad("CSV with an open quote", "tdpo", "rows.csv, row 0 \\(line 2\\) is not valid CSV", CSV,
        prepare=write("rows.csv", b'prompt,chosen,rejected\nq,a,"b\n')),
    Bad("compressed data cut short", "tdpo", "rows.jsonl.gz cannot be read: ", ("dataset.source=rows.jsonl.gz",),
        prepare=write("rows.jsonl.gz", gzip.compress(b"{}" * 999)[:-9])),
    Bad("a number for a source", "tdpo", "dataset.source must be text, got 3", ("dataset.source=3",)),
    Bad("no data set", "tdpo", "dataset .my_data.rows.: makes a list of another kind", ("dataset=my_data.rows",),
        prepare=lambda f: (f / "my_data.py").write_text("def rows(tokenizer, **more):\n    return []\n")),
    Bad("no model", "tdpo", "model .builtins.dict.: makes a dict, which is neither a TransformerDecoder of torchtune",
        ("model=builtins.dict",)),
    Bad("no such folder of a model", "tdpo", "model.path: nowhere gives no model that transformers .* knows",
        (*CAUSAL, "model.path=nowhere")),
    Bad("a folder of another kind of model", "tdpo", "model.path: t5 is a t5, and transformers .* makes no causal language model",
        (*CAUSAL, "model.path=t5"), prepare=write("t5/config.json", b'{"model_type": "t5"}')),
    Bad("a folder of transformers without weights", "tdpo", "checkpointer.checkpoint_dir: llm holds no weights", IN_FOLDER,
        prepare=write("llm/config.json", b'{"model_type": "llama"}')),
    Bad("weights of transformers that are cut off", "tdpo", "checkpointer.checkpoint_dir: .*model.safetensors", IN_FOLDER,
        prepare=both(write("llm/config.json", b'{"model_type": "llama"}'), write("llm/model.safetensors", b"\x08\0\0\0"))),
    Bad("no optimizer", "tdpo", "optimizer .builtins.list.: makes a list, which has no param_groups",
        ("optimizer=builtins.list", "~optimizer.lr")),
    Bad("no logger", "tdpo", "metric_logger .builtins.dict.: makes a dict, which has no log_config",
        ("metric_logger=builtins.dict",)),
    Bad("log below a file", "tdpo", "metric_logger.log_dir: .*taken is a file; set a folder",
        ("metric_logger.log_dir=taken/logs",), prepare=write("taken", b"")),
    Bad("unknown argument of the default profiler", "tdpo", "profiler.enable: setup_torch_profiler takes no .* mean 'enabled'",
        ("profiler.enable=true",)),
    Bad("no profiler", "tdpo", "profiler .builtins.dict.: makes a dict, which has no start", ("profiler=builtins.dict",)),
    Bad("path with NUL", "tdpo", r"output_dir: 'a\\x00b' holds the control character", ('output_dir="a\\0b"',)),
    Bad("path of a line break", "tdpo", r"dataset.cache_dir: '\\n' holds the control character", (r'dataset.cache_dir="\n"',)),
    Bad("no such key to remove", "tdpo", "~gamma: the config has no such key", ("~gamma",)),
    Bad("model folder missing", "tdpo", "checkpointer.checkpoint_dir: no folder at .*nowhere",
        ("checkpointer.checkpoint_dir=nowhere",)),
    Bad("output_dir is a file", "tdpo", "output_dir: .*taken is a file; set a folder", ("output_dir=taken",),
        prepare=write("taken", b"")),
    Bad("output_dir below a file", "tdpo", "output_dir: .*taken is a file; set a folder", ("output_dir=taken/run",),
        prepare=write("taken", b"")),
    Bad("package path that escapes", "tdpo", "'package://../../secret' leaves the package's folder",
        ("output_dir=package://../../secret",)),
    Bad("unknown model type", "tdpo", "checkpointer .*knows no 'LLAMA9'", ("checkpointer.model_type=LLAMA9",)),
    Bad("no such tokenizer", "tdpo", "tokenizer.path: no file .*nowhere", ("tokenizer.path=nowhere",)),
    Bad("resume from a number", "tdpo", "resume_from_checkpoint: expected true, false, auto or a path, found 3",
        ("resume_from_checkpoint=3",)),
    Bad("resume from nowhere", "tdpo", "resume_from_checkpoint: .*no such folder: .*nowhere",
        ("resume_from_checkpoint=nowhere",)),
    Bad("resume from nothing", "tdpo", "resume_from_checkpoint: no checkpoint that can be read in .*never",
        ("resume_from_checkpoint=true",)),
    Bad("output in the model's folder", "tdpo", "checkpointer.output_dir: .*model/out is .* or lies inside it",
        (*MODEL, "output_dir=model/out"), prepare=model(lambda folder: None)),
    Bad("dry run in the model's folder", "tdpo", r"checkpointer.output_dir: .*model is the model's folder",
        (*MODEL, "output_dir=model", "dry_run=true"), prepare=model(lambda folder: None)),
    Bad("weights of somebody else", "tdpo", "output_dir: .*never holds results of a run .epoch_0., which would be replaced",
        prepare=lambda folder: (folder / "never/epoch_0").mkdir(parents=True)),
    Bad("a finished run once more", "tdpo", "output_dir: .*run holds", (*SCHEDULER, "output_dir=run"), ("run",)),
    Bad("a finished run, tried dry", "tdpo", "output_dir: .*run holds", (*SCHEDULER, "output_dir=run", "dry_run=true"), ("run",)),
    Bad("a checkpoint into a finished run", "tdpo", "output_dir: .*run holds",
        ("output_dir=run", f"resume_from_checkpoint={TI_STEP}"), ("run", "ti_run")),
    Bad("a pair over a pair", "pair", "output_dir: .*pair holds pair.yaml, which no run of this", ("output_dir=pair",),
        ("pair",), remove("pair/run.json")),
    Bad("no such reference", "tdpo", "reference: expected one of model, cached, found 'cache'", ("reference=cache",)),
    Bad("folder of a cache that is not", "tdpo", "reference_cache_dir: set, but reference is model.*set reference=cached",
        ("reference_cache_dir=kept",)),
    Bad("cache below a file", "tdpo", "reference_cache_dir: .*taken is a file; set a folder",
        ("reference=cached", "reference_cache_dir=taken/kept"), prepare=write("taken", b"")),
    Bad("cache of weights without files", "tdpo", "reference: cached tells .* and checkpointer .my_reader.Reader. names no "
        "checkpoint_dir; set reference=model", ("reference=cached", "checkpointer=my_reader.Reader"),
        prepare=lambda f: (f / "my_reader.py").write_text("class Reader:\n    pass\n")),
    Bad("cache of anchors", "ti", "reference: cached holds .*, and loss .*TripletTIDPOLoss. compares with a third one; set "
        "reference=model", ("reference=cached",)),
    Bad("cache and the reference's attribution", "ti", "reference: cached keeps .*token_weights .*looks at the model; set "
        "reference=model", ("reference=cached", "loss.gamma=0.0", "token_weights.model=reference")),
    Bad("no prompts", "evaluate", "sampling.prompts: no file at .*nowhere.txt", ("sampling.prompts=nowhere.txt",)),
    Bad("prompts of other bytes", "evaluate", "sampling.prompts: .*p.txt is not UTF-8", ("sampling.prompts=p.txt",),
        prepare=write("p.txt", b"\xff\xfe")),
    Bad("empty prompts", "evaluate", "sampling.prompts: .*p.txt: no openings; write one a line", ("sampling.prompts=p.txt",),
        prepare=write("p.txt", b"\n\n")),
    Bad("compare_to is no JSON", "evaluate", "sampling.compare_to: .*s.jsonl, line 2.* is not valid JSON",
        ("sampling.compare_to=s.jsonl",), prepare=write("s.jsonl", b'{"prompt": "a", "sample": 0, "reward": 1}\n{"prompt')),
    Bad("compare_to without rewards", "evaluate", "sampling.compare_to: .*s.jsonl, line 1: .*reward",
        ("sampling.compare_to=s.jsonl",), prepare=write("s.jsonl", b'{"prompt": "a", "sample": 0, "reward": "high"}\n')),
    Bad("reward of something else", "evaluate", "sampling.reward.positive: KeywordReward needs this argument",
        ("~sampling.reward.positive",)),
    Bad("kept by a number", "pair", "keep_checkpoints: expected true or false, found 1", ("keep_checkpoints=1",)),
    Bad("method", "pair", "method: expected one of prompt, sft, dpo, found 'ppo'", ("method=ppo",)),
]  # fmt: skip

DATA = [
    Bad("no rows file", "tdpo", "no file or folder .*rows.jsonl", ROWS),
    Bad("empty file", "tdpo", "rows.jsonl is empty", ROWS, prepare=write("rows.jsonl", b"")),
    Bad("blank lines", "tdpo", "rows.jsonl is empty", ROWS, prepare=write("rows.jsonl", b"\n \n")),
    Bad("row is no JSON", "tdpo", r"rows.jsonl, row 1 \(line 2\) is not valid JSON", ROWS,
        prepare=rows(GOOD, b"{'prompt': 1}")),
    Bad("row is no object", "tdpo", r"rows.jsonl, row 1 \(line 2\) is a JSON list", ROWS, prepare=rows(GOOD, [1, 2])),
    Bad("missing column", "tdpo", "has no column 'rejected'; its columns are prompt, chosen", ROWS,
        prepare=rows({"prompt": "a", "chosen": "b"})),
    Bad("missing value", "tdpo", r"row 1 \(line 2\), column 'rejected': has no value", ROWS,
        prepare=rows(GOOD, {**GOOD, "rejected": None})),
    Bad("empty answer", "tdpo", r"row 0 \(line 1\), column 'chosen': has no answer", ROWS,
        prepare=rows({**GOOD, "chosen": "  "})),
    Bad("equal answers", "tdpo", "column 'rejected': is equal to chosen", ROWS,
        prepare=rows({**GOOD, "rejected": GOOD["chosen"]})),
    Bad("numbers for text", "tdpo", "column 'chosen': is of type int, where this format has text", ROWS,
        prepare=rows({**GOOD, "chosen": 3})),
    Bad("kinds that change", "tdpo", r"row 1 \(line 2\), column 'chosen': is of type list", ROWS,
        prepare=rows(GOOD, {**GOOD, "chosen": [1]})),
    Bad("half a surrogate", "tdpo", "column 'chosen': contains half of a surrogate pair", ROWS,
        prepare=rows({**GOOD, "chosen": "\ud800 x"})),
    Bad("text of other bytes", "tdpo", r"row 1 \(line 2\) is not valid JSON: 'utf-8' codec", ROWS,
        prepare=rows(GOOD, b'{"prompt": "a", "chosen": "\xff", "rejected": "c"}')),
    Bad("NUL bytes", "tdpo", r"row 1 \(line 2\) is not valid JSON", ROWS, prepare=rows(GOOD, b"\x00\x00\x00")),
    Bad("wrong roles", "tdpo", "column 'chosen': must have one assistant message after the prompt",
        (*ROWS, "tokenizer.chat_template=x"), prepare=conversations("user")),
    Bad("message without content", "tdpo", "column 'chosen': message 0 has the keys", (*ROWS, "tokenizer.chat_template=x"),
        prepare=rows({s: [{"rolle": "user", "content": s}] for s in ("chosen", "rejected")})),
    Bad("too long", "tdpo", "is too long .*max_seq_len 4.*raise the limit",
        (*ROWS, "dataset.max_seq_len=4", "dataset.truncation=error"), prepare=rows(GOOD)),
    Bad("truncated parquet", "tdpo", "rows.parquet cannot be read as parquet",
        ("dataset.source=rows.parquet", "dataset.format=auto"),
        prepare=both(lambda f: parquet.write_table(pyarrow.table({"a": [1]}), f / "rows.parquet"), cut("rows.parquet"))),
    Bad("another format", "tdpo", "format: conversational was set, but .* looks like explicit",
        (*ROWS, "dataset.format=conversational"), prepare=rows(GOOD)),
    Bad("labels missing", "tdpo", "format: labelled needs labels: .column", (*ROWS, "dataset.format=labelled",
        "dataset.column_map={first: chosen, second: rejected}"), prepare=rows(GOOD)),
    Bad("unknown label", "tdpo", r"row 1 \(line 2\), column 'vote': holds 3, and labels knows 1, 2",
        (*ROWS, *VOTES), prepare=rows({**GOOD, "vote": 1}, {**GOOD, "vote": 3})),
    Bad("nothing but ties", "tdpo", r"every row was left out \(2 tie\)",
        (*ROWS, *VOTES, "dataset.labels.tie=0"), prepare=rows(*[{**GOOD, "vote": 0}] * 2)),
    Bad("one label twice", "tdpo", "labels: 1 stands for two of first, second and tie",
        (*ROWS, *VOTES, "dataset.labels.second=1"), prepare=rows({**GOOD, "vote": 1})),
    Bad("no preset", "tdpo", "preset must be one of shp, .*got 'alpacas'", (*ROWS, "dataset.preset=alpacas"),
        prepare=rows(GOOD)),
    Bad("a layout of another name", "tdpo", "it looks like preset: shp. Set dataset.preset", ROWS,
        prepare=rows({"history": "a", "human_ref_A": "b", "human_ref_B": "c", "labels": 1})),
    Bad("one score for two answers", "tdpo", r"column 'score': has 1 values for 2 answers",
        (*ROWS, "dataset.format=ranked"), prepare=rows({"prompt": "a", "answers": [" b", " c"], "score": [1]})),
    Bad("pairs of another kind", "tdpo", "pairs must be one of best_worst, all, adjacent, got 'every'",
        (*ROWS, "dataset.format=ranked", "dataset.pairs=every"), prepare=rows(GOOD)),
    Bad("a path into text", "tdpo", "column 'prompt.post': leads into text that is not JSON",
        (*ROWS, "dataset.column_map={prompt: prompt.post}"), prepare=rows(GOOD)),
    Bad("messages as JSON text", "tdpo", r"row 1 \(line 2\), column 'chosen': is JSON text of messages", ROWS,
        prepare=rows(GOOD, {**GOOD, "chosen": '[{"role": "assistant", "content": "a"}]'})),
    Bad("messages as Python text", "tdpo", "begins like a list of messages and is not JSON", ROWS,
        prepare=rows({**GOOD, "chosen": "[{'role': 'assistant', 'content': 'a'}]"})),
    Bad("two system messages", "tdpo", "column 'system': holds a system prompt, and the row's messages begin with another",
        (*ROWS, "tokenizer.chat_template=x"),
        prepare=rows({"system": "a", **{s: [{"role": "system", "content": "b"}, {"role": "user", "content": "q"},
            {"role": "assistant", "content": s}] for s in ("chosen", "rejected")}})),
    Bad("a prompt of another name", "tdpo", "its column 'problem' looks like the prompt",
        ROWS, prepare=rows({"problem": "q", "chosen": "so a", "rejected": "so b", "n": 1})),
    Bad("a text that begins the other", "tdpo", "column 'chosen': is the beginning of rejected", ROWS,
        prepare=rows({"chosen": "It is blue.", "rejected": "It is blue. And wide."})),
    Bad("scores of labelled rows", "columns", "format: labelled, where label or rank decide which answer is chosen",
        (*ROWS, *VOTES, "token_weights.per=pair"), prepare=rows({**GOOD, "vote": 1, "chosen_weights": 1.0})),
    Bad("scores of wrong length", "columns", "column 'chosen_weights': has 2 scores and the answer",
        (*ROWS, "token_weights.per=token"), prepare=with_scores([1.0, 2.0])),
    Bad("score nan", "columns", "column 'chosen_weights'.*nan", (*ROWS, "token_weights.per=pair"),
        prepare=with_scores(1.0, float("nan"))),
    Bad("negative weight", "columns", "the value is -2.0, and weights must not be negative", (*ROWS, "token_weights.per=pair"),
        prepare=with_scores(-2.0)),
    Bad("no scores", "columns", "has no column 'chosen_weights' with the scores", (*ROWS, "token_weights.per=pair"),
        prepare=rows(GOOD)),
]  # fmt: skip

STORES = [
    Bad("no store", "tis", "nowhere: no weight store there; make one with", ("token_weights.path=nowhere",)),
    Bad("unfinished store", "tis", "store: unfinished .*it continues", needs=("store",), prepare=remove("store/metadata.json")),
    Bad("truncated shard", "tis", "shard-00000.parquet has .* bytes and was written with", needs=("store",),
        prepare=cut("store/shard-00000.parquet")),
    Bad("flipped bit in a shard", "tis", "shard-00000.parquet is not what was written", needs=("store",),
        prepare=flip("store/shard-00000.parquet", 0.3)),
    Bad("missing shard", "tis", "shard-00001.parquet is missing", needs=("store",),
        prepare=remove("store/shard-00001.parquet")),
    Bad("store of another tokenizer", "tis", "the scores were made with another tokenizer", needs=("store",),
        prepare=record("store/metadata.json", lambda r: r.update(tokenizer="0" * 64))),
    Bad("store's record is no JSON", "tis", "metadata.json cannot be read .*; estimate the weights again", needs=("store",),
        prepare=cut("store/metadata.json")),
    Bad("store's record is a list", "tis", "metadata.json cannot be read .expected a mapping, found a list", needs=("store",),
        prepare=write("store/metadata.json", b"[1]")),
    Bad("unknown store format", "tis", "format 'tokenpref-weights/9' of kind", needs=("store",),
        prepare=record("store/metadata.json", lambda r: r.update(format="tokenpref-weights/9"))),
    Bad("number of shards is text", "tis", "metadata.json: shards is '2', expected a whole number", needs=("store",),
        prepare=record("store/metadata.json", lambda r: r.update(shards="2"))),
    Bad("number of shards is absurd", "tis", "shard-00002.parquet is missing", needs=("store",),
        prepare=record("store/metadata.json", lambda r: r.update(shards=10**12))),
    Bad("store names a file elsewhere", "tis", "metadata.json: files names '../run.json', which is no shard", needs=("store",),
        prepare=record("store/metadata.json", lambda r: r["files"].update({"../run.json": {"bytes": 1, "sha256": ""}}))),
    Bad("shard with another column", "tis", "shard-00000.parquet: has columns .*'picked'.*, expected", needs=("store",),
        prepare=shard(lambda t: t.rename_columns([{"chosen": "picked"}.get(n, n) for n in t.column_names]))),
    Bad("shard with text for scores", "tis", "shard-00000.parquet: column 'chosen' holds .*string", needs=("store",),
        prepare=column("chosen", lambda old: [["a"] for _ in old], pyarrow.list_(pyarrow.string()))),
    Bad("shard with an absurd list", "tis", "shard-00000.parquet: column 'chosen' declares .* values", needs=("store",),
        prepare=column("chosen", lambda old: [[0.0] * 2000, *old[1:]])),
    Bad("shard with holes", "tis", "shard-00000.parquet: column 'chosen' has no value in some rows", needs=("store",),
        prepare=column("chosen", lambda old: [None, *old[1:]])),
    Bad("spans of nothing", "show-weights", "column 'chosen_spans' misses values inside some rows' lists; remove it and run",
        ("store",), ("store",), prepare=column("chosen_spans", lambda old: [[None] * len(values) for values in old])),
    Bad("a score of nothing", "show-weights", "column 'rejected' misses values inside some rows' lists", ("store",), ("store",),
        prepare=column("rejected", lambda old: [[*values[:-1], None] for values in old])),
    Bad("no spans at all", "show-weights", "column 'rejected_spans' has no value in some rows", ("store",), ("store",),
        prepare=column("rejected_spans", lambda old: [None, *old[1:]])),
    Bad("shard with half a span", "show-weights", "row 0.*spans", ("store",), ("store",), prepare=shorter("chosen_spans", 1)),
    Bad("scores of fewer tokens", "tis", "the store is damaged", needs=("store",),
        prepare=both(shorter("chosen", 1), shorter("chosen_spans", 2))),
    Bad("scores that are infinite", "tis", "has the score -?inf; scores must be finite", needs=("store",),
        prepare=column("chosen", lambda old: [[float("inf")] * len(s) for s in old])),
    Bad("no such row", "show-weights", "no row 99; it holds 16 rows", ("store", "--row", "99"), ("store",)),
]  # fmt: skip

PAIR = "pair/pair.yaml"
PAIRS = [
    Bad("no pair", "estimate", "no contrastive pair there; build one with", ("estimator.pair=nowhere",)),
    Bad("half built", "estimate", "half built .positive is done, negative is not", needs=("pair",),
        prepare=lambda f: ((f / PAIR).unlink(), (f / "pair/negative/finished.json").unlink())),
    Bad("pair is no YAML", "estimate", "pair.yaml: is not valid YAML", needs=("pair",), prepare=write(PAIR, b"{: :")),
    Bad("pair that runs", "estimate", "pair.yaml: is not valid YAML.*python/object/apply:os.system", needs=("pair",),
        prepare=write(PAIR, f"format: !!python/object/apply:os.system ['touch {TRACE}']\n".encode())),
    Bad("pair of a billion laughs", "estimate", "pair.yaml: is not valid YAML.*its aliases", needs=("pair",),
        prepare=write(PAIR, LAUGHS.encode())),
    Bad("pair with a date that is none", "estimate", "pair.yaml: is not valid YAML .*month must be in 1..12", needs=("pair",),
        prepare=write(PAIR, b"a: 2001-13-45\n")),
    Bad("pair of the former format calls os.system", "estimate", "pair was built with another model ._component_ is 'os.system'",
        needs=("pair",), prepare=record(PAIR, lambda r: r.update(format="tokenpref-pair/1", base={"_component_": "os.system"},
            model={"_component_": "os.system", "command": f"touch {TRACE}"}))),
    Bad("pair of the former format imports a file beside it", "estimate", "built with another model .num_layer is 3 there",
        needs=("pair",), prepare=both(EVIL, record(PAIR, lambda r: r.update(format="tokenpref-pair/1",
            base={"_component_": "evil.Checkpointer"}, model={"_component_": "tokenpref.models.tiny_llama", "num_layer": 3})))),
    Bad("pair of a later format", "estimate", "pair.yaml: format is 'tokenpref-pair/3', expected 'tokenpref-pair/2'",
        needs=("pair",), prepare=record(PAIR, lambda r: r.update(format="tokenpref-pair/3"))),
    Bad("trusted components of a pair", "estimate", "estimator.trusted_components: ContrastiveEstimator takes no such argument",
        ("estimator.trusted_components=[os.system]",), ("pair",)),
    Bad("pair without a model to run it in", "estimate", "model: missing; .*Set model and checkpointer",
        ("~model",), ("pair",)),
    Bad("pair without a checkpointer", "estimate", "checkpointer: missing; .*Set model and checkpointer", ("~checkpointer",),
        ("pair",)),
    Bad("pair of another base", "estimate", "pair was built from another base model .0000, here [0-9a-f]{64}.; set checkpointer",
        needs=("pair",), prepare=record(PAIR, lambda r: r.update(base="0000"))),
    Bad("checkpoint leaves the pair", "estimate", "positive.checkpoint '../base' leaves the pair's folder", needs=("pair",),
        prepare=record(PAIR, lambda r: r["positive"].update(checkpoint="../base"))),
    Bad("adapter leaves the pair", "estimate", "positive.adapter '../base' leaves the pair's folder", needs=("pair",),
        prepare=record(PAIR, lambda r: r["positive"].update(checkpoint=None, adapter="../base"))),
    Bad("adapter that is not there", "estimate", "no adapter of the negative side there; build the pair again", needs=("pair",),
        prepare=record(PAIR, lambda r: r["negative"].update(checkpoint=None, adapter="negative/epoch_0"))),
    Bad("side with weights and an adapter", "estimate", "positive has a checkpoint and an adapter", needs=("pair",),
        prepare=record(PAIR, lambda r: r["positive"].update(adapter="positive/epoch_0"))),
    Bad("adapter is a list", "estimate", "positive.adapter is .*, expected text or null", needs=("pair",),
        prepare=record(PAIR, lambda r: r["positive"].update(adapter=["x"]))),
    Bad("absolute checkpoint", "estimate", "positive.checkpoint '/etc' leaves the pair's folder", needs=("pair",),
        prepare=record(PAIR, lambda r: r["positive"].update(checkpoint="/etc"))),
    Bad("side without weights", "estimate", "no weights of the negative side there", needs=("pair",),
        prepare=lambda f: [file.unlink() for file in (f / "pair/negative/epoch_0").glob("*.safetensors")]),
    Bad("side with a flipped bit", "estimate", "model-00001-of-00001.safetensors is not what was written", needs=("pair",),
        prepare=flip("pair/negative/epoch_0/model-00001-of-00001.safetensors", 0.9)),
    Bad("pair of another tokenizer", "estimate", "the pair was built with another tokenizer .000000000000", needs=("pair",),
        prepare=record(PAIR, lambda r: r.update(tokenizer="0" * 64))),
    Bad("side with a tokenizer of its own", "estimate", "pair.yaml: negative has 'tokenizer', and a side has only checkpoint",
        needs=("pair",), prepare=record(PAIR, lambda r: r["negative"].update(tokenizer="0" * 64))),
    Bad("pair of another model", "estimate", "pair was built with another model .num_hidden_layers is 2 there and 3 here",
        ("model.num_layers=3",), ("pair",)),
    Bad("prompt is a number", "estimate", "pair.yaml: positive.prompt is 3, expected text", needs=("pair",),
        prepare=record(PAIR, lambda r: r["positive"].update(prompt=3))),
    Bad("side is a list", "estimate", "pair.yaml: positive is .1., expected a mapping", needs=("pair",),
        prepare=record(PAIR, lambda r: r.update(positive=[1]))),
]  # fmt: skip

CACHES = [
    Bad("bit flipped in a cache", "tdpo", "shard-00001-.* is not what was written .its checksum differs.; remove it and start",
        KEPT_REFERENCE, ("kept",), lambda f: flip(shard_of_cache(f), 0.9)(f)),
    Bad("truncated cache", "tdpo", "shard-00001-.* has .* bytes and was written with .*; remove it and start", KEPT_REFERENCE,
        ("kept",), lambda f: cut(shard_of_cache(f))(f)),
    Bad("cache of another reference", "tdpo", "metadata.json is not of this store .it differs in job", KEPT_REFERENCE, ("kept",),
        lambda f: record(shard_of_cache(f, "metadata.json"), lambda r: r["job"].update(weights="0"))(f)),
    Bad("cache that names files elsewhere", "tdpo", "metadata.json is not of this store .files names other files",
        KEPT_REFERENCE, ("kept",),
        lambda f: record(shard_of_cache(f, "metadata.json"), lambda r: r.update(files={"../shard-00000-0": 1}))(f)),
    Bad("cache with a seal that is cut", "tdpo", "metadata.json cannot be read .*; remove it", KEPT_REFERENCE,
        ("kept",), lambda f: cut(shard_of_cache(f, "metadata.json"))(f)),
]  # fmt: skip

CHECKPOINTS = [
    Bad("unsealed", "tdpo", "step_2: it has no manifest.json: it was never finished", CHECKPOINT, ("run",),
        remove(f"{STEP}/{MANIFEST}")),
    Bad("truncated checkpoint", "tdpo", "step_2: .*distcp has .* bytes and was written with", CHECKPOINT, ("run",),
        cut(f"{STEP}/__0_0.distcp")),
    Bad("flipped bit in a checkpoint", "tdpo", "step_2: .*distcp is not what was written", CHECKPOINT, ("run",),
        flip(f"{STEP}/__0_0.distcp")),
    Bad("missing file", "tdpo", "step_2: random.safetensors is missing", CHECKPOINT, ("run",),
        remove(f"{STEP}/random.safetensors")),
    Bad("surplus file", "tdpo", "step_2: more.bin does not belong to it", CHECKPOINT, ("run",),
        write(f"{STEP}/more.bin", b"1")),
    Bad("manifest of infinite sizes", "tdpo", "step_2: .*step_2/manifest.json cannot be read", CHECKPOINT, ("run",),
        write(f"{STEP}/{MANIFEST}", b'{"files": {"a": {"bytes": Infinity, "xxh3_128": ""}}}')),
    Bad("index that runs", "tdpo", "step_2: the checkpoint cannot be read.*refers to io.open", CHECKPOINT, ("run",),
        sealed(lambda f: (f / STEP / ".metadata").write_bytes(pickle.dumps(Hostile())))),
    Bad("index that is none", "tdpo", "step_2: the checkpoint cannot be read.*index", CHECKPOINT, ("run",),
        sealed(lambda f: (f / STEP / ".metadata").write_bytes(pickle.dumps([1])))),
    Bad("truncated index", "tdpo", "step_2: the checkpoint cannot be read", CHECKPOINT, ("run",),
        sealed(cut(f"{STEP}/.metadata"))),
    Bad("index with another shape", "tdpo", "step_2: the checkpoint cannot be read.*[Ss]ize", CHECKPOINT, ("run",),
        index(another_shape)),
    Bad("index with half a tensor", "tdpo", "step_2: the checkpoint cannot be read.*does not cover", CHECKPOINT, ("run",),
        index(half_a_tensor)),
    Bad("index without a tensor", "tdpo", "step_2: the checkpoint cannot be read.*model.norm.scale", CHECKPOINT, ("run",),
        index(lambda i: i.state_dict_metadata.pop("model.norm.scale"))),
    Bad("index that leaves the folder", "tdpo", "step_2: the checkpoint cannot be read.*'../../../x' .*outside", CHECKPOINT,
        ("run",), index(elsewhere("../../../x"))),
    Bad("index with an absolute path", "tdpo", "step_2: the checkpoint cannot be read.*'/etc/passwd' .*outside", CHECKPOINT,
        ("run",), index(elsewhere("/etc/passwd"))),
    Bad("step is text", "tdpo", "progress.json: step is 'two', expected a whole number", CHECKPOINT, ("run",),
        progress(step="two")),
    Bad("step is negative", "tdpo", "progress.json: step is -2, expected a whole number", CHECKPOINT, ("run",),
        progress(step=-2)),
    Bad("step beyond the end", "tdpo", "step_2 stands after step 9 and this run has 4; set epochs", CHECKPOINT, ("run",),
        progress(step=9)),
    Bad("scheduler is a list", "tdpo", r"progress.json: scheduler is \[1\], expected", CHECKPOINT, ("run",),
        progress(scheduler=[1])),
    Bad("scheduler of another kind", "tdpo",
        "lr_scheduler: .*step_2 was written with another kind of scheduler .it has no 'base_lrs'", CHECKPOINT, ("run",),
        progress(scheduler={"step": 3})),
    Bad("scheduler is gone", "tdpo", "lr_scheduler: .*step_2 was written with one", (f"resume_from_checkpoint={STEP}",),
        ("run",)),
    Bad("facts are gone", "tdpo", "progress.json: facts is None, expected", CHECKPOINT, ("run",), progress(facts=None)),
    Bad("progress is no JSON", "tdpo", "progress.json cannot be read", CHECKPOINT, ("run",), sealed(cut(f"{STEP}/{PROGRESS}"))),
    Bad("checkpoint of other data", "tdpo", "resume_from_checkpoint: data is .* and was", (*CHECKPOINT, "dataset.max_rows=15"),
        ("run",)),
    Bad("checkpoint of another optimizer", "tdpo", r"step_2 was written by torch.optim.adamw.AdamW, and this run has .*SGD; set",
        (*CHECKPOINT, "optimizer=torch.optim.SGD"), ("run",)),
    Bad("checkpoint without amsgrad's state", "tdpo", "step_2 was written by another kind of optimizer .*'max_exp_avg_sq'",
        (*CHECKPOINT, "optimizer.amsgrad=true"), ("run",)),
    Bad("settings of the optimizer are no groups", "tdpo", "progress.json: optimizer.groups is 3, expected a list", CHECKPOINT,
        ("run",), progress(optimizer={"class": "a", "groups": 3})),
    Bad("checkpoint of a larger world", "tdpo", "resume_from_checkpoint: pairs_per_step is 4 and was 8", CHECKPOINT, ("run",),
        sealed(record(f"{STEP}/{PROGRESS}", lambda r: r["facts"].update(pairs_per_step=8)))),
    Bad("checkpoint of another model", "tdpo", "resume_from_checkpoint: reference is .* and was", CHECKPOINT, ("run",),
        sealed(record(f"{STEP}/{PROGRESS}", lambda r: r["facts"].update(reference="0" * 64)))),
    Bad("truncated row state", "tdpo", "step_2: live.safetensors cannot be read", CHECKPOINT, ("run",),
        sealed(cut(f"{STEP}/live.safetensors"))),
    Bad("random state of nothing", "tdpo", "step_2: random.safetensors .*", CHECKPOINT, ("run",),
        sealed(lambda f: save_file({"cpu_0": torch.zeros(3)}, f / STEP / "random.safetensors"))),
    Bad("row state that does not fit", "ti", "step_2: .*weights.*cannot be taken up",
        (f"resume_from_checkpoint={TI_STEP}", *SCHEDULER), ("ti_run",),
        sealed(lambda f: save_file({"weights.rows": torch.zeros(3)}, f / TI_STEP / "live.safetensors"), TI_STEP)),
    Bad("another run's folder", "tdpo", "output_dir: .*run holds another run",
        ("output_dir=run", *SCHEDULER, "optimizer.lr=0.5"), ("run",)),
    Bad("run.json is damaged", "tdpo", "output_dir: .*run.json is damaged", ("output_dir=run",), ("run",), cut("run/run.json")),
]  # fmt: skip

WEIGHTS = [
    Bad("truncated weights", "tdpo", "checkpointer: the checkpoint cannot be read.*SafetensorError: .*incomplete", MODEL,
        prepare=model(cut("model.safetensors"))),
    Bad("flipped bit in a header", "tdpo", "checkpointer: .*unexpected key", MODEL,
        prepare=model(flip("model.safetensors", 0.0004))),
    Bad("header of absurd size", "tdpo", "checkpointer: the checkpoint cannot be read.*header too large", MODEL,
        prepare=model(header(1 << 60))),
    Bad("header that lies", "tdpo", "checkpointer: the checkpoint cannot be read.*SafetensorError: .*header", MODEL,
        prepare=model(header(7))),
    Bad("another architecture", "tdpo", "checkpointer: the checkpoint is of another architecture.*'norm.scale' has shape .3.",
        MODEL, prepare=weights(lambda w: w.update({"model.norm.weight": torch.ones(3)}))),
    Bad("tensor missing", "tdpo", "another architecture.*no tensor 'norm.scale'", MODEL,
        prepare=weights(lambda w: w.pop("model.norm.weight"))),
    Bad("tensor too many", "tdpo", "checkpointer: .*unexpected key: .more", MODEL,
        prepare=weights(lambda w: w.update(more=torch.ones(3)))),
    Bad("weights in a hostile pickle", "tdpo", "checkpointer: the checkpoint cannot be read.*Weights only load failed",
        (*MODEL, "checkpointer.checkpoint_files=[evil.bin]"), prepare=other_file("evil.bin")),
    Bad("weights in a hostile .pt", "tdpo", "checkpointer: the checkpoint cannot be read.*Weights only load failed",
        (*MODEL, "checkpointer=torchtune.training.FullModelTorchTuneCheckpointer", "checkpointer.checkpoint_files=[evil.pt]"),
        prepare=other_file("evil.pt")),
    Bad("weights file missing", "tdpo", "checkpointer.checkpoint_files: 'none.safetensors' is not in",
        ("checkpointer.checkpoint_files=[none.safetensors]",)),
    Bad("model's config is no JSON", "tdpo", "checkpointer: model/config.json is not valid JSON .Expecting", MODEL,
        prepare=model(cut("config.json"))),
    Bad("model's config is a list", "tdpo", "checkpointer: model/config.json holds a JSON list", MODEL,
        prepare=model(write("config.json", b"[]"))),
    Bad("builder of another model", "tdpo", "num_attention_heads is 8 there and 4 in.*rope_theta is 500000.0 there and 10000",
        MODEL, prepare=model(record("config.json", lambda c: c.update(num_attention_heads=8, rope_theta=5e5)))),
    Bad("rotary scaling that the builder lacks", "tdpo", "rope_scaling.rope_type is yarn with factor 4.0 there and default in",
        MODEL, prepare=model(record("config.json", lambda c: c.update(rope_scaling={"type": "yarn", "factor": 4.0})))),
    Bad("queries in another order", "tdpo", "checkpointer.model_type: QWEN2 reads queries and keys in another order",
        ("checkpointer.model_type=QWEN2",)),
    Bad("tied model with another head", "tdpo", "holds a head .lm_head.weight. that differs from the embedding", MODEL,
        prepare=weights(lambda w: w.update({"lm_head.weight": 2 * w["model.embed_tokens.weight"]}))),
    Bad("end beyond the embedding", "tdpo", "a further end of an answer .* is token id 999 .*embeds 384 tokens",
        ("tokenizer.path=model",), prepare=model(write("generation_config.json", b'{"eos_token_id": [0, 999]}'))),
    Bad("model's config is gone", "tdpo", "checkpointer .*config.json", MODEL, prepare=model(remove("config.json"))),
    Bad("tokenizer is no JSON", "tdpo", "tokenizer.json is not valid JSON", ("tokenizer.path=model",),
        prepare=model(cut("tokenizer.json"))),
    Bad("tokenizer of another kind", "tdpo", "cannot be read as a tokenizer.json", ("tokenizer.path=model",),
        prepare=model(write("tokenizer.json", b"{}"))),
    Bad("template of other bytes", "tdpo", "chat_template.jinja", ("tokenizer.path=model",),
        prepare=model(write("chat_template.jinja", b"\xff\xfe"))),
    Bad("template that reaches out", "tdpo", "the chat template refuses it: access to attribute '__class__'.* is unsafe",
        (*ROWS, "tokenizer.path=model"),
        prepare=both(model(write("chat_template.jinja", REACHES_OUT)), conversations("assistant"))),
    Bad("template that divides by zero", "tdpo",
        r"rows\.jsonl, row 0 \(line 1\), column 'chosen': the chat template refuses it: ZeroDivisionError in line 1: division",
        (*ROWS, "tokenizer.path=model"),
        prepare=both(model(write("chat_template.jinja", b"{{ 1 / 0 }}")), conversations("assistant"))),
    Bad("template that writes without end", "tdpo", "the chat template refuses it: it writes more than 10,000,000 characters",
        (*ROWS, "tokenizer.path=model"),
        prepare=both(model(write("chat_template.jinja", WRITES_ON)), conversations("assistant"))),
    Bad("template that is no program", "tdpo", "chat_template: cannot be compiled", (*ROWS, "tokenizer.path=model"),
        prepare=both(model(write("chat_template.jinja", b"{% break %}")), conversations("assistant"))),
    Bad("answers that differ where the template does not look", "tdpo",
        r"row 0 \(line 1\), column 'rejected': has the same tokens as chosen: .* leave out what differs \(reasoning_content\)",
        (*ROWS, "tokenizer.chat_template=my.jinja"),
        prepare=both(write("my.jinja", CONTENTS % b""), answers(
            {"content": "b", "reasoning_content": "so"}, {"content": "b", "reasoning_content": "no"}))),
    Bad("an incomplete answer that the template cuts", "tdpo", "does not show where that ends: it writes 'he'",
        (*ROWS, "tokenizer.chat_template=my.jinja"),
        prepare=both(write("my.jinja", CONTENTS % b"[:2]"), answers({"content": "hello"}, {"content": "no"}, complete=False))),
    Bad("a date that is none", "tdpo", "tokenizer.chat_template_date: must be a date such as 2024-07-26, got 'today'",
        ("tokenizer.chat_template_date=today",)),
    Bad("a variable that the chat template does not read", "tdpo",
        "tokenizer.chat_template_kwargs: the chat template does not read 'enable_thinking'",
        (*ROWS, "tokenizer.chat_template=my.jinja", "tokenizer.chat_template_kwargs={enable_thinking: false}"),
        prepare=both(write("my.jinja", CONTENTS % b""), conversations("assistant"))),
    Bad("an answer without the reasoning that its prompt begins", "tdpo", "disagree about reasoning: give the answers reasoning",
        (*ROWS, "tokenizer.chat_template=my.jinja"),
        prepare=both(write("my.jinja", CONTENTS % b"" + b"{% if add_generation_prompt %}<think>{% endif %}"),
                     answers({"content": "hello"}, {"content": "no"}))),
]  # fmt: skip


def best(harm: Prepare) -> Prepare:
    """The run's last weights as its best ones too, harmed."""
    return both(lambda f: shutil.copytree(f / "run/epoch_0", f / "run/best"), harm)


def store_in_place(harm: Prepare) -> Prepare:
    """The store where the estimation would write it, harmed."""
    return both(lambda f: shutil.copytree(f / "store", f / "never/weights"), harm)


GOES_ON = (*SCHEDULER, "output_dir=run", "checkpoint_every_n_steps=2", "resume_from_checkpoint=auto")
MODEL_OF_RUN = ("checkpointer.checkpoint_dir=run/epoch_0", f"checkpointer.checkpoint_files=[{TRAINED}]")
EXPORTS = [
    Bad("best weights with a flipped bit", "tdpo", f"run/best holds damaged weights: {TRAINED} is not what was written.*remove",
        GOES_ON, ("run",), best(flip(f"run/best/{TRAINED}", 0.9))),
    Bad("best weights that are gone", "tdpo", f"run/best holds damaged weights: {TRAINED} is missing", GOES_ON, ("run",),
        best(remove(f"run/best/{TRAINED}"))),
    Bad("best weights without a manifest", "tdpo", "run/best holds damaged weights: it has no manifest.json", GOES_ON, ("run",),
        best(remove(f"run/best/{MANIFEST}"))),
    Bad("evaluated weights with a flipped bit", "evaluate", f"run/epoch_0 holds damaged weights: {TRAINED} is not what was",
        MODEL_OF_RUN, ("run",), flip(f"run/epoch_0/{TRAINED}", 0.9)),
    Bad("reference with a cut file", "evaluate", "checkpointer: run/epoch_0 holds damaged weights: config.json has .*; restore",
        tuple(f"ref_{word}" for word in MODEL_OF_RUN), ("run",), cut("run/epoch_0/config.json")),
    Bad("weights to start from with a cut manifest", "tdpo", "run/epoch_0/manifest.json cannot be read .* remove .*manifest.json",
        MODEL_OF_RUN, ("run",), cut(f"run/epoch_0/{MANIFEST}")),
    Bad("side of a pair with a flipped bit", "estimate",
        f"pair's negative side: .*negative/epoch_0 holds damaged weights: {TRAINED} is not what was written", needs=("pair",),
        prepare=flip(f"pair/negative/epoch_0/{TRAINED}", 0.9)),
    Bad("store to go on with whose record is cut", "estimate", "never/weights/job.json cannot be read .*remove that folder",
        needs=("pair", "store"), prepare=store_in_place(cut("never/weights/job.json"))),
    Bad("store to go on with whose record is harmed", "estimate", "another job .*job.json is not what was written",
        needs=("pair", "store"), prepare=store_in_place(record("never/weights/job.json", lambda r: r.update(dtype="fp3")))),
]  # fmt: skip

ADAPTED = (
    "model._component_=tokenpref.models.lora_tiny_llama", "model.lora_attn_modules=[q_proj,v_proj]", "model.lora_rank=4",
    "model.lora_alpha=8", "adapter_checkpoint=adapter",
)  # fmt: skip
OF_PEFT, OF_BASE, TENSORS = (
    "adapter/adapter_config.json",
    "adapter/tokenpref_base.json",
    "adapter/adapter_model.safetensors",
)
ADAPTER_FOLDERS = [
    Bad("adapter of another rank", "tdpo", "adapter_checkpoint: .*adapter has rank 4 .* set model.lora_rank=4",
        (*ADAPTED, "model.lora_rank=2"), prepare=adapter()),
    Bad("adapter of another alpha", "tdpo", "has alpha 8 .* set model.lora_alpha=8", (*ADAPTED, "model.lora_alpha=16"),
        prepare=adapter()),
    Bad("adapter of other targets", "tdpo", "adapts q_proj, v_proj and the model k_proj, q_proj; set model.lora_attn_modules",
        (*ADAPTED, "model.lora_attn_modules=[q_proj,k_proj]"), prepare=adapter()),
    Bad("LoRA for DoRA", "tdpo", "is a LoRA adapter and the model's are DoRA; set model.use_dora=false",
        (*ADAPTED, "model.use_dora=true"), prepare=adapter()),
    Bad("adapter of another base", "tdpo", "adapter is an adapter of other weights than these", ADAPTED,
        prepare=adapter(record(OF_BASE, lambda r: r.update(digest="0" * 64)))),
    Bad("adapter with trained biases", "tdpo", "adapter uses what is not read: bias is 'all'", ADAPTED,
        prepare=adapter(record(OF_PEFT, lambda r: r.update(bias="all")))),
    Bad("adapter without its config", "tdpo", "adapter has no adapter_config.json", ADAPTED, prepare=adapter(remove(OF_PEFT))),
    Bad("adapter that is cut", "tdpo", "adapter_model.safetensors cannot be read", ADAPTED, prepare=adapter(cut(TENSORS))),
    Bad("evaluated adapter of another rank", "evaluate", "has rank 4 .* set model.lora_rank=4",
        (*ADAPTED, "model.lora_rank=2"), prepare=adapter()),
    Bad("merged by a number", "tdpo", "save_adapter_weights_only", (*ADAPTED, "save_adapter_weights_only=2"),
        prepare=adapter()),
    Bad("adapters that PEFT cannot hold", "tdpo", "layers.0.attn.q_proj is a part of one larger matrix in transformers' Phi-3",
        ("model._component_=torchtune.models.phi3.lora_phi3_mini", "model.lora_attn_modules=[q_proj]")),
]  # fmt: skip

CAUSAL_TINY = (
    *CAUSAL, "model.path=package://data/tiny/model", "checkpointer=tokenpref.models.CausalLMCheckpointer",
    "~checkpointer.checkpoint_files", "~checkpointer.model_type",
)  # fmt: skip
CAUSAL_LORA = (
    *CAUSAL_TINY, "model.lora.rank=4", "model.lora.alpha=8", "model.lora.target_modules=[q_proj,v_proj]",
)  # fmt: skip
GIVEN = (*CAUSAL_LORA, "adapter_checkpoint=adapter")
CAUSAL_ADAPTERS = [
    Bad("LoRA without a setting", "tdpo", "model.lora: is {}; set some of rank, .* or lora=null",
        (*CAUSAL_TINY, "model.lora={}")),
    Bad("LoRA that is a word", "tdpo", "model.lora must be a mapping .*or null", (*CAUSAL_TINY, "model.lora=all")),
    Bad("LoRA setting of PEFT", "tdpo", "model.lora.r: there is no such setting; did you mean 'rank'",
        (*CAUSAL_LORA, "model.lora.r=4")),
    Bad("LoRA of rank 0", "pair", "model.lora.rank: is 0; set a whole number of at least 1", (*CAUSAL_LORA, "model.lora.rank=0")),
    Bad("LoRA of no module", "ti", "model.lora.target_modules: is \\[\\]; set a list",
        (*CAUSAL_LORA, "model.lora.target_modules=[]")),
    Bad("LoRA of an unknown module", "tdpo", "'output_proj' names no linear layer of the model; these end in down_proj",
        (*CAUSAL_LORA, "model.lora.target_modules=[q_proj,output_proj]")),
    Bad("LoRA of the head", "tdpo", "'lm_head' names no .* The head has no adapter",
        (*CAUSAL_LORA, "model.lora.target_modules=[lm_head]")),
    Bad("LoRA over NF4 that is too small", "tdpo", "model.lora.quantize_base: NF4 stores .*; set it to false",
        (*CAUSAL_LORA, "model.lora.quantize_base=true")),
    Bad("LoRA folder of another rank", "tdpo", "has rank 4 .* set model.lora.rank=4", (*GIVEN, "model.lora.rank=2"),
        prepare=adapter()),
    Bad("LoRA folder of another alpha", "tdpo", "has alpha 8 .* set model.lora.alpha=8", (*GIVEN, "model.lora.alpha=2"),
        prepare=adapter()),
    Bad("LoRA folder for DoRA", "tdpo", "set model.lora.use_dora=false", (*GIVEN, "model.lora.use_dora=true"), prepare=adapter()),
    Bad("LoRA folder of other targets", "evaluate", "adapts q_proj, v_proj and the model .*; set model.lora.target_modules",
        (*GIVEN, "model.lora.target_modules=all-linear", "ref_checkpointer=null"), prepare=adapter()),
    Bad("LoRA folder of another base", "tdpo", "adapter is an adapter of other weights than these", GIVEN,
        prepare=adapter(record(OF_BASE, lambda r: r.update(digest="0" * 64)))),
    Bad("LoRA folder for a model without LoRA", "tdpo", "adapter_checkpoint: .* without adapters; .*causal_lm",
        (*CAUSAL_TINY, "adapter_checkpoint=adapter"), prepare=adapter()),
]  # fmt: skip

NEW = ADAPTED[:-1]
ADAPTER_BUILDERS = [
    Bad("adapter of an unknown module", "tdpo", "model.lora_attn_modules: 'o_proj' fits no module; name some of q_proj",
        (*NEW, "model.lora_attn_modules=[q_proj,o_proj]")),
    Bad("adapters of no module", "ti", "model.lora_attn_modules: names no layer", (*NEW, "model.lora_attn_modules=[]")),
    Bad("adapter of rank 0", "tdpo", "model.lora_rank: is 0, .*; set at least 1", (*NEW, "model.lora_rank=0")),
    Bad("adapter multiplied by nothing", "pair", "model.lora_alpha: is 0, .*; set a number above 0",
        (*NEW, "model.lora_alpha=0")),
    Bad("adapter of the head", "tdpo", "model.apply_lora_to_output: .* not supported.*; set it to false",
        ("model=torchtune.models.llama3_1.lora_llama3_1_8b", "model.lora_attn_modules=[q_proj]",
         "model.apply_lora_to_output=true")),
    Bad("NF4 of a model that is too small", "tdpo", "quantize_base: NF4 .* set quantize_base=false",
        (*NEW, "model.quantize_base=true")),
    Bad("adapter for a model that takes none", "tdpo", "adapter_checkpoint: .* without adapters; name a lora_ builder",
        ("adapter_checkpoint=adapter",), prepare=adapter()),
    Bad("adapter in a folder that is not there", "evaluate", "adapter_checkpoint: no folder at .*; set the folder", ADAPTED),
    Bad("adapter for an estimator with models of its own", "estimate", "adapter_checkpoint: .* does not use it.*=null",
        (*NEW, "adapter_checkpoint=adapter"), ("pair",), adapter()),
    Bad("adapters and float8", "tdpo", "enable_fp8_training: the model has adapters .*=false",
        (*NEW, "enable_fp8_training=true", "fp8_emulate=true")),
]  # fmt: skip

CAUSAL_LM = (
    "model._component_=tokenpref.models.causal_lm", "model.path=model", *MODEL, "checkpointer.checkpoint_files=null",
    "checkpointer._component_=tokenpref.models.CausalLMCheckpointer",
)  # fmt: skip
SINGLE, INDEX, CONFIG = "model/model.safetensors", "model/model.safetensors.index.json", "model/config.json"


def whole_model(change: Prepare) -> Prepare:
    """``model``, a copy of the tiny model, changed in the folder above it."""
    return both(model(lambda folder: None), change)


def indexed(file: str, **entries: str) -> Prepare:
    """The tiny model's tensors in a file with an index; further entries name a tensor with __ for a dot, and its file."""

    def prepare(folder: Path) -> None:
        held = load_file(folder / SINGLE)
        save_file(held, folder / "model" / file)
        (folder / SINGLE).unlink()
        names = dict.fromkeys(held, file) | {
            name.replace("__", "."): other for name, other in entries.items()
        }
        (folder / INDEX).write_text(json.dumps({"weight_map": names}))

    return whole_model(prepare)


CAUSAL_LMS = [
    Bad("causal LM: weights that are cut off", "tdpo", "checkpoint_dir: .*safetensors is cut off or damaged.*again", CAUSAL_LM,
        prepare=whole_model(cut(SINGLE))),
    Bad("causal LM: header of absurd size", "tdpo", "checkpoint_dir: .*is cut off or damaged.*header too large", CAUSAL_LM,
        prepare=model(header(2**60))),
    Bad("causal LM: pickled weights", "tdpo", "holds its weights as pytorch_model.bin, .*save_pretrained", CAUSAL_LM,
        prepare=both(other_file("pytorch_model.bin"), remove(SINGLE))),
    Bad("causal LM: pickled weights that are listed", "tdpo", "pytorch_model.bin is no safetensors file.*save_pretrained",
        (*CAUSAL_LM, "checkpointer.checkpoint_files=[pytorch_model.bin]"), prepare=other_file("pytorch_model.bin")),
    Bad("causal LM: no weights", "pair", "model holds no weights .*download the folder again", CAUSAL_LM,
        prepare=whole_model(remove(SINGLE))),
    Bad("causal LM: index of a missing file", "tdpo", "lists model-2.safetensors, which is not in the folder", CAUSAL_LM,
        prepare=indexed("model-1.safetensors", model__norm__weight="model-2.safetensors")),
    Bad("causal LM: index that leaves the folder", "tdpo", "lists '../x.safetensors', which is not the name", CAUSAL_LM,
        prepare=indexed("model-1.safetensors", model__norm__weight="../x.safetensors")),
    Bad("causal LM: index of a missing tensor", "tdpo", "'model.more' is in model-1.safetensors, which does not hold it",
        CAUSAL_LM, prepare=indexed("model-1.safetensors", model__more="model-1.safetensors")),
    Bad("causal LM: a file that is listed twice", "tdpo", "and model.safetensors both hold 'model.*checkpoint_files",
        (*CAUSAL_LM, "checkpointer.checkpoint_files=[model.safetensors,model.safetensors]"),
        prepare=whole_model(lambda folder: None)),
    Bad("causal LM: tensor missing", "tdpo", "another architecture.*no tensor 'model.norm.weight'", CAUSAL_LM,
        prepare=weights(lambda w: w.pop("model.norm.weight"))),
    Bad("causal LM: tensor too many", "tdpo", "another architecture.*unexpected tensor 'model.more'", CAUSAL_LM,
        prepare=weights(lambda w: w.update({"model.more": torch.ones(3)}))),
    Bad("causal LM: tensor of another shape", "tdpo", r"'model.norm.weight' has shape \[3\] and the model wants \[32\]",
        CAUSAL_LM, prepare=weights(lambda w: w.update({"model.norm.weight": torch.ones(3)}))),
    Bad("causal LM: another head", "tdpo", "holds a head .* differs from the embedding.*tie_word_embeddings", CAUSAL_LM,
        prepare=weights(lambda w: w.update({"lm_head.weight": torch.ones(384, 32)}))),
    Bad("causal LM: quantised weights", "tdpo", "is quantised .gptq.*from which it was quantised", CAUSAL_LM,
        prepare=whole_model(record(CONFIG, lambda r: r.update(quantization_config={"quant_method": "gptq", "bits": 4})))),
    Bad("causal LM: a config that is not there", "tdpo", "model.path: .*name a folder with the config.json", CAUSAL_LM,
        prepare=whole_model(remove(CONFIG))),
    Bad("causal LM: a config with text for a number", "tdpo", "model.path: .*hidden_size.*name a folder", CAUSAL_LM,
        prepare=whole_model(record(CONFIG, lambda r: r.update(hidden_size="many")))),
    Bad("causal LM: a config whose numbers do not fit together", "tdpo", "model.path: .*division",
        CAUSAL_LM, prepare=whole_model(record(CONFIG, lambda r: r.update(num_attention_heads=0)))),
    Bad("causal LM: a config of another kind of model", "tdpo", "model.path: .*is a vit, .*makes no causal language model of it",
        CAUSAL_LM, prepare=whole_model(lambda folder: (folder / CONFIG).write_text('{"model_type": "vit"}'))),
    Bad("causal LM: weights with a config that is no JSON", "tdpo", "checkpointer: .*not valid JSON",
        (*CAUSAL_LM, "model.path=package://data/tiny/model"),
        prepare=whole_model(lambda folder: (folder / CONFIG).write_text("{"))),
    Bad("causal LM: weights with a config of text", "tdpo", "checkpointer: .*hidden_size.*restore",
        (*CAUSAL_LM, "model.path=package://data/tiny/model"),
        prepare=whole_model(record(CONFIG, lambda r: r.update(hidden_size="many")))),
    Bad("causal LM: weights of another model", "tdpo", "rms_norm_eps is 0.1 there and 1e-05 .*set model.path=",
        (*CAUSAL_LM, "model.path=package://data/tiny/model"),
        prepare=whole_model(record(CONFIG, lambda r: r.update(rms_norm_eps=0.1)))),
    Bad("causal LM: torchtune's checkpointer", "tdpo", "torchtune's names.*CausalLMCheckpointer",
        ("model._component_=tokenpref.models.causal_lm", "model.path=package://data/tiny/model")),
    Bad("causal LM: its checkpointer with torchtune's builder", "tdpo", "transformers' names.*FullModelHFCheckpointer",
        ("checkpointer._component_=tokenpref.models.CausalLMCheckpointer",)),
    Bad("causal LM: files as text", "tdpo", "checkpointer.checkpoint_files must be a list",
        (*CAUSAL_LM, "checkpointer.checkpoint_files=model.safetensors"), prepare=whole_model(lambda folder: None)),
    Bad("causal LM: written into its own folder", "tdpo", "output_dir", (*CAUSAL_LM, "output_dir=model/out"),
        prepare=whole_model(lambda folder: None)),
]  # fmt: skip

TABLE = (
    *(CONFIGS + DATA + STORES + PAIRS + CACHES + CHECKPOINTS + WEIGHTS + EXPORTS + ADAPTER_FOLDERS),
    *(ADAPTER_BUILDERS + CAUSAL_LMS + CAUSAL_ADAPTERS),
)


# --- the test -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A pair, a store, a cache of a reference, and two runs with a checkpoint in the middle, made by the package itself."""
    folder = tmp_path_factory.mktemp("good")
    before = Path.cwd()
    os.chdir(folder)
    try:
        _, preset, words = RECIPES["pair"]
        ContrastiveReference(load_config(["--config", preset, *words, "output_dir=pair"])).run()
        estimate = ["--config", "tiny/estimate_weights", "estimator.pair=pair", "output_dir=estimate"]
        WeightEstimation(load_config([*estimate, "dataset.max_rows=16", "shard_rows=8"])).run()
        (folder / "estimate/weights").rename(folder / "store")
        for name, trainer_class, key in (
            ("run", PreferenceTrainer, "tdpo"),
            ("ti_run", TripletTrainer, "ti"),
        ):
            _, preset, words = RECIPES[key]
            words = (*words, *SCHEDULER, f"output_dir={name}", "checkpoint_every_n_steps=2", "keep_last=2")
            trainer = trainer_class(load_config(["--config", preset, *words]))
            trainer.setup()
            trainer.train()
            trainer.close()
        _, preset, words = RECIPES["tdpo"]
        trainer = PreferenceTrainer(
            load_config(["--config", preset, *words, "output_dir=filling", *KEPT_REFERENCE])
        )
        trainer.setup()
        trainer.close()
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def own_log():
    """Recipes set the package's logger up; undo it."""
    log = logging.getLogger("tokenpref")
    before = (log.handlers[:], log.level, log.propagate)
    yield
    log.handlers[:], log.level, log.propagate = before


def run(command: str, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> int:
    """A command in this process; its exit code."""
    if command == "show-weights":
        return tokenpref.cli.main(["show-weights", *words])
    stem, preset, usual = RECIPES[command]
    file = data_root() / "recipes" / f"{stem}.py"
    spec = importlib.util.spec_from_file_location(f"_recipe_{stem}", file)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    if "--config" not in words:
        words = ("--config", preset, *usual, "output_dir=never", *words)
    monkeypatch.setattr(sys, "argv", [str(file), *words])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as stop:
        recipe.main()
    return stop.value.code


def everything(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts
    }


@pytest.mark.parametrize("bad", TABLE, ids=[bad.name for bad in TABLE])
def test_a_bad_input_is_one_error(bad, good, tmp_path, monkeypatch, capsys, caplog, own_log):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "tokenpref.data.weight_store._MOST_VALUES", 1000
    )  # so that an absurd shard is a small file
    for name in bad.needs:
        shutil.copytree(good / name, tmp_path / name)
    bad.prepare(tmp_path)
    before = everything(tmp_path)
    assert run(bad.command, bad.words, monkeypatch) == USER_ERROR_EXIT
    stderr = capsys.readouterr().err
    assert everything(tmp_path) == before
    assert not [record for record in caplog.records if record.exc_info]  # a library's log with a traceback
    assert "Traceback" not in stderr and len(re.findall("^error: ", stderr, re.MULTILINE)) == 1
    error = stderr[re.search("^error: ", stderr, re.MULTILINE).start() :]
    assert re.search(bad.says, error), error
    first, *others = error.splitlines()
    faults = re.match(r"error: (\d+) faults in the config:$", first)
    assert len(others) == (int(faults[1]) if faults else 0) and all(o.startswith("  - ") for o in others), (
        error
    )


def test_the_table_is_large_and_its_names_differ():
    assert len(TABLE) >= 60 and len({bad.name for bad in TABLE}) == len(TABLE)
