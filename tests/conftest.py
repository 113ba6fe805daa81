"""Fixtures of several folders."""

import pytest

from tokenpref.ops import products


@pytest.fixture
def onednn(monkeypatch):
    """Products of any size by oneDNN, whatever the processor; the shapes of both factors of each."""
    made = []
    by_onednn = products._by_onednn

    def counted(x, weight):
        made.append((tuple(x.shape), tuple(weight.shape)))
        return by_onednn(x, weight)

    monkeypatch.setattr(products, "_by_onednn", counted)
    monkeypatch.setattr(products, "uses_onednn", lambda: True)
    monkeypatch.setattr(products, "_SMALLEST", 0)
    return made
