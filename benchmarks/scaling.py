"""Bytes per process, and communication against computation, for training on many GPUs; nothing of it needs a GPU.

    python -m benchmarks.scaling                # the tables
    python -m benchmarks.scaling --write-docs   # writes them into docs/scaling.md

Weights are counted on the meta device, with the rows that FSDP2 adds so that every process has the same number of them.
Activations and the head are those of ``dry_run=true``. Traffic is that of one step with one micro-batch: see
:func:`step_traffic`, which a test compares with the bytes that two and four processes exchange. Times come from published figures
of the card and its links.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchao.dtypes.nf4tensor import NF4Tensor

from benchmarks import tables
from benchmarks.gpu import PEAKS, ModelSize
from tokenpref.distributed import single_process_world
from tokenpref.models.decoder_of import decoder_of
from tokenpref.training.config.command_line import load_config
from tokenpref.training.config.compute import DTYPES
from tokenpref.training.config.fields import read_config
from tokenpref.training.config.keys import TrainConfig
from tokenpref.training.loading.models import ModelMaker
from tokenpref.training.loading.preflight import estimate_memory

__all__ = ["Groups", "Traffic", "own_numbers", "step_traffic"]

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- Begin of what benchmarks/scaling.py writes -->", "<!-- End of what it writes -->"

GPUS = (1, 8, 64)
POSITIONS = 8192
"""Tokens of a micro-batch that are computed, of one process: 8 pairs of two answers of about 500 tokens."""
MFU = 0.45
"""The share of the card's peak that computing is assumed to reach."""
PEAK = PEAKS["H100"][0]
LINKS = {8: 450e9, 64: 400e9}
"""Bytes per second into a process by the number of GPUs. 8: half of NVLink's 900 GB/s, which counts both directions. 64: eight
adapters of 400 Gb/s in a machine of eight GPUs, with rings through all of them, so that each byte enters the machine once."""

MODELS = {"1B": "llama3_2.{}llama3_2_1b", "8B": "llama3_1.{}llama3_1_8b", "70B": "llama3_1.{}llama3_1_70b"}
LORA = (
    "model.lora_attn_modules=[q_proj,k_proj,v_proj,output_proj]",
    "model.apply_lora_to_mlp=true",
    "model.lora_rank=16",
    "model.lora_alpha=32",
)
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "full": ("", ("dtype=fp32", "compute_dtype=bf16")),
    "QLoRA": ("qlora_", ("dtype=bf16", *LORA)),
}
"""The prefix of a builder, and the keys of its config."""


@dataclass(frozen=True)
class Groups:
    """Bytes of a model's weights as FSDP2 gathers them: one group for each layer, and the root's.

    Args:
        layers: embedding, final norm and head apart.
        root: embedding, final norm and head.
        largest: the largest layer.
    """

    layers: int
    root: int
    largest: int

    @classmethod
    def of(cls, model: nn.Module, size: int, dtype: torch.dtype) -> Groups:
        """Of a model on any device.

        Args:
            model: not yet sharded.
            size: number of processes.
            dtype: in which weights are gathered; quantised ones are gathered as they are stored.
        """
        layers = [_gathered(layer.parameters(), size, dtype) for layer in decoder_of(model).layers]
        return cls(sum(layers), _gathered(model.parameters(), size, dtype) - sum(layers), max(layers))

    @property
    def all(self) -> int:
        """Their sum."""
        return self.layers + self.root


@dataclass(frozen=True)
class Traffic:
    """What a process takes part in during a step, in bytes of whole buffers. It receives (W - 1) / W of them from W - 1 others.

    Args:
        gathered: results of all-gathers.
        reduced: inputs of reduce-scatters.
    """

    gathered: int
    reduced: int

    def received(self, size: int) -> float:
        """Bytes that a process receives from the others."""
        return (self.gathered + self.reduced) * (size - 1) / size


