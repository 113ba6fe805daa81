"""Training with adapters: what trains, what the reference is, what checkpoints hold, and which of them are refused."""

import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import small, workers
from torch.distributed.checkpoint import FileSystemReader

from tokenpref._paths import data_root
from tokenpref._torchtune import tune_to_hf
from tokenpref.data import WeightStore
from tokenpref.distributed import single_process_world
from tokenpref.distributed.testing import run_distributed
from tokenpref.errors import ConfigError, DryRun
from tokenpref.models.adapters import adapter_names, adapter_state, base_tensors, merged
from tokenpref.models.peft_format import AdapterLayout, Base, write_adapter
from tokenpref.models.reference import CachedReference
from tokenpref.training import (
    ContrastiveReference,
    Evaluator,
    PreferenceTrainer,
    TripletTrainer,
    WeightedTrainer,
    WeightEstimation,
)
from tokenpref.training.config.command_line import load_config
from tokenpref.training.loading import models

WORLD = single_process_world()
TINY = data_root() / "data" / "tiny" / "model"
LORA = (
    "model._component_=tokenpref.models.lora_tiny_llama", "model.lora_attn_modules=[q_proj,v_proj]", "model.lora_rank=4",
    "model.lora_alpha=8", "model.apply_lora_to_mlp=true", "run_val_every_n_steps=null", "optimizer.lr=0.01",
)  # fmt: skip
DORA = (*LORA, "model.use_dora=true")
KINDS = pytest.mark.parametrize("words", [LORA, DORA], ids=["lora", "dora"])
FIRST = float(torch.tensor(2.0).log())


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(name, *words, config="tiny/dpo", trainer=PreferenceTrainer, steps=2):
    """A training that is over, and its metrics by step."""
    made = trainer(
        load_config(["--config", config, *words, f"max_steps_per_epoch={steps}", f"output_dir={name}"])
    )
    logged = []
    made._log = logged.append
    try:
        made.setup()
        made.train()
    finally:
        made.close()
    return made, logged


def adapters_of(trainer):
    return adapter_state(trainer.policy.model, WORLD)


def assert_same(one, two):
    assert one.keys() == two.keys() and one
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


@KINDS
def test_a_run_trains_its_adapters_alone_against_its_own_base(words, monkeypatch):
    read = []
    monkeypatch.setattr(
        models, "read_weights", lambda *a, own=models.read_weights: read.append(a[1]) or own(*a)
    )
    trainer, logged = run("mine", *words, "log_stats=[kl_ref_policy]")
    assert read == ["checkpointer"]
    assert trainer.reference.scorer.model is trainer.policy.model
    assert logged[0]["loss"] == FIRST and logged[0]["rewards/chosen"] == 0 and logged[1]["loss"] < FIRST
    base = load_file(TINY / "model.safetensors")
    own = trainer.policy.model.state_dict()
    assert torch.equal(own["tok_embeddings.weight"], base["model.embed_tokens.weight"])
    assert torch.equal(own["layers.1.mlp.w1.weight"], base["model.layers.1.mlp.gate_proj.weight"])
    for name, tensor in adapters_of(trainer).items():
        assert tensor.any(), name
    held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(held) == len(adapter_names(trainer.policy.model))


@KINDS
def test_a_checkpoint_holds_adapters_alone_and_resumes_to_the_same_bits(words):
    whole, curve = run("whole", *words, "checkpoint_every_n_steps=2", "keep_last=2", steps=4)
    kept = FileSystemReader("whole/checkpoints/step_2").read_metadata().state_dict_metadata
    named = {name.removeprefix("model.") for name in kept if name.startswith("model.")}
    assert named == set(adapter_names(whole.policy.model))
    resumed, rest = run("parts", *words, "resume_from_checkpoint=whole/checkpoints/step_2", steps=4)
    assert_same(adapters_of(resumed), adapters_of(whole))
    assert [m["loss"] for m in rest] == [m["loss"] for m in curve[2:]]


