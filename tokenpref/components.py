"""Looks up the components that a config names by dotted path, and checks them before anything is built."""

from __future__ import annotations

import difflib
import inspect
import os
import sys
import typing
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Mapping,
    MutableMapping,
    MutableSequence,
    Sequence,
    Set,
)
from functools import partial
from types import SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from tokenpref._torchtune import InstantiationError, component_from_path

__all__ = [
    "COMPONENT",
    "accepts",
    "Argument",
    "argument_faults",
    "arguments_of",
    "default_arguments",
    "find_component",
    "nearest",
    "signature_faults",
]

COMPONENT = "_component_"


def nearest(name: str, known: Collection[str]) -> str:
    """``; did you mean 'x'?`` for the known name closest to ``name``, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def find_component(path: str) -> Any:
    """The object at a dotted path; modules of the current directory count.

    Raises:
        ValueError: if nothing can be imported under this path; the error says which part failed.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = component_from_path(path)
    except (InstantiationError, ValueError) as error:
        parent, _, leaf = path.rpartition(".")
        hint = ""
        if parent:
            try:
                hint = nearest(leaf, [n for n in dir(component_from_path(parent)) if not n.startswith("_")])
            except (InstantiationError, ValueError):
                hint = ""  # the parent itself is the unknown part; the message below names it
        raise ValueError(f"{path!r} cannot be imported ({_first_line(error)}){hint}") from error
    except (
        Exception
    ) as error:  # any exception that a user's file raises during the import, such as a SyntaxError
        raise ValueError(f"{path!r} cannot be imported ({type(error).__name__}: {error})") from error
    if not callable(found):
        raise ValueError(
            f"{path!r} is a {type(found).__name__}, not something to call; name a class or function"
        )
    return found


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]).rstrip(":")


def _parameters(component: Any) -> dict[str, inspect.Parameter] | None:
    try:
        return dict(inspect.signature(component).parameters)
    except (TypeError, ValueError):
        return None  # a builtin without a signature: Python itself will complain when it is called


def accepts(component: Any, name: str) -> bool:
    """True when ``component`` can be called with the keyword ``name`` (or its signature cannot be read)."""
    parameters = _parameters(component)
    if parameters is None or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return True
    return name in parameters and parameters[name].kind is not inspect.Parameter.POSITIONAL_ONLY


def default_arguments(component: Any) -> dict[str, Any]:
    """The arguments that ``component`` can be called without, with the values that they then have."""
    parameters = _parameters(component) or {}
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty}


class Argument(NamedTuple):
    """An argument of a component, for people: what it takes in words, and its default (``inspect.Parameter.empty`` for none)."""

    name: str
    takes: str
    default: Any


def arguments_of(component: Any, given: Collection[str] = ()) -> list[Argument]:
    """The arguments that a config may set.

    Args:
        component: class or function.
        given: names of the arguments that the recipe passes.
    """
    names = _namespace(component)
    return [
        Argument(p.name, _described(_annotation(p, names)), p.default)
        for p in (_parameters(component) or {}).values()
        if p.name not in given and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]


def signature_faults(
    component: Any, given: Mapping[str, Any], provided: Collection[str], positional: int
) -> list[str]:
    """The reasons why a component cannot be called with a config's keywords.

    Args:
        component: class or function.
        given: keywords of the config, without ``_component_``.
        provided: keywords that the recipe adds.
        positional: leading arguments that the recipe passes by position.

    Returns:
        One message for each unknown and each missing argument.
    """
    parameters = _parameters(component)
    if parameters is None:
        return []
    name = getattr(component, "__name__", str(component))
    free = list(parameters.values())[positional:]
    known = [p.name for p in free if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in free)
    faults = []
    if not open_ended:
        faults += [
            f"{key}: {name} takes no such argument{nearest(key, known) or ' (it takes ' + ', '.join(known) + ')'}"
            for key in given
            if key not in known
        ]
    faults += [f"{key}: the recipe sets this argument itself; remove it" for key in given if key in provided]
    faults += [
        f"{p.name}: {name} needs this argument and the config does not set it"
        for p in free
        if p.name in known and p.default is p.empty and p.name not in given and p.name not in provided
    ]
    return faults


