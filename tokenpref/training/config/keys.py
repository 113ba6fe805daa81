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
from tokenpref.training.config.faults import checkpoint_faults, transform_faults
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
    """Folder of everything that the run writes."""
    tokenizer: Component = component()
    seed: int = integer(0, low=0, high=2**63 - 1)
    device: str = text("cpu")
    dtype: str = text("fp32", choices=("fp32", "bf16"), hint=FP16_HINT)
    compile: bool = flag(False)
    """Compile every decoder layer; on a CPU the passes over the head's logits too."""
    dry_run: bool = flag(False)
    """Check everything that can be checked without the weights, say it, and stop; nothing is written."""
    fsdp_reshard_after_forward: bool = flag(True)
    head_memory_mb: float | None = number(None)
    """MiB of logits that are kept for the backward pass, twice that with a KL; the others are recomputed, to the same numbers.
    Null: a sixteenth of the free memory, at most eight times the size of the head's weight."""
    padding_free: bool = flag(True)
    """Score sequences one after another instead of padded to the longest; false for attentions that need padded batches."""

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
    checkpointer: Component = component()
    """Reads the policy's starting weights and writes trained ones (a torchtune checkpointer)."""
    ref_checkpointer: Component | None = component(optional=True)
    """Reads the reference's weights; null: those that ``checkpointer`` starts from."""
    batch_size: int = integer()
    """Pairs per process and micro-batch."""
    log_stats: tuple[str, ...] = texts(choices=STATISTICS)
    """Statistics to compute for the log beyond what the loss needs."""

    def faults(self) -> list[str]:
        """Faults that no single key shows."""
        checkpointers = (self.checkpointer, self.ref_checkpointer)
        return super().faults() + [
            fault for c in checkpointers for fault in checkpoint_faults(c, self.model) + component_faults(c)
        ]


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Sampling from the policy, and the reward of what it says."""

    prompts: str = text()
    """Text file, one opening a line."""
    reward: Component = component(function=2)
    """Callable ``(prompts, completions) -> list[float]``, or a class whose instance is one."""
    num_samples: int = integer(8, high=1_000_000)
    """Samples per opening."""
    max_new_tokens: int = integer(40)
    temperature: float = number(1.0, high=1e6)
    top_k: int | None = integer(None)
    top_p: float | None = number(None, high=1.0)
    batch_size: int = integer(32)
    compare_to: str | None = text(None)
    """``samples.jsonl`` of another model's evaluation with the same openings and seed: gains are paired with it."""

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
    """A metric of the validation, without ``eval_``: ``loss``, ``rewards/accuracies``, ``reward``, ..."""
    goal: str = text(choices=("max", "min"))
    """Whether more or less of it is better."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(ComputeConfig, ModelConfig):
    """A preference training run; keys are named as in torchtune's recipes."""

    dataset: Component = component(positional=1, mixed=True)
    dataset_val: Component | None = component(positional=1, optional=True, mixed=True)
    loss: Component = component()
    optimizer: Component = component(positional=1)
    lr_scheduler: Component | None = component(
        positional=1, provided=("num_training_steps", "last_epoch"), optional=True
    )
    """Null: a constant learning rate."""
    reference: str = text("model", choices=("model", "cached"))
    """``model``: a second model beside the policy; ``cached``: what it says of the data, made once and read from the disk."""
    reference_cache_dir: str | None = text(None)
    """Folder of what ``cached`` keeps, which several runs may share; null: ``reference`` in ``output_dir``."""
    metric_logger: Component = component()
    profiler: Component | None = component(optional=True, base=default_profiler)
    """torch's profiler, as torchtune sets it up. ``profiler.enabled=true`` writes traces to ``output_dir/profiling_outputs``."""
    batch_size_val: int | None = integer(None)
    """Null: ``batch_size``."""
    run_val_every_n_steps: int | None = integer(None)
    loss_val: Component | None = component(optional=True)
    """Loss whose value and rewards validation reports; null: ``loss``."""
    log_stats_val: tuple[str, ...] | None = texts(None, choices=STATISTICS)
    """As ``log_stats``, for validation; null: ``log_stats``."""
    sampling: SamplingConfig | None = section(SamplingConfig)
    """Sample at each validation and log the samples' reward."""
    best: BestConfig | None = section(BestConfig)
    """Keep the weights with the best validation in ``output_dir/best``."""
    gradient_accumulation_steps: int = integer(1)
    tokens_per_batch: int | None = integer(None)
    """Most tokens of a micro-batch, both answers counted. A step then has the same pairs as without, cut by their lengths; null:
    ``batch_size`` pairs a micro-batch, in the data's order."""
    epochs: int = integer(1)
    max_steps_per_epoch: int | None = integer(None)
    shuffle: bool = flag(True)
    clip_grad_norm: float | None = number(None, high=1e30)
    resume_from_checkpoint: bool | str = flag_or_text(False)
    """``auto``: from the newest checkpoint of ``output_dir`` if there is one; true: there has to be one; or its path."""
    checkpoint_every_n_steps: int | None = integer(None)
    """Steps between resumable checkpoints; null (and no minutes): one at each epoch's end."""
    checkpoint_every_minutes: float | None = number(None)
    """Minutes between resumable checkpoints."""
    enable_async_checkpointing: bool = flag(False)
    """Write resumable checkpoints while the training goes on; takes memory for a copy of weights and optimizer state."""
    keep_last: int = integer(1)
    """Resumable checkpoints to keep."""
    log_every_n_steps: int = integer(1)
    log_peak_memory_stats: bool = flag(False)

    def compute(self, *, trainable: bool) -> Compute:
        """How the policy (``trainable``) or a model beside it computes."""
        return self.compute_of(self.dtype, trainable=trainable)

    def faults(self) -> list[str]:
        """Faults that no single key shows."""
        faults = super().faults() + compute_faults(self) + self._cache_faults()
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
    """Where the tokens' scores come from: a store, the data's columns, a prompt pair or attribution as the training goes, or a
    component of the user's."""
    weight_transform: Component | None = component(positional=2, provided=("side",), optional=True)
    """From log ratios to weights; null for scores that are weights."""
    normalize_weights: str = text("none", choices=("none", "answer"))
    """``answer``: each answer's weights average one, which keeps DPO's scale."""
    use_eos_score: bool = flag(True)
    """False: an EOS gets ``eos_weight`` even where it has a score."""
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
    """Where third answers come from: sampled from the policy, a column of the data, or a component of the user's."""

    def faults(self) -> list[str]:
        """Faults that no single key shows."""
        return super().faults() + own_component_faults(self.anchors)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ModelConfig):
    """Held-out loss, accuracy, margins and KL, and samples with their reward."""

    dataset: Component | None = component(positional=1, optional=True, mixed=True)
    loss: Component | None = component(optional=True)
    sampling: SamplingConfig | None = section(SamplingConfig)

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
