"""Training the adapters of transformers' causal LMs, from the config to what peft, transformers and later runs load."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import workers
from support.causal_folders import WIDE, hf_model, words, write_folder
from torch.distributed.checkpoint import FileSystemReader

from tokenpref.cli import main
from tokenpref.data import WeightStore
from tokenpref.distributed import single_process_world
from tokenpref.distributed.testing import run_distributed
from tokenpref.errors import ConfigError
from tokenpref.models.adapters import adapter_names, adapter_state
from tokenpref.models.decoder_of import decoder_of
from tokenpref.training import (
    ContrastiveReference,
    Evaluator,
    PreferenceTrainer,
    WeightedTrainer,
    WeightEstimation,
)
from tokenpref.training.config.command_line import load_config
from tokenpref.training.loading import models

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
WORLD = single_process_world()
FIRST = float(torch.tensor(2.0).log())
TOKENS = torch.randint(4, 384, (2, 24), generator=torch.Generator().manual_seed(5))
SETTINGS = {"rank": 4, "alpha": 8}
SHORT = ("run_val_every_n_steps=null", "optimizer.lr=0.01", "dataset.max_rows=24")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with bases, and with a finished run of each kind of adapter that also wrote the merged model."""
    place = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for kind, dora in (("qwen3", False), ("gemma3_text", True), ("phi3", False), ("qwen2", True)):
            write_folder(Path(f"{kind}_base"), kind)
            more = ("save_adapter_weights_only=false", "checkpoint_every_n_steps=2", "keep_last=2")
            made = train(kind, *more, kind=kind, use_dora=dora)
            RUNS[kind] = made
    return place


RUNS = {}


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """Another folder, from which the bases can be found."""
    for base in made.glob("*_base"):
        (tmp_path / base.name).symlink_to(base)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def started(trainer):
    """A training that is over, and its metrics by step."""
    logged = []
    trainer._log = logged.append
    try:
        trainer.setup()
        trainer.train()
    finally:
        trainer.close()
    return trainer, logged


def train(name, *more, kind="qwen3", config="tiny/dpo", trainer=PreferenceTrainer, steps=3, **lora):
    own = words(f"{kind}_base", name, **{**SETTINGS, **lora})
    return started(
        trainer(load_config(["--config", config, *own, *SHORT, f"max_steps_per_epoch={steps}", *more]))
    )


def adapters_of(trainer):
    return adapter_state(trainer.policy.model, WORLD)


