"""Fixtures of several folders."""

import pytest

from tokenpref.data.cache import CACHE_VARIABLE
from tokenpref.ops import products


@pytest.fixture(scope="session", autouse=True)
def data_cache(tmp_path_factory):
    """What tests read and tokenise is kept in a folder of theirs; commands that they start inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("data_cache")))
        yield


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
