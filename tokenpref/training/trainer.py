"""The one training loop of all preference recipes."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

from tokenpref._torchtune import get_lr
from tokenpref.errors import Interrupted, TrainingDiverged
from tokenpref.training.loading.memory import peak_memory_gib
from tokenpref.training.run import RunSetup
from tokenpref.training.signals import StopRequest
from tokenpref.training.step.batches import pair_batches
from tokenpref.training.step.metrics import LogInterval
from tokenpref.training.step.train_step import StepResult, train_step

__all__ = ["PreferenceTrainer"]


class PreferenceTrainer(RunSetup):
    """Trains a policy on preference pairs with a loss over token statistics.

    ``setup`` builds everything, ``train`` runs, ``close`` leaves the process group. A recipe derives from it to
    bring what its loss needs beyond the reference, such as token weights.

    Args:
        cfg: merged config, as :func:`tokenpref.training.recipe_main` delivers it.
        world: the processes of a run that this training is a part of; None: the trainer joins its own.

    Raises:
        ConfigError: with every fault of the config; no weight has been read and nothing written.
    """

    def train(self) -> None:
        """Train to the end of the last epoch: step, log, evaluate, save.

        Raises:
            Interrupted: after SIGTERM or SIGINT, at the end of a step, with a checkpoint written.
        """
        bar = tqdm(
            total=self.total_steps, initial=self.progress.step, disable=not self.world.is_main, unit="step"
        )
        if self.progress.step == self.total_steps:
            self.saver.export_again(self.state, self.checkpointer, self.total_steps)
        if self.profiler is not None:
            self.profiler.start()
        with StopRequest() as stop:
            self._loop(bar, stop)
        if self.profiler is not None:
            self.profiler.stop()
        bar.close()
        self.folder.finish(f"epoch_{(self.total_steps - 1) // self.steps_per_epoch}", self.total_steps)

    def _loop(self, bar: Any, stop: StopRequest) -> None:
        config, progress = self.config, self.progress
        interval = LogInterval()
        while progress.step < self.total_steps:
            with self.stopwatch.time("step"):
                result, rate = self._step_or_note()
            interval.add(result.sums, result.tokens)
            progress.num_tokens += result.tokens
            progress.step += 1
            bar.update()
            stopping = self.world.any(stop.name is not None)
            if stopping or progress.step % config.log_every_n_steps == 0 or progress.step == self.total_steps:
                metrics = interval.close(self.world)
                bar.set_postfix_str(f"loss {metrics['loss']:.4f}")
                self._log(metrics | self._run_metrics(result, rate))
            with interval.pause(), self.stopwatch.paused():
                if (
                    config.run_val_every_n_steps
                    and progress.step % config.run_val_every_n_steps == 0
                    and not stopping
                ):
                    self.evaluate()
                self.saver.after_step(
                    progress,
                    self.state,
                    self.checkpointer,
                    total_steps=self.total_steps,
                    stopping=stopping,
                )
            if self.profiler is not None:
                self.profiler.step()
            if stopping and progress.step < self.total_steps:
                raise Interrupted(
                    f"stopped after step {progress.step} of {self.total_steps} ({stop.name or 'another process was asked'}); "
                    f"continue with resume_from_checkpoint=auto output_dir={self.folder.path}"
                )

    def _step_or_note(self) -> tuple[StepResult, float]:
        """A step; one that diverged leaves its rows in ``diverged.json``."""
        try:
            return self._step()
        except TrainingDiverged as error:
            positions = {int(row): i for i, row in enumerate(self.dataset.rows())}
            file = self.folder.note_divergence(
                {
                    "step": error.step,
                    "cause": error.cause,
                    "rows": {str(row): self.dataset.locate(positions[row]) for row in error.rows},
                    "not_finite": error.bad_rows,
                }
            )
            raise TrainingDiverged(
                error.step, error.cause, error.rows, error.bad_rows, note=f"The rows are kept in {file}."
            ) from error

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
                tokens=config.tokens_per_batch,
                padded=not config.padding_free,
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
        """Log held-out metrics and the reward of samples under ``eval_`` names; keep the weights if they are the best."""
        metrics = self.validation.run(
            self.policy, self.reference_val, step=self.progress.step, folder=self.folder.path
        )
        self._log({f"eval_{name}": value for name, value in metrics.items()})
        self.saver.after_validation(metrics, self.progress, self.state, self.checkpointer)

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
