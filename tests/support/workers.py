"""Functions that spawned ranks run; they must be importable by name."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from support import evaluating, families, small
from tokenpref.data import PairBatch, building, preference_dataset
from tokenpref.distributed import (
    World,
    full_state_dict,
    load_full_state_dict,
    load_sharded,
    refresh_float8_scales,
    shard,
    sharded_state,
    write_sharded,
)
from tokenpref.distributed.world import end_threads
from tokenpref.errors import TokenprefError
from tokenpref.losses import TokenDPOLoss
from tokenpref.models.adapters import adapter_state
from tokenpref.models.float8 import Float8, convert_to_float8
from tokenpref.models.generation import sample
from tokenpref.models.reference import FrozenReference, NoReference, Reference
from tokenpref.models.scoring import ScoringModel
from tokenpref.training import PreferenceTrainer, TripletTrainer, WeightedTrainer
from tokenpref.training.config.command_line import load_config
from tokenpref.training.config.compute import Compute
from tokenpref.training.credit.anchors import AnchorSampler
from tokenpref.training.credit.attribution import Attribution
from tokenpref.training.credit.live import LiveModels, RefreshedScores
from tokenpref.training.loading.models import place_decoder
from tokenpref.training.loading.reference_cache import ReferenceCache, cached_references
from tokenpref.training.step.train_step import StepResult, no_anchors, train_step
from tokenpref.weights.attribution import AnswerLogp


def _step(
    scorer: ScoringModel,
    reference: Reference,
    loss: Any,
    optimizer: torch.optim.Optimizer,
    batches: list[PairBatch],
    world: World,
    number: int,
    **kwargs: Any,
) -> StepResult:
    """One step with the weights and anchors that the loss needs."""
    return train_step(
        scorer,
        reference,
        loss,
        optimizer,
        batches,
        world,
        step=number,
        needs=loss.needs,
        weigh=small.weights if "weights" in loss.needs else lambda batch: None,
        anchor=small.anchors if "anchor" in loss.needs else no_anchors,
        **kwargs,
    )


def one_step(
    world: World, loss: Any, split: list[list[list[int]]], tied: bool, reshard: bool = True, steps: int = 1
) -> dict[str, Any]:
    """Train on this rank's share and return the whole weights, the norm and the reduced metrics.

    Args:
        world: the rank's world.
        loss: a loss module.
        split: ``split[rank][micro]`` lists the rows of a micro-batch; an empty list is a filler.
        tied: tied embeddings.
        reshard: FSDP2's ``reshard_after_forward``.
        steps: number of optimizer steps on the same rows.
    """
    policy, frozen = small.decoder(0, tied=tied), small.decoder(1, tied=tied)
    frozen.requires_grad_(False)
    for model in (policy, frozen):
        shard(model, list(model.layers), world, reshard_after_forward=reshard)
    scorer = ScoringModel(policy, head_memory_mb=0.002)
    reference = FrozenReference(ScoringModel(frozen, head_memory_mb=0.002))
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    batches = [small.batch(rows, filler=not rows) for rows in split[world.rank]]
    for number in range(1, steps + 1):
        result = _step(scorer, reference, loss, optimizer, batches, world, number, clip_grad_norm=1.0)
    metrics = result.sums.reduce(world)
    state = full_state_dict(policy, world)
    return {
        "state": {name: tensor.numpy() for name, tensor in state.items()},
        "norm": result.grad_norm,
        "metrics": metrics,
        "pairs": result.pairs,
        "tokens": result.tokens,
    }


def cached_step(
    world: World, folder: str, kind: str, loss: Any, split: list[list[list[int]]], rows: list[int]
) -> dict[str, Any]:
    """Two steps on this rank's share with a cached reference, which is built first where it is missing.

    Args:
        world: the rank's world.
        folder: of the caches.
        kind: what the cache keeps.
        loss: a loss module.
        split: as for :func:`one_step`.
        rows: of the whole data set.
    """
    policy = small.decoder(0)
    shard(policy, list(policy.layers), world)
    forwards: list[int] = []
    loaded: list[Any] = []

    def load() -> ScoringModel:
        frozen = small.decoder(1)
        frozen.requires_grad_(False)
        frozen.norm.register_forward_hook(lambda *_: forwards.append(1))
        shard(frozen, list(frozen.layers), world)
        loaded.append(weakref.ref(frozen))
        return ScoringModel(frozen, head_memory_mb=0.002)

    cache = ReferenceCache.plan(
        "dataset",
        [small.example(row) for row in rows],
        folder=Path(folder),
        kind=kind,
        job=lambda: {"model": "small"},
        world=world,
    )
    (reference,) = cached_references([cache], load, world, batch_size=3, pad_id=0)
    alive = sum(model() is not None for model in loaded)
    scorer = ScoringModel(policy, head_memory_mb=0.002)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    batches = [small.batch(rows, filler=not rows) for rows in split[world.rank]]
    losses = []
    for number in (1, 2):
        result = _step(scorer, reference, loss, optimizer, batches, world, number)
        losses.append(result.sums.reduce(world)["loss"])
    state = full_state_dict(policy, world)
    return {
        "losses": losses,
        "forwards": len(forwards),
        "alive": alive,
        "state": {name: tensor.numpy() for name, tensor in state.items()},
    }


def collectives(world: World) -> dict[str, Any]:
    """What each collective of a world gives on this rank."""
    values = {
        "sum": world.sum(torch.tensor([1.0, float(world.rank)])).tolist(),
        "any": world.any(world.rank == 1),
        "none": world.any(False),
        "max": world.max(10 * world.rank),
        "broadcast": world.broadcast_object({"from": world.rank}),
        "gather": world.gather_objects(world.rank * 2),
    }
    try:
        world.together(lambda: 1 / (1 - world.rank))
    except ZeroDivisionError:
        values["together"] = "own error"
    except TokenprefError as error:
        values["together"] = str(error)
    return values


def threads_of_groups(world: World, loss: Any) -> tuple[int, int]:
    """How many threads process groups have after a step, and after the run has left them."""

    def count() -> int:
        names = (file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm"))
        return sum("gloo" in name for name in names)

    one_step(world, loss, [[[0]], [[1]]], tied=True)
    other = world.aside()
    assert other.gather_objects(world.rank) == [0, 1]
    running = count()
    del other
    world.close()
    end_threads()
    return running, count()


def nan_on_one_rank(world: World, loss: Any) -> str:
    """The error that each rank raises when rank 1 alone has a bad pair, and whether weights moved."""
    policy, frozen = small.decoder(0), small.decoder(1)
    frozen.requires_grad_(False)
    for model in (policy, frozen):
        shard(model, list(model.layers), world)
    scorer = ScoringModel(policy)
    reference = FrozenReference(ScoringModel(frozen))
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)

    def spoiled(pair: Any) -> Any:
        output = loss(pair)
        return replace(output, losses=output.losses * (float("nan") if world.rank == 1 else 1.0))

    before = {name: tensor.clone() for name, tensor in full_state_dict(policy, world).items()}
    try:
        train_step(
            scorer,
            reference,
            spoiled,
            optimizer,
            [small.batch([world.rank])],
            world,
            step=7,
            needs=loss.needs,
            weigh=lambda batch: None,
        )
    except TokenprefError as error:
        after = full_state_dict(policy, world)
        moved = any(not torch.equal(before[name], after[name]) for name in before)
        return f"{'moved' if moved else 'unmoved'}: {error}"
    return "no error"


def save_and_load(world: World, folder: str, load: bool) -> dict[str, Any]:
    """Write (or read) model and AdamW state in ``folder``; returns the whole weights after one more step."""
    model = small.decoder(0 if not load else 5)
    shard(model, list(model.layers), world)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    tokens = small.batch([0, 1]).tokens

    def step() -> None:
        model(tokens)[..., :7].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    if not load:
        step()
        write_sharded(Path(folder), sharded_state(model, optimizer), world)
    else:
        load_sharded(Path(folder), model, optimizer)
    step()
    return {name: tensor.numpy() for name, tensor in full_state_dict(model, world).items()}


class OnDemand(Mapping[str, torch.Tensor]):
    """Tensors that are made when they are looked up, as a checkpoint's are read.

    Args:
        tensors: the values.
        broken: name of a tensor that cannot be read.

    Attributes:
        most: the largest number of looked up tensors that existed at a time.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], broken: str | None = None) -> None:
        self._tensors, self._broken = tensors, broken
        self._alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
        self.most = 0

    def __getitem__(self, name: str) -> torch.Tensor:
        if name == self._broken:
            raise OSError(f"{name} cannot be read")
        tensor = self._tensors[name].clone()
        self._alive.add(tensor)
        self.most = max(self.most, len(self._alive))
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def filled_on_demand(world: World) -> dict[str, Any]:
    """Fill a decoder with a buffer and with rows that two ranks do not share evenly; return what it holds, and the refusals."""
    model = small.decoder(1)
    model.layers[0].odd = torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
    model.register_buffer("counts", torch.zeros(2, dtype=torch.int64))
    tensors = {
        **small.decoder(2).state_dict(),
        "layers.0.odd": torch.arange(6.0).view(3, 2),
        "counts": torch.tensor([3, 4]),
    }
    shard(model, list(model.layers), world)
    # Afterwards the root's parameters are gathered, and its shards are what counts.
    ScoringModel(model).hidden(small.batch([0]).tokens)
    state = OnDemand(tensors if world.is_main else {})
    load_full_state_dict(model, state, world)
    held = {name: tensor.numpy().copy() for name, tensor in full_state_dict(model, world).items()}
    refusals = []
    changes: list[tuple[str, torch.Tensor | None]] = [
        ("norm.scale", None), ("more", torch.ones(1)), ("norm.scale", torch.ones(3)),
    ]  # fmt: skip
    for name, tensor in changes:
        changed = {key: value for key, value in {**tensors, name: tensor}.items() if value is not None}
        refusals.append(_refusal(model, OnDemand(changed), world))
    refusals.append(_refusal(model, OnDemand(tensors, broken="layers.0.odd"), world))
    return {"held": held, "most": state.most, "refusals": refusals}


