"""The config as it was written, for records, and the one place where its paths are resolved."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.resolvers import oc

from tokenpref._paths import PACKAGE_SCHEME, resolve_path
from tokenpref.errors import ConfigError

__all__ = ["environment_unread", "is_path_key", "plain_without_environment", "resolved_paths"]

_PATH_NAMES = frozenset(
    {
        "adapter_checkpoint", "compare_to", "data_files", "filename", "pair", "path", "prompts", "recipe_checkpoint",
        "resume_from_checkpoint", "source",
    }
)  # fmt: skip
_PATH_ENDINGS = ("_dir", "_file", "_files", "_folder", "_path")
# The limits of file systems on Linux and macOS.
_LONGEST_NAME, _LONGEST_PATH = 255, 4096


def is_path_key(name: str) -> bool:
    """Whether the last part of a key names a path, or several."""
    return name in _PATH_NAMES or name.endswith(_PATH_ENDINGS)


def resolved_paths(value: Any, key: str, *, is_path: bool | None = None) -> Any:
    """A config's value with its paths as they are opened: ``~`` and ``~user`` in path keys, ``package://`` in all.

    Other paths are not changed: relative paths count from the current directory, and environment variables
    other than ``${oc.env:NAME}`` are text.

    Args:
        value: plain data of the config.
        key: the key of the value.
        is_path: whether ``key`` is a path key; None to decide by its name.

    Raises:
        ConfigError: for a user that does not exist, a ``package://`` path that leaves the package, and a path that no
            file system takes.
    """
    if is_path is None:
        is_path = is_path_key(key.rpartition(".")[2])
    if isinstance(value, dict):
        return {k: resolved_paths(v, f"{key}.{k}", is_path=is_path or None) for k, v in value.items()}
    if isinstance(value, list):
        return [resolved_paths(v, key, is_path=is_path) for v in value]
    if not isinstance(value, str):
        return value
    if key.endswith(".chat_template"):
        is_path = value.endswith(".jinja")  # otherwise it is the text of a template
    if value.startswith(PACKAGE_SCHEME):
        try:
            value = str(resolve_path(value))
        except ValueError as error:
            raise ConfigError(f"{key}: {error}") from error
    return _resolved_path(value, key) if is_path else value


def _resolved_path(text: str, key: str) -> str:
    path = os.path.expanduser(text)
    if path.startswith("~"):
        name = path.partition("/")[0]
        raise ConfigError(
            f"{key}: {text!r} is in the home directory of a user {name[1:]!r}, and there is no such user; write ./{name} for a "
            "folder of that name"
        )
    # Only NUL is impossible, but a line break or a tab in a path is a slip of the shell or of YAML, and would make a folder.
    if control := [character for character in path if ord(character) < ord(" ")]:
        raise ConfigError(
            f"{key}: {text!r:.60} holds the control character {control[0]!r}; remove it from the path"
        )
    longest = max(len(os.fsencode(part)) for part in path.split("/"))
    if longest > _LONGEST_NAME or len(os.fsencode(path)) > _LONGEST_PATH:
        raise ConfigError(
            f"{key}: has a name of {longest} bytes and is {len(os.fsencode(path))} bytes long; file systems take names of "
            f"{_LONGEST_NAME} bytes and paths of {_LONGEST_PATH}; set a shorter one ({text[:40]!r}...)"
        )
    return path


def plain_without_environment(cfg: DictConfig) -> dict[str, Any]:
    """A config as plain data for files that people share, resolved except for values from the environment.

    A value that uses ``${oc.env:NAME}``, directly or through another key, stays as it was written.

    Raises:
        OmegaConfBaseException: for an interpolation that cannot be resolved.
    """
    with _environment_watched() as reads:
        found: dict[str, Any] = _plain(cfg, reads)
    return found


def _plain(node: Any, reads: list[str]) -> Any:
    if not isinstance(node, Container):
        return node
    written: Any = OmegaConf.to_container(node, resolve=False)
    if isinstance(written, dict):
        return {key: _plain_entry(node, key, entry, reads) for key, entry in written.items()}
    return [_plain_entry(node, place, entry, reads) for place, entry in enumerate(written or [])]


def _plain_entry(node: Any, key: Any, written: Any, reads: list[str]) -> Any:
    before = len(reads)
    value = node[key]
    return written if len(reads) > before else _plain(value, reads)


@contextmanager
def _environment_watched() -> Iterator[list[str]]:
    """Collects the names of environment variables that are read inside the context."""
    reads: list[str] = []

    def env(*parts: Any) -> Any:
        reads.append(str(parts[0]))
        return oc.env(*parts)

    with _resolver(env):
        yield reads


@contextmanager
def environment_unread() -> Iterator[None]:
    """Let ``${oc.env:NAME}`` resolve to its own text, for libraries that resolve a config and send it elsewhere."""

    def env(*parts: Any) -> str:
        return f"${{oc.env:{','.join('null' if part is None else str(part) for part in parts)}}}"

    with _resolver(env):
        yield


@contextmanager
def _resolver(env: Any) -> Iterator[None]:
    _register(env)
    try:
        yield
    finally:
        _register(oc.env)


def _register(env: Any) -> None:
    if hasattr(OmegaConf, "register_resolver"):  # the name from omegaconf 2.4 on
        OmegaConf.register_resolver("oc.env", env, replace=True, annotation_validation="off")
    else:
        OmegaConf.register_new_resolver("oc.env", env, replace=True)
