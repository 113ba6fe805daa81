"""The configs of the recipes. Keys are named as in torchtune's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tokenpref._paths import resolve_path
from tokenpref.components import COMPONENT
from tokenpref.data.samples import read_openings, read_samples
from tokenpref.errors import DataError
from tokenpref.training.config.compute import DTYPES, Compute, ComputeConfig, compute_faults
from tokenpref.training.config.faults import adapter_faults, checkpoint_faults, transform_faults
from tokenpref.training.config.fields import (
    Component,
    component,
    flag,
    flag_or_text,
    integer,
    number,
    section,
    text,
    texts,
)
from tokenpref.training.config.sanity import (
    component_faults,
    folder_faults,
    optimizer_faults,
    own_component_faults,
)

__all__ = [
    "BestConfig",
    "EvaluateConfig",
    "ModelConfig",
    "SamplingConfig",
    "ScoringConfig",
    "TrainConfig",
    "TripletConfig",
    "WeightedConfig",
    "anchor_faults",
]

STATISTICS = ("ref", "kl_ref_policy", "kl_policy_ref", "entropy")
LEAST_GRADIENT_NORM = 1e-12
FP16_HINT = " (fp16 has too small a range for log-probabilities; use bf16 or fp32)"


def default_profiler(config: Mapping[str, Any]) -> dict[str, Any]:
    """The profiler of a config that names none: torch's, switched off.

    Args:
        config: the whole config as plain data.
    """
    return {
        COMPONENT: "torchtune.training.setup_torch_profiler",
        "enabled": False,
        "output_dir": f"{config.get('output_dir')}/profiling_outputs",
        "cpu": True,
        "cuda": str(config.get("device")).startswith("cuda"),
        "profile_memory": False,
        "with_stack": False,
        "record_shapes": True,
        "with_flops": False,
        "wait_steps": 5,
        "warmup_steps": 3,
        "active_steps": 2,
        "num_cycles": 1,
    }


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """What every recipe that runs a model over data needs."""

    output_dir: str = text()
    """The run writes everything to this folder."""
    tokenizer: Component = component()
    """The tokenizer of the model, this package's ``tokenizer_json`` or one of torchtune's."""
    seed: int = integer(0, low=0, high=2**63 - 1)
    """Seed of the data's order, of samples and of torch's random numbers."""
    device: str = text("cpu")
    """``cpu``, ``cuda``, or another device type of torch. Under torchrun every process takes the device of its local
    rank."""
    dtype: str = text("fp32", choices=("fp32", "bf16"), hint=FP16_HINT)
    """Dtype of the weights, and of the arithmetic unless ``compute_dtype`` says otherwise."""
    compile: bool = flag(False)
    """Compile every decoder layer; on a CPU the passes over the head's logits too."""
    dry_run: bool = flag(False)
    """Check everything that can be checked without the weights, report it, and stop. Nothing is written."""
    fsdp_reshard_after_forward: bool = flag(True)
    """With FSDP2, free a layer's gathered weights after its forward pass. False keeps them until the backward pass,
    which takes more memory and less communication."""
    head_memory_mb: float | None = number(None)
    """MiB of logits that are kept for the backward pass, twice that with a KL; the others are recomputed, to the same numbers.
    Null: a sixteenth of the free memory, at most seven times the size of the head's weight."""
    padding_free: bool = flag(True)
    """Score the sequences of a batch one after another, without padding. Set false for attention layers that need padded
    batches."""

    def compute(self, *, trainable: bool) -> Compute:
        """How a model of the run computes."""
        return Compute(dtype=DTYPES[self.dtype])

    def faults(self) -> list[str]:
        """Faults that no single key shows."""
        return folder_faults("output_dir", self.output_dir)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ScoringConfig):
    """What a recipe with a policy and a reference needs."""

    model: Component = component()
    """Builds the decoder of policy and reference."""
    checkpointer: Component = component()
    """Reads the policy's starting weights and writes the trained ones. :class:`tokenpref.models.CausalLMCheckpointer` goes with
    :func:`tokenpref.models.causal_lm`, torchtune's checkpointers go with torchtune's models."""
    ref_checkpointer: Component | None = component(optional=True)
    """Reads the reference's weights. Null takes those that ``checkpointer`` starts from. If the model has adapters, the
    reference is then the policy with its adapters switched off, and not a second model."""
    adapter_checkpoint: str | None = text(None)
    """Folder of a trained adapter in PEFT's format, which the policy's adapters start from. For models with adapters only.
    Null: new adapters, which change nothing at first."""
    batch_size: int = integer()
    """Pairs per process and micro-batch."""
    log_stats: tuple[str, ...] = texts(choices=STATISTICS)
    """Statistics that the log gets beyond those that the loss needs."""

    def faults(self) -> list[str]:
        """Faults that no single key shows."""
        checkpointers = (self.checkpointer, self.ref_checkpointer)
        return (
            super().faults()
            + [
                fault
                for c in checkpointers
                for fault in checkpoint_faults(c, self.model) + component_faults(c)
            ]
            + adapter_faults(self.model, self.adapter_checkpoint)
        )


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Sampling from the policy, and the reward of what it says."""

    prompts: str = text()
    """Text file with one opening per line."""
    reward: Component = component(function=2)
    """A function ``(prompts, completions) -> list[float]``, or a class whose instances are called like that."""
    num_samples: int = integer(8, high=1_000_000)
    """Samples per opening."""
    max_new_tokens: int = integer(40)
    """Most tokens of a sample."""
    temperature: float = number(1.0, high=1e6)
    """Divides the logits."""
    top_k: int | None = integer(None)
    """Sample among this many most probable tokens only. Null: among all."""
    top_p: float | None = number(None, high=1.0)
    """Sample among the fewest most probable tokens that hold this much probability. Null: among all."""
    batch_size: int = integer(32)
    """Samples that are generated together."""
    compare_to: str | None = text(None)
    """``samples.jsonl`` of another model's evaluation with the same openings and seed. The gain over it is computed
    sample by sample."""

    def faults(self) -> list[str]:
        """Files that are not there, or not what they should be."""
        faults = own_component_faults(self.reward)
        for key, read in (("prompts", read_openings), ("compare_to", read_samples)):
            given = getattr(self, key)
            path = resolve_path(given) if given is not None else None
            if path is not None and not path.is_file():
                faults.append(f"sampling.{key}: no file at {path}")
            elif path is not None:
                try:
                    read(path)
                except DataError as error:
                    faults.append(f"sampling.{key}: {error}")
        return faults


@dataclass(frozen=True, kw_only=True)
class BestConfig:
    """Which weights of a run are its best."""

    metric: str = text()
    """A metric of the validation without its ``eval_``, such as ``loss``, ``rewards/accuracies`` or ``reward``."""
    goal: str = text(choices=("max", "min"))
    """Whether a larger or a smaller value is better."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ComputeConfig, ModelConfig):
    """A preference training run; keys are named as in torchtune's recipes."""

    dataset: Component = component(positional=1, mixed=True)
    """Preference pairs to train on. A list of data sets is mixed."""
    dataset_val: Component | None = component(positional=1, optional=True, mixed=True)
    """Held-out pairs for validation."""
    loss: Component = component()
    """A loss on token statistics, from ``tokenpref.losses`` or your own."""
    optimizer: Component = component(positional=1)
    """Any optimizer of torch, or your own. The recipe passes the parameters."""
    lr_scheduler: Component | None = component(
        positional=1, provided=("num_training_steps", "last_epoch"), optional=True
    )
    """Null keeps the learning rate constant. The recipe passes ``num_training_steps`` and ``last_epoch``."""
    reference: str = text("model", choices=("model", "cached"))
    """``model`` keeps a second model beside the policy. ``cached`` scores the data once before training and reads the
    results from the disk."""
    reference_cache_dir: str | None = text(None)
    """Folder for ``reference: cached``, which several runs may share. Null: ``reference`` in ``output_dir``."""
    metric_logger: Component = component()
    """One of torchtune's metric loggers, or your own."""
    profiler: Component | None = component(optional=True, base=default_profiler)
    """torch's profiler, as torchtune sets it up. It is off; ``profiler.enabled=true`` writes traces to
    ``output_dir/profiling_outputs``. Null removes it."""
    batch_size_val: int | None = integer(None)
    """Pairs per process in a batch of validation. Null: ``batch_size``."""
    run_val_every_n_steps: int | None = integer(None)
    """Optimizer steps between validations. Null: no validation."""
    loss_val: Component | None = component(optional=True)
    """The loss whose value and rewards validation reports. Null: ``loss``."""
    log_stats_val: tuple[str, ...] | None = texts(None, choices=STATISTICS)
    """The same as ``log_stats`` for validation. Null: ``log_stats``."""
    sampling: SamplingConfig | None = section(SamplingConfig)
    """Sample from the policy at each validation, and log the samples' reward."""
    best: BestConfig | None = section(BestConfig)
    """Keep the weights with the best validation in ``output_dir/best``."""
    gradient_accumulation_steps: int = integer(1)
    """Micro-batches per optimizer step."""
    tokens_per_batch: int | None = integer(None)
    """Most tokens of a micro-batch, both answers counted. A step then has the same pairs as without this key, cut into
    micro-batches by their lengths. Null: ``batch_size`` pairs per micro-batch, in the data's order."""
    epochs: int = integer(1)
    """Passes over the data."""
    max_steps_per_epoch: int | None = integer(None)
    """Optimizer steps after which an epoch ends early. Null: the whole data."""
    shuffle: bool = flag(True)
    """Shuffle the pairs in every epoch."""
    clip_grad_norm: float | None = number(None, high=1e30)
    """Largest norm of the gradient. Null: no clipping."""
    resume_from_checkpoint: bool | str = flag_or_text(False)
    """``auto`` resumes from the newest checkpoint in ``output_dir`` if there is one. With true there has to be one. A
    path names a checkpoint, or a run whose newest checkpoint is taken."""
    checkpoint_every_n_steps: int | None = integer(None)
    """Optimizer steps between resumable checkpoints. Without this key and without minutes there is one at the end of
    each epoch."""
    checkpoint_every_minutes: float | None = number(None)
    """Minutes between resumable checkpoints."""
    enable_async_checkpointing: bool = flag(False)
    """Write resumable checkpoints while training goes on. This takes memory for a copy of weights and optimizer state."""
    keep_last: int = integer(1)
    """Resumable checkpoints to keep."""
    save_adapter_weights_only: bool = flag(True)
    """Of a model with adapters, write the adapter after each epoch. False also writes the merged model, to ``epoch_N/merged``.
    Models without adapters are always written whole."""
    log_every_n_steps: int = integer(1)
    """Optimizer steps between lines of the log."""
    log_peak_memory_stats: bool = flag(False)
    """Log the peak memory too."""

    def compute(self, *, trainable: bool) -> Compute:
        """How the policy (``trainable``) or a model beside it computes."""
        return self.compute_of(self.dtype, trainable=trainable)

    def faults(self) -> list[str]:
        """Faults that no single key shows."""
        faults = (
            super().faults()
            + compute_faults(self, dtype=self.dtype, device=self.device)
            + self._cache_faults()
        )
        for part in (self.metric_logger, self.profiler, self.lr_scheduler):
            faults += component_faults(part)
        if self.clip_grad_norm is not None and self.clip_grad_norm < LEAST_GRADIENT_NORM:
            faults.append(
                f"clip_grad_norm: is {self.clip_grad_norm}, and no step would move a weight; set at least "
                f"{LEAST_GRADIENT_NORM}, or null"
            )
        faults += optimizer_faults(self.optimizer, self.lr_scheduler, DTYPES.get(self.dtype, torch.float32))
        if self.run_val_every_n_steps and self.dataset_val is None and self.sampling is None:
            faults.append("run_val_every_n_steps: set without dataset_val; add a dataset_val or remove it")
        if self.best is not None and not self.run_val_every_n_steps:
            faults.append(
                "best: set without run_val_every_n_steps, so nothing is ever compared; set both or neither"
            )
        return faults + (self.sampling.faults() if self.sampling is not None else [])

    def _cache_faults(self) -> list[str]:
        """What a cached reference cannot be made from, and a folder for one that nobody makes."""
        faults = folder_faults("reference_cache_dir", self.reference_cache_dir)
        if self.reference == "model" and self.reference_cache_dir is not None:
            faults.append(
                "reference_cache_dir: set, but reference is model, which keeps nothing; set reference=cached, or remove it"
            )
        reader = self.ref_checkpointer or self.checkpointer
        if self.reference == "cached" and reader is not None and "checkpoint_dir" not in reader.kwargs:
            faults.append(
                f"reference: cached tells references apart by the files of their weights, and {reader.key} ({reader.path}) names "
                "no checkpoint_dir; set reference=model"
            )
        return faults


