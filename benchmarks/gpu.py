"""Training steps on a GPU: tokens a second, model FLOP utilisation and peak memory, by loss, head, precision and what is kept.

    python -m benchmarks.gpu --list                      # the cells
    python -m benchmarks.gpu --budget-s 540              # as many as begin within 9 minutes; again: those that are missing
    python -m benchmarks.gpu --only 8b float8            # cells whose name has both words
    python -m benchmarks.gpu --report-only --write-docs  # the page, from the cells that are there
    python -m benchmarks.gpu --tiny                      # a test of itself; chosen where there is no GPU

Nothing is downloaded: weights are random, in the shapes of Llama-3.2-1B and Llama-3.1-8B, and so are the tokens; time depends on
neither. Each cell runs in a process of its own, so that memory is its own too, and takes the library's own steps: a frozen
reference, clipping, fused AdamW, one process and one GPU. A cell that fails says so in the table. A cell whose expected memory
exceeds the card's memory is not run, and the table says that too. ``python -m benchmarks.gpu_drill`` is the shorter run, which
also checks numbers.

tokens/s credits all tokens of chosen and rejected answers, the prompt counted in both. Nothing is computed for padding, except
with full logits and unequal lengths. Model FLOPs are those that a step cannot do without, whatever is computed twice: with N
weights in the layers (embedding and head apart), a head of V x D, T positions (a prompt once for both answers) of which A are an
answer's,

    policy: 6 N T + 6 V D A        reference: 2 N T + 2 V D A, nothing if it is cached

The head is counted at the positions that are scored, for full logits too. Attention's own products are left out, which makes the
figures a little low. MFU is that over time and the GPU's dense bfloat16 peak, for float8 too, whose own peak has its own column;
a GPU whose peak is not in the table here has none.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchtune.models.llama3_1 import llama3_1_8b
from torchtune.models.llama3_2 import llama3_2_1b

from benchmarks import tables
from benchmarks.cpu.process import peak_mib, reset_peak, save, versions, wait
from tokenpref._torchtune import TransformerDecoder, set_default_dtype
from tokenpref.data import PairBatch, PairExample, collate_pairs
from tokenpref.distributed import World, init_world, load_full_state_dict, single_process_world
from tokenpref.losses import DPOLoss, PreferenceLoss, TISDPOLoss, TokenDPOLoss
from tokenpref.models import tiny_llama
from tokenpref.models.float8 import Float8
from tokenpref.models.reference import KL_STATISTICS, FrozenReference, Reference, ReferenceOutput
from tokenpref.models.scoring import ScoringModel, logits_of
from tokenpref.ops import AnswerRows, token_stats_from_logits
from tokenpref.stats import TokenStats
from tokenpref.training.config.command_line import load_config
from tokenpref.training.config.compute import Compute
from tokenpref.training.config.fields import read_config
from tokenpref.training.config.keys import TrainConfig
from tokenpref.training.loading.models import ModelMaker, place_decoder
from tokenpref.training.loading.preflight import estimate_memory
from tokenpref.training.step.pair_loss import BatchWeights, no_weights
from tokenpref.training.step.train_step import train_step
from tokenpref.weights import TransformedWeights

__all__ = [
    "PEAKS",
    "Cell",
    "ModelSize",
    "Training",
    "measure",
    "model_flops",
    "needed_gib",
    "peak_flops",
    "scorer",
    "seconds_of",
    "table",
]

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "results" / "gpu_steps.md"
RESULTS = ROOT / "outputs" / "bench" / "gpu.json"

PEAKS: dict[str, tuple[float, float | None]] = {
    "H100 PCIe": (756e12, 1513e12),
    "H100": (989e12, 1979e12),
    "H200": (989e12, 1979e12),
    "GH200": (989e12, 1979e12),
    "L40S": (362e12, 733e12),
    "A100": (312e12, None),
}
"""Dense peak in FLOP/s by a part of the device's name, the first that fits: bfloat16, and float8 where it has it."""

