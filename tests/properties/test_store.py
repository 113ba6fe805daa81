from __future__ import annotations

import random
import tempfile
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenpref.data import StoredRow, StoreWriter, WeightStore
from tokenpref.errors import DataError

texts = st.text(max_size=12)
# nan is an EOS without a score; -0.0, infinities and the smallest numbers keep their bits as well.
scores = st.floats(width=32)
places = st.integers(0, 2**31 - 1)
spans = st.tuples(places, places).map(lambda span: (min(span), max(span)))
answers = st.lists(st.tuples(scores, spans), max_size=4)


@st.composite
def stored_rows(draw) -> list[StoredRow]:
    numbers = draw(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=5, unique=True))
    rows = []
    for number in numbers:
        chosen, rejected = draw(answers), draw(answers)
        rows.append(
            StoredRow(
                row=number,
                key=f"{number:064x}",
                prompt=draw(texts),
                chosen_text=draw(texts),
                rejected_text=draw(texts),
                chosen=np.asarray([score for score, _ in chosen], dtype=np.float32),
                rejected=np.asarray([score for score, _ in rejected], dtype=np.float32),
                chosen_spans=[span for _, span in chosen],
                rejected_spans=[span for _, span in rejected],
            )
        )
    return rows


@st.composite
def sharded(draw) -> list[list[StoredRow]]:
    """Rows in any number of shards, of which some may be empty."""
    shards: list[list[StoredRow]] = [[] for _ in range(draw(st.integers(1, 4)))]
    for row in draw(stored_rows()):
        shards[draw(st.integers(0, len(shards) - 1))].append(row)
    return shards


def bits(row: StoredRow) -> dict[str, object]:
    """A row's values, arrays as their type and bytes, so that nan equals nan and 0.0 is not -0.0."""
    values = {field.name: getattr(row, field.name) for field in fields(row)}
    return {k: (v.dtype, v.tobytes()) if isinstance(v, np.ndarray) else v for k, v in values.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("stores")


@settings(max_examples=20)
@given(st.data(), sharded(), st.sampled_from(["weight", "log_ratio", "tis_release"]))
def test_rows_come_back_bit_for_bit(folder, data, shards, kind):
    order = data.draw(st.permutations(range(len(shards))))
    written = [row for shard in shards for row in shard]
    with tempfile.TemporaryDirectory(dir=folder) as path:
        writer = StoreWriter(Path(path), kind=kind, job={"data": "d"}, shards=len(shards))
        for shard in order:
            writer.write(shard, shards[shard])
        # The order of writing is that of the machines; the store's is that of the shards.
        for store in (writer.finish(), WeightStore.open(path)):
            assert [bits(row) for row in store] == [bits(row) for row in written]
            assert (len(store), store.kind, store.metadata["data"]) == (len(written), kind, "d")
        for row in written:
            assert store.has_row(row.row) and bits(store.row(row.row)) == bits(row)
            found = store.find(row.key)
            assert found is not None and bits(found) == bits(row)


@settings(max_examples=10)
@given(st.data(), sharded())
def test_a_store_that_was_interrupted_continues_to_the_same_rows(folder, data, shards):
    written = [row for shard in shards for row in shard]
    done = data.draw(st.sets(st.integers(0, len(shards) - 1)))
    with tempfile.TemporaryDirectory(dir=folder) as path:
        first = StoreWriter(Path(path), kind="weight", job={}, shards=len(shards))
        for shard in done:
            first.write(shard, shards[shard])
        again = StoreWriter(Path(path), kind="weight", job={}, shards=len(shards))
        assert again.missing() == [n for n in range(len(shards)) if n not in done]
        if again.missing():
            with pytest.raises(DataError, match="unfinished"):
                WeightStore.open(path)
            with pytest.raises(DataError, match="cannot be sealed"):
                again.finish()
        for shard in again.missing():
            again.write(shard, shards[shard])
        assert [bits(row) for row in again.finish()] == [bits(row) for row in written]


@settings(max_examples=10)
@given(stored_rows(), st.integers(1, 5), st.integers(0, 2**32))
def test_sharding_changes_no_row(folder, rows, shards, seed):
    with tempfile.TemporaryDirectory(dir=folder) as path:
        stores = []
        for name, parts in (("one", 1), ("many", shards)):
            writer = StoreWriter(Path(path) / name, kind="log_ratio", job={}, shards=parts)
            shuffled = random.Random(seed).sample(rows, len(rows))
            for shard in range(parts):
                writer.write(shard, shuffled[shard::parts])
            stores.append({row.row: bits(row) for row in writer.finish()})
        assert stores[0] == stores[1] and len(stores[0]) == len(rows)
