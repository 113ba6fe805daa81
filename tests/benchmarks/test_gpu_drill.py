"""The drill for a GPU: all of it at tiny sizes, and what it leaves of stages that fail, hang or are killed."""

import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/ is no part of the package

from benchmarks import gpu_drill
from benchmarks.drill import attention, peer, report, steps
from benchmarks.drill.agreement import HostReads
from benchmarks.drill.stage import Log, Stage
from benchmarks.gpu_drill import Plan

pytest.importorskip("transformers")


@pytest.fixture
def log(tmp_path):
    return Log(tmp_path / "out" / "results.jsonl")


def test_the_whole_drill_at_tiny_sizes(tmp_path, log, capsys):
    threads = torch.get_num_threads()
    code = gpu_drill.main(["--out", str(tmp_path / "out"), "--tiny", "--write-docs", str(tmp_path / "docs")])
    torch.set_num_threads(threads)
    found = report.latest(log.read())
    errors = [r for records in found.values() for r in records if r["kind"] == "error"]
    assert code == 0 and errors == [] and list(found) == list(gpu_drill.STAGES)
    ends = {name: records[-1] for name, records in found.items()}
    assert all(end["kind"] == "end" and end["ok"] for end in ends.values())
    checks = {r["name"]: r["found"] for records in found.values() for r in records if r["kind"] == "check"}
    assert sum("first loss, from log 2" in name for name in checks) == 7  # the tiny cells
    assert checks["resumed weights, from those of one run"] == 0
    rows = {r["table"]: r["values"] for records in found.values() for r in records if r["kind"] == "row"}
    assert rows["sampling"]["tokens"] > 16 and rows["sampling"]["different"] == 0
    assert rows["DPO beside TRL"]["first loss"] == pytest.approx(math.log(2), abs=1e-6)
    text = (tmp_path / "docs" / "gpu.md").read_text()
    assert "their times mean nothing" in text
    assert all(f"## {plan.title}\n" in text for plan in gpu_drill.STAGES.values())
    assert "- Not measured: TRL: no --peer was given." in text
    assert "environment: passed" in capsys.readouterr().out


def drill(monkeypatch, tmp_path, stages, **settings):
    plans = {name: Plan(run, 60, name.title()) for name, run in stages.items()}
    monkeypatch.setattr(gpu_drill, "STAGES", plans)
    return gpu_drill.drill(list(plans), tmp_path / "out", tiny=True, **settings)


def test_a_stage_that_fails_records_why_and_the_next_one_runs(tmp_path, monkeypatch, log):
    def broken(stage):
        stage.row("table", number=1)
        with stage.part("first half"):
            raise ValueError("no such kernel")
        stage.check("error", 0.5, most=0.1)
        stage.check("not a number", math.nan, most=0.1)
        raise RuntimeError("CUDA error")

    passed = drill(monkeypatch, tmp_path, {"one": broken, "two": lambda stage: stage.row("table", number=2)})
    one, two = report.latest(log.read()).values()
    assert not passed and [r["kind"] for r in one] == [
        "begin",
        "row",
        "error",
        "check",
        "check",
        "error",
        "end",
    ]
    assert one[2]["message"] == "no such kernel" and one[2]["frames"][-1].endswith("broken")
    assert [r["ok"] for r in one[3:5]] == [False, False]
    assert one[5]["type"] == "RuntimeError" and len(one[-1]["failures"]) == 4 and not one[-1]["ok"]
    assert two[-1]["ok"]
    text = report.page(log.read(), {"one": "The first"})
    assert "## The first" in text and "**Failed**: first half: ValueError: no such kernel" in text
    assert "| one   | failed |" in text and "| **too large** |" in text


def test_a_stage_that_takes_too_long_is_stopped(tmp_path, monkeypatch, log):
    def endless(stage):
        with stage.part("a loop"):  # which does not swallow the end of the time
            while True:
                try:
                    time.sleep(0.01)
                except Exception:
                    continue

    monkeypatch.setattr(gpu_drill, "TINY_LIMIT_S", 1.2)
    start = time.monotonic()
    assert not drill(monkeypatch, tmp_path, {"one": endless, "two": lambda stage: None})
    assert time.monotonic() - start < 20
    one, two = report.latest(log.read()).values()
    assert one[1]["name"] == "time limit" and one[1]["frames"][-2].endswith("endless") and two[-1]["ok"]


def test_no_stage_begins_after_the_budget(tmp_path, monkeypatch, log):
    assert not drill(monkeypatch, tmp_path, {"one": lambda stage: None}, budget_s=0.5)
    (records,) = report.latest(log.read()).values()
    assert records[1]["reason"] == "no time is left" and records[-1]["skipped"]
    assert "| one   | skipped |" in report.page(log.read(), {})


def test_a_process_that_is_killed_leaves_its_results(tmp_path, monkeypatch, log):
    """It is killed before torch is imported, and another stage's results remain."""
    log.write(stage="numbers", kind="begin", limit=60, tiny=True)
    log.write(stage="numbers", kind="row", table="t", values={"a": 1})
    monkeypatch.setattr(gpu_drill, "GRACE_S", 0.0)
    settings = {"device": "cpu", "tiny": True, "peer": None}
    assert not gpu_drill._in_a_process("environment", log.file.parent, deadline=time.time() + 0.2, **settings)
    records = report.latest(log.read())
    assert records["environment"][-2]["message"].startswith("killed")
    assert not records["environment"][-1]["ok"]
    text = report.page(log.read(), {})
    assert "| did not end |" in text and "| a |" in text


