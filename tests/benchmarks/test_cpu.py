"""The CPU benchmark: its work, its arithmetic, and the whole of ``--quick`` in this process."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/ is no part of the package

from benchmarks.cpu import __main__ as command
from benchmarks.cpu import floor, heads, ours, report, work
from tokenpref.distributed import single_process_world
from tokenpref.models.reference import FrozenReference

pytest.importorskip("transformers")

FIXED, VARIED = command.QUICK.tasks


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("work")
    for task in (FIXED, VARIED):
        work.write(root / "work" / task.name, task)
    return root


@pytest.fixture(scope="module")
def folder(folders):
    return folders / "work" / VARIED.name


@pytest.fixture
def here(monkeypatch):
    """Everything that would run in a process of its own runs in this one."""

    def run(self, module, settings, malloc, *, folder=None, peer=False):
        assert not peer
        places = [folder] if folder else []
        threads = torch.get_num_threads()
        value = importlib.import_module(module).measure(*places, **json.loads(json.dumps(settings)))
        torch.set_num_threads(threads)
        return {"value": value, "others": 0.0}

    monkeypatch.setattr(command.Processes, "run", run)


def test_work_is_a_function_of_the_task(folder, tmp_path):
    work.write(tmp_path, VARIED)
    for name in ("pairs.jsonl", "model/model.safetensors"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_lengths_of_pairs(folders):
    for pair in FIXED.pairs(folders / "work" / FIXED.name):
        lengths = [len(pair[f"{part}_ids"]) for part in ("prompt", "chosen", "rejected")]
        assert lengths == [8, 40, 40] and pair["chosen_ids"][-1] == work.SPECIAL["</s>"]
    pairs = VARIED.pairs(folders / "work" / VARIED.name)
    assert len({len(p["chosen_ids"]) for p in pairs}) > 3
    assert all(len(p["prompt_ids"]) + len(p[f"{s}_ids"]) <= 48 for p in pairs for s in ("chosen", "rejected"))


def test_a_step_is_credited_with_the_prompt_in_both_answers(folders):
    # 4 pairs of 2 x 48 tokens, of which 2 x 40 are scored
    assert FIXED.tokens(folders / "work" / FIXED.name) == ([384] * 3, [320] * 3)


def test_the_baseline_has_20_million_parameters_and_0_41_teraflop():
    shape = work.SHAPES["llama-20m"]
    assert shape.parameters == 20_580_608
    # all positions scored, as the peer does: 4,096 tokens through layers and head, twice 3 + 1 operations a weight
    assert floor.step_teraflop(shape, "ref", 4096, 4096) == pytest.approx(0.406, abs=1e-3)
    assert work.SHAPES["smollm2-135m"].parameters == 134_515_008


def test_floor_by_hand():
    shape = work.Shape(vocab=10, width=4, layers=1, heads=2, kv_heads=1, mlp=8)
    assert (shape.body_weights, shape.head_weights) == (4 * 4 * 3 + 3 * 4 * 8, 40)
    rates = {part: dict.fromkeys(floor.KINDS, 2.0) for part in ("body", "head")}
    # forward and two products of the backward; a reference adds a forward; cached hidden states add the head's alone
    assert floor.step_floor(shape, "precompute", 3, 2, rates) == 3 * (3 * 144 + 2 * 40)
    assert floor.step_floor(shape, "tdpo2-ref", 3, 2, rates) == 4 * (3 * 144 + 2 * 40)
    assert floor.step_floor(shape, "tdpo2-cached", 3, 2, rates) == 3 * 3 * 144 + 4 * 2 * 40
    # 2 steps of 2 pairs after the first: prompts of 8 tokens once, answers of 40 twice.
    run = {"warmup": 1, "tokens": [0, 192, 192], "answer_tokens": [0, 160, 160]}
    assert report._per_step(run) == (2 * (8 + 2 * 40), 160)
    assert floor.head_floor(2, 4, 10, rates["head"], reference=True) == 4 * 2 * 40


@pytest.mark.parametrize(("mode", "kind"), [("precompute", "logps"), ("tdpo2-cached", "hidden")])
def test_what_is_computed_beforehand_is_the_reference_models(folder, tmp_path, mode, kind):
    policy = ours._model(folder, trainable=True)
    reference = FrozenReference(ours._model(folder, trainable=False))
    make_loss, make_reference = ours.MODES[mode]
    kept = make_reference(policy, folder, tmp_path, single_process_world())
    needs = make_loss().needs
    for pairs in ours._steps(folder):
        for batch in ours._micro_batches(pairs):
            with reference.outputs(batch, needs) as wanted, kept.outputs(batch, needs) as found:
                torch.testing.assert_close(getattr(found, kind), getattr(wanted, kind), rtol=0, atol=1e-6)
    assert policy.model.training


def test_both_references_train_alike(folder):
    for modes in (("ref", "precompute"), ("tdpo2-ref", "tdpo2-cached")):
        losses = [ours.measure(folder, mode, threads=1)["losses"] for mode in modes]
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)
        assert losses[0][0] == pytest.approx(0.693147, abs=1e-6) and losses[0][1] != losses[0][0]


def test_the_reference_with_adapters_is_timed_by_itself(folder):
    ours.write_first_adapter(folder)
    policy, world = ours._model(folder, trainable=True, lora=True), single_process_world()
    seconds = ours._forward_seconds(policy, folder, world)
    assert list(seconds) == list(report.FORWARDS) and min(seconds.values()) > 0
    assert all(p.grad is None for p in policy.model.parameters()) and policy.model.training
    # What is compared computes the same: the base of new or trained adapters is the model without any.
    for name, parameter in policy.model.named_parameters():
        if name.endswith("lora_b.weight"):
            torch.nn.init.normal_(parameter)
    plain = ours._model(folder, trainable=False)
    (batch,) = ours._micro_batches(ours._steps(folder)[0])
    off, on, own = (m.logps(batch.tokens, batch.labels, sides=2) for m in (policy.base(), policy, plain))
    torch.testing.assert_close(off, own)
    assert (on - own).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ours", "eager"),
        ("ours-kl", "eager-kl"),
        ("ours-128-kl", "eager-kl"),
        ("ours-compiled", "eager"),
        ("ours-compiled-kl", "eager-kl"),
    ],
)
def test_heads_give_the_same(one, other):
    values = [
        heads.measure(n, rows=32, width=8, vocab=50, threads=1, repeats=1)["value"] for n in (one, other)
    ]
    assert values[0] == pytest.approx(values[1], rel=1e-4)


def test_a_peers_head_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    found = heads.measure("liger", rows=32, width=8, vocab=50, threads=1, repeats=1)
    assert "liger_kernel" in found["failed"]


def test_quick_prints_its_tables(folders, here, capsys):
    assert command.main(["--quick", "--output", str(folders)]) == 0
    text = capsys.readouterr().out
    for title in (
        "How to read this page",
        "DPO steps",
        "Cost of the reference with adapters",
        "Cost of the KL and of transformers' layers",
        "The head alone",
        "Speed of matrix products",
    ):
        assert f"## {title}" in text
    assert "## Comparison with TRL" not in text and "not a complete run" in text
    results = json.loads((folders / "results.json").read_text(encoding="utf-8"))
    assert {r["mode"] for r in results["runs"]} == set(ours.MODES)
    assert all(r["memory_mib"]["peak"] >= r["memory_mib"]["before"] for r in results["runs"])
    with pytest.raises(SystemExit, match="tiny sizes"):
        command.main(["--report-only", "--write-docs", "--output", str(folders)])


def test_the_page_compares_with_the_peer(folders, here, monkeypatch):
    monkeypatch.setattr(command, "OURS_ALONE", ())
    monkeypatch.setattr(
        ours, "_forward_seconds", lambda *_: {"adapters_off": 1.2, "plain": 1.0, "training": 2.0}
    )
    plan = replace(command.QUICK, tasks=(FIXED,), parts=("steps",))
    results = command.measure(plan, folders, command.Processes(folders, None))
    # A peer that takes twice our time and three times our memory, and whose third loss is another.
    peers = json.loads(json.dumps([r for r in results["runs"] if r["mode"] in work.PAIRED_MODES]))
    for run in peers:
        run["side"] = "peer"
        run.pop("forward_s", None)
        run["tokens_per_s"] /= 2
        above = run["memory_mib"]["peak"] - run["memory_mib"]["loaded"]
        run["memory_mib"]["peak"] += 2 * above
        run["losses"][2] += 5e-4
    results["runs"] += peers
    assert [d.worst for d in report.differences(results)] == pytest.approx([5e-4] * 3, rel=1e-2)
    text = report.page(results)
    assert text.count("| 2.00 x") == 6 and text.count("3.0 x") >= 2
    assert "2.00 times as many tokens" in text and "TRL's peak memory is 3.00 times ours" in text
    assert "| 5.0e-04  | at most 0.0001 | **no** " in text
    # The reference of a training with adapters is compared with two other forward passes.
    (run,) = (run for run in results["runs"] if (run["mode"], run["side"]) == ("lora", "ours"))
    assert "adapters off / plain 1.20, adapters off / training 0.60" in report.line("runs", run)
    assert "relative to a model without adapters: fixed lengths, malloc keep" in text
    assert "| 1.20     | at most 1.05   | **no** " in text and "| 0.60 " in text
    del run["forward_s"]  # as in results of earlier versions
    assert "Cost of the reference with adapters" not in report.page(results)


def test_rounds_are_added_to_what_is_there(here, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "OURS_ALONE", ())
    plan = replace(command.QUICK, tasks=(FIXED,), parts=("steps", "heads"))
    monkeypatch.setattr(command, "QUICK", plan)
    assert command.main(["--quick", "--output", str(tmp_path)]) == 0
    first = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert report.rounds(first) == (1, 1)
    assert command.main(["--quick", "--add", "--output", str(tmp_path)]) == 0
    both = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    said = [" ".join(report.page(results).split()) for results in (first, both)]
    assert "commands" not in said[0] and "in 2 commands" in said[1]
    assert report.rounds(both) == (2, 2) and both["runs"][: len(first["runs"])] == first["runs"]
    assert len(both["heads"]) == len(first["heads"]) and both["seconds"] > first["seconds"]
    # A head's processes are one record: its best time, and the middle one of its peaks.
    for one, two in zip(first["heads"], both["heads"], strict=True):
        assert two["times_s"][: len(one["times_s"])] == one["times_s"] and len(two["times_s"]) == 4
        assert two["best_s"] == min(two["times_s"])
        assert two["peaks_mib"][0] == one["above_mib"] and two["above_mib"] == sum(two["peaks_mib"]) / 2
    assert "best of 2 in one process" in said[0] and "best of 2 in each of 2 processes" in said[1]
    with pytest.raises(SystemExit, match="other settings of \\['threads', 'fused_adamw'\\]"):
        command.main(["--quick", "--add", "--threads", "2", "--no-fused-adamw", "--output", str(tmp_path)])
    both["machine"]["cores"] += 1
    (tmp_path / "results.json").write_text(json.dumps(both), encoding="utf-8")
    with pytest.raises(SystemExit, match="another machine's"):
        command.main(["--quick", "--add", "--output", str(tmp_path)])


def test_heads_whose_own_products_take_too_long_are_named_not_run(folders, here, monkeypatch, tmp_path):
    monkeypatch.setattr(command, "LONGEST_HEAD_S", 0.0)
    plan = replace(command.QUICK, parts=("heads",))
    results = command.measure(plan, tmp_path, command.Processes(tmp_path, None))
    ran = {h["name"]: "failed" not in h for h in results["heads"]}
    assert ran == {name: not name.startswith("eager") for name in ran}
    assert {"eager", "ours", "ours-128", "eager-kl", "ours-kl", "ours-128-kl"} == set(ran)
    assert "not run: its products in float32 alone take" in report.page(results)


def test_the_page_wants_real_sizes():
    with pytest.raises(SystemExit):
        command.main(["--quick", "--write-docs"])


def test_of_the_growth_the_middle_start_counts_and_the_others_are_shown(here, monkeypatch, tmp_path):
    peaks = iter([5.0, 9.0, 4.0, 6.0, 5.4, 5.5])

    def measure(**settings):
        return {"above_mib": next(peaks), "inputs_mib": 0.0, "best_s": 1.0, "times_s": [1.0], "versions": {}}

    monkeypatch.setattr(heads, "measure", measure)
    plan = replace(command.QUICK, parts=("growth",), growth_starts=3)
    results = command.measure(plan, tmp_path, command.Processes(tmp_path, None))
    assert [g["starts_mib"] for g in results["growth"]] == [[4.0, 5.0, 9.0], [5.4, 5.5, 6.0]]
    page = report.page(results)
    assert "| keep   | 5 (4, 9)     | 6 (5, 6)     |" in page
    assert "malloc keep | 0.10" in page  # 5.5 over 5
