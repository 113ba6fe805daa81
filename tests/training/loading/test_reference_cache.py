"""The reference's work done once: the same numbers as with a second model, by any number of processes, and never twice."""

import json
import logging
import random
import re
import shutil
import weakref
from collections import namedtuple
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import small, workers

from tokenpref._paths import data_root
from tokenpref.data.reference_store import ReferenceWriter
from tokenpref.distributed import single_process_world
from tokenpref.distributed.testing import run_distributed
from tokenpref.errors import ConfigError, DataError, DryRun
from tokenpref.losses import DPOLoss, TISDPOLoss, TokenDPOLoss, TripletTIDPOLoss
from tokenpref.models.reference import KL_STATISTICS, CachedReference, FrozenReference, NoReference
from tokenpref.stats import LossOutput
from tokenpref.training import PreferenceTrainer, TripletTrainer, WeightedTrainer
from tokenpref.training.config.command_line import load_config
from tokenpref.training.credit.live import LiveModels
from tokenpref.training.loading import preflight
from tokenpref.training.loading.models import ModelMaker
from tokenpref.training.loading.reference_cache import ReferenceCache, cached_references, stored_kind
from tokenpref.training.step.pair_loss import what_is_read
from tokenpref.training.step.train_step import train_step

ROWS = list(range(20))  # three shards
WORLD = single_process_world()
Usage = namedtuple("Usage", "total used free")


def cached(folder, kind, *, load=None, rows=ROWS, world=WORLD):
    examples = [small.example(row) for row in rows]
    cache = ReferenceCache.plan("dataset", examples, folder=folder, kind=kind, job=dict, world=world)
    load = load or (lambda: small.scorer(1, frozen=True))
    (reference,) = cached_references([cache], load, world, batch_size=3, pad_id=0)
    return reference


def never():
    pytest.fail("the reference model was loaded")


@pytest.mark.parametrize("kind", ["logps", "hidden"])
@pytest.mark.parametrize("rows", [[0, 1, 2], [19, 3, 8, 7], [5]], ids=str)
@pytest.mark.parametrize("side", [None, "chosen", "rejected"])
def test_a_cache_says_what_the_model_says(tmp_path, kind, rows, side):
    needs = frozenset({"ref", *(KL_STATISTICS if kind == "hidden" else ())})
    batch = small.batch(rows) if side is None else small.batch(rows).only(side)
    with (
        small.reference(1).outputs(batch, needs) as wanted,
        cached(tmp_path, kind).outputs(batch, needs) as found,
    ):
        for name, value in vars(wanted).items():
            if value is None:
                assert getattr(found, name) is None
            else:
                torch.testing.assert_close(getattr(found, name), value, rtol=0, atol=1e-12)


def test_fillers_and_batches_that_ask_for_nothing(tmp_path):
    filler = small.batch([], filler=True)
    logps, hidden = cached(tmp_path, "logps"), cached(tmp_path, "hidden")
    with logps.outputs(filler, frozenset({"ref"})) as output:
        assert output.logps.tolist() == [[0.0], [0.0]]
    with hidden.outputs(filler, frozenset({"kl_ref_policy"})) as output:
        assert output.hidden.shape == (0, 32) and output.head_weight.shape == (small.VOCAB, 32)
    with hidden.outputs(small.batch([0]), frozenset({"entropy", "weights"})) as output:
        assert (output.logps, output.hidden, output.head_weight) == (None, None, None)


def test_hidden_states_serve_log_probabilities_too(tmp_path):
    policy, batch = small.scorer(0), small.batch([4, 5])
    with cached(tmp_path, "hidden").outputs(batch, frozenset({"ref"})) as ref:
        stats = policy.token_stats(
            batch.tokens,
            batch.labels,
            needs=frozenset({"ref"}),
            ref_logps=ref.logps,
            ref_hidden=ref.hidden,
            ref_head_weight=ref.head_weight,
        )
    wanted = small.scorer(1).logps(batch.tokens, batch.labels)
    torch.testing.assert_close(stats.ref_logps, wanted, rtol=0, atol=1e-12)


