"""Evaluations that are killed go on with what they had, and with nothing of another one."""

import json

import pytest

from tokenpref.training import Evaluator
from tokenpref.training.config.command_line import load_config
from tokenpref.training.evaluation import measures as evaluation
from tokenpref.training.saving import portions


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """Evaluate the tiny model on pairs and samples; with ``until`` it dies before that portion of the whole job."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(portions, "SECONDS_BETWEEN_WRITES", 0.0)
    (tmp_path / "openings.txt").write_text("The film\nA day\nI\n")
    do, done = portions.Portions.do, []

    def run(*overrides, until=None, folder="mine"):
        def dying(self, part, number, make):
            if len(done) == until:
                raise KeyboardInterrupt
            done.append((part, number))
            return do(self, part, number, make)

        monkeypatch.setattr(portions.Portions, "do", dying)
        done.clear()
        words = ["sampling.prompts=openings.txt", f"sampling.reward={__name__}.length", "batch_size=4"]
        words += [
            "sampling.num_samples=4",
            "sampling.batch_size=5",
            "sampling.max_new_tokens=6",
            f"output_dir={folder}",
        ]
        evaluator = Evaluator(load_config(["--config", "tiny/evaluate", *words, *overrides]))
        try:
            evaluator.run()
        except KeyboardInterrupt:
            assert until is not None
        finally:
            evaluator.close()
        return list(done)

    return run


def length(prompts, completions):
    return [float(len(text)) for text in completions]


def results(folder):
    return (folder / "evaluation.json").read_text(), (folder / "samples.jsonl").read_text()


@pytest.mark.parametrize("until", [2, 5])
def test_a_killed_evaluation_goes_on_with_the_same_bits(evaluate, tmp_path, until):
    whole = evaluate(folder="whole")
    assert [part for part, _ in whole] == ["held-out pairs"] * 4 + ["samples"] * 3
    assert evaluate(until=until) == whole[:until]
    assert (tmp_path / "mine/evaluation.partial.json").is_file() and not (
        tmp_path / "mine/evaluation.json"
    ).exists()
    assert evaluate() == whole[until:]
    assert results(tmp_path / "mine") == results(tmp_path / "whole")
    assert not (tmp_path / "mine/evaluation.partial.json").exists()


@pytest.mark.parametrize(
    "change", ["seed=1", "sampling.max_new_tokens=5", "batch_size=8", "dataset.max_rows=12"]
)
def test_another_evaluation_begins_anew(evaluate, caplog, change):
    evaluate(until=3)
    with caplog.at_level("INFO", logger="tokenpref"):
        assert evaluate(change)[0] == ("held-out pairs", 0)
    assert "of other settings, weights or data than this job's; the job starts again" in caplog.text


@pytest.mark.parametrize("text", ["", "[1", "[]", '{"job": 3}', '{"job": "x", "portions": [1]}'])
def test_a_damaged_file_is_not_used(evaluate, tmp_path, caplog, text):
    evaluate(until=3)
    (tmp_path / "mine/evaluation.partial.json").write_text(text)
    with caplog.at_level("INFO", logger="tokenpref"):
        assert evaluate()[0] == ("held-out pairs", 0)
    assert "evaluation.partial.json is damaged" in caplog.text


def test_sums_survive_json():
    sums = evaluation.MetricSums.from_plain(json.loads(json.dumps({"loss": [0.1 + 0.2, 3]})))
    assert sums.plain() == {"loss": [0.1 + 0.2, 3]}


def test_results_of_another_evaluation_are_moved_aside(evaluate, tmp_path):
    evaluate("dataset.max_rows=4")
    former = results(tmp_path / "mine")
    evaluate("dataset.max_rows=4")  # the same once more: nothing to keep
    evaluate("dataset.max_rows=5", "seed=3")
    assert (tmp_path / "mine/evaluation.former1.json").read_text() == former[0]
    assert (tmp_path / "mine/samples.former1.jsonl").read_text() == former[1]
    assert json.loads(results(tmp_path / "mine")[0])["num_pairs"] == 5
    names = {"evaluation.json", "samples.jsonl", "evaluation.former1.json", "samples.former1.jsonl"}
    assert {p.name for p in (tmp_path / "mine").iterdir()} == names
