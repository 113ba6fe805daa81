"""Our process: the library's own step on a folder of work, with the parts that a recipe puts together.

python -m benchmarks.cpu.ours FOLDER RESULT.json '{"mode": "ref", "threads": 2}'
python -m benchmarks.cpu.ours FOLDER     # writes the adapter that LoRA starts from
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torchtune.models.llama3 import llama3, lora_llama3
from torchtune.models.llama3_2 import llama3_2, lora_llama3_2
from torchtune.modules import TransformerDecoder
from torchtune.training import FullModelHFCheckpointer

from benchmarks.cpu.process import StepClock, peak_mib, reset_peak, rss_mib, save, settled_mib, versions, wait
from benchmarks.cpu.work import (
    ADAPTER,
    LORA_ALPHA,
    LORA_RANK,
    LORA_TARGETS,
    NORM_EPS,
    ROPE_BASE,
    SPECIAL,
    Task,
    go_offline,
)
from tokenpref._torchtune import set_default_dtype
from tokenpref.data import PairBatch, PairExample, collate_pairs
from tokenpref.distributed import World, load_full_state_dict, single_process_world
from tokenpref.losses import DPOLoss, PreferenceLoss, TokenDPOLoss
from tokenpref.models.causal_lm import causal_lm
from tokenpref.models.causal_lm_checkpointer import CausalLMCheckpointer
from tokenpref.models.peft_format import AdapterLayout, write_adapter
from tokenpref.models.peft_reader import read_adapter
from tokenpref.models.reference import FrozenReference, Reference
from tokenpref.models.scoring import ScoringModel
from tokenpref.training.loading.models import choose_trainable, read_weights
from tokenpref.training.loading.reference_cache import ReferenceCache, cached_references
from tokenpref.training.step.pair_loss import no_weights
from tokenpref.training.step.train_step import train_step

__all__ = ["MODES", "measure", "write_first_adapter"]

PAD = SPECIAL["<pad>"]
FORWARD_ROUNDS = 3
"""How often each forward pass is timed by itself; the best time of each batch counts."""


def _decoder(folder: Path, *, lora: bool) -> TransformerDecoder:
    """torchtune's decoder of a task, with new adapters if ``lora``."""
    task = Task.read(folder)
    sizes = task.sizes
    plain, tied = (lora_llama3, lora_llama3_2) if lora else (llama3, llama3_2)
    build: Any = partial(tied, tie_word_embeddings=True, scale_factor=1) if sizes.tied else plain
    if lora:
        build = partial(build, list(LORA_TARGETS), lora_rank=LORA_RANK, lora_alpha=LORA_ALPHA)
    return build(
        vocab_size=sizes.vocab,
        num_layers=sizes.layers,
        num_heads=sizes.heads,
        num_kv_heads=sizes.kv_heads,
        embed_dim=sizes.width,
        intermediate_dim=sizes.mlp,
        max_seq_len=max(2048, task.length),
        rope_base=ROPE_BASE,
        norm_eps=NORM_EPS,
    )


def write_first_adapter(folder: Path) -> None:
    """Write the adapter that both sides start from, random A and zero B, in PEFT's format to ``folder/adapter``."""
    torch.manual_seed(1)
    decoder = _decoder(folder, lora=True)
    (folder / ADAPTER).mkdir(exist_ok=True)
    write_adapter(folder / ADAPTER, decoder.state_dict(), AdapterLayout.of(decoder))


def _model(folder: Path, *, trainable: bool, lora: bool = False, device: str = "cpu") -> ScoringModel:
    """The checkpoint, read as recipes read it; with ``lora`` below the adapters of ``folder/adapter``."""
    task = Task.read(folder)
    sizes = task.sizes
    with set_default_dtype(getattr(torch, task.dtype)), torch.device(device):
        decoder = _decoder(folder, lora=lora)
    with tempfile.TemporaryDirectory() as output:
        checkpointer = FullModelHFCheckpointer(
            checkpoint_dir=str(folder / "model"),
            checkpoint_files=["model.safetensors"],
            output_dir=output,
            model_type="LLAMA3_2" if sizes.tied else "LLAMA3",
        )
        state = read_weights(checkpointer, "checkpointer", single_process_world())
    if lora:
        state |= read_adapter(folder / ADAPTER, decoder, "adapter")
    decoder.load_state_dict(state)
    choose_trainable(decoder, trainable)
    decoder.train(trainable)
    return ScoringModel(decoder)


