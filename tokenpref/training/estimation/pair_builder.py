"""Building a contrastive pair: two prompts on one model, or two trainings that differ in which answer they prefer.

A model with adapters gives two adapters over one base.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from omegaconf import DictConfig, ListConfig, OmegaConf

from tokenpref.components import COMPONENT, accepts
from tokenpref.data import adapt_tokenizer
from tokenpref.distributed import World, init_world
from tokenpref.errors import ConfigError, DryRun
from tokenpref.models.agreement import config_numbers
from tokenpref.training.config.faults import loss_faults
from tokenpref.training.config.fields import Component, component, read_config, text
from tokenpref.training.config.keys import TrainConfig
from tokenpref.training.config.written import plain_without_environment
from tokenpref.training.estimation.pair_folder import METHODS, PAIR_FILE, SIDES, base_digest, write_pair
from tokenpref.training.loading.models import ModelMaker
from tokenpref.training.loading.preflight import check_scored
from tokenpref.training.saving.export_check import check_exports, epochs_until
from tokenpref.training.saving.run_folder import RunFolder
from tokenpref.training.trainer import PreferenceTrainer

__all__ = ["ContrastiveConfig", "ContrastiveReference"]

log = logging.getLogger("tokenpref")

DEFAULT_LOSS = {
    "sft": {COMPONENT: "tokenpref.losses.NLLLoss"},
    "dpo": {COMPONENT: "tokenpref.losses.DPOLoss", "beta": 0.1},
}
OWN_KEYS = ("method", "positive_prompt", "negative_prompt")


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig(TrainConfig):
    """How a pair is built; the training keys are those of one side's training."""

    method: str = text(choices=METHODS)
    """``dpo`` trains two models by DPO, one on exchanged answers. ``sft`` trains one on chosen and one on rejected
    answers. ``prompt`` trains nothing and pairs two prompts."""
    positive_prompt: str | None = text(None)
    """For ``method: prompt``: precedes the data's prompts on the positive side."""
    negative_prompt: str | None = text(None)
    """For ``method: prompt``: precedes the data's prompts on the negative side."""
    loss: Component | None = component(optional=True)  # type: ignore[assignment]  # widened: null is allowed here
    """Null takes the method's own: ``NLLLoss`` for sft, ``DPOLoss`` for dpo."""

    def faults(self) -> list[str]:
        """Faults that no single key shows."""
        faults = super().faults()
        prompts = (self.positive_prompt, self.negative_prompt)
        if self.method == "prompt" and (None in prompts or prompts[0] == prompts[1]):
            faults.append(
                "positive_prompt, negative_prompt: method prompt needs two different texts, "
                f"found {prompts[0]!r} and {prompts[1]!r}"
            )
        if (
            self.method in DEFAULT_LOSS
            and self.dataset is not None
            and not all(accepts(part.target(), "swap") for part in self.dataset.parts)
        ):
            faults.append(
                f"dataset ({self.dataset.path}): takes no `swap`, which the negative side is trained with; use "
                "tokenpref.data.preference_dataset, or give yours that argument"
            )
        return faults