def test_what_a_cache_does_not_hold_is_refused(tmp_path):
    reference = cached(tmp_path, "logps", rows=[0, 1])
    for batch, needs, said in (
        (
            small.batch([0]),
            {"ref", "kl_ref_policy"},
            "kl_ref_policy needed, but .* holds logps; a KL needs hidden",
        ),
        (small.batch([2]), {"ref"}, "holds nothing of the chosen answer of row 2"),
        (
            small.batch([0]).with_anchors(small.anchors(small.batch([0]))),
            {"ref"},
            "nothing of the anchor answer",
        ),
    ):
        with pytest.raises(ValueError, match=said), reference.outputs(batch, frozenset(needs)):
            pass
    other = small.batch([1])
    other.rows[0] = 0
    with (
        pytest.raises(ValueError, match="the chosen answer of row 0 has 5 tokens and 2 in"),
        reference.outputs(other, frozenset({"ref"})),
    ):
        pass


@pytest.mark.parametrize(
    ("needs", "kind"),
    [
        ({"ref"}, "logps"),
        ({"ref", "weights", "entropy"}, "logps"),
        ({"ref", "kl_ref_policy"}, "hidden"),
        ({"kl_policy_ref"}, "hidden"),
        ({"entropy", "weights"}, None),
        (set(), None),
    ],
)
def test_no_more_is_kept_than_is_needed(needs, kind):
    assert stored_kind(frozenset(needs)) == kind


# --- steps ----------------------------------------------------------------------------------------------------

LOSSES = {
    "dpo": DPOLoss(),
    "tdpo1": TokenDPOLoss(variant="tdpo1"),
    "tdpo2": TokenDPOLoss(alpha=0.5),
    "tis": TISDPOLoss(),
    "tis_kl": TISDPOLoss(alpha=0.5),
    "ti": TripletTIDPOLoss(gamma=0.0),
}


def steps(reference, loss, split, count=2):
    """Losses and gradients of each of some steps."""
    policy, found = small.scorer(0), []
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(
        lambda *_: found.append([p.grad.clone() for p in policy.model.parameters()])
    )
    losses = []
    for step in range(count):
        result = train_step(
            policy,
            reference,
            loss,
            optimizer,
            [small.batch(rows, filler=not rows) for rows in split],
            WORLD,
            step=step,
            needs=loss.needs,
            weigh=small.weights if "weights" in loss.needs else lambda batch: None,
        )
        losses.append(result.sums.reduce(WORLD)["loss"])
    return losses, found


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_training_is_the_same(tmp_path, loss):
    split = [[0, 1, 2], [], [17, 4]]
    kind = stored_kind(loss.needs)
    assert (kind == "hidden") == bool(loss.needs & KL_STATISTICS)
    losses, grads = steps(small.reference(1), loss, split)
    own_losses, own_grads = steps(cached(tmp_path, kind), loss, split)
    assert own_losses == pytest.approx(losses, rel=1e-12) and losses[0] != losses[1]
    for mine, theirs in zip(own_grads, grads, strict=True):
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


class OneSided(DPOLoss):
    """Half of DPO: it reads chosen answers alone."""

    sides = ("chosen",)

    def forward(self, pair):
        ratio = (pair.chosen.policy_logps - pair.chosen.ref_logps).sum(-1)
        rewards = ratio.detach()
        return LossOutput(-torch.nn.functional.logsigmoid(ratio), rewards, 0 * rewards, {})


def test_a_one_sided_loss(tmp_path):
    loss = OneSided()
    assert what_is_read(loss, small.batch([0])).sides == ("chosen",)
    losses, _ = steps(small.reference(1), loss, [[0, 1], [2]])
    found, _ = steps(cached(tmp_path, "logps"), loss, [[0, 1], [2]])
    assert found == pytest.approx(losses, rel=1e-12)


