"""A contrastive pair of two adapters over one base: built, scored for a store, and scored inside a policy in training."""

import gc
import logging
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support import workers

from tokenpref._paths import data_root
from tokenpref.data import WeightStore
from tokenpref.distributed import single_process_world
from tokenpref.distributed.testing import run_distributed
from tokenpref.errors import ConfigError, DataError, TokenprefError
from tokenpref.models import ScoringModel
from tokenpref.models.adapters import adapter_state
from tokenpref.models.peft_reader import read_adapter
from tokenpref.training import ContrastiveReference, PreferenceTrainer, WeightedTrainer, WeightEstimation
from tokenpref.training.config.command_line import load_config
from tokenpref.training.estimation.pair_folder import SIDES, read_pair
from tokenpref.training.loading import models, preflight
from tokenpref.training.loading.models import ModelMaker
from tokenpref.training.saving.checkpoints import Checkpoints
from tokenpref.training.step.batches import pair_batches

WORLD = single_process_world()
TINY = data_root() / "data" / "tiny" / "model"
LORA = (
    "model._component_=tokenpref.models.lora_tiny_llama", "model.lora_attn_modules=[q_proj,v_proj]", "model.lora_rank=4",
    "model.lora_alpha=8",
)  # fmt: skip
ROWS, RATE, STEPS = "dataset.max_rows=24", 0.01, 3
SHORT = (f"optimizer.lr={RATE}", "batch_size=8")
ONLINE = ("token_weights=tokenpref.training.OnlinePair", "~token_weights.path")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with a pair of adapters, a pair of prompts, and the weight store of the first."""
    place = tmp_path_factory.mktemp("pairs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        build("pair")
        build("prompts", "method=prompt")
        estimate("store")
    return place


def build(name, *words, model=LORA):
    """Build a pair, or what is missing of it."""
    words = ["--config", "tiny/contrastive_reference", *model, *SHORT, ROWS, *words, f"output_dir={name}"]
    builder = ContrastiveReference(load_config(words))
    try:
        return builder.run()
    finally:
        builder.close()


@pytest.fixture
def folder(built, tmp_path, monkeypatch):
    """A copy, to spoil."""
    shutil.copytree(built, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def estimate(name, *words, pair="pair", model=LORA):
    cfg = load_config(
        ["--config", "tiny/estimate_weights", *model, ROWS, f"estimator.pair={pair}", *words, f"output_dir={name}"]
    )  # fmt: skip
    run = WeightEstimation(cfg)
    try:
        return WeightStore.open(run.run())
    finally:
        run.close()


def start(name, *words, model=LORA):
    """A TIS-DPO training that is set up."""
    return WeightedTrainer(
        load_config(
            [
                "--config",
                "tiny/tis_dpo",
                *model,
                *SHORT,
                ROWS,
                "run_val_every_n_steps=null",
                *words,
                f"output_dir={name}",
            ]
        )  # fmt: skip
    )


def online(name, *words, pair="pair", **kwargs):
    return start(name, *ONLINE, f"token_weights.pair={pair}", *words, **kwargs)


def from_store(name, *words):
    return start(name, "token_weights.path=store/weights", *words)


def trained(trainer):
    """Train to the end; returns the metrics by step, and the policy's adapters."""
    logged = []
    trainer._log = logged.append
    try:
        trainer.setup()
        trainer.train()
    finally:
        trainer.close()
    return logged, adapter_state(trainer.run.policy.model, WORLD)


def scores(store):
    return {(row.row, side): getattr(row, side) for row in store for side in ("chosen", "rejected")}


def test_the_pair_holds_two_adapters_from_one_start_and_not_the_base(built):
    record = yaml.safe_load((built / "pair/pair.yaml").read_text())
    assert [record[side] for side in SIDES] == [
        {"adapter": f"{side}/epoch_0", "prompt": None} for side in SIDES
    ]
    files = [file for file in (built / "pair").rglob("*") if file.is_file()]
    base = (TINY / "model.safetensors").stat().st_size
    assert (
        sum(file.stat().st_size for file in files if file.suffix in (".safetensors", ".distcp", ".pt")) < base
    )
    assert not list((built / "pair").rglob("model*.safetensors"))
    adapters = [load_file(built / f"pair/{side}/epoch_0/adapter_model.safetensors") for side in SIDES]
    assert adapters[0].keys() == adapters[1].keys() and all("lora_" in name for name in adapters[0])
    for name, tensor in adapters[0].items():
        apart = (tensor - adapters[1][name]).abs().max()
        # No weight moves by much more than the rate in a step. Two random A would be further apart.
        assert 0 < apart < 2.5 * STEPS * RATE, name