def argument_faults(component: Any, given: Mapping[str, Any]) -> list[str]:
    """Keywords whose values do not fit the annotations of a component's signature.

    Arguments of tokenpref, torch, torchtune and torchao must fit their annotations. Annotations in other packages may be
    imprecise, so there only clear mistakes are refused: anything but true or false for a flag, and text for a number.

    Args:
        component: class or function.
        given: keywords of the config. Nested components have their own class and fit every annotation.

    Returns:
        One message for each value that does not fit, beginning with the argument's name.
    """
    parameters = _parameters(component)
    if parameters is None:
        return []
    strict = _top_package(component) in _ANNOTATED_PACKAGES
    names = _namespace(component)
    faults = []
    for name, value in given.items():
        parameter = parameters.get(name)
        if parameter is None or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        wanted = _annotation(parameter, names)
        if _is_default(value, parameter.default) or _fits(value, wanted):
            continue
        if strict or _is_never_meant(value, wanted):
            faults.append(
                f"{name} must be {_described(wanted)}, got {_shown(value)}{_mend(name, value, wanted)}"
            )
    return faults


_ANNOTATED_PACKAGES = frozenset({"tokenpref", "torch", "torchtune", "torchao"})
_UNKNOWN = Any
_MOST = 2**63 - 1  # the range of whole numbers in torch and Arrow
_LISTS = (list, Sequence, Collection, Iterable, MutableSequence, set, frozenset, Set)
_MAPPINGS = (dict, Mapping, MutableMapping)
_PLAIN = (bool, int, float, str, list, dict, type(None))


def _top_package(component: Any) -> str:
    return str(getattr(_function(component), "__module__", None) or "").partition(".")[0]


def _function(component: Any) -> Any:
    return inspect.unwrap(component.func if isinstance(component, partial) else component)


def _namespace(component: Any) -> Mapping[str, Any]:
    """The names that a signature's annotations may use."""
    target = _function(component)
    if isinstance(target, type):
        target = inspect.unwrap(target.__init__)  # type: ignore[misc]  # of a class that is looked at, not an instance
    return getattr(target, "__globals__", {})


def _annotation(parameter: inspect.Parameter, names: Mapping[str, Any]) -> Any:
    """The annotation of a parameter; without one, the type of its default if that is a flag."""
    written = parameter.annotation
    if written is parameter.empty:
        return bool if isinstance(parameter.default, bool) else _UNKNOWN
    if isinstance(written, str):
        try:
            holder = SimpleNamespace(__annotations__={parameter.name: written})
            return typing.get_type_hints(holder, globalns=dict(names))[parameter.name]
        except (NameError, AttributeError, TypeError, SyntaxError):
            return _UNKNOWN  # a name that only type checkers import, so nothing is known
    return written


def _is_default(value: Any, default: Any) -> bool:
    return type(value) is type(default) and bool(value == default)


def _fits(value: Any, wanted: Any) -> bool:
    """Whether a value of a config (plain data or a component) fits an annotation."""
    if isinstance(value, dict) and COMPONENT in value:
        return True  # a component that has not been built yet
    if not isinstance(value, _PLAIN):
        return _fits_built(value, wanted)
    origin, arguments = get_origin(wanted), get_args(wanted)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in arguments)
    if origin is Annotated:
        return _fits(value, arguments[0])
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in arguments)
    kind = origin or wanted
    if kind is tuple:
        return isinstance(value, list) and _fits_tuple(value, arguments)
    if kind in _LISTS:
        return isinstance(value, list) and all(_fits(v, a) for a in arguments[:1] for v in value)
    if kind in _MAPPINGS:
        return isinstance(value, dict) and _fits_mapping(value, arguments)
    return _fits_scalar(value, kind)