MODELS: dict[str, Any] = {"1b": llama3_2_1b, "8b": llama3_1_8b, "tiny": partial(tiny_llama, max_seq_len=64)}
LOSSES: dict[str, Any] = {
    "dpo": DPOLoss,
    "tdpo2": TokenDPOLoss,
    "tis_dpo": TISDPOLoss,
}
PRECISIONS = ("bf16", "mixed", "float8", "float8_rowwise")
KEPT = ("all", "selective", "full", "offload")
COMPONENTS = {
    "1b": "torchtune.models.llama3_2.llama3_2_1b",
    "8b": "torchtune.models.llama3_1.llama3_1_8b",
    "tiny": "tokenpref.models.tiny_llama",
}
UNEQUAL = {"prompt": (130, 0.9, 16, 1024), "answer": (55, 0.8, 4, 512)}
"""Unequal lengths are drawn log-normally: median, sigma, least and most tokens. They resemble those of dialogues such as HH."""
TINY_UNEQUAL = {"prompt": (8, 0.6, 2, 24), "answer": (12, 0.6, 2, 32)}


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Args:
        model: of ``MODELS``.
        loss: of ``LOSSES``.
        precision: "bf16": weights and arithmetic; "mixed": float32 weights, bfloat16 arithmetic (FSDP2 on one GPU); "float8" and
            "float8_rowwise": bfloat16 weights, float8 products in the layers.
        head: "fused": token statistics from hidden states; "full": from the logits of all positions.
        kept: activations for the backward: "all", "selective" (every second layer's), "full" (inputs of layers), "offload" (these
            on the CPU).
        compiled: every layer by ``torch.compile``.
        pairs: of a step.
        prompt: its tokens (equal lengths).
        answer: tokens of each answer (equal lengths).
        lengths: "equal", or "unequal": drawn anew for every pair, see :data:`UNEQUAL`.
        reference: "model", or "cached": its log-probabilities are computed before the first step, by the policy, which equals it
            there. No loss with a KL can use them.
    """

    model: str
    loss: str = "dpo"
    precision: str = "bf16"
    head: str = "fused"
    kept: str = "all"
    compiled: bool = False
    pairs: int = 8
    prompt: int = 128
    answer: int = 384
    lengths: str = "equal"
    reference: str = "model"

    @property
    def name(self) -> str:
        """Everything but the sizes of the batch."""
        words = [self.model, self.loss, self.precision, f"{self.head} head", f"keeps {self.kept}"]
        words += ["unequal lengths"] if self.lengths == "unequal" else []
        words += ["cached reference"] if self.reference == "cached" else []
        return ", ".join([*words, "compiled" if self.compiled else "eager"])

    def sizes(self, step: int = 0) -> list[tuple[int, int, int]]:
        """Tokens of prompt, chosen and rejected of a step's pairs."""
        if self.lengths == "equal":
            return [(self.prompt, self.answer, self.answer)] * self.pairs
        rng = random.Random(step)
        drawn = TINY_UNEQUAL if self.model == "tiny" else UNEQUAL

        def draw(part: str) -> int:
            median, sigma, least, most = drawn[part]
            return int(min(max(rng.lognormvariate(math.log(median), sigma), least), most))

        return [(draw("prompt"), draw("answer"), draw("answer")) for _ in range(self.pairs)]

    def tokens(self, step: int = 0) -> int:
        """Of a step."""
        return sum(2 * prompt + chosen + rejected for prompt, chosen, rejected in self.sizes(step))

    def positions(self, step: int = 0) -> int:
        """Of a step's tokens, those that are computed: a prompt once for both answers."""
        return sum(map(sum, self.sizes(step)))

    def overrides(self) -> list[str]:
        """The keys of a recipe with these settings."""
        float8 = {"float8": "tensorwise", "float8_rowwise": "rowwise"}.get(self.precision)
        keys = ["dtype=fp32", "compute_dtype=bf16"] if self.precision == "mixed" else ["dtype=bf16"]
        keys += ["device=cuda", "optimizer.lr=1e-4", "optimizer.fused=true"]
        if float8 is not None:
            keys += ["enable_fp8_training=true", f"fp8_recipe_name={float8}"]
        if self.kept != "all":
            keys.append("enable_activation_checkpointing=true")
        if self.kept == "selective":
            keys += ["ac_mode=selective", "ac_option=2"]
        if self.kept == "offload":
            keys.append("enable_activation_offloading=true")
        return keys

    def compute(self, *, trainable: bool, emulate: bool) -> Compute:
        """How policy or reference compute, as a recipe with these settings would have it."""
        recipe = {"float8": "tensorwise", "float8_rowwise": "rowwise"}.get(self.precision)
        float8 = None if recipe is None else Float8(recipe, emulate)
        if not trainable:
            return Compute(dtype=torch.bfloat16, float8=float8)
        mixed = self.precision == "mixed"
        return Compute(
            dtype=torch.float32 if mixed else torch.bfloat16,
            compute_dtype=torch.bfloat16 if mixed else None,
            float8=float8,
            checkpoint_every={"all": None, "selective": 2}.get(self.kept, 1),
            offload=self.kept == "offload",
        )


