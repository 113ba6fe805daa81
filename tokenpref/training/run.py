"""Builds and checks the parts of a training run before its first step: data, weights, anchors, models, optimizer, folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tokenpref.data import PreferenceDataset, Tokenizer, adapt_tokenizer
from tokenpref.distributed import World, init_world
from tokenpref.errors import DryRun
from tokenpref.losses import Loss
from tokenpref.models.reference import FrozenReference, NoReference, Reference
from tokenpref.models.scoring import ScoringModel
from tokenpref.models.token_ids import check_token_ids
from tokenpref.training.config.compute import check_device
from tokenpref.training.config.fields import Component
from tokenpref.training.config.keys import TrainConfig
from tokenpref.training.config.parts import build_logger, build_optimizer, build_profiler, build_scheduler
from tokenpref.training.config.written import environment_unread, plain_without_environment
from tokenpref.training.credit.live import LiveModels
from tokenpref.training.credit.sources import Source, SourceContext
from tokenpref.training.evaluation.validation import Validation
from tokenpref.training.loading.memory import size_text
from tokenpref.training.loading.models import ModelMaker, weights_digest
from tokenpref.training.loading.preflight import check_openings, preflight
from tokenpref.training.loading.reference_cache import ReferenceCache, cached_references, plan_caches
from tokenpref.training.saving.checkpoints import Progress
from tokenpref.training.saving.run_folder import RunFolder
from tokenpref.training.saving.saver import Saver, TrainState
from tokenpref.training.step.batches import build_pairs, planned_steps
from tokenpref.training.step.metrics import Stopwatch
from tokenpref.training.step.pair_loss import BatchAnchors, BatchWeights, no_anchors, no_weights

__all__ = ["Run", "set_up"]

log = logging.getLogger("tokenpref")


@dataclass(kw_only=True, eq=False)
class Run:
    """A training that is ready for its next step.

    Args:
        config: the run's config.
        world: its processes.
        folder: its output folder.
        tokenizer: the tokenizer of its data.
        dataset: its pairs.
        loss: the loss.
        needs: statistics that the loss and the log need.
        weigh: token weights of a micro-batch.
        anchor: third answers of a micro-batch.
        validation: measures held-out pairs and samples.
        steps_per_epoch: optimizer steps of an epoch.
        total_steps: optimizer steps of the whole run.
        policy: the model in training.
        reference: the reference of the training pairs.
        reference_val: the reference of the held-out pairs: the same model, or another cache, because a cache has one data set.
        checkpointer: writes the policy's weights.
        optimizer: the optimizer of the policy.
        scheduler: the schedule of the learning rate, if any.
        state: everything in a checkpoint except the progress.
        saver: writes checkpoints and weights.
        progress: the steps and tokens done, and the best value.
        stopwatch: measures the parts of a step.
        profiler: torchtune's profiler, if any.
        logger: the metric logger; None on all processes except the main one.
    """

    config: TrainConfig
    world: World
    folder: RunFolder
    tokenizer: Tokenizer
    dataset: PreferenceDataset
    loss: Loss
    needs: frozenset[str]
    weigh: BatchWeights
    anchor: BatchAnchors
    validation: Validation
    steps_per_epoch: int
    total_steps: int
    policy: ScoringModel
    reference: Reference
    reference_val: Reference
    checkpointer: Any
    optimizer: Optimizer
    scheduler: LRScheduler | None
    state: TrainState
    saver: Saver
    progress: Progress
    stopwatch: Stopwatch
    profiler: Any
    logger: Any
    maker: ModelMaker

    def live(self) -> LiveModels:
        """The current models, for weights and anchors that are computed during training."""
        return LiveModels(
            policy=self.policy,
            reference=self.reference,
            world=self.world,
            pad_id=self.tokenizer.pad_id,
            eos_id=self.tokenizer.eos_id,
            step=self.progress.step,
            maker=self.maker,
        )


def set_up(
    cfg: DictConfig,
    config: TrainConfig,
    closing: ExitStack,
    *,
    recipe: str,
    sources: Sequence[Source] = (),
    world: World | None = None,
) -> Run:
    """Build data, models, optimizer and loggers, and continue from a checkpoint where the config says so.

    Args:
        cfg: merged config, which is written with the run.
        config: the same, read and checked.
        closing: receives everything that must be closed after the run, also if this function fails.
        recipe: the recipe's name, which is recorded in the run's folder.
        sources: the sources that the recipe attaches: token weights, anchors.
        world: the processes of a run that this training is a part of; None: the training joins its own.

    Raises:
        TokenprefError: for faulty data, weights or folders; what was written until then is removed.
        DryRun: after the checks, with ``dry_run: true``.
    """
    torch.manual_seed(config.seed)
    if world is None:
        # FSDP2 is needed to compute in another dtype than the weights', also in a single process.
        world = init_world(config.device, process_group=config.compute_dtype is not None)
        closing.callback(world.close)
    maker = ModelMaker(config, world)
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    folder = RunFolder(Path(config.output_dir).absolute(), plain, recipe, world, schema=type(config))
    closing.callback(folder.unlock)
    # Before the data, which may take minutes: the folder decides whether the run may start at all.
    start = folder.start(config.resume_from_checkpoint)
    loss = config.loss.build()
    needs = frozenset(loss.needs) | frozenset(config.log_stats)
    folder.tokenizer = tokenizer = adapt_tokenizer(config.tokenizer.build())
    stopwatch = Stopwatch()
    kept: dict[str, Any] = {}

    def attached(data: PreferenceDataset | None, needs: frozenset[str]) -> tuple[BatchWeights, BatchAnchors]:
        """The weights and anchors of a data set's batches, if they are needed."""

        def keep(name: str, source: Any) -> None:
            # Results of validation data are valid while these data are the same.
            assert data is not None  # it was loaded for a source
            kept[name if data is dataset else f"{name}_val_{data.fingerprint()[:16]}"] = source

        context = SourceContext(
            config=config,
            tokenizer=tokenizer,
            stopwatch=stopwatch,
            vocabulary=lambda: maker.vocabulary,
            live=lambda: run.live(),
            keep=keep,
            say=partial(_say, world),
        )
        loaded = {
            source.statistic: world.together(partial(source.load, context, data))
            for source in sources
            if data is not None and source.statistic in needs
        }
        return loaded.get("weights", no_weights), loaded.get("anchor", no_anchors)

    dataset = build_pairs(config.dataset, tokenizer, world)
    weigh, anchor = attached(dataset, needs)
    held_out = build_pairs(config.dataset_val, tokenizer, world) if config.dataset_val is not None else None
    val_needs = frozenset((config.loss_val or config.loss).build().needs)
    beside = attached(held_out if config.run_val_every_n_steps else None, val_needs)
    validation = Validation(config, held_out, tokenizer, world, *beside)
    steps_per_epoch = planned_steps(config, len(dataset), world.size)
    total_steps = config.epochs * steps_per_epoch
    data = {"dataset": (dataset, needs)}
    if held_out is not None and config.run_val_every_n_steps:
        data["dataset_val"] = (held_out, validation.needs)
    caches = plan_caches(config, data, world)
    saver = Saver(config, folder, world, _facts(cfg, config, maker, dataset, steps_per_epoch))
    if start is not None:
        saver.check(start, total_steps)
    compared = bool((needs | validation.needs) & FrozenReference.provides)
    _check(config, maker, dataset, held_out, tokenizer, folder, needs, kept, caches, compared=compared)
    progress = Progress()
    with folder.removed_on_failure():
        # The cache comes before the policy, so that the model that fills it has been freed.
        cached = (
            _open_caches(config, maker, caches, folder, tokenizer) if config.reference == "cached" else None
        )
        policy = maker.policy(trainable=True)
        reference, reference_val = cached or (_build_reference(maker, policy, compared=compared),) * 2
        optimizer = build_optimizer(config.optimizer, policy.trainable_parameters())
        scheduler = build_scheduler(config.lr_scheduler, optimizer, total_steps)
        state = TrainState(policy.model, optimizer, scheduler, kept)
        if start is not None:
            progress = saver.restore(start, state, total_steps)
            _say(world, f"continuing after step {progress.step} of {total_steps}")
        # Before the folder is claimed, because refused settings must not cost an earlier run its checkpoints.
        profiler = build_profiler(config.profiler)
        logger = world.together(lambda: build_logger(config.metric_logger) if world.is_main else None)
    if logger is not None:
        closing.callback(logger.close)
    folder.claim(resume=start is not None)
    if logger is not None:
        shown = cfg.copy()
        shown.output_dir = config.output_dir  # torchtune's loggers write the config to this folder
        with environment_unread():
            logger.log_config(shown)
    run = Run(
        config=config,
        world=world,
        folder=folder,
        tokenizer=tokenizer,
        dataset=dataset,
        loss=loss,
        needs=needs,
        weigh=weigh,
        anchor=anchor,
        validation=validation,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        policy=policy,
        reference=reference,
        reference_val=reference_val,
        checkpointer=maker.checkpointer,
        optimizer=optimizer,
        scheduler=scheduler,
        state=state,
        saver=saver,
        progress=progress,
        stopwatch=stopwatch,
        profiler=profiler,
        logger=logger,
        maker=maker,
    )
    return run


