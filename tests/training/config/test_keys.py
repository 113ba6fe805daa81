import pytest
from omegaconf import OmegaConf

from tokenpref._paths import data_root
from tokenpref.errors import ConfigError
from tokenpref.training.config.command_line import load_config
from tokenpref.training.config.faults import loss_faults
from tokenpref.training.config.fields import read_config
from tokenpref.training.config.keys import EvaluateConfig, TrainConfig

PROVIDES = frozenset({"ref", "kl_ref_policy", "kl_policy_ref"})


@pytest.fixture
def cfg():
    return OmegaConf.load(data_root() / "configs" / "tiny" / "tdpo.yaml")


def faults_of(cfg, schema=TrainConfig):
    with pytest.raises(ConfigError) as caught:
        read_config(schema, cfg, lambda c: loss_faults(c.loss, PROVIDES, "recipes/tdpo_distributed"))
    return caught.value.faults


def test_a_shipped_config_reads_into_typed_values(cfg):
    config = read_config(TrainConfig, cfg)
    assert config.batch_size == 8
    assert config.clip_grad_norm == 1.0
    assert config.lr_scheduler is None
    assert config.loss.build().needs == {"ref", "kl_ref_policy"}
    assert config.dataset.kwargs["source"] == str(data_root() / "data" / "tiny" / "train.jsonl")


def test_all_faults_come_together_with_the_nearest_names(cfg):
    cfg.batchsize = 4
    cfg.epochs = 0
    cfg.dtype = "fp16"
    cfg.loss.betta = 0.2
    cfg.optimizer._component_ = "torch.optim.AdamWW"
    cfg.checkpointer.checkpoint_dir = "no/such/folder"
    del cfg.tokenizer
    faults = "\n".join(faults_of(cfg))
    for expected in (
        "batchsize: unknown key; did you mean 'batch_size'?",
        "epochs: expected a whole number of at least 1, found 0",
        "dtype: expected one of fp32, bf16, found 'fp16'",
        "loss.betta: TokenDPOLoss takes no such argument; did you mean 'beta'?",
        "did you mean 'AdamW'?",
        "checkpointer.checkpoint_dir: no folder at",
        "tokenizer: missing",
    ):
        assert expected in faults


def test_a_list_of_data_sets_is_a_mixture(cfg):
    one = {"_component_": "tokenpref.data.preference_dataset", "source": "package://data/tiny/train.jsonl"}
    cfg.dataset = [one, {**one, "weight": 0.5, "max_rows": 8}]
    config = read_config(TrainConfig, cfg)
    assert [part.key for part in config.dataset.parts] == ["dataset[0]", "dataset[1]"]
    mixed = config.dataset.build(config.tokenizer.build())
    assert len(mixed) == len(mixed.parts[0]) + 4 and len(mixed.parts[1]) == 4
    assert len(config.dataset.build(config.tokenizer.build(), max_rows=2).parts[0]) == 2
    cfg.dataset = [{**one, "wieght": 1}, {"source": "x"}, 3]
    faults = "\n".join(faults_of(cfg))
    for expected in (
        "dataset[0].wieght: ",
        "dataset[1]: expected a mapping with _component_",
        "dataset[2]: expected",
    ):
        assert expected in faults
    cfg.dataset = []
    assert faults_of(cfg) == ["dataset: the list is empty; name at least one data set"]
    cfg.dataset = [{"_component_": "builtins.dict"}]
    with pytest.raises(
        ConfigError, match=r"dataset\[0\] \(builtins.dict\): makes a dict, which cannot be mixed"
    ):
        read_config(TrainConfig, cfg).dataset.build({})


def test_a_loss_that_refuses_its_settings_is_a_fault(cfg):
    cfg.loss.beta = -1.0
    (fault,) = faults_of(cfg)
    assert fault.startswith("loss (tokenpref.losses.TokenDPOLoss)") and "beta" in fault


def test_a_loss_whose_needs_nothing_provides_is_a_fault(cfg):
    cfg.loss = {"_component_": "tokenpref.losses.TISDPOLoss", "beta": 0.1}
    (fault,) = faults_of(cfg)
    assert "needs 'weights', which recipes/tdpo_distributed does not provide" in fault