def test_an_incomplete_line_is_left_out(log):
    log.write(stage="one", kind="begin")
    with log.file.open("a") as stream:
        stream.write('{"stage": "one", "ki')
    assert [r["kind"] for r in log.read()] == ["begin"]


def test_a_second_run_of_a_stage_replaces_the_first(log):
    for number in (1, 2):
        log.write(stage="one", kind="begin", limit=1, tiny=False)
        log.write(stage="one", kind="row", table="t", values={"number": number})
    assert [r["values"] for r in report.latest(log.read())["one"] if r["kind"] == "row"] == [{"number": 2}]


def test_unknown_stages_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu_drill.main(["--out", str(tmp_path), "--stages", "steps,speed"])
    assert "no stage is named speed; there are environment, numbers" in capsys.readouterr().err


def test_limits_fit_the_budget_and_the_plan_on_paper():
    limits = {name: plan.seconds for name, plan in gpu_drill.STAGES.items()}
    assert sum(limits.values()) + gpu_drill.GRACE_S <= gpu_drill.BUDGET_S == 540
    rows = [line.split() for line in gpu_drill.__doc__.splitlines()]
    planned = {r[0]: (float(r[1]), float(r[2].rstrip(":"))) for r in rows if len(r) > 2 and r[0] in limits}
    assert {name: limit for name, (limit, _) in planned.items()} == limits
    assert all(expected < limit for limit, expected in planned.values())
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    listed = [
        [c.strip(" `") for c in line.split("|")[1:3]] for line in text.splitlines() if line[:3] == "| `"
    ]
    assert [[name, f"{limit:.0f}"] for name, limit in limits.items()] == [r for r in listed if r[0] in limits]
    variants = sum(variant.seconds for variant in steps.plan()[:4])
    assert 10 + variants <= limits["steps"]


def test_busy_time_by_hand():
    """0 to 3 without the hole from 1 to 2, and 5 to 6; a kernel inside another one counts once."""
    assert steps.busy_ms([(5, 6), (0, 1), (2, 3), (2.2, 2.5), (2.5, 3)]) == 3


def test_host_reads_are_counted():
    x = torch.tensor([1.0, 0.0])
    with HostReads() as reads:
        x.sum().item()
        bool(x[0] > 0)
        x.nonzero()
        x + 1
    assert reads.counts == {"_local_scalar_dense": 2, "nonzero": 1}


def test_the_loop_and_the_one_call_by_hand(monkeypatch):
    """The one call gets where the sequences end: 3, 4 and 9 of lengths 3, 1 and 5."""
    calls = []
    monkeypatch.setattr(attention.varlen, "causal_attention", lambda *args: calls.append(args[3:]) or args[0])
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 1, 5]
    q, k, v = (torch.randn(9, heads, 8, dtype=torch.float64, generator=generator) for heads in (4, 2, 2))
    attention.one_call(q, k, v, lengths)
    ((ends_q, ends_k, bound),) = calls
    assert ends_q.tolist() == ends_k.tolist() == [0, 3, 4, 9] and bound == 5
    found = attention.loop(q, k, v, lengths)
    one = [x[4:].repeat_interleave(4 // x.shape[1], 1).transpose(0, 1) for x in (q, k, v)]
    torch.testing.assert_close(
        found[4:], F.scaled_dot_product_attention(*one, is_causal=True).transpose(0, 1)
    )
    torch.testing.assert_close(found[3], v[3].repeat_interleave(2, 0))  # a token alone sees itself


def test_where_trl_is_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither bin/python nor the package trl"):
        peer.python_of(tmp_path)
    (tmp_path / "trl").mkdir()
    python, variables = peer.python_of(tmp_path)
    assert python == Path(sys.executable) and variables["PYTHONPATH"].startswith(str(tmp_path))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    assert peer.python_of(tmp_path) == (tmp_path / "bin" / "python", {})


def test_trl_is_compared_with_ours(tmp_path, monkeypatch, log):
    """TRL's process is replaced by one that answers with our own numbers, once with another loss."""
    found = {}

    def measure(folder, **settings):
        found.update(
            losses=[0.69, 0.6],
            tokens_per_s=100.0,
            median_step_s=1.0,
            memory_mib={"peak": 1024.0},
            versions={"tokenpref": "1", "trl": "2"},
        )
        return dict(found)

    monkeypatch.setattr(peer.ours, "measure", measure)
    for name, losses, good in (("same", [0.69, 0.6], True), ("other", [0.69, 0.5], False)):
        other = {"losses": losses, "tokens_per_s": 50.0, "memory_mib": {"peak": 2048.0}}
        monkeypatch.setattr(peer, "_peer", lambda *args, other=other: {**found, **other})
        stage = Stage(name, "cpu", True, time.time() + 60, log, tmp_path, peer=tmp_path)
        peer.trl(stage)
        assert bool(stage.failures) is not good
    ratios = [r["values"] for r in log.read() if r.get("table") == "tokenpref divided by TRL"]
    assert ratios[0] == {"tokens/s": 2.0, "peak memory": 0.5}
    assert json.dumps(ratios)
