import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORDS = {"positive": ["e", "o", "t", "s", "a"], "negative": ["i", "n", "r", "d", "h"]}
TINY = [
    "--model=tokenpref.models.tiny_llama",
    "--checkpoint=package://data/tiny/model",
    "--openings=package://data/tiny/openings.txt",
    "--reward=tokenpref.rewards.KeywordReward",
    f"--reward-args={json.dumps(WORDS)}",
    "--samples=12",
    "--max-new-tokens=6",
    "--min-gap=0.1",
]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(
        "make_sentiment_pairs", ROOT / "scripts" / "make_sentiment_pairs.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def run(script, folder, *more):
    output = folder / "pairs.jsonl"
    code = script.main([*TINY, f"--output={output}", *more])
    text = output.read_text(encoding="utf-8") if code == 0 else None
    return code, text


class TestPairs:
    @staticmethod
    def pairs(script, rewards, **settings):
        samples = [script.Sample(f" text{i}", r, i == 1) for i, r in enumerate(rewards)]
        settings = {
            "group": 3,
            "min_gap": 0.3,
            "reward": lambda prompts, texts: [0.0] * len(texts),
            **settings,
        }
        return script.pairs_of("Opening", samples, **settings)

    def test_best_against_worst_of_each_group(self, script):
        rows = self.pairs(script, [0.1, 0.9, -0.2, 0.5, 0.5, 0.4, 0.0, 0.3, 0.3, 1.0])
        # groups (0.1, 0.9, -0.2), (0.5, 0.5, 0.4): gap 0.1, (0.0, 0.3, 0.3); the last sample has no whole group
        assert rows == [
            {
                "prompt": "Opening",
                "chosen": " text1",
                "rejected": " text2",
                "chosen_reward": 0.9,
                "rejected_reward": -0.2,
                "chosen_complete": True,
                "rejected_complete": False,
            },
            {
                "prompt": "Opening",
                "chosen": " text7",
                "rejected": " text6",
                "chosen_reward": 0.3,
                "rejected_reward": 0.0,
                "chosen_complete": False,
                "rejected_complete": False,
            },
        ]

    def test_unwanted_words_and_empty_answers_are_left_out(self, script):
        assert self.pairs(script, [0.0, 0.5, 1.0], drop=frozenset({"text2"})) == []
        assert len(self.pairs(script, [0.0, 0.5, 1.0], drop=frozenset({"text1"}))) == 1
        samples = [script.Sample(text, r, True) for text, r in ((" ", 0.0), (" b", 1.0))]
        assert script.pairs_of("x", samples, group=2, min_gap=0.1, reward=lambda p, t: []) == []


def test_tiny_pairs_are_scored_marked_and_reproducible(script, tmp_path, capsys):
    code, text = run(script, tmp_path)
    assert code == 0 and "of all 96 samples" in capsys.readouterr().out
    rows = [json.loads(line) for line in text.splitlines()]
    assert 4 <= len(rows) <= 24  # 8 openings, 3 groups each
    reward = script.find_component("tokenpref.rewards.KeywordReward")(**WORDS)
    for row in rows:
        assert row["chosen_reward"] - row["rejected_reward"] >= 0.1
        for side in ("chosen", "rejected"):
            assert [row[f"{side}_reward"]] == reward([row["prompt"]], [row[side]])
            assert [tuple(span) for span in row[f"{side}_valence"]] == reward.valence(row[side])
    assert run(script, tmp_path, "--batch-size=7") == (0, text)
    assert run(script, tmp_path, "--seed=1")[1] != text


def test_a_plain_function_is_a_reward_without_valence(script, tmp_path, monkeypatch):
    (tmp_path / "my_length_reward.py").write_text(
        "def score(prompts, texts):\n    return [len(t) / 10 for t in texts]\n"
    )
    monkeypatch.chdir(tmp_path)
    code, text = run(script, tmp_path, "--reward=my_length_reward.score", "--reward-args={}", "--samples=4")
    rows = [json.loads(line) for line in text.splitlines()]
    assert code == 0 and rows
    names = {f"{side}{of}" for side in ("chosen", "rejected") for of in ("", "_reward", "_complete")}
    assert set(rows[0]) == {"prompt", *names}
    assert all(row["chosen_reward"] == len(row["chosen"]) / 10 for row in rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--group=1", "a pair needs a group of at least 2"),
        ("--samples=3", "as many samples"),
        ("--min-gap=0", "a gap above 0"),
        ("--openings=nowhere.txt", "--openings: no file"),
        ("--checkpoint=nowhere", "--checkpoint: no .*safetensors in .*name a Hugging Face checkpoint folder"),
        ("--model=tokenpref.models.smollm2_135m", "the checkpoint is of another architecture"),
        ("--model=tokenpref.models.tiny_lama", "--model: .*did you mean 'tiny_llama'"),
        ("--model-type=LAMA", "--checkpoint .*it knows no 'LAMA'"),
        ("--reward=tokenpref.rewards.KeywordRewards", "--reward: .*did you mean 'KeywordReward'"),
        ('--reward-args={"positive": ["a"]}', "--reward-args.negative: KeywordReward needs this argument"),
        (
            '--reward-args={"positive": [], "negative": []}',
            r"--reward .*positive and negative are both empty",
        ),
        ("--max-new-tokens=300", "new tokens need .* positions, the model has 256"),
        ("--batch-size=0", "batch_size must be at least 1"),
        ("--temperature=-1", "temperature must be at least 0"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(script, tmp_path, capsys, change, message):
    assert run(script, tmp_path, change) == (2, None)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error)
    assert not any(tmp_path.iterdir())


def test_a_missing_built_in_model_names_its_command(script, tmp_path, capsys):
    change = ("--model=tokenpref.models.smollm2_135m", "--checkpoint=nowhere")
    assert run(script, tmp_path, *change) == (2, None)
    assert "run `tokenpref prepare smollm2`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "body", "found"),
    [("few", "[1.0]", r"1 \(0 of them"), ("nan", "[float('nan')] * 96", r"96 \(96 of them")],
)
def test_a_reward_that_does_not_answer_for_each_is_refused(
    script, tmp_path, monkeypatch, capsys, name, body, found
):
    (tmp_path / f"bad_{name}_reward.py").write_text(f"def score(prompts, texts):\n    return {body}\n")
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    assert run(script, out, f"--reward=bad_{name}_reward.score", "--reward-args={}") == (2, None)
    assert re.search(rf"error: --reward: expected 96 finite numbers, got {found}", capsys.readouterr().err)
    assert not out.exists()


def test_a_failed_write_leaves_the_old_file(script, tmp_path, monkeypatch):
    path = tmp_path / "pairs.jsonl"
    script.write_whole(path, "old\n")
    monkeypatch.setattr(script.Path, "replace", lambda self, target: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        script.write_whole(path, "new\n")
    assert path.read_text() == "old\n" and [f.name for f in tmp_path.iterdir()] == ["pairs.jsonl"]


def test_as_a_command_with_a_reward_of_the_current_directory(tmp_path):
    (tmp_path / "my_vowel_reward.py").write_text(
        "def score(prompts, texts, *, letters):\n    return [sum(map(t.count, letters)) / 10 for t in texts]\n"
    )
    command = [sys.executable, str(ROOT / "scripts" / "make_sentiment_pairs.py"), *TINY]
    command += [
        "--reward=my_vowel_reward.score",
        '--reward-args={"letters": "aeiou"}',
        "--output=deep/pairs.jsonl",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "deep" / "pairs.jsonl").read_text("utf-8").splitlines()]
    assert f"deep/pairs.jsonl: {len(rows)} pairs of 24 groups" in done.stdout and len(rows) >= 4
    for row in rows:
        assert row["chosen_reward"] == sum(map(row["chosen"].count, "aeiou")) / 10
        assert row["chosen_reward"] - row["rejected_reward"] >= 0.1 - 1e-12
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["pairs.jsonl"]