def plan() -> list[Cell]:
    """What the page shows; the cells that tell most come first."""
    cells = []
    for model in ("1b", "8b"):
        cell = partial(Cell, model, compiled=True, kept="all" if model == "1b" else "full")
        cells += [
            cell(),
            cell(precision="float8"),
            cell(loss="tdpo2"),
            cell(lengths="unequal", pairs=16),
            cell(loss="tdpo2", lengths="unequal", pairs=16),
            cell(loss="tis_dpo"),
            cell(head="full"),
            cell(loss="tdpo2", head="full"),
            cell(precision="float8_rowwise"),
        ]
    # With a second model, 8B does not fit into the 80 GB of an H100.
    cached = partial(Cell, "8b", compiled=True, kept="full", reference="cached")
    cells += [cached(), cached(precision="float8"), cached(lengths="unequal", pairs=16)]
    small, large = partial(Cell, "1b"), partial(Cell, "8b")
    cells += [small(), small(precision="float8"), small(precision="mixed", compiled=True)]
    cells += [small(kept=kept, compiled=True) for kept in ("selective", "full", "offload")]
    cells += [
        large(kept="full"),
        large(kept="selective", compiled=True),
        large(kept="offload", compiled=True),
    ]
    cells += [large(kept="all", compiled=True), large(kept="full", precision="mixed", compiled=True)]
    return cells


def tiny_plan() -> list[Cell]:
    """Every choice once that a CPU has, on a model of two layers."""
    cell = partial(Cell, "tiny", pairs=2, prompt=8, answer=24)
    return [
        cell(),
        cell(loss="tdpo2", head="full", kept="selective"),
        cell(loss="tis_dpo", precision="float8", kept="full"),
        cell(loss="tdpo2", precision="float8_rowwise"),
        cell(precision="mixed", head="full"),
        cell(loss="tdpo2", lengths="unequal", pairs=4),
        cell(reference="cached"),
    ]


# --- one cell, in a process of its own ------------------------------------------------------------------------------


class FullLogits(ScoringModel):
    """The head that the fused one is compared with: logits of all positions, then their statistics."""

    def token_stats(
        self,
        tokens: Tensor,
        labels: Tensor,
        *,
        needs: frozenset[str],
        ref_logps: Tensor | None = None,
        ref_hidden: Tensor | None = None,
        ref_head_weight: Tensor | None = None,
        weights: Tensor | None = None,
        sides: int = 1,
    ) -> TokenStats:
        """See :class:`tokenpref.models.scoring.ScoringModel`; padded, and what rows share is computed for each."""
        logits = logits_of(self.model, tokens)
        ref_logits = None
        if ref_hidden is not None:
            with torch.no_grad():
                scored = F.linear(ref_hidden, ref_head_weight)
                ref_logits = torch.zeros_like(logits, dtype=scored.dtype).flatten(0, 1)
                ref_logits = ref_logits.index_copy(0, AnswerRows.of(labels).index, scored).view_as(logits)
        return token_stats_from_logits(
            logits, ref_logits, labels, weights=weights, needs=needs, ref_logps=ref_logps
        )


@dataclass(frozen=True)
class ModelSize:
    """What the FLOPs depend on.

    Args:
        body: weights of the layers' matrices, N.
        head: V x D.
        total: all parameters, a tied head counted once.
    """

    body: int
    head: int
    total: int

    @classmethod
    def of(cls, model: TransformerDecoder) -> ModelSize:
        """Of a decoder, on the meta device or not."""
        body = sum(p.numel() for p in model.layers.parameters() if p.dim() == 2)
        embedding = model.tok_embeddings
        head = embedding.num_embeddings * embedding.embedding_dim
        return cls(body, head, sum(p.numel() for p in model.parameters()))