# --- building -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [DPOLoss(), TokenDPOLoss()], ids=["logps", "hidden"])
def test_two_ranks_and_one_build_and_read_the_same(tmp_path, loss):
    kind = stored_kind(loss.needs)
    split = [[[0, 1], [2]], [[3], []]]
    whole = [rows for rank in split for rows in rank]
    losses, _ = steps(small.reference(1), loss, whole)
    by_two = run_distributed(workers.cached_step, str(tmp_path / "two"), kind, loss, split, ROWS)
    by_one = workers.cached_step(WORLD, str(tmp_path / "one"), kind, loss, [whole], ROWS)
    # Two ranks read what one has built, and the reverse: no forward of the reference.
    read_by_two = run_distributed(workers.cached_step, str(tmp_path / "one"), kind, loss, split, ROWS)
    read_by_one = workers.cached_step(WORLD, str(tmp_path / "two"), kind, loss, [whole], ROWS)
    # Three shards of 8, 8 and 4 pairs, three forwards each; the second of two rounds has one shard for two ranks.
    assert [rank["forwards"] for rank in by_two] == [6, 6] and by_one["forwards"] == 9
    assert [rank["forwards"] for rank in (*read_by_two, read_by_one)] == [0, 0, 0]
    for found in (*by_two, by_one, *read_by_two, read_by_one):
        assert found["alive"] == 0  # the reference is gone before the policy's first step
        assert found["losses"] == pytest.approx(losses, rel=1e-10)
    for found in (by_two[0], read_by_two[0], read_by_one):  # whole weights are on the main process
        for name, tensor in by_one["state"].items():
            np.testing.assert_allclose(found["state"][name], tensor, rtol=0, atol=1e-10, err_msg=name)


