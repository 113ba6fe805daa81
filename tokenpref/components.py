"""Components by dotted path: what a config's ``_component_`` names, looked up and checked before anything is built."""

from __future__ import annotations

import difflib
import inspect
import os
import sys
from collections.abc import Collection, Mapping
from typing import Any

from tokenpref._torchtune import InstantiationError, component_from_path

__all__ = ["COMPONENT", "accepts", "find_component", "nearest", "signature_faults"]

COMPONENT = "_component_"


def nearest(name: str, known: Collection[str]) -> str:
    """``; did you mean 'x'?`` for the known name closest to ``name``, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def find_component(path: str) -> Any:
    """The object at a dotted path; modules of the current directory count.

    Raises:
        ValueError: if nothing importable is there; the message says which part failed.
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
    except Exception as error:  # whatever a user's own file raises as it is imported, a SyntaxError for one
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


def signature_faults(
    component: Any, given: Mapping[str, Any], provided: Collection[str], positional: int
) -> list[str]:
    """What would keep a component from being called with a config's keywords.

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
    faults += [
        f"{p.name}: {name} needs this argument and the config does not set it"
        for p in free
        if p.name in known and p.default is p.empty and p.name not in given and p.name not in provided
    ]
    return faults
