"""The Jinja environment of chat templates, as in transformers, with limits on time and size.

Templates come with models, so they are programs by other people. Jinja's immutable sandbox keeps them from accessing the
system. This environment also keeps them from running or growing without bounds:

- Every turn of a loop and every call checks the processor time that this thread has spent on the rendering.
- Everything that is written, stored in a variable or passed to a call is measured.
- ``*``, ``**`` and the string methods that pad are refused if their result would be too large.

One case is not covered: a single built-in filter that makes a very large value from small ones (``center``, ``indent`` or
``format`` with a width of a billion). It is not interrupted, and may raise a MemoryError, which counts as a fault of the row.
"""

from __future__ import annotations

import datetime
import json
import threading
import time
import types
from collections.abc import Sized
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.meta
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_context, pass_eval_context

__all__ = [
    "MAX_CHARACTERS",
    "MAX_SECONDS",
    "LimitExceeded",
    "TimeExceeded",
    "compile_template",
    "limited",
]

MAX_SECONDS = 5.0
"""Processor time that the rendering of one conversation may take."""

MAX_CHARACTERS = 10_000_000
"""Characters that one rendering may write, and items that one value of a template may have."""

_MAX_BITS = 100_000  # of a whole number
_EVENTS_PER_CHECK = 32


class LimitExceeded(Exception):
    """A template ran too long or made a value that is too large."""


class TimeExceeded(LimitExceeded):
    """A template ran too long."""


class _Usage:
    """The resources that one rendering has used."""

    __slots__ = ("deadline", "events", "written")

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.events = 0
        self.written = 0

    def count_event(self) -> None:
        self.events += 1
        # Reading the clock costs more than the rest of a loop's turn, so only some events read it.
        if self.events % _EVENTS_PER_CHECK == 0 and time.thread_time() > self.deadline:
            raise TimeExceeded(f"it takes more than {MAX_SECONDS:g} s of processor time for one conversation")

    def count_written(self, size: int) -> None:
        self.written += size
        if self.written > MAX_CHARACTERS:
            raise LimitExceeded(f"it writes more than {MAX_CHARACTERS:,} characters for one conversation")


class _ThreadUsage(threading.local):
    usage: _Usage | None = None  # None while a template is compiled


_thread = _ThreadUsage()


class limited:
    """``with limited():`` bounds the time and the output of one rendering in this thread."""

    def __enter__(self) -> None:
        _thread.usage = _Usage(time.thread_time() + MAX_SECONDS)

    def __exit__(self, *_: object) -> None:
        _thread.usage = None


def _check_size(size: int) -> None:
    if size > MAX_CHARACTERS:
        raise LimitExceeded(f"it makes a value of more than {MAX_CHARACTERS:,} characters or items")


@pass_context  # keeps Jinja from evaluating it when the template is compiled
def _turn(_: Context, text_size: int) -> None:
    """Runs at each turn of a loop, whose body has ``text_size`` characters of plain text."""
    usage = _thread.usage
    if usage is not None:
        usage.count_event()
        usage.count_written(text_size)


def _measured(value: Any) -> Any:
    """Runs on each value that is stored in a variable. Lists count with their whole content."""
    size, inner = 0, [value]
    while inner:
        item = inner.pop()
        if isinstance(item, str):
            size += len(item)
        elif isinstance(item, dict):
            size += len(item)
            inner.extend(item.values())
        elif isinstance(item, list | tuple):
            size += len(item)
            inner.extend(item)
        else:
            continue
        _check_size(size)
    return value


def _written(value: Any) -> Any:
    """Runs on each value that is written, before Jinja converts it to text."""
    usage = _thread.usage
    if usage is not None and type(value) is str:
        usage.count_written(len(value))
    return value


def _check_operands(operator: str, left: Any, right: Any) -> None:
    """Refuse operations whose result would be too large, before it is computed."""
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        if bits > _MAX_BITS:
            raise LimitExceeded(f"it computes a whole number of more than {_MAX_BITS:,} bits")
    elif operator == "*":
        for sized, times in ((left, right), (right, left)):
            if isinstance(sized, Sized) and isinstance(times, int):
                _check_size(len(sized) * times)


class _GenerationTag(Extension):
    """``{% generation %}`` marks assistant text for transformers' masks. Its body is written unchanged."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block, as in transformers: variables that are set inside are not visible outside.
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    @pass_eval_context
    def _body(self, context: nodes.EvalContext, caller: Macro) -> str:
        return caller()


class _Namespace(Namespace):
    """Jinja's namespace without names that begin with an underscore, as in transformers."""

    def __init__(*args: Any, **values: Any) -> None:
        self, *given = args
        values = dict(*given, **values)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot contain {name!r}; rename it")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON with the arguments of transformers' filter, in its order; Jinja's own would escape HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, loopcontrols],
            finalize=_written,
        )
        self.filters["tojson"] = _tojson
        self.filters["_turn"] = _turn
        self.filters["_measured"] = _measured
        self.globals["raise_exception"] = _raise_exception
        self.globals["namespace"] = _Namespace

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        _check_operands(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        usage = _thread.usage
        if usage is not None:
            usage.count_event()
        pads = isinstance(__obj, types.BuiltinMethodType)
        for value in (*args, *kwargs.values()):
            if type(value) is str:
                _check_size(len(value))
            elif pads and isinstance(value, int):
                _check_size(value)
        return super().call(__context, __obj, *args, **kwargs)


def _with_checks(template: nodes.Template) -> nodes.Template:
    """A parsed template whose loops and variables are measured while it runs."""
    for loop in list(template.find_all(nodes.For)):
        text_size = sum(len(text.data) for text in loop.find_all(nodes.TemplateData))
        loop.body.insert(0, nodes.ExprStmt(_filter(nodes.Const(text_size), "_turn"), lineno=loop.lineno))
    for assignment in list(template.find_all(nodes.Assign)):
        assignment.node = _filter(assignment.node, "_measured")
    template.set_environment(_environment)  # also of the new nodes
    return template


def _filter(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


_environment = _Environment()


@lru_cache(maxsize=64)
def compile_template(source: str, date: datetime.date) -> jinja2.environment.Template:
    """A template ready to render, compiled once.

    Args:
        source: the text of the template.
        date: the date for ``strftime_now``, at midnight.

    Raises:
        jinja2.TemplateSyntaxError: if the text is not a template.
    """
    now = datetime.datetime.combine(date, datetime.time())
    return _environment.from_string(
        _with_checks(_environment.parse(source)), globals={"strftime_now": now.strftime}
    )


def variables_of(source: str) -> frozenset[str]:
    """The names of the variables that a template reads and does not only set itself.

    Args:
        source: the text of a template that compiles.
    """
    return frozenset(jinja2.meta.find_undeclared_variables(_environment.parse(source)))
