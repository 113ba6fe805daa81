"""Starts a recipe from the command line, and prints its errors."""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig

from tokenpref._files import write_fault
from tokenpref.errors import (
    INTERRUPTED_EXIT,
    USER_ERROR_EXIT,
    DryRun,
    Interrupted,
    TokenprefError,
)
from tokenpref.training.config.command_line import load_config

__all__ = ["recipe_main"]

log = logging.getLogger("tokenpref")


def recipe_main(main: Callable[[DictConfig], Any]) -> Callable[[], None]:
    """Decorator for a recipe's ``main(cfg)``: ``--config NAME key=value ~key`` as everywhere in torchtune.

    An error that the user can fix is printed as one message without a traceback, with exit code 2. A run that a signal stopped
    exits with 75. See :func:`load_config` for the command line.

    Args:
        main: takes the merged config.

    Returns:
        A function without arguments, to be called under ``if __name__ == "__main__"``.
    """

    @functools.wraps(main)
    def run() -> None:
        _quiet_start()
        rank = int(os.environ.get("RANK", "0"))
        try:
            main(load_config(sys.argv[1:], announce=rank == 0))
        except DryRun as done:
            if rank == 0:
                print(done, file=sys.stderr, flush=True)
        except Interrupted as stop:
            if rank == 0:
                print(stop, file=sys.stderr, flush=True)
            sys.exit(INTERRUPTED_EXIT)
        except TokenprefError as error:
            # Every rank finds the same fault. A fault that only another rank found begins with that rank's number.
            if rank == 0 or str(error).startswith("rank "):
                print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(USER_ERROR_EXIT)
        except OSError as error:
            # Whatever writes or reads, including a user's metric logger: a full disk is not a fault of the program.
            fault = write_fault(error)
            file = f"{error.filename}: " if error.filename is not None else ""
            print(f"error: {file}{fault}", file=sys.stderr, flush=True)
            sys.exit(USER_ERROR_EXIT)

    return run


def _quiet_start() -> None:
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.propagate = False  # torchtune's logger prints through the root's handlers; one line is enough
    log.setLevel(logging.INFO)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torchao")