def assert_same(one, two):
    assert one.keys() == two.keys() and one
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def logits(model):
    with torch.no_grad():
        return model.eval()(TOKENS).logits


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "phi3", "qwen2"])
def test_a_run_trains_adapters_and_exports_what_others_load(kind, made, tmp_path):
    trainer, logged = RUNS[kind]
    assert logged[0]["loss"] == FIRST and logged[0]["rewards/chosen"] == 0 and logged[2]["loss"] < FIRST
    assert trainer.reference.scorer.model is trainer.policy.model
    policy, base = trainer.policy.model, load_file(made / f"{kind}_base" / "model.safetensors")
    assert all(torch.equal(policy.state_dict()[name], tensor) for name, tensor in base.items())
    assert all(tensor.any() for tensor in adapters_of(trainer).values())

    kept = FileSystemReader(made / kind / "checkpoints" / "step_2").read_metadata().state_dict_metadata
    assert {n.removeprefix("model.") for n in kept if n.startswith("model.")} >= set(adapter_names(policy))
    assert not any(name.endswith(("embed_tokens.weight", "proj.weight", ".bias")) for name in kept)

    with torch.no_grad():
        own = decoder_of(policy).logits(TOKENS)
    epoch = made / kind / "epoch_0"
    in_peft = peft.PeftModel.from_pretrained(hf_model(kind), epoch)
    torch.testing.assert_close(logits(in_peft), own, rtol=0, atol=1e-5)
    merged = transformers.AutoModelForCausalLM.from_pretrained(epoch / "merged")
    torch.testing.assert_close(logits(merged), own, rtol=0, atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(epoch).get_vocab()

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        assert main(["merge", str(epoch), "-o", "merged"]) == 0
    assert_same(
        load_file(tmp_path / "merged" / "model.safetensors"),
        load_file(epoch / "merged" / "model.safetensors"),
    )


@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text"])
def test_a_resumed_run_has_the_same_bits(kind, made, folder):
    trainer, logged = RUNS[kind]
    more = ("checkpoint_every_n_steps=2", f"resume_from_checkpoint={made}/{kind}/checkpoints/step_2")
    resumed, rest = train("parts", *more, kind=kind, use_dora=kind == "gemma3_text")
    assert [metrics["loss"] for metrics in rest] == [metrics["loss"] for metrics in logged[2:]]
    assert_same(adapters_of(resumed), adapters_of(trainer))


@pytest.mark.parametrize(
    "word", ["enable_activation_checkpointing=true", "padding_free=false", "compute_dtype=bf16"]
)
def test_the_first_loss_is_log_two_however_the_model_computes(word, folder):
    """The second loss is that of a plain run, except in another precision."""
    _, logged = train("mine", word, kind="gemma3_text", use_dora=True, steps=2)
    known = RUNS["gemma3_text"][1][1]["loss"]
    assert logged[0]["loss"] == FIRST and known != FIRST
    assert logged[1]["loss"] == pytest.approx(known, abs=1e-2 if "bf16" in word else 1e-6)
    if "checkpointing" in word:
        assert logged[1]["loss"] == known


def test_a_cached_reference_is_the_base(folder):
    cached, _ = train("cached", "reference=cached", steps=2)
    live, _ = train("live", steps=2)
    assert_same(adapters_of(cached), adapters_of(live))


def test_a_training_starts_from_a_trained_adapter(made, folder):
    trained, _ = RUNS["qwen3"]
    again, logged = train("again", f"adapter_checkpoint={made}/qwen3/epoch_0", "optimizer.lr=0", steps=1)
    assert logged[0]["loss"] < FIRST
    assert_same(adapters_of(again), adapters_of(trained))


def of_peft(folder, **settings):
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, **settings
    )
    model = peft.get_peft_model(hf_model("qwen3"), config)
    model.save_pretrained(folder, save_embedding_layers=False)
    return logits(model)


def test_a_training_starts_from_a_folder_of_peft(folder):
    expected = of_peft("of_peft")
    trainer, _ = train("mine", "adapter_checkpoint=of_peft", "optimizer.lr=0", steps=1)
    with torch.no_grad():
        torch.testing.assert_close(
            decoder_of(trainer.policy.model).logits(TOKENS), expected, rtol=0, atol=1e-5
        )


