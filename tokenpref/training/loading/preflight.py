"""What can be known of a run before its weights are read: memory, disk, and settings that cannot train."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torchao.dtypes.nf4tensor import NF4Tensor

from tokenpref._memory import free_memory
from tokenpref._paths import resolve_path
from tokenpref._sealed import check_if_sealed
from tokenpref.data import PreferenceDataset, Tokenizer
from tokenpref.data.samples import read_openings
from tokenpref.errors import ConfigError
from tokenpref.models.cpu import install_on_cpu
from tokenpref.models.decoder_of import decoder_of
from tokenpref.models.scoring import ScoringModel
from tokenpref.models.token_ids import check_token_ids
from tokenpref.ops.head import logit_budget
from tokenpref.training.config.compute import DTYPES, Compute, check_model
from tokenpref.training.config.fields import Component
from tokenpref.training.config.keys import SamplingConfig, TrainConfig
from tokenpref.training.config.parts import build_optimizer
from tokenpref.training.loading.architecture import check_architecture
from tokenpref.training.loading.memory import size_text as _size
from tokenpref.training.loading.models import ModelMaker, nbytes, weight_nbytes
from tokenpref.training.loading.reference_cache import ReferenceCache, cache_folder
from tokenpref.training.step.batches import check_data_fits, check_tokens_per_batch

__all__ = [
    "MemoryEstimate",
    "bf16_fault",
    "check_openings",
    "check_scored",
    "disk_fault",
    "estimate_memory",
    "preflight",
]

log = logging.getLogger("tokenpref")

# Large enough that optimizers which quantise their state do so for this tensor (torchao's start at 4,096 elements).
_PROBE = 1 << 16
# The size of a typical weight, as initialised: standard deviation 0.02.
_TYPICAL_WEIGHT = 0.02
# A bfloat16 keeps 8 significant bits: a change of less than 2^-9 of a number can round back to it.
_BF16_HALF_STEP = 2**-9
# Tensors that torchtune lets wait on the GPU for their copy to the CPU.
_OFFLOADED_AT_A_TIME = 5
_LOGITS = 4  # the policy's, the reference's, and what is made of both


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one process needs at the height of a step.

    Args:
        weights: its share of the policy.
        gradients: its share.
        optimizer: its share of the optimizer's state.
        reference: its share of the reference, or the head that a cached one needs for a KL.
        scorers: its share of the models that score tokens and are not the run's own.
        activations: what the largest micro-batch keeps for the backward.
        head: logits that exist at a time.
        copy: of trained weights and optimizer state, for saves in the background.
    """

    weights: int
    gradients: int
    optimizer: int
    reference: int
    scorers: int
    activations: int
    head: int
    copy: int

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(vars(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_size(size)}" for name, size in vars(self).items() if size)
        return f"about {_size(self.total)} ({parts})"


def preflight(
    config: TrainConfig,
    maker: ModelMaker,
    dataset: PreferenceDataset,
    dataset_val: PreferenceDataset | None,
    folder: Path,
    *,
    reference: bool,
    rows_per_pair: int,
    scorers: int = 0,
    caches: Sequence[ReferenceCache] = (),
) -> list[str]:
    """Look at a run before any weight is read.

    Args:
        config: the run's config.
        maker: of its models.
        dataset: its pairs.
        dataset_val: its held-out pairs, if any.
        folder: its output folder; it need not exist.
        reference: whether a second model is loaded.
        rows_per_pair: sequences of a pair: 2, or 3 with anchors.
        scorers: bytes of a process for models that score tokens and are not the run's own.
        caches: what is kept of a reference in the place of a second model.

    Returns:
        Lines for the log: expected memory of a process, disk space, and warnings.

    Raises:
        ConfigError: if a file of weights that a run exported is not as it was written, if the model is not the one that the
            checkpoint's config.json describes, if its attention needs padded batches and the config has none, if float8,
            activation checkpointing or the data do not fit it, or if the disk has no room for the run's first checkpoint and
            weights.
    """
    model, world_size, device = maker.on_meta(), maker.world.size, maker.world.device
    check_model(config.compute(trainable=True), model)
    maker.check_adapter()
    _check_quantised(config, maker, model)
    longest = max(int(data.lengths().max()) for data in (dataset, dataset_val) if data is not None)
    readers = {r.key: r for r in (config.checkpointer, config.ref_checkpointer) if r is not None}
    notes = _check_folders(readers, config.model, model, longest)
    _check_attention(config, model)
    for data, component in ((dataset, config.dataset), (dataset_val, config.dataset_val)):
        if data is not None and component is not None:
            check_data_fits(data, component, decoder_of(model))
            check_tokens_per_batch(data, component, config.tokens_per_batch, padded=not config.padding_free)
    tokens = 2 * config.batch_size * int(dataset.lengths().max())
    memory = estimate_memory(
        config,
        maker,
        tokens=min(tokens, config.tokens_per_batch or tokens) * rows_per_pair // 2,
        device=device,
        world_size=world_size,
        reference=reference,
        scorers=scorers,
        caches=caches,
    )
    trained, count = trained_parameters(model)
    if trained < count:
        notes.append(f"trainable parameters: {trained:,} of {count:,} ({100 * trained / count:.2g} %)")
    lines = [f"memory a process: {memory}"]
    free = free_memory(device)
    if free is not None:
        lines[0] += f"; {_size(free)} are free"
        if memory.total > free:
            lines.append(
                f"warning: that is more than is free; lower batch_size ({config.batch_size}) and raise "
                "gradient_accumulation_steps, set enable_activation_checkpointing=true, on a GPU "
                "enable_activation_offloading=true too, or use more processes"
            )
    # Gradients are as large as what is trained, which a checkpoint holds, and which is all that is exported of adapters.
    only_trained = maker.adapters is not None and config.save_adapter_weights_only
    model_bytes = (memory.gradients if only_trained else memory.weights) * world_size
    checkpoint_bytes = (memory.gradients + memory.optimizer) * world_size
    lines.append(
        f"disk: {_size(model_bytes)} for the weights of an epoch, {_size(checkpoint_bytes)} for a checkpoint "
        f"({config.keep_last} kept); {_size(_free_disk(folder))} are free"
    )
    fault = disk_fault(folder, model_bytes + checkpoint_bytes)
    if fault is not None:
        raise ConfigError(fault)
    lines += _cache_lines(config, model, caches, folder, model_bytes + checkpoint_bytes)
    warning = bf16_fault(config)
    return [*notes, *lines] if warning is None else [*notes, *lines, f"warning: {warning}"]


def _check_quantised(config: TrainConfig, maker: ModelMaker, model: nn.Module) -> None:
    """Check what a quantised base cannot do: be merged, be gathered by one process, or be split in the middle of a group.

    Raises:
        ConfigError: if the config asks for it.
    """
    weights = {n: p for n, p in model.named_parameters() if isinstance(p, NF4Tensor)}
    size = maker.world.size
    if weights and not config.save_adapter_weights_only:
        raise ConfigError(
            "save_adapter_weights_only: is false, and adapters are not merged into a quantised base; set it to true, and "
            "merge the adapter into the weights from which the base was quantised with `tokenpref merge`"
        )
    if weights and size == 1 and config.compute_dtype is not None:
        raise ConfigError(
            f"compute_dtype: is {config.compute_dtype}, and PyTorch cannot gather a quantised base in a single process; set "
            f"compute_dtype=null and dtype={config.compute_dtype}, or use more processes"
        )
    for name, weight in weights.items():
        group = weight.block_size * weight.scaler_block_size
        groups, rows = weight.numel() // group, weight.shape[0]
        if rows % size or groups % size:
            raise ConfigError(
                f"model: {name} is stored in NF4 as {groups} groups of {group:,} numbers in {rows} rows, which cannot be shared "
                f"by {size} processes; use a number of processes that divides both, or quantize_base=false"
            )


def trained_parameters(model: nn.Module) -> tuple[int, int]:
    """How many numbers of a model are trained, and how many it has."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def check_scored(
    maker: ModelMaker,
    readers: Mapping[str, Component],
    tokenizer: Tokenizer,
    *,
    data: tuple[PreferenceDataset, Component] | None = None,
    openings: str | None = None,
) -> None:
    """Check a model that is only run, not trained, before any of its weights is read.

    Args:
        maker: of the model.
        readers: checkpointers of the weights that it is run with, by what they are called in messages.
        tokenizer: its ``pad_id`` is changed if the model does not embed it.
        data: what it is run on, and the component that made it.
        openings: text file of prompts that are sampled from, if any.

    Raises:
        ConfigError: if a file of weights that a run exported is not as it was written, if the model is not the one that a
            checkpoint's config.json describes, or if the data or a token id does not fit it.
    """
    decoder, world = maker.on_meta(), maker.world
    longest = int(data[0].lengths().max()) if data is not None else None

    def check() -> list[str]:
        # The main process alone reads checkpoints; other nodes need not have the files.
        if not world.is_main:
            return []
        maker.check_adapter()
        return _check_folders(readers, maker.model, decoder, longest)

    lines = world.together(check)
    if data is not None:
        check_data_fits(*data, decoder_of(decoder))
    padding = world.together(lambda: check_token_ids(tokenizer, maker.vocabulary, openings=openings))
    for line in [*lines, *([padding] if padding else [])] if world.is_main else []:
        log.info(line)


def _check_folders(
    readers: Mapping[str, Component], model: Component, decoder: nn.Module, longest: int | None
) -> list[str]:
    """Check the folders that weights come from, by their names in messages; see :func:`check_architecture`."""
    folders = {Path(str(reader.kwargs.get("checkpoint_dir", ""))): key for key, reader in readers.items()}
    for folder, key in folders.items():
        check_if_sealed(folder, key)
    return [
        note
        for key, reader in readers.items()
        for note in check_architecture(reader, model, decoder, key=key, longest=longest)
    ]


def _cache_lines(
    config: TrainConfig, model: nn.Module, caches: Sequence[ReferenceCache], folder: Path, run: int
) -> list[str]:
    """What the caches of the reference take on the disk, beside the bytes of the run where they share it.

    Raises:
        ConfigError: if there is no room.
    """
    forecasts = [
        cache.forecast(model, config.compute(trainable=False).kept_dtype.itemsize) for cache in caches
    ]
    needed, place = sum(size for size, _ in forecasts), cache_folder(config)
    if _existing(place).stat().st_dev == _existing(folder).stat().st_dev:
        needed += run
    free = _free_disk(place)
    if caches and free < needed:
        raise ConfigError(
            f"reference: cached needs {_size(needed)} at {place}, with the run's own files where they lie on that disk, and "
            f"{_size(free)} are free there; make room, set reference_cache_dir to another disk, or reference=model"
        )
    return [line for _, line in forecasts]


def check_openings(sampling: SamplingConfig, tokenizer: Tokenizer, limit: int) -> None:
    """Check that openings with their samples fit a model's context of ``limit`` tokens.

    Raises:
        ConfigError: if the longest does not.
        DataError: if the openings cannot be read.
    """
    openings = read_openings(resolve_path(sampling.prompts))
    longest = max(len(tokenizer.encode_with_offsets(opening)[0]) for opening in openings)
    if longest + sampling.max_new_tokens > limit:
        raise ConfigError(
            f"sampling.max_new_tokens: {sampling.max_new_tokens} after the longest opening of {longest} tokens exceed the "
            f"model's context of {limit}; set at most {max(limit - longest, 0)}, or shorter openings"
        )


def estimate_memory(
    config: TrainConfig,
    maker: ModelMaker,
    *,
    tokens: int,
    device: torch.device,
    world_size: int,
    reference: bool,
    scorers: int = 0,
    caches: Sequence[ReferenceCache] = (),
) -> MemoryEstimate:
    """Memory of one process.

    Weights, gradients, optimizer state and activations are counted, not guessed: the optimizer takes a step on a small
    tensor, and a forward on the meta device tells what autograd keeps of a token (float8 layers keep what plain ones
    do). Left out are what FSDP2 gathers of a layer, activations that are moved to the CPU's memory, the memory allocator's
    waste and Python itself (some 0.3 GiB).

    Args:
        config: the run's config.
        maker: of its models.
        tokens: tokens of the largest micro-batch, padding included.
        device: where the process computes.
        world_size: number of processes.
        reference: whether a second model is loaded.
        scorers: bytes of a process for models that score tokens and are not the run's own.
        caches: what is kept of a reference in its place; of one model, whose head is held once.
    """
    policy, beside = (config.compute(trainable=trainable) for trainable in (True, False))
    model, vocabulary = maker.on_meta(policy.kept_dtype), maker.vocabulary
    trained, _ = trained_parameters(model)
    share = -(-weight_nbytes(model, policy.dtype) // world_size)
    gradients = -(-trained * policy.dtype.itemsize // world_size)
    optimizer = int(_optimizer_bytes_per_parameter(config) * trained / world_size)
    head_of_cache = max((c.head_nbytes(model, beside.kept_dtype.itemsize) for c in caches), default=0)
    # At most: a reference without a KL is scored by itself.
    of_one = logit_budget(
        config.head_memory_mb,
        vocabulary * decoder_of(model).width * policy.kept_dtype.itemsize,
        device,
    )
    budget = of_one * (2 if reference or head_of_cache or maker.reference_is_base else 1)
    return MemoryEstimate(
        weights=share,
        gradients=gradients,
        optimizer=optimizer,
        reference=-(-weight_nbytes(model, beside.dtype) // world_size) if reference else head_of_cache,
        scorers=scorers,
        activations=int(_activation_bytes_per_token(model, policy, device) * tokens),
        head=min(budget, _LOGITS * tokens * vocabulary * 4),
        copy=gradients + optimizer if config.enable_async_checkpointing else 0,
    )


def _activation_bytes_per_token(model: nn.Module, compute: Compute, device: torch.device) -> float:
    """What stays of a token until the backward, of a model in the dtype that it computes in."""
    kept, layers = _saved_bytes_per_token(model, device), len(decoder_of(model).layers)
    if compute.checkpoint_every is None:
        return kept
    checkpointed = layers // compute.checkpoint_every
    of_layer = kept / layers
    of_input = decoder_of(model).width * next(model.parameters()).element_size()
    # A checkpointed layer keeps its input, and one of them at a time is computed again.
    inputs = min(checkpointed, _OFFLOADED_AT_A_TIME) if compute.offload else checkpointed
    return inputs * of_input + (layers - checkpointed + 1) * of_layer


def _optimizer_bytes_per_parameter(config: TrainConfig) -> float:
    probe = nn.Parameter(torch.zeros(_PROBE // 256, 256, dtype=DTYPES[config.dtype]))
    with torch.random.fork_rng(devices=[]):  # stochastic rounding draws from the run's generator
        optimizer = build_optimizer(config.optimizer, [probe])
        probe.grad = torch.zeros_like(probe)
        optimizer.step()
    state = optimizer.state[probe].values()
    return sum(nbytes(value) for value in state if isinstance(value, Tensor)) / _PROBE


def _saved_bytes_per_token(model: nn.Module, device: torch.device) -> float:
    """What autograd keeps of a token, counted on sequences so short that attention's own matrices do not matter."""
    decoder_of(model).fill_buffers(torch.device("meta"))
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, NF4Tensor):
            # NF4 cannot be restored on the meta device, and autograd keeps as much with any frozen weight.
            plain = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
            module.weight = nn.Parameter(plain, requires_grad=False)
    dtype = next(model.parameters()).dtype
    experts = any(parameter.dim() == 3 for parameter in model.parameters())
    if experts:  # on the meta device, PyTorch multiplies their matrices in bfloat16 only
        model.to(torch.bfloat16)
    constant = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        identity = tensor.untyped_storage()._cdata
        if identity not in constant:
            kept[identity] = tensor
        return tensor

    rows, length = 64, 2
    model.train()
    scorer = ScoringModel(model, padding_free=False)
    # transformers' own attention asks for values of masks, and the meta device has none.
    with suppress(TypeError):
        scorer.decoder.install_padding_free()
    if device.type == "cpu":
        install_on_cpu(model)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        scorer.hidden(torch.zeros(rows, length, dtype=torch.int64, device="meta"))
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / (rows * length)
    if not experts:
        return size
    model.to(dtype)
    return size * dtype.itemsize / torch.bfloat16.itemsize