def held(pair):
    """The bytes of the files of a pair that are the same in each build."""
    files = (file for file in Path(pair).rglob("*") if file.is_file() and file.parent.name != "logs")
    own = {".lock", "run.json", "tokenpref_base.json", "torchtune_config.yaml"}
    return {str(f.relative_to(pair)): f.read_bytes() for f in files if f.name not in own}


def test_the_sides_hold_no_checkpoints_and_no_tokenizer(built):
    """Both would be larger than the adapters. The pair names the tokenizer by its fingerprint."""
    names = {file.relative_to(built / "pair") for file in (built / "pair").rglob("*") if file.is_file()}
    for side in SIDES:
        found = {name.name for name in names if name.parts[:2] == (side, "epoch_0")}
        assert found == {
            "adapter_config.json", "adapter_model.safetensors", "manifest.json", "tokenpref_base.json",
        }  # fmt: skip
        assert not (built / "pair" / side / "checkpoints").exists()


def test_a_build_that_is_killed_goes_on_to_the_same_bits(folder, monkeypatch, caplog):
    """In the training of the second side, and while the checkpoints of the finished sides are removed."""

    class KilledError(BaseException):
        pass

    def train(self, step=PreferenceTrainer._step):
        if self.run.progress.step == 2 and "negative" in self.config.output_dir:
            raise KilledError
        return step(self)

    def remove(self, own=Checkpoints.remove):
        if "negative" in str(self.path):
            raise KilledError
        own(self)

    saved = ("checkpoint_every_n_steps=1",)
    with monkeypatch.context() as patch:
        patch.setattr(PreferenceTrainer, "_step", train)
        with pytest.raises(KilledError):
            build("mine", *saved)
    assert not Path("mine/pair.yaml").exists() and Path("mine/positive/checkpoints/step_3").is_dir()
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "remove", remove)
        with pytest.raises(KilledError):
            build("mine", *saved)
    assert read_pair(Path("mine")).method == "dpo"
    assert [Path(f"mine/{side}/checkpoints").exists() for side in SIDES] == [False, True]
    for _ in range(2):  # the second time there is nothing left to do
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="tokenpref"):
            build("mine", *saved)
        assert caplog.text.count("done already") == 2
    found, whole = held("mine"), held("pair")
    assert found.keys() == whole.keys() and not any("checkpoints" in name for name in found)
    assert all(found[name] == whole[name] for name in whole if name.endswith(".safetensors"))


def test_checkpoints_are_kept_to_train_a_pair_further(folder):
    build("mine", "keep_checkpoints=true")
    assert all(Path(f"mine/{side}/checkpoints/step_3").is_dir() for side in SIDES)
    build("mine", "epochs=2")
    assert read_pair(Path("mine")).positive.adapter == (folder / "mine/positive/epoch_1").resolve()
    assert not any(Path(f"mine/{side}/checkpoints").exists() for side in SIDES)


def test_a_pair_without_checkpoints_cannot_be_trained_further(folder):
    build("mine")
    before = held("mine")
    for words in ((), ("dry_run=true",), ("keep_checkpoints=true",)):
        with pytest.raises(
            ConfigError,
            match="positive side in .* finished with other epochs .* keep_checkpoints .* in another output_dir",
        ):
            build("mine", "epochs=2", *words)
    assert held("mine") == before
    shutil.rmtree("mine/negative/epoch_0")
    with pytest.raises(
        ConfigError,
        match="negative/epoch_0 is missing, .* no checkpoint .*remove .*/negative and start again",
    ):
        build("mine")
    shutil.rmtree("mine/negative")
    build("mine")
    after = held("mine")
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in before if name.endswith(".safetensors"))