def model_flops(size: ModelSize, cell: Cell, step: int = 0) -> float:
    """Operations that a step of a cell needs; see the module."""
    answers = sum(chosen + rejected for _, chosen, rejected in cell.sizes(step))
    times = 6 + (2 if cell.reference == "model" else 0)
    return times * (float(size.body) * cell.positions(step) + float(size.head) * answers)


def needed_gib(cell: Cell) -> float:
    """The memory that a step of a cell should need, in GiB: what ``dry_run=true`` prints, and what full logits take on top.

    The allocator's waste is not counted.
    """
    model = [f"model._component_={COMPONENTS[cell.model]}"]
    config = read_config(TrainConfig, load_config(["--config", "tiny/tdpo", *model, *cell.overrides()]))
    world = single_process_world()
    tokens = max(cell.positions(step) if cell.head == "fused" else cell.tokens(step) for step in range(3))
    maker = ModelMaker(config, world)
    estimate = estimate_memory(
        config, maker, tokens=tokens, device=world.device, world_size=1, reference=cell.reference == "model"
    )
    total = estimate.total
    if cell.head == "full":
        # Logits of both models and two tensors of their size, in float32.
        total += 4 * tokens * maker.vocabulary * 4 - estimate.head
    return total / 2**30


def peak_flops(device: str) -> tuple[float | None, float | None]:
    """The dense peaks of a device by its name: bfloat16, float8."""
    return next((peaks for name, peaks in PEAKS.items() if name in device), (None, None))


def measure(cell: Cell, steps: int, warmup: int, device: str) -> dict[str, Any]:
    """Take steps and return what was measured.

    Args:
        cell: what.
        steps: timed ones.
        warmup: steps before them, compilation included.
        device: "cuda" or "cpu".

    Returns:
        Seconds of the timed steps, the mean of their tokens and model FLOPs, the peak in GiB over all steps (allocated on the
        GPU, models included; resident on the CPU), losses, device and versions.
    """
    world = init_world(device, process_group=cell.precision == "mixed")
    try:
        return _measure(cell, steps, warmup, world)
    finally:
        world.close()


def _measure(cell: Cell, steps: int, warmup: int, world: World) -> dict[str, Any]:
    training = Training(cell, world, steps=warmup + steps)
    for step in range(warmup + steps):
        training.step(step)
    return training.found(warmup)


class Beforehand:
    """A reference whose log-probabilities are known.

    Args:
        scorer: what they are computed with, before it is trained.
        batches: all that will be asked for.
    """

    provides: frozenset[str] = frozenset({"ref"})

    def __init__(self, scorer: ScoringModel, batches: Sequence[PairBatch]) -> None:
        self._known = {tuple(b.rows): scorer.logps(b.tokens, b.labels, sides=2) for b in batches}

    @contextmanager
    def outputs(self, batch: PairBatch, needs: frozenset[str]) -> Iterator[ReferenceOutput]:
        """See :class:`tokenpref.models.reference.Reference`."""
        if missing := needs & KL_STATISTICS:
            raise ValueError(f"{sorted(missing)} need a reference that is a model")
        yield ReferenceOutput(logps=self._known[tuple(batch.rows)])


