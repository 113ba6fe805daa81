"""What a training run is made of: data, weights, anchors, models, optimizer, folder; built and checked before the first step."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

import torch
from omegaconf import DictConfig, OmegaConf

from tokenpref.data import PreferenceDataset, adapt_tokenizer
from tokenpref.distributed import World, init_world
from tokenpref.errors import ConfigError, DryRun
from tokenpref.models.reference import KL_STATISTICS, FrozenReference, NoReference, Reference
from tokenpref.models.scoring import ScoringModel
from tokenpref.models.token_ids import check_token_ids
from tokenpref.training.config.compute import check_device
from tokenpref.training.config.faults import loss_faults
from tokenpref.training.config.fields import read_config
from tokenpref.training.config.keys import TrainConfig, anchor_faults
from tokenpref.training.config.parts import build_logger, build_optimizer, build_profiler, build_scheduler
from tokenpref.training.config.written import environment_unread, plain_without_environment
from tokenpref.training.credit.live import LiveModels
from tokenpref.training.evaluation.validation import Validation, best_faults
from tokenpref.training.loading.memory import size_text
from tokenpref.training.loading.models import ModelMaker, weights_digest
from tokenpref.training.loading.preflight import check_openings, preflight
from tokenpref.training.loading.reference_cache import cached_references, plan_caches
from tokenpref.training.saving.checkpoints import Progress
from tokenpref.training.saving.run_folder import RunFolder
from tokenpref.training.saving.saver import Saver, TrainState
from tokenpref.training.step.batches import build_pairs, planned_steps
from tokenpref.training.step.metrics import Stopwatch
from tokenpref.training.step.pair_loss import BatchAnchors, BatchWeights, no_anchors, no_weights

__all__ = ["RunSetup"]

log = logging.getLogger("tokenpref")


class RunSetup:
    """Builds a run from its config, and takes it down.

    Args:
        cfg: merged config, as :func:`tokenpref.training.recipe_main` delivers it.
        world: the processes of a run that this training is a part of; None: the trainer joins its own.

    Raises:
        ConfigError: with every fault of the config; no weight has been read and nothing written.
    """

    recipe: ClassVar[str] = "recipes/tdpo_distributed"
    schema: ClassVar[type[TrainConfig]] = TrainConfig
    """The recipe's config."""
    provides: ClassVar[frozenset[str]] = KL_STATISTICS | {"ref"}
    """Statistics that the recipe can serve to a loss."""
    reference: Reference
    reference_val: Reference
    """What held-out pairs are compared with: the same model, but a cache is of one data set."""

    def __init__(self, cfg: DictConfig, world: World | None = None) -> None:
        self._cfg = cfg
        self.config = read_config(self.schema, cfg, self._loss_faults)
        self.progress = Progress()
        self.logger: Any = None
        self._given_world = world
        self.stopwatch = Stopwatch()
        self._sources: dict[str, Any] = {}

    def _loss_faults(self, config: TrainConfig) -> list[str]:
        losses = (config.loss, config.loss_val)
        faults = [fault for loss in losses for fault in loss_faults(loss, self.provides, self.recipe)]
        return faults or anchor_faults(config) + best_faults(config)

    def load_weights(self, dataset: PreferenceDataset) -> BatchWeights:
        """Token weights of a data set's micro-batches, for a loss that needs them. Called before any model is built."""
        raise ConfigError(f"loss: {self.recipe} has no token weights; use recipes/tis_dpo_distributed")

    def load_anchors(self, dataset: PreferenceDataset) -> BatchAnchors:
        """Third answers of a data set's micro-batches, for a loss that needs them. Called before any model is built."""
        raise ConfigError(f"loss: {self.recipe} has no anchors; use recipes/ti_dpo_distributed")

    def keep(self, dataset: PreferenceDataset, name: str, source: Any) -> None:
        """Save a source's results by row with the run; those of validation data for as long as these data are the same."""
        own = dataset is self.dataset
        self._sources[name if own else f"{name}_val_{dataset.fingerprint()[:16]}"] = source

    def live(self) -> LiveModels:
        """The models as they are, for weights and anchors that are made along the training."""
        return LiveModels(
            policy=self.policy,
            reference=self.reference,
            world=self.world,
            pad_id=self.tokenizer.pad_id,
            eos_id=self.tokenizer.eos_id,
            step=self.progress.step,
        )

    def build_reference(self) -> Reference:
        """The reference of this run: a second frozen copy of the model, or none where nothing asks for one."""
        if not self.needs_reference:
            return NoReference()
        size = size_text(self.maker.reference_nbytes)
        self._say(f"reference: a second model of {size} a process beside the policy")
        return self.maker.reference()

    def _open_caches(self) -> None:
        """References of training and validation from their caches; what is missing of them is built first."""

        def load() -> ScoringModel:
            scorer = self.maker.reference().scorer
            # Not before: weights that do not fit leave nothing behind. From here on the run's folder is this run's alone.
            self.folder.lock()
            return scorer

        opened = cached_references(
            list(self._caches.values()),
            load,
            self.world,
            batch_size=self.config.batch_size,
            pad_id=self.tokenizer.pad_id,
        )
        found: dict[str, Reference] = dict(zip(self._caches, opened, strict=True))
        self.reference = found.get("dataset", NoReference())
        self.reference_val = found.get("dataset_val", NoReference())
        if found:
            times = {"dataset": "an epoch", "dataset_val": "a validation"}
            forwards = " and ".join(
                f"{cache.layout.answers.sequence_tokens:,} tokens {times[key]}"
                for key, cache in self._caches.items()
            )
            size = size_text(self.maker.reference_nbytes)
            self._say(
                f"reference: cached, in the place of a second model of {size} a process and a forward of {forwards}"
            )

    def setup(self) -> None:
        """Build data, models, optimizer and loggers, and continue from a checkpoint where the config says so.

        Raises:
            TokenprefError: for faulty data, weights or folders; what was written until then is removed.
            DryRun: after the checks, with ``dry_run: true``.
        """
        config = self.config
        torch.manual_seed(config.seed)
        # FSDP2 computes in another dtype than the weights', in a process on its own too.
        alone = config.compute_dtype is not None
        self.world = self._given_world or init_world(config.device, process_group=alone)
        self.maker = ModelMaker(config, self.world)
        plain: dict[str, Any] = OmegaConf.to_container(self._cfg, resolve=True)  # type: ignore[assignment]
        self.folder = RunFolder(
            Path(config.output_dir).absolute(), plain, self.recipe, self.world, schema=type(config)
        )
        # Before the data, which may take minutes: what is there already decides whether there is a run at all.
        start = self.folder.start(config.resume_from_checkpoint)
        self.loss = config.loss.build()
        self.needs = frozenset(self.loss.needs) | frozenset(config.log_stats)
        self.tokenizer = adapt_tokenizer(config.tokenizer.build())
        self.dataset = build_pairs(config.dataset, self.tokenizer, self.world)
        self._weigh, self._anchor = self._beside(self.dataset, self.needs)
        held_out = config.dataset_val
        self.dataset_val = build_pairs(held_out, self.tokenizer, self.world) if held_out is not None else None
        self.validation = self._build_validation()
        self.folder.tokenizer = self.tokenizer
        self.steps_per_epoch = planned_steps(config, len(self.dataset), self.world.size)
        self.total_steps = config.epochs * self.steps_per_epoch
        data = {"dataset": (self.dataset, self.needs)}
        if self.dataset_val is not None and config.run_val_every_n_steps:
            data["dataset_val"] = (self.dataset_val, self.validation.needs)
        self._caches = plan_caches(config, data, self.world)
        facts = self._facts(plain_without_environment(self._cfg))
        self.saver = Saver(config, self.folder, self.world, facts)
        if start is not None:
            self.saver.check(start, self.total_steps)
        self._preflight()
        with self.folder.removed_on_failure():
            self._setup_models()
            self.state = TrainState(self.policy.model, self.optimizer, self.scheduler, self._sources)
            if start is not None:
                self.progress = self.saver.restore(start, self.state, self.total_steps)
                self._say(f"continuing after step {self.progress.step} of {self.total_steps}")
            # Before the folder is claimed: a setting that they refuse must not cost an earlier run its checkpoints.
            self.profiler = build_profiler(config.profiler)
            self.logger = self.world.together(
                lambda: build_logger(config.metric_logger) if self.world.is_main else None
            )
        self.folder.claim(resume=start is not None)
        if self.logger is not None:
            shown = self._cfg.copy()
            shown.output_dir = config.output_dir  # torchtune's loggers write the config to this folder
            with environment_unread():
                self.logger.log_config(shown)

    def _preflight(self) -> None:
        """Check the run as far as it goes without weights.

        Raises:
            DryRun: if the config asks for no more.
        """
        config = self.config
        self.world.together(lambda: check_device(config.compute(trainable=True), self.world))
        self.world.together(self._check_contexts)
        # The main process alone looks: the same disk, and the same memory as far as the config can tell.
        lines = self.world.together(
            lambda: (
                preflight(
                    config,
                    self.maker,
                    self.dataset,
                    self.dataset_val,
                    self.folder.path,
                    reference=self.needs_reference and config.reference == "model",
                    rows_per_pair=3 if "anchor" in self.needs else 2,
                    caches=list(self._caches.values()),
                )
                if self.world.is_main
                else []
            )
        )
        rows = self.maker.vocabulary
        openings = config.sampling.prompts if config.sampling is not None else None
        padding = self.world.together(lambda: check_token_ids(self.tokenizer, rows, openings=openings))
        if padding is not None:
            self._say(padding)
        for line in lines:
            log.info(line)
        if config.dry_run:
            raise DryRun(
                f"dry run: nothing stands against this run, nothing was written to {self.folder.path}"
            )

    def _check_contexts(self) -> None:
        """Check that what is sampled or put in front of answers fits the model's context."""
        limit = self.maker.context
        for source in self._sources.values():
            if hasattr(source, "check_context"):
                source.check_context(limit)
        if self.config.sampling is not None:
            check_openings(self.config.sampling, self.tokenizer, limit)

    @property
    def needs_reference(self) -> bool:
        """Whether the loss, the log or the validation asks for a second model."""
        return bool((self.needs | self.validation.needs) & FrozenReference.provides)

    def _beside(
        self, dataset: PreferenceDataset | None, needs: frozenset[str]
    ) -> tuple[BatchWeights, BatchAnchors]:
        """Weights and anchors of a data set's batches, as far as they are needed."""
        weigh: BatchWeights = no_weights
        anchor: BatchAnchors = no_anchors
        if dataset is not None and "weights" in needs:
            weigh = self.world.together(lambda: self.load_weights(dataset))
        if dataset is not None and "anchor" in needs:
            anchor = self.world.together(lambda: self.load_anchors(dataset))
        return weigh, anchor

    def _build_validation(self) -> Validation:
        config = self.config
        needs = frozenset((config.loss_val or config.loss).build().needs)
        beside = self._beside(self.dataset_val if config.run_val_every_n_steps else None, needs)
        return Validation(config, self.dataset_val, self.tokenizer, self.world, *beside)

    def _setup_models(self) -> None:
        config = self.config
        if config.reference == "cached":
            # Before the policy: the model that fills the caches is gone by then.
            self._open_caches()
        self.policy = self.maker.policy(trainable=True)
        self.checkpointer = self.maker.checkpointer
        if config.reference == "model":
            self.reference = self.reference_val = self.build_reference()
        self.optimizer = build_optimizer(config.optimizer, self.policy.trainable_parameters())
        self.scheduler = build_scheduler(config.lr_scheduler, self.optimizer, self.total_steps)

    def _facts(self, config: dict[str, Any]) -> dict[str, Any]:
        """What a run that continues this one has to share; see :class:`tokenpref.training.saving.saver.Saver`."""
        settings = self.config
        reference = settings.ref_checkpointer or settings.checkpointer

        def digest() -> str | None:
            # The main process alone reads checkpoints; other nodes need not have the files.
            there = self.world.is_main and "checkpoint_dir" in reference.kwargs
            return weights_digest(reference) if there else None

        return {
            "pairs_per_step": settings.batch_size * settings.gradient_accumulation_steps * self.world.size,
            "steps_per_epoch": self.steps_per_epoch,
            "seed": settings.seed,
            "shuffle": settings.shuffle,
            "data": self.dataset.fingerprint(),
            "reference": self.world.broadcast_object(self.world.together(digest)),
            "config": config,
        }

    def _say(self, message: str) -> None:
        if self.world.is_main:
            log.info(message)

    def close(self) -> None:
        """Close the logger and leave the process group."""
        if self.logger is not None:
            self.logger.close()
        if hasattr(self, "folder"):
            self.folder.unlock()
        if hasattr(self, "world") and self._given_world is None:
            self.world.close()