def other_base(folder):
    shutil.copytree(TINY, folder / "other")
    state = load_file(folder / "other" / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"] * 1.5
    save_file(state, folder / "other" / "model.safetensors", metadata={"format": "pt"})


def test_resuming_with_another_base_or_other_adapters_is_refused(folder):
    other_base(folder)
    run("mine", *LORA)

    def resume(*words, adapters=LORA):
        with pytest.raises(ConfigError) as caught:
            run("other_run", *adapters, *words, "resume_from_checkpoint=mine/checkpoints/step_2")
        return str(caught.value)

    assert "base is" in resume("checkpointer.checkpoint_dir=other")
    for word, said in (
        ("model.lora_rank=2", "'rank': 2"),
        ("model.lora_alpha=4", "'alpha': 4.0"),
        ("model.lora_attn_modules=[k_proj]", "'targets': ['k_proj'"),
        ("model.use_dora=true", "'dora': True"),
    ):
        text = resume(word)
        assert "adapters is {" in text and said in text and "set model as it was" in text
    assert "adapters is None and was {" in resume(adapters=("run_val_every_n_steps=null",))


def test_a_second_model_is_the_reference_only_if_it_is_asked_for(folder):
    other_base(folder)
    trainer, logged = run(
        "mine",
        *LORA,
        "ref_checkpointer=torchtune.training.FullModelHFCheckpointer",
        "ref_checkpointer.checkpoint_dir=other",
        "ref_checkpointer.checkpoint_files=[model.safetensors]",
        "ref_checkpointer.model_type=LLAMA3_2",
        "ref_checkpointer.output_dir=mine",
    )
    reference = trainer.reference.scorer
    assert reference.model is not trainer.policy.model and reference.is_base
    assert reference.model.norm.scale[0] == pytest.approx(1.5 * float(trainer.policy.model.norm.scale[0]))
    assert logged[0]["loss"] != FIRST


@pytest.mark.parametrize("stats", ["[]", "[kl_ref_policy]"])
@KINDS
def test_a_cached_reference_is_the_base(words, stats):
    with_model, curve = run("model", *words, f"log_stats={stats}")
    cached, same = run("cached", *words, "reference=cached", f"log_stats={stats}")
    assert isinstance(cached.reference, CachedReference)
    assert same[0]["loss"] == FIRST
    assert [m["loss"] for m in same] == [m["loss"] for m in curve]
    assert_same(adapters_of(cached), adapters_of(with_model))


@pytest.mark.parametrize(
    "more",
    [
        ("enable_activation_checkpointing=true",),
        ("compute_dtype=bf16",),
        ("dtype=bf16", "optimizer.lr=0.01"),
        ("padding_free=false",),
        ("tokens_per_batch=256",),
    ],
    ids=lambda more: more[0],
)
@KINDS
def test_the_first_loss_is_log_two_however_the_model_computes(words, more):
    _, logged = run("mine", *words, "log_stats=[kl_ref_policy,kl_policy_ref]", *more, steps=2)
    assert logged[0]["loss"] == FIRST and logged[0]["rewards/margins"] == 0
    assert logged[1]["loss"] != FIRST


def test_token_weights_anchors_and_samples_with_adapters():
    """Attribution of the base, anchors that the policy samples, and two prompts on the base."""
    for model in ("policy", "reference"):
        _, logged = run(
            f"ti_{model}", *LORA, f"token_weights.model={model}", config="tiny/ti_dpo", trainer=TripletTrainer
        )
        assert math.isfinite(logged[-1]["loss"])
    prompts = (
        "token_weights=tokenpref.training.OnlinePrompts", "~token_weights.path", "token_weights.positive_prompt=Good.",
        "token_weights.negative_prompt=Bad.",
    )  # fmt: skip
    trainer, logged = run("tis", *LORA, *prompts, config="tiny/tis_dpo", trainer=WeightedTrainer)
    assert trainer.reference.scorer.model is trainer.policy.model and math.isfinite(logged[-1]["loss"])


def test_attribution_of_the_base_does_not_see_the_adapters():
    trained, _ = run(
        "one", *LORA, "token_weights.model=reference", config="tiny/ti_dpo", trainer=TripletTrainer
    )
    plain, _ = run(
        "two", "run_val_every_n_steps=null", "token_weights.model=reference", "optimizer.lr=0", config="tiny/ti_dpo",
        trainer=TripletTrainer,
    )  # fmt: skip
    from tokenpref.training.step.batches import pair_batches

    batches = [
        pair_batches(
            t.dataset, t.world, pad_id=t.tokenizer.pad_id, step=0, batch_size=4, accumulation=1, seed=0, epoch=0, shuffle=False
        )[0]
        for t in (trained, plain)
    ]  # fmt: skip
    weights = [t.weigh(batch).weights for t, batch in zip((trained, plain), batches, strict=True)]
    torch.testing.assert_close(*weights)


def test_a_pair_of_trainings_with_adapters():
    built = ContrastiveReference(
        load_config(
            [
                "--config",
                "tiny/contrastive_reference",
                *LORA,
                "method=dpo",
                "max_steps_per_epoch=2",
                "output_dir=pair",
            ]
        )
    )
    try:
        assert (built.run() / "pair.yaml").is_file()
    finally:
        built.close()


def trained_adapter(folder, words=LORA, base=None):
    """A folder in PEFT's format with a trained adapter, and the training that it is from."""
    trainer, _ = run("trained", *words, steps=4)
    model = trainer.policy.model
    folder.mkdir()
    write_adapter(
        folder, adapters_of(trainer), AdapterLayout.of(model), base or Base.of(TINY, ["model.safetensors"])
    )
    return trainer


@KINDS
def test_a_training_starts_from_a_trained_adapter(folder, words):
    before = trained_adapter(folder / "adapter", words)
    after, logged = run("mine", *words, "adapter_checkpoint=adapter", "optimizer.lr=0")
    assert_same(adapters_of(after), adapters_of(before))
    assert logged[0]["loss"] != FIRST and logged[0]["rewards/margins"] != 0


def test_evaluation_of_an_adapter_over_its_base(folder):
    """The policy is the base with the adapter, and the reference the base: no further model is loaded."""
    trainer = trained_adapter(folder / "adapter")

    def evaluate(name, *words):
        made = Evaluator(
            load_config(["--config", "tiny/evaluate", *words, "dataset.max_rows=8", f"output_dir={name}"])
        )
        try:
            return made.run()
        finally:
            made.close()

    model = [word for word in LORA if word.startswith("model.")]
    lean = ("ref_checkpointer=null", "sampling.max_new_tokens=4")
    new, adapted = (
        evaluate("new", *model, *lean),
        evaluate("adapted", *model, *lean, "adapter_checkpoint=adapter"),
    )
    assert new["loss"] == FIRST and new["rewards/margins"] == 0
    assert adapted["loss"] < FIRST and adapted["rewards/margins"] > 0
    # The same weights in a model without adapters, against the same base.
    plain = ["model._component_=tokenpref.models.tiny_llama", "checkpointer.checkpoint_dir=whole"]
    shutil.copytree(TINY, folder / "whole")
    save_file(
        tune_to_hf(
            {k: v.detach() for k, v in merged(trainer.policy.model.state_dict(), trainer.policy.model).items()},
            num_heads=4, num_kv_heads=2, dim=32,
        ),
        folder / "whole" / "model.safetensors", metadata={"format": "pt"},
    )  # fmt: skip
    whole = evaluate("merged", *plain, "sampling.max_new_tokens=4")
    for key in ("loss", "rewards/margins", "rewards/chosen", "kl_ref_policy/chosen"):
        if key in whole:
            assert adapted[key] == pytest.approx(whole[key], abs=1e-5), key
    assert adapted["num_samples"] == whole["num_samples"]


def test_estimation_by_attribution_of_an_adapter(folder):
    """A store for the base, for new adapters, which change nothing, and for a trained adapter."""
    trained_adapter(folder / "adapter")

    def store(name, *words):
        config = ["--config", "tiny/estimate_weights_attribution", *words, "dataset.max_rows=8"]
        made = WeightEstimation(load_config([*config, f"output_dir={name}"]))
        try:
            return WeightStore.open(made.run())
        finally:
            made.close()

    model = [word for word in LORA if word.startswith("model.")]
    stores = [
        store("plain"), store("new", *model), store("trained", *model, "adapter_checkpoint=adapter"),
    ]  # fmt: skip
    plain, new, adapted = ([row.chosen for row in found] for found in stores)
    assert all((a == b).all() for a, b in zip(plain, new, strict=True))
    assert not any((a == b).all() for a, b in zip(plain, adapted, strict=True))


def test_adapters_of_another_base_or_rank_are_refused_before_weights_are_read(folder, monkeypatch):
    other_base(folder)
    trained_adapter(folder / "adapter", base=Base.of(folder / "other", ["model.safetensors"]))
    monkeypatch.setattr(models, "read_weights", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match="adapter_checkpoint: .* is an adapter of other weights"):
        run("mine", *LORA, "adapter_checkpoint=adapter")
    with pytest.raises(ConfigError, match=r"adapter_checkpoint: .* rank 4 .*lora_rank=4"):
        run("mine", *LORA, "adapter_checkpoint=adapter", "model.lora_rank=2")


def test_a_dry_run_counts_what_trains(caplog):
    caplog.set_level("INFO", logger="tokenpref")
    full = PreferenceTrainer(load_config(["--config", "tiny/dpo", "output_dir=full", "dry_run=true"]))
    with pytest.raises(DryRun):
        full.setup()
    assert "trainable parameters" not in caplog.text and "reference " in caplog.text
    caplog.clear()
    trainer = PreferenceTrainer(
        load_config(["--config", "tiny/dpo", *LORA, "output_dir=mine", "dry_run=true"])
    )
    with pytest.raises(DryRun):
        trainer.setup()
    # Of each layer (32 wide): q 4 x (32 + 32), v 4 x (32 + 16), three of the MLP 4 x (32 + 64) each.
    count = 2 * 4 * (64 + 48 + 3 * 96)
    assert f"trainable parameters: {count:,} of " in caplog.text
    memory = next(line for line in caplog.messages if line.startswith("memory"))
    assert f"gradients {count * 4 / 2**20:.1f} MiB" in memory and "reference" not in memory
    assert not Path("mine").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("model.lora_attn_modules=[q_proj,o_proj]",), "lora_attn_modules: 'o_proj' fits no module"),
        (("model.lora_attn_modules=[]",), "lora_attn_modules: names no layer"),
        (("model.lora_rank=0",), "model.lora_rank: is 0.*at least 1"),
        (("model.lora_rank=-2",), "model.lora_rank: is -2.*at least 1"),
        (("model.lora_alpha=0",), "model.lora_alpha: is 0"),
        (("model.quantize_base=true",), "NF4.*quantize_base=false"),
        (("model._component_=torchtune.models.llama3_1.lora_llama3_1_8b", "model.apply_lora_to_output=true"),
         "apply_lora_to_output.*false"),
        (("adapter_checkpoint=nowhere",), "adapter_checkpoint: no folder at"),
        (("enable_fp8_training=true", "fp8_emulate=true"), "enable_fp8_training: the model has adapters"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[-1],
)  # fmt: skip
def test_what_cannot_be_trained_is_one_error_before_weights_are_read(words, said, monkeypatch):
    monkeypatch.setattr(models, "read_weights", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match=said):
        run("mine", *LORA, *words)