def test_an_adapter_of_another_base_is_refused_before_weights_are_read(made, folder, monkeypatch):
    shutil.copytree(made / "qwen3_base", "other_base")
    state = load_file("other_base/model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"] * 1.5
    save_file(state, "other_base/model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(models, "read_weights", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match="is an adapter of other weights than these"):
        train("mine", f"adapter_checkpoint={made}/qwen3/epoch_0", kind="other")
    with pytest.raises(ConfigError, match="set model.lora.rank=4"):
        train("mine", f"adapter_checkpoint={made}/qwen3/epoch_0", rank=2)
    with pytest.raises(ConfigError, match="resume_from_checkpoint"):
        train("mine", f"resume_from_checkpoint={made}/qwen3/checkpoints/step_2", kind="other")


def test_an_adapter_for_a_model_without_adapters_is_refused(made, folder):
    own = [w for w in words("qwen3_base", "mine") if "lora" not in w]
    cfg = load_config(["--config", "tiny/dpo", *own, *SHORT, f"adapter_checkpoint={made}/qwen3/epoch_0"])
    with pytest.raises(ConfigError, match=r"adapter_checkpoint: .*without adapters.*lora"):
        started(PreferenceTrainer(cfg))


def test_evaluation_of_an_adapter_over_its_base(made, folder):
    """As of the merged model, against the base."""

    def evaluate(name, base, *more, **lora):
        own = words(base, name, **lora)
        few = ("dataset.max_rows=8", "sampling.max_new_tokens=4")
        evaluator = Evaluator(load_config(["--config", "tiny/evaluate", *own, *few, *more]))
        try:
            return evaluator.run()
        finally:
            evaluator.close()

    adapter = (f"adapter_checkpoint={made}/qwen3/epoch_0", "ref_checkpointer=null")
    adapted = evaluate("adapted", "qwen3_base", *adapter, **SETTINGS)
    reference = (
        "ref_checkpointer=tokenpref.models.CausalLMCheckpointer", "ref_checkpointer.checkpoint_dir=qwen3_base",
        "~ref_checkpointer.checkpoint_files", "~ref_checkpointer.model_type",
    )  # fmt: skip
    merged = evaluate("merged", f"{made}/qwen3/epoch_0/merged", *reference)
    assert adapted["loss"] < FIRST and adapted["rewards/margins"] > 0
    for key in ("loss", "rewards/margins", "rewards/chosen", "kl_ref_policy/chosen"):
        assert adapted[key] == pytest.approx(merged[key], abs=1e-5), key


def test_a_pair_of_adapters_is_scored_for_a_store_and_inside_a_policy(folder):
    """The weights of OnlinePair are those of the store of the same pair."""
    own = words("qwen3_base", "pair", **SETTINGS)
    builder = ContrastiveReference(
        load_config(["--config", "tiny/contrastive_reference", *own, *SHORT[1:], "max_steps_per_epoch=2"])
    )
    try:
        pair = builder.run()
    finally:
        builder.close()
    for side in ("positive", "negative"):
        assert list(pair.glob(f"{side}/**/adapter_model.safetensors"))
        assert not list(pair.glob(f"{side}/**/model*.safetensors"))
    own = words("qwen3_base", "store", **SETTINGS)
    run = WeightEstimation(
        load_config(["--config", "tiny/estimate_weights", *own, "dataset.max_rows=24", "estimator.pair=pair"])
    )
    try:
        store = WeightStore.open(run.run())
    finally:
        run.close()
    assert any(abs(score) > 1e-3 for row in store for score in row.chosen.tolist())
    online = (
        "token_weights=tokenpref.training.OnlinePair",
        "~token_weights.path",
        "token_weights.pair=pair",
    )
    kwargs = {"config": "tiny/tis_dpo", "trainer": WeightedTrainer, "steps": 2}
    live, first = train("live", *online, **kwargs)
    known, second = train("known", "token_weights.path=store/weights", **kwargs)
    for one, two in zip(first, second, strict=True):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-6)
        assert one["weights/mean"] == pytest.approx(two["weights/mean"], abs=1e-6)
    assert first[0]["loss"] == FIRST and first[0]["weights/std"] > 0


def test_two_ranks_equal_one_process(folder):
    """A tied head, a bias, an NF4 base; LoRA and DoRA: weights and losses to 1e-6."""
    write_folder(folder / "wide_base", "qwen3", **WIDE)
    kinds = {
        "qwen3": {"use_dora": False},
        "qwen2": {"use_dora": True},
        "wide": {"use_dora": False, "quantize_base": True},
    }
    more = (*SHORT, "max_steps_per_epoch=2", "optimizer.eps=1e-4", "log_stats=[kl_ref_policy]")
    runs = [
        [*words(folder / f"{kind}_base", f"{{}}_{kind}", **SETTINGS, **lora), *more]
        for kind, lora in kinds.items()
    ]

    def of(place, *more):
        return [[word.replace("{}", str(folder / place)) for word in run] + list(more) for run in runs]

    one = workers.lora_trainings(WORLD, of("one", "batch_size=8"))
    two = run_distributed(workers.lora_trainings, of("two", "batch_size=4"))
    for alone, main_rank, other in zip(one, *two, strict=True):
        assert alone["losses"][0] == main_rank["losses"][0] == FIRST
        for rank in (main_rank, other):
            assert rank["losses"] == pytest.approx(alone["losses"], abs=1e-6)
        assert alone["adapters"].keys() == main_rank["adapters"].keys() and alone["adapters"]
        for name, values in alone["adapters"].items():
            assert values == pytest.approx(main_rank["adapters"][name], abs=1e-6), name
