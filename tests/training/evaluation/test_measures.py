import json
import math

import pytest
import torch
from omegaconf import OmegaConf
from support import evaluating

from tokenpref._paths import data_root
from tokenpref.distributed import single_process_world
from tokenpref.distributed.testing import run_distributed
from tokenpref.errors import ConfigError, DataError
from tokenpref.losses import DPOLoss, TokenDPOLoss
from tokenpref.models.reference import FrozenReference
from tokenpref.models.scoring import logits_of
from tokenpref.rewards import KeywordReward
from tokenpref.training.config.fields import read_config
from tokenpref.training.config.keys import EvaluateConfig, SamplingConfig
from tokenpref.training.evaluation.measures import evaluate_pairs, paired_gain, sample_rewards
from tokenpref.weights import TransformedWeights

WORLD = single_process_world()


@pytest.fixture(scope="module")
def data():
    return evaluating.pairs()


@pytest.fixture(scope="module")
def policy():
    return evaluating.scorer(0)


@pytest.fixture(scope="module")
def reference():
    return FrozenReference(evaluating.scorer(1))


def evaluate(policy, reference, loss, data, **changes):
    settings = {"batch_size": 2, "pad_id": 1, "needs": evaluating.NEEDS, **changes}
    return evaluate_pairs(policy, reference, loss, data, WORLD, **settings)


@torch.no_grad()
def answer(policy, reference, ids, start):
    """(log pi_theta, log pi_ref, KL(ref || theta), KL(theta || ref)) summed over an answer's tokens, one row alone."""
    tokens = torch.tensor([ids])
    p, q = (logits_of(s.model, tokens)[0].log_softmax(-1) for s in (policy, reference.scorer))
    sums = [0.0] * 4
    for place in range(start, len(ids)):
        before = place - 1
        sums[0] += p[before, ids[place]].item()
        sums[1] += q[before, ids[place]].item()
        sums[2] += (q[before].exp() * (q[before] - p[before])).sum().item()
        sums[3] += (p[before].exp() * (p[before] - q[before])).sum().item()
    return sums


def by_hand(policy, reference, data, alpha):
    """Means over single pairs; ``alpha`` None: DPO, else TDPO2 (beta 0.1)."""
    columns = {}
    for pair in data:
        c = answer(policy, reference, pair.chosen_ids, pair.chosen_start)
        r = answer(policy, reference, pair.rejected_ids, pair.rejected_start)
        logit = (c[0] - c[1]) - (r[0] - r[1])
        rewards = [0.1 * (side[0] - side[1]) for side in (c, r)]
        if alpha is not None:
            logit -= alpha * (r[2] - c[2])
            rewards = [0.1 * (side[0] - side[1] + side[2]) for side in (c, r)]
        values = {
            "loss": math.log1p(math.exp(-0.1 * logit)),
            "rewards/chosen": rewards[0],
            "rewards/rejected": rewards[1],
            "rewards/margins": rewards[0] - rewards[1],
            "rewards/accuracies": float(rewards[0] > rewards[1]),
        }
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in columns.items()}


@pytest.mark.parametrize(("loss", "alpha"), [(DPOLoss(), None), (TokenDPOLoss(), 0.5)], ids=["dpo", "tdpo"])
def test_metrics_are_means_over_single_pairs(policy, reference, data, loss, alpha):
    expected = by_hand(policy, reference, data, alpha)
    assert len(data) == 5 and 0 < expected["rewards/accuracies"] < 1
    needs = frozenset({"ref"}) if alpha is None else loss.needs
    for batch_size in (1, 2, 5, 64):
        found = evaluate(policy, reference, loss, data, batch_size=batch_size, needs=needs)
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, abs=1e-10), (name, batch_size)


def test_all_metrics_are_independent_of_the_batch_size(policy, reference, data):
    expected = evaluate(policy, reference, TokenDPOLoss(), data, batch_size=1)
    for batch_size in (2, 3, 64):
        found = evaluate(policy, reference, TokenDPOLoss(), data, batch_size=batch_size)
        assert found == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_evaluation_leaves_no_gradient_and_the_mode_as_it_was(policy, reference, data):
    try:
        for training in (True, False):
            policy.model.train(training)
            evaluate(policy, reference, TokenDPOLoss(), data)
            assert policy.model.training is training
    finally:
        policy.model.eval()
    assert all(p.grad is None for p in policy.model.parameters())


def test_token_weights_come_from_weigh(policy, reference, data):
    """A loss that reads weights sees those of its own batch, in the columns of the predicted tokens."""
    seen = []

    def weigh(batch):
        columns = batch.tokens[:, 1:]
        numbered = torch.arange(columns.numel(), dtype=torch.float64).view_as(columns)
        return TransformedWeights(numbered, torch.zeros_like(columns, dtype=torch.bool))

    class Spy(torch.nn.Module):
        def forward(self, pair):
            seen.append((pair.chosen.weights, pair.chosen.mask))
            return DPOLoss()(pair)

    evaluate(policy, reference, Spy(), data, batch_size=5, weigh=weigh, needs=frozenset({"ref"}))
    ((weights, mask),) = seen
    columns = torch.arange(mask.numel(), dtype=torch.float64).view_as(mask)
    assert torch.equal(weights, torch.where(mask, columns, 0))


def test_two_ranks_equal_one_process():
    one = evaluating.on_ranks(WORLD)
    for rank in run_distributed(evaluating.on_ranks):  # five pairs by twos: the last step has a filler
        assert rank["records"] == one["records"]
        assert rank["metrics"] == pytest.approx(one["metrics"], rel=1e-10, abs=1e-12)


