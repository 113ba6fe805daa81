import pytest
from omegaconf import OmegaConf

from tokenpref.errors import ConfigError
from tokenpref.training.config.command_line import load_config


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_overrides_merge_with_types():
    cfg = load_config(
        ["--config", "tiny/tdpo", "loss.beta=0.2", "batch_size=4", "log_stats=[entropy]", "dtype=bf16"]
    )
    assert (cfg.loss.beta, cfg.batch_size, list(cfg.log_stats), cfg.dtype) == (0.2, 4, ["entropy"], "bf16")


def test_a_packaged_config_is_found_by_its_path_from_anywhere(folder):
    assert load_config(["--config", "configs/tiny/tdpo.yaml"]).loss.variant == "tdpo2"


def test_a_file_here_goes_before_the_packaged_one(folder):
    (folder / "configs" / "tiny").mkdir(parents=True)
    (folder / "configs" / "tiny" / "tdpo.yaml").write_text("batch_size: 3\n")
    assert load_config(["--config", "configs/tiny/tdpo.yaml"]) == {"batch_size": 3}


def test_a_component_may_be_named_short_or_removed():
    cfg = load_config(
        ["--config", "tiny/evaluate", "loss=tokenpref.losses.DPOLoss", "~dataset", "sampling=null"]
    )
    assert OmegaConf.to_container(cfg.loss) == {"_component_": "tokenpref.losses.DPOLoss", "beta": 0.1}
    assert "dataset" not in cfg and cfg.sampling is None
    assert load_config(["--config", "tiny/tdpo", "dataset_val=null"]).dataset_val is None


def test_a_component_that_the_file_does_not_name_may_be_given_short():
    rate = "lr_scheduler=tokenpref.training.get_constant_schedule_with_warmup"
    cfg = load_config(["--config", "tiny/tdpo", rate, "lr_scheduler.num_warmup_steps=3"])
    assert OmegaConf.to_container(cfg.lr_scheduler) == {
        "_component_": "tokenpref.training.get_constant_schedule_with_warmup",
        "num_warmup_steps": 3,
    }
    assert load_config(["--config", "tiny/tdpo", "profiler.enabled=true"]).profiler == {"enabled": True}


def test_a_replaced_component_keeps_what_it_takes_and_what_the_command_line_gives(caplog):
    words = ["loss._component_=tokenpref.losses.DPOLoss", "loss.label_smoothing=0.1"]
    cfg = load_config(["--config", "tiny/tdpo", *words])
    assert OmegaConf.to_container(cfg.loss) == {
        "_component_": "tokenpref.losses.DPOLoss",
        "beta": 0.1,
        "label_smoothing": 0.1,
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--config is missing"),
        (["--config"], "--config is missing"),
        (["--config", "tiny/no_such"], "no file 'tiny/no_such'"),
        (["--config", "list.yaml"], "must hold a mapping"),
        (["--config", "broken.yaml"], "not valid YAML"),
        (["--config", "tiny/tdpo", "batch_size"], "'batch_size': an override is written key=value"),
        (["--config", "tiny/tdpo", "--batch_size=3"], "an override is written key=value"),
        (["--config", "tiny/tdpo", "~loss.gamma"], "~loss.gamma: the config has no such key"),
    ],
)
def test_bad_command_lines_are_one_error(folder, arguments, words):
    (folder / "list.yaml").write_text("- 1\n")
    (folder / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ConfigError, match=words.replace("[", r"\[")):
        load_config(arguments)