def _check(
    config: TrainConfig,
    maker: ModelMaker,
    dataset: PreferenceDataset,
    dataset_val: PreferenceDataset | None,
    tokenizer: Tokenizer,
    folder: RunFolder,
    needs: frozenset[str],
    kept: dict[str, Any],
    caches: dict[str, ReferenceCache],
    *,
    compared: bool,
) -> None:
    """Check everything that can be checked without weights.

    Raises:
        DryRun: if the config asks only for the checks.
    """
    world = maker.world

    def check_contexts() -> None:
        """Check that samples, and prompts in front of answers, fit the model's context."""
        for source in kept.values():
            if hasattr(source, "check_context"):
                source.check_context(maker.context)
        if config.sampling is not None:
            check_openings(config.sampling, tokenizer, maker.context)

    world.together(lambda: check_device(config.compute(trainable=True), world))
    world.together(check_contexts)
    for source in kept.values():
        if hasattr(source, "check_models"):
            source.check_models(maker, tokenizer)
    scorers = sum(source.own_nbytes(maker) for source in kept.values() if hasattr(source, "own_nbytes"))
    # Only the main process looks: all processes have the same disk and, as far as is known, the same memory.
    lines = world.together(
        lambda: (
            preflight(
                config,
                maker,
                dataset,
                dataset_val,
                folder.path,
                reference=compared and config.reference == "model" and not maker.reference_is_base,
                rows_per_pair=3 if "anchor" in needs else 2,
                scorers=scorers,
                caches=list(caches.values()),
            )
            if world.is_main
            else []
        )
    )
    openings = config.sampling.prompts if config.sampling is not None else None
    padding = world.together(lambda: check_token_ids(tokenizer, maker.vocabulary, openings=openings))
    if padding is not None:
        _say(world, padding)
    for line in lines:
        log.info(line)
    if config.dry_run:
        raise DryRun(f"dry run: nothing stands against this run, nothing was written to {folder.path}")