def _causal_lm(folder: Path, *, trainable: bool) -> ScoringModel:
    """The checkpoint as a model of transformers."""
    model = causal_lm(str(folder / "model"))
    with tempfile.TemporaryDirectory() as output:
        checkpointer = CausalLMCheckpointer(checkpoint_dir=str(folder / "model"), output_dir=output)
        world = single_process_world()
        load_full_state_dict(model, read_weights(checkpointer, "checkpointer", world), world)
    choose_trainable(model, trainable)
    model.train(trainable)
    return ScoringModel(model)


def _steps(folder: Path) -> list[list[PairExample]]:
    """The pairs of each step, in the order of the file."""
    task = Task.read(folder)
    examples = []
    for row, pair in enumerate(task.pairs(folder)):
        prompt, chosen, rejected = (pair[f"{part}_ids"] for part in ("prompt", "chosen", "rejected"))
        examples.append(
            PairExample(
                row=row,
                chosen_ids=prompt + chosen,
                chosen_start=len(prompt),
                rejected_ids=prompt + rejected,
                rejected_start=len(prompt),
                chosen_offsets=[],
                rejected_offsets=[],
                chosen_has_eos=True,
                rejected_has_eos=True,
                key="",
            )
        )
    return [examples[start : start + task.batch] for start in range(0, len(examples), task.batch)]


def _micro_batches(examples: Sequence[PairExample]) -> list[PairBatch]:
    """The micro-batches of a step. The one place for whatever the library does about lengths."""
    return [collate_pairs(examples, PAD)]


def _model_reference(_policy: ScoringModel, folder: Path, _kept: Path, world: World) -> Reference:
    """A second, frozen model beside the policy."""
    return FrozenReference(_model(folder, trainable=False, device=world.device.type))


def _causal_lm_reference(_policy: ScoringModel, folder: Path, _kept: Path, _world: World) -> Reference:
    """A second, frozen model of transformers beside the policy."""
    return FrozenReference(_causal_lm(folder, trainable=False))


def _base(policy: ScoringModel, _folder: Path, _kept: Path, _world: World) -> Reference:
    """The policy with its adapters switched off."""
    return FrozenReference(policy.base(), shares_head=True)


def _cached(kind: str) -> Callable[[ScoringModel, Path, Path, World], Reference]:
    """What the policy says of all pairs before its first step, on the disk in the folder ``kept``."""

    def make(policy: ScoringModel, folder: Path, kept: Path, world: World) -> Reference:
        task, examples = Task.read(folder), [pair for pairs in _steps(folder) for pair in pairs]
        cache = ReferenceCache.plan(
            "pairs", examples, folder=kept, kind=kind, job=lambda: vars(task), world=world
        )
        (reference,) = cached_references([cache], lambda: policy, world, batch_size=task.batch, pad_id=PAD)
        return reference

    return make


MODES: dict[str, tuple[Any, Any]] = {
    "ref": (DPOLoss, _model_reference),
    "lora": (DPOLoss, _base),
    "precompute": (DPOLoss, _cached("logps")),
    "tdpo2-ref": (TokenDPOLoss, _model_reference),
    "causal-lm-ref": (DPOLoss, _causal_lm_reference),
    "tdpo2-cached": (TokenDPOLoss, _cached("hidden")),
}
"""Loss and reference of each mode; what is computed beforehand happens in those whose reference is no model."""


