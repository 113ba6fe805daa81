"""Checkpoints: only whole and unharmed ones are read, and a run that goes on ends with the bits of one that never stopped."""

import io
import json
import pickle
import resource
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from support.killed import train_until

from tokenpref._sealed import MANIFEST, fault_of, seal
from tokenpref.distributed import single_process_world
from tokenpref.distributed.safe_reading import SafeReader
from tokenpref.errors import ConfigError, TokenprefError
from tokenpref.training import PreferenceTrainer, TripletTrainer
from tokenpref.training.config.command_line import load_config
from tokenpref.training.evaluation.validation import Validation
from tokenpref.training.saving.checkpoints import Checkpoints
from tokenpref.training.saving.run_folder import RunFolder

WORLD = single_process_world()
NO_WATCH = ("log_stats=[]", "run_val_every_n_steps=null")
EVERY_TWO = ("checkpoint_every_n_steps=2", "keep_last=10", *NO_WATCH)


def train(*overrides, config="tiny/tdpo", until=None):
    """Train a tiny config; with ``until`` it dies before that step, as if killed."""
    trainer_class = TripletTrainer if config == "tiny/ti_dpo" else PreferenceTrainer
    trainer = trainer_class(load_config(["--config", config, *overrides]))
    return train_until(trainer, until)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """:func:`train` in a folder of the test."""
    monkeypatch.chdir(tmp_path)
    return train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run that saves every two steps, ``whole``, and the same run killed before step 5, ``killed``."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train("output_dir=whole", *EVERY_TWO)
        train("output_dir=killed", *EVERY_TWO, until=5)
    return folder


@pytest.fixture
def whole(trained):
    """The finished run. Only read it."""
    return trained / "whole"


@pytest.fixture
def mine(trained, tmp_path):
    """The finished run, copied to ``mine`` in the folder of the test."""
    return shutil.copytree(trained / "whole", tmp_path / "mine")


@pytest.fixture
def killed(trained, tmp_path):
    """The killed run, copied to ``mine`` in the folder of the test."""
    return shutil.copytree(trained / "killed", tmp_path / "mine")


def weights(folder):
    return load_file(folder / "epoch_0" / "model-00001-of-00001.safetensors")


def assert_same_weights(one, other):
    for name, tensor in weights(one).items():
        assert tensor.equal(weights(other)[name]), name


@pytest.fixture
def sealed(tmp_path):
    folder = tmp_path / "step_3"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.bin").write_bytes(b"0123456789")
    (folder / "sub" / "b.bin").write_bytes(b"xyz")
    seal(folder)
    return folder


def test_the_newest_unharmed_one_is_taken_and_the_others_are_named(tmp_path, sealed):
    for step in (12, 9, 10):
        shutil.copytree(sealed, tmp_path / f"step_{step}")
    shutil.copytree(sealed, tmp_path / "step_99.partial")
    (tmp_path / "latest").write_text("step_12\n")
    checkpoints = Checkpoints(tmp_path, WORLD)
    assert checkpoints.newest() == (tmp_path / "step_12", [])
    (tmp_path / "step_12" / "a.bin").write_bytes(b"?")
    (tmp_path / "step_10" / MANIFEST).unlink()
    found, faults = checkpoints.newest()
    assert found == tmp_path / "step_9" and len(faults) == 2 and "step_12: a.bin has 1 bytes" in faults[0]
    assert Checkpoints(tmp_path / "none", WORLD).newest() == (None, [])


@pytest.mark.parametrize("config", ["tiny/tdpo", "tiny/ti_dpo"])
def test_a_killed_run_ends_with_the_same_bits(run, tmp_path, config):
    words = EVERY_TWO
    if config == "tiny/ti_dpo":  # what is kept by row has to come back too: rows come twice
        kept = ("refresh=every_n_steps", "every_n_steps=5")
        words += tuple(f"{part}.{word}" for part in ("token_weights", "anchors") for word in kept)
        words += ("dataset.max_rows=16", "epochs=4")
    run("output_dir=whole", *words, config=config)
    run("output_dir=killed", *words, config=config, until=5)
    assert not (tmp_path / "killed" / "finished.json").exists()
    trainer = run("output_dir=killed", *words, "resume_from_checkpoint=auto", config=config)
    assert trainer.progress.step == 8
    last = 3 if config == "tiny/ti_dpo" else 0
    one, other = (
        load_file(tmp_path / name / f"epoch_{last}" / "model-00001-of-00001.safetensors")
        for name in ("whole", "killed")
    )
    assert all(tensor.equal(other[name]) for name, tensor in one.items())