class TestSamples:
    def test_every_opening_is_sampled_and_scored(self, policy):
        records = sample_rewards(
            policy, evaluating.tokenizer(), evaluating.sampling(num_samples=3), WORLD, seed=0
        )
        openings = (data_root() / "data" / "tiny" / "openings.txt").read_text().splitlines()
        assert [(r["row"], r["sample"]) for r in records] == [(i, j) for i in range(8) for j in range(3)]
        reward = KeywordReward(positive=list("eotsa"), negative=list("inrdh"))
        for record in records:
            assert record["prompt"] == openings[record["row"]]
            assert [record["reward"]] == reward([record["prompt"]], [record["completion"]])
            assert 1 <= record["tokens"] <= 5 and "<|end|>" not in record["completion"]
        assert len({r["completion"] for r in records}) > 12

    def test_noise_belongs_to_seed_opening_and_number(self, policy):
        def texts(seed=0, **changes):
            config = evaluating.sampling(**changes)
            records = sample_rewards(policy, evaluating.tokenizer(), config, WORLD, seed=seed)
            return {(r["row"], r["sample"]): r["completion"] for r in records}

        first = texts()
        assert texts(batch_size=64) == first != texts(seed=1)
        more = texts(num_samples=4)
        assert {key: more[key] for key in first} == first

    @pytest.mark.parametrize(
        ("name", "body", "found"),
        [
            ("too_few", "[0.0] * (len(texts) - 1)", r"15 \(0 of them not finite\)"),
            ("no_number", "[float('nan')] * len(texts)", r"16 \(16 of them not finite\)"),
            ("infinite", "[1.0] * 15 + [float('inf')]", r"16 \(1 of them not finite\)"),
            ("single", "0.5", "0.5"),
            ("words", "['good'] * len(texts)", r"\['good', 'good'"),
        ],
    )
    def test_a_reward_that_does_not_answer_for_each_is_refused(
        self, policy, tmp_path, monkeypatch, name, body, found
    ):
        path = f"reward_{name}.score"
        (tmp_path / f"reward_{name}.py").write_text(f"def score(prompts, texts):\n    return {body}\n")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(
            ConfigError, match=rf"sampling.reward \({path}\): expected 16 finite numbers, got {found}"
        ):
            sample_rewards(policy, evaluating.tokenizer(), evaluating.sampling(path), WORLD, seed=0)

    def test_a_function_is_a_reward_with_settings_of_its_own(self, policy, tmp_path, monkeypatch):
        (tmp_path / "my_scaled_reward.py").write_text(
            "def score(prompts, texts, *, scale):\n    return [scale * len(t) for t in texts]\n"
        )
        monkeypatch.chdir(tmp_path)

        def config(**settings):
            cfg = OmegaConf.load(data_root() / "configs" / "tiny" / "evaluate.yaml")
            cfg.sampling.reward = {"_component_": "my_scaled_reward.score", **settings}
            return read_config(EvaluateConfig, cfg).sampling

        for record in sample_rewards(policy, evaluating.tokenizer(), config(scale=0.5), WORLD, seed=0):
            assert record["reward"] == 0.5 * len(record["completion"])
        with pytest.raises(ConfigError, match="reward.scale: score needs this argument"):
            config()
        with pytest.raises(ConfigError, match="reward.scales: score takes no such argument"):
            config(scales=1, scale=0.5)

    def test_openings_are_needed(self, policy, tmp_path):
        (tmp_path / "none.txt").write_text("\n  \n")
        config = SamplingConfig(prompts=str(tmp_path / "none.txt"), reward=evaluating.sampling().reward)
        with pytest.raises(DataError, match=r"none.txt: no openings; write one a line"):
            sample_rewards(policy, evaluating.tokenizer(), config, WORLD, seed=0)


class TestPairedGain:
    @staticmethod
    def records(rewards, prompts="aabb"):
        return [
            {"prompt": prompt, "sample": i % 2, "reward": reward}
            for i, (prompt, reward) in enumerate(zip(prompts, rewards, strict=True))
        ]

    @staticmethod
    def write(path, records):
        path.write_text("".join(json.dumps(r) + "\n" for r in records))
        return path

    def test_by_hand(self, tmp_path):
        baseline = self.write(tmp_path / "samples.jsonl", self.records([0.0, 1.0, 2.0, 3.0]))
        # Differences 1, 2, 0, 5: mean 2, squared deviations 1 + 0 + 4 + 9 = 14, variance 14/3, of the mean 14/12.
        half = 1.96 * math.sqrt(14 / 12)
        found = paired_gain(self.records([1.0, 3.0, 2.0, 8.0]), baseline)
        assert found == pytest.approx((2.0, 2.0 - half, 2.0 + half), abs=1e-12)

    def test_against_itself_nothing_is_gained(self, tmp_path):
        own = self.records([0.5, -1.0, 0.25, 2.0])
        assert paired_gain(own, self.write(tmp_path / "samples.jsonl", own)) == (0.0, 0.0, 0.0)

    @pytest.mark.parametrize(
        "other", [[(p, 0.0) for p in "aabc"], [(p, 0.0) for p in "aab"], [(p, 0.0) for p in "bbaa"]]
    )
    def test_other_openings_are_refused(self, tmp_path, other):
        prompts, rewards = "".join(p for p, _ in other), [r for _, r in other]
        baseline = self.write(tmp_path / "samples.jsonl", self.records(rewards, prompts))
        with pytest.raises(
            DataError,
            match=rf"holds {len(other)} samples of other openings than the 4 .*same sampling.prompts",
        ):
            paired_gain(self.records([0.0] * 4), baseline)