def _fits_built(value: Any, wanted: Any) -> bool:
    """Whether a component's result fits an annotation. An object never fits a flag, a number, text or a list."""
    kinds = [get_origin(one) or one for one in _alternatives(wanted)]
    plain = {bool, int, float, str, tuple, type(None), *_LISTS, *_MAPPINGS}
    return not all(kind in plain and not isinstance(value, kind) for kind in kinds)


def _fits_tuple(value: list[Any], arguments: tuple[Any, ...]) -> bool:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return all(_fits(v, arguments[0]) for v in value)
    return not arguments or (
        len(value) == len(arguments) and all(_fits(v, a) for v, a in zip(value, arguments, strict=True))
    )


def _fits_mapping(value: Mapping[Any, Any], arguments: tuple[Any, ...]) -> bool:
    return not arguments or all(_fits(k, arguments[0]) and _fits(v, arguments[1]) for k, v in value.items())


def _fits_scalar(value: Any, kind: Any) -> bool:
    if kind is Any:  # a class, from Python 3.11 on
        return True
    if kind is None or kind is type(None):
        return value is None
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= _MOST
    if kind is float:
        return isinstance(value, float) or _fits_scalar(value, int)
    if kind is str or (isinstance(kind, type) and issubclass(kind, os.PathLike)):
        return isinstance(value, str)
    # Classes of objects, protocols and callables are never plain data. Other annotations are not understood.
    return not (isinstance(kind, type) and kind is not object) and kind is not Callable


def _is_never_meant(value: Any, wanted: Any) -> bool:
    kinds = set(_alternatives(wanted)) - {type(None)}
    return bool(kinds) and (kinds == {bool} or (isinstance(value, str) and kinds <= {bool, int, float}))


def _alternatives(wanted: Any) -> tuple[Any, ...]:
    return get_args(wanted) if get_origin(wanted) in (Union, UnionType) else (wanted,)


def _described(wanted: Any) -> str:
    """An annotation in words: ``true or false``, ``a list of text, or null``."""
    words = [_described_one(one) for one in _alternatives(wanted)]
    if any(word not in (_OBJECT, "null") for word in words):
        words = [
            word for word in words if word != _OBJECT
        ]  # torch's own annotations also allow tensors, which no config contains
    if "a number" in words:
        words = [word for word in words if word != "a whole number"]
    parts = [part for word in dict.fromkeys(words) for part in word.split(" or ")]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"


_OBJECT = f"a component (a mapping with {COMPONENT})"
_WORDS = {
    type(None): "null",
    None: "null",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Any: "any value",
}


def _described_one(wanted: Any) -> str:
    origin, arguments = get_origin(wanted), get_args(wanted)
    kind = origin or wanted
    if origin is Annotated:
        return _described(arguments[0])
    if origin is Literal:
        return f"one of {', '.join(map(_shown, arguments))}"
    if kind is tuple and arguments and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)} values ({', '.join(map(_described, arguments))})"
    if kind is tuple or kind in _LISTS:
        return f"a list ({_described(arguments[0])} each)" if arguments else "a list"
    if kind in _MAPPINGS:
        return f"a mapping ({_described(arguments[1])} each)" if arguments else "a mapping"
    if isinstance(kind, type) and issubclass(kind, os.PathLike):
        return "a path"
    return _WORDS.get(kind, _OBJECT)


def _shown(value: Any) -> str:
    """A value as written in a config, shortened to a line."""
    words = {True: "true", False: "false"} if isinstance(value, bool) else {}
    text = (
        words.get(value)
        if words
        else "null"
        if value is None
        else f'"{value}"'
        if isinstance(value, str)
        else repr(value)
    )
    return str(text) if len(str(text)) <= 80 else f"{str(text)[:77]}..."


def _mend(name: str, value: Any, wanted: Any) -> str:
    if isinstance(value, str) and bool in _alternatives(wanted) and value.lower() in ("true", "false"):
        return f"; set {name}={value.lower()} without quotation marks"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > _MOST and _fits(0, wanted):
        return f"; whole numbers go up to {_MOST}"
    if isinstance(value, str) and _fits([value], wanted):
        return f"; set {name}=[{value}]"
    return ""
