"""The TIS-DPO pipeline as users type it: pair, weights, training."""

import json
import shutil

import pytest
import yaml
from support.commands import logged, tune, weights

from tokenpref.errors import TokenprefError
from tokenpref.training import ContrastiveReference, WeightedTrainer, WeightEstimation
from tokenpref.training.config.command_line import load_config

PAIR = ["recipes/contrastive_reference_distributed", "--config", "tiny/contrastive_reference"]
ESTIMATE = ["recipes/estimate_weights_distributed", "--config", "tiny/estimate_weights"]
TIS = ["recipes/tis_dpo_distributed", "--config", "tiny/tis_dpo"]
TDPO = ["recipes/tdpo_distributed", "--config", "tiny/dpo", "log_stats=[]"]


def start(recipe_class, cfg):
    run = recipe_class(cfg)
    try:
        run.setup() if hasattr(run, "setup") else run.run()
    finally:
        run.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a finished pair and store, where the configs look for them."""
    folder = tmp_path_factory.mktemp("tis")
    tune(folder, *PAIR, fresh=True)
    tune(folder, *ESTIMATE, fresh=True)
    return folder


def shards(folder, run):
    store = folder / run / "weights"
    return {p.name: p.read_bytes() for p in store.iterdir() if p.name != "job.json"}


def test_the_pair_prefers_opposite_answers(folder):
    pair = folder / "outputs/tiny_contrastive_reference"
    record = yaml.safe_load((pair / "pair.yaml").read_text())
    assert record["method"] == "dpo" and record["positive"]["checkpoint"] == "positive/epoch_0"
    assert "loss" not in record["config"] and len(record["tokenizer"]) == 64
    # the negative side trains on exchanged answers: what is chosen there is rejected here
    positive, negative = (logged(pair, side)[0] for side in ("positive", "negative"))
    assert positive["logps/chosen"] == pytest.approx(negative["logps/rejected"], rel=1e-6)
    assert logged(pair, "positive")[-1]["loss"] < 0.69 > logged(pair, "negative")[-1]["loss"]


def test_a_pair_continues_where_it_stopped(folder):
    first = weights(folder / "outputs/tiny_contrastive_reference", "positive")
    stopped = [*PAIR, "output_dir=stopped"]
    tune(folder, *stopped)
    # As if the run had been killed at the end of its second phase: a checkpoint is there, and no mark of the end.
    (folder / "stopped/pair.yaml").unlink()
    (folder / "stopped/negative/finished.json").unlink()
    error = tune(folder, *ESTIMATE, "estimator.pair=stopped", "output_dir=never", ok=False)
    assert error.returncode == 2 and "half built (positive is done, negative is not)" in error.stderr
    assert not (folder / "never").exists()
    again = tune(folder, *stopped)
    assert "positive side: done already" in again.stderr and "negative side: goes on" in again.stderr
    for name, tensor in weights(folder / "stopped", "positive").items():
        assert tensor.equal(first[name]), name
    other = tune(folder, *stopped, "optimizer.lr=1e-4", ok=False)
    assert other.returncode == 2 and "holds another run" in other.stderr


def test_two_processes_build_the_same_pair(folder):
    tune(folder, "--nproc_per_node", "2", *PAIR, "output_dir=two_ranks", "batch_size=4", fresh=True)
    for side in ("positive", "negative"):
        one = weights(folder / "outputs/tiny_contrastive_reference", side)
        for name, tensor in weights(folder / "two_ranks", side).items():
            assert (tensor - one[name]).abs().max() < 2e-3, name
    assert (folder / "two_ranks/pair.yaml").is_file()


def test_a_model_of_another_architecture_is_refused(folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(
        TokenprefError, match="built with another model .num_hidden_layers is 2 there and 3 here"
    ):
        start(WeightEstimation, load_config([*ESTIMATE[1:], "model.num_layers=3", "output_dir=bad"]))
    assert not (folder / "bad").exists()


def test_supervised_and_prompt_pairs(folder):
    tune(folder, *PAIR, "method=sft", "output_dir=sft")
    assert logged(folder / "sft", "positive")[-1]["loss"] < logged(folder / "sft", "positive")[0]["loss"]
    tune(folder, *PAIR, "method=prompt", "output_dir=prompts")
    assert not (folder / "prompts/positive").exists()
    for pair in ("sft", "prompts"):
        tune(folder, *ESTIMATE, f"estimator.pair={pair}", f"output_dir={pair}_weights")
    assert shards(folder, "sft_weights") != shards(folder, "prompts_weights")


@pytest.mark.parametrize("ranks", ["2", "3"])
def test_any_number_of_ranks_writes_the_same_store(folder, ranks):
    tune(folder, "--nproc_per_node", ranks, *ESTIMATE, f"output_dir=ranks{ranks}", fresh=ranks == "2")
    assert shards(folder, f"ranks{ranks}") == shards(folder, "outputs/tiny_estimate_weights")


def test_an_interrupted_estimation_goes_on_to_the_same_store(folder):
    whole = shards(folder, "outputs/tiny_estimate_weights")
    store = folder / "broken_off/weights"
    shutil.copytree(folder / "outputs/tiny_estimate_weights/weights", store)
    kept = (store / "shard-00001.parquet").stat().st_mtime_ns
    for name in ("metadata.json", "shard-00000.parquet", "shard-00003.parquet"):
        (store / name).unlink()
    (store / "shard-00000.partial").write_bytes(b"half")
    error = tune(folder, *TIS, "token_weights.path=broken_off/weights", "output_dir=never", ok=False)
    assert error.returncode == 2 and "unfinished" in error.stderr and not (folder / "never").exists()
    again = tune(folder, *ESTIMATE, "output_dir=broken_off")
    assert "2 of 4 shards are there already" in again.stderr
    assert shards(folder, "broken_off") == whole
    assert (store / "shard-00001.parquet").stat().st_mtime_ns == kept


def test_training_from_the_store(folder):
    tune(folder, *TIS, "output_dir=one", fresh=True)
    tune(folder, "--nproc_per_node", "2", *TIS, "output_dir=two", "batch_size=4", fresh=True)
    one, two = logged(folder, "one"), logged(folder, "two")
    names = {f"weights/{name}" for name in ("mean", "std", "ess", "clipped")}
    assert names <= set(one[0]) and one[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert 0.22 < one[0]["weights/mean"] < 4.49 and one[0]["weights/ess"] < 1  # exp(-1.5) to exp(1.5)
    for a, b in zip(one, two, strict=True):
        assert a["loss" if "loss" in a else "eval_loss"] == pytest.approx(
            b["loss" if "loss" in b else "eval_loss"], abs=2e-5
        )
    held_out = [line for line in one if "eval_loss" in line]
    assert held_out and "eval_kl_policy_ref/chosen" in held_out[0] and "eval_weights/mean" not in held_out[0]


def test_weights_of_one_are_dpo_bit_for_bit(folder):
    tune(folder, *TIS, "output_dir=ones", "weight_transform=tokenpref.weights.transforms.uniform")
    tune(folder, *TDPO, "output_dir=dpo")
    for name, tensor in weights(folder, "dpo").items():
        assert tensor.equal(weights(folder, "ones")[name]), name


@pytest.mark.parametrize("launch", [pytest.param([], marks=pytest.mark.slow), ["--nproc_per_node", "2"]])
def test_prompts_online_equal_the_store_of_the_prompt_pair(folder, launch):
    name = f"online{len(launch)}"
    base = yaml.safe_load((folder / "outputs/tiny_contrastive_reference/pair.yaml").read_text())["config"]
    tune(folder, *PAIR, "method=prompt", f"output_dir={name}_pair")
    tune(folder, *ESTIMATE, f"estimator.pair={name}_pair", f"output_dir={name}_weights")
    short = ["max_steps_per_epoch=3", "run_val_every_n_steps=null", *(["batch_size=4"] if launch else [])]
    tune(
        folder,
        *launch,
        *TIS,
        f"token_weights.path={name}_weights/weights",
        f"output_dir={name}_stored",
        *short,
    )
    prompts = [f'token_weights.{side}_prompt="{base[f"{side}_prompt"]}"' for side in ("positive", "negative")]
    prompts = [p.replace("\n", "\\n") for p in prompts]
    online = ["token_weights._component_=tokenpref.training.OnlinePrompts", *prompts]
    tune(folder, *launch, *TIS, *online, f"output_dir={name}", *short)
    for stored, scored in zip(logged(folder, f"{name}_stored"), logged(folder, name), strict=True):
        assert scored["weights/std"] == pytest.approx(stored["weights/std"], abs=1e-5)
        assert scored["loss"] == pytest.approx(stored["loss"], abs=1e-5)


def test_the_pipeline_with_adapters(tmp_path):
    """Two adapters as a pair, their weights in a store or scored as the training goes, and a third adapter that is trained."""
    model = "model=tokenpref.models.lora_tiny_llama model.lora_attn_modules=[q_proj,v_proj] model.lora_rank=4 model.lora_alpha=8"
    lora = [*model.split(), "dataset.max_rows=32"]
    rate = ["optimizer.lr=0.01", "run_val_every_n_steps=null"]
    tune(tmp_path, *PAIR, *lora, *rate, "output_dir=pair")
    tune(tmp_path, *ESTIMATE, *lora, "estimator.pair=pair", "output_dir=store")
    tune(tmp_path, *TIS, *lora, *rate, "token_weights.path=store/weights", "output_dir=stored")
    online = ["token_weights=tokenpref.training.OnlinePair", "token_weights.pair=pair"]
    tune(tmp_path, *TIS, *lora, *rate, *online, "output_dir=online")
    stored, scored = logged(tmp_path, "stored"), logged(tmp_path, "online")
    assert len(stored) == len(scored) == 4 and stored[0]["weights/std"] > 0
    for one, other in zip(stored, scored, strict=True):
        assert other["weights/mean"] == pytest.approx(one["weights/mean"], abs=1e-5)
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert scored[0]["logps/chosen"] == stored[0]["logps/chosen"]
    assert (tmp_path / "online/epoch_0/adapter_model.safetensors").is_file()


def test_bad_input_is_one_error_and_leaves_nothing(folder):
    done = tune(folder, *TIS, "dataset.max_seq_len=7", "output_dir=bad", ok=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    error = done.stderr[done.stderr.index("error: ") :]
    assert "row" in error and "max_seq_len is 7 here and was 64 there" in error
    assert not (folder / "bad").exists()


RECIPES = {
    "tis": (TIS, WeightedTrainer),
    "estimate": (ESTIMATE, WeightEstimation),
    "pair": (PAIR, ContrastiveReference),
}


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("tis", ["dataset.source=package://data/tiny/eval.jsonl"], "eval.jsonl.*other tokens there"),
        ("tis", ["dataset.swap=true"], "swap is True here and was False there"),
        ("tis", ["tokenizer.chat_template=x"], "another chat template"),
        ("tis", ["tokenizer.eos_token=<|pad|>"], "another tokenizer"),
        ("tis", ["weight_transform.lower=2.0"], "lower < upper must hold, got lower=2.0, upper=1.5"),
        ("tis", ["weight_transform=null"], "weight_transform: missing"),
        ("tis", ["weight_transform.mo=2"], "weight_transform.mo: exponential takes no such argument"),
        ("tis", ["eos_weight=-1"], "eos_weight: expected a number of at least 0, found -1"),
        ("tis", ["~token_weights.path", "token_weights=collections.Counter"], "its kind is None"),
        ("tis", ["token_weights.path=nowhere"], "no weight store there"),
        ("estimate", ["tokenizer.eos_token=<|pad|>"], "the pair was built with another tokenizer"),
        ("estimate", ["estimator.pair=nowhere"], "no contrastive pair there"),
        ("pair", ["method=prompt", "positive_prompt=null"], "method prompt needs two different texts"),
        ("pair", ["method=ppo"], "expected one of prompt, sft, dpo, found 'ppo'"),
        ("pair", ["method=sft", "loss._component_=tokenpref.losses.DPOLoss"], "method is sft"),
    ],
)
def test_bad_input(folder, monkeypatch, recipe, overrides, message):
    monkeypatch.chdir(folder)
    command, recipe_class = RECIPES[recipe]
    with pytest.raises(TokenprefError, match=message):
        start(recipe_class, load_config([*command[1:], *overrides, "output_dir=bad"]))
    assert not (folder / "bad").exists()


def test_metadata_names_everything_that_made_the_scores(folder):
    metadata = json.loads((folder / "outputs/tiny_estimate_weights/weights/metadata.json").read_text())
    assert metadata["kind"] == "log_ratio" and metadata["estimator"]["method"] == "dpo"
    assert metadata["data"]["rows"] == 64 and metadata["data"]["settings"]["max_seq_len"] == 64
    assert all(len(metadata[name]) == 64 for name in ("tokenizer", "template"))
