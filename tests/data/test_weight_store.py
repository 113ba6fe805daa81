import hashlib
import json
import logging
import random
import shutil

import numpy as np
import pytest

from tokenpref.data import StoredRow, StoreWriter, WeightStore
from tokenpref.data.weight_store import FORMAT
from tokenpref.errors import DataError


def stored(row, chosen=(0.5, -1.25), rejected=(2.0,)):
    return StoredRow(
        row=row,
        key=f"key{row}",
        prompt="Ünïcode 🙂",
        chosen_text="ab",
        rejected_text="c",
        chosen=np.asarray(chosen, dtype=np.float32),
        rejected=np.asarray(rejected, dtype=np.float32),
        chosen_spans=[(0, 1), (1, 2)],
        rejected_spans=[(0, 1)],
    )


@pytest.fixture
def writer(tmp_path):
    return StoreWriter(tmp_path / "store", kind="log_ratio", job={"data": "d"}, shards=2)


def test_round_trip(writer):
    writer.write(1, [stored(7)])
    writer.write(0, [stored(3), stored(5, chosen=(0.1, -0.2))])
    store = writer.finish()
    assert [row.row for row in store] == [3, 5, 7] and len(store) == 3 and store.kind == "log_ratio"
    found = WeightStore.open(writer.path).row(5)
    assert found.chosen.dtype == np.float32 and np.array_equal(found.chosen, np.float32([0.1, -0.2]))
    assert found.prompt == "Ünïcode 🙂" and found.chosen_spans == [(0, 1), (1, 2)]
    assert store.find("key7").row == 7 and store.find("nothing") is None
    assert store.metadata["data"] == "d"
    with pytest.raises(DataError, match="no row 4; it holds 3 rows from 3 to 7"):
        store.row(4)


def test_an_unfinished_store_is_not_opened_and_continues(writer):
    writer.write(0, [stored(3)])
    with pytest.raises(DataError, match="unfinished.*it continues"):
        WeightStore.open(writer.path)
    again = StoreWriter(writer.path, kind="log_ratio", job={"data": "d"}, shards=2)
    assert again.missing() == [1]
    with pytest.raises(DataError, match="shard-00001.parquet is missing; the store cannot be sealed"):
        again.finish()


