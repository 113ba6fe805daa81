from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os

import datasets
import pyarrow
import pytest

from tokenpref.data import load_rows, sources
from tokenpref.errors import ConfigError, DataError

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


def test_a_folder_of_everything_is_not_searched(tmp_path, monkeypatch):
    """Such as a home directory."""
    for number in range(4):
        (tmp_path / "deep" / str(number)).mkdir(parents=True)
    monkeypatch.setattr(sources, "_MOST_ENTRIES", 6)
    with pytest.raises(DataError, match="holds no data file"):
        load_rows(str(tmp_path))
    (tmp_path / "train.jsonl").write_text(json.dumps(ROWS[0]))
    with pytest.raises(
        DataError, match=f"{tmp_path} holds more than 6 files and folders.*; set source to the folder"
    ):
        load_rows(str(tmp_path))


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
            "is not valid JSON: the key 'chosen' occurs more than once",
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


def compress_zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": compress_zstd}


@pytest.mark.parametrize(("suffix", "compress"), COMPRESS.items())
def test_compressed_files_are_read_like_plain_ones(tmp_path, suffix, compress):
    lines = [json.dumps(row).encode() + b"\n" for row in ROWS]
    (tmp_path / "data").mkdir()
    path, csv = tmp_path / f"data/train.jsonl.{suffix}", tmp_path / f"rows.csv.{suffix}"
    # Two streams one after another are one file to every tool that compresses.
    path.write_bytes(compress(b"\xef\xbb\xbf" + lines[0]) + compress(lines[1]))
    csv.write_bytes(compress(b"prompt,chosen,rejected\nq,a,b\nr,c,d\n"))
    for source in (str(path), str(tmp_path / "data"), str(csv)):
        assert load_rows(source).table.to_list() == ROWS, source
    assert load_rows("json", data_files=str(path)).table.to_list() == ROWS
    path.write_bytes(compress(lines[0] + b"\n" + b"{\n"))
    with pytest.raises(DataError, match=rf"train\.jsonl\.{suffix}, row 1 \(line 3\) is not valid JSON"):
        load_rows(str(path))
    path.write_bytes(compress(b"".join(lines) * 9)[:-9])
    with pytest.raises(DataError, match=rf"train\.jsonl\.{suffix} cannot be read: "):
        load_rows(str(path))
    path.write_bytes(b"".join(lines))
    with pytest.raises(DataError, match=rf"train\.jsonl\.{suffix} cannot be read: "):
        load_rows(str(path))
    path.write_bytes(compress(b"\n"))
    with pytest.raises(DataError, match=rf"train\.jsonl\.{suffix} is empty"):
        load_rows(str(path))


def test_a_file_beside_its_compressed_form_is_refused(tmp_path, write_jsonl):
    (tmp_path / "data").mkdir()
    write_jsonl(ROWS, "data/train.jsonl")
    (tmp_path / "data/train.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROWS[0]).encode()))
    with pytest.raises(DataError, match=r"train\.jsonl and train\.jsonl\.gz are two forms of one file"):
        load_rows(str(tmp_path / "data"))


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        ("prompt,chosen,rejected\r\nq,None,N/A\r\nr,null,\r\n", [["q", "None", "N/A"], ["r", "null", ""]]),
        ("prompt,chosen,rejected\n7,007,1.50\nTrue,1e5,2020-01-01\n", [["7", "007", "1.50"], ["True", "1e5", "2020-01-01"]]),
        ('\ufeffprompt,chosen,rejected\n"a\nb"," c, ""d""",\'\n', [["a\nb", ' c, "d"', "'"]]),
        ("prompt;chosen;rejected\nA?; yes, no; no\n", [["A?", " yes, no", " no"]]),
        ("prompt\tchosen\trejected\nq\ta\tb\n\n\nr\tc\td", [["q", "a", "b"], ["r", "c", "d"]]),
        ("prompt,chosen,rejected\rq,a,b\r", [["q", "a", "b"]]),
        ("prompt,chosen,rejected\n" + "q,1,2\n" * 3000 + "q,one,two\n", [["q", "1", "2"]] * 3000 + [["q", "one", "two"]]),
        (f"prompt,chosen,rejected\nq,{'a' * 200_000},b\n", [["q", "a" * 200_000, "b"]]),
    ],
    ids=["words", "numbers", "quotes", "semicolon", "tab", "old line ends", "long", "long field"],
)  # fmt: skip
def test_fields_of_csv_are_text_as_it_stands(tmp_path, content, rows):
    (tmp_path / "rows.csv").write_text(content, encoding="utf-8", newline="")
    table = load_rows(str(tmp_path / "rows.csv")).table
    assert table.column_names == ["prompt", "chosen", "rejected"]
    assert [list(row.values()) for row in table] == rows


