"""Fixtures of several folders."""

import gc
import multiprocessing

import pytest

from tokenpref.data.cache import CACHE_VARIABLE
from tokenpref.models import cpu
from tokenpref.ops import products

# The ranks of run_distributed are forked from a process that has imported these, which takes seconds.
multiprocessing.set_forkserver_preload(["torch._dynamo", "tokenpref.training"])


def pytest_collection_modifyitems(items):
    """The recipes' files take longest. They come first, so that at the end no worker waits for one of them."""
    items.sort(key=lambda item: item.path.parent.name != "recipes")


def pytest_collection_finish():
    """A training collects garbage often, and need not search what imports have left every time."""
    gc.collect()
    gc.freeze()


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
    by_weight = cpu.OneDNN._by_weight

    def counted(x, weight):
        made.append((tuple(x.shape), tuple(weight.shape)))
        return by_weight(x, weight)

    monkeypatch.setattr(cpu.OneDNN, "_by_weight", staticmethod(counted))
    monkeypatch.setattr(cpu, "uses_onednn", lambda: True)
    monkeypatch.setattr(cpu, "_SMALLEST", 0)
    monkeypatch.setattr(products, "_library", cpu.OneDNN())
    return made
