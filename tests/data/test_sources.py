from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os

import datasets
import pytest

from tokenpref.data import load_rows
from tokenpref.errors import DataError

ROWS = [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "r", "chosen": "c", "rejected": "d"}]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def table():
    return datasets.Dataset.from_list(ROWS)


def test_file_kinds_give_the_same_rows(tmp_path, write_jsonl, table):
    table.to_parquet(str(tmp_path / "t.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": table, "eval": table.select([1])}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "list.json").write_text(json.dumps(ROWS))
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    sources = [
        write_jsonl(ROWS),
        str(tmp_path / "t.parquet"),
        str(tmp_path / "saved"),
        str(tmp_path / "splits"),
    ]
    for source in [*sources, str(tmp_path / "list.json"), str(arrow)]:
        assert load_rows(source).table.to_list() == ROWS, source
    assert load_rows(str(tmp_path / "splits"), split="eval").table.to_list() == ROWS[1:]
    with pytest.raises(DataError, match="no split 'test'; it has 'train', 'eval'"):
        load_rows(str(tmp_path / "splits"), split="test")


def test_format_with_data_files(tmp_path, write_jsonl):
    first, second = write_jsonl(ROWS[:1], "a1.txt"), write_jsonl(ROWS[1:], "a2.txt")
    assert load_rows("json", data_files=first).table.to_list() == ROWS[:1]
    assert load_rows("json", data_files=[first, second]).table.to_list() == ROWS
    assert load_rows("json", data_files=str(tmp_path / "a?.txt")).table.to_list() == ROWS
    assert (
        load_rows("json", data_files={"train": first, "eval": second}, split="eval").table.to_list()
        == ROWS[1:]
    )
    with pytest.raises(DataError, match=r"no file .*a3\.txt"):
        load_rows("json", data_files=str(tmp_path / "a3.txt"))
    with pytest.raises(DataError, match=r"no file .*b\* matches this pattern"):
        load_rows("json", data_files=str(tmp_path / "b*"))
    with pytest.raises(DataError, match="say which files with data_files"):
        load_rows("json")
    with pytest.raises(DataError, match="the suffix says no format"):
        load_rows(first)


def test_folder_chooses_by_split(tmp_path, write_jsonl):
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(ROWS[:1], "folder/train-00000-of-00002.jsonl")
    write_jsonl(ROWS[1:], "folder/train-00001-of-00002.jsonl")
    write_jsonl(ROWS[1:], "folder/eval.jsonl")
    assert load_rows(str(folder)).table.to_list() == ROWS
    assert load_rows(str(folder), split="eval").table.to_list() == ROWS[1:]
    with pytest.raises(DataError, match=r"no file for split 'test'; it holds eval\.jsonl"):
        load_rows(str(folder), split="test")


def test_paths_resolve_against_the_current_directory_and_the_package(write_jsonl, tmp_path, monkeypatch):
    write_jsonl(ROWS)
    monkeypatch.chdir(tmp_path)
    assert load_rows("pairs.jsonl").table.num_rows == 2
    with pytest.raises(DataError, match=r"no file or folder .*data.nothing\.jsonl"):
        load_rows("package://data/nothing.jsonl")


def test_a_changed_file_is_read_again_even_with_its_old_time(write_jsonl):
    path = write_jsonl(ROWS)
    time = os.stat(path).st_mtime_ns
    assert load_rows(path).table[0]["chosen"] == "a"
    write_jsonl([{**ROWS[0], "chosen": "z"}, ROWS[1]])
    os.utime(path, ns=(time, time))
    assert load_rows(path).table[0]["chosen"] == "z"


