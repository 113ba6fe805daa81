import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "data" / "tiny"
FILES = [
    "eval.jsonl",
    "model/config.json",
    "model/model.safetensors",
    "model/tokenizer.json",
    "model/tokenizer_config.json",
    "openings.txt",
    "train.jsonl",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "tiny"
    subprocess.run([sys.executable, ROOT / "scripts" / "make_tiny.py", "--output", folder], check=True)
    return folder


@pytest.mark.parametrize("name", FILES)
def test_the_script_makes_the_shipped_bytes(made, name):
    assert (made / name).read_bytes() == (SHIPPED / name).read_bytes()


def test_nothing_else_lies_there(made):
    for folder in (made, SHIPPED):
        assert sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()) == FILES


def test_it_is_small_and_split():
    assert sum(f.stat().st_size for f in (SHIPPED / "model").iterdir()) < 250_000
    train, held_out = (
        [json.loads(line) for line in (SHIPPED / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "eval")
    )
    assert (len(train), len(held_out)) == (64, 16)
    assert len({json.dumps(row) for row in train + held_out}) == 80
    openings = (SHIPPED / "openings.txt").read_text().splitlines()
    assert len(set(openings)) == 8 and not {row["prompt"] for row in train + held_out} & set(openings)