class Training:
    """Policy, reference, loss and optimizer of a cell, and what its steps have taken so far.

    Args:
        cell: what is trained.
        world: the run's processes.
        steps: that a cached reference is computed for.
    """

    def __init__(self, cell: Cell, world: World, *, steps: int = 0) -> None:
        self.cell, self.world = cell, world
        with torch.device("meta"):
            self.size = ModelSize.of(MODELS[cell.model]())
        self.policy = scorer(cell, world, trainable=True)
        self.reference: Reference = (
            FrozenReference(scorer(cell, world, trainable=False))
            if cell.reference == "model"
            else Beforehand(self.policy, [self._batch(step) for step in range(steps)])
        )
        self.loss: PreferenceLoss = LOSSES[cell.loss]()
        self.optimizer = torch.optim.AdamW(self.policy.model.parameters(), lr=1e-5, fused=True)
        self.seconds: list[float] = []
        self.losses: list[float] = []
        reset_peak(world.device.type)

    def _batch(self, step: int) -> PairBatch:
        vocabulary = self.policy.model.tok_embeddings.num_embeddings
        return pairs_of(self.cell, step, vocabulary).to(self.world.device)

    def step(self, step: int) -> float:
        """Take the step of this number, from 0, and return its seconds."""
        weigh: BatchWeights = _random_weights if "weights" in self.loss.needs else no_weights
        batch = self._batch(step)
        wait(self.world.device.type)
        start = time.perf_counter()
        result = train_step(
            self.policy,
            self.reference,
            self.loss,
            self.optimizer,
            [batch],
            self.world,
            step=step + 1,
            needs=self.loss.needs,
            weigh=weigh,
            clip_grad_norm=1.0,
        )
        wait(self.world.device.type)
        seconds = time.perf_counter() - start
        self.seconds.append(seconds)
        self.losses.append(result.sums.reduce(self.world)["loss"])
        assert result.tokens == self.cell.tokens(step)  # padding is not counted
        return seconds

    def found(self, warmup: int) -> dict[str, Any]:
        """What was measured, see :func:`measure`; the first ``warmup`` steps are not timed."""
        timed = range(warmup, len(self.seconds))
        return {
            "step_s": self.seconds[warmup:],
            "warmup_s": self.seconds[:warmup],
            "tokens": statistics.mean(self.cell.tokens(step) for step in timed),
            "flops": statistics.mean(model_flops(self.size, self.cell, step) for step in timed),
            "peak_gib": peak_mib(self.world.device.type) / 1024,
            "losses": self.losses,
            "parameters": self.size.total,
            "device": torch.cuda.get_device_name() if self.world.device.type == "cuda" else "CPU",
            "versions": versions("tokenpref", "torch", "torchtune", "torchao"),
        }


def scorer(cell: Cell, world: World, *, trainable: bool) -> ScoringModel:
    """Policy or reference of a cell, of the same random weights."""
    compute = cell.compute(trainable=trainable, emulate=world.device.type != "cuda")
    with set_default_dtype(compute.dtype), torch.device("meta"):
        decoder: TransformerDecoder = MODELS[cell.model]()
    shapes = {name: tensor.shape for name, tensor in decoder.state_dict().items()}
    place_decoder(decoder, compute, world, trainable=trainable, compiled=cell.compiled)
    # In bfloat16 for both, so that float32 weights are the same.
    load_full_state_dict(decoder, _random_state(shapes, world.device), world)
    # Both models alike: in bfloat16 padded and unpadded forwards round differently.
    return ScoringModel(decoder) if cell.head == "fused" else FullLogits(decoder, padding_free=False)


def _random_state(shapes: Mapping[str, torch.Size], device: torch.device) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        tensor = torch.ones(shape, dtype=torch.bfloat16, device=device)
        state[name] = tensor.normal_(0, 0.02, generator=generator) if len(shape) == 2 else tensor
    return state


def pairs_of(cell: Cell, step: int, vocabulary: int) -> PairBatch:
    """The pairs of a step, of random tokens."""
    generator = torch.Generator().manual_seed(step)

    def draw(count: int) -> list[int]:
        return torch.randint(3, vocabulary, (count,), generator=generator).tolist()

    examples = []
    for row, (length, *answers) in enumerate(cell.sizes(step), start=step * cell.pairs):
        prompt = draw(length)
        chosen, rejected = (prompt + draw(answer) for answer in answers)
        examples.append(PairExample(row, chosen, length, rejected, length, [], [], False, False, ""))
    return collate_pairs(examples, pad_id=0)


def _random_weights(batch: PairBatch) -> TransformedWeights:
    mask = batch.labels[:, 1:] != -100
    generator = torch.Generator(mask.device).manual_seed(0)
    weights = 0.5 + torch.rand(mask.shape, device=mask.device, generator=generator)
    return TransformedWeights(torch.where(mask, weights, 0), torch.zeros_like(mask))


def _child(result: Path, settings: dict[str, Any]) -> None:
    """The process of a cell. What goes wrong otherwise ends it, and the parent reports that."""
    try:
        found = measure(Cell(**settings.pop("cell")), **settings)
    except torch.OutOfMemoryError:
        found = {"failed": "out of memory"}
    save(result, found)


# --- all cells ------------------------------------------------------------------------------------------------------