@pytest.mark.parametrize(("words", "kept"), [((), True), (("keep_checkpoints=false",), False)])
def test_whole_models_keep_their_checkpoints_unless_asked(folder, words, kept):
    plain = ("model._component_=tokenpref.models.tiny_llama",)
    build("mine", "max_steps_per_epoch=1", *words, model=plain)
    assert [Path(f"mine/{side}/checkpoints/step_1").is_dir() for side in SIDES] == [kept, kept]
    assert all(Path(f"mine/{side}/epoch_0/tokenizer.json").is_file() for side in SIDES)
    estimate("from_whole", pair="mine", model=plain)


def test_a_pair_of_adapters_holds_no_merged_models(folder):
    words = [
        "--config",
        "tiny/contrastive_reference",
        *LORA,
        "save_adapter_weights_only=false",
        "output_dir=never",
    ]
    with pytest.raises(ConfigError, match="save_adapter_weights_only: is false.*set it to true"):
        ContrastiveReference(load_config(words)).run()
    assert not Path("never").exists()


def test_the_store_has_the_scores_of_two_models_and_one_base_is_read(folder, monkeypatch):
    read = []
    monkeypatch.setattr(
        models, "read_weights", lambda *a, own=models.read_weights: read.append(a[1]) or own(*a)
    )
    found = scores(estimate("again"))
    assert len(read) == 1
    kept = scores(WeightStore.open(folder / "store/weights"))
    run = WeightEstimation(
        load_config(["--config", "tiny/estimate_weights", *LORA, ROWS, "output_dir=never"])
    )
    maker = ModelMaker(run.config, WORLD, model=run.config.model, checkpointer=run.config.checkpointer)
    sides = [whole_model(maker, side.adapter) for side in read_pair(folder / "pair").sides.values()]
    dataset = run.config.dataset.build(tokenizer())
    for example in dataset:
        ids = torch.tensor([example.chosen_ids])
        labels = torch.where(torch.arange(ids.shape[1]) >= example.chosen_start, ids, -100)
        logps = [side.logps(ids, labels)[0, example.chosen_start - 1 :] for side in sides]
        want = (logps[0] - logps[1]).numpy()
        assert found[example.row, "chosen"] == pytest.approx(want, abs=2e-6) and np.abs(want).max() > 1e-3
    assert all(np.array_equal(found[key], kept[key]) for key in found)


def whole_model(maker, adapter):
    """A model of its own with an adapter in it."""
    decoder = maker.side(maker.base, "base").model
    missing = decoder.load_state_dict(read_adapter(adapter, decoder, "adapter"), strict=False)
    assert not missing.unexpected_keys
    return ScoringModel(decoder)


def tokenizer():
    from tokenpref.data import tokenizer_json

    return tokenizer_json(str(TINY))


def test_weights_online_are_those_of_the_store_while_the_policy_moves(folder):
    """Also after steps, when the policy's own adapters have changed."""
    store, live = from_store("from_store"), online("live")
    try:
        for trainer in (store, live):
            trainer.setup()
        for step in range(2):
            batches = pair_batches(
                live.dataset, WORLD, pad_id=0, step=step, batch_size=8, accumulation=1, seed=0, epoch=0, shuffle=False
            )  # fmt: skip
            before = adapter_state(live.policy.model, WORLD)
            before = {name: tensor.clone() for name, tensor in before.items()}
            known, weights = (trainer.weigh(batches[0]).weights for trainer in (store, live))
            torch.testing.assert_close(weights, known, atol=1e-6, rtol=1e-6)
            assert weights.std() > 0
            for name, tensor in adapter_state(live.policy.model, WORLD).items():
                assert torch.equal(tensor, before[name]), name
                if step == 0:  # as if the policy had been trained
                    dict(live.policy.model.named_parameters())[name].data.add_(0.05)
    finally:
        for trainer in (store, live):
            trainer.close()