def test_a_damaged_checkpoint_is_skipped_and_named(run, tmp_path, whole, caplog):
    run("output_dir=killed", *EVERY_TWO, until=7)
    newest = tmp_path / "killed/checkpoints/step_6"
    shard = next(newest.glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))
    with caplog.at_level("INFO", logger="tokenpref"):
        run("output_dir=killed", *EVERY_TWO, "resume_from_checkpoint=auto")
    assert f"skipped a damaged checkpoint: {newest}: {shard.name} is not what was written" in caplog.text
    assert "continuing after step 4 of 8" in caplog.text
    assert_same_weights(whole, tmp_path / "killed")


def test_a_path_may_name_a_checkpoint_or_a_run(run, tmp_path, whole):
    for number, start in enumerate((whole / "checkpoints/step_4", whole)):
        trainer = run(f"output_dir=branch{number}", *NO_WATCH, f"resume_from_checkpoint={start}")
        assert trainer.progress.step == 8
        assert_same_weights(whole, tmp_path / f"branch{number}")
    assert json.loads((tmp_path / "branch0/run.json").read_text())["recipe"] == "recipes/tdpo_distributed"


def test_auto_without_a_checkpoint_begins(run, tmp_path, caplog):
    with caplog.at_level("INFO", logger="tokenpref"):
        run("output_dir=new", *NO_WATCH, "resume_from_checkpoint=auto")
    assert "a run from the beginning" in caplog.text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["resume_from_checkpoint=nowhere"], "there is no such folder"),
        (["resume_from_checkpoint=mine/epoch_0"], "is no checkpoint"),
        (["resume_from_checkpoint=3"], "expected true, false, auto or a path, found 3"),
        (["resume_from_checkpoint=true", "output_dir=other"], "no checkpoint that can be read in .*other"),
        (["resume_from_checkpoint=auto", "batch_size=4"], "pairs_per_step is 4 and was 8"),
        (["resume_from_checkpoint=auto", "seed=7"], "seed is 7 and was 0"),
        (["resume_from_checkpoint=auto", "shuffle=false"], "shuffle is False and was True"),
        (["resume_from_checkpoint=auto", "dataset.max_rows=60"], "(?s)data is .* and was"),
        (["resume_from_checkpoint=auto", "max_steps_per_epoch=3"], "steps_per_epoch is 3 and was 8"),
        (["resume_from_checkpoint=auto", "lr_scheduler._component_=tokenpref.training.get_constant_schedule_with_warmup",
          "lr_scheduler.num_warmup_steps=2"], "was written without one"),
        (["optimizer.lr=0.5"], "holds another run"),
    ],
)  # fmt: skip
def test_what_cannot_be_continued_is_refused(run, tmp_path, mine, overrides, message):
    before = sorted(p.as_posix() for p in mine.rglob("*"))
    with pytest.raises(ConfigError, match=message):
        run("output_dir=mine", *EVERY_TWO, *overrides)
    assert sorted(p.as_posix() for p in mine.rglob("*")) == before
    assert not (tmp_path / "other").exists()


def test_changed_settings_are_said(run, killed, caplog):
    with caplog.at_level("INFO", logger="tokenpref"):
        run("output_dir=mine", *EVERY_TWO, "resume_from_checkpoint=auto", "optimizer.lr=0.002")
    assert "continuing with another setting: optimizer.lr is 0.002 and was 0.001" in caplog.text


def test_a_full_disk_leaves_the_checkpoint_before_it(run, tmp_path, whole, monkeypatch):
    """The limit of a file's size stands for the disk's end: the write fails half way."""
    save = Checkpoints.save

    def on_a_full_disk(self, model, optimizer, scheduler, progress, **rest):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if progress.step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            return save(self, model, optimizer, scheduler, progress, **rest)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(Checkpoints, "save", on_a_full_disk)
    with pytest.raises(TokenprefError, match="step_4.partial: the checkpoint cannot be written"):
        run("output_dir=full", *EVERY_TWO)
    monkeypatch.setattr(Checkpoints, "save", save)
    newest, faults = Checkpoints(tmp_path / "full/checkpoints", WORLD).newest()
    assert newest.name == "step_2" and not faults
    run("output_dir=full", *EVERY_TWO, "resume_from_checkpoint=auto")
    assert not list((tmp_path / "full/checkpoints").glob("*.partial"))
    assert_same_weights(whole, tmp_path / "full")


IN_BACKGROUND = (*EVERY_TWO, "enable_async_checkpointing=true")


