import os
import pwd
import shutil

import pytest
from omegaconf import OmegaConf

from tokenpref._paths import data_root
from tokenpref.errors import ConfigError, Interrupted
from tokenpref.training import ContrastiveReference, PreferenceTrainer
from tokenpref.training.config.command_line import load_config
from tokenpref.training.config.fields import read_config
from tokenpref.training.config.keys import TrainConfig
from tokenpref.training.config.written import environment_unread, plain_without_environment, resolved_paths

SHORT = ["dataset.max_rows=8", "batch_size=8", "dataset_val=null", "run_val_every_n_steps=null"]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("key", "value", "found"),
    [
        ("output_dir", "~/runs/x", "{home}/runs/x"),
        ("output_dir", "~", "{home}"),
        ("checkpointer.checkpoint_dir", "~/m", "{home}/m"),
        ("tokenizer.path", "~/m", "{home}/m"),
        ("tokenizer.chat_template", "~/a.jinja", "{home}/a.jinja"),
        ("tokenizer.chat_template", "~{{ x }}", "~{{ x }}"),
        ("dataset.data_files", {"train": ["~/a.jsonl", "b.jsonl"]}, {"train": ["{home}/a.jsonl", "b.jsonl"]}),
        ("estimator.pair", "~/pair", "{home}/pair"),
        ("my_component.lexicon_path", "~/words", "{home}/words"),
        ("positive_prompt", "~/is how a path begins", "~/is how a path begins"),
        ("output_dir", "./~/x", "./~/x"),
        ("output_dir", "$HOME/x", "$HOME/x"),
        ("dataset.max_rows", 3, 3),
        ("dataset.source", "package://data/tiny/train.jsonl", str(data_root() / "data/tiny/train.jsonl")),
    ],
)
def test_paths_are_resolved_by_their_keys(key, value, found, home):
    def put(expected):
        if isinstance(expected, dict):
            return {k: put(v) for k, v in expected.items()}
        if isinstance(expected, list):
            return [put(v) for v in expected]
        return expected.format(home=home) if isinstance(expected, str) and "{home}" in expected else expected

    assert resolved_paths(value, key) == put(found)


def test_the_home_directory_of_another_user():
    someone = pwd.getpwuid(os.getuid())
    assert resolved_paths(f"~{someone.pw_name}/x", "output_dir") == f"{someone.pw_dir}/x"
    with pytest.raises(
        ConfigError, match=r"output_dir: '~nobody_here/x' .* no such user; write ./~nobody_here"
    ):
        resolved_paths("~nobody_here/x", "output_dir")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("a" * 300, "a name of 300 bytes"),
        ("é" * 130, "260 bytes"),
        ("a/" * 2100, "4200 bytes long"),
        ("a\0b", "control character"),
        ("\n", "control character"),
        ("a\tb", "control character"),
    ],
)
def test_what_no_file_system_takes_is_refused(value, words):
    with pytest.raises(ConfigError, match=f"^metric_logger.log_dir: .*{words}"):
        resolved_paths(value, "metric_logger.log_dir")


def test_every_path_of_a_config_means_one_home_directory(home):
    shutil.copytree(data_root() / "data/tiny/model", home / "m")
    words = ["output_dir=~/runs", "tokenizer.path=~/m", "checkpointer.checkpoint_dir=~/m"]
    config = read_config(TrainConfig, load_config(["--config", "tiny/tdpo", *words]))
    assert config.output_dir == f"{home}/runs"
    assert config.tokenizer.kwargs["path"] == config.checkpointer.kwargs["checkpoint_dir"] == f"{home}/m"
    assert config.checkpointer.kwargs["output_dir"] == f"{home}/runs"
    assert config.metric_logger.kwargs["log_dir"] == f"{home}/runs/logs"


def test_a_run_in_the_home_directory_is_there_as_a_whole(home, tmp_path):
    trainer = PreferenceTrainer(load_config(["--config", "tiny/dpo", *SHORT, "output_dir=~/runs/x"]))
    try:
        trainer.setup()
        trainer.train()
    finally:
        trainer.close()
    written = {path.relative_to(home).as_posix() for path in home.rglob("*")}
    assert {"runs/x/epoch_0/manifest.json", "runs/x/finished.json", "runs/x/torchtune_config.yaml"} <= written
    assert not list((tmp_path / "work").iterdir())


def test_what_the_environment_says_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "open_sesame")
    words = ["metric_logger.filename=${mine}", "mine=${oc.env:SECRET_TOKEN}", "output_dir=pair"]
    cfg = load_config(["--config", "tiny/contrastive_reference", "dataset.max_rows=8", *words])
    build = ContrastiveReference(cfg)
    try:
        build.run()
    finally:
        build.close()
    files = [path for path in (tmp_path / "work").rglob("*") if path.is_file() and path.suffix != ".distcp"]
    assert {"pair.yaml", "torchtune_config.yaml"} <= {path.name for path in files}
    assert not [path for path in files if b"open_sesame" in path.read_bytes()]
    assert "${oc.env:SECRET_TOKEN}" in (tmp_path / "work/pair/pair.yaml").read_text()


def test_a_checkpoint_keeps_what_was_written_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "open_sesame")
    words = [
        "--config",
        "tiny/dpo",
        *SHORT,
        "output_dir=run",
        "batch_size=4",
        "metric_logger.filename=${oc.env:SECRET_TOKEN}",
    ]

    class Stops(PreferenceTrainer):
        def _step(self):
            if self.progress.step == 1:
                raise Interrupted("enough")
            return super()._step()

    def run(kind, *more):
        trainer = kind(load_config([*words, *more]))
        try:
            trainer.setup()
            step = trainer.progress.step
            trainer.train()
        finally:
            trainer.close()
        return step

    with pytest.raises(Interrupted):
        run(Stops, "checkpoint_every_n_steps=1")
    (record,) = (tmp_path / "work/run/checkpoints").rglob("progress.json")
    assert "open_sesame" not in record.read_text() and "${oc.env:SECRET_TOKEN}" in record.read_text()
    assert run(PreferenceTrainer, "resume_from_checkpoint=auto") == 1


def test_values_that_need_the_environment_stay_as_written(monkeypatch):
    monkeypatch.setenv("PLACE", "/secret")
    cfg = OmegaConf.create(
        {
            "output_dir": "${oc.env:PLACE}/x",
            "log": {"dir": "${output_dir}/logs", "every": "${count}"},
            "count": 3,
            "files": ["${oc.env:PLACE}/a", "b"],
            "copy": "${log}",
            "default": "${oc.env:NOT_SET_AT_ALL,null}",
        }
    )
    assert plain_without_environment(cfg) == {
        "output_dir": "${oc.env:PLACE}/x",
        "log": {"dir": "${output_dir}/logs", "every": 3},
        "count": 3,
        "files": ["${oc.env:PLACE}/a", "b"],
        "copy": {"dir": "${output_dir}/logs", "every": 3},
        "default": "${oc.env:NOT_SET_AT_ALL,null}",
    }
    with environment_unread():
        assert OmegaConf.to_container(cfg, resolve=True)["log"]["dir"] == "${oc.env:PLACE}/x/logs"
    assert cfg.log.dir == "/secret/x/logs"
