"""The only place that makes models: it builds decoders, reads their weights and places them on the run's devices."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, MutableMapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchao.dtypes.nf4tensor import NF4Tensor

from tokenpref._files import sampled_digest, weight_files
from tokenpref._paths import resolve_path
from tokenpref._torchtune import (
    set_default_dtype,
    validate_no_params_on_meta_device,
)
from tokenpref.distributed import World, load_full_state_dict, shard, state_parameters
from tokenpref.errors import ConfigError
from tokenpref.models.activations import activation_offloading, checkpoint_layers, offload_layers
from tokenpref.models.adapters import (
    adapter_names,
    base_tensors,
    check_adapters,
    has_adapters,
    initial_adapters,
)
from tokenpref.models.decoder_of import decoder_of
from tokenpref.models.float8 import convert_to_float8
from tokenpref.models.lazy_weights import notes_of, shapes_of
from tokenpref.models.peft_format import AdapterLayout
from tokenpref.models.peft_reader import read_adapter
from tokenpref.models.reference import FrozenReference
from tokenpref.models.scoring import ScoringModel
from tokenpref.models.tied_head import check_unread_head, drop_tied_head, head_hint
from tokenpref.training.config.compute import DTYPES, Compute
from tokenpref.training.config.fields import Component
from tokenpref.training.config.keys import ModelConfig, ScoringConfig

__all__ = [
    "ModelMaker",
    "check_decoder",
    "check_state_fits",
    "choose_trainable",
    "nbytes",
    "place_decoder",
    "read_weights",
    "weight_nbytes",
    "weights_digest",
]

log = logging.getLogger("tokenpref")

LONGEST_CONTEXT = 2**24


def read_weights(checkpointer: Any, key: str, world: World) -> MutableMapping[str, Tensor]:
    """The model state dict that a checkpointer reads; only the main process reads, others get ``{}``.

    Returns:
        Tensors by name. Those of :class:`~tokenpref.models.CausalLMCheckpointer` are read when they are looked up.

    Raises:
        ConfigError: if the files cannot be turned into the model's names (usually a wrong ``model_type``).
    """

    def read() -> MutableMapping[str, Tensor]:
        if not world.is_main:
            return {}
        try:
            state: MutableMapping[str, Tensor] = checkpointer.load_checkpoint()["model"]
            check_unread_head(checkpointer, state, key)
        except ConfigError as error:
            raise ConfigError([f if f.startswith(key) else f"{key}: {f}" for f in error.faults]) from error
        except Exception as error:
            causes = [error, *([error.__cause__] if error.__cause__ is not None else [])]
            # First lines only, because torch's message then explains how to load files that can execute code.
            said = "; ".join(
                f"{type(c).__name__}: {(str(c).strip().splitlines() or [''])[0]}" for c in causes
            )
            raise ConfigError(
                f"{key}: the checkpoint cannot be read ({said}); check checkpoint_dir, checkpoint_files and model_type"
            ) from error
        return state

    return world.together(read)


def check_state_fits(state: Mapping[str, Tensor], model: nn.Module, key: str) -> None:
    """Compare names and shapes of a checkpoint with the model's, whose adapters are not part of it.

    Raises:
        ConfigError: naming the first differences.
    """
    own = base_tensors(model)
    faults = [f"no tensor {name!r}" for name in own if name not in state]
    faults += [f"unexpected tensor {name!r}" for name in state if name not in own]
    faults += [
        f"{name!r} has shape {list(shape)} and the model wants {list(own[name].shape)}"
        for name, shape in shapes_of(state).items()
        if name in own and shape != own[name].shape
    ]
    if faults:
        more = f" and {len(faults) - 3} more differences" if len(faults) > 3 else ""
        raise ConfigError(
            f"{key}: the checkpoint is of another architecture than the model: {'; '.join(faults[:3])}{more}. "
            "Set model and checkpointer to the same architecture (tokenpref.models.causal_lm goes with CausalLMCheckpointer)."
            + head_hint(state, model)
        )


class ModelMaker:
    """Makes the policy, the reference and the sides of a contrastive pair. Nothing else builds a model or loads weights into it.

    This class decides everything about a model: the component that builds it, the checkpoint of its weights, which of its
    parameters are trained, and how it computes. Models on the meta device answer questions that need no weights.

    Args:
        config: how models compute and how they are sharded; a config with ``model`` and ``checkpointer`` names those too.
        world: the run's processes.
        model: builds the decoder; None: the config's ``model``.
        checkpointer: reads the policy's weights; None: the config's ``checkpointer``, if it has one.
        adapter: folder of the trained adapter that the policy starts from; None: the config's ``adapter_checkpoint``, if any.

    Raises:
        ValueError: if neither the config nor the arguments name a model.
    """

    def __init__(
        self,
        config: ScoringConfig,
        world: World,
        *,
        model: Component | None = None,
        checkpointer: Component | None = None,
        adapter: str | None = None,
    ) -> None:
        self.config, self.world = config, world
        self._ref_checkpointer: Component | None = None
        if isinstance(config, ModelConfig):
            model, checkpointer = model or config.model, checkpointer or config.checkpointer
            self._ref_checkpointer = config.ref_checkpointer
            adapter = adapter or config.adapter_checkpoint
        if model is None:
            raise ValueError("no model: the config has none, so name one with model=")
        self.model: Component = model
        self._checkpointer = checkpointer
        self._adapter: Path | None = None if adapter is None else resolve_path(adapter)
        self._said: set[str] = set()
        self._proven = False

    @cached_property
    def checkpointer(self) -> Any:
        """The checkpointer that reads the policy's weights and later writes trained ones.

        Raises:
            ValueError: if there is none.
        """
        return self.base.build()

    @property
    def base(self) -> Component:
        """The component of :attr:`checkpointer`.

        Raises:
            ValueError: if there is none.
        """
        if self._checkpointer is None:
            raise ValueError("no checkpointer: the config has none, so name one with checkpointer=")
        return self._checkpointer

    def policy(self, *, trainable: bool = False) -> ScoringModel:
        """The model with the checkpointer's weights, and with the adapter of ``adapter_checkpoint`` if it has adapters.

        Args:
            trainable: whether it will be trained; False freezes the parameters and sets evaluation mode.

        Raises:
            ConfigError: see :meth:`side`.
        """
        return self._filled(self.checkpointer, "checkpointer", trainable=trainable, adapter=self._adapter)

    def reference(self, policy: ScoringModel | None = None) -> FrozenReference:
        """The frozen model that the policy is compared with.

        It has the weights of ``ref_checkpointer``, or else those of ``checkpointer``, and no adapters.

        Args:
            policy: the run's policy. If the reference is its base (:attr:`reference_is_base`), no second model is made. None:
                always a second model.

        Raises:
            ConfigError: see :meth:`side`.
        """
        if policy is not None and self.reference_is_base:
            return FrozenReference(policy.base(), shares_head=True)
        reader = self._ref_checkpointer or self.base
        return FrozenReference(self.side(reader, reader.key))

    @property
    def reference_is_base(self) -> bool:
        """Whether the reference is the policy with its adapters switched off."""
        return self._ref_checkpointer is None and has_adapters(self._policy_on_meta)

    def side(self, checkpointer: Component, key: str, *, adapter: Path | None = None) -> ScoringModel:
        """The model, frozen, with another checkpointer's weights, such as a side of a contrastive pair.

        Args:
            checkpointer: reads the weights, of a model with adapters those of the base.
            key: what the weights are called in errors and in the log.
            adapter: folder of a trained adapter; None: the adapters of a model that has some are off.

        Raises:
            ConfigError: if the weights do not fit the model, the model has no plain linear head, or float8 or activation
                checkpointing do not fit it.
        """
        scorer = self._filled(checkpointer.build(), key, trainable=False, adapter=adapter)
        return scorer.base() if adapter is None and has_adapters(scorer.model) else scorer

    def on_meta(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The policy on the meta device, built by each call. ``requires_grad`` tells which parameters are trained.

        Args:
            dtype: dtype of the weights; None for the config's ``dtype``.

        Raises:
            ConfigError: if the component does not build a decoder, if the decoder's adapters are not supported, or if it has
            none and ``adapter_checkpoint`` is set.
        """
        with set_default_dtype(dtype or DTYPES[self.config.dtype]), torch.device("meta"):
            decoder: nn.Module = self.model.build()
        check_decoder(decoder, self.model)
        if self._adapter is not None and not has_adapters(decoder):
            raise ConfigError(
                f"adapter_checkpoint: {self.model.key} ({self.model.path}) makes a model without adapters; name a lora_ builder "
                "(or set lora of tokenpref.models.causal_lm), or set adapter_checkpoint=null"
            )
        return choose_trainable(decoder, True)

    @cached_property
    def _policy_on_meta(self) -> nn.Module:
        return self.on_meta()

    @property
    def context(self) -> int:
        """The length of the model's context, in tokens."""
        return decoder_of(self._policy_on_meta).context

    @property
    def vocabulary(self) -> int:
        """The number of token ids that the model embeds."""
        return decoder_of(self._policy_on_meta).vocabulary

    @cached_property
    def adapters(self) -> dict[str, Any] | None:
        """Everything about the model's adapters except their values, as plain data; None if it has none.

        Raises:
            ConfigError: if PEFT's format, in which they will be written, has no place for them.
        """
        decoder = self._policy_on_meta
        if not has_adapters(decoder):
            return None
        layout = AdapterLayout.of(decoder, self.model.key)
        quantised = any(isinstance(parameter, NF4Tensor) for parameter in decoder.parameters())
        return {
            "rank": layout.rank,
            "alpha": layout.alpha,
            "targets": list(layout.targets),
            "dora": layout.dora,
            "quantized_base": quantised,
        }

    @property
    def reference_nbytes(self) -> int:
        """A process's share of the reference's weights, in bytes."""
        dtype = self.config.compute(trainable=False).dtype
        return -(-weight_nbytes(self._policy_on_meta, dtype) // self.world.size)

    @property
    def adapter_nbytes(self) -> int:
        """A process's share of the values of another adapter in a frozen model, in bytes; 0 for a model without adapters."""
        decoder, dtype = self._policy_on_meta, self.config.compute(trainable=False).dtype
        parameters = state_parameters(decoder)
        count = sum(parameters[name].numel() for name in adapter_names(decoder))
        return -(-count * dtype.itemsize // self.world.size)

    def check_adapter(self) -> None:
        """Compare the adapter of ``adapter_checkpoint`` with the model and with the files of its base; no weights are read.

        Raises:
            ConfigError: if it does not fit.
        """
        if self._adapter is not None:
            base = self._checkpointer
            named = base is not None and "checkpoint_dir" in base.kwargs
            digest = weights_digest(base) if base is not None and named else None
            read_adapter(self._adapter, self._policy_on_meta, "adapter_checkpoint", base=digest)

    def adapter_digest(self) -> str | None:
        """A fingerprint of the adapter of ``adapter_checkpoint``; None without one, and on all processes except the main one.

        Raises:
            ConfigError: if a file is missing.
        """
        if self._adapter is None or not self.world.is_main:
            return None
        return sampled_digest(self._adapter, weight_files(self._adapter))

    def _filled(
        self, checkpointer: Any, key: str, *, trainable: bool, adapter: Path | None = None
    ) -> ScoringModel:
        """Read weights, build the model on the meta device, shard it, and fill it."""
        config, world = self.config, self.world
        state = read_weights(checkpointer, key, world)
        compute = config.compute(trainable=trainable)
        decoder = self.on_meta(compute.dtype)
        world.together(lambda: self._complete_state(state, decoder, key, adapter, compute))
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
            scorer = ScoringModel(
                decoder,
                head_memory_mb=config.head_memory_mb,
                padding_free=config.padding_free,
                # On GPUs nobody has measured it.
                compiled=config.compile and world.device.type == "cpu",
            )
        except TypeError as error:
            raise ConfigError(f"model ({self.model.path}): {error}") from error
        # All models of a run have one architecture, so the first one is enough.
        if not self._proven:
            scorer.decoder.prove(padding_free=config.padding_free)
            self._proven = True
        return scorer

    def _complete_state(
        self,
        state: MutableMapping[str, Tensor],
        decoder: nn.Module,
        key: str,
        adapter: Path | None,
        compute: Compute,
    ) -> None:
        """Check the weights that were read, and add those of the adapters (in place; on the main process)."""
        if not self.world.is_main:
            return
        dropped = drop_tied_head(state, decoder, key)
        lines = [*([] if dropped is None else [dropped]), *notes_of(state)]
        # A reference may read the policy's files again; a line is logged only once.
        for line in [line for line in lines if line not in self._said]:
            self._said.add(line)
            log.info(line)
        check_state_fits(state, decoder, key)
        if adapter is not None:
            state.update(read_adapter(adapter, decoder, "adapter_checkpoint"))
        elif has_adapters(decoder):
            state.update(
                initial_adapters(
                    decoder,
                    state,
                    seed=self.config.seed,
                    compute_dtype=compute.kept_dtype,
                    device=self.world.device,
                )
            )


def weight_nbytes(decoder: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of a decoder's weights, if those that are not quantised have some dtype."""
    return sum(
        nbytes(parameter) if hasattr(parameter, "__tensor_flatten__") else parameter.numel() * dtype.itemsize
        for parameter in decoder.parameters()
    )


def nbytes(tensor: Tensor) -> int:
    """Bytes of a tensor; of one that wraps others (quantised weights or states), of those."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(nbytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


def choose_trainable(decoder: nn.Module, trainable: bool) -> nn.Module:
    """Mark the parameters to train (in place): a policy's adapters if it has any, else all, and none of a frozen model."""
    decoder.requires_grad_(trainable)
    if trainable and has_adapters(decoder):
        trained = set(adapter_names(decoder))
        for name, parameter in state_parameters(decoder).items():
            parameter.requires_grad_(name in trained)
    return decoder


def place_decoder(
    decoder: nn.Module,
    compute: Compute,
    world: World,
    *,
    trainable: bool,
    compiled: bool = False,
    reshard_after_forward: bool = True,
    key: str = "model",
) -> None:
    """Make a decoder on the meta device compute as it should, shard it, and give it memory on the world's device (in place).

    Its weights have no values yet, but its rotary caches do.

    Args:
        decoder: the decoder from its component.
        compute: how it computes.
        world: the run's processes.
        trainable: False freezes the parameters and sets evaluation mode.
        compiled: compile every layer.
        reshard_after_forward: see :func:`tokenpref.distributed.shard`.
        key: its name in the log.

    Raises:
        ConfigError: if float8 or activation checkpointing do not fit the model.
    """
    _switch_dropout_off(decoder)
    if compute.float8 is not None:
        names = convert_to_float8(decoder, compute.float8, sharded=world.mesh is not None)
        if world.is_main:
            log.info(f"{key}: {len(names)} linear layers multiply in float8 ({compute.float8.recipe})")
    if compiled:
        _compile_layers(decoder)
    if compute.checkpoint_every is not None:
        checkpoint_layers(decoder, compute.checkpoint_every)
    if compute.offload:
        offload_layers(decoder, activation_offloading())
    choose_trainable(decoder, trainable)
    shard(
        decoder,
        list(decoder_of(decoder).layers),
        world,
        reshard_after_forward=reshard_after_forward,
        compute_dtype=compute.compute_dtype,
    )
    decoder.to_empty(device=world.device)
    decoder_of(decoder).fill_buffers(world.device)
    decoder.train(trainable)


def _compile_layers(decoder: nn.Module) -> None:
    """Compile every layer (in place).

    Inductor keeps intermediate bfloat16 results in float32 by default. The compiled layers of policy and reference, which are
    compiled with and without gradients, then round differently, and a training would not start at log 2.
    """
    backend = os.environ.get("TORCH_COMPILE_BACKEND", "inductor")
    options = {"emulate_precision_casts": True} if backend == "inductor" else None
    for layer in decoder_of(decoder).layers:
        layer.compile(backend=backend, options=options)


def _switch_dropout_off(model: nn.Module) -> None:
    """Switch dropout off, as in the papers: a policy that equals its reference must give a loss of exactly log 2."""
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
    """Check that a component made a decoder.

    Raises:
        ConfigError: if it did not, or if the model's adapters are of a kind that is not supported.
    """
    try:
        view = decoder_of(decoder)
    except TypeError as error:
        raise ConfigError(
            f"{component.key} ({component.path}): makes a {type(decoder).__name__}, which is neither a TransformerDecoder of "
            "torchtune nor a causal LM of transformers; name tokenpref.models.causal_lm, a model of torchtune.models or "
            "tokenpref.models, or a function of your own that makes one"
        ) from error
    try:
        check_adapters(decoder)
    except ValueError as error:
        raise ConfigError(f"{component.key} ({component.path}): {error}") from error
    if len(view.layers) == 0:
        raise ConfigError(f"{component.key} ({component.path}): makes a model without layers; set num_layers")
    if not 2 <= view.context <= LONGEST_CONTEXT:
        raise ConfigError(
            f"{component.key} ({component.path}): its context is {view.context} tokens; set max_seq_len from 2 to "
            f"{LONGEST_CONTEXT}, which is as long as rotary tables are made for"
        )


def weights_digest(checkpointer: Component) -> str:
    """A cheap fingerprint of a checkpoint's weights: names and sizes of its files, and a part of their bytes.

    Raises:
        ConfigError: if a file is missing.
    """
    folder = Path(str(checkpointer.kwargs.get("checkpoint_dir", "")))
    return sampled_digest(folder, weight_files(folder, checkpointer.kwargs.get("checkpoint_files")))