def test_an_adapter_for_a_model_without_adapters_is_refused():
    with pytest.raises(ConfigError, match=r"adapter_checkpoint.*without adapters; name a lora_ builder"):
        run("mine", "run_val_every_n_steps=null", "adapter_checkpoint=.")


@KINDS
def test_two_ranks_equal_one_process(words):
    """Two steps of DPO with the same pairs, weights and losses to 1e-6."""
    settings = [*words, "max_steps_per_epoch=3", "optimizer.eps=1e-4", "log_stats=[kl_ref_policy]"]
    one = workers.lora_training(WORLD, [*settings, "batch_size=8", "output_dir=one"])
    two = run_distributed(
        workers.lora_training, [*settings, "batch_size=4", f"output_dir={Path('two').absolute()}"]
    )
    assert one["losses"][0] == two[0]["losses"][0] == FIRST
    for rank in two:
        assert rank["losses"] == pytest.approx(one["losses"], abs=1e-6)
    assert one["adapters"].keys() == two[0]["adapters"].keys() and one["adapters"]
    for name, values in one["adapters"].items():
        assert values == pytest.approx(two[0]["adapters"][name], abs=1e-6), name


@pytest.fixture(scope="module")
def nf4_base(tmp_path_factory):
    """Weights under torchtune's names, for a decoder that stores them in NF4."""
    with torch.device("meta"):
        tensors = base_tensors(small.nf4_llama())
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path_factory.mktemp("nf4")
    state = {
        name: torch.ones(tensor.shape)
        if tensor.dim() == 1
        else torch.randn(tensor.shape, generator=generator) / 8
        for name, tensor in tensors.items()
    }
    torch.save(state, folder / "base.pt")
    return folder


