"""The one training loop of all preference recipes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from tokenpref._torchtune import get_lr
from tokenpref.data import PreferenceDataset, adapt_tokenizer, steps_per_epoch
from tokenpref.distributed import World, full_state_dict, init_world
from tokenpref.errors import ConfigError
from tokenpref.models.reference import KL_STATISTICS, FrozenReference, NoReference, Reference
from tokenpref.training.config import TrainConfig, loss_faults
from tokenpref.training.memory import peak_memory_gib
from tokenpref.training.metrics import LogInterval
from tokenpref.training.run_folder import Progress, RunFolder
from tokenpref.training.schema import Component, read_config
from tokenpref.training.setup import build_scorer, check_data_fits, pair_batches, read_weights
from tokenpref.training.step import BatchWeights, StepResult, train_step
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

    def _loss_faults(self, config: TrainConfig) -> list[str]:
        losses = (config.loss, config.loss_val)
        return [fault for loss in losses for fault in loss_faults(loss, self.provides, self.recipe)]

    # --- what a recipe may override ------------------------------------------------------------------------------

    def load_weights(self, dataset: PreferenceDataset) -> BatchWeights:
        """Token weights of a data set's micro-batches, for a loss that needs them. Called before any model is built."""
        raise ConfigError(f"loss: {self.recipe} has no token weights; use recipes/tis_dpo_distributed")

    def build_reference(self) -> Reference:
        """The reference of this run: a second frozen copy of the model, or none where nothing asks for one."""
        config = self.config
        if not (self.needs | self.validation.needs) & FrozenReference.provides:
            return NoReference()
        checkpointer, key = config.ref_checkpointer or config.checkpointer, "ref_checkpointer"
        weights = read_weights(checkpointer.build(), key, self.world)
        return FrozenReference(build_scorer(config, weights, self.world, model=config.model, key=key))

    # --- setup ---------------------------------------------------------------------------------------------------

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
        self.dataset = self._dataset(config.dataset)
        self._weigh = self._weights_of(self.dataset, self.needs)
        self.dataset_val = self._dataset(config.dataset_val) if config.dataset_val is not None else None
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

    def _dataset(self, component: Component) -> PreferenceDataset:
        dataset: PreferenceDataset = self.world.together(lambda: component.build(self.tokenizer))
        self._say(f"{component.key}: {dataset.report.summary()}")
        if len(dataset) < self.world.size:
            raise ConfigError(
                f"{component.key}: {len(dataset)} pairs for {self.world.size} processes; "
                f"run with at most --nproc_per_node {len(dataset)}"
            )
        return dataset

    def _weights_of(self, dataset: PreferenceDataset | None, needs: frozenset[str]) -> BatchWeights:
        if dataset is None or "weights" not in needs:
            return lambda batch: None
        return self.world.together(lambda: self.load_weights(dataset))

    def _build_validation(self) -> Validation:
        config, world = self.config, self.world
        loss = (config.loss_val or config.loss).build()
        watched = bool(config.run_val_every_n_steps)
        weigh = self._weights_of(self.dataset_val if watched else None, frozenset(loss.needs))
        return Validation(config, self.dataset_val, self.tokenizer, world, weigh)

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
        self.steps_per_epoch = steps_per_epoch(
            len(self.dataset),
            batch_size=config.batch_size,
            accumulation=config.gradient_accumulation_steps,
            world_size=self.world.size,
        )
        if config.max_steps_per_epoch is not None:
            self.steps_per_epoch = min(self.steps_per_epoch, config.max_steps_per_epoch)
        self.total_steps = config.epochs * self.steps_per_epoch
        self.scheduler = None
        if config.lr_scheduler is not None:
            self.scheduler = config.lr_scheduler.build(
                self.optimizer, num_training_steps=self.total_steps, last_epoch=-1
            )

    # --- the loop ------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train to the end of the last epoch: step, log, evaluate, save."""
        config, progress = self.config, self.progress
        interval = LogInterval()
        bar = tqdm(total=self.total_steps, initial=progress.step, disable=not self.world.is_main, unit="step")
        if self.profiler is not None:
            self.profiler.start()
        while progress.step < self.total_steps:
            result, rate = self._step()
            interval.add(result.sums, result.tokens)
            progress.num_tokens += result.tokens
            progress.step += 1
            bar.update()
            if progress.step % config.log_every_n_steps == 0 or progress.step == self.total_steps:
                metrics = interval.close(self.world)
                bar.set_postfix_str(f"loss {metrics['loss']:.4f}")
                self._log(metrics | self._run_metrics(result, rate))
            with interval.pause():
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
            self._export((step - 1) // self.steps_per_epoch)

    def _export(self, epoch: int) -> None:
        """Write the policy in its checkpointer's format to ``output_dir/epoch_N``."""
        state = full_state_dict(self.policy.model, self.world)
        if self.world.is_main:
            self.checkpointer.save_checkpoint({"model": state}, epoch=epoch, intermediate_checkpoint=False)
        self.world.barrier()

    def _run_metrics(self, result: StepResult, rate: float) -> dict[str, float]:
        metrics = {
            "grad_norm": result.grad_norm,
            "learning_rate": rate,
            "num_tokens": self.progress.num_tokens,
            "epoch": self.progress.step / self.steps_per_epoch,
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
