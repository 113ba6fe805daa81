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
from tokenpref.models.decoder_of import decoder_of
from tokenpref.training.config.faults import loss_faults
from tokenpref.training.config.fields import Component, component, flag, read_config, text
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
OWN_KEYS = ("method", "positive_prompt", "negative_prompt", "keep_checkpoints")


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
    keep_checkpoints: bool | None = flag(None)
    """Keep the last checkpoints of both sides when the pair is finished. They are needed only to train the pair further with more
    ``epochs``. Null keeps those of whole models, and removes those of adapters, which are larger than the pair."""

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
    and an unfinished one goes on from its newest checkpoint. Checkpoints that the finished pair does not keep
    (``keep_checkpoints``) are removed after ``pair.yaml`` is written.

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
        keep = True
        maker = ModelMaker(config, self.world)
        if config.method == "prompt":
            tokenizer = adapt_tokenizer(config.tokenizer.build())
            check_scored(maker, {"checkpointer": config.checkpointer}, tokenizer)
            prompts = (config.positive_prompt, config.negative_prompt)
            sides = {s: {"checkpoint": None, "prompt": p} for s, p in zip(SIDES, prompts, strict=True)}
        else:
            adapters = own.world.together(lambda: self._has_adapters(maker))
            kind = "adapter" if adapters else "checkpoint"
            keep = not adapters if config.keep_checkpoints is None else config.keep_checkpoints
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
                model=decoder_of(maker.on_meta()).numbers(),
                base=base_digest(config.checkpointer),
                sides=sides,
                config=plain_without_environment(self._cfg),
            )
            log.info(f"contrastive pair ({config.method}) in {folder}")
        self.world.barrier()
        # Last: until the pair is whole, a side may still have to go on from its checkpoint.
        for side in SIDES if not keep else ():
            self._run_of(folder, side)[1].remove_checkpoints()
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
        cfg, run = self._run_of(folder, side)
        weights = run.finished()
        # Where somebody removed them the training goes on from its last checkpoint and writes them again.
        if weights is not None and self.world.broadcast_object(weights.is_dir()):
            self._say(f"{side} side: done already ({weights})")
            return weights
        goes_on = self.world.broadcast_object(self.world.is_main and run.checkpoints.newest()[0] is not None)
        if not goes_on:
            self._refuse_without_checkpoint(run, side, weights)
        cfg.resume_from_checkpoint = "auto"
        self._say(f"{side} side: {'goes on' if goes_on else 'begins'}")
        trainer = PreferenceTrainer(cfg, self.world)
        try:
            trainer.setup()
            trainer.run.folder.tokenizer_beside_adapter = False  # whoever uses the pair names the tokenizer
            own.claim_once()
            trainer.train()
        finally:
            trainer.close()
        done = run.finished(compare=False)  # train() has done so
        assert done is not None  # train() marked it, or raised
        return done

    def _refuse_without_checkpoint(self, run: RunFolder, side: str, weights: Path | None) -> None:
        """Refuse to go on with a side that was finished and has no checkpoint.

        Args:
            run: the folder of the side.
            side: its name.
            weights: the missing folder of its weights; None if it was finished with another length.

        Raises:
            ConfigError: on every rank.
        """

        def check() -> None:
            if not run.world.is_main or not run.is_finished():
                return
            removed = "has no checkpoint to go on from (a finished pair of adapters keeps none, unless keep_checkpoints is true)"
            if weights is None:
                raise ConfigError(
                    f"output_dir: the {side} side in {run.path} was finished with other epochs or max_steps_per_epoch, and "
                    f"{removed}; set them as they were, or build a pair of the new length in another output_dir"
                )
            raise ConfigError(
                f"output_dir: {weights} is missing, and the {side} side {removed}; restore that folder from a copy, or remove "
                f"{run.path} and start again: the side is then trained again"
            )

        run.world.together(check)

    def _run_of(self, folder: Path, side: str) -> tuple[DictConfig, RunFolder]:
        """The config of a side's training, and its folder."""
        assert self.world is not None  # run() joins it
        cfg = self._side_config(folder, side)
        plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
        recipe, schema = PreferenceTrainer.recipe, PreferenceTrainer.schema
        return cfg, RunFolder(folder / side, plain, recipe, self.world, schema=schema)

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
