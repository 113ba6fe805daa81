"""Typed configs: fields that read and check their own value, and the reader that collects every fault.

A schema is a frozen dataclass whose fields are made by the functions here. :func:`read_config` fills it from a recipe's
YAML; misspelt or missing keys, values of the wrong type and components that cannot be imported or called are all
reported together, before anything is built.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tokenpref.components import COMPONENT, argument_faults, find_component, nearest, signature_faults
from tokenpref.errors import ConfigError, TokenprefError
from tokenpref.training.config.defaults import completed, component_paths
from tokenpref.training.config.written import resolved_paths

__all__ = [
    "Component",
    "component",
    "flag",
    "flag_or_text",
    "integer",
    "number",
    "read_config",
    "section",
    "text",
    "texts",
]

log = logging.getLogger("tokenpref")

# How components refuse their arguments: torch with RuntimeError and assertions too, torchtune's loggers with ImportError.
_REFUSALS = (ValueError, TypeError, OSError, RuntimeError, AssertionError, ArithmeticError, ImportError)
S = TypeVar("S")
_MOST = 2**31 - 1
_MIXTURE = "tokenpref.data.PairMixture"


@dataclass(frozen=True)
class Component:
    """A node with ``_component_``: what to call and with which keywords.

    Args:
        key: where it stands in the config.
        path: dotted path.
        kwargs: its keywords, ``package://`` paths resolved; a keyword with a ``_component_`` of its own is a component too.
    """

    key: str
    path: str
    kwargs: Mapping[str, Any]

    @property
    def parts(self) -> tuple[Component, ...]:
        """The components that a list names; itself if it is not a list."""
        return (self,)

    def target(self) -> Any:
        """The class or function at the path."""
        return find_component(self.path)

    def callable(self) -> Callable[..., Any]:
        """What is called later, for a key that takes both: an instance of a class, or a function with its keywords."""
        target = self.target()
        return self.build() if isinstance(target, type) else partial(target, **self.arguments())

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """Call it.

        Raises:
            ConfigError: if it refuses its arguments with an error of its own, such as ``ValueError``, ``RuntimeError``, or a
                package that is not installed, or cannot read or write a file.
        """
        given = {**self.arguments(), **kwargs}
        try:
            return self.target()(*args, **given)
        except TokenprefError:
            raise  # it says where it comes from
        except _REFUSALS as error:
            raise ConfigError(f"{self.key} ({self.path}): {error or type(error).__name__}") from error
        except KeyError as error:  # how torchtune's checkpointers refuse a model_type
            raise ConfigError(f"{self.key} ({self.path}): it knows no {error}") from error

    def plain(self) -> dict[str, Any]:
        """The node as plain data, ``_component_`` first, components among its keywords likewise."""
        return {
            COMPONENT: self.path,
            **{k: v.plain() if isinstance(v, Component) else v for k, v in self.kwargs.items()},
        }

    def arguments(self) -> dict[str, Any]:
        """The keywords, components among them built.

        Raises:
            ConfigError: if one of them cannot be built, or makes something that its argument does not take.
        """
        made = {k: v.build() for k, v in self.kwargs.items() if isinstance(v, Component)}
        if faults := argument_faults(self.target(), made):
            raise ConfigError([f"{self.key}.{fault}" for fault in faults])
        return {**self.kwargs, **made}


@dataclass(frozen=True)
class Mixture(Component):
    """A list of data sets; ``kwargs`` has each under its number."""

    @property
    def parts(self) -> tuple[Component, ...]:
        """The data sets."""
        return tuple(self.kwargs.values())

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """Build each, and mix them.

        Raises:
            ConfigError: if one of them is no data set of this package.
        """
        built = []
        for part in self.parts:
            built.append(part.build(*args, **kwargs))
            if not hasattr(built[-1], "parts"):
                raise ConfigError(
                    f"{part.key} ({part.path}): makes a {type(built[-1]).__name__}, which cannot be mixed; name "
                    "tokenpref.data.preference_dataset, or a function of your own that calls it"
                )
        return self.target()(built)


# --- fields -----------------------------------------------------------------------------------------------------


def component(
    *,
    positional: int = 0,
    provided: tuple[str, ...] = (),
    optional: bool = False,
    function: int | None = None,
    mixed: bool = False,
    base: Callable[[Mapping[str, Any]], dict[str, Any]] | None = None,
) -> Any:
    """A component node; ``positional`` and ``provided`` are the arguments that the recipe passes when it builds it.

    With ``function`` a plain function is used as it is, called with that many arguments (:meth:`Component.callable`).
    With ``mixed`` the node may be a list of data sets. ``base`` makes, from the whole config, the component that stands where
    the config names none; a mapping without ``_component_`` changes single arguments of it, and null leaves the component out.
    """

    def read(key: str, value: Any) -> Component:
        if mixed and isinstance(value, list):
            return _read_mixture(key, value, positional)
        return _read_component(key, value, provided, positional, function)

    kind = "a component, or a list of them" if mixed else "a component"
    return _field(read, None if optional else dataclasses.MISSING, kind, base=base)


def _read_component(
    key: str, value: Any, provided: tuple[str, ...] = (), positional: int = 0, function: int | None = None
) -> Component:
    if not isinstance(value, Mapping) or COMPONENT not in value:
        raise ConfigError(f"{key}: expected a mapping with {COMPONENT}, found {value!r}")
    kwargs, faults = {}, []
    for name, item in value.items():
        if name == COMPONENT:
            continue
        kwargs[str(name)] = item
        if isinstance(item, Mapping) and COMPONENT in item:
            try:
                kwargs[str(name)] = _read_component(f"{key}.{name}", item)
            except ConfigError as error:
                faults += error.faults
    try:
        target = find_component(str(value[COMPONENT]))
    except ValueError as error:
        raise ConfigError([f"{key}.{COMPONENT}: {error}", *faults]) from error
    by_position = positional if function is None or isinstance(target, type) else function
    faults += [f"{key}.{fault}" for fault in signature_faults(target, kwargs, provided, by_position)]
    plain = {name: item for name, item in kwargs.items() if not isinstance(item, Component)}
    faults += [f"{key}.{fault}" for fault in argument_faults(target, plain)]
    if faults:
        raise ConfigError(faults)
    return Component(key, str(value[COMPONENT]), kwargs)


def _read_mixture(key: str, values: list[Any], positional: int) -> Mixture:
    parts, faults = {}, []
    for number, value in enumerate(values):
        try:
            parts[str(number)] = _read_component(f"{key}[{number}]", value, positional=positional)
        except ConfigError as error:
            faults += error.faults
    if not values:
        faults.append(f"{key}: the list is empty; name at least one data set")
    if faults:
        raise ConfigError(faults)
    return Mixture(key, _MIXTURE, parts)


def integer(default: Any = dataclasses.MISSING, *, low: int = 1, high: int = _MOST) -> Any:
    """A whole number from ``low`` to ``high``; without one, what a tensor's size or index can be."""

    def read(key: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ConfigError(f"{key}: expected a whole number of at least {low}, found {value!r}")
        if value > high:
            raise ConfigError(f"{key}: expected a whole number of at most {high}, found {value!r}")
        return value

    return _field(read, default, f"a whole number of at least {low}")


def number(
    default: Any = dataclasses.MISSING, *, low: float = 0.0, inclusive: bool = False, high: float = 1e9
) -> Any:
    """A number above ``low``, or ``low`` itself where that is allowed, up to ``high``."""
    bound = f"of at least {low:g}" if inclusive else f"above {low:g}"

    def read(key: str, value: Any) -> float:
        right = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not right or value < low or (value == low and not inclusive):
            raise ConfigError(f"{key}: expected a number {bound}, found {value!r}")
        if value > high:
            raise ConfigError(f"{key}: expected a number of at most {high:g}, found {value!r}")
        return float(value)

    limit = f" and at most {high:g}" if high <= 1 else ""
    return _field(read, default, f"a number {bound}{limit}")


def flag(default: Any = dataclasses.MISSING) -> Any:
    """True or false."""

    def read(key: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{key}: expected true or false, found {value!r}")
        return value

    return _field(read, default, "true or false")


def flag_or_text(default: Any = dataclasses.MISSING) -> Any:
    """True, false, or non-empty text."""

    def read(key: str, value: Any) -> bool | str:
        if not isinstance(value, bool) and not (isinstance(value, str) and value):
            raise ConfigError(f"{key}: expected true, false, auto or a path, found {value!r}")
        return value

    return _field(read, default, "true, false, auto or a path")


def text(default: Any = dataclasses.MISSING, *, choices: tuple[str, ...] = (), hint: str = "") -> Any:
    """Non-empty text, perhaps one of ``choices``."""

    def read(key: str, value: Any) -> str:
        if not isinstance(value, str) or not value or "\0" in value:
            raise ConfigError(f"{key}: expected text, found {value!r}")
        if choices and value not in choices:
            raise ConfigError(f"{key}: expected one of {', '.join(choices)}, found {value!r}{hint}")
        return value

    return _field(read, default, _one_of(choices) if choices else "text")


def texts(default: tuple[str, ...] | None = (), *, choices: tuple[str, ...]) -> Any:
    """A list of ``choices``."""

    def read(key: str, value: Any) -> tuple[str, ...]:
        if not isinstance(value, list):
            raise ConfigError(f"{key}: expected a list of {', '.join(choices)}, found {value!r}")
        unknown = [v for v in value if v not in choices]
        if unknown:
            known = ", ".join(choices)
            raise ConfigError(
                f"{key}: unknown {unknown[0]!r}{nearest(str(unknown[0]), choices)} (known: {known})"
            )
        return tuple(value)

    return _field(read, default, f"a list of {', '.join(choices)}")


def _one_of(choices: tuple[str, ...]) -> str:
    return choices[0] if len(choices) == 1 else f"{', '.join(choices[:-1])} or {choices[-1]}"


def section(schema: type) -> Any:
    """A nested schema; absent by default."""

    def read(key: str, value: Any) -> Any:
        section, faults = _read_mapping(schema, value, prefix=f"{key}.")
        if faults:
            raise ConfigError(faults)
        return section

    return _field(read, None, "a mapping", section=schema)


def _field(read: Callable[[str, Any], Any], default: Any, kind: str, **more: Any) -> Any:
    """A dataclass field; ``kind`` says in words what it takes, for the reference of all keys."""
    return dataclasses.field(default=default, metadata={"read": read, "kind": kind, **more})


# --- reading -----------------------------------------------------------------------------------------------------


def read_config(schema: type[S], cfg: DictConfig, extra_faults: Callable[[S], list[str]] | None = None) -> S:
    """Turn a recipe's config into its typed form.

    Args:
        schema: a dataclass of this module, or one derived from it.
        cfg: merged config, as :func:`tokenpref.training.recipe_main` delivers it.
        extra_faults: further checks of the recipe's own; keys that could not be read are None for them.

    Returns:
        The checked config; nothing has been built for the run, and nothing written.

    Raises:
        ConfigError: with every fault found.
    """
    try:
        data = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(
            f"the config cannot be resolved: {(str(error).splitlines() or [type(error).__name__])[0]}"
        ) from error
    # A key of the user's own that other keys refer to as ${key} is a variable, not a misspelling.
    variables = set(re.findall(r"\$\{([A-Za-z_]\w*)", OmegaConf.to_yaml(cfg, resolve=False)))
    if os.environ.get("RANK", "0") == "0":  # before it is done: to import a component is to run its file
        log.info(f"components: {', '.join(f'{key}={path}' for key, path in component_paths(data))}")
    config, faults = _read_mapping(schema, data, ignore=variables)
    faults += config.faults()
    if extra_faults is not None:
        faults += extra_faults(config)
    if faults:
        raise ConfigError(faults)
    return config


def _read_mapping(
    schema: Any, data: Any, prefix: str = "", ignore: set[str] | None = None
) -> tuple[Any, list[str]]:
    """An instance of ``schema`` (None where a value is missing or wrong) and what was wrong."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{prefix.rstrip('.')}: expected a mapping, found {data!r}")
    known = {f.name: f for f in dataclasses.fields(schema)}
    faults = [
        f"{prefix}{key}: unknown key{nearest(str(key), known)}"
        for key in data
        if key not in known and key not in (ignore or ())
    ]
    config = object.__new__(schema)
    for name, spec in known.items():
        value = completed(spec, data)
        result = None if spec.default is dataclasses.MISSING else spec.default
        if value is not None:
            try:
                result = spec.metadata["read"](f"{prefix}{name}", resolved_paths(value, prefix + name))
            except ConfigError as error:
                result = None
                faults.extend(error.faults)
        elif spec.default is dataclasses.MISSING:
            faults.append(f"{prefix}{name}: missing; the recipe needs it")
        object.__setattr__(config, name, result)
    return config, faults