@dataclass(frozen=True, kw_only=True)
class WeightedConfig(TrainConfig):
    """Training with token weights."""

    token_weights: Component = component()
    """Source of the tokens' scores: a weight store, columns of the data, a pair of prompts, attribution, or your own."""
    weight_transform: Component | None = component(positional=2, provided=("side",), optional=True)
    """Makes weights from log ratios. Null for scores that are weights already."""
    normalize_weights: str = text("none", choices=("none", "answer"))
    """With ``answer``, the weights of each answer average one, which keeps the scale of DPO."""
    use_eos_score: bool = flag(True)
    """If false, an EOS gets ``eos_weight`` even where it has a score."""
    eos_weight: float = number(1.0, inclusive=True, high=1e6)
    """Weight of an EOS that has no score."""

    def faults(self) -> list[str]:
        """Faults that no single key shows."""
        weights = own_component_faults(self.token_weights)
        return super().faults() + weights + transform_faults(self.weight_transform)


@dataclass(frozen=True, kw_only=True)
class TripletConfig(WeightedConfig):
    """Training with token weights and anchors."""

    anchors: Component | None = component(optional=True)
    """Source of third answers: sampled from the policy, a column of the data, or your own."""

    def faults(self) -> list[str]:
        """Faults that no single key shows."""
        return super().faults() + own_component_faults(self.anchors)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ModelConfig):
    """Held-out loss, accuracy, margins and KL, and samples with their reward."""

    dataset: Component | None = component(positional=1, optional=True, mixed=True)
    """Held-out pairs. Null: samples only."""
    loss: Component | None = component(optional=True)
    """The loss whose value and rewards are reported. Required with ``dataset``."""
    sampling: SamplingConfig | None = section(SamplingConfig)
    """Sample from the model, and report the samples' reward."""

    def faults(self) -> list[str]:
        """Faults that no single key shows."""
        faults = super().faults()
        if self.dataset is not None and self.loss is None:
            faults.append("loss: needed to evaluate a dataset; name the loss that the model was trained with")
        return faults + (self.sampling.faults() if self.sampling is not None else [])


def anchor_faults(config: TrainConfig) -> list[str]:
    """Losses that compare with answers which no cache of the data's own answers holds; losses that can be built."""
    if config.reference != "cached":
        return []
    return [
        f"reference: cached holds the data's chosen and rejected answers, and {loss.key} ({loss.path}) compares with a third "
        "one; set reference=model, or switch its triplet off (gamma 0)"
        for loss in (config.loss, config.loss_val)
        if loss is not None and "anchor" in loss.build().needs
    ]