def test_a_key_that_others_refer_to_is_a_variable(cfg):
    cfg.model_dir = "package://data/tiny/model"
    cfg.tokenizer.path = "${model_dir}"
    assert read_config(TrainConfig, cfg).tokenizer.kwargs["path"] == str(
        data_root() / "data" / "tiny" / "model"
    )


def test_missing_checkpoint_file_is_named(cfg):
    cfg.checkpointer.checkpoint_files = ["model-00009.safetensors"]
    (fault,) = faults_of(cfg)
    assert "'model-00009.safetensors' is not in" in fault


def test_unprepared_smollm2_says_which_command_prepares_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = OmegaConf.load(data_root() / "configs" / "smollm2" / "135M_tdpo.yaml")
    (fault,) = faults_of(cfg)
    assert "`tokenpref prepare smollm2`" in fault


def test_wrong_types_are_faults(cfg):
    cfg.shuffle = "yes"
    cfg.clip_grad_norm = 0
    cfg.log_stats = ["entropie"]
    cfg.dataset = "train.jsonl"
    faults = "\n".join(faults_of(cfg))
    assert "shuffle: expected true or false, found 'yes'" in faults
    assert "clip_grad_norm: expected a number above 0, found 0" in faults
    assert "log_stats: unknown 'entropie'; did you mean 'entropy'?" in faults
    assert "dataset: expected a mapping with _component_" in faults


def test_unresolvable_interpolation_is_one_fault(cfg):
    cfg.output_dir = "${nowhere}/x"
    (fault,) = faults_of(cfg)
    assert "nowhere" in fault


def test_validation_without_data_is_a_fault(cfg):
    cfg.dataset_val = None
    (fault,) = faults_of(cfg)
    assert fault.startswith("run_val_every_n_steps")


def test_evaluation_config_checks_its_nested_section():
    cfg = OmegaConf.load(data_root() / "configs" / "tiny" / "evaluate.yaml")
    assert read_config(EvaluateConfig, cfg).sampling.max_new_tokens == 8
    cfg.sampling.num_sample = 3
    cfg.sampling.prompts = "missing.txt"
    with pytest.raises(ConfigError) as caught:
        read_config(EvaluateConfig, cfg)
    assert "sampling.num_sample: unknown key; did you mean 'num_samples'?" in str(caught.value)


def test_a_misspelt_model_type_names_its_key(cfg, tmp_path):
    cfg.checkpointer.model_type = "LAMA"
    cfg.checkpointer.output_dir = str(tmp_path)
    with pytest.raises(
        ConfigError, match=r"^checkpointer \(.*FullModelHFCheckpointer\): it knows no 'LAMA'; did you"
    ):
        read_config(TrainConfig, cfg)


def test_components_are_said_in_one_line(caplog, monkeypatch):
    arguments = ["--config", "tiny/evaluate"]
    with caplog.at_level("INFO", logger="tokenpref"):
        read_config(EvaluateConfig, load_config(arguments))
    (line,) = caplog.messages
    assert line.startswith(
        "components: tokenizer=tokenpref.data.tokenizer_json, model=tokenpref.models.tiny_llama, "
    )
    assert (
        "loss=tokenpref.losses.DPOLoss" in line and "sampling.reward=tokenpref.rewards.KeywordReward" in line
    )
    assert "sampling.reward=tokenpref.rewards.KeywordReward" in line
    caplog.clear()
    monkeypatch.setenv("RANK", "1")
    with caplog.at_level("INFO", logger="tokenpref"):
        read_config(EvaluateConfig, load_config(arguments))
    assert not caplog.messages


def test_components_are_named_before_they_are_imported(caplog, tmp_path, monkeypatch):
    code = "import logging\nlogging.getLogger('tokenpref').info('the file runs')\nfrom tokenpref.losses import DPOLoss\n"
    for name in ("seen_first", "seen_next"):
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    with caplog.at_level("INFO", logger="tokenpref"):
        cfg = load_config(["--config", "tiny/tdpo", "loss=seen_first.DPOLoss"], announce=True)
    assert caplog.messages[:2] == [
        "loss: importing seen_first.DPOLoss instead of tokenpref.losses.TokenDPOLoss",
        "the file runs",
    ]
    cfg.loss._component_ = "seen_next.DPOLoss"
    caplog.clear()
    with caplog.at_level("INFO", logger="tokenpref"):
        read_config(TrainConfig, cfg)
    assert "loss=seen_next.DPOLoss" in caplog.messages[0] and caplog.messages[1] == "the file runs"
