"""Evaluation of a trained model, as ``recipes/evaluate_distributed`` runs it."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, ClassVar

import torch
from omegaconf import DictConfig, OmegaConf

from tokenpref._files import move_aside, writing
from tokenpref._paths import resolve_path
from tokenpref._sealed import SHA256, digest_of
from tokenpref.data import PreferenceDataset, adapt_tokenizer
from tokenpref.distributed import init_world
from tokenpref.errors import DryRun
from tokenpref.models.reference import KL_STATISTICS
from tokenpref.training.config.faults import loss_faults
from tokenpref.training.config.fields import read_config
from tokenpref.training.config.keys import EvaluateConfig
from tokenpref.training.evaluation.intervals import mean_interval, wilson_interval
from tokenpref.training.evaluation.measures import evaluate_pairs, paired_gain, sample_rewards
from tokenpref.training.loading.models import ModelMaker, weights_digest
from tokenpref.training.loading.preflight import check_openings, check_scored
from tokenpref.training.saving.portions import KeptPortions
from tokenpref.training.step.batches import check_pairs

__all__ = ["Evaluator"]

log = logging.getLogger("tokenpref")


class Evaluator:
    """Held-out loss, accuracy, margins and KL of a model, and samples from it with their reward.

    Writes ``evaluation.json`` and, with sampling, ``samples.jsonl`` to ``output_dir``. An evaluation that is killed goes on when
    the same one is started again: what it had found lies in ``evaluation.partial.json``.

    Args:
        cfg: merged config, as :func:`tokenpref.training.recipe_main` delivers it.

    Raises:
        ConfigError: with every fault of the config.
    """

    recipe: ClassVar[str] = "recipes/evaluate_distributed"
    provides: ClassVar[frozenset[str]] = KL_STATISTICS | {"ref"}

    def __init__(self, cfg: DictConfig) -> None:
        self._cfg = cfg
        self.config = read_config(EvaluateConfig, cfg, self._faults)

    def _faults(self, config: EvaluateConfig) -> list[str]:
        faults = loss_faults(config.loss, self.provides, self.recipe)
        if config.dataset is None and config.sampling is None:
            faults.append(
                "dataset, sampling: both are null, so there is nothing to evaluate; set at least one"
            )
        return faults

    def run(self) -> dict[str, Any]:
        """Evaluate and write the results.

        Returns:
            What ``evaluation.json`` holds: metrics under the trainer's names, ``rewards/accuracies_interval``
            (Wilson, 95 %), ``num_pairs``, and from samples ``reward``, ``reward_interval`` (normal, 95 %),
            ``num_samples``, ``reward_gain`` and ``reward_gain_interval`` (paired with ``sampling.compare_to``).
        """
        config = self.config
        torch.manual_seed(config.seed)
        self.world = init_world(config.device)
        self.tokenizer = adapt_tokenizer(config.tokenizer.build())
        dataset: PreferenceDataset | None = None
        if config.dataset is not None:
            component = config.dataset
            dataset = self.world.together(lambda: component.build(self.tokenizer))
            check_pairs(dataset, component)
            if self.world.is_main:
                log.info(f"dataset: {dataset.report.summary()}")
        readers = {"checkpointer": config.checkpointer, "ref_checkpointer": config.ref_checkpointer}
        self._maker = ModelMaker(config, self.world)
        check_scored(
            self._maker,
            {key: reader for key, reader in readers.items() if reader is not None},
            self.tokenizer,
            data=(dataset, config.dataset) if dataset is not None and config.dataset is not None else None,
            openings=config.sampling.prompts if config.sampling is not None else None,
        )
        if config.sampling is not None:
            check_openings(config.sampling, self.tokenizer, self._maker.context)
        folder = Path(config.output_dir)
        if config.dry_run:
            raise DryRun(f"dry run: nothing stands against this evaluation, nothing was written to {folder}")
        self._portions = KeptPortions(folder / "evaluation.partial.json", self._job(dataset), self.world)
        self.policy = self._maker.policy()
        results: dict[str, Any] = {}
        if dataset is not None:
            results |= self._evaluate(dataset)
        if config.sampling is not None:
            results |= self._sample()
        if self.world.is_main:
            text = json.dumps(results, indent=1, sort_keys=True)
            self._write("evaluation.json", text + "\n")
            log.info(text)
        self._portions.drop()
        return results

    def _job(self, dataset: PreferenceDataset | None) -> dict[str, Any]:
        """Everything that the results depend on."""
        config, sampling = self.config, self.config.sampling
        readers = (config.checkpointer, config.ref_checkpointer)

        def digests() -> list[str | None]:
            # The main process alone reads checkpoints; other nodes need not have the files.
            return [
                weights_digest(c) if c is not None and "checkpoint_dir" in c.kwargs else None
                for c in (readers if self.world.is_main else ())
            ]

        adapter = self.world.together(self._maker.adapter_digest)
        return {
            "config": OmegaConf.to_container(self._cfg, resolve=True),
            "weights": self.world.together(digests),
            **({} if adapter is None else {"adapter": adapter}),
            "data": dataset.fingerprint() if dataset is not None else None,
            "openings": digest_of(resolve_path(sampling.prompts), SHA256) if sampling is not None else None,
        }

    def _evaluate(self, dataset: PreferenceDataset) -> dict[str, Any]:
        config = self.config
        assert config.loss is not None  # the config was refused otherwise
        loss = config.loss.build()
        metrics = evaluate_pairs(
            self.policy,
            self._maker.reference(self.policy),
            loss,
            dataset,
            self.world,
            batch_size=config.batch_size,
            pad_id=self.tokenizer.pad_id,
            needs=frozenset(loss.needs) | frozenset(config.log_stats),
            progress="held-out pairs",
            portions=self._portions,
        )
        interval = wilson_interval(metrics["rewards/accuracies"], len(dataset))
        return {**metrics, "rewards/accuracies_interval": list(interval), "num_pairs": len(dataset)}

    def _sample(self) -> dict[str, Any]:
        sampling = self.config.sampling
        assert sampling is not None  # the caller looked
        records = sample_rewards(
            self.policy,
            self.tokenizer,
            sampling,
            self.world,
            seed=self.config.seed,
            portions=self._portions,
        )
        mean, low, high = mean_interval([r["reward"] for r in records])
        results: dict[str, Any] = {
            "reward": mean,
            "reward_interval": [low, high],
            "num_samples": len(records),
        }
        if sampling.compare_to is not None:
            gain, low, high = paired_gain(records, resolve_path(sampling.compare_to))
            results |= {"reward_gain": gain, "reward_gain_interval": [low, high]}
        if self.world.is_main:
            self._write("samples.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
        return results

    def _write(self, name: str, text: str) -> None:
        folder = Path(self.config.output_dir)
        file, temporary = folder / name, folder / f"{name}.tmp"
        with writing(file):
            folder.mkdir(parents=True, exist_ok=True)
            temporary.write_text(text, encoding="utf-8")
            # Results of another evaluation are not this one's to replace.
            if file.exists() and file.read_bytes() != temporary.read_bytes():
                log.info(f"{file} holds other results; moved to {move_aside(file).name}")
            temporary.replace(file)

    def close(self) -> None:
        """Leave the process group."""
        if hasattr(self, "world"):
            self.world.close()
