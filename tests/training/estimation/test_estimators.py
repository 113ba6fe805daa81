"""One contract for scores: any source serves a training and a weight store, with the same scores."""

import json
import sys

import numpy as np
import pytest

from tokenpref.data import WeightStore, collate_pairs
from tokenpref.errors import ConfigError, DryRun
from tokenpref.training import ContrastiveReference, WeightedTrainer, WeightEstimation
from tokenpref.training.config.command_line import load_config

ROWS = ["dataset.max_rows=8"]
PROMPTS = ["positive_prompt=good", "negative_prompt=bad"]
MINE = '''
import torch


class Places:
    """The t-th token of an answer has the score t."""

    kind = "weight"

    def score(self, batch, models):
        assert models.policy.model is not None
        lengths = (batch.labels[:, 1:] != -100).sum(-1).tolist()
        assert len(batch.rows) * len(batch.sides) == len(lengths)
        return [torch.arange(1.0, n + 1) for n in lengths]


class Former:
    """An estimator of the form that takes answers by their place in the data set."""

    kind = "weight"

    def describe(self, config):
        return {"name": "former"}

    def setup(self, config, dataset, tokenizer, world): ...

    def score(self, answers): ...
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pair of prompts, and a file with sources of a user's own."""
    place = tmp_path_factory.mktemp("stores")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        words = ["--config", "tiny/contrastive_reference", "method=prompt", *PROMPTS, "output_dir=pair"]
        ContrastiveReference(load_config(words)).run()
        (place / "my_scores.py").write_text(MINE)
    return place


@pytest.fixture
def estimate(folder, monkeypatch):
    """Write a store; returns it, opened."""
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "my_scores", raising=False)

    def run(name, *words, config="estimate_weights"):
        cfg = load_config(["--config", f"tiny/{config}", *ROWS, *words, f"output_dir={name}"])
        return WeightStore.open(WeightEstimation(cfg).run())

    return run


def by(path, *words):
    """Words that name another estimator in the place of the pair."""
    return [f"estimator={path}", "~estimator.pair", *(f"estimator.{word}" for word in words)]


def scores(store):
    return {(row.row, side): getattr(row, side) for row in store for side in ("chosen", "rejected")}


def same(one, other):
    one, other = scores(one), scores(other)
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def test_prompts_give_a_store_the_scores_of_their_pair(estimate):
    pair = estimate("pair_store", "estimator.pair=pair")
    prompts = estimate("prompts", *by("tokenpref.training.OnlinePrompts", *PROMPTS))
    assert prompts.kind == pair.kind == "log_ratio" and same(pair, prompts)
    record = prompts.metadata["estimator"]
    assert record["positive_prompt"] == "good" and record["model"] and len(record["weights"]) == 64


def test_attribution_is_one_thing_under_both_names(estimate):
    config = "estimate_weights_attribution"
    one = estimate("estimator", config=config)
    other = estimate("source", "estimator._component_=tokenpref.training.Attribution", config=config)
    assert same(one, other) and one.metadata["estimator"] == other.metadata["estimator"]


def test_columns_of_the_data_give_a_store_without_a_model(estimate, folder):
    row = {"prompt": "The film", "chosen": " was good", "rejected": " was bad", "up": 2.0, "down": 0.5}
    rows = [{**row, "prompt": f"The film {name}"} for name in ("here", "there")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = by("tokenpref.data.ColumnScores", "kind=weight", "per=pair", "chosen=up", "rejected=down")
    store = estimate("columns", *columns, "dataset.source=rows.jsonl", "~model", "~checkpointer")
    assert store.kind == "weight" and "model" not in store.metadata["estimator"]
    assert all(
        (values == (2.0 if side == "chosen" else 0.5)).all() for (_, side), values in scores(store).items()
    )


def test_a_source_of_ones_own_serves_a_store_and_a_training(estimate):
    store = estimate("mine", *by("my_scores.Places"))
    assert all((values == np.arange(1, len(values) + 1)).all() for values in scores(store).values())
    assert store.metadata["estimator"]["_component_"] == "my_scores.Places"
    words = ["weight_transform=null", "max_steps_per_epoch=1", "run_val_every_n_steps=null", *ROWS]
    found = {}
    for name, source in {
        "from_store": ["token_weights.path=mine/weights"],
        "as_it_goes": ["token_weights=my_scores.Places", "~token_weights.path"],
    }.items():
        cfg = load_config(["--config", "tiny/tis_dpo", *words, *source, f"output_dir={name}"])
        found[name] = first_weights(cfg)
    assert found["from_store"] == found["as_it_goes"] and found["from_store"] > 1.5


def test_a_contrastive_pair_serves_a_training_without_a_store(estimate):
    estimate("stored", "estimator.pair=pair")
    words = ["max_steps_per_epoch=1", "run_val_every_n_steps=null", *ROWS]
    found = {}
    for name, source in {
        "pair_from_store": ["token_weights.path=stored/weights"],
        "pair_itself": [
            "token_weights=tokenpref.training.ContrastiveEstimator",
            "~token_weights.path",
            "token_weights.pair=pair",
        ],
    }.items():
        cfg = load_config(["--config", "tiny/tis_dpo", *words, *source, f"output_dir={name}"])
        found[name] = first_weights(cfg)
    assert found["pair_itself"] == pytest.approx(found["pair_from_store"], abs=1e-5)


def first_weights(cfg):
    """The mean weight of the first step's tokens."""
    trainer = WeightedTrainer(cfg)
    try:
        trainer.setup()
        weights = trainer.run.weigh(collate_pairs([trainer.run.dataset[0]], pad_id=0)).weights
        return weights.sum().item() / (weights != 0).sum().item()
    finally:
        trainer.close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            by("collections.Counter"),
            "estimator .collections.Counter.: its kind is None; a source of scores says",
        ),
        (
            by("my_scores.Former"),
            "my_scores.Former.: has the form that estimators had before.*Give it score.batch, models",
        ),
        ([*by("my_scores.Places"), "~model"], "model: missing; estimator .my_scores.Places. runs the model"),
    ],
)
def test_what_cannot_be_run_is_refused(estimate, folder, words, message):
    with pytest.raises(ConfigError, match=message):
        estimate("never", *words)
    assert not (folder / "never").exists()


def test_a_dry_run_opens_the_source(estimate, folder):
    with pytest.raises(DryRun):
        estimate("dry", *by("my_scores.Places"), "dry_run=true")
    assert not (folder / "dry").exists()