def test_faults_of_files_are_named(tmp_path, write_jsonl):
    with pytest.raises(DataError, match=r"no file or folder .*missing\.jsonl"):
        load_rows(str(tmp_path / "missing.jsonl"))
    for text in ("", " \n\n"):
        (tmp_path / "empty.jsonl").write_text(text)
        with pytest.raises(DataError, match=r"empty\.jsonl is empty"):
            load_rows(str(tmp_path / "empty.jsonl"))
    (tmp_path / "bad.jsonl").write_text('{"chosen": "a"}\n\n{"chosen": \n{"chosen": "b"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl, row 1 \(line 3\) is not valid JSON"):
        load_rows(str(tmp_path / "bad.jsonl"))
    (tmp_path / "bad.jsonl").write_text("{}\n{}\n")
    with pytest.raises(DataError, match=r"bad\.jsonl: its rows have no columns"):
        load_rows(str(tmp_path / "bad.jsonl"))
    (tmp_path / "bad.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"bad\.parquet cannot be read as parquet"):
        load_rows(str(tmp_path / "bad.parquet"))
    datasets.Dataset.from_dict({"chosen": []}).to_parquet(str(tmp_path / "none.parquet"))
    with pytest.raises(DataError, match=r"none\.parquet: no rows"):
        load_rows(str(tmp_path / "none.parquet"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"null", "is a JSON NoneType, not an object"),  # ends the process in pyarrow's reader
        (b'{"chosen": "\xff"}', "is not valid JSON: 'utf-8' codec can't decode byte 0xff"),
        (
            b'{"chosen": "a", "chosen": "b"}',
            "is not valid JSON: the key 'chosen' stands there more than once",
        ),
        (b'{"chosen": "a"} {"chosen": "b"}', "is not valid JSON: Extra data"),
        (b"[" * 100_000, "is not valid JSON: maximum recursion depth"),
        (b'{"\\ud83d": "a"}', r"the column name '\\ud83d' holds a NUL or half of a surrogate pair"),
        (b'{"a\\u0000": "a"}', r"the column name 'a\\x00' holds a NUL"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_bytes(b'{"chosen": "a"}\n\n' + line)
    with pytest.raises(DataError, match=rf"rows\.jsonl, row 1 \(line 3\):? {message}"):
        load_rows(str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize(
    "values",
    [
        ["2020-01-01", "2020-01-01 10:00:00"],  # no dates
        [3.5, "4"],  # the text is no number
        [3, "null"],  # nor missing
        [True, 1.5],
        [[0.5], [True]],
        [2**70, 1],
        [{"a": 1}, {"b": []}],  # no key appears that was not there
        [{"a\0": 1}, {"a\0": 2}],
        ["a", [{"role": "assistant", "content": "a"}]],
        ["\ud83d", "😀"],
        [json.loads("[" * 100 + "]" * 100)] * 2,
    ],
)
def test_values_of_json_are_those_of_the_file(write_jsonl, values):
    table = load_rows(write_jsonl([{"value": value} for value in values])).table
    assert [json.dumps(row["value"]) for row in table] == [json.dumps(value) for value in values]
    assert [json.dumps(table[i]["value"]) for i in (0, 1)] == [json.dumps(value) for value in values]


def test_a_column_may_begin_in_any_row_of_any_file(write_jsonl):
    first, second = write_jsonl([{"chosen": "a"}], "a.jsonl"), write_jsonl([{"extra": 1}], "b.jsonl")
    table = load_rows("json", data_files=[first, second]).table
    assert table.to_list() == [{"chosen": "a", "extra": None}, {"chosen": None, "extra": 1}]


@pytest.mark.parametrize(
    ("suffix", "compress"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)]
)
def test_compressed_json(tmp_path, suffix, compress):
    path = tmp_path / f"rows.jsonl.{suffix}"
    path.write_bytes(compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    assert load_rows("json", data_files=str(path)).table.to_list() == ROWS
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="cannot be read: "):
        load_rows("json", data_files=str(path))


def test_places_of_rows(tmp_path, write_jsonl):
    first, second = write_jsonl(ROWS, "a.jsonl"), tmp_path / "b.jsonl"
    second.write_text("\n" + json.dumps(ROWS[0]) + "\n")
    rows = load_rows("json", data_files=[first, str(second)])
    assert rows.locate(1) == f"{first}, row 1 (line 2)"
    assert rows.locate(2) == f"{second}, row 0 (line 2)"


def test_the_hub_out_of_reach_is_a_clear_error(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(
        DataError, match=r"'someone/pairs' is no local path, and the hub cannot be reached .*download"
    ):
        load_rows("someone/pairs")
