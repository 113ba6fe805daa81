from __future__ import annotations

import errno
import json
import logging
import os
import threading

import datasets
import pytest
from support import workers

from tokenpref.data import building, cache, preference_dataset, tokenizer_json
from tokenpref.data.encoding import pair_steps
from tokenpref.data.pairs import PairRow
from tokenpref.data.tokenization import run_steps
from tokenpref.distributed.testing import run_distributed
from tokenpref.errors import ConfigError, DataError

WORDS = ["hello", " the", " yes", " no", " é😀", "lo", " hello</s>"]
TEXT = [
    {
        "prompt": "hello" + WORDS[i % 6] * (i % 4),
        "chosen": WORDS[i % 7] * (1 + i % 5),
        "rejected": WORDS[(i + 3) % 7],
    }
    for i in range(40)
]
MARKED = [{**row, "complete": i % 3 == 0} for i, row in enumerate(TEXT)]
FAULTY = [
    *TEXT[:9],
    {**TEXT[0], "rejected": TEXT[0]["chosen"]},
    *TEXT[9:20],
    {**TEXT[0], "chosen": None},
    *TEXT[20:],
]
CHAT = [
    {
        side: [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
        for side in ("chosen", "rejected")
    }
    for row in TEXT
]
CASES = {
    "text": (TEXT, {}),
    "marked": (MARKED, {"append_eos": "auto", "add_bos": False}),
    "cut": (TEXT, {"max_seq_len": 8, "max_prompt_len": 3, "append_eos": True}),
    "too long": (TEXT, {"max_seq_len": 9, "truncation": "drop"}),
    "dropped": (FAULTY, {"on_fault": "drop", "swap": True}),
    "chat": (CHAT, {}),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def several_processes(monkeypatch):
    """Small shards, and three processes to tokenise them."""
    monkeypatch.setattr(building, "_SHARD_ROWS", 5)
    monkeypatch.setattr(building, "_BATCH_ROWS", 2)
    monkeypatch.setattr(building.os, "sched_getaffinity", lambda _pid: {0, 1, 2})


def pairs_of(entries):
    return sorted(path for path in entries.glob("pairs-*") if path.is_dir())


def everything(data):
    return (
        list(data),
        data.report,
        data.fingerprint(),
        data.lengths().tolist(),
        data.rows().tolist(),
        data.longest,
        data.highest_id,
    )


@pytest.mark.parametrize("case", CASES)
def test_a_cached_data_set_equals_one_that_was_tokenised_row_by_row(
    case, chat_tokenizer, write_jsonl, own_cache, request
):
    rows, settings = CASES[case]
    source = write_jsonl(rows)
    plain = preference_dataset(chat_tokenizer, source, cache_dir=None, **settings)
    assert not own_cache.exists()
    request.getfixturevalue("several_processes")
    first = preference_dataset(chat_tokenizer, source, **settings)
    request.getfixturevalue("monkeypatch").setattr(building, "encode_pairs", None)
    later = preference_dataset(chat_tokenizer, source, **settings)
    assert everything(plain) == everything(first) == everything(later)
    for index, example in enumerate(later):
        read = later._reader.read(later.raw(index))[0]
        assert isinstance(read, PairRow)
        pair = run_steps(chat_tokenizer, pair_steps(chat_tokenizer, read, later._settings))
        assert (example.chosen_ids, example.chosen_start) == (pair.chosen.ids, pair.chosen.start)
        assert (example.rejected_ids, example.rejected_start) == (pair.rejected.ids, pair.rejected.start)
        assert (example.chosen_offsets, example.rejected_offsets) == (pair.chosen.spans, pair.rejected.spans)
        assert (example.chosen_has_eos, example.rejected_has_eos) == (
            pair.chosen.has_eos,
            pair.rejected.has_eos,
        )
        assert (plain.text(index), plain.locate(index)) == (later.text(index), later.locate(index))
    assert later.rows().tolist() == [e.row for e in plain]
    assert later.starts().tolist() == [[e.chosen_start, e.rejected_start] for e in plain]
    assert later.has_eos().tolist() == [[e.chosen_has_eos, e.rejected_has_eos] for e in plain]
    assert later.lengths([2, 0]).tolist() == [
        [len(plain[i].chosen_ids), len(plain[i].rejected_ids)] for i in (2, 0)
    ]
    assert later.longest == max(max(len(e.chosen_ids), len(e.rejected_ids)) for e in plain)
    assert later.highest_id == max(max(*e.chosen_ids, *e.rejected_ids) for e in plain)


def test_faults_are_the_same_in_several_processes_and_leave_nothing_behind(
    tokenizer, write_jsonl, own_cache, request
):
    rows = [*FAULTY, *FAULTY, {**TEXT[1], "rejected": 3}]
    source = write_jsonl(rows)

    def message():
        with pytest.raises(DataError) as caught:
            preference_dataset(tokenizer, source)
        return str(caught.value)

    alone = message()
    assert "row 9 (line 10)" in alone and "2 rows in all: 9, 51" in alone and "no value" in alone
    request.getfixturevalue("several_processes")
    assert message() == alone
    assert pairs_of(own_cache) == []


def test_the_error_of_a_process_is_told_and_its_death_is_an_error(
    make_tokenizer_folder, write_jsonl, several_processes, monkeypatch
):
    plain = tokenizer_json(make_tokenizer_folder(config={"eos_token": "</s>"}))
    with pytest.raises(ConfigError, match="add_bos: true, but the tokenizer has no BOS"):
        preference_dataset(plain, write_jsonl(TEXT), add_bos=True)
    parent = os.getpid()
    monkeypatch.setattr(building, "encode_pairs", lambda *_: os._exit(9) if os.getpid() != parent else [])
    with pytest.raises(DataError, match="a process that tokenises ended with exit code 9"):
        preference_dataset(plain, write_jsonl(TEXT))


def test_the_address_changes_with_all_that_decides_the_tokens(
    make_tokenizer_folder, tmp_path, write_jsonl, own_cache
):
    folder = make_tokenizer_folder()

    def tokenizer(**given):
        return tokenizer_json(
            folder, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}", **given
        )

    source = write_jsonl(TEXT)
    made = [
        lambda: preference_dataset(tokenizer(), source),
        lambda: preference_dataset(tokenizer(), source, max_seq_len=90),
        lambda: preference_dataset(tokenizer(), source, on_fault="drop"),
        lambda: preference_dataset(tokenizer(), source, split="train[:50%]"),
        lambda: preference_dataset(tokenizer(), source, split="train[50%:]"),
        lambda: preference_dataset(tokenizer(), source, swap=True),
        lambda: preference_dataset(tokenizer(pad_token="<s>"), source),
        lambda: preference_dataset(tokenizer(bos_token="<pad>"), source),
        lambda: preference_dataset(tokenizer_json(folder, chat_template="{{ messages }}"), source),
        lambda: preference_dataset(tokenizer(), write_jsonl(TEXT[:-1], "other.jsonl")),
    ]
    for count, make in enumerate(made, start=1):
        make()
        assert len(pairs_of(own_cache)) == count
    (tmp_path / "moved").mkdir()
    os.rename(source, tmp_path / "moved" / "renamed.jsonl")
    preference_dataset(tokenizer(), str(tmp_path / "moved" / "renamed.jsonl"))
    assert len(pairs_of(own_cache)) == len(made)


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("ids.bin", flip),
        ("keys.bin", lambda file: file.write_bytes(file.read_bytes()[:-1])),
        ("spans.bin", lambda file: file.unlink()),
        ("manifest.json", lambda file: file.write_text("{")),
        ("manifest.json", lambda file: file.write_text(json.dumps({"files": {}}))),
        ("manifest.json", lambda file: file.write_text(json.dumps({"files": {}, "about": []}))),
        ("manifest.json", lambda file: file.unlink()),
    ],
)
def test_a_damaged_entry_is_named_and_made_anew(tokenizer, write_jsonl, own_cache, caplog, name, harm):
    source = write_jsonl(TEXT)
    before = everything(preference_dataset(tokenizer, source))
    (entry,) = pairs_of(own_cache)
    harm(entry / name)
    with caplog.at_level(logging.WARNING, "tokenpref"):
        assert everything(preference_dataset(tokenizer, source)) == before
    said = caplog.messages[0]
    assert said.startswith(f"{entry} is damaged: ") and name in said
    assert said.endswith(f"the tokenised form of {source} is built again")
    caplog.clear()
    assert everything(preference_dataset(tokenizer, source)) == before and not caplog.text


