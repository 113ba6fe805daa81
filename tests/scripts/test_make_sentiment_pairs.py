import importlib.util
import json
import re
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
    code, text = run(script, tmp_path, "--reward=my_length_reward.score", "--samples=4")
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