def run_cell(
    cell: Cell, results: Path, *, steps: int, warmup: int, device: str, timeout_s: float
) -> dict[str, Any]:
    """A cell's result, or why there is none, from a process of its own."""
    answer = results.with_suffix(".cell.json")
    answer.unlink(missing_ok=True)
    settings = json.dumps({"cell": asdict(cell), "steps": steps, "warmup": warmup, "device": device})
    command = [sys.executable, "-m", "benchmarks.gpu", "--cell", str(answer.absolute()), settings]
    with results.with_suffix(".log").open("a", encoding="utf-8") as log:
        log.write(f"\n$ {cell.name}\n")
        log.flush()
        begin = log.tell()
        try:
            code = subprocess.run(
                command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=timeout_s
            ).returncode
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {timeout_s:.0f} s"}
    if code == 0:
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        answer.unlink()
        return found
    said = results.with_suffix(".log").read_bytes()[begin:].decode("utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(said) if line.strip()), "nothing said")
    return {"failed": f"exit code {code}: {last[:160]}"}


def read_results(file: Path) -> list[dict[str, Any]]:
    """What was measured so far, each ``{"cell": ..., "steps": ..., "found": ...}``."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []


def run(cells: Sequence[Cell], file: Path, *, budget_s: float, again: bool, **settings: Any) -> None:
    """Measure what is missing and add it to the file, cell by cell.

    Args:
        cells: what to measure, in order.
        file: of results.
        budget_s: seconds after which no further cell is begun; the last one gets what is left.
        again: measure what is there already too, and what failed.
        settings: ``steps``, ``warmup`` and ``device``.
    """
    start = time.monotonic()
    file.parent.mkdir(parents=True, exist_ok=True)
    for cell in cells:
        results = read_results(file)
        if not again and any(r["cell"] == asdict(cell) for r in results):
            continue
        left = budget_s - (time.monotonic() - start)
        if left <= 0:
            print("no time is left; run it again for the rest", flush=True)
            return
        found = _too_large(cell, settings["device"]) or run_cell(
            cell, file, timeout_s=min(left, 600.0), **settings
        )
        if "failed" in found and found["failed"].startswith("not done") and left < 600:
            print(f"{cell.name}: the time ended; run it again for the rest", flush=True)
            return
        kept = [r for r in results if r["cell"] != asdict(cell)]
        save(file, [*kept, {"cell": asdict(cell), "found": found}])
        print(line(cell, found), flush=True)


def _too_large(cell: Cell, device: str) -> dict[str, Any] | None:
    """Why a cell is not run on this card; None if it should fit."""
    if device != "cuda":
        return None
    has, needs = torch.cuda.get_device_properties(0).total_memory / 2**30, needed_gib(cell)
    if needs <= has:
        return None
    return {"failed": f"not run: needs about {needs:.0f} GiB, the card has {has:.0f} GiB"}


def line(cell: Cell, found: Mapping[str, Any]) -> str:
    """A line for the terminal, as soon as a cell is done."""
    if "failed" in found:
        return f"{cell.name}: {found['failed']}"
    return (
        f"{cell.name}: {found['tokens'] / seconds_of(cell, found):.0f} tokens/s, {found['peak_gib']:.1f} GiB"
    )


def seconds_of(cell: Cell, found: Mapping[str, Any]) -> float:
    """Of a step: the median, or the mean where steps have different numbers of tokens."""
    seconds: float = (statistics.median if cell.lengths == "equal" else statistics.mean)(found["step_s"])
    return seconds


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """All cells, those that failed too, in the order of the plans."""
    head = ["model", "loss", "precision", "head", "activations kept", "layers", "lengths", "reference"]
    head += ["s/step", "tokens/s", "MFU"]
    head += ["of float8 peak", "peak GiB"]
    order = [asdict(cell) for cell in (*plan(), *tiny_plan())]
    place = {json.dumps(cell): index for index, cell in enumerate(order)}
    ranked = sorted(results, key=lambda r: place.get(json.dumps(r["cell"]), len(order)))
    return tables.markdown(head, [[*_about(Cell(**r["cell"])), *_cells(r)] for r in ranked])


def _about(cell: Cell) -> list[str]:
    layers = "compiled" if cell.compiled else "eager"
    return [cell.model, cell.loss, cell.precision, cell.head, cell.kept, layers, cell.lengths, cell.reference]


def _cells(result: Mapping[str, Any]) -> Iterator[str]:
    found = result["found"]
    if "failed" in found:
        yield from (found["failed"], "-", "-", "-", "-")
        return
    seconds = seconds_of(Cell(**result["cell"]), found)
    peaks = peak_flops(found["device"])
    if not result["cell"]["precision"].startswith("float8"):
        peaks = peaks[0], None
    yield f"{seconds:.3f}"
    yield f"{found['tokens'] / seconds:.0f}"
    for peak in peaks:
        yield "-" if peak is None else f"{found['flops'] / seconds / peak:.1%}"
    yield f"{found['peak_gib']:.1f}"


def page(results: Sequence[Mapping[str, Any]]) -> str:
    """The whole of docs/results/gpu_steps.md, with the names of the cells that were not measured.

    Raises:
        SystemExit: if no cell was measured, or not all on one kind of GPU and one set of versions.
    """
    good = [r["found"] for r in results if "failed" not in r["found"]]
    about = {(f["device"], json.dumps(f["versions"], sort_keys=True)) for f in good}
    if len(about) != 1 or good[0]["device"] == "CPU" or any(r["cell"]["model"] == "tiny" for r in results):
        raise SystemExit(
            "--write-docs: the page wants one GPU, one set of versions and no tiny model; name another --results"
        )
    missing = [c.name for c in plan() if not any(r["cell"] == asdict(c) for r in results)]
    cell, found = plan()[0], good[0]
    made = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    steps = statistics.median(len(f["step_s"]) for f in good)
    first = max(abs(f["losses"][0] - math.log(2)) for f in good)
    (prompt, spread, *_), (answer, *_) = UNEQUAL["prompt"], UNEQUAL["answer"]
    text = (
        "# Training steps on a GPU\n\n"
        "`python -m benchmarks.gpu` measured this page, and `--report-only --write-docs` wrote it. The first lines of that\n"
        f"module say what is counted. One {found['device']}, one process; {made}.\n"
        "Random weights in the shapes of Llama-3.2-1B (1b) and Llama-3.1-8B (8b), fused AdamW, clipping.\n"
        f"Equal lengths: {cell.pairs} pairs a step of {cell.prompt} prompt and {cell.answer} answer tokens. Unequal lengths are "
        f"log-normal: a median of {prompt} tokens\nfor prompts and {answer} for answers, sigma about {spread}. Median over "
        f"{steps:.0f} steps, for unequal lengths the mean. No first loss was further than "
        f"{first:.1g} from log 2.\n\n{table(results)}\n"
    )
    if missing:
        text += "\nNot measured: " + "; ".join(missing) + ".\n"
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tiny", action="store_true", help="two layers, whose figures mean nothing; without a GPU always"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], help="words that a cell's name must have, all of them"
    )
    parser.add_argument("--list", action="store_true", help="print the cells' names")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a cell")
    parser.add_argument("--warmup", type=int, default=3, help="steps before these")
    parser.add_argument(
        "--budget-s", type=float, default=math.inf, help="begin no cell after so many seconds"
    )
    parser.add_argument("--again", action="store_true", help="measure cells that are there already, too")
    parser.add_argument("--results", type=Path, default=RESULTS, help="results are added to this file")
    parser.add_argument("--report-only", action="store_true", help="measure nothing")
    parser.add_argument("--write-docs", action="store_true", help="write docs/results/gpu_steps.md")
    parser.add_argument("--cell", nargs=2, metavar=("RESULT", "SETTINGS"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.cell:
        _child(Path(given.cell[0]), json.loads(given.cell[1]))
        return
    tiny = given.tiny or not (torch.cuda.is_available() or given.report_only)
    cells = [
        cell for cell in (tiny_plan() if tiny else plan()) if all(word in cell.name for word in given.only)
    ]
    if given.list:
        print("\n".join(cell.name for cell in cells))
        return
    results: Path = given.results
    if tiny and results == RESULTS:
        results = RESULTS.with_name("gpu_tiny.json")
    if not given.report_only:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        run(
            cells,
            results,
            budget_s=given.budget_s,
            again=given.again,
            steps=given.steps,
            warmup=given.warmup,
            device=device,
        )
    found = read_results(results)
    if found:
        print("\n" + table(found))
    if given.write_docs:
        PAGE.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