class ContrastiveReference:
    """Builds both sides, phase by phase, and writes the pair's folder last.

    ``prompt`` trains nothing. ``sft`` and ``dpo`` train the positive side on the data and the negative side on the data with
    chosen and rejected exchanged, each from the same start, in ``output_dir/positive`` and ``output_dir/negative``. Of a model
    with adapters, the folder holds the two adapters and not the base. Started again with the same config, a finished side is kept
    and an unfinished one goes on from its newest checkpoint.

    Args:
        cfg: merged config, as :func:`tokenpref.training.recipe_main` delivers it.

    Raises:
        ConfigError: with every fault of the config.
    """

    recipe: ClassVar[str] = "recipes/contrastive_reference_distributed"

    def __init__(self, cfg: DictConfig) -> None:
        self._cfg = cfg
        self.config = read_config(ContrastiveConfig, cfg, self._faults)
        self.world: World | None = None
        self._folder: RunFolder | None = None

    def _faults(self, config: ContrastiveConfig) -> list[str]:
        faults = loss_faults(config.loss, PreferenceTrainer.provides, self.recipe)
        if config.method == "sft" and config.loss is not None and not faults and config.loss.build().needs:
            faults.append(
                f"loss ({config.loss.path}): compares two answers, but method is sft; set loss=null or method=dpo"
            )
        return faults

    def run(self) -> Path:
        """Build what is missing.

        Returns:
            The pair's folder.

        Raises:
            DryRun: after the checks, with ``dry_run: true``.
            ConfigError: if weights of a side are damaged; then the pair is not declared whole.
        """
        config = self.config
        folder = Path(config.output_dir).absolute()
        self.world = init_world(config.device, process_group=config.compute_dtype is not None)
        plain: dict[str, Any] = OmegaConf.to_container(self._cfg, resolve=True)  # type: ignore[assignment]
        self._folder = own = RunFolder(folder, plain, self.recipe, self.world, schema=ContrastiveConfig)
        own.check(PAIR_FILE)
        sides: dict[str, dict[str, Any]] = {}
        trained: list[Path] = []
        maker = ModelMaker(config, self.world)
        if config.method == "prompt":
            tokenizer = adapt_tokenizer(config.tokenizer.build())
            check_scored(maker, {"checkpointer": config.checkpointer}, tokenizer)
            prompts = (config.positive_prompt, config.negative_prompt)
            sides = {s: {"checkpoint": None, "prompt": p} for s, p in zip(SIDES, prompts, strict=True)}
        else:
            kind = "adapter" if own.world.together(lambda: self._has_adapters(maker)) else "checkpoint"
            for side in SIDES:
                weights = self._build_side(folder, side, own)
                trained.append(weights)
                sides[side] = {kind: weights.relative_to(folder).as_posix(), "prompt": None}
        if config.dry_run:  # a side that is still to be trained has ended the run in its own checks
            raise DryRun(f"dry run: nothing is left to train, nothing was written to {folder}")
        own.claim_once()

        def check_sides() -> None:
            """The first side may have been harmed while the second was trained."""
            for weights in trained if own.world.is_main else ():
                check_exports(weights.parent, epochs_until(weights.name))

        self.world.together(check_sides)
        if self.world.is_main:
            write_pair(
                folder,
                method=config.method,
                tokenizer=adapt_tokenizer(config.tokenizer.build()).fingerprint(),
                model=config_numbers(maker.on_meta()),
                base=base_digest(config.checkpointer),
                sides=sides,
                config=plain_without_environment(self._cfg),
            )
            log.info(f"contrastive pair ({config.method}) in {folder}")
        self.world.barrier()
        return folder

    def _has_adapters(self, maker: ModelMaker) -> bool:
        """Whether the sides are adapters.

        Raises:
            ConfigError: if a merged model is asked for too, which nothing would read.
        """
        if maker.adapters is not None and not self.config.save_adapter_weights_only:
            raise ConfigError(
                "save_adapter_weights_only: is false, and a pair of adapters holds no merged models; set it to true (`tokenpref "
                "merge` merges a side's adapter)"
            )
        return maker.adapters is not None

    def _build_side(self, folder: Path, side: str, own: RunFolder) -> Path:
        """Train a side unless it is there; returns the folder of its weights."""
        assert self.world is not None  # run() joins it
        cfg = self._side_config(folder, side)
        plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
        run = RunFolder(
            folder / side, plain, PreferenceTrainer.recipe, self.world, schema=PreferenceTrainer.schema
        )
        weights = run.finished()
        # Where somebody removed them the training goes on from its last checkpoint and writes them again.
        if weights is not None and self.world.broadcast_object(weights.is_dir()):
            self._say(f"{side} side: done already ({weights})")
            return weights
        goes_on = self.world.broadcast_object(self.world.is_main and run.checkpoints.newest()[0] is not None)
        cfg.resume_from_checkpoint = "auto"
        self._say(f"{side} side: {'goes on' if goes_on else 'begins'}")
        trainer = PreferenceTrainer(cfg, self.world)
        try:
            trainer.setup()
            own.claim_once()
            trainer.train()
        finally:
            trainer.close()
        done = run.finished(compare=False)  # train() has done so
        assert done is not None  # train() marked it, or raised
        return done

    def _side_config(self, folder: Path, side: str) -> DictConfig:
        cfg: DictConfig = self._cfg.copy()
        for key in OWN_KEYS:
            cfg.pop(key, None)
        cfg.output_dir = str(folder / side)
        if cfg.get("loss") is None:
            cfg.loss = DEFAULT_LOSS[self.config.method]
        if side == "negative":
            for key in ("dataset", "dataset_val"):
                named = cfg.get(key)
                for part in named if isinstance(named, ListConfig) else [named]:
                    if part is not None:
                        part.swap = not part.get("swap", False)
        return cfg

    def _say(self, message: str) -> None:
        if self.world is not None and self.world.is_main:
            log.info(message)

    def close(self) -> None:
        """Let other runs into the folder, and leave the process group."""
        if self._folder is not None:
            self._folder.unlock()
        if self.world is not None:
            self.world.close()