def _forward_seconds(policy: ScoringModel, folder: Path, world: World) -> dict[str, float]:
    """Best seconds of one forward pass over all batches, for the three kinds that a training with adapters can be compared by.

    ``adapters_off`` is the reference: the policy without its adapters and without gradient. ``plain`` is a model that has no
    adapters, also without gradient. ``training`` is the policy's own forward pass, which keeps what its backward pass needs; its
    head is frozen, so nothing is kept for a gradient of the head.
    """
    base, plain = policy.base(), _model(folder, trainable=False, device=world.device.type)

    def scored(model: ScoringModel) -> Callable[[PairBatch], Any]:
        return lambda batch: model.logps(batch.tokens, batch.labels, sides=len(batch.sides))

    def training(batch: PairBatch) -> Any:
        return policy.token_stats(batch.tokens, batch.labels, needs=frozenset(), sides=len(batch.sides))

    forwards = {"adapters_off": scored(base), "plain": scored(plain), "training": training}
    batches = [batch.to(world.device) for pairs in _steps(folder) for batch in _micro_batches(pairs)]
    best = {name: [float("inf")] * len(batches) for name in forwards}
    for _ in range(FORWARD_ROUNDS):
        for number, batch in enumerate(batches):
            for name, forward in forwards.items():
                wait(world.device.type)
                start = time.perf_counter()
                forward(batch)
                wait(world.device.type)
                best[name][number] = min(best[name][number], time.perf_counter() - start)
    return {name: sum(seconds) for name, seconds in best.items()}


def measure(
    folder: Path, mode: str, threads: int = 2, fused_adamw: bool = False, device: str = "cpu"
) -> dict[str, Any]:
    """Train and return what was measured; a cached reference lies in a folder that is gone afterwards.

    Args:
        folder: of :func:`benchmarks.cpu.work.write`.
        mode: of :data:`MODES`.
        threads: of torch.
        fused_adamw: update all parameters in one call.
        device: "cpu" or "cuda", whose memory is then reported.

    Returns:
        The entries of :func:`benchmarks.cpu.peer.measure`. With adapters also ``forward_s``, see :func:`_forward_seconds`.
    """
    go_offline(device)
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as kept:
        return _measure(folder, Path(kept), mode, fused_adamw, device)


def _measure(folder: Path, kept: Path, mode: str, fused_adamw: bool, device: str) -> dict[str, Any]:
    task, world = Task.read(folder), single_process_world(device)
    make_loss, make_reference = MODES[mode]
    loss: PreferenceLoss = make_loss(beta=task.beta)
    if mode == "causal-lm-ref":
        policy = _causal_lm(folder, trainable=True)
    else:
        policy = _model(folder, trainable=True, lora=mode == "lora", device=device)
    memory: dict[str, float] = {}
    precompute_s = None
    if make_reference in (_model_reference, _causal_lm_reference, _base):
        reference = make_reference(policy, folder, kept, world)
        memory["loaded"] = settled_mib(device)
    else:
        memory["loaded"] = settled_mib(device)
        reset_peak(device)
        start = time.perf_counter()
        reference = make_reference(policy, folder, kept, world)
        precompute_s = time.perf_counter() - start
        memory["precompute_peak"] = peak_mib(device)
    optimizer = torch.optim.AdamW(
        policy.trainable_parameters(), lr=task.lr, weight_decay=0.0, fused=True if fused_adamw else None
    )
    clock, losses = StepClock(device), []
    memory["before"] = settled_mib(device) if device == "cuda" else rss_mib()
    reset_peak(device)
    for step, pairs in enumerate(_steps(folder), 1):
        clock.begin()
        result = train_step(
            policy,
            reference,
            loss,
            optimizer,
            [batch.to(world.device) for batch in _micro_batches(pairs)],
            world,
            step=step,
            needs=loss.needs,
            weigh=no_weights,
        )
        clock.end()
        losses.append(result.sums.reduce(world)["loss"])
    memory["peak"] = peak_mib(device)
    tokens, answers = task.tokens(folder)
    forwards = {"forward_s": _forward_seconds(policy, folder, world)} if mode == "lora" else {}
    return {
        **forwards,
        **clock.summary(tokens, task.warmup),
        "losses": losses,
        "memory_mib": memory,
        "precompute_s": precompute_s,
        "tokens": tokens,
        "answer_tokens": answers,
        "versions": versions("tokenpref", "torch", "torchtune", "torchao", "transformers"),
    }


if __name__ == "__main__" and len(sys.argv) == 2:
    write_first_adapter(Path(sys.argv[1]))
elif __name__ == "__main__":
    save(Path(sys.argv[2]), measure(Path(sys.argv[1]), **json.loads(sys.argv[3])))