def nf4(base, dora):
    return [
        "model._component_=support.small.nf4_llama", f"model.use_dora={dora}", "run_val_every_n_steps=null",
        "checkpointer._component_=torchtune.training.FullModelTorchTuneCheckpointer",
        f"checkpointer.checkpoint_dir={base}", "checkpointer.checkpoint_files=[base.pt]", "optimizer.lr=0.01",
        "optimizer.eps=1e-4", "log_stats=[kl_ref_policy]",
    ]  # fmt: skip


def test_what_a_quantised_base_cannot_do_is_refused_before_weights_are_read(nf4_base, monkeypatch):
    monkeypatch.setattr(models, "read_weights", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match="compute_dtype: is bf16.*set compute_dtype=null and dtype=bf16"):
        run("mine", *nf4(nf4_base, "false"), "compute_dtype=bf16")
    with pytest.raises(ConfigError, match="save_adapter_weights_only: is false.*quantised base"):
        run("mine", *nf4(nf4_base, "false"), "save_adapter_weights_only=false")
    with pytest.raises(
        AssertionError, match="4 groups of 16,384 numbers in 256 rows, which cannot be shared by 3"
    ):
        run_distributed(workers.lora_training, [*nf4(nf4_base, "false"), "output_dir=mine"], size=3)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_two_ranks_equal_one_process_with_an_nf4_base(nf4_base, dora, caplog):
    caplog.set_level("INFO", logger="tokenpref")
    settings = [
        *nf4(nf4_base, str(dora).lower()),
        "max_steps_per_epoch=3",
        "checkpoint_every_n_steps=2",
        "keep_last=2",
    ]
    one = workers.lora_training(WORLD, [*settings, "batch_size=8", "output_dir=one"])
    # Of 14 matrices of 65,536 numbers each half a byte, and scales; embeddings, norms and adapters are float32.
    plain = 4 * (384 * 256 + 5 * 256 + 2 * 5 * 4 * 512) + dora * 4 * 2 * 5 * 256
    memory = next(line for line in caplog.messages if line.startswith("memory"))
    weights = float(re.search(r"weights ([0-9.]+) MiB", memory)[1])
    assert weights == pytest.approx((plain + 1.04 * 14 * 65536 / 2) / 2**20, abs=0.06)
    two = run_distributed(
        workers.lora_training, [*settings, "batch_size=4", f"output_dir={Path('two').absolute()}"]
    )
    assert one["losses"][0] == two[0]["losses"][0] == FIRST and one["losses"][2] < FIRST
    for rank in two:
        assert rank["losses"] == pytest.approx(one["losses"], abs=1e-6)
    for name, values in one["adapters"].items():
        assert values == pytest.approx(two[0]["adapters"][name], abs=1e-6), name
    resumed = workers.lora_training(
        WORLD,
        [*settings, "batch_size=8", "output_dir=resumed", "resume_from_checkpoint=one/checkpoints/step_2"],
    )
    assert resumed["losses"] == one["losses"][2:]
    for name, values in one["adapters"].items():
        assert (values == resumed["adapters"][name]).all(), name