def test_scoring_inside_the_policy_changes_no_bit_of_it(folder):
    uniform = ("weight_transform=tokenpref.weights.transforms.uniform",)
    one, two = trained(from_store("plain", *uniform)), trained(online("scored", *uniform))
    assert len(one[0]) == STEPS
    for known, found in zip(one[0], two[0], strict=True):
        for name in ("loss", "logps/chosen", "logps/rejected", "grad_norm", "rewards/margins"):
            assert known[name] == found[name], name
    assert one[0][0]["loss"] == float(torch.tensor(2.0).log()) and one[0][-1]["loss"] != one[0][0]["loss"]
    for name, tensor in two[1].items():
        assert torch.equal(tensor, one[1][name]), name


@pytest.mark.parametrize(
    "more",
    [("enable_activation_checkpointing=true",), ("compute_dtype=bf16",), ("reference=cached",)],
    ids=lambda m: m[0],
)
def test_it_goes_with_other_settings(folder, more):
    logged, _ = trained(online("mine", *more, "max_steps_per_epoch=2"))
    assert all(math.isfinite(step["loss"]) for step in logged) and logged[0]["weights/std"] > 0


def test_a_resumed_training_has_the_same_bits(folder):
    saved = ("checkpoint_every_n_steps=2", "keep_last=2")
    whole, adapters = trained(online("whole", *saved))
    rest, again = trained(online("parts", "resume_from_checkpoint=whole/checkpoints/step_2"))
    assert [step["loss"] for step in rest] == [step["loss"] for step in whole[2:]]
    assert all(torch.equal(tensor, adapters[name]) for name, tensor in again.items()) and again


WHOLE = ("model._component_=tokenpref.models.tiny_llama",)


@pytest.mark.parametrize(
    ("source", "pair", "model"),
    [
        ("ContrastiveEstimator", "pair", LORA),
        ("ContrastiveEstimator", "prompts", LORA),
        ("ContrastiveEstimator", "whole", WHOLE),
        ("OnlinePair", "pair", LORA),
    ],
)
def test_the_estimate_of_memory_counts_the_models_that_score(folder, monkeypatch, source, pair, model):
    """As much as the first scores then take beside the models of the run."""
    estimates = []

    def keep(*args, own=preflight.estimate_memory, **kwargs):
        estimates.append(own(*args, **kwargs))
        return estimates[-1]

    monkeypatch.setattr(preflight, "estimate_memory", keep)
    if pair == "whole":
        build(pair, "max_steps_per_epoch=1", model=model)
    words = (
        f"token_weights=tokenpref.training.{source}",
        "~token_weights.path",
        f"token_weights.pair={pair}",
    )
    trainer = start("mine", *words, "batch_size=2", model=model)
    try:
        trainer.setup()
        (batch,) = pair_batches(
            trainer.dataset, WORLD, pad_id=0, step=0, batch_size=2, accumulation=1, seed=0, epoch=0, shuffle=False
        )  # fmt: skip
        gc.collect()
        before = storages()
        trainer.weigh(batch)
        gc.collect()
        took = sum(size for place, size in storages().items() if place not in before)
    finally:
        trainer.close()
    estimate = estimates[-1]
    # The norms of a model are counted too.
    assert 0 < took == pytest.approx(estimate.scorers, rel=0.02)
    assert "scorers " in str(estimate) and estimate.total > estimate.weights + estimate.scorers


def storages():
    """Bytes of the matrices in memory, by place."""
    found = {}
    for thing in gc.get_objects():
        if (
            type(thing) in (torch.Tensor, torch.nn.Parameter)
            and thing.is_floating_point()
            and thing.dim() == 2
        ):
            found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return found


def test_it_gives_a_store_the_same_scores(folder):
    found, kept = (
        scores(estimate("mine", "estimator=tokenpref.training.OnlinePair", pair="pair")),
        scores(WeightStore.open(folder / "store/weights")),
    )
    assert found.keys() == kept.keys() and all(np.array_equal(found[key], kept[key]) for key in found)


def test_prompts_over_a_model_with_adapters_are_scored_by_its_base(folder):
    adapted = scores(estimate("adapted", pair="prompts"))
    plain = scores(estimate("plain", pair="prompts", model=()))
    assert all(adapted[key] == pytest.approx(plain[key], abs=1e-6) for key in plain) and plain