def test_a_column_of_csv_without_a_name_gets_one(tmp_path):
    (tmp_path / "rows.csv").write_text(",chosen,rejected\n0,a,b\n")
    assert load_rows(str(tmp_path / "rows.csv")).table.column_names == ["Unnamed: 0", "chosen", "rejected"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"chosen,rejected\na,b\n\na,b,c\n", r"rows\.csv, row 1 \(line 4\) has 3 fields and the header 2"),
        (b"chosen,rejected\na\n", r"rows\.csv, row 0 \(line 2\) has 1 fields"),
        (b'chosen,rejected\n"a\n\nb",c\n"a"b,c\n', r"rows\.csv, row 1 \(line 5\) is not valid CSV"),
        (b'chosen,rejected\na,"b\n', r"rows\.csv, row 0 \(line 2\) is not valid CSV: unexpected end of data"),
        (b"chosen,rejected\na,\xff\n", r"rows\.csv, after line \d+: not UTF-8 text"),
        (b"chosen,chosen\na,b\n", r"rows\.csv: two columns are called 'chosen'"),
        (b"chosen;re|jected\na;b\n", r"may be separated by semicolon or bar"),
        (b"chosen,rejected\n\n", r"rows\.csv is empty"),
    ],
)
def test_csv_that_is_none_is_named(tmp_path, content, message):
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_rows(str(tmp_path / "rows.csv"))


SLICES = [
    "train[:90%]", "train[90%:]", "train[10:20]", "train[-7:]", "train[33%:66%]", "train[:10%]+train[-10%:]", "train[:500]",
    "train[:20%](pct1_dropremainder)", "train[1%:2%]",
]  # fmt: skip


@pytest.mark.parametrize("split", SLICES)
@pytest.mark.parametrize("count", [57, 164])
def test_slices_are_those_of_datasets(tmp_path, write_jsonl, split, count):
    rows = [{"chosen": str(i), "rejected": "b"} for i in range(count)]
    source = write_jsonl(rows, "train.jsonl")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "all.parquet"))
    try:
        expected = datasets.load_dataset("json", data_files=source, split=split).to_list()
    except ValueError:  # that rounding asks for at least a hundred rows
        expected = []
    for given in (source, str(tmp_path / "saved"), str(tmp_path / "all.parquet")):
        if not expected:
            with pytest.raises(DataError, match=r"cannot be applied|selects no row"):
                load_rows(given, split=split)
            continue
        sliced = load_rows(given, split=split)
        assert sliced.table.to_list() == expected, given
        assert [sliced.number(i) for i in range(len(expected))] == [int(row["chosen"]) for row in expected]
    if expected:
        last = int(expected[-1]["chosen"])
        located = load_rows(source, split=split).locate(len(expected) - 1)
        assert located == f"{source}, row {last} (line {last + 1})"
        assert load_rows(source, split=split).first(1).table.to_list() == expected[:1]


def test_slices_of_several_splits(tmp_path, write_jsonl):
    folder, saved = tmp_path / "folder", tmp_path / "saved"
    folder.mkdir()
    names = ["train-0.jsonl", "train-1.jsonl", "test.jsonl"]
    parts = [[{"chosen": f"{name} {i}", "rejected": "b"} for i in range(4)] for name in names]
    files = [write_jsonl(part, f"folder/{name}") for part, name in zip(parts, names, strict=True)]
    table = datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list(parts[0] + parts[1]),
            "test": datasets.Dataset.from_list(parts[2]),
        }
    )
    table.save_to_disk(str(saved))
    chosen = [*parts[2][:2], *parts[0][2:], *parts[1]]
    split = "test[:50%]+train[2:]"
    data_files = {"train": files[:2], "test": files[2]}
    for rows in (
        load_rows(str(folder), split=split),
        load_rows(str(saved), split=split),
        load_rows("json", data_files=data_files, split=split),
    ):
        assert rows.table.to_list() == chosen
    assert load_rows(str(folder), split=split).locate(5) == f"{files[1]}, row 1 (line 2)"
    with pytest.raises(DataError, match="names 2 splits"):
        load_rows(files[0], split=split)
    with pytest.raises(DataError, match=r"split 'test\[9:\]' selects no row \(test has 4\)"):
        load_rows(str(folder), split="test[9:]")


@pytest.mark.parametrize(
    "split", ["", 3, None, "train[:90", "train[a:b]", "train[:200%]", "train[:10%](up)", "train[2]"]
)
def test_a_split_that_is_none_is_named(write_jsonl, split):
    with pytest.raises(ConfigError, match="split"):
        load_rows(write_jsonl(ROWS), split=split)


def test_columns_that_change_their_kind_late_are_as_written(write_jsonl):
    values = (
        [{"value": None}] * 1500
        + [{"value": 1}] * 1000
        + [{"value": "1", "late": [1]}, {"value": 2.5, "late": 3}]
    )
    rows = load_rows(write_jsonl(values))
    full = [{"value": None, "late": None, **row} for row in values]
    for i in (0, 1499, 1500, 2499, 2500, 2501):
        assert rows.table[i] == full[i]
    assert json.dumps(rows.table[2500]["value"]) == '"1"' and rows.table.num_rows == len(values)


@pytest.mark.parametrize("cache_dir", ["auto", "own", None])
def test_rows_are_the_same_from_the_cache_and_without(tmp_path, monkeypatch, write_jsonl, cache_dir):
    cache_dir = str(tmp_path / "own") if cache_dir == "own" else cache_dir
    source = write_jsonl(ROWS)
    first = load_rows(source, cache_dir=cache_dir)
    monkeypatch.setattr(sources, "write_table", None if cache_dir else sources.write_table)
    again = load_rows(source, cache_dir=cache_dir)
    assert first.table.to_list() == again.table.to_list() == ROWS
    assert first.locate(1) == again.locate(1)
    assert bool(list((tmp_path / "own").glob("rows-*"))) == (cache_dir not in ("auto", None))


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
