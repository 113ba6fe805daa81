"""How a recipe starts from the command line: its config found and merged, its errors printed in one line."""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from tokenpref._registry import find_config
from tokenpref._torchtune import parse
from tokenpref.components import COMPONENT, accepts, find_component
from tokenpref.errors import USER_ERROR_EXIT, TokenprefError

__all__ = ["recipe_main"]

log = logging.getLogger("tokenpref")


def recipe_main(main: Callable[[DictConfig], Any]) -> Callable[[], None]:
    """Decorator for a recipe's ``main(cfg)``: ``--config NAME key=value ...`` as everywhere in torchtune.

    On top of torchtune's own parser: a config that comes with the package is found from any directory
    (``configs/tiny/tdpo.yaml``); a component replaced on the command line drops the arguments that the config gave
    to the old one and the new one does not take, and says so; an error that the user can mend is one message
    without a traceback, exit code 2.

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
            sys.argv = _prepare(sys.argv, announce=rank == 0)
            parse(main)()
        except TokenprefError as error:
            if rank == 0 or str(error).startswith("rank "):
                print(f"error: {error}", file=sys.stderr)
            sys.stderr.flush()
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


def _prepare(argv: list[str], *, announce: bool) -> list[str]:
    """The command line with its config path found and the arguments of replaced components dropped."""
    if "--config" not in argv or argv.index("--config") + 1 >= len(argv):
        return argv  # torchtune's parser says what is missing
    at = argv.index("--config") + 1
    path = find_config(argv[at])
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise TokenprefError(
            f"--config: no file {argv[at]!r} here and none of that name in tokenpref"
        ) from error
    except (YAMLError, OmegaConfBaseException) as error:
        raise TokenprefError(f"--config: {path} is not valid YAML: {error}") from error
    if not isinstance(config, DictConfig):
        raise TokenprefError(f"--config: {path} must hold a mapping of keys, found a {type(config).__name__}")
    overrides = argv[at + 1 :]
    for override in overrides:
        if "=" not in override and not override.startswith(("~", "--")):
            raise TokenprefError(f"{override!r}: an override is written key=value (or ~key to remove one)")
    dropped = _dropped_arguments(config, overrides)
    for key, owner in dropped:
        if announce:
            log.info(
                f"{key}: the config's value was for another component; {owner} does not take it, so it is dropped"
            )
    return [*argv[:at], str(path), *overrides, *(f"~{key}" for key, _ in dropped)]


def _dropped_arguments(config: DictConfig, overrides: list[str]) -> list[tuple[str, str]]:
    """Arguments of components that the command line replaces and whose replacement does not take them."""
    given = dict(item.split("=", 1) for item in overrides if "=" in item)
    # Unresolved: interpolations may point to keys that only the command line sets.
    nodes = OmegaConf.to_container(config, resolve=False)
    dropped = []
    for key, node in nodes.items() if isinstance(nodes, dict) else ():
        if not isinstance(node, dict) or COMPONENT not in node:
            continue
        path = given.get(f"{key!s}.{COMPONENT}", given.get(str(key), node[COMPONENT]))
        if path == node[COMPONENT]:
            continue
        try:
            component = find_component(str(path))
        except ValueError:
            continue  # reading the config reports it together with its other faults
        names = [f"{key!s}.{name}" for name in node if name != COMPONENT and not accepts(component, name)]
        dropped += [(name, str(path)) for name in names if name not in given]
    return dropped
