"""Finds the config that a command line names, and merges the overrides into it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from tokenpref._registry import find_config
from tokenpref._yaml import check_yaml
from tokenpref.components import COMPONENT, accepts, find_component
from tokenpref.errors import (
    ConfigError,
)

__all__ = ["load_config"]

log = logging.getLogger("tokenpref")

_DOTTED_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def load_config(arguments: list[str], *, announce: bool = False) -> DictConfig:
    """The config of a recipe's command line.

    The rules are torchtune's, with three additions. A config of this package is found from any directory
    (``configs/tiny/tdpo.yaml``). ``key=null`` removes a component, like ``~key``. A component that is replaced on the command
    line loses the old one's arguments that the new one does not accept, and the log says so.

    Args:
        arguments: ``--config NAME``, ``key=value`` (``component=path`` is short for ``component._component_=path``) and
            ``~key``.
        announce: log what was dropped.

    Returns:
        The merged config.

    Raises:
        ConfigError: if the file is missing or not YAML, or an override cannot be read.
    """
    if "--config" not in arguments or arguments.index("--config") + 1 >= len(arguments):
        raise ConfigError("--config is missing; name a config, such as --config tiny/tdpo")
    at = arguments.index("--config")
    config = _read(arguments[at + 1])
    overrides = [*arguments[:at], *arguments[at + 2 :]]
    given: dict[str, str] = {}
    for override in overrides:
        if override.startswith("~"):
            _remove(config, override[1:])
            continue
        key, separator, value = override.partition("=")
        if not separator or not key or key.startswith("-"):
            raise ConfigError(f"{override!r}: an override is written key=value (or ~key to remove one)")
        if value == "???":  # OmegaConf's mark for a missing value would keep the config's value
            raise ConfigError(f"{override!r}: ??? is no value; give one")
        try:
            node = OmegaConf.select(config, key)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{override!r}: {key!r} is no key ({_first_line(error)})") from error
        # Arguments on the command line refer to the default component if the file names none.
        short = (isinstance(node, DictConfig) and COMPONENT in node) or (
            node is None and _DOTTED_PATH.fullmatch(value) and any(o.startswith(f"{key}.") for o in overrides)
        )
        given[f"{key}.{COMPONENT}" if short and value not in ("null", "") else key] = value
    for key in _dropped_arguments(config, given, announce=announce):
        _remove(config, key)
    try:
        merged = OmegaConf.merge(config, OmegaConf.from_dotlist([f"{k}={v}" for k, v in given.items()]))
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"the overrides cannot be merged: {_first_line(error)}") from error
    return merged  # type: ignore[return-value]  # a mapping merged with a mapping


def _read(name: str) -> DictConfig:
    path = find_config(name)
    try:
        check_yaml(path)
        config = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise ConfigError(f"--config: no file {name!r} here and none of that name in tokenpref") from error
    except OSError as error:
        raise ConfigError(
            f"--config: {path} cannot be read ({error.strerror}); name a YAML file, or a config that `tune ls` shows"
        ) from error
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"--config: {path} is not valid YAML: {error}") from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"--config: {path} must hold a mapping of keys, found a {type(config).__name__}")
    return config


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _remove(config: DictConfig, key: str) -> None:
    parent, _, leaf = key.rpartition(".")
    try:
        node = OmegaConf.select(config, parent) if parent else config
    except OmegaConfBaseException as error:
        raise ConfigError(f"~{key}: {parent!r} is no key ({_first_line(error)})") from error
    if not isinstance(node, DictConfig) or leaf not in node:
        raise ConfigError(f"~{key}: the config has no such key")
    del node[leaf]


def _dropped_arguments(config: DictConfig, given: dict[str, str], *, announce: bool) -> list[str]:
    """Arguments of replaced components that the replacement does not accept."""
    # Unresolved: interpolations may point to keys that only the command line sets.
    nodes = OmegaConf.to_container(config, resolve=False)
    dropped = []
    for key, node in _components(nodes):
        path = str(given.get(f"{key}.{COMPONENT}", node[COMPONENT]))
        if path == node[COMPONENT]:
            continue
        if announce:  # logged before the import, because importing a component executes its file
            log.info(f"{key}: importing {path} instead of {node[COMPONENT]}")
        try:
            component = find_component(path)
        except ValueError:
            continue  # reported when the config is read, together with its other faults
        for name in node:
            argument = f"{key}.{name!s}"
            if name != COMPONENT and argument not in given and not accepts(component, str(name)):
                dropped.append(argument)
                if announce:
                    log.info(
                        f"{argument}: the config's value was for another component; {path} does not take it"
                    )
    return dropped


def _components(nodes: Any, prefix: str = "") -> Iterator[tuple[str, dict[Any, Any]]]:
    """All mappings with a component, with their dotted keys; inner ones come first."""
    for key, node in nodes.items() if isinstance(nodes, dict) else ():
        if isinstance(node, dict):
            yield from _components(node, f"{prefix}{key!s}.")
            if COMPONENT in node:
                yield f"{prefix}{key!s}", node
