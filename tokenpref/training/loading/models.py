"""Models, data and micro-batches as a run needs them, built from its config."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenpref._torchtune import (
    TransformerDecoder,
    compile_model,
    set_default_dtype,
    validate_no_params_on_meta_device,
)
from tokenpref.distributed import World, load_full_state_dict, shard
from tokenpref.errors import ConfigError
from tokenpref.models.activations import activation_offloading, checkpoint_layers, offload_layers
from tokenpref.models.float8 import convert_to_float8
from tokenpref.models.scoring import ScoringModel
from tokenpref.models.tied_head import check_unread_head, drop_tied_head, head_hint
from tokenpref.training.config.compute import DTYPES, Compute
from tokenpref.training.config.fields import Component
from tokenpref.training.config.keys import ScoringConfig, TrainConfig

__all__ = [
    "DTYPES",
    "WEIGHT_SUFFIXES",
    "build_scorer",
    "check_decoder",
    "check_state_fits",
    "place_decoder",
    "read_weights",
    "weights_digest",
]

log = logging.getLogger("tokenpref")

LONGEST_CONTEXT = 2**24


def read_weights(checkpointer: Any, key: str, world: World) -> dict[str, Tensor]:
    """The model state dict that a torchtune checkpointer reads; only the main process reads, others get ``{}``.

    Raises:
        ConfigError: if the files cannot be turned into torchtune's names (usually a wrong ``model_type``).
    """

    def read() -> dict[str, Tensor]:
        if not world.is_main:
            return {}
        try:
            state: dict[str, Tensor] = checkpointer.load_checkpoint()["model"]
            check_unread_head(checkpointer, state, key)
        except ConfigError:
            raise
        except Exception as error:
            causes = [error, *([error.__cause__] if error.__cause__ is not None else [])]
            # First lines: what follows in torch's own words is how to read a file that runs code.
            said = "; ".join(
                f"{type(c).__name__}: {(str(c).strip().splitlines() or [''])[0]}" for c in causes
            )
            raise ConfigError(
                f"{key}: the checkpoint cannot be read ({said}); check checkpoint_dir, checkpoint_files and model_type"
            ) from error
        return state

    return world.together(read)


def check_state_fits(state: dict[str, Tensor], model: TransformerDecoder, key: str) -> None:
    """Compare names and shapes of a checkpoint with the model's.

    Raises:
        ConfigError: naming the first differences.
    """
    own = model.state_dict()
    faults = [f"no tensor {name!r}" for name in own if name not in state]
    faults += [f"unexpected tensor {name!r}" for name in state if name not in own]
    faults += [
        f"{name!r} has shape {list(tensor.shape)} and the model wants {list(own[name].shape)}"
        for name, tensor in state.items()
        if name in own and tensor.shape != own[name].shape
    ]
    if faults:
        more = f" and {len(faults) - 3} more differences" if len(faults) > 3 else ""
        raise ConfigError(
            f"{key}: the checkpoint is of another architecture than the model: {'; '.join(faults[:3])}{more}. "
            "Set model and checkpointer to the same architecture." + head_hint(state, model)
        )


def build_scorer(
    config: ScoringConfig,
    state: dict[str, Tensor],
    world: World,
    *,
    model: Component,
    key: str = "checkpointer",
    trainable: bool = False,
) -> ScoringModel:
    """Build a model on the meta device, shard it, and fill it with weights.

    Args:
        config: how the model computes, and how it is sharded.
        state: whole weights on the main process (see :func:`read_weights`).
        world: the run's processes.
        model: what to build.
        key: config key of the checkpointer, for errors.
        trainable: the policy; False freezes the parameters and sets evaluation mode.

    Returns:
        The model with its head installed.

    Raises:
        ConfigError: if the weights do not fit the model, the model has no plain linear head, or float8 or activation
            checkpointing do not fit it.
    """
    compute = config.compute(trainable=trainable)
    with set_default_dtype(compute.dtype), torch.device("meta"):
        decoder: TransformerDecoder = model.build()
    check_decoder(decoder, model)

    def check() -> None:
        if world.is_main:
            dropped = drop_tied_head(state, decoder, key)
            # The reference of a training reads the policy's files once more, and need not say it again.
            again = not trainable and isinstance(config, TrainConfig) and config.ref_checkpointer is None
            if dropped is not None and not again:
                log.info(dropped)
            check_state_fits(state, decoder, key)

    world.together(check)
    place_decoder(
        decoder,
        compute,
        world,
        trainable=trainable,
        compiled=config.compile,
        reshard_after_forward=config.fsdp_reshard_after_forward,
        key=key,
    )
    load_full_state_dict(decoder, state, world)
    validate_no_params_on_meta_device(decoder)
    try:
        return ScoringModel(
            decoder,
            head_memory_mb=config.head_memory_mb,
            padding_free=config.padding_free,
            # On GPUs nobody has measured it.
            compiled=config.compile and world.device.type == "cpu",
        )
    except TypeError as error:
        raise ConfigError(f"model ({model.path}): {error}") from error


def place_decoder(
    decoder: TransformerDecoder,
    compute: Compute,
    world: World,
    *,
    trainable: bool,
    compiled: bool = False,
    reshard_after_forward: bool = True,
    key: str = "model",
) -> None:
    """Make a decoder on the meta device compute as it should, shard it, and give it memory on the world's device (in place).

    Its weights hold no numbers yet; its rotary caches do.

    Args:
        decoder: as its component made it.
        compute: how it computes.
        world: the run's processes.
        trainable: False freezes the parameters and sets evaluation mode.
        compiled: compile every layer.
        reshard_after_forward: see :func:`tokenpref.distributed.shard`.
        key: what it is called in the log.

    Raises:
        ConfigError: if float8 or activation checkpointing do not fit the model.
    """
    _switch_dropout_off(decoder)
    if compute.float8 is not None:
        names = convert_to_float8(decoder, compute.float8, sharded=world.mesh is not None)
        if world.is_main:
            log.info(f"{key}: {len(names)} linear layers multiply in float8 ({compute.float8.recipe})")
    if compiled:
        compile_model(decoder, verbose=False)
    if compute.checkpoint_every is not None:
        checkpoint_layers(decoder, compute.checkpoint_every)
    if compute.offload:
        offload_layers(decoder, activation_offloading())
    decoder.requires_grad_(trainable)
    shard(
        decoder,
        world,
        reshard_after_forward=reshard_after_forward,
        compute_dtype=compute.compute_dtype,
    )
    decoder.to_empty(device=world.device)
    with torch.device(world.device):
        for module in decoder.modules():
            # Rotary caches are not in checkpoints; they are float32 whatever the model's dtype.
            if hasattr(module, "rope_init"):
                module.rope_init()
    decoder.train(trainable)


def _switch_dropout_off(model: TransformerDecoder) -> None:
    """No dropout, as in the papers: a policy that equals its reference must give a loss of exactly log 2."""
    found = set()
    for module in model.modules():
        name = "p" if isinstance(module, nn.Dropout) else "attn_dropout"
        value = getattr(module, name, 0.0)
        if value:
            found.add(f"{type(module).__name__}.{name}={value}")
            setattr(module, name, 0.0)
    if found:
        log.info(
            f"model: dropout is switched off ({', '.join(sorted(found))}); policy and reference must agree"
        )


def check_decoder(decoder: Any, component: Component) -> None:
    """Check that a component made a model of torchtune's kind.

    Raises:
        ConfigError: if it did not.
    """
    if not isinstance(decoder, TransformerDecoder):
        raise ConfigError(
            f"{component.key} ({component.path}): makes a {type(decoder).__name__}, not a TransformerDecoder; name a model of "
            "torchtune.models or tokenpref.models, or a function of your own that makes one"
        )
    if len(decoder.layers) == 0:
        raise ConfigError(f"{component.key} ({component.path}): makes a model without layers; set num_layers")
    if not 2 <= decoder.max_seq_len <= LONGEST_CONTEXT:
        raise ConfigError(
            f"{component.key} ({component.path}): its context is {decoder.max_seq_len} tokens; set max_seq_len from 2 to "
            f"{LONGEST_CONTEXT}, which is as long as rotary tables are made for"
        )


WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


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