def _check_attention(config: TrainConfig, model: nn.Module) -> None:
    if not config.padding_free:
        return
    try:
        decoder_of(model).install_padding_free()
    except TypeError as error:
        raise ConfigError(f"model ({config.model.path}): {error}") from error


def disk_fault(folder: Path, needed: int) -> str | None:
    """What is wrong with the room for a folder's files, in bytes; None if it is enough."""
    free = _free_disk(folder)
    if free >= needed:
        return None
    return (
        f"output_dir: {folder} needs {_size(needed)} for the first checkpoint and weights, and {_size(free)} are free there; "
        "make room, or set output_dir to another disk"
    )


def _free_disk(folder: Path) -> int:
    return shutil.disk_usage(_existing(folder)).free


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.exists())


def bf16_fault(config: TrainConfig) -> str | None:
    """Why the weights would hardly move; None if they do, or if nothing can be said.

    An Adam update moves a weight by about the learning rate. Where that is below 2^-9 of the weight, adding it in bfloat16 gives
    the weight back, unless the optimizer rounds at random.
    """
    rate = config.optimizer.kwargs.get("lr")
    if (
        config.dtype != "bf16"
        or not isinstance(rate, float)
        or "bf16_stochastic_round" in config.optimizer.kwargs
    ):
        return None
    least = _TYPICAL_WEIGHT * _BF16_HALF_STEP
    if rate >= least:
        return None
    return (
        f"optimizer.lr is {rate:g} and dtype is bf16: weights above {rate / _BF16_HALF_STEP:.1g} in size cannot move by so "
        "little; set dtype=fp32 (with compute_dtype=bf16), an optimizer with stochastic rounding, or a rate of at least "
        f"{least:.1g}"
    )
