"""The one training loop of all preference recipes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from omegaconf import DictConfig
from tqdm import tqdm

from tokenpref._torchtune import get_lr
from tokenpref.distributed import World
from tokenpref.errors import ConfigError, Interrupted, TrainingDiverged
from tokenpref.models.decoder import uncompiled
from tokenpref.models.reference import KL_STATISTICS
from tokenpref.training.config.faults import loss_faults
from tokenpref.training.config.fields import read_config
from tokenpref.training.config.keys import TrainConfig, TripletConfig, WeightedConfig, anchor_faults
from tokenpref.training.credit.sources import Source, anchors, schema_with, token_weights
from tokenpref.training.evaluation.validation import best_faults
from tokenpref.training.loading.memory import peak_memory_gib
from tokenpref.training.run import Run, set_up
from tokenpref.training.signals import StopRequest
from tokenpref.training.step.batches import pair_batches
from tokenpref.training.step.metrics import LogInterval
from tokenpref.training.step.train_step import StepResult, train_step

__all__ = ["PreferenceTrainer", "TripletTrainer", "WeightedTrainer"]


class PreferenceTrainer:
    """Trains a policy on preference pairs with a loss over token statistics.

    ``setup`` builds everything, ``train`` runs, ``close`` leaves the process group. A recipe attaches what its loss needs beyond
    the reference, such as token weights, as ``sources``.

    Args:
        cfg: merged config, as :func:`tokenpref.training.recipe_main` delivers it.
        world: the processes of a run that this training is a part of; None: the trainer joins its own.
        recipe: the recipe's name, for errors and for the run's folder; None: that of the class.
        sources: what is attached; None: those of the class.

    Raises:
        ConfigError: with every fault of the config; no weight has been read and nothing written. Also for a class that overrides
            a method which this trainer no longer calls.
    """

    recipe: str = "recipes/tdpo_distributed"
    schema: type[TrainConfig] = TrainConfig
    """The recipe's config, which the sources extend by their keys."""
    provides: frozenset[str] = KL_STATISTICS | {"ref"}
    """Statistics that the recipe can serve to a loss, beside those of its sources."""
    sources: tuple[Source, ...] = ()
    run: Run
    """What ``setup`` built."""

    def __init__(
        self,
        cfg: DictConfig,
        world: World | None = None,
        *,
        recipe: str | None = None,
        sources: Sequence[Source] | None = None,
    ) -> None:
        _refuse_unread_methods(type(self))
        self._cfg, self._given_world = cfg, world
        self.recipe = self.recipe if recipe is None else recipe
        self.sources = self.sources if sources is None else tuple(sources)
        self.schema = schema_with(self.schema, self.sources)
        self.provides = self.provides | {source.statistic for source in self.sources}
        self.config = read_config(self.schema, cfg, self._loss_faults)
        self._closing = ExitStack()

    def __getattr__(self, name: str) -> Any:
        """What the run is made of, as ``trainer.policy``: recipes of users read it there."""
        if name != "run" and hasattr(self, "run") and hasattr(self.run, name):
            return getattr(self.run, name)
        raise AttributeError(
            f"{type(self).__name__} has no attribute {name!r}; setup() builds the run's parts"
        )

    def _loss_faults(self, config: TrainConfig) -> list[str]:
        losses = (config.loss, config.loss_val)
        faults = [fault for loss in losses for fault in loss_faults(loss, self.provides, self.recipe)]
        faults = faults or anchor_faults(config) + best_faults(config)
        return faults or [fault for source in self.sources for fault in source.faults(config)]

    def setup(self) -> None:
        """Build data, models, optimizer and loggers, and continue from a checkpoint where the config says so.

        Raises:
            TokenprefError: for faulty data, weights or folders; what was written until then is removed.
            DryRun: after the checks, with ``dry_run: true``.
        """
        self.run = set_up(
            self._cfg,
            self.config,
            self._closing,
            recipe=self.recipe,
            sources=self.sources,
            world=self._given_world,
        )

    def close(self) -> None:
        """Close the logger, let other runs into the folder, and leave the process group."""
        self._closing.close()

    def train(self) -> None:
        """Train to the end of the last epoch: step, log, evaluate, save.

        Raises:
            Interrupted: after SIGTERM or SIGINT, at the end of a step, with a checkpoint written.
        """
        run = self.run
        bar = tqdm(
            total=run.total_steps, initial=run.progress.step, disable=not run.world.is_main, unit="step"
        )
        if run.progress.step == run.total_steps:
            run.saver.export_again(run.state, run.checkpointer, run.total_steps)
        if run.profiler is not None:
            run.profiler.start()
        with StopRequest() as stop:
            self._loop(bar, stop)
        if run.profiler is not None:
            run.profiler.stop()
        bar.close()
        run.folder.finish(f"epoch_{(run.total_steps - 1) // run.steps_per_epoch}", run.total_steps)

    def _loop(self, bar: Any, stop: StopRequest) -> None:
        run, config, progress = self.run, self.config, self.run.progress
        interval = LogInterval()
        while progress.step < run.total_steps:
            with run.stopwatch.time("step"):
                result, rate = self._step_or_note()
            interval.add(result.sums, result.tokens)
            progress.num_tokens += result.tokens
            progress.step += 1
            bar.update()
            stopping = run.world.any(stop.name is not None)
            if stopping or progress.step % config.log_every_n_steps == 0 or progress.step == run.total_steps:
                metrics = interval.close(run.world)
                bar.set_postfix_str(f"loss {metrics['loss']:.4f}")
                self._log(metrics | self._run_metrics(result, rate))
            with interval.pause(), run.stopwatch.paused():
                if (
                    config.run_val_every_n_steps
                    and progress.step % config.run_val_every_n_steps == 0
                    and not stopping
                ):
                    self.evaluate()
                run.saver.after_step(
                    progress,
                    run.state,
                    run.checkpointer,
                    total_steps=run.total_steps,
                    stopping=stopping,
                )
            if run.profiler is not None:
                run.profiler.step()
            if stopping and progress.step < run.total_steps:
                raise Interrupted(
                    f"stopped after step {progress.step} of {run.total_steps} ({stop.name or 'another process was asked'}); "
                    f"continue with resume_from_checkpoint=auto output_dir={run.folder.path}"
                )

    def _step_or_note(self) -> tuple[StepResult, float]:
        """A step; one that diverged leaves its rows in ``diverged.json``."""
        run = self.run
        try:
            return self._step()
        except TrainingDiverged as error:
            positions = {int(row): i for i, row in enumerate(run.dataset.rows())}
            file = run.folder.note_divergence(
                {
                    "step": error.step,
                    "cause": error.cause,
                    "rows": {str(row): run.dataset.locate(positions[row]) for row in error.rows},
                    "not_finite": error.bad_rows,
                }
            )
            raise TrainingDiverged(
                error.step, error.cause, error.rows, error.bad_rows, note=f"The rows are kept in {file}."
            ) from error

    def _step(self) -> tuple[StepResult, float]:
        """One optimizer step; returns its result and the learning rate that it used."""
        run, config = self.run, self.config
        epoch, step_in_epoch = divmod(run.progress.step, run.steps_per_epoch)
        rate = get_lr(run.optimizer)
        result = train_step(
            run.policy,
            run.reference,
            run.loss,
            run.optimizer,
            pair_batches(
                run.dataset,
                run.world,
                pad_id=run.tokenizer.pad_id,
                step=step_in_epoch,
                batch_size=config.batch_size,
                accumulation=config.gradient_accumulation_steps,
                seed=config.seed,
                epoch=epoch,
                shuffle=config.shuffle,
                tokens=config.tokens_per_batch,
                padded=not config.padding_free,
            ),
            run.world,
            step=run.progress.step + 1,
            needs=run.needs,
            weigh=run.weigh,
            anchor=run.anchor,
            clip_grad_norm=config.clip_grad_norm,
        )
        if run.scheduler is not None:
            run.scheduler.step()
        return result, rate

    def evaluate(self) -> None:
        """Log held-out metrics and the reward of samples under ``eval_`` names; keep the weights if they are the best."""
        run = self.run
        with uncompiled():
            metrics = run.validation.run(
                run.policy, run.reference_val, step=run.progress.step, folder=run.folder.path
            )
        self._log({f"eval_{name}": value for name, value in metrics.items()})
        run.saver.after_validation(metrics, run.progress, run.state, run.checkpointer)

    def _run_metrics(self, result: StepResult, rate: float) -> dict[str, float]:
        run = self.run
        metrics = {
            "grad_norm": result.grad_norm,
            "learning_rate": rate,
            "num_tokens": run.progress.num_tokens,
            "epoch": run.progress.step / run.steps_per_epoch,
            **run.stopwatch.take(),
        }
        if self.config.log_peak_memory_stats:
            metrics["peak_memory_gib"] = peak_memory_gib(run.world.device)
        return metrics

    def _log(self, metrics: dict[str, float]) -> None:
        if self.run.logger is not None:
            self.run.logger.log_dict(metrics, step=self.run.progress.step)