def test_sizes_and_checksums_of_shards_are_recorded(writer):
    for number in (1, 0):
        writer.write(number, [stored(number)])
    path = writer.finish().path
    entries = {}
    for file in sorted(path.glob("*.parquet")):
        content = file.read_bytes()
        entries[file.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert json.loads((path / "metadata.json").read_text())["files"] == entries
    lines = "".join(json.dumps({"shard": name, **entry}) + "\n" for name, entry in entries.items())
    assert (path / "shards.jsonl").read_text() == lines
    assert {f.name for f in path.iterdir()} == {"job.json", "metadata.json", "shards.jsonl", *entries}


def flip(file, bit):
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def cut(file, bit):
    file.write_bytes(file.read_bytes()[: bit // 8])


def remove(file, bit):
    file.unlink()


def rewritten(folder, shards=3):
    """Continue a store as an estimation does; the scores at its end."""
    writer = StoreWriter(folder, kind="log_ratio", job={"data": "d"}, shards=shards)
    for shard in writer.missing():
        writer.write(shard, [stored(2 * shard), stored(2 * shard + 1)])
    return [(row.row, row.key, row.chosen.tolist(), row.rejected.tolist()) for row in writer.finish()]


@pytest.mark.parametrize("finished", [False, True], ids=["half built", "finished"])
def test_a_harmed_store_ends_with_the_same_scores_or_with_an_error_that_names_the_file(
    tmp_path, caplog, finished
):
    """Flips and cuts everywhere in shards, checksums and records, before a store is continued."""
    draw = random.Random(7)
    expected = rewritten(tmp_path / "whole")
    if not finished:
        (tmp_path / "whole" / "metadata.json").unlink()
        (tmp_path / "whole" / "shard-00002.parquet").unlink()
    refused, made_anew = [], 0
    for number in range(60):
        folder = shutil.copytree(tmp_path / "whole", tmp_path / str(number))
        files = sorted(file for file in folder.iterdir())
        file = files[number % len(files)]
        harm = (flip, flip, flip, cut, remove)[number // len(files) % 5]
        harm(file, draw.randrange(8 * file.stat().st_size))
        caplog.clear()
        try:
            found = rewritten(folder)
        except DataError as error:
            refused.append((file.name, str(error)))
            continue
        assert found == expected, file
        if file.suffix == ".parquet" and harm is not remove:
            assert f"{file.name} " in caplog.text and "that shard is computed again" in caplog.text
            made_anew += 1
    assert refused and made_anew > 10
    assert all(name == "job.json" and name in error for name, error in refused), refused


def test_a_damaged_shard_is_named_and_made_anew_alone(tmp_path, caplog):
    expected = rewritten(tmp_path)
    shard = tmp_path / "shard-00001.parquet"
    flip(shard, 8 * 771 + 7)
    with pytest.raises(DataError, match="shard-00001.parquet is not what was written"):
        WeightStore.open(tmp_path)
    writer = StoreWriter(tmp_path, kind="log_ratio", job={"data": "d"}, shards=3)
    with caplog.at_level(logging.WARNING, logger="tokenpref"):
        assert writer.missing() == [1]
    assert (
        f"{shard} is not what was written (its checksum differs); that shard is computed again" in caplog.text
    )
    with pytest.raises(DataError, match="shard-00001.parquet .*cannot be sealed"):
        writer.finish()
    writer.write(1, [stored(2), stored(3)])
    assert not (tmp_path / "metadata.json").exists()  # nobody reads it before it is sealed again
    assert rewritten(tmp_path) == expected


def test_a_line_of_checksums_that_was_cut_costs_its_shard_alone(tmp_path):
    rewritten(tmp_path)
    (tmp_path / "metadata.json").unlink()
    lines = tmp_path / "shards.jsonl"
    lines.write_bytes(lines.read_bytes()[:-20])
    writer = StoreWriter(tmp_path, kind="log_ratio", job={"data": "d"}, shards=3)
    assert writer.missing() == [2]
    writer.write(2, [stored(4), stored(5)])
    assert StoreWriter(tmp_path, kind="log_ratio", job={"data": "d"}, shards=3).missing() == []


def test_a_record_that_was_changed_says_so(tmp_path, caplog):
    rewritten(tmp_path)
    record = json.loads((tmp_path / "metadata.json").read_text())
    (tmp_path / "metadata.json").write_text(json.dumps({**record, "data": "e"}))
    assert len(WeightStore.open(tmp_path)) == 6
    assert "metadata.json is not what was written (its checksum differs). The scores are whole" in caplog.text


def test_another_job_is_refused(writer):
    with pytest.raises(DataError, match="another job .it differs in data.*set another output_dir"):
        StoreWriter(writer.path, kind="log_ratio", job={"data": "other"}, shards=2)


def test_unknown_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'log_ratio'"):
        StoreWriter(tmp_path, kind="log_ratios", job={}, shards=1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda p: (p / "metadata.json").write_text("{"),
            "metadata.json cannot be read .*; estimate the weights again",
        ),
        (lambda p: (p / "metadata.json").write_text("[]"), "expected a mapping"),
        (
            lambda p: (p / "metadata.json").write_text(json.dumps({"format": "x", "kind": "weight"})),
            "format 'x'",
        ),
        (lambda p: (p / "shard-00000.parquet").unlink(), "shard-00000.parquet is missing"),
        (lambda p: (p / "shard-00000.parquet").write_bytes(b"PAR1 no"), "has 7 bytes and was written with"),
        (
            lambda p: (p / "metadata.json").write_text(json.dumps({"format": FORMAT, "kind": "weight"})),
            "shards is None, expected a whole number",
        ),
    ],
)
def test_damage_is_one_error(tmp_path, spoil, message):
    writer = StoreWriter(tmp_path / "store", kind="log_ratio", job={}, shards=1)
    writer.write(0, [stored(0)])
    writer.finish()
    spoil(writer.path)
    with pytest.raises(DataError, match=message):
        WeightStore.open(writer.path)


def test_a_shard_that_cannot_be_read_is_not_sealed(writer):
    for number in (0, 1):
        writer.write(number, [stored(number)])
    shard = writer.path / "shard-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(
        DataError, match="shard-00001.parquet has .* bytes and was written with .*run the command"
    ):
        writer.finish()
    assert not (writer.path / "metadata.json").exists()


def test_a_store_without_checksums_is_read(writer):
    """As versions before 0.1 wrote it."""
    for number in (0, 1):
        writer.write(number, [stored(number)])
    writer.finish()
    record = json.loads((writer.path / "metadata.json").read_text())
    assert set(record.pop("files")) == {"shard-00000.parquet", "shard-00001.parquet"}
    (writer.path / "metadata.json").write_text(json.dumps(record))
    assert [row.row for row in WeightStore.open(writer.path)] == [0, 1]


def test_a_path_that_is_no_store(tmp_path):
    with pytest.raises(DataError, match="no weight store there; make one with"):
        WeightStore.open(tmp_path / "nowhere")
    with pytest.raises(DataError, match="not a weight store"):
        WeightStore.open(tmp_path)