def _numbers(parameter: Tensor, size: int) -> int:
    """Numbers of a parameter, with the rows that make it divisible by the number of processes."""
    rows = -(-parameter.shape[0] // size) * size
    return rows * (parameter.numel() // max(parameter.shape[0], 1))


def _gathered(parameters: Iterable[Tensor], size: int, dtype: torch.dtype) -> int:
    return sum(
        _nf4_bytes(p) if isinstance(p, NF4Tensor) else _numbers(p, size) * dtype.itemsize for p in parameters
    )


def _nf4_bytes(weight: NF4Tensor) -> int:
    """Half a byte for a number, a byte for the scale of a block, and the scales of these."""
    parts = (weight.quantized_data, weight.quantized_scalers, weight.quantization_factor)
    return sum(part.nbytes for part in parts)


def own_numbers(model: nn.Module, size: int, *, trained: bool = False) -> int:
    """Numbers of plain weights that the first process holds.

    Args:
        model: not yet sharded.
        size: number of processes.
        trained: count those alone that are trained.
    """
    plain = (p for p in model.parameters() if not isinstance(p, NF4Tensor))
    return sum(_numbers(p, size) // size for p in plain if p.requires_grad or not trained)


def own_bytes(model: nn.Module, size: int, dtype: torch.dtype) -> int:
    """Bytes of all weights that the first process holds, in ``dtype`` where they are not quantised."""
    quantised = sum(_nf4_bytes(p) for p in model.parameters() if isinstance(p, NF4Tensor))
    return own_numbers(model, size) * dtype.itemsize + quantised // size


def step_traffic(
    policy: Groups,
    reference: Groups | None,
    trained: int,
    *,
    kl: bool,
    reduce_dtype: torch.dtype,
    micro_batches: int = 1,
) -> Traffic:
    """The traffic of a training step with ``fsdp_reshard_after_forward=true``, the default.

    A micro-batch gathers all weights of the policy for the forward pass and again for the backward pass, and those of the
    reference for its forward pass. Where a KL is needed, the root of a second model is gathered once more, because the head's
    backward pass needs its weight. Gradients are reduced once, after the last micro-batch. A few numbers, such as the gradient's
    norm, are left out.

    Args:
        policy: its weights.
        reference: those of a second model; None for the policy with its adapters switched off.
        trained: numbers of all trained weights.
        kl: whether the loss needs a KL.
        reduce_dtype: in which gradients are reduced: float32 with ``compute_dtype``, else that of the weights.
        micro_batches: of the step.
    """
    beside = policy.all if reference is None else reference.all + (reference.root if kl else 0)
    return Traffic(micro_batches * (2 * policy.all + beside), trained * reduce_dtype.itemsize)


@dataclass(frozen=True)
class Case:
    """A model and how it is trained.

    Args:
        name: of :data:`MODELS`.
        kind: of :data:`KINDS`.
    """

    name: str
    kind: str

    @property
    def config(self) -> TrainConfig:
        """The config of TDPO2 with this model."""
        prefix, keys = KINDS[self.kind]
        builder = f"model._component_=torchtune.models.{MODELS[self.name].format(prefix)}"
        words = [
            builder,
            *keys,
            "enable_activation_checkpointing=true",
            "head_memory_mb=1024",
            "optimizer.lr=1e-5",
        ]
        return read_config(TrainConfig, load_config(["--config", "tiny/tdpo", "device=cuda", *words]))


def _memory(case: Case) -> Iterator[list[str]]:
    """A row for each number of GPUs: GiB of one process."""
    config, world = case.config, single_process_world()
    maker = ModelMaker(config, world)
    model, dtype = maker.on_meta(), DTYPES[config.dtype]
    second = not maker.reference_is_base
    estimate = estimate_memory(
        config, maker, tokens=POSITIONS, device=world.device, world_size=1, reference=second
    )
    for size in GPUS:
        trained = own_numbers(model, size, trained=True)
        groups = Groups.of(model, size, torch.bfloat16)
        # A layer and the next one, which is gathered ahead, and the root of each model.
        whole = (
            groups.root * (2 if second else 1) + 2 * groups.largest if size > 1 or case.kind == "full" else 0
        )
        parts = [
            own_bytes(model, size, dtype),
            trained * dtype.itemsize,
            2 * trained * dtype.itemsize,
            own_bytes(model, size, torch.bfloat16) if second else 0,
            whole,
            estimate.activations + estimate.head,
        ]
        yield [case.name, case.kind, str(size), *(_gib(n) for n in (*parts, sum(parts)))]


def _gib(count: float) -> str:
    if not count:
        return "-"
    return f"{count / 2**30:.1f}" if count >= 0.05 * 2**30 else "<0.1"


def _communication(case: Case) -> Iterator[list[str]]:
    """A row for each number of GPUs above one: bytes, seconds, and the tokens from which computing takes longer."""
    config = case.config
    maker = ModelMaker(config, single_process_world())
    model = maker.on_meta()
    for size, link in LINKS.items():
        policy = Groups.of(model, size, torch.bfloat16)
        second = None if maker.reference_is_base else policy
        trained = own_numbers(model, size, trained=True) * size
        reduce_dtype = torch.float32 if config.compute_dtype else DTYPES[config.dtype]
        traffic = step_traffic(policy, second, trained, kl=True, reduce_dtype=reduce_dtype)
        sending, computing = traffic.received(size) / link, POSITIONS * _flops(case) / (MFU * PEAK)
        yield [
            case.name,
            case.kind,
            str(size),
            f"{traffic.gathered / 1e9:.1f}",
            f"{traffic.reduced / 1e9:.2f}",
            f"{sending:.3f}",
            f"{computing:.2f}",
            f"{sending / computing:.0%}",
            f"{POSITIONS * sending / computing:,.0f}",
        ]


def _flops(case: Case) -> float:
    """Operations for a token: 8 per weight, or 6 where the weights' own gradients are not computed."""
    build = Case(case.name, "full").config.model.build
    with torch.device("meta"):
        size = ModelSize.of(build())
    return (8 if case.kind == "full" else 6) * float(size.body + size.head)


def section() -> str:
    """The tables as Markdown."""
    cases = [Case(name, kind) for kind in KINDS for name in MODELS]
    memory = [row for case in cases for row in _memory(case)]
    communication = [row for case in cases for row in _communication(case)]
    head = [
        "model",
        "training",
        "GPUs",
        "weights",
        "gradients",
        "AdamW",
        "second model",
        "gathered at a time",
    ]
    head += ["activations and head", "all"]
    traffic = ["model", "training", "GPUs", "gathered GB", "reduced GB", "sending s", "computing s"]
    traffic += ["sending / computing", "equal at tokens per GPU"]
    return (
        "GiB of one process, TDPO2:\n\n"
        + tables.markdown(head, memory)
        + "\n\nOne step with one micro-batch, of one process:\n\n"
        + tables.markdown(traffic, communication)
    )


def main() -> None:
    """Print the tables, and write them into the page if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write-docs", action="store_true", help="write the tables into docs/scaling.md")
    given = parser.parse_args()
    text = section()
    print(text)
    if given.write_docs:
        page = PAGE.read_text(encoding="utf-8")
        before, _, rest = page.partition(BEGIN)
        _, _, after = rest.partition(END)
        PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
