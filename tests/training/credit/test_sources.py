"""What recipes attach to the trainer, and recipes in the form that derived from it."""

import pytest
import torch
from safetensors.torch import load_file

from tokenpref.errors import ConfigError
from tokenpref.training import (
    PreferenceTrainer,
    Source,
    TripletTrainer,
    WeightedTrainer,
    anchors,
    token_weights,
)
from tokenpref.training.config.command_line import load_config
from tokenpref.training.config.keys import TrainConfig
from tokenpref.training.credit.weighing import in_columns

SHORT = ["max_steps_per_epoch=2", "run_val_every_n_steps=null"]
WEIGHED = ["loss=tokenpref.losses.TISDPOLoss", "log_stats=[]"]
ONLINE = [
    "token_weights=tokenpref.training.OnlinePrompts",
    "token_weights.positive_prompt=good",
    "token_weights.negative_prompt=bad",
]
OLD_FORMS = {
    "tdpo": (PreferenceTrainer, (), "tiny/tdpo", []),
    "tis_dpo": (WeightedTrainer, (token_weights,), "tiny/tis_dpo", ONLINE),
    "ti_dpo": (TripletTrainer, (token_weights, anchors), "tiny/ti_dpo", []),
}


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Train as a recipe does; returns the trainer, and the weights that it wrote."""
    monkeypatch.chdir(tmp_path)

    def run(make, folder, config, words):
        trainer = make(load_config(["--config", config, *SHORT, *words, f"output_dir={folder}"]))
        try:
            trainer.setup()
            trainer.train()
        finally:
            trainer.close()
        return trainer, load_file(tmp_path / folder / "epoch_0" / "model-00001-of-00001.safetensors")

    return run


@pytest.mark.parametrize("name", OLD_FORMS)
def test_a_recipe_that_derives_trains_the_same_as_one_that_attaches(name, train):
    base, sources, config, words = OLD_FORMS[name]

    class OwnRecipe(base):
        recipe = "recipes/my_own"

    def attaches(cfg):
        return PreferenceTrainer(cfg, recipe="recipes/my_own", sources=sources)

    derived, one = train(OwnRecipe, "derived", config, words)
    attached, other = train(attaches, "attached", config, words)
    assert derived.recipe == attached.recipe == "recipes/my_own"
    assert derived.provides == attached.provides and derived.schema is attached.schema
    assert derived.progress.step == 2 and derived.policy is derived.run.policy
    assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


@pytest.mark.parametrize("name", ["load_weights", "load_anchors", "build_reference"])
def test_a_method_that_is_no_longer_called_is_refused_with_its_successor(name):
    own = type("OwnRecipe", (TripletTrainer,), {name: lambda self, *args: None})
    with pytest.raises(ConfigError, match=f"OwnRecipe.{name}: .*no longer calls.*(sources=|setup)"):
        own(load_config(["--config", "tiny/ti_dpo"]))


def test_a_source_of_ones_own_needs_no_keys_and_no_class(train):
    asked = []

    def load(context, dataset):
        asked.append(len(dataset))
        context.keep("ones", None)

        def weigh(batch):
            lengths = (batch.labels[:, 1:] != -100).sum(-1).tolist()
            assert context.live().policy is not None
            return in_columns(
                [(torch.full((n,), 2.0), torch.zeros(n, dtype=torch.bool)) for n in lengths], batch
            )

        return weigh

    twos = Source(statistic="weights", schema=TrainConfig, load=load)
    trainer, _ = train(lambda cfg: PreferenceTrainer(cfg, sources=[twos]), "mine", "tiny/tdpo", WEIGHED)
    assert asked == [len(trainer.dataset)] and trainer.state.sources == {"ones": None}
    # A loss that asks for no weights leaves the source alone.
    train(lambda cfg: PreferenceTrainer(cfg, sources=[twos]), "plain", "tiny/tdpo", [])
    assert len(asked) == 1


def test_a_source_may_find_faults(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    never = Source(
        statistic="weights",
        schema=TrainConfig,
        load=lambda *_: None,
        faults=lambda config: ["seed: a bad one"],
    )
    with pytest.raises(ConfigError, match="seed: a bad one"):
        PreferenceTrainer(load_config(["--config", "tiny/tdpo"]), sources=[never])


def test_sources_whose_configs_do_not_go_together_are_refused():
    one = type("One", (TrainConfig,), {})
    other = type("Other", (TrainConfig,), {})
    sources = [
        Source(statistic=name, schema=s, load=lambda *_: None)
        for name, s in (("weights", one), ("anchor", other))
    ]
    with pytest.raises(TypeError, match="One, Other"):
        PreferenceTrainer(load_config(["--config", "tiny/tdpo"]), sources=sources)