def change(file, **tensors):
    state = load_file(file)
    name = next(name for name in state if "lora_A" in name)
    state[name] = state[name] * 1.5
    save_file(state, file, metadata={"format": "pt"})


def other_base(folder):
    shutil.copytree(TINY, folder / "other")
    state = load_file(folder / "other/model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"] * 1.5
    save_file(state, folder / "other/model.safetensors", metadata={"format": "pt"})


ADAPTER = "pair/negative/epoch_0/adapter_model.safetensors"


@pytest.mark.parametrize(
    "begin",
    [lambda *w: estimate("never", *w), lambda *w: online("never", *w).setup()],
    ids=["store", "online"],
)
@pytest.mark.parametrize(
    ("words", "prepare", "says"),
    [
        (("model.lora_rank=8",), None, "pair's positive side: .*has rank 4.* and .* 8; set model.lora_rank=4"),
        (("model.lora_alpha=4",), None, "pair's positive side: .*alpha 8 .*set model.lora_alpha=8"),
        (("model.use_dora=true",), None, "pair's positive side: .*set model.use_dora=false"),
        (("model.lora_attn_modules=[q_proj]",), None, "pair's positive side: .*set model.lora_attn_modules"),
        (("model.num_layers=3",), None, "another model .num_hidden_layers is 2 there and 3 here"),
        (("checkpointer.checkpoint_dir=other",), other_base, "another base model .*set checkpointer to the pair's"),
        ((), lambda f: change(f / ADAPTER), "negative/epoch_0.*adapter_model.safetensors is not what was written"),
        ((), lambda f: (f / ADAPTER).unlink(), "no adapter of the negative side there; build the pair again"),
        ((), lambda f: (f / "pair/negative/epoch_0/adapter_config.json").unlink(), "no adapter of the negative side there"),
    ],
)  # fmt: skip
def test_a_pair_that_does_not_fit_is_refused_before_weights_are_read(
    folder, monkeypatch, begin, words, prepare, says
):
    monkeypatch.setattr(models, "read_weights", lambda *_: pytest.fail("weights were read"))
    if prepare is not None:
        prepare(folder)
    with pytest.raises(TokenprefError, match=says):
        begin(*words)
    assert not Path("never").exists()


def test_a_model_without_adapters_is_refused(folder):
    plain = ("model._component_=tokenpref.models.tiny_llama",)
    with pytest.raises(
        DataError,
        match="sides of the pair are adapters, and model .* without adapters; set model to the pair's lora_",
    ):
        estimate("never", model=plain)
    with pytest.raises(
        ConfigError,
        match=r"token_weights: OnlinePair .* without adapters\. Write a store with recipes/estimate",
    ):
        online("never", model=plain).setup()
    assert not Path("never").exists()


def test_a_pair_without_adapters_cannot_be_scored_inside_the_policy(folder):
    with pytest.raises(
        ConfigError,
        match="its sides are no adapters.*Write a store .* or set token_weights to .*OnlinePrompts",
    ):
        online("never", pair="prompts").setup()


def test_two_ranks_equal_one_process(folder):
    """With gathered layers that are freed after a forward, and with such that are kept. In the last step one rank has no pair."""
    words = [
        *LORA,
        *ONLINE,
        f"token_weights.pair={folder / 'pair'}",
        *SHORT,
        "dataset.max_rows=17",
        "run_val_every_n_steps=null",
        "optimizer.eps=1e-4",
    ]
    (one,) = workers.online_pair_trainings(WORLD, [[*words, f"output_dir={folder / 'one'}"]])
    words += ["batch_size=4"]
    runs = [
        [*words, f"output_dir={folder / 'freed'}"],
        [*words, f"output_dir={folder / 'kept'}", "fsdp_reshard_after_forward=false"],
    ]
    for rank in run_distributed(workers.online_pair_trainings, runs):
        for found in rank:
            assert found["losses"] == pytest.approx(one["losses"], abs=1e-6)
            assert (
                found["weights"] == pytest.approx(one["weights"], abs=1e-6) and len(one["weights"]) == STEPS
            )
