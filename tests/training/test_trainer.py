"""The trainer in this process, on the tiny model: what changes the numbers and what must not."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tokenpref.errors import ConfigError, DataError, TrainingDiverged
from tokenpref.losses import DPOLoss
from tokenpref.models.reference import NoReference
from tokenpref.models.tiny import TINY_SIZES
from tokenpref.training import PreferenceTrainer
from tokenpref.training.config.command_line import load_config

NO_WATCH = ("log_stats=[]", "run_val_every_n_steps=null")
ONE_STEP = ("max_steps_per_epoch=1", *NO_WATCH)


def train(*overrides, config="tiny/tdpo", setup_only=False):
    """Train a tiny config with overrides; returns the trainer."""
    trainer = PreferenceTrainer(load_config(["--config", config, *overrides]))
    try:
        trainer.setup()
        if not setup_only:
            trainer.train()
    finally:
        trainer.close()
    return trainer


@pytest.fixture
def run(tmp_path, monkeypatch):
    """:func:`train` in a folder of the test."""
    monkeypatch.chdir(tmp_path)
    return train


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with the finished runs ``mine``, of two epochs, and ``other``; copy it."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train("output_dir=other", *ONE_STEP)
        train("output_dir=mine", "epochs=2", *ONE_STEP)
    return folder


def logged(folder):
    (file,) = (folder / "logs").glob("*.txt")
    lines = [line for line in file.read_text().splitlines() if line.startswith("Step")]
    return [{k: float(v) for k, v in re.findall(r"(\S+):(\S+)", line)} for line in lines]


def weights(folder, epoch=0):
    return load_file(folder / f"epoch_{epoch}" / "model-00001-of-00001.safetensors")


def test_activation_checkpointing_changes_no_bit(run, tmp_path):
    run("output_dir=plain")
    run("output_dir=recomputed", "enable_activation_checkpointing=true")
    for name, tensor in weights(tmp_path / "plain").items():
        assert tensor.equal(weights(tmp_path / "recomputed")[name]), name


def test_the_head_memory_changes_no_number(run, tmp_path):
    run("output_dir=whole")
    run("output_dir=lean", "head_memory_mb=0.01")
    for one, other in zip(logged(tmp_path / "whole"), logged(tmp_path / "lean"), strict=True):
        for name in one.keys() - {"tokens_per_second", "time/step"}:
            assert other[name] == one[name], name


def test_accumulation_equals_the_larger_batch(run, tmp_path):
    run("output_dir=large", "batch_size=8", "max_steps_per_epoch=3")
    run("output_dir=small", "batch_size=2", "gradient_accumulation_steps=4", "max_steps_per_epoch=3")
    large, small = ([m["loss"] for m in logged(tmp_path / f) if "loss" in m] for f in ("large", "small"))
    assert small == pytest.approx(large, abs=2e-5)


@pytest.mark.parametrize("padding_free", ["true", "false"])
def test_cutting_a_step_by_tokens_changes_only_rounding(run, tmp_path, padding_free):
    # An embedding's gradient is 1.6e-9 in the first step, less than AdamW's own eps: its rounding would be a part of the rate.
    run("output_dir=whole", "batch_size=8", "optimizer.eps=1e-5")
    words = ("tokens_per_batch=130", f"padding_free={padding_free}", "optimizer.eps=1e-5")
    run("output_dir=cut", "batch_size=8", *words)
    for name, tensor in weights(tmp_path / "whole").items():
        torch.testing.assert_close(
            weights(tmp_path / "cut")[name], tensor, atol=2e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    for whole, cut in zip(logged(tmp_path / "whole"), logged(tmp_path / "cut"), strict=True):
        assert cut.keys() == whole.keys()
        for name in ("loss", "eval_loss", "num_tokens"):
            assert cut.get(name) == pytest.approx(whole.get(name), abs=1e-5)


def test_padding_changes_only_rounding(run, tmp_path):
    run("output_dir=free")
    run("output_dir=padded", "padding_free=false")
    for name, tensor in weights(tmp_path / "free").items():
        torch.testing.assert_close(weights(tmp_path / "padded")[name], tensor, atol=2e-6, rtol=1e-4)


def test_a_pair_that_fits_no_micro_batch_is_refused(run, tmp_path):
    with pytest.raises(
        ConfigError, match=r"tokens_per_batch: 12, and a pair of dataset has (\d+) tokens; set at least \1"
    ):
        run("output_dir=out", "tokens_per_batch=12")
    assert not (tmp_path / "out").exists()


def test_bfloat16_trains_close_to_float32_and_writes_bfloat16(run, tmp_path):
    run("output_dir=full")
    trainer = run("output_dir=half", "dtype=bf16")
    rope = [m for m in trainer.policy.model.modules() if hasattr(m, "rope_init")]
    assert rope and all(m.cache.dtype == torch.float32 for m in rope)  # rounding it would turn positions
    full, half = ([m["loss"] for m in logged(tmp_path / f) if "loss" in m] for f in ("full", "half"))
    assert half[0] == pytest.approx(0.6931472, abs=1e-6)
    assert half == pytest.approx(full, abs=0.05)
    assert all(t.dtype == torch.bfloat16 for t in weights(tmp_path / "half").values())


def test_dropout_of_the_model_is_switched_off(run, tmp_path):
    run("output_dir=plain", "max_steps_per_epoch=3")
    sizes = {
        **TINY_SIZES,
        "max_seq_len": 256,
        "scale_factor": 1,
        "tie_word_embeddings": True,
        "attn_dropout": 0.5,
    }
    words = [f"model.{name}={value}" for name, value in sizes.items()]
    run(
        "output_dir=dropped",
        "max_steps_per_epoch=3",
        "model._component_=torchtune.models.llama3_2.llama3_2",
        *words,
    )
    for name, tensor in weights(tmp_path / "plain").items():
        assert tensor.equal(weights(tmp_path / "dropped")[name]), name


def test_asked_statistics_are_logged_and_change_nothing(run, tmp_path):
    run("output_dir=plain", config="tiny/dpo")
    run("output_dir=more", "log_stats=[kl_ref_policy,kl_policy_ref,entropy]", config="tiny/dpo")
    plain, more = logged(tmp_path / "plain"), logged(tmp_path / "more")
    assert {"entropy/chosen", "kl_policy_ref/margin"} <= more[0].keys() - plain[0].keys()
    for one, other in zip(plain, more, strict=True):
        if "loss" in one:
            assert other["loss"] == pytest.approx(one["loss"], abs=1e-6)


def test_a_log_line_covers_the_steps_since_the_last(run, tmp_path):
    run("output_dir=each", "run_val_every_n_steps=null")
    run("output_dir=third", "log_every_n_steps=3", "run_val_every_n_steps=null")
    each, third = logged(tmp_path / "each"), logged(tmp_path / "third")
    means = [sum(m["loss"] for m in each[i:j]) / (j - i) for i, j in ((0, 3), (3, 6), (6, 8))]
    assert [m["loss"] for m in third] == pytest.approx(means, abs=1e-6)
    assert third[-1]["num_tokens"] == each[-1]["num_tokens"]


def test_continuing_after_a_stop_gives_the_same_bits(run, tmp_path, monkeypatch):
    words = (
        "epochs=2",
        "checkpoint_every_n_steps=3",
        "lr_scheduler._component_=torchtune.training.get_cosine_schedule_with_warmup",
        "lr_scheduler.num_warmup_steps=2",
    )
    run("output_dir=whole", *words)
    step = PreferenceTrainer._step

    def stop_at_eight(self):
        if self.progress.step == 8:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(PreferenceTrainer, "_step", stop_at_eight)
    with pytest.raises(KeyboardInterrupt):
        run("output_dir=stopped", *words)
    monkeypatch.setattr(PreferenceTrainer, "_step", step)
    assert [p.name for p in (tmp_path / "stopped" / "checkpoints").glob("step_*")] == ["step_6"]
    trainer = run("output_dir=stopped", *words, "resume_from_checkpoint=true")
    assert trainer.progress.step == 16
    for name, tensor in weights(tmp_path / "whole", 1).items():
        assert tensor.equal(weights(tmp_path / "stopped", 1)[name]), name


def test_profiler_writes_a_trace(run, tmp_path):
    run("output_dir=traced", "profiler.enabled=true", "profiler.wait_steps=1", "profiler.warmup_steps=1")
    assert any((tmp_path / "traced" / "profiling_outputs").rglob("*trace.json*"))


def test_a_run_goes_on_with_a_config_that_leaves_defaults_out(run, tmp_path, caplog):
    full = (
        "padding_free=true", "keep_last=1", "tokens_per_batch=null", "loss.variant=tdpo2", "optimizer.amsgrad=false",
        "dataset.append_eos=auto", "dataset_val.append_eos=auto", "profiler.enabled=false",
    )  # fmt: skip
    words = ("max_steps_per_epoch=2", *NO_WATCH)
    run("output_dir=whole", "epochs=2", *words)
    run("output_dir=mine", *words, *full)
    with caplog.at_level("INFO", logger="tokenpref"):
        run("output_dir=mine", "epochs=2", "resume_from_checkpoint=auto", *words)
    changed = [line for line in caplog.messages if "another setting" in line]
    assert changed == ["continuing with another setting: epochs is 2 and was 1; the new value is used"]
    for name, tensor in weights(tmp_path / "whole", 1).items():
        assert tensor.equal(weights(tmp_path / "mine", 1)[name]), name


class LaterNaN(torch.nn.Module):
    """DPO that breaks for rows whose chosen answer has an odd number of tokens, from the third step on."""

    needs = frozenset({"ref"})

    def __init__(self):
        super().__init__()
        self.inner, self.calls = DPOLoss(), 0

    def forward(self, pair):
        self.calls += 1
        output = self.inner(pair)
        odd = pair.chosen.mask.sum(-1) % 2 == 1
        return replace(output, losses=torch.where(odd & (self.calls > 2), torch.nan, output.losses))


def test_a_run_that_diverges_keeps_the_rows(run, tmp_path):
    with pytest.raises(
        TrainingDiverged, match=r"^step 3: the loss of rows .*kept in .*diverged\.json"
    ) as caught:
        run("output_dir=mine", f"loss={__name__}.LaterNaN", "checkpoint_every_n_steps=2", *NO_WATCH)
    kept = json.loads((tmp_path / "mine/diverged.json").read_text())
    assert kept["step"] == 3 and kept["not_finite"] == caught.value.bad_rows and len(kept["rows"]) == 8
    row, place = next(iter(kept["rows"].items()))
    assert place.endswith(f"train.jsonl, row {row} (line {int(row) + 1})")
    assert (tmp_path / "mine/checkpoints/step_2/manifest.json").is_file()


def test_the_same_config_may_run_again_but_not_another(run, tmp_path):
    run("output_dir=mine", setup_only=True)  # stopped before it saved anything
    first = json.loads((tmp_path / "mine" / "run.json").read_text())
    run("output_dir=mine")
    assert json.loads((tmp_path / "mine" / "run.json").read_text())["id"] != first["id"]
    with pytest.raises(ConfigError, match="holds another run"):
        run("output_dir=mine", "optimizer.lr=0.01")
    assert weights(tmp_path / "mine")


def content(folder):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("overrides", "mend"),
    [
        ((), "resume_from_checkpoint=auto"),
        (("epochs=1",), "resume_from_checkpoint=auto"),  # shorter, but the same computation
        (("epochs=3",), "resume_from_checkpoint=auto"),
        (("resume_from_checkpoint=other",), "resume_from_checkpoint=auto"),
        (("dry_run=true",), "resume_from_checkpoint=auto"),
        (("optimizer.lr=0.01",), "another output_dir"),
    ],
)
def test_a_finished_run_is_never_replaced(run, tmp_path, finished, overrides, mend):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    (tmp_path / "mine/epoch_7").mkdir()
    (tmp_path / "mine/epoch_7/note").write_text("the user's own")
    before = content(tmp_path / "mine")
    with pytest.raises(ConfigError, match=rf"mine holds .*set {mend}|holds another run .*set {mend}"):
        run("output_dir=mine", *ONE_STEP, "epochs=2", *overrides)
    assert content(tmp_path / "mine") == before


@pytest.mark.parametrize("left", ["epoch_0", "best", "checkpoints/step_3"])
def test_results_of_anybody_are_not_replaced(run, tmp_path, left):
    """Neither of a run that did not end, nor of another program."""
    (tmp_path / "mine" / left).mkdir(parents=True)
    with pytest.raises(
        ConfigError, match=rf"mine holds results of a run \({left}\), which would be replaced"
    ):
        run("output_dir=mine", *NO_WATCH)
    with pytest.raises(ConfigError, match="mine holds results of a run"):
        run("output_dir=mine", "resume_from_checkpoint=auto", *NO_WATCH)
    assert [p.relative_to(tmp_path / "mine").as_posix() for p in (tmp_path / "mine").rglob("*")][-1] == left


def test_a_finished_run_goes_on_from_its_end(run, tmp_path, caplog):
    words = ("max_steps_per_epoch=3", *NO_WATCH)
    run("output_dir=mine", *words)
    end = weights(tmp_path / "mine")
    with caplog.at_level("INFO", logger="tokenpref"):
        run("output_dir=mine", *words, "epochs=3", "resume_from_checkpoint=auto")
    assert "continuing after step 3 of 9" in caplog.text and "again" not in caplog.text
    assert all(tensor.equal(weights(tmp_path / "mine")[name]) for name, tensor in end.items())
    run("output_dir=whole", *words, "epochs=3")
    for name, tensor in weights(tmp_path / "whole", 2).items():
        assert tensor.equal(weights(tmp_path / "mine", 2)[name]), name
    with pytest.raises(ConfigError, match="stands after step 9 and this run has 3; set epochs"):
        run("output_dir=mine", *words, "resume_from_checkpoint=auto")
    before = weights(tmp_path / "mine", 2)
    shutil.rmtree(tmp_path / "mine/epoch_2")
    run("output_dir=mine", *words, "epochs=3", "resume_from_checkpoint=auto")  # nothing is left to train
    assert all(tensor.equal(weights(tmp_path / "mine", 2)[name]) for name, tensor in before.items())
    assert json.loads((tmp_path / "mine/finished.json").read_text())["weights"] == "epoch_2"


def test_a_finished_run_without_its_last_checkpoint_says_what_it_trains_again(run, tmp_path, caplog):
    words = ("max_steps_per_epoch=3", "checkpoint_every_n_steps=2", "keep_last=2", *NO_WATCH)
    run("output_dir=mine", *words)
    shutil.rmtree(tmp_path / "mine/checkpoints/step_3")
    with caplog.at_level("INFO", logger="tokenpref"):
        run("output_dir=mine", *words, "epochs=2", "resume_from_checkpoint=auto")
    assert (
        "finished run without a checkpoint of its end: what it trained after step_2 is trained again"
        in caplog.text
    )


def test_going_back_moves_later_checkpoints_aside(run, tmp_path, caplog):
    words = ("max_steps_per_epoch=4", "checkpoint_every_n_steps=2", "keep_last=2", *NO_WATCH)
    run("output_dir=mine", *words)
    back = ("output_dir=mine", *words, "resume_from_checkpoint=mine/checkpoints/step_2")
    with caplog.at_level("INFO", logger="tokenpref"):
        run(
            *back, setup_only=True
        )  # stopped at once: the end that was left behind is not the newest any more
    assert "step_4 is later than step_2, from which this run resumes; moved to step_4.former1" in caplog.text
    assert sorted(p.name for p in (tmp_path / "mine/checkpoints").glob("step_*")) == [
        "step_2",
        "step_4.former1",
    ]
    assert run(*back).progress.step == 4


def test_a_damaged_later_checkpoint_pushes_no_good_one_out(run, tmp_path):
    words = ("max_steps_per_epoch=4", "checkpoint_every_n_steps=1", "keep_last=2", *NO_WATCH)
    run("output_dir=mine", *words)
    (tmp_path / "mine/checkpoints/step_4/manifest.json").unlink()
    (tmp_path / "mine/checkpoints/step_4").rename(tmp_path / "mine/checkpoints/step_9")
    run("output_dir=mine", *words, "resume_from_checkpoint=auto")
    names = sorted(p.name for p in (tmp_path / "mine/checkpoints").glob("step_*"))
    assert names == ["step_3", "step_4", "step_9"]


def test_resume_without_a_checkpoint_says_where_it_looked(run, tmp_path):
    with pytest.raises(ConfigError, match=r"no checkpoint that can be read in .*nothing_here"):
        run("output_dir=nothing_here", "resume_from_checkpoint=true")
    assert not (tmp_path / "nothing_here").exists()


def test_sequences_longer_than_the_context_are_refused_before_training(run, tmp_path):
    with pytest.raises(
        ConfigError, match=r"dataset: the longest sequence has \d+ tokens and the model's context is 8"
    ):
        run("output_dir=long", "model.max_seq_len=8")
    assert not (tmp_path / "long").exists()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"prompt": "a", "chosen": " b"}, "rejected"),
        ({"prompt": "a", "chosen": " b", "rejected": " b"}, "chosen equals rejected|equal"),
        ({"prompt": "a", "chosen": " b", "rejected": ""}, "no answer"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_written(run, tmp_path, row, words):
    good = {"prompt": "a", "chosen": " b", "rejected": " c"}
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (good, row)))
    with pytest.raises(DataError, match=r"(?s)bad\.jsonl.*(" + words + ")"):
        run("output_dir=bad", "dataset.source=bad.jsonl")
    assert not (tmp_path / "bad").exists()


def test_validation_samples_and_has_a_loss_of_its_own(run, tmp_path):
    run(
        "output_dir=watched",
        "loss_val._component_=tokenpref.losses.DPOLoss",
        "loss_val.beta=0.3",
        "log_stats_val=[kl_policy_ref]",
        "sampling.prompts=package://data/tiny/openings.txt",
        "sampling.reward._component_=tokenpref.rewards.KeywordReward",
        "sampling.reward.positive=[e]",
        "sampling.reward.negative=[o]",
        "sampling.num_samples=2",
        "sampling.max_new_tokens=4",
        "max_steps_per_epoch=4",
    )
    (held_out,) = [line for line in logged(tmp_path / "watched") if "eval_loss" in line]
    assert {"eval_kl_policy_ref/chosen", "eval_reward", "eval_reward_low", "eval_sample_tokens"} <= set(
        held_out
    )
    assert "eval_kl_ref_policy/chosen" not in held_out  # TDPO's own statistic, which DPO does not ask for
    samples = (tmp_path / "watched" / "samples" / "step_4.jsonl").read_text().splitlines()
    rewards = [json.loads(line)["reward"] for line in samples]
    assert held_out["eval_reward"] == pytest.approx(sum(rewards) / len(rewards))
    run("output_dir=unwatched", "max_steps_per_epoch=4")
    for name, tensor in weights(tmp_path / "watched").items():  # watching changes nothing
        assert tensor.equal(weights(tmp_path / "unwatched")[name]), name


def test_a_likelihood_loads_no_reference(run, tmp_path):
    trainer = run("output_dir=sft", "loss=tokenpref.losses.NLLLoss", *NO_WATCH, config="tiny/dpo")
    assert isinstance(trainer.reference, NoReference)
    losses = [line["loss"] for line in logged(tmp_path / "sft") if "loss" in line]
    assert losses[-1] < losses[0]


def test_a_finished_run_says_so(run, tmp_path):
    trainer = run("output_dir=done", "max_steps_per_epoch=2", "epochs=2")
    assert trainer.folder.finished() == tmp_path / "done" / "epoch_1"
    longer = ("max_steps_per_epoch=2", "epochs=3", "resume_from_checkpoint=auto")
    again = run("output_dir=done", *longer, setup_only=True)
    assert again.folder.finished() is None  # it goes on, so it is not
    assert run("output_dir=done", *longer).folder.finished() == tmp_path / "done" / "epoch_2"
