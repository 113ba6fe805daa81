"""The output folder of a run: its owner, its lock, and the checkpoint to resume from."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from tokenpref import __version__
from tokenpref._files import move_aside, try_lock, write_json, writing
from tokenpref._paths import resolve_path
from tokenpref._sealed import MANIFEST, fault_of, seal
from tokenpref._yaml import check_yaml
from tokenpref.data import Tokenizer
from tokenpref.distributed import World, full_state_dict
from tokenpref.errors import ConfigError
from tokenpref.models.adapters import adapter_state, has_adapters, merged
from tokenpref.models.peft_format import AdapterLayout, Base, write_adapter
from tokenpref.training.config.defaults import component_paths, without_defaults
from tokenpref.training.saving.checkpoints import PROGRESS, Checkpoints, read_progress, step_of
from tokenpref.training.saving.export import base_of, describe_adapter, describe_export, forget_tied_head
from tokenpref.training.saving.export_check import BEST, check_exports, epochs_until, finished_epochs

__all__ = ["RunFolder", "config_fingerprint"]

log = logging.getLogger("tokenpref")

RUN_FILE = "run.json"
FINISHED_FILE = "finished.json"
LOCK_FILE = ".lock"
CHECKPOINTS = "checkpoints"
MERGED = "merged"
# Keys that change how a run is executed or observed, not what it computes.
INCIDENTAL = frozenset(
    {
        "resume_from_checkpoint", "checkpoint_every_n_steps", "checkpoint_every_minutes", "keep_last",
        "enable_async_checkpointing", "best", "dry_run",
        "log_every_n_steps", "log_peak_memory_stats", "metric_logger", "profiler", "run_val_every_n_steps",
        "batch_size_val", "epochs", "max_steps_per_epoch", "dataset_val", "loss_val", "log_stats_val", "sampling",
        "reference_cache_dir", "head_memory_mb", "save_adapter_weights_only", "keep_checkpoints",
    }
)  # fmt: skip
# Earlier versions counted these too, and every other key that the file named.
COUNTED_BEFORE = frozenset({"head_memory_mb"})
# Files that hold the config of a folder's run, with the key that it has there: a metric logger's of torchtune, and a pair's.
HOLD_CONFIG = (("torchtune_config.yaml", None), ("pair.yaml", "config"))


def config_fingerprint(
    config: Mapping[str, Any], schema: type | None = None, importable: Collection[str] | None = None
) -> str:
    """sha256 over what a config computes.

    Incidental keys (logging, saving, length) do not count, and neither do keys and arguments of components at their default: a
    config that names them is the same as one that does not.

    Args:
        config: the config as plain data.
        schema: dataclass of the recipe's keys, which knows their defaults.
        importable: see :func:`~tokenpref.training.config.defaults.without_defaults`.
    """
    return _sha256_without(without_defaults(schema, config, importable), INCIDENTAL)


def _fingerprint_as_written(config: Mapping[str, Any]) -> str:
    """The fingerprint of earlier versions, which counted defaults where the file named them."""
    return _sha256_without(config, INCIDENTAL - COUNTED_BEFORE)


def _sha256_without(config: Mapping[str, Any], left_out: frozenset[str]) -> str:
    kept = {key: value for key, value in config.items() if key not in left_out}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


class RunFolder:
    """An output folder that belongs to one run.

    Args:
        path: the folder; it need not exist.
        config: the run's config as plain data.
        recipe: name of the recipe, for the record.
        world: the run's processes; only the main process uses the folder.
        schema: dataclass of the recipe's keys, for their defaults.

    Attributes:
        tokenizer: the tokenizer that exported folders describe, once it is known.
        tokenizer_beside_adapter: whether the folder of an adapter also holds a tokenizer. The side of a pair needs none.
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        recipe: str,
        world: World,
        *,
        schema: type | None = None,
    ) -> None:
        self.path = path
        self.world = world
        self._config, self._schema = config, schema
        self._fingerprint = config_fingerprint(config, schema)
        self._length = {
            "epochs": config.get("epochs", 1),
            "max_steps_per_epoch": config.get("max_steps_per_epoch"),
        }
        self._recipe = recipe
        self.checkpoints = Checkpoints(path / CHECKPOINTS, world)
        self._lock: int | None = None
        self._found: list[str] | None = None
        self._own_checkpoint: Path | None = None
        self.tokenizer: Tokenizer | None = None
        self.tokenizer_beside_adapter = True

    def start(self, resume: bool | str) -> Path | None:
        """The checkpoint to continue from; the same on every rank. Writes nothing.

        Results in the folder are never replaced by accident. A folder with checkpoints or weights is refused unless the run
        resumes from one of these checkpoints. Resuming from one that is not the newest renames the later ones.

        Args:
            resume: False: none, a run from the beginning. "auto": the newest one in this folder that is sealed and
                unharmed, if there is any. True: likewise, and there has to be one. A path: that checkpoint, or the newest
                one of the run in that folder.

        Raises:
            ConfigError: on every rank: for a folder that another run owns or is writing to, that holds what would be replaced, if
                no checkpoint can be read where there has to be one (damaged ones are named), or if weights that the run exported
                here are damaged.
        """

        def find() -> Path | None:
            if not self.world.is_main:
                return None
            self._refuse_if_locked()
            found = self._find(resume)
            if found is None or found.parent.resolve() != self.checkpoints.path.resolve():
                self._refuse_another()
                self._refuse_to_replace(resume)
            else:
                check_exports(self.path, finished_epochs(read_progress(found)))
                self._say_what_comes_again(found)
                self._own_checkpoint = found
            self._found = self.held()
            return found

        found: Path | None = self.world.broadcast_object(self.world.together(find))
        return found

    def check(self, *made: str) -> None:
        """Refuse a folder of another run, for a run that keeps its own earlier results.

        Args:
            made: names of the run's results. In a folder without the record of a run, these must not exist.

        Raises:
            ConfigError: on every rank.
        """

        def check() -> None:
            if not self.world.is_main:
                return
            self._refuse_if_locked()
            self._refuse_another()
            foreign = [name for name in made if (self.path / name).exists()] if self._owner() is None else []
            if foreign:
                raise ConfigError(
                    f"output_dir: {self.path} holds {foreign[0]}, which no run of this recipe made; set another output_dir, or "
                    "remove it"
                )

        self.world.together(check)

    def held(self) -> list[str]:
        """The names of valuable results in the folder: a finished run, checkpoints and weights."""
        names = [FINISHED_FILE] if (self.path / FINISHED_FILE).exists() else []
        names += [f"{CHECKPOINTS}/{folder.name}" for folder in self.checkpoints.named()]
        weights = [*self.path.glob("epoch_*"), self.path / BEST, self.path / f"{BEST}.former"]
        return names + sorted(folder.name for folder in weights if folder.exists())

    def _refuse_another(self) -> None:
        owner = self._owner()
        if owner is None or self._is_mine(owner):
            return
        mend = "set another output_dir, or remove that folder"
        if owner["defaults_count"]:
            mend += (
                ". An earlier version of tokenpref wrote it and compared every key that the config named. To go on with that "
                f"run, start it with the config file of then, or remove {self.path / RUN_FILE} if you know that the settings are "
                "the same"
            )
        raise ConfigError(
            f"output_dir: {self.path} holds another run ({owner['recipe']}, id {owner['id']}) with another config; {mend}"
        )

    def _is_mine(self, owner: Mapping[str, Any]) -> bool:
        """Whether the run that owns the folder computes the same as this one."""
        if not owner["defaults_count"]:
            return bool(owner["config"] == self._fingerprint)
        if owner["config"] == _fingerprint_as_written(self._config):
            return True
        # The config of then may have named keys at their default. It lies here, and is known by its fingerprint.
        importable = {path for _, path in component_paths(self._config)}
        return any(
            owner["config"] == _fingerprint_as_written(then)
            and config_fingerprint(then, self._schema, importable) == self._fingerprint
            for then in self._configs_of_then()
        )

    def _configs_of_then(self) -> Iterator[Mapping[str, Any]]:
        """What the folder holds of its run's config: in files of its loggers, in a pair, and in the newest checkpoint."""
        for name, key in HOLD_CONFIG:
            file = self.path / name
            try:
                check_yaml(file)
                held: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=True)
            except (OSError, ValueError, OmegaConfBaseException) as error:
                log.debug(f"{file} cannot be read ({error})")
                continue
            config = held.get(key) if key is not None and isinstance(held, Mapping) else held
            if isinstance(config, Mapping):
                yield config
        newest, _ = self.checkpoints.newest()
        recorded = read_progress(newest)["facts"].get("config") if newest is not None else None
        if isinstance(recorded, Mapping):
            yield recorded

    def _refuse_to_replace(self, resume: bool | str) -> None:
        """Check that a run from the beginning, or from another folder's checkpoint, has a folder without results."""
        held = self.held()
        # A run that was killed before its first checkpoint starts again when it is resumed, and writes the same weights.
        begun = [name for name in held if not name.startswith((FINISHED_FILE, CHECKPOINTS))]
        if not held or (resume == "auto" and held == begun and self._owner() is not None):
            return
        some = ", ".join(held[:4]) + (f" and {len(held) - 4} more" if len(held) > 4 else "")
        state = "a finished run" if FINISHED_FILE in held else "results of a run"
        go_on = resume != "auto" and any(name.startswith(CHECKPOINTS) for name in held)
        mend = "resume_from_checkpoint=auto to go on from its newest checkpoint, " if go_on else ""
        raise ConfigError(
            f"output_dir: {self.path} holds {state} ({some}), which would be replaced; set {mend}another output_dir, or remove "
            "that folder yourself"
        )

    def _move_aside(self, found: Path) -> None:
        """Rename checkpoints that are later than the one to resume from."""
        for later in self.checkpoints.named():
            if step_of(later) > step_of(found) and fault_of(later) is None:
                aside = move_aside(later)
                log.info(
                    f"{later} is later than {found.name}, from which this run resumes; moved to {aside.name}"
                )

    def _say_what_comes_again(self, found: Path) -> None:
        """Log that a finished run of an earlier version has no checkpoint of its end."""
        try:
            end = json.loads((self.path / FINISHED_FILE).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return
        except ValueError:
            end = {}
        if not isinstance(end, dict) or end.get("step") != step_of(found):
            log.info(
                f"{self.path} holds a finished run without a checkpoint of its end: what it trained after {found.name} is "
                "trained again, and the weights of that epoch are written again"
            )

    def _find(self, resume: bool | str) -> Path | None:
        if resume is False:
            return None
        if isinstance(resume, str) and resume != "auto":
            return self._given(resolve_path(resume))
        found, faults = self.checkpoints.newest()
        for fault in faults:
            log.info(f"skipped a damaged checkpoint: {fault}")
        if found is not None:
            log.info(f"continuing from {found}")
        elif resume == "auto":
            log.info(f"no checkpoint in {self.checkpoints.path}: a run from the beginning")
        else:
            raise ConfigError(
                f"resume_from_checkpoint: no checkpoint that can be read in {self.checkpoints.path}; set output_dir to the "
                "folder of the run to continue, or resume_from_checkpoint=auto or false"
            )
        return found

    def _given(self, path: Path) -> Path:
        """The checkpoint of a path."""
        found, faults = Checkpoints(path / CHECKPOINTS, self.world).newest()
        if found is not None:
            return found
        if faults:
            fault = faults[0]
        elif not path.is_dir():
            fault = f"there is no such folder: {path}"
        elif not (path / PROGRESS).is_file():
            fault = f"{path} is no checkpoint (it has no {PROGRESS})"
        elif harm := fault_of(path):
            fault = f"{path}: {harm}"
        else:
            return path
        raise ConfigError(
            f"resume_from_checkpoint: no checkpoint that can be read: {fault}. Name the folder of a checkpoint or of a run, or "
            "set resume_from_checkpoint=auto or false"
        )

    def lock(self) -> None:
        """Lock the folder against other runs while this process lives.

        Raises:
            ConfigError: if another process has it.
        """

        def lock() -> None:
            if not self.world.is_main or self._lock is not None:
                return
            with writing(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock = try_lock(self.path / LOCK_FILE)
            if self._lock is None:
                raise ConfigError(self._locked())

        self.world.together(lock)

    def unlock(self) -> None:
        """Finish background writes and unlock the folder. A process that dies also releases its lock."""
        self.checkpoints.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _refuse_if_locked(self) -> None:
        file = self.path / LOCK_FILE
        if not file.is_file() or self._lock is not None:
            return
        descriptor = try_lock(file, create=False)
        if descriptor is None:
            raise ConfigError(self._locked())
        os.close(descriptor)

    def _locked(self) -> str:
        return f"output_dir: another run is writing to {self.path} at this moment; wait for it, or set another output_dir"

    @contextmanager
    def removed_on_failure(self) -> Iterator[None]:
        """Remove an empty folder if the run fails to start (torchtune's checkpointers create it when they are built)."""
        fresh = not self.path.exists()
        try:
            yield
        except BaseException:
            if fresh and self.world.is_main and self.path.is_dir() and not any(self.path.iterdir()):
                self.path.rmdir()
            raise

    def export(self, checkpointer: Any, model: nn.Module, epoch: int) -> None:
        """Write a model to ``epoch_N``, with a manifest as the last file.

        Of a model with adapters, the adapter is written in PEFT's format, and with ``save_adapter_weights_only: false`` also the
        merged model, in a folder of its own within ``epoch_N``. transformers would not look at it beside an adapter. Whole models
        are written in the checkpointer's format.
        """
        layout = AdapterLayout.of(model) if has_adapters(model) else None
        whole = layout is None or not self._config.get("save_adapter_weights_only", True)
        state = full_state_dict(model, self.world) if whole else adapter_state(model, self.world)

        def write() -> None:
            if not self.world.is_main:
                return
            folder = self.path / f"epoch_{epoch}"
            with writing(f"{folder}: the model"):
                (folder / MANIFEST).unlink(missing_ok=True)
                if (
                    layout is not None
                ):  # files of an unfinished export must not get among those of the merged model
                    shutil.rmtree(folder, ignore_errors=True)
                if whole:
                    self._write_whole(checkpointer, merged(state, model), epoch)
                if layout is not None:
                    if whole:
                        _move_inside(folder, MERGED)
                    folder.mkdir(parents=True, exist_ok=True)
                    write_adapter(folder, state, layout, self.base)
                    if self.tokenizer_beside_adapter:
                        describe_adapter(folder, self.base, self.tokenizer)
                if folder.is_dir():  # a user's checkpointer may write elsewhere
                    seal(folder)

        self.world.together(write)
        self.world.barrier()

    def _write_whole(self, checkpointer: Any, state: dict[str, Tensor], epoch: int) -> None:
        """Write all weights in the checkpointer's format, and describe them."""
        forget_tied_head(checkpointer, state)
        checkpointer.save_checkpoint({"model": state}, epoch=epoch, intermediate_checkpoint=False)
        folder = self.path / f"epoch_{epoch}"
        if folder.is_dir():
            describe_export(folder, state, self.tokenizer)

    @cached_property
    def base(self) -> Base | None:
        """The weights from which the policy starts, which are recorded beside an adapter."""
        return base_of(self._config)

    def export_best(
        self, checkpointer: Any, model: nn.Module, *, epochs: int, record: dict[str, Any]
    ) -> None:
        """Write a model to ``best``. The previous one is kept until the new one is complete.

        Args:
            checkpointer: writes the model.
            model: the model.
            epochs: epochs of the run, a number that no other export of the run has.
            record: the reason why it is the best, for ``best.json``.
        """
        self.export(checkpointer, model, epochs)

        def move() -> None:
            written, best = self.path / f"epoch_{epochs}", self.path / BEST
            if not self.world.is_main or not written.is_dir():
                return
            with writing(f"{best}: the model"):
                write_json(written / f"{BEST}.json", record)
                seal(written)
                former = self.path / f"{BEST}.former"
                shutil.rmtree(former, ignore_errors=True)
                if best.exists():
                    best.rename(former)
                written.rename(best)
                shutil.rmtree(former, ignore_errors=True)

        self.world.together(move)
        self.world.barrier()

    def note_divergence(self, record: dict[str, Any]) -> Path:
        """Write the record of a step whose loss or gradient is not finite to ``diverged.json``."""
        file = self.path / "diverged.json"
        if self.world.is_main:
            write_json(file, record)
        return file

    def finish(self, export: str, step: int | None = None) -> None:
        """Mark the run as complete.

        Args:
            export: name of the folder of its last weights.
            step: its last step, if there is a checkpoint of it.

        Raises:
            ConfigError: on every rank, if weights that the run exported are damaged.
        """

        def mark() -> None:
            if self.world.is_main:
                check_exports(self.path, epochs_until(export))
                write_json(self.path / FINISHED_FILE, {"weights": export, "step": step, **self._length})

        self.world.together(mark)
        self.world.barrier()

    def is_finished(self) -> bool:
        """Whether this run was complete at some length, whatever is left of it. On the main process."""
        owner = self._owner()
        return owner is not None and self._is_mine(owner) and (self.path / FINISHED_FILE).is_file()

    def remove_checkpoints(self) -> None:
        """Remove all checkpoints of a complete run. Started again after a kill, it removes the rest.

        Raises:
            ConfigError: on every rank, if another process goes on with the run.
        """

        def found() -> bool:
            return self.world.is_main and self.is_finished() and self.checkpoints.path.is_dir()

        if not self.world.broadcast_object(found()):
            return
        self.lock()
        try:
            self.world.together(lambda: self.checkpoints.remove() if self.world.is_main else None)
        finally:
            self.unlock()

    def finished(self, *, compare: bool = True) -> Path | None:
        """The folder of the last weights if this run (same config and length) is complete; the same on every rank.

        Args:
            compare: whether the exported weights are compared with their manifests.

        Raises:
            ConfigError: on every rank, if what the run left is damaged.
        """
        # Only the main process looks, because files may appear while other processes look.
        weights = self.world.together(lambda: self._finished(compare) if self.world.is_main else None)
        return self.world.broadcast_object(weights)

    def _finished(self, compare: bool) -> Path | None:
        file = self.path / FINISHED_FILE
        owner = self._owner()
        if owner is None or not file.is_file() or not self._is_mine(owner):
            return None
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            name = record["weights"]
            inside = isinstance(name, str) and name not in ("", "..") and Path(name).name == name
            fault = None if inside else f"weights is {name!r}"
        except (ValueError, KeyError, TypeError) as error:
            fault = str(error)
        if fault is not None:
            raise ConfigError(
                f"output_dir: {file} is damaged ({fault}); remove it and run again: the last epoch is then repeated"
            )
        # One that ended earlier goes on; earlier versions recorded no length.
        if any(record.get(key, value) != value for key, value in self._length.items()):
            return None
        weights = self.path / str(name)
        if compare:
            check_exports(self.path, epochs_until(weights.name))
        return weights

    def claim(self, *, resume: bool) -> None:
        """Record this run as the folder's owner, and as unfinished. Nothing is removed.

        Args:
            resume: whether the run resumes, and so keeps its id.

        Raises:
            ConfigError: on every rank, if another run wrote here since :meth:`start` looked, or writes here now.
        """
        self.lock()

        def claim() -> None:
            if not self.world.is_main:
                return
            if self._found is not None and self.held() != self._found:
                raise ConfigError(
                    f"output_dir: another run wrote to {self.path} meanwhile; start again to see what is there"
                )
            (self.path / FINISHED_FILE).unlink(missing_ok=True)
            if self._own_checkpoint is not None:
                self._move_aside(self._own_checkpoint)
            _ = self.base  # read now, because it may be gone when the weights are exported
            if not (resume and self._owner() is not None):
                record = {
                    "id": uuid.uuid4().hex,
                    "recipe": self._recipe,
                    "config": self._fingerprint,
                    "defaults_count": False,
                    "tokenpref": __version__,
                    "world_size": self.world.size,
                }
                write_json(self.path / RUN_FILE, record)

        self.world.together(claim)
        self.world.barrier()

    def run_id(self) -> str | None:
        """The run that owns the folder; None before it is claimed."""
        owner = self._owner()
        return None if owner is None else str(owner["id"])

    def claim_once(self) -> None:
        """Record this run as the folder's owner unless it already is. Nothing is removed."""
        # Only the main process decides, because its file may appear while another process looks.
        if self.world.broadcast_object(self._owner() is None if self.world.is_main else None):
            self.claim(resume=False)

    def _owner(self) -> dict[str, Any] | None:
        path = self.path / RUN_FILE
        if not path.is_file():
            return None
        try:
            owner: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            known = {key: owner[key] for key in ("id", "recipe", "config")}
            return {**known, "defaults_count": bool(owner.get("defaults_count", True))}
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"output_dir: {path} is damaged ({error}); set another output_dir") from error


def _move_inside(folder: Path, name: str) -> None:
    """Move everything in a folder to a folder within it, if there is such a folder."""
    if not folder.is_dir():
        return
    aside = folder.with_name(f"{folder.name}.{name}")
    folder.rename(aside)
    folder.mkdir()
    aside.rename(folder / name)