def test_saves_in_the_background_hold_the_step_that_they_name(run, tmp_path, whole):
    run("output_dir=mine", *IN_BACKGROUND)
    assert_same_weights(whole, tmp_path / "mine")
    saved = []
    for folder in (whole, tmp_path / "mine"):
        folders = sorted((folder / "checkpoints").glob("step_*"))
        assert not [f for f in folders if fault_of(f)]
        saved.append({f.name: load_shards(f) for f in folders})
    expected, found = saved
    assert expected.keys() == found.keys() and len(expected) > 1
    for name, tensors in expected.items():
        for key, tensor in tensors.items():
            assert tensor.equal(found[name][key]), (name, key)


def load_shards(folder):
    """Every tensor of a checkpoint by name."""
    index = SafeReader(folder).read_metadata().state_dict_metadata
    state = {k: torch.empty(m.size) for k, m in index.items() if hasattr(m, "size")}
    dcp.load(state, storage_reader=SafeReader(folder))
    return state


def test_a_checkpoint_says_whose_it_is_and_of_what(killed):
    facts = json.loads((killed / "checkpoints/step_4/progress.json").read_text())["facts"]
    assert facts["run"] == json.loads((killed / "run.json").read_text())["id"]
    assert facts["config"]["optimizer"]["lr"] == 0.001 and facts["pairs_per_step"] == 8
    assert all(len(facts[name]) == 64 for name in ("data", "reference"))


def test_a_run_killed_while_it_saves_in_the_background_goes_on(run, tmp_path, whole):
    run("output_dir=mine", *IN_BACKGROUND, until=5)
    run("output_dir=mine", *IN_BACKGROUND, "resume_from_checkpoint=auto")
    assert_same_weights(whole, tmp_path / "mine")


def test_a_save_that_fails_in_the_background_stops_the_run(run, tmp_path, monkeypatch):
    publish = Checkpoints._publish

    def on_a_full_disk(self, partial, name, *rest):
        if name == "step_4":
            raise OSError(28, "No space left on device")
        publish(self, partial, name, *rest)

    monkeypatch.setattr(Checkpoints, "_publish", on_a_full_disk)
    with pytest.raises(
        TokenprefError,
        match="step_4.partial: the checkpoint cannot be written: No space left on device; make",
    ):
        run("output_dir=full", *IN_BACKGROUND)
    newest, faults = Checkpoints(tmp_path / "full/checkpoints", WORLD).newest()
    assert newest.name == "step_2" and not faults


def test_the_best_weights_are_kept_over_a_resume(run, tmp_path, monkeypatch):
    """Losses by hand: the best is the second; a worse one after the resume does not replace it."""
    values = {2: 0.7, 4: 0.5, 6: 0.6, 8: 0.9}
    monkeypatch.setattr(Validation, "run", lambda self, *_, step, folder: {"loss": values[step]})
    words = ("checkpoint_every_n_steps=1", "run_val_every_n_steps=2", "log_stats=[]", "epochs=2")
    words += ("best.metric=loss", "best.goal=min", "dataset.max_rows=32", "output_dir=mine")
    run(*words, until=5)
    best = tmp_path / "mine/best"
    record, tensors = json.loads((best / "best.json").read_text()), best_weights(best)
    assert record == {"metric": "loss", "value": 0.5, "step": 4} and fault_of(best) is None
    after = run(*words, "resume_from_checkpoint=auto")
    assert (after.progress.best, after.progress.best_step) == (0.5, 4)
    assert json.loads((best / "best.json").read_text()) == record
    assert all(tensor.equal(best_weights(best)[name]) for name, tensor in tensors.items())
    at_the_end = load_file(tmp_path / "mine/epoch_1/model-00001-of-00001.safetensors")
    assert any(not tensor.equal(at_the_end[name]) for name, tensor in tensors.items())
    assert not (tmp_path / "mine/epoch_2").exists()


def best_weights(folder):
    return load_file(folder / "model-00001-of-00001.safetensors")


