"""The one training loop of all preference recipes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from tokenpref._torchtune import get_lr
from tokenpref.data import PreferenceDataset, adapt_tokenizer
from tokenpref.distributed import World, init_world
from tokenpref.errors import ConfigError
from tokenpref.models.reference import KL_STATISTICS, FrozenReference, NoReference, Reference
from tokenpref.training.config import TrainConfig, loss_faults
from tokenpref.training.live import LiveModels
from tokenpref.training.memory import peak_memory_gib
from tokenpref.training.metrics import LogInterval, Stopwatch
from tokenpref.training.run_folder import Progress, RunFolder
from tokenpref.training.schema import read_config
from tokenpref.training.scoring import BatchAnchors, BatchWeights, no_anchors, no_weights
from tokenpref.training.setup import (
    build_pairs,
    build_scorer,
    check_data_fits,
    pair_batches,
    planned_steps,
    read_weights,
)
from tokenpref.training.step import StepResult, train_step
from tokenpref.training.validation import Validation

__all__ = ["PreferenceTrainer"]

log = logging.getLogger("tokenpref")


class PreferenceTrainer:
    """Trains a policy on preference pairs with a loss over token statistics.

    ``setup`` builds everything, ``train`` runs, ``close`` leaves the process group. A recipe derives from it to
    bring what its loss needs beyond the reference, such as token weights.

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

    def __init__(self, cfg: DictConfig, world: World | None = None) -> None:
        self._cfg = cfg
        self.config = read_config(self.schema, cfg, self._loss_faults)
        self.progress = Progress()
        self.logger: Any = None
        self._given_world = world
        self.stopwatch = Stopwatch()

    def _loss_faults(self, config: TrainConfig) -> list[str]:
        losses = (config.loss, config.loss_val)
        return [fault for loss in losses for fault in loss_faults(loss, self.provides, self.recipe)]

    def load_weights(self, dataset: PreferenceDataset) -> BatchWeights:
        """Token weights of a data set's micro-batches, for a loss that needs them. Called before any model is built."""
        raise ConfigError(f"loss: {self.recipe} has no token weights; use recipes/tis_dpo_distributed")

    def load_anchors(self, dataset: PreferenceDataset) -> BatchAnchors:
        """Third answers of a data set's micro-batches, for a loss that needs them. Called before any model is built."""
        raise ConfigError(f"loss: {self.recipe} has no anchors; use recipes/ti_dpo_distributed")

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
        config = self.config
        if not (self.needs | self.validation.needs) & FrozenReference.provides:
            return NoReference()
        checkpointer, key = config.ref_checkpointer or config.checkpointer, "ref_checkpointer"
        weights = read_weights(checkpointer.build(), key, self.world)
        return FrozenReference(build_scorer(config, weights, self.world, model=config.model, key=key))

    def setup(self) -> None:
        """Build data, models, optimizer and loggers, and continue from a checkpoint where the config says so.

        Raises:
            TokenprefError: for faulty data, weights or folders; what was written until then is removed.
        """
        config = self.config
        torch.manual_seed(config.seed)
        self.world = self._given_world or init_world(config.device)
        self.loss = config.loss.build()
        self.needs = frozenset(self.loss.needs) | frozenset(config.log_stats)
        self.tokenizer = adapt_tokenizer(config.tokenizer.build())
        self.dataset = build_pairs(config.dataset, self.tokenizer, self.world)
        self._weigh, self._anchor = self._beside(self.dataset, self.needs)
        held_out = config.dataset_val
        self.dataset_val = build_pairs(held_out, self.tokenizer, self.world) if held_out is not None else None
        self.validation = self._build_validation()
        plain: dict[str, Any] = OmegaConf.to_container(self._cfg, resolve=True)  # type: ignore[assignment]
        self.folder = RunFolder(
            Path(config.output_dir).expanduser().absolute(), plain, self.recipe, self.world
        )
        self.folder.check(resume=config.resume_from_checkpoint)
        with self.folder.removed_on_failure():
            self._setup_models()
        self.folder.claim(resume=config.resume_from_checkpoint)
        if config.resume_from_checkpoint:
            self.progress = self.folder.load(self.policy.model, self.optimizer, self.scheduler)
            self._say(f"continuing after step {self.progress.step} of {self.total_steps}")
        if self.world.is_main:
            self.logger = config.metric_logger.build()
            self.logger.log_config(self._cfg)
        self.profiler = config.profiler.build()[0] if config.profiler is not None else None

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
        self.checkpointer = config.checkpointer.build()
        weights = read_weights(self.checkpointer, "checkpointer", self.world)
        self.policy = build_scorer(
            config,
            weights,
            self.world,
            model=config.model,
            trainable=True,
            activation_checkpointing=config.enable_activation_checkpointing,
        )
        del weights
        check_data_fits(self.dataset, config.dataset, self.policy.model)
        if self.dataset_val is not None and config.dataset_val is not None:
            check_data_fits(self.dataset_val, config.dataset_val, self.policy.model)
        self.reference = self.build_reference()
        self.optimizer = config.optimizer.build(self.policy.model.parameters())
        self.steps_per_epoch = planned_steps(config, len(self.dataset), self.world.size)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.scheduler = None
        if config.lr_scheduler is not None:
            self.scheduler = config.lr_scheduler.build(
                self.optimizer, num_training_steps=self.total_steps, last_epoch=-1
            )

    def train(self) -> None:
        """Train to the end of the last epoch: step, log, evaluate, save."""
        config, progress = self.config, self.progress
        interval = LogInterval()
        bar = tqdm(total=self.total_steps, initial=progress.step, disable=not self.world.is_main, unit="step")
        if self.profiler is not None:
            self.profiler.start()
        while progress.step < self.total_steps:
            with self.stopwatch.time("step"):
                result, rate = self._step()
            interval.add(result.sums, result.tokens)
            progress.num_tokens += result.tokens
            progress.step += 1
            bar.update()
            if progress.step % config.log_every_n_steps == 0 or progress.step == self.total_steps:
                metrics = interval.close(self.world)
                bar.set_postfix_str(f"loss {metrics['loss']:.4f}")
                self._log(metrics | self._run_metrics(result, rate))
            with interval.pause(), self.stopwatch.paused():
                if config.run_val_every_n_steps and progress.step % config.run_val_every_n_steps == 0:
                    self.evaluate()
                self._save_if_due()
            if self.profiler is not None:
                self.profiler.step()
        if self.profiler is not None:
            self.profiler.stop()
        bar.close()
        self.folder.finish(f"epoch_{(self.total_steps - 1) // self.steps_per_epoch}")

    def _step(self) -> tuple[StepResult, float]:
        """One optimizer step; returns its result and the learning rate that it used."""
        config = self.config
        epoch, step_in_epoch = divmod(self.progress.step, self.steps_per_epoch)
        rate = get_lr(self.optimizer)
        result = train_step(
            self.policy,
            self.reference,
            self.loss,
            self.optimizer,
            pair_batches(
                self.dataset,
                self.world,
                pad_id=self.tokenizer.pad_id,
                step=step_in_epoch,
                batch_size=config.batch_size,
                accumulation=config.gradient_accumulation_steps,
                seed=config.seed,
                epoch=epoch,
                shuffle=config.shuffle,
            ),
            self.world,
            step=self.progress.step + 1,
            needs=self.needs,
            weigh=self._weigh,
            anchor=self._anchor,
            clip_grad_norm=config.clip_grad_norm,
        )
        if self.scheduler is not None:
            self.scheduler.step()
        return result, rate

    def evaluate(self) -> None:
        """Log held-out metrics and the reward of samples under ``eval_`` names."""
        metrics = self.validation.run(
            self.policy, self.reference, step=self.progress.step, folder=self.folder.path
        )
        self._log({f"eval_{name}": value for name, value in metrics.items()})

    def _save_if_due(self) -> None:
        """Write what is due after this step: a resumable checkpoint, the weights at an epoch's end."""
        config, step = self.config, self.progress.step
        epoch_done, last = step % self.steps_per_epoch == 0, step == self.total_steps
        every = config.save_every_n_steps
        if not last and (step % every == 0 if every else epoch_done):
            self.folder.save(
                self.policy.model, self.optimizer, self.scheduler, self.progress, keep_last=config.keep_last
            )
        if epoch_done or last:
            self.folder.export(self.checkpointer, self.policy.model, (step - 1) // self.steps_per_epoch)

    def _run_metrics(self, result: StepResult, rate: float) -> dict[str, float]:
        metrics = {
            "grad_norm": result.grad_norm,
            "learning_rate": rate,
            "num_tokens": self.progress.num_tokens,
            "epoch": self.progress.step / self.steps_per_epoch,
            **self.stopwatch.take(),
        }
        if self.config.log_peak_memory_stats:
            metrics["peak_memory_gib"] = peak_memory_gib(self.world.device)
        return metrics

    def _log(self, metrics: dict[str, float]) -> None:
        if self.logger is not None:
            self.logger.log_dict(metrics, step=self.progress.step)

    def _say(self, message: str) -> None:
        if self.world.is_main:
            log.info(message)

    def close(self) -> None:
        """Close the logger and leave the process group."""
        if self.logger is not None:
            self.logger.close()
        if hasattr(self, "world") and self._given_world is None:
            self.world.close()
