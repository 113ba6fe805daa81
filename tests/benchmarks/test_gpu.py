"""The GPU benchmark: its arithmetic, its cells on a tiny model, and what it says of those that fail."""

import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/ is no part of the package

from benchmarks import gpu
from benchmarks.gpu import Cell, ModelSize
from tokenpref.models import tiny_llama

TINY = gpu.tiny_plan()


def found(**changes):
    """A result made up: 1,000 tokens and 2e14 operations in half a second."""
    made = {
        "step_s": [0.4, 0.5, 9.0],
        "tokens": 1000,
        "flops": 2e14,
        "peak_gib": 12.34,
        "device": "NVIDIA H200",
    }
    return {**made, "losses": [0.75], "versions": {"torch": "2"}, **changes}


def test_operations_by_hand():
    """10 weights in the layers, a head of 7; 3 pairs of 2 + 4 tokens: 36 tokens at 30 positions, 24 of them an answer's."""
    cell = Cell("1b", pairs=3, prompt=2, answer=4)
    assert cell.tokens() == 36
    size = ModelSize(body=10, head=7, total=20)
    assert gpu.model_flops(size, cell) == 8 * (10 * 30 + 7 * 24)
    assert gpu.model_flops(size, replace(cell, reference="cached")) == 6 * (10 * 30 + 7 * 24)


def test_sizes_of_the_models():
    """Layers of the tiny one: q and output 32 x 32, k and v 16 x 32, three of 32 x 64; two layers; a tied head of 384 x 32.

    Two norms a layer and the last, of 32 each.
    """
    layers, head = 2 * (2 * 1024 + 2 * 512 + 3 * 2048), 384 * 32
    assert ModelSize.of(tiny_llama()) == ModelSize(layers, head, layers + head + 5 * 32)
    with torch.device("meta"):
        one, eight = (ModelSize.of(gpu.MODELS[name]()) for name in ("1b", "8b"))
    assert (one.total, eight.total) == (1_235_814_400, 8_030_261_248)  # as published
    assert one.body == one.total - one.head - 33 * 2048  # tied; two norms a layer, and the last
    assert eight.body == eight.total - 2 * eight.head - 65 * 4096


def test_peaks_by_the_devices_name():
    assert gpu.peak_flops("NVIDIA H200") == gpu.peak_flops("NVIDIA H100 80GB HBM3") == (989e12, 1979e12)
    assert gpu.peak_flops("NVIDIA H100 PCIe") == (756e12, 1513e12)
    assert gpu.peak_flops("NVIDIA A100-SXM4-80GB") == (312e12, None)
    assert gpu.peak_flops("CPU") == (None, None)


def test_the_table_by_hand():
    """Median 0.5 s: 2,000 tokens/s, 4e14 FLOP/s, of 989e12 and 1979e12."""
    plain, float8 = Cell("1b", compiled=True), Cell("1b", precision="float8", compiled=True)
    results = [
        {"cell": asdict(float8), "found": found()},
        {"cell": asdict(plain), "found": found()},
        {"cell": asdict(Cell("8b")), "found": {"failed": "out of memory"}},
        {"cell": asdict(replace(plain, loss="tdpo2")), "found": found(device="NVIDIA Novel")},
    ]
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in gpu.table(results).splitlines()[2:]]
    assert rows[0][:8] == ["1b", "dpo", "bf16", "fused", "all", "compiled", "equal", "model"]
    assert rows[0][8:] == ["0.500", "2000", "40.4%", "-", "12.3"]
    assert rows[1][2] == "float8" and rows[1][10:12] == ["40.4%", "20.2%"]
    assert rows[2][1] == "tdpo2" and rows[2][10:12] == ["-", "-"]
    assert rows[3][8:] == ["out of memory", "-", "-", "-", "-"]


def test_names_tell_cells_apart():
    for cells in (gpu.plan(), TINY):
        assert len({cell.name for cell in cells}) == len(cells)


@pytest.mark.parametrize("cell", TINY, ids=[cell.name for cell in TINY])
def test_every_choice_trains_here(cell):
    result = gpu.measure(cell, steps=2, warmup=1, device="cpu")
    assert len(result["step_s"]) == 2 and min(result["step_s"]) > 0
    assert result["tokens"] == (cell.tokens(1) + cell.tokens(2)) / 2
    assert result["losses"][0] == pytest.approx(math.log(2), abs=1e-6) and len(set(result["losses"])) == 3
    assert result["peak_gib"] > 0 and result["device"] == "CPU"


@pytest.mark.parametrize("loss", ["dpo", "tdpo2", "tis_dpo"])
def test_both_heads_give_the_same_losses(loss):
    fused, full = (
        gpu.measure(replace(TINY[0], loss=loss, head=head), steps=3, warmup=0, device="cpu")["losses"]
        for head in ("fused", "full")
    )
    assert fused == pytest.approx(full, abs=2e-3)  # in bfloat16


def test_a_cached_reference_gives_the_same_losses():
    model, cached = (
        gpu.measure(replace(TINY[0], reference=reference), steps=3, warmup=0, device="cpu")["losses"]
        for reference in ("model", "cached")
    )
    assert model == cached
    with pytest.raises(ValueError, match="need a reference that is a model"):
        gpu.measure(replace(TINY[0], reference="cached", loss="tdpo2"), steps=1, warmup=0, device="cpu")