def _build_reference(maker: ModelMaker, policy: ScoringModel, *, compared: bool) -> Reference:
    """The reference of a run: the policy with its adapters switched off, a second model, or none if it is not needed."""
    if not compared:
        return NoReference()
    if maker.reference_is_base:
        _say(maker.world, "reference: the policy with its adapters switched off, and no second model")
        return maker.reference(policy)
    size = size_text(maker.reference_nbytes)
    _say(maker.world, f"reference: a second model of {size} a process beside the policy")
    return maker.reference()


def _open_caches(
    config: TrainConfig,
    maker: ModelMaker,
    caches: dict[str, ReferenceCache],
    folder: RunFolder,
    tokenizer: Tokenizer,
) -> tuple[Reference, Reference]:
    """The references of training and validation from their caches, after building missing parts."""

    def load() -> ScoringModel:
        scorer = maker.reference().scorer
        # Not earlier, so that weights that do not fit leave nothing behind. From here on the folder is locked.
        folder.lock()
        return scorer

    opened = cached_references(
        list(caches.values()), load, maker.world, batch_size=config.batch_size, pad_id=tokenizer.pad_id
    )
    found: dict[str, Reference] = dict(zip(caches, opened, strict=True))
    if found:
        times = {"dataset": "an epoch", "dataset_val": "a validation"}
        forwards = " and ".join(
            f"{cache.layout.answers.sequence_tokens:,} tokens {times[key]}" for key, cache in caches.items()
        )
        instead = f"a forward of {forwards}"
        if not maker.reference_is_base:
            instead = f"a second model of {size_text(maker.reference_nbytes)} a process and {instead}"
        _say(maker.world, f"reference: cached, in the place of {instead}")
    return found.get("dataset", NoReference()), found.get("dataset_val", NoReference())


def _facts(
    cfg: DictConfig, config: TrainConfig, maker: ModelMaker, dataset: PreferenceDataset, steps_per_epoch: int
) -> dict[str, Any]:
    """Facts that a resumed run must share; see :class:`tokenpref.training.saving.saver.Saver`."""
    world = maker.world

    def digest(reader: Component) -> str | None:
        # Only the main process reads checkpoints, because other nodes may not have the files.
        def read() -> str | None:
            return weights_digest(reader) if world.is_main and "checkpoint_dir" in reader.kwargs else None

        found: str | None = world.broadcast_object(world.together(read))
        return found

    adapters = world.together(lambda: maker.adapters)
    facts = {
        "pairs_per_step": config.batch_size * config.gradient_accumulation_steps * world.size,
        "steps_per_epoch": steps_per_epoch,
        "seed": config.seed,
        "shuffle": config.shuffle,
        "data": dataset.fingerprint(),
        "reference": digest(config.ref_checkpointer or config.checkpointer),
        "config": plain_without_environment(cfg),
    }
    if adapters is not None:
        # The checkpoint holds the adapters alone.
        facts |= {"base": digest(config.checkpointer), "adapters": adapters}
    return facts


def _say(world: World, message: str) -> None:
    if world.is_main:
        log.info(message)
