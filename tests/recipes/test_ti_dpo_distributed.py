"""TI-DPO as users type it: attribution, anchors, stored weights, and parts put together from the command line."""

import json
import shutil

import pytest
from support.commands import logged, tune, weights

from tokenpref._paths import data_root
from tokenpref.errors import TokenprefError
from tokenpref.training import TripletTrainer, WeightedTrainer, WeightEstimation
from tokenpref.training.config.command_line import load_config

TI = ["recipes/ti_dpo_distributed", "--config", "tiny/ti_dpo"]
ESTIMATE = ["recipes/estimate_weights_distributed", "--config", "tiny/estimate_weights_attribution"]
SHORT = ["max_steps_per_epoch=3", "run_val_every_n_steps=null"]
TWO = ["--nproc_per_node", "2"]
NO_TRIPLET = ["loss.gamma=0", "~anchors"]
EXPONENTIAL = ["weight_transform._component_=tokenpref.weights.transforms.exponential"]
PROMPTS = [
    "token_weights=tokenpref.training.OnlinePrompts",
    "token_weights.positive_prompt=good",
    "token_weights.negative_prompt=bad",
]
OWN_WEIGHTS = '''
import torch


class Growing:
    """Weights 1, 2, 3, ... over an answer."""

    kind = "weight"

    def bind(self, dataset):
        self.rows = len(dataset)

    def score(self, batch, models):
        assert self.rows == 64 and models.policy is not models.frozen("token_weights")
        lengths = (batch.labels[:, 1:] != -100).sum(-1).tolist()
        return [torch.arange(1.0, n + 1) for n in lengths]
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the finished default run, its stored weights, data with a third answer, and a user's file."""
    folder = tmp_path_factory.mktemp("ti")
    rows = [json.loads(line) for line in (data_root() / "data/tiny/train.jsonl").read_text().splitlines()]
    with (folder / "three.jsonl").open("w") as file:
        for number, row in enumerate(rows):
            middle = ["", row["chosen"], row["rejected"], row["chosen"].split()[0]][number % 4]
            file.write(json.dumps({**row, "middle": middle}) + "\n")
    (folder / "my_weights.py").write_text(OWN_WEIGHTS)
    tune(folder, *TI, fresh=True)
    tune(folder, *ESTIMATE)
    return folder


def trained(words, trainer_class=TripletTrainer):
    trainer = trainer_class(load_config(words))
    try:
        trainer.setup()
        trainer.train()
    finally:
        trainer.close()


def curve(folder, run, key="loss"):
    return [line[key] for line in logged(folder, run) if key in line]


def test_the_run_logs_weights_triplet_anchors_and_times(folder):
    lines = logged(folder, "outputs/tiny_ti_dpo")
    train = [line for line in lines if "loss" in line]
    assert len(train) == 8 and train[-1]["loss"] < train[0]["loss"]
    first = train[0]
    # policy = reference: log 2 and the triplet's margin
    assert first["loss"] == pytest.approx(0.693147 + 0.1 * 0.1, abs=1e-6)
    assert first["weights/mean"] == pytest.approx(1.0, abs=1e-5) and first["weights/std"] > 0.05
    for line in train:
        assert 1 <= line["anchors/tokens"] <= 8 and line["time/step"] > line["time/attribution"] > 0
        assert line["time/step"] > line["time/anchors"] > 0 and 0 <= line["triplet/active"] <= 1
        assert {"anchors/empty", "anchors/equal_chosen", "anchors/equal_rejected"} <= line.keys()
    assert any("eval_rewards/accuracies" in line for line in lines)
    assert (folder / "outputs/tiny_ti_dpo/epoch_0").is_dir()


def test_two_processes_follow_the_same_curve(folder):
    tune(folder, *TWO, *TI, *SHORT, "batch_size=4", "output_dir=two", fresh=True)
    for key, tolerance in (("loss", 1e-5), ("weights/std", 1e-5), ("anchors/tokens", 0.0)):
        one, two = curve(folder, "outputs/tiny_ti_dpo", key), curve(folder, "two", key)
        steps = 1 if key == "anchors/tokens" else 3  # later a last bit may turn one sampled token
        assert two[:steps] == pytest.approx(one[:steps], abs=tolerance), key


def test_stored_weights_are_those_of_the_frozen_model(folder):
    stored = "outputs/tiny_estimate_weights_attribution/weights"
    tune(
        folder, *TI, *SHORT, *NO_TRIPLET, "output_dir=stored",
        "token_weights=tokenpref.data.StoredScores", f"token_weights.path={stored}",
    )  # fmt: skip
    tune(
        folder,
        *TI,
        *SHORT,
        *NO_TRIPLET,
        "output_dir=frozen",
        "token_weights.model=reference",
        "token_weights.refresh=once",
    )
    for key in ("loss", "weights/std", "rewards/margins"):
        assert curve(folder, "stored", key) == pytest.approx(curve(folder, "frozen", key), abs=1e-6)
    assert "time/attribution" not in logged(folder, "stored")[0]
    metadata = json.loads((folder / stored / "metadata.json").read_text())
    assert metadata["kind"] == "weight" and metadata["estimator"]["target"]["_component_"].endswith(
        "AnswerLogp"
    )
    assert metadata["estimator"]["prior"] == {
        "_component_": "tokenpref.weights.attribution.GaussianPrior", "sigma": 0.25, "normalized": True
    }  # fmt: skip


def test_any_number_of_ranks_stores_the_same_weights(folder):
    def made(run, *launch):
        words = [
            "estimator.target=tokenpref.weights.attribution.PreferenceMargin",
            f"output_dir={run}",
            "batch_tokens=64",
        ]
        tune(folder, *launch, *ESTIMATE, *words)
        return {
            p.name: p.read_bytes() for p in (folder / run / "weights").iterdir() if p.suffix == ".parquet"
        }

    one, two = made("one_rank"), made("two_ranks", *TWO)
    assert one and one == two


@pytest.mark.parametrize("launch", [[], TWO], ids=["one", "two"])
def test_anchors_from_a_column(folder, launch):
    run = f"column{len(launch)}"
    words = ["dataset.source=three.jsonl", "anchors=tokenpref.data.ColumnAnchors", "anchors.column=middle"]
    tune(folder, *launch, *TI, *words, *SHORT, f"output_dir={run}", f"batch_size={8 if not launch else 4}")
    lines = logged(folder, run)
    assert 0 < lines[0]["anchors/empty"] < 1 and 0 < lines[0]["anchors/equal_chosen"] < 1
    if launch:
        for key in ("loss", "triplet/loss", "anchors/tokens", "triplet/distance/rejected"):
            assert curve(folder, run, key) == pytest.approx(curve(folder, "column0", key), abs=1e-5)


@pytest.mark.parametrize(
    ("run", "overrides"),
    [
        ("attribution_tis", ["loss=tokenpref.losses.TISDPOLoss", "~anchors"]),
        ("prompts_triplet", [*PROMPTS, *EXPONENTIAL]),
        ("own_weights", ["token_weights=my_weights.Growing", "anchors.refresh=once"]),
        ("margin", ["token_weights.target=tokenpref.weights.attribution.PreferenceMargin", *NO_TRIPLET]),
        ("code", ["loss.alpha=0.5", "token_weights.span=prompt_and_answer", "loss.anchor_grad=false"]),
    ],
)
def test_parts_from_the_command_line(folder, monkeypatch, run, overrides):
    words = [*SHORT, *overrides, f"output_dir={run}"]
    if run == "own_weights":
        tune(folder, *TI, *words)  # a user's file is found from the command's folder
    else:
        monkeypatch.chdir(folder)
        trained([*TI[1:], *words])
    losses = curve(folder, run)
    assert len(losses) == 3 and losses[-1] < losses[0]
    if run == "own_weights":
        assert logged(folder, run)[0]["weights/mean"] > 2
    assert ("triplet/loss" in logged(folder, run)[0]) == (run in ("prompts_triplet", "own_weights", "code"))


def test_attribution_in_the_tis_recipe(folder, monkeypatch):
    monkeypatch.chdir(folder)
    words = ["token_weights=tokenpref.training.Attribution", "~token_weights.path", "weight_transform=null"]
    trained(["--config", "tiny/tis_dpo", *words, *SHORT, "output_dir=tis"], WeightedTrainer)
    same = [
        "loss=tokenpref.losses.TISDPOLoss",
        "~anchors",
        "token_weights.target=tokenpref.weights.attribution.MaxLogit",
    ]
    trained([*TI[1:], *SHORT, *same, "output_dir=ti"])
    for name, tensor in weights(folder, "tis").items():
        assert tensor.equal(weights(folder, "ti")[name])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["anchors=tokenpref.data.ColumnAnchors"], "has no column 'anchor' with anchors"),
        (["~anchors"], "anchors: missing; loss .* compares with a third answer"),
        (["anchors=collections.Counter"], "has no method bind and no answers"),
        (["anchors.max_new_tokens=1000"], "exceed the model's context"),
        (["loss.gamma=-1"], "gamma must be a finite number >= 0, got -1"),
        (["loss.margin=-0.5"], "margin must be"),
        (["token_weights.mixture=1.5"], r"mixture \(lambda\) must be"),
        (["token_weights.prior.sigma=0"], "sigma must be a finite number > 0"),
        (["token_weights.prior.width=1"], "token_weights.prior.width: GaussianPrior takes no such argument"),
        (
            ["token_weights.target=tokenpref.weights.MaxLogits"],
            "token_weights.target._component_.*did you mean 'MaxLogit'",
        ),
        (["token_weights.refresh=every_n_steps"], "every_n_steps: .* needs a whole number"),
        (EXPONENTIAL, "the scores are weights already"),
    ],
)
def test_bad_input(folder, monkeypatch, overrides, message):
    monkeypatch.chdir(folder)
    with pytest.raises(TokenprefError, match=message):
        trained([*TI[1:], *overrides, "max_steps_per_epoch=1", "output_dir=bad"])
    shutil.rmtree(folder / "bad", ignore_errors=True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["~model"], "model: missing; estimator .* runs the model that model names"),
        (["~checkpointer"], "checkpointer: missing"),
        (["estimator.mixture=-0.1"], "mixture"),
        (["checkpointer.checkpoint_dir=nowhere"], "checkpointer.checkpoint_dir: no folder"),
    ],
)
def test_bad_input_of_the_estimator(folder, monkeypatch, overrides, message):
    monkeypatch.chdir(folder)
    with pytest.raises(TokenprefError, match=message):
        WeightEstimation(load_config([*ESTIMATE[1:], *overrides, "output_dir=bad"])).run()
    assert not (folder / "bad").exists()