def test_cells_run_in_processes_of_their_own_and_failures_are_in_the_table(tmp_path, capsys):
    file = tmp_path / "results.json"
    good, bad = TINY[0], replace(TINY[0], loss="ppo")
    settings = {"steps": 1, "warmup": 0, "device": "cpu"}
    gpu.run([good, bad], file, budget_s=200, again=False, **settings)
    first, second = gpu.read_results(file)
    assert first["found"]["tokens"] == good.tokens()
    assert second == {"cell": asdict(bad), "found": {"failed": "exit code 1: KeyError: 'ppo'"}}
    assert "exit code 1: KeyError: 'ppo'" in gpu.table([first, second])
    before = file.read_bytes()
    gpu.run([good, bad], file, budget_s=200, again=False, **settings)  # both are there
    assert file.read_bytes() == before
    gpu.run([TINY[1]], file, budget_s=0, again=False, **settings)
    assert file.read_bytes() == before and "no time is left" in capsys.readouterr().out


def test_memory_that_runs_out_is_said(tmp_path, monkeypatch):
    def fail(*_args, **_settings):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu, "measure", fail)
    gpu.main(["--cell", str(tmp_path / "found.json"), json.dumps({"cell": asdict(TINY[0]), "steps": 1})])
    assert json.loads((tmp_path / "found.json").read_text()) == {"failed": "out of memory"}


def test_a_tiny_run_prints_its_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "run_cell", lambda *args, **settings: found(device="CPU"))
    gpu.main(["--tiny", "--results", str(tmp_path / "r.json"), "--only", "tdpo2"])
    rows = capsys.readouterr().out.split("\n\n")[1].strip().splitlines()[2:]
    assert len(rows) == 3 and all("| tdpo2" in row for row in rows)


def test_lengths_by_hand():
    """Equal: every pair has 2 + 4 tokens twice. Unequal: within their bounds, and others in every step."""
    assert Cell("1b", pairs=3, prompt=2, answer=4).sizes(7) == [(2, 4, 4)] * 3
    cell = Cell("1b", pairs=50, lengths="unequal")
    first, second = cell.sizes(0), cell.sizes(1)
    assert first == cell.sizes(0) != second and len({chosen for _, chosen, _ in first}) > 20
    assert all(16 <= p <= 1024 and 4 <= c <= 512 and 4 <= r <= 512 for p, c, r in first)
    assert cell.tokens() == sum(2 * p + c + r for p, c, r in first)
    assert cell.positions() == sum(p + c + r for p, c, r in first)


def test_memory_of_cells_by_hand():
    """1.24 G parameters: 8 bytes of the policy and AdamW and 2 of the reference, then what grows with the batch."""
    small, large = (gpu.needed_gib(Cell("1b", kept="full", pairs=pairs)) for pairs in (1, 8))
    static = 10 * 1_235_814_400 / 2**30
    assert static < small < static + 4 and small < large < static + 6
    second = 2 * 1_235_814_400 / 2**30
    assert gpu.needed_gib(Cell("1b", kept="full", pairs=8, reference="cached")) <= large - second
    assert (
        gpu.needed_gib(Cell("1b", head="full")) > large + 10
    )  # four tensors of 1,024 x 8 logits of 128 k tokens


def test_cells_that_cannot_fit_are_not_run(tmp_path, monkeypatch, capsys):
    card = type("Card", (), {"total_memory": 24 * 2**30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _index: card)
    monkeypatch.setattr(gpu, "run_cell", lambda cell, *args, **settings: found())
    cells = [Cell("1b", kept="full"), Cell("1b", precision="mixed")]
    gpu.run(cells, tmp_path / "r.json", budget_s=100, again=False, steps=1, warmup=0, device="cuda")
    first, second = (r["found"] for r in gpu.read_results(tmp_path / "r.json"))
    assert first["tokens"] == 1000
    assert second["failed"].startswith("not run: needs about 3") and "the card has 24 GiB" in second["failed"]
    assert "not run: needs about" in capsys.readouterr().out


def test_the_page_shows_what_was_measured_on_one_gpu(tmp_path, monkeypatch):
    file, page = tmp_path / "r.json", tmp_path / "gpu.md"
    monkeypatch.setattr(gpu, "PAGE", page)
    write = ["--report-only", "--write-docs", "--results", str(file)]
    whole = [{"cell": asdict(cell), "found": found()} for cell in gpu.plan()]
    other = {**whole[0], "found": found(device="NVIDIA A100")}
    failed = [{**r, "found": {"failed": "out of memory"}} for r in whole]
    for results in ([other, *whole[1:]], [{**r, "found": found(device="CPU")} for r in whole], failed):
        file.write_text(json.dumps(results))
        with pytest.raises(SystemExit, match="wants one GPU"):
            gpu.main(write)
        assert not page.exists()
    file.write_text(json.dumps([*whole[1:3], failed[4]]))
    gpu.main(write)
    text = page.read_text()
    assert text.count("\n| ") == 3 + 2 and "| out of memory" in text
    assert "Not measured: 1b, dpo, bf16, fused head, keeps all, compiled; " in text
    file.write_text(json.dumps(whole))
    gpu.main(write)
    text = page.read_text()
    assert "One NVIDIA H200" in text and text.count("\n| ") == len(whole) + 2 and "Not measured" not in text
    assert "further than 0.06 from log 2" in text  # 0.75 - 0.693
