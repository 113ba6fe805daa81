"""What a reference said, on the disk: its layout by hand, what is read back, and every way in which it can be spoilt."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from support import small

from tokenpref._sealed import digest_of
from tokenpref.data.reference_store import ReferenceStore, ReferenceWriter, StoredAnswers, StoreLayout
from tokenpref.errors import ConfigError, DataError
from tokenpref.models.reference import CachedReference

ROWS = [3, 7, 8, 10, 11, 12, 20, 21, 22, 30]  # a data set of which rows were left out


def layout(folder, kind="logps", rows=ROWS, **job):
    return StoreLayout(folder, kind, job, StoredAnswers.of([small.example(row) for row in rows]))


def value(row, side, count):
    """Numbers that say whose they are: 100 row + 10 side + place."""
    return 100.0 * row + 10 * side + torch.arange(count, dtype=torch.float32)


def answers(store, shard):
    rows, lengths = store.answers.rows, store.answers.lengths
    return [value(rows[p], side, int(lengths[p][side])) for p in store.pairs(shard) for side in (0, 1)]


def filled(store, *, skip=()):
    writer = ReferenceWriter(store)
    missing = writer.begin()
    written = {}
    for shard in missing:
        if shard not in skip:
            written |= writer.write(shard, answers(store, shard))
    if not skip:
        writer.seal(written, dtype=torch.float32, width=None)
    writer.close()
    return missing


def test_answers_are_counted():
    # small.batch: prompts of 3 + row % 2 tokens, answers of 2 + (3 row + 2 side) % 6
    found = StoredAnswers.of([small.example(row) for row in (0, 1)])
    assert found.lengths.tolist() == [[2, 4], [5, 7]] and found.tokens == 18
    assert found.sequence_tokens == 18 + 2 * 3 + 2 * 4


@pytest.mark.parametrize(
    ("pairs", "each", "shards"), [(1, 8, 1), (16, 8, 2), (602, 10, 61), (4096, 64, 64), (60_000, 64, 938)]
)
def test_shards_depend_on_the_number_of_pairs_alone(tmp_path, pairs, each, shards):
    store = StoreLayout(tmp_path, "logps", {}, StoredAnswers(range(pairs), torch.ones(pairs, 2).numpy(), 0))
    assert (store.shard_pairs, store.shards) == (each, shards)
    covered = [position for shard in range(shards) for position in store.pairs(shard)]
    assert covered == list(range(pairs))


def test_what_is_written_is_read_by_row_and_side(tmp_path):
    store = layout(tmp_path)
    assert filled(store) == [0, 1] and store.is_complete()
    read = ReferenceStore.open(store)
    for position, row in enumerate(ROWS):
        for side, name in enumerate(("chosen", "rejected")):
            count = int(store.answers.lengths[position][side])
            assert read.answer(row, name).equal(value(row, side, count))
    assert read.nbytes == sum(file.stat().st_size for file in store.path.glob("*.safetensors"))
    for row, side in ((4, "chosen"), (3, "anchor")):
        with pytest.raises(ValueError, match=f"holds nothing of the {side} answer of row {row}"):
            read.answer(row, side)


def test_few_files_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr("tokenpref.data.reference_store._OPEN_SHARDS", 1)
    store = layout(tmp_path)
    filled(store)
    read = ReferenceStore.open(store)
    for row in (3, 30, 3, 30):
        assert read.answer(row, "chosen")[0] == 100 * row
        assert len(read._open) == 1


def test_names_of_files_end_with_their_checksum(tmp_path):
    store = layout(tmp_path)
    filled(store)
    for file in store.path.glob("*.safetensors"):
        assert file.stem.rpartition("-")[2] == digest_of(file)


def test_another_job_kind_or_data_has_another_folder(tmp_path):
    some = [
        layout(tmp_path),
        layout(tmp_path, weights="other"),
        layout(tmp_path, rows=ROWS[:-1]),
        layout(tmp_path, kind="hidden"),
    ]
    assert len({store.path for store in some}) == 4
    assert layout(tmp_path).path == layout(tmp_path).path and layout(
        tmp_path, kind="hidden"
    ).path.name.startswith("hidden-")


def test_an_unfinished_store_goes_on(tmp_path):
    store = layout(tmp_path)
    filled(store, skip=[1])
    (store.path / "shard-00001.partial").write_bytes(b"half a shard")
    assert not store.is_complete() and store.missing() == [1]
    with pytest.raises(DataError, match="unfinished .no metadata.json.; start the run that makes it again"):
        ReferenceStore.open(store)
    assert filled(store) == [1] and ReferenceStore.open(store)


def test_a_writer_keeps_others_out(tmp_path):
    store, writer = layout(tmp_path), ReferenceWriter(layout(tmp_path))
    store.refuse_if_locked()
    writer.begin()
    for attempt in (store.refuse_if_locked, ReferenceWriter(store).begin):
        with pytest.raises(
            ConfigError, match="another run is filling .*logps-.* at this moment; wait for it"
        ):
            attempt()
    writer.close()
    store.refuse_if_locked()


def test_answers_of_other_lengths_are_refused(tmp_path):
    store = layout(tmp_path)
    writer = ReferenceWriter(store)
    writer.begin()
    with pytest.raises(ValueError, match="shard 0 takes answers of"):
        writer.write(0, answers(store, 0)[1:])
    with pytest.raises(DataError, match="shard-00000 is missing; the store cannot be sealed"):
        writer.seal({}, dtype=torch.float32, width=None)
    writer.close()


def shard_of(store):
    return store.found()["shard-00001"]


def changed(store, at):
    file = shard_of(store)
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(bytes(content))


def metadata(store, change):
    file = store.path / "metadata.json"
    found = json.loads(file.read_text())
    change(found)
    file.write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda s: changed(s, -1), r"shard-00001-\w+.safetensors is not what was written .its checksum differs.; remove it"),
        (lambda s: changed(s, 10), "shard-00001-.* is not what was written"),
        (lambda s: os.truncate(shard_of(s), 100), "shard-00001-.* has 100 bytes and was written with"),
        (lambda s: metadata(s, lambda m: m["job"].update(weights="x")), "metadata.json is not of this store .it differs in job"),
        (lambda s: metadata(s, lambda m: m["values"].update(dtype="int8")), "dtype is 'int8'"),
        (lambda s: metadata(s, lambda m: m["values"].update(width=3)), "width is 3"),
        (lambda s: metadata(s, lambda m: m.update(files={"../x-y": 1})), "files names other files"),
        (lambda s: metadata(s, lambda m: m.update(files=[1])), "files is no mapping"),
        (lambda s: (s.path / "metadata.json").write_text("{"), "metadata.json cannot be read .*; remove it"),
        (lambda s: (s.path / "metadata.json").write_text("[]"), "metadata.json cannot be read .expected a mapping"),
    ],
    ids=["bit in the values", "bit in the header", "cut", "job", "dtype", "width", "names", "files", "no JSON", "a list"],
)  # fmt: skip
def test_damage_is_named_and_mended_by_removing_the_file(tmp_path, spoil, said):
    store = layout(tmp_path)
    filled(store)
    spoil(store)
    with pytest.raises(DataError, match=said) as caught:
        ReferenceStore.open(store)
    named = str(caught.value).split(" ")[0]
    os.unlink(named)
    assert not store.is_complete()
    filled(store)
    assert ReferenceStore.open(store).answer(ROWS[-1], "rejected")[0] == 100 * ROWS[-1] + 10


def test_what_was_damaged_in_an_unfinished_store_is_written_again(tmp_path):
    store = layout(tmp_path)
    filled(store, skip=[0])
    changed(store, -1)
    assert filled(store) == [0, 1]
    assert ReferenceStore.open(store).answer(ROWS[-1], "rejected")[0] == 100 * ROWS[-1] + 10


def test_a_file_that_went_missing_while_it_was_open(tmp_path):
    store = layout(tmp_path)
    filled(store)
    shard_of(store).unlink()
    with pytest.raises(DataError, match="shard-00001-.* is not there; all processes must reach the same"):
        ReferenceStore.open(store)


def test_checksums_are_shared_out(tmp_path):
    store = layout(tmp_path)
    filled(store)
    changed(store, -1)  # the second file of the two
    ReferenceStore.open(store, rank=0, world_size=2)
    with pytest.raises(DataError, match="checksum"):
        ReferenceStore.open(store, rank=1, world_size=2)


def test_shards_of_another_shape_are_refused(tmp_path):
    """Written by a faulty program, with a checksum that is right."""
    store = layout(tmp_path)
    writer = ReferenceWriter(store)
    writer.begin()
    written = writer._write("shard-00000", {"values": torch.zeros(3)})
    written |= writer._write("shard-00001", {"other": torch.zeros(3)})
    writer.seal(written, dtype=torch.float32, width=None)
    writer.close()
    read = ReferenceStore.open(store)
    with pytest.raises(DataError, match=r"shard-00000-.*: holds \[3\] of F32, expected \[\d+\] of F32"):
        read.answer(3, "chosen")
    with pytest.raises(DataError, match=r"shard-00001-.*: holds \['other'\], expected values"):
        read.answer(30, "chosen")


def test_bfloat16_stays_bfloat16(tmp_path):
    store = layout(tmp_path, kind="hidden")
    writer = ReferenceWriter(store)
    written = {}
    for shard in writer.begin():
        hidden = [v[:, None].expand(-1, 4).bfloat16() for v in answers(store, shard)]
        written |= writer.write(shard, hidden)
    head = torch.randn(5, 4, dtype=torch.bfloat16)
    written |= writer.write_head(head)
    writer.seal(written, dtype=torch.bfloat16, width=4)
    writer.close()
    read = ReferenceStore.open(store)
    assert read.answer(7, "chosen").equal(value(7, 0, 5)[:, None].expand(-1, 4).bfloat16())
    found = read.head_weight("cpu")
    assert found.equal(head) and read.head_digest in store.found()["head"].name
    reference = CachedReference(read, found)
    with reference.outputs(small.batch([], filler=True), frozenset({"kl_ref_policy"})) as output:
        assert output.hidden.shape == (0, 4) and output.hidden.dtype == torch.bfloat16
    assert load_file(store.found()["head"])["values"].equal(head)