def _refusal(model: torch.nn.Module, state: Mapping[str, torch.Tensor], world: World) -> str:
    try:
        load_full_state_dict(model, state, world)
    except (RuntimeError, OSError, TokenprefError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def attribution(world: World, split: list[list[list[int]]], tied: bool) -> dict[str, Any]:
    """Attribution weights of this rank's rows, batch by batch, with gradients of a backward before them.

    Args:
        world: the rank's world.
        split: ``split[rank][batch]`` lists the rows of a batch; an empty list is a filler.
        tied: tied embeddings.
    """
    policy = small.decoder(0, tied=tied)
    shard(policy, list(policy.layers), world)
    scorer = ScoringModel(policy, head_memory_mb=0.002)
    other = small.batch([5, 6])
    scorer.token_stats(other.tokens, other.labels, needs=frozenset()).policy_logps.sum().backward()
    before = [p.grad.to_local().clone() for p in policy.parameters() if p.grad is not None]
    source = RefreshedScores(Attribution(AnswerLogp(), refresh="once"))
    models = LiveModels(scorer, NoReference(), world, pad_id=0, eos_id=1, step=0)
    found: dict[int, list[list[float]]] = {}
    for _ in range(2):  # the second time all rows are known, on every rank
        for rows in split[world.rank]:
            weights = source.score(small.batch(rows, filler=not rows), models)
            for place, row in enumerate(rows):
                found[row] = [weights[side * len(rows) + place].tolist() for side in (0, 1)]
    after = [p.grad.to_local() for p in policy.parameters() if p.grad is not None]
    same = len(after) == len(before) and all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    return {"weights": found, "grads_unchanged": same}


def sampled_anchors(world: World, split: list[list[list[int]]]) -> dict[int, Any]:
    """Anchors of this rank's rows of the tiny data, batch by batch.

    Args:
        world: the rank's world.
        split: ``split[rank][batch]`` lists rows; -1 is a filler.
    """
    tokenizer = evaluating.tokenizer()
    source = AnchorSampler(max_new_tokens=5, top_k=5, top_p=None, temperature=1.0, refresh="once")
    source.bind(evaluating.pairs(6))
    policy = evaluating.scorer(0, world)
    models = LiveModels(policy, NoReference(), world, tokenizer.pad_id, tokenizer.eos_id, step=0)
    found = {}
    for _ in range(2):
        for rows in split[world.rank]:
            found.update({r: a for r, a in zip(rows, source.answers(rows, models), strict=True) if r >= 0})
    return found


def float8_shards(world: World, folder: str) -> dict[str, Any]:
    """What a sharded float8 model gathers, which scales it takes, and what its state dicts hold; float32, one AdamW step.

    Args:
        world: the rank's world.
        folder: an empty folder for a checkpoint.
    """
    model = small.decoder(0, dtype=torch.float32)
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = convert_to_float8(model, Float8(emulate=True), sharded=True)
    shard(model, list(model.layers), world)
    gathered: dict[str, tuple[str, str]] = {}
    layers = {name: model.get_submodule(name) for name in names}
    for name, layer in layers.items():

        def note(module: torch.nn.Module, _inputs: Any, name: str = name) -> None:
            weight: Any = module.weight
            inside = getattr(weight, "_data", weight)
            gathered[name] = (type(weight).__name__, str(inside.dtype))

        layer.register_forward_pre_hook(note)

    def scales() -> dict[str, float]:
        return {name: float(layer.weight._local_tensor._precomputed_scale) for name, layer in layers.items()}

    found: dict[str, Any] = {}
    load_full_state_dict(model, {name: 2 * tensor for name, tensor in whole.items()}, world)
    found["loaded"] = scales()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    (ScoringModel(model).hidden(small.batch([world.rank]).tokens) ** 3).sum().backward()
    optimizer.step()
    refresh_float8_scales(model)
    found["stepped"], found["gathered"] = scales(), gathered
    state = full_state_dict(model, world)
    found["kinds"] = {type(tensor).__name__ for tensor in state.values()}
    found["largest"] = {name: float(state[f"{name}.weight"].abs().max()) for name in names if world.is_main}
    stored = sharded_state(model, optimizer)
    found["stored"] = {type(tensor._local_tensor).__name__ for tensor in stored["model"].values()}
    write_sharded(Path(folder), stored, world)
    load_full_state_dict(model, whole, world)
    load_sharded(Path(folder), model, optimizer)
    found["restored"] = scales()
    again = full_state_dict(model, world)
    found["same"] = all(torch.equal(state[name], again[name]) for name in state)
    return found


def lora_training(world: World, words: list[str]) -> dict[str, Any]:
    """Train tiny DPO with adapters; returns the losses by step, and the whole adapters on the main process."""
    trainer = PreferenceTrainer(load_config(["--config", "tiny/dpo", *words]), world)
    logged: list[dict[str, float]] = []
    trainer._log = logged.append  # type: ignore[method-assign]
    try:
        trainer.setup()
        trainer.train()
        adapters = adapter_state(trainer.policy.model, world)
    finally:
        trainer.close()
    return {
        "losses": [metrics["loss"] for metrics in logged],
        "adapters": {name: tensor.numpy() for name, tensor in adapters.items()},
    }


def lora_trainings(world: World, runs: list[list[str]]) -> list[dict[str, Any]]:
    """:func:`lora_training` with the words of each run."""
    return [lora_training(world, words) for words in runs]


def online_pair_trainings(world: World, runs: list[list[str]]) -> list[dict[str, list[float]]]:
    """Train tiny TIS-DPO with the words of each run; returns their losses and mean weights by step."""
    found = []
    for words in runs:
        trainer = WeightedTrainer(load_config(["--config", "tiny/tis_dpo", *words]), world)
        logged: list[dict[str, float]] = []
        trainer._log = logged.append  # type: ignore[method-assign]
        try:
            trainer.setup()
            trainer.train()
        finally:
            trainer.close()
        # Only the main process logs.
        found.append(
            {
                "losses": [metrics["loss"] for metrics in logged],
                "weights": [metrics["weights/mean"] for metrics in logged],
            }
        )
    return found


def ti_trainings(world: World, folder: str, runs: list[list[str]]) -> list[int]:
    """Train tiny TI-DPO runs one after the other; what they leave lies in ``folder``.

    Args:
        world: the rank's world.
        folder: their working directory.
        runs: settings of each.

    Returns:
        Steps that each run stands after.
    """
    os.chdir(folder)
    steps = []
    for words in runs:
        trainer = TripletTrainer(load_config(["--config", "tiny/ti_dpo", *words]), world)
        try:
            trainer.setup()
            trainer.train()
        finally:
            trainer.close()
        steps.append(trainer.progress.step)
    return steps


def tokenised(world: World, source: str, caches: list[list[str]]) -> list[tuple[int, str, list[Any]]]:
    """How often this rank built, the fingerprint and the pairs of a data set, with one cache folder after another.

    Args:
        world: the rank's world.
        source: the data.
        caches: ``caches[rank]`` lists folders.
    """
    write, built = building.PairBuilder._write, []

    def counted(self: building.PairBuilder, writer: Any) -> dict[str, Any]:
        built.append(1)
        return write(self, writer)

    building.PairBuilder._write = counted  # type: ignore[method-assign]
    found = []
    for folder in caches[world.rank]:
        built.clear()
        data = world.together(
            lambda folder=folder: preference_dataset(evaluating.tokenizer(), source, cache_dir=folder)
        )
        found.append((len(built), data.fingerprint(), list(data)))
    return found


def causal_lm_steps(
    world: World, cases: list[tuple[str, str]], split: list[list[list[int]]]
) -> list[dict[str, Any]]:
    """Two steps of models of transformers on this rank's share, which are filled as a run fills them, and greedy samples.

    Args:
        world: the rank's world.
        cases: a folder with ``config.json`` and the dtype of each model.
        split: ``split[rank][micro]`` lists the rows of a micro-batch; an empty list is a filler.
    """
    return [_causal_lm_steps(world, folder, getattr(torch, dtype), split) for folder, dtype in cases]


def _causal_lm_steps(
    world: World, folder: str, dtype: torch.dtype, split: list[list[list[int]]]
) -> dict[str, Any]:
    policy, frozen = (
        _placed(world, folder, dtype, seed, trainable=trainable)
        for seed, trainable in ((0, True), (1, False))
    )
    loss = TokenDPOLoss(beta=0.5)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    with families.Float64() if dtype == torch.float64 else nullcontext():
        scorer, reference = ScoringModel(policy, head_memory_mb=0.002), FrozenReference(ScoringModel(frozen))
        scorer.decoder.prove(padding_free=True)
        policy.train()
        batches = [small.batch(rows, filler=not rows) for rows in split[world.rank]]
        for number in (1, 2):
            result = _step(scorer, reference, loss, optimizer, batches, world, number, clip_grad_norm=1.0)
        samples = sample(
            policy,
            [[5, 9, 3][world.rank :]],
            seeds=[0],
            max_new_tokens=6,
            eos_id=0,
            pad_id=0,
            world=world,
            temperature=0,
        )
    return {
        "state": {name: tensor.numpy() for name, tensor in full_state_dict(policy, world).items()},
        "norm": result.grad_norm,
        "metrics": result.sums.reduce(world),
        "samples": samples,
    }


def _placed(world: World, folder: str, dtype: torch.dtype, seed: int, *, trainable: bool) -> torch.nn.Module:
    """A model of transformers, built without memory, sharded, and filled with random weights from the main process."""
    whole = (
        families.randomise(families.causal_lm_of(folder, dtype), seed).state_dict() if world.is_main else {}
    )
    with torch.device("meta"):
        model = families.causal_lm_of(folder, dtype)
    place_decoder(model, Compute(dtype=dtype), world, trainable=trainable)
    load_full_state_dict(model, whole, world)
    return families.computing_in(model, dtype)
