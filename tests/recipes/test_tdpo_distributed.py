"""The commands that users type, away from the repository."""

import json
import re
import shutil

import pytest
from support.commands import TUNE, logged, run, tune, weights

from tokenpref._paths import data_root

TDPO = ["recipes/tdpo_distributed", "--config", "tiny/tdpo"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="module")
def single(folder):
    tune(folder, *TDPO, "output_dir=one", fresh=True)
    return folder


def test_one_process_trains_logs_and_exports(single):
    metrics = logged(single, "one")
    training = [m for m in metrics if "loss" in m]
    assert [m["step"] for m in training] == list(range(1, 9))  # 64 pairs, 8 a step
    assert training[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)  # the policy starts at the reference
    assert training[0]["rewards/accuracies"] == 0.0
    assert training[-1]["loss"] < 0.69
    names = """rewards/chosen rewards/rejected rewards/margins rewards/train_margins logps/chosen logps/rejected
        grad_norm learning_rate num_tokens tokens_per_second kl_ref_policy/chosen kl_ref_policy/rejected
        kl_ref_policy/margin"""
    assert set(names.split()) <= set(training[-1])
    assert [m["step"] for m in metrics if "eval_loss" in m] == [4, 8]
    exported = single / "one" / "epoch_0"
    assert {"config.json", "tokenizer.json"} <= {p.name for p in exported.iterdir()}


def test_two_processes_give_the_same_curve_and_weights(single):
    tune(single, "--nproc_per_node", "2", *TDPO, "output_dir=two", "batch_size=4", fresh=True)
    one = [m for m in logged(single, "one") if "loss" in m]
    two = [m for m in logged(single, "two") if "loss" in m]
    for a, b in zip(one, two, strict=True):
        assert a["num_tokens"] == b["num_tokens"]
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-5)
    for name, tensor in weights(single, "one").items():
        assert (tensor - weights(single, "two")[name]).abs().max() < 2e-3, name


def test_continued_run_ends_at_the_same_bits(single):
    words = [*TDPO, "output_dir=stopped", "epochs=2"]
    tune(single, *TDPO, "output_dir=whole", "epochs=2")
    # Stop after the first epoch by making the second one's checkpoint the last thing wanted: train it, then go back.
    tune(single, *words, "checkpoint_every_n_steps=5", "keep_last=2")
    left = sorted(p.name for p in (single / "stopped" / "checkpoints").glob("step_*"))
    assert left == ["step_15", "step_16"]
    shutil.rmtree(single / "stopped" / "checkpoints" / "step_16")
    before = weights(single, "stopped", 1)
    tune(single, *words, "checkpoint_every_n_steps=5", "resume_from_checkpoint=true")
    for name, tensor in weights(single, "whole", 1).items():
        assert tensor.equal(before[name]), name
        assert tensor.equal(weights(single, "stopped", 1)[name]), name


def test_users_copy_and_users_loss_run_in_both_launch_modes(single):
    (example,) = re.findall(
        r"```python\n# my_loss\.py\n(.*?)```", (data_root() / "README.md").read_text(), re.DOTALL
    )
    (single / "my_loss.py").write_text(example.replace("early =", "print('my loss at work'); early ="))
    for source, target in (("recipes/tdpo_distributed", "my_tdpo.py"), ("tiny/tdpo", "my.yaml")):
        assert run(single, TUNE, "cp", source, target).returncode == 0
    recipe = (single / "my_tdpo.py").read_text()
    assert "trainer.setup()" in recipe
    (single / "my_tdpo.py").write_text(recipe.replace("trainer.setup()", "print('my copy'); trainer.setup()"))
    mine = ["my_tdpo.py", "--config", "my.yaml", "loss._component_=my_loss.MyLoss", "loss.first=8"]
    mine.append("max_steps_per_epoch=1")
    for launch, output in (([], "mine_one"), (["--nproc_per_node", "2"], "mine_two")):
        done = tune(single, *launch, *mine, f"output_dir={output}")
        said = done.stdout + done.stderr
        assert "my copy" in said and "my loss at work" in said
        assert "loss.variant: the config's value was for another component" in said
        assert weights(single, output)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["loss.betta=0.3", "batchsize=2"],
            ["2 faults", "did you mean 'beta'?", "did you mean 'batch_size'?"],
        ),
        (["dataset.source=nowhere.jsonl"], ["nowhere.jsonl"]),
        (["checkpointer.checkpoint_dir=nowhere"], ["no folder at"]),
        (["loss._component_=tokenpref.losses.TISDPOLoss"], ["needs 'weights'"]),
        (
            ["model.num_layers=3"],
            ["num_hidden_layers is 2 there and 3 in the model (set model.num_layers=2)"],
        ),
    ],
)
def test_bad_input_is_one_error_and_leaves_nothing(folder, overrides, words):
    done = tune(folder, *TDPO, "output_dir=bad", *overrides, ok=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    error = done.stderr[done.stderr.index("error: ") :]
    for word in words:
        assert word in error
    assert not (folder / "bad").exists()


def test_the_folder_of_another_run_is_refused(single):
    done = tune(single, *TDPO, "output_dir=one", "loss.beta=0.3", ok=False)
    assert done.returncode == 2 and "holds another run" in done.stderr
    assert weights(single, "one")


def test_more_processes_than_pairs_is_refused(folder):
    done = tune(folder, "--nproc_per_node", "2", *TDPO, "output_dir=few", "dataset.max_rows=1", ok=False)
    assert done.returncode != 0
    assert "1 pairs for 2 processes" in done.stderr
    assert not (folder / "few").exists()


def test_evaluation_of_the_trained_model(single):
    trained = [
        "checkpointer.checkpoint_dir=one/epoch_0",
        "checkpointer.checkpoint_files=[model-00001-of-00001.safetensors]",
    ]
    evaluate = ["recipes/evaluate_distributed", "--config", "tiny/evaluate"]
    tune(single, *evaluate, "output_dir=before", fresh=True)
    tune(single, *evaluate, "output_dir=after", *trained, "sampling.compare_to=before/samples.jsonl")
    tune(single, "--nproc_per_node", "2", *evaluate, "output_dir=after_two", *trained, fresh=True)
    before, after, two = (
        json.loads((single / name / "evaluation.json").read_text())
        for name in ("before", "after", "after_two")
    )
    assert before["rewards/accuracies"] == 0.0 and before["kl_ref_policy/chosen"] == 0.0
    assert after["num_pairs"] == 16 and after["num_samples"] == 16
    assert after["kl_ref_policy/chosen"] > 0 and after["loss"] != before["loss"]
    low, high = after["reward_gain_interval"]
    assert low <= after["reward_gain"] <= high
    assert after["loss"] == pytest.approx(two["loss"], abs=1e-5)
    assert (single / "after" / "samples.jsonl").read_text() == (
        single / "after_two" / "samples.jsonl"
    ).read_text()