def test_an_entry_of_an_earlier_version_is_used(tokenizer, write_jsonl, own_cache, caplog):
    source = write_jsonl(TEXT)
    before = everything(preference_dataset(tokenizer, source))
    (entry,) = pairs_of(own_cache)
    manifest = json.loads((entry / "manifest.json").read_text())
    for file in manifest["files"].values():
        file["xxh3"] = file.pop("xxh3_128")
    (entry / "manifest.json").write_text(json.dumps(manifest))
    assert everything(preference_dataset(tokenizer, source)) == before and not caplog.text


def test_what_a_killed_builder_left_is_removed(tokenizer, write_jsonl, own_cache):
    source = write_jsonl(TEXT)
    before = everything(preference_dataset(tokenizer, source))
    (entry,) = pairs_of(own_cache)
    entry.rename(entry.with_name(f"{entry.name}.0123.partial"))
    assert everything(preference_dataset(tokenizer, source)) == before
    assert pairs_of(own_cache) == [entry]


@pytest.mark.parametrize("locks", [True, False])
def test_two_builders_at_once(tokenizer, write_jsonl, own_cache, monkeypatch, locks):
    source = write_jsonl(TEXT)
    built, found, both = [], [], threading.Barrier(2)
    write = building.PairBuilder._write

    def counted(self, writer):
        built.append(1)
        if not locks:
            both.wait(60)  # both are at it
        return write(self, writer)

    def without(*_args, **_more):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(building.PairBuilder, "_write", counted)
    if not locks:
        monkeypatch.setattr(cache, "try_lock", without)

    def start():
        both.wait(60)
        found.append(everything(preference_dataset(tokenizer, source)))

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 2 and found[0] == found[1] and len(built) == (1 if locks else 2)
    assert len(pairs_of(own_cache)) == 1


