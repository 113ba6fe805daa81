"""Compares the exported weights of a run with their manifests, before the run resumes or is declared finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenpref._sealed import fault_of
from tokenpref.errors import ConfigError

__all__ = ["BEST", "check_exports", "epochs_until", "finished_epochs"]

BEST = "best"


def finished_epochs(progress: dict[str, Any]) -> int:
    """Epochs whose weights were exported before a checkpoint was written.

    Args:
        progress: the checkpoint's description of itself, as :func:`tokenpref.training.saving.checkpoints.read_progress` gives it.
    """
    steps = progress["facts"].get("steps_per_epoch")
    return int(progress["step"]) // steps if isinstance(steps, int) and steps > 0 else 0


def epochs_until(export: str) -> int:
    """The number of epochs of a run whose last weights are in the folder of this name."""
    number = export.removeprefix("epoch_")
    return int(number) + 1 if number.isdecimal() else 0


def check_exports(folder: Path, epochs: int) -> None:
    """Compare the weights in ``epoch_0`` to ``epoch_{epochs - 1}`` and ``best`` with their manifests, byte by byte.

    A missing folder is not a fault, because people move weights, and their own checkpointer may write elsewhere. Added files
    are not faults either. Every byte is read, at about 4 GB/s from the page cache and otherwise at the speed of the disk. Only
    the main process should call this.

    Args:
        folder: the run's folder.
        epochs: epochs whose weights must be complete. A later folder may be incomplete, and is written again.

    Raises:
        ConfigError: naming each damaged folder, the file in it and what to do.
    """
    exports = [folder / name for name in (*(f"epoch_{n}" for n in range(epochs)), BEST)]
    faults = {export: fault_of(export, others=True) for export in exports if export.is_dir()}
    damaged = {export: fault for export, fault in faults.items() if fault is not None}
    if damaged:
        export, fault = next(iter(damaged.items()))
        others = "".join(f"; so does {other} ({fault})" for other, fault in list(damaged.items())[1:])
        raise ConfigError(
            f"output_dir: {export} holds damaged weights: {fault}{others}. Restore them from a copy, or remove {export} and "
            f"start again; {_what_comes_again(export, epochs)}"
        )


def _what_comes_again(export: Path, epochs: int) -> str:
    if export.name == BEST:
        return "best is then written again by the next validation that is better than those before"
    if export.name == f"epoch_{epochs - 1}":
        return "if the run resumes from the end of its last epoch, that epoch's weights are written again"
    return "the weights of an earlier epoch are not written again"