class WeightedTrainer(PreferenceTrainer):
    """The trainer of ``recipes/tis_dpo_distributed``, for recipes that derive from it: with weights from ``token_weights``."""

    recipe = "recipes/tis_dpo_distributed"
    schema = WeightedConfig
    provides = PreferenceTrainer.provides | {"weights"}
    sources = (token_weights,)


class TripletTrainer(PreferenceTrainer):
    """The trainer of ``recipes/ti_dpo_distributed``, for recipes that derive from it: with token weights and ``anchors``."""

    recipe = "recipes/ti_dpo_distributed"
    schema = TripletConfig
    provides = PreferenceTrainer.provides | {"weights", "anchor"}
    sources = (token_weights, anchors)


_UNREAD = {
    "load_weights": "pass sources=(tokenpref.training.Source(statistic='weights', schema=..., load=...),) to the trainer, or "
    "name a component of your own as token_weights in the config",
    "load_anchors": "pass sources=(tokenpref.training.Source(statistic='anchor', schema=..., load=...),) to the trainer, or "
    "name a component of your own as anchors in the config",
    "build_reference": "override setup() and set self.run.reference after super().setup()",
}


def _refuse_unread_methods(trainer: type) -> None:
    """A copied recipe whose own methods nobody calls would train something else than its author means.

    Raises:
        ConfigError: saying what takes the method's place.
    """
    for name, instead in _UNREAD.items():
        if hasattr(trainer, name):
            raise ConfigError(
                f"{trainer.__name__}.{name}: the trainer no longer calls this method; {instead}"
            )