def test_a_best_metric_that_is_not_measured(run):
    with pytest.raises(
        ConfigError, match="best.metric: the validation has no 'accuracy' .*it has .*, loss, "
    ):
        run("output_dir=mine", "run_val_every_n_steps=1", "best.metric=accuracy", "best.goal=max")


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("where", ["index", "bytes"])
def test_a_checkpoint_runs_nothing(run, tmp_path, killed, where):
    """Even sealed anew, so that only the reader stands in the way."""
    checkpoint, trace = killed / "checkpoints/step_4", tmp_path / "it_ran"
    if where == "index":
        (checkpoint / ".metadata").write_bytes(pickle.dumps(Hostile(trace)))
    else:
        buffer = io.BytesIO()
        torch.save(Hostile(trace), buffer)
        index = pickle.loads((checkpoint / ".metadata").read_bytes())
        key, place = next(
            (k, v) for k, v in index.storage_data.items() if "param_groups" in k.fqn and "lr" in k.fqn
        )
        shard = checkpoint / place.relative_path
        index.storage_data[key] = type(place)(
            place.relative_path, shard.stat().st_size, len(buffer.getvalue())
        )
        shard.write_bytes(shard.read_bytes() + buffer.getvalue())
        (checkpoint / ".metadata").write_bytes(pickle.dumps(index))
    (checkpoint / MANIFEST).unlink()
    seal(checkpoint)
    message = {"index": "refers to io.open, which no checkpoint", "bytes": "Weights only load failed"}[where]
    with pytest.raises(TokenprefError, match=f"step_4: the checkpoint cannot be read .*{message}"):
        run("output_dir=mine", *EVERY_TWO, "resume_from_checkpoint=auto")
    assert not trace.exists()


def test_two_runs_on_one_folder(run, tmp_path):
    folder = RunFolder(tmp_path / "mine", {}, "recipe", WORLD)
    folder.lock()
    with pytest.raises(ConfigError, match="another run is writing to .*mine at this moment"):
        run("output_dir=mine", *NO_WATCH)
    folder.unlock()
    run("output_dir=mine", *NO_WATCH)


def test_minutes_between_checkpoints(run, tmp_path):
    run("output_dir=often", "checkpoint_every_minutes=1e-9", "keep_last=3", *NO_WATCH)
    names = sorted(p.name for p in (tmp_path / "often/checkpoints").iterdir())
    assert names == ["latest", "step_6", "step_7", "step_8"]
    assert (tmp_path / "often/checkpoints/latest").read_text() == "step_8\n"
    run("output_dir=never", "checkpoint_every_minutes=1000", *NO_WATCH)
    assert [p.name for p in (tmp_path / "never/checkpoints").glob("step_*")] == ["step_8"]  # the end's


class Exploding(torch.optim.SGD):
    """Whose third update makes one weight infinite, in a run with finite losses and gradients until then."""

    updates = 0

    def step(self, closure=None):
        super().step(closure)
        # PyTorch asks for a step without effect to see the state.
        self.updates += any(group["lr"] > 0 for group in self.param_groups)
        if self.updates == 3:
            with torch.no_grad():
                self.param_groups[0]["params"][1].view(-1)[5] = torch.inf


@pytest.mark.parametrize(
    "words",
    [
        ("checkpoint_every_n_steps=1",),
        ("checkpoint_every_n_steps=1", "enable_async_checkpointing=true"),
        ("checkpoint_every_n_steps=2", "max_steps_per_epoch=3"),  # the end
        ("checkpoint_every_n_steps=2", "run_val_every_n_steps=3", "best.metric=loss", "best.goal=min"),
    ],
    ids=["checkpoint", "in the background", "epoch", "best"],
)
def test_weights_that_are_not_finite_reach_no_disk(run, tmp_path, monkeypatch, words):
    monkeypatch.setattr(Validation, "run", lambda self, *_, step, folder: {"loss": 0.5})
    with pytest.raises(
        TokenprefError, match=r"^step 3: the update made layers\.0\.\S+ not finite; these weights were not"
    ):
        run("output_dir=mine", *NO_WATCH, f"optimizer={__name__}.Exploding", "keep_last=1", *words)
    newest, faults = Checkpoints(tmp_path / "mine/checkpoints", WORLD).newest()
    assert newest.name == "step_2" and not faults
    assert (tmp_path / "mine/checkpoints/latest").read_text() == "step_2\n"
    assert sorted(p.name for p in (tmp_path / "mine").glob("[befk]*")) == []


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_limit_on_files_is_named_as_the_cause(run, tmp_path, background):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, limits[1]))
    words = ("checkpoint_every_n_steps=2", f"enable_async_checkpointing={background}", *NO_WATCH)
    try:
        with pytest.raises(
            TokenprefError,
            match=r"step_2.partial: the checkpoint cannot be written: File too large; raise the limit on",
        ):
            run("output_dir=full", *words)
        with pytest.raises(
            TokenprefError, match=r"epoch_0: the model cannot be written: File too large; raise"
        ):
            run("output_dir=mine", "max_steps_per_epoch=1", *NO_WATCH)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