def test_a_killed_build_goes_on_also_with_another_number_of_processes(tmp_path, monkeypatch):
    write, written = ReferenceWriter.write, []

    def dying(self, shard, answers):
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(shard)
        return write(self, shard, answers)

    monkeypatch.setattr(ReferenceWriter, "write", dying)
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "killed", "logps")
    monkeypatch.setattr(ReferenceWriter, "write", write)
    (folder,) = (tmp_path / "killed").iterdir()
    assert len(list(folder.glob("*.safetensors"))) == 1 and not (folder / "metadata.json").exists()
    calls = []

    def load():
        scorer = small.scorer(1, frozen=True)
        scorer.model.norm.register_forward_hook(lambda *_: calls.append(1))
        return scorer

    reference = cached(tmp_path / "killed", "logps", load=load)
    assert len(calls) == 6  # two of three shards, three forwards each
    whole = cached(tmp_path / "whole", "logps")
    for file in whole.store.layout.path.glob("*.safetensors"):
        assert (reference.store.layout.path / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("kind", ["logps", "hidden"])
def test_a_build_that_goes_on_makes_damaged_files_anew(tmp_path, kind, caplog):
    """Flips and cuts anywhere in the files of an unfinished cache."""
    whole = cached(tmp_path / "whole", kind).store.layout.path
    expected = {file.name: file.read_bytes() for file in whole.glob("*.safetensors")}
    draw = random.Random(5)
    for number in range(12):
        folder = tmp_path / str(number) / whole.name
        shutil.copytree(whole, folder)
        (folder / "metadata.json").unlink()
        file = draw.choice(sorted(folder.glob("*.safetensors")))
        data = bytearray(file.read_bytes())
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        file.write_bytes(data[: draw.randrange(len(data))] if number % 3 == 2 else data)
        caplog.clear()
        cached(folder.parent, kind)
        assert f"{file} is not what was written (its checksum differs); it is computed again" in caplog.text
        assert {file.name: file.read_bytes() for file in folder.glob("*.safetensors")} == expected


def test_the_model_is_gone_when_the_cache_is_open(tmp_path):
    seen = []

    def load():
        scorer = small.scorer(1, frozen=True)
        seen.append(weakref.ref(scorer.model))
        return scorer

    cached(tmp_path, "hidden", load=load)
    assert seen[0]() is None


def test_what_is_there_is_not_made_again(tmp_path):
    first = cached(tmp_path, "logps")
    again = cached(tmp_path, "logps", load=never)
    assert again.store.layout.path == first.store.layout.path
    cached(tmp_path, "hidden")  # a folder of its own
    assert len(list(tmp_path.iterdir())) == 2


def test_two_data_sets_of_one_model_share_its_head(tmp_path):
    def plan(key, rows):
        examples, job = [small.example(row) for row in rows], {"data": key}
        return ReferenceCache.plan(
            key, examples, folder=tmp_path, kind="hidden", job=lambda: job, world=WORLD
        )

    caches = [plan("dataset", [0, 1]), plan("dataset_val", [2])]
    loads = []

    def load():
        loads.append(1)
        return small.scorer(1, frozen=True)

    one, other = cached_references(caches, load, WORLD, batch_size=2, pad_id=0)
    assert one._head_weight is other._head_weight and loads == [1]
    with other.outputs(small.batch([2]), frozenset({"kl_ref_policy"})) as output:
        assert output.hidden.shape[0] > 0


# --- runs -----------------------------------------------------------------------------------------------------

CACHED = ("reference=cached", "reference_cache_dir=kept")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Train a tiny config with overrides; returns the trainer."""
    monkeypatch.chdir(tmp_path)

    def train(*overrides, config="tiny/tdpo", trainer=PreferenceTrainer, setup_only=False):
        built = trainer(load_config(["--config", config, *overrides]))
        try:
            built.setup()
            if not setup_only:
                built.train()
        finally:
            built.close()
        return built

    return train


def logged(folder):
    file = sorted((folder / "logs").glob("*.txt"))[-1]
    lines = [line for line in file.read_text().splitlines() if line.startswith("Step")]
    return [{k: float(v) for k, v in re.findall(r"(\S+):(\S+)", line)} for line in lines]


def assert_same_curves(one, other):
    # Before the first update rewards are 0 beside a model and 1e-7 beside a cache, whose batches were others: which is larger
    # is then a matter of rounding.
    def compared(line):
        return {
            name: value
            for name, value in line.items()
            if not name.startswith("time/") and name not in ("tokens_per_second", "rewards/accuracies")
        }

    for a, b in zip(logged(one), logged(other), strict=True):
        assert compared(b) == pytest.approx(compared(a), rel=1e-3, abs=2e-5)


def test_a_run_and_its_validation_are_the_same(run, tmp_path, monkeypatch):
    words = ("log_stats_val=[kl_policy_ref]",)
    with_model = run("output_dir=model", *words)
    assert isinstance(with_model.reference, FrozenReference)
    assert with_model.reference_val is with_model.reference
    with_cache = run("output_dir=cached", "reference=cached", "checkpoint_every_n_steps=5", *words)
    assert_same_curves(tmp_path / "model", tmp_path / "cached")
    folders = sorted(path.name for path in (tmp_path / "cached/reference").iterdir())
    assert len(folders) == 2 and all(name.startswith("hidden-") for name in folders)
    assert with_cache.reference.store.layout.path != with_cache.reference_val.store.layout.path
    # What is kept serves the next run, of any number of steps, and the one that goes on.
    monkeypatch.setattr(ModelMaker, "reference", lambda self: never())
    run("output_dir=cached", "reference=cached", "resume_from_checkpoint=true", *words)
    run(
        "output_dir=other",
        "reference=cached",
        "reference_cache_dir=cached/reference",
        "optimizer.lr=1e-4",
        *words,
    )


def test_each_data_set_keeps_what_its_own_statistics_need(run, tmp_path):
    words = ("loss=tokenpref.losses.DPOLoss", "log_stats=[]", "log_stats_val=[kl_ref_policy]")
    trainer = run("output_dir=mine", *CACHED, *words)
    assert trainer.reference.provides == {"ref"}
    assert trainer.reference_val.provides == {"ref", *KL_STATISTICS}
    run("output_dir=model", *words)
    assert_same_curves(tmp_path / "model", tmp_path / "mine")


def test_validation_that_never_comes_keeps_nothing(run, tmp_path):
    trainer = run("output_dir=mine", *CACHED, "run_val_every_n_steps=null", setup_only=True)
    assert isinstance(trainer.reference_val, NoReference)
    assert len(list((tmp_path / "kept").iterdir())) == 1


def test_a_loss_that_compares_with_nothing_keeps_nothing(run, tmp_path):
    trainer = run(
        "output_dir=mine",
        *CACHED,
        "loss=tokenpref.losses.NLLLoss",
        "log_stats=[]",
        "run_val_every_n_steps=null",
    )
    assert isinstance(trainer.reference, NoReference) and not (tmp_path / "kept").exists()


@pytest.mark.parametrize(
    "change",
    [
        "dtype=bf16",
        "dataset.max_rows=32",
        "dataset.swap=true",
        "model.max_seq_len=128",
        "ref_checkpointer=other",
    ],
)
def test_another_reference_or_other_data_have_a_folder_of_their_own(run, tmp_path, change):
    words = ("run_val_every_n_steps=null", "max_steps_per_epoch=1", *CACHED)
    run("output_dir=one", *words)
    if change.startswith("ref_"):
        change = [
            "ref_checkpointer._component_=torchtune.training.FullModelHFCheckpointer",
            "ref_checkpointer.checkpoint_dir=one/epoch_0",
            "ref_checkpointer.checkpoint_files=[model-00001-of-00001.safetensors]",
            "ref_checkpointer.model_type=LLAMA3_2",
            "ref_checkpointer.output_dir=other",
        ]
    run("output_dir=two", *words, *([change] if isinstance(change, str) else change), setup_only=True)
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_what_changes_nothing_shares_a_folder(run, tmp_path):
    words = ("run_val_every_n_steps=null", "max_steps_per_epoch=1", *CACHED)
    run("output_dir=one", *words, setup_only=True)
    run(
        "output_dir=two",
        *words,
        "batch_size=2",
        "padding_free=false",
        "loss.alpha=0.1",
        "seed=4",
        setup_only=True,
    )
    assert len(list((tmp_path / "kept").iterdir())) == 1


@pytest.fixture
def said(caplog):
    """What the package logged."""
    caplog.set_level(logging.INFO, logger="tokenpref")
    logger = logging.getLogger("tokenpref")
    before, logger.propagate = logger.propagate, True
    yield lambda: [record.getMessage() for record in caplog.records]
    logger.propagate = before


def test_the_log_says_what_it_saves_and_costs(run, tmp_path, said):
    run("output_dir=mine", *CACHED, setup_only=True)
    first = said()
    # 64 pairs, 685 answer tokens of 32 numbers, and a head of 384 x 32
    vocabulary = json.loads(next((tmp_path / "kept").rglob("metadata.json")).read_text())["files"]
    assert any(name.startswith("head-") for name in vocabulary)
    for pattern in (
        r"^dataset: hidden states of the reference will be kept in .*kept/hidden-\w+, about 0\.1 MiB for 685 answer tokens, made "
        r"by one forward over 1,127 tokens$",
        r"^dataset: hidden states of the reference, 0\.1 MiB on the disk, made in \d+\.\d s, in .*kept/hidden-",
        r"^dataset_val: hidden states of the reference, .* made in",
        r"^reference: cached, in the place of a second model of 0\.1 MiB a process and a forward of 1,127 tokens an epoch and "
        r"301 tokens a validation$",
    ):
        assert sum(bool(re.search(pattern, line)) for line in first) == 1, (pattern, first)
    run("output_dir=mine", *CACHED, setup_only=True)
    second = said()[len(first) :]
    assert any(re.search("^dataset: .* read from .*kept/hidden-", line) for line in second)
    assert any(re.search("^dataset: hidden states of the reference are in .*kept/", line) for line in second)
    run("output_dir=model", setup_only=True)
    assert any("reference: a second model of 0.1 MiB a process" in line for line in said())


def test_a_dry_run_says_what_it_would_build_and_writes_nothing(run, tmp_path, said):
    with pytest.raises(DryRun):
        run("output_dir=mine", *CACHED, "dry_run=true")
    assert any("dataset_val: hidden states of the reference will be kept in" in line for line in said())
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_refused(run, tmp_path, monkeypatch):
    # Enough for the run's own 0.5 MB, not for 88 + 23 kB and two heads of 49 kB beside it.
    own = []
    monkeypatch.setattr(preflight, "disk_fault", lambda folder, needed: own.append(needed))
    monkeypatch.setattr(
        preflight.shutil, "disk_usage", lambda path: Usage(10**9, 0, own[-1] + 100_000 if own else 10**9)
    )
    with pytest.raises(
        ConfigError,
        match=r"reference: cached needs .* MiB at .*kept.* set reference_cache_dir to another disk",
    ):
        run("output_dir=mine", *CACHED)
    assert not list(tmp_path.iterdir())


def test_memory_without_a_second_model(run, monkeypatch):
    found = {}
    estimate = preflight.estimate_memory

    def keep(*args, **kwargs):
        found["memory"] = estimate(*args, **kwargs)
        return found["memory"]

    monkeypatch.setattr(preflight, "estimate_memory", keep)
    trainer = run("output_dir=a", "dry_run=false", setup_only=True)
    with_model = found["memory"]
    sizes = trainer.policy.model.tok_embeddings
    head = sizes.num_embeddings * sizes.embedding_dim * 4
    run("output_dir=b", "reference=cached", setup_only=True)
    assert found["memory"].reference == head < with_model.reference == with_model.weights
    words = ("loss=tokenpref.losses.DPOLoss", "log_stats=[]")
    run("output_dir=c", "reference=cached", *words, setup_only=True)
    assert found["memory"].reference == 0


def test_weights_that_do_not_fit_leave_nothing(run, tmp_path, tmp_path_factory):
    model = tmp_path_factory.mktemp("other") / "model"
    shutil.copytree(data_root() / "data" / "tiny" / "model", model)
    state = load_file(model / "model.safetensors")
    save_file(
        {name: state[name] for name in state if name != "model.norm.weight"}, model / "model.safetensors"
    )
    with pytest.raises(ConfigError, match="^checkpointer: the checkpoint is of another architecture"):
        run("output_dir=mine", *CACHED, f"checkpointer.checkpoint_dir={model}")
    assert not list(tmp_path.iterdir())


def test_a_damaged_cache_stops_the_run(run, tmp_path):
    words = ("output_dir=mine", *CACHED, "run_val_every_n_steps=null")
    run(*words, setup_only=True)
    file = sorted((tmp_path / "kept").rglob("shard-*"))[3]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(DataError, match=f"{file.name} is not what was written"):
        run(*words)
    file.unlink()
    run(*words)


def test_weights_that_look_at_the_model_are_refused_before_anything_is_built(run, tmp_path):
    prompts = [
        "token_weights._component_=tokenpref.training.OnlinePrompts",
        "token_weights.positive_prompt=good",
    ]
    prompts.append("token_weights.negative_prompt=bad")
    for trainer, config, words in (
        (WeightedTrainer, "tiny/tis_dpo", prompts),
        (TripletTrainer, "tiny/ti_dpo", ["token_weights.model=reference", "loss.gamma=0.0", "anchors=null"]),
    ):
        with pytest.raises(
            ConfigError, match="reference: cached keeps the reference's answers alone, .* set reference=model"
        ):
            run(
                "output_dir=mine",
                *CACHED,
                "loss_val=tokenpref.losses.DPOLoss",
                *words,
                config=config,
                trainer=trainer,
            )
        assert not list(tmp_path.iterdir())


def test_a_source_that_did_not_say_so_is_told_when_it_asks(tmp_path):
    models = LiveModels(small.scorer(0), cached(tmp_path, "logps"), WORLD, pad_id=0, eos_id=1, step=0)
    with pytest.raises(
        ConfigError,
        match="token_weights: .*keep.* the answers alone .reference: cached.; set reference=model",
    ):
        models.frozen("token_weights")


def test_token_weights_and_attribution_of_the_policy_work(run, tmp_path):
    words = [
        "loss.gamma=0.0",
        "anchors=null",
        "token_weights.refresh=once",
        "token_weights.every_n_steps=null",
    ]
    words += ["max_steps_per_epoch=2", "run_val_every_n_steps=null"]
    train = partial(run, *words, config="tiny/ti_dpo", trainer=TripletTrainer)
    train("output_dir=model")
    trainer = train("output_dir=cached", "reference=cached")
    assert isinstance(trainer.reference, CachedReference)
    assert_same_curves(tmp_path / "model", tmp_path / "cached")