def test_a_cache_that_cannot_be_written_is_an_error(tokenizer, tmp_path, write_jsonl, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(
        DataError, match=r"the cache of tokenised data in .*file cannot be written.*cache_dir: null"
    ):
        preference_dataset(tokenizer, write_jsonl(TEXT), cache_dir=str(tmp_path / "file"))
    for cache_dir in (3, "", True):
        with pytest.raises(ConfigError, match="cache_dir must be auto, a folder or null"):
            preference_dataset(tokenizer, write_jsonl(TEXT), cache_dir=cache_dir)

    def full(self, chunk):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(building.PairWriter, "write", full)
    with pytest.raises(DataError, match="cannot be written: .*No space left on device"):
        preference_dataset(tokenizer, write_jsonl(TEXT))
    assert not list(tmp_path.glob("cache/*.partial"))


def test_ranks_build_once_in_a_common_folder_and_each_in_its_own(tmp_path, write_jsonl):
    source, common = write_jsonl(TEXT), str(tmp_path / "common")
    caches = [[common, str(tmp_path / f"node{rank}")] for rank in range(2)]
    first, second = run_distributed(workers.tokenised, source, caches)
    assert first[0][0] + second[0][0] == 1 and first[1][0] == second[1][0] == 1
    assert len({fingerprint for _, fingerprint, _ in first + second}) == 1
    assert all(pairs == first[0][2] for _, _, pairs in first + second)
