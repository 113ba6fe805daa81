import json

import pytest
import torch

from tokenpref.data.samples import read_openings, read_samples
from tokenpref.errors import DataError
from tokenpref.training.evaluation.measures import _sample_seed


def test_openings_are_lines(tmp_path):
    (tmp_path / "p.txt").write_text("one \n\n two\n")
    assert read_openings(tmp_path / "p.txt") == ["one ", " two"]


def test_samples_are_read_as_they_are_written(tmp_path):
    """JSON keeps some of Unicode's line separators as they are; they end no record."""
    records = [{"prompt": "a\u2028b", "sample": i, "completion": "\x85\n", "reward": i / 2} for i in range(3)]
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (tmp_path / "s.jsonl").write_text(text, encoding="utf-8")
    assert read_samples(tmp_path / "s.jsonl") == records


@pytest.mark.parametrize(
    "line", ["", "3", "{}", '{"prompt": "a", "sample": 0, "reward": NaN}', "[" * 100_000]
)
def test_another_line_is_named(tmp_path, line):
    (tmp_path / "s.jsonl").write_text(f'{{"prompt": "a", "sample": 0, "reward": 1}}\n{line}\n')
    with pytest.raises(DataError, match="s.jsonl, line 2"):
        read_samples(tmp_path / "s.jsonl")


def test_every_seed_of_a_config_can_be_sampled_with():
    assert _sample_seed(3, 2, 1) == (3 * 1_000_003 + 2) * 1_000_003 + 1
    torch.Generator().manual_seed(_sample_seed(2**63 - 1, 5, 7))
