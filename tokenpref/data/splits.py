"""Parses splits and slices, in the notation of ``datasets``: ``train``, ``train[:90%]``, ``train[:10]+test``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import datasets

from tokenpref.errors import ConfigError, DataError

__all__ = ["Split"]

_PLAIN = re.compile(r"[^\[\](){}:%+]+")
_EXAMPLES = "train, train[:90%], train[100:200] or train[:10%]+train[-10%:]"


@dataclass(frozen=True)
class Split:
    """The requested rows and splits. Build it with :meth:`parse`.

    Attributes:
        text: the text that was parsed.
        names: names of the splits, without repetition.
    """

    text: str
    names: tuple[str, ...]

    @classmethod
    def parse(cls, text: object) -> Split:
        """Read a split.

        Raises:
            ConfigError: if the text is not a split.
        """
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(f"split must be text such as {_EXAMPLES}, got {text!r}")
        if _PLAIN.fullmatch(text):
            return cls(text, (text,))
        try:
            datasets.ReadInstruction.from_spec(text)
        except (ValueError, AssertionError) as error:
            raise ConfigError(
                f"split: {text!r} cannot be read ({error}); write it as datasets does: {_EXAMPLES}"
            ) from error
        names = (re.split(r"[\[(]", part)[0].strip() for part in text.split("+"))
        return cls(text, tuple(dict.fromkeys(names)))

    @property
    def is_whole(self) -> bool:
        """Whether it is one split without a slice."""
        return self.names == (self.text,)

    def ranges(self, sizes: Mapping[str, int], source: str) -> list[range]:
        """The row numbers in consecutive splits, rounded as in ``datasets``.

        Args:
            sizes: the number of rows of every named split, in order.
            source: the data's name, for messages.

        Raises:
            DataError: if the slice selects no row, or its rounding does not fit the number of rows.
        """
        starts, start = {}, 0
        for name, size in sizes.items():
            starts[name] = start
            start += size
        if self.is_whole:
            return [range(sizes[self.text])]
        try:
            parts = datasets.ReadInstruction.from_spec(self.text).to_absolute(dict(sizes))
        except (ValueError, AssertionError) as error:
            raise DataError(f"{source}: split {self.text!r} cannot be applied: {error}") from error
        found = [
            range(starts[p.splitname] + p.from_, starts[p.splitname] + max(p.from_, p.to)) for p in parts
        ]
        if not any(found):
            rows = ", ".join(f"{name} has {size}" for name, size in sizes.items())
            raise DataError(f"{source}: split {self.text!r} selects no row ({rows}); give a larger slice")
        return [part for part in found if part]
