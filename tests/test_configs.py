"""Every config that comes with the package: read, checked, and its components built on the meta device."""

import json
import re

import pytest
import torch
from omegaconf import OmegaConf
from support.published import CAUSAL_LMS

from tokenpref._registry import config_files, recipe_of
from tokenpref._torchtune import TransformerDecoder
from tokenpref.models.decoder_of import decoder_of
from tokenpref.training import Evaluator, PreferenceTrainer, TripletTrainer, WeightedTrainer
from tokenpref.training.config import keys as config
from tokenpref.training.config.command_line import load_config
from tokenpref.training.config.defaults import without_defaults
from tokenpref.training.config.faults import loss_faults
from tokenpref.training.config.fields import read_config
from tokenpref.training.config.keys import EvaluateConfig, TrainConfig, TripletConfig, WeightedConfig
from tokenpref.training.estimation import estimators as estimate
from tokenpref.training.estimation.estimators import EstimateConfig
from tokenpref.training.estimation.pair_builder import ContrastiveConfig

RECIPES = {
    "tdpo_distributed": (TrainConfig, PreferenceTrainer),
    "tis_dpo_distributed": (WeightedConfig, WeightedTrainer),
    "ti_dpo_distributed": (TripletConfig, TripletTrainer),
    "contrastive_reference_distributed": (ContrastiveConfig, PreferenceTrainer),
    "estimate_weights_distributed": (EstimateConfig, None),
    "evaluate_distributed": (EvaluateConfig, Evaluator),
}
# Prefixes of names: of models with every preset, and of those with one config for TIS-DPO.
PRESETS = ("tiny/", "smollm2/135M_", "llama3_2/1B_")
RELEASED = ("llama3_2/1B_", "qwen2_5/3B_", "mistral/7B_")  # with the optimizer of the released code
PIPELINES = (*PRESETS, "qwen2_5/3B_", "mistral/7B_", "qwen3/1.7B_")
FILES = config_files()
OF_TRANSFORMERS = sorted(name for name, file in FILES.items() if "models.causal_lm" in file.read_text())
COMMAND = re.compile(r"tune run (?:--nproc_per_node (\d+) )?recipes/(\w+) (--config (?:[^\\\n]|\\\n)+)")
# Keys that a config may name at their default, because a reader looks for them: the method's, and how large and long a run is.
SHOWN = {
    *("batch_size", "device", "dtype", "epochs", "gradient_accumulation_steps", "seed"),
    *("eos_weight", "normalize_weights", "use_eos_score"),
}
METHOD = {
    *("anchors", "estimator", "loss", "loss_val", "lr_scheduler", "optimizer", "sampling", "token_weights"),
    "weight_transform",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The config.json of every model that configs name, where they expect it."""
    place = tmp_path_factory.mktemp("models")
    for name, (_, config_json) in CAUSAL_LMS.items():
        folder = place / "models" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config_json))
    return place


@pytest.fixture(params=sorted(FILES))
def shipped(request, folders, monkeypatch):
    monkeypatch.chdir(folders)
    # The weights of the larger models are not here; their paths are the user's to make.
    for module in (config, estimate):
        monkeypatch.setattr(module, "checkpoint_faults", lambda checkpointer, model: [])
    file = FILES[request.param]
    schema, recipe = RECIPES[recipe_of(file.stem)]
    loaded = OmegaConf.load(file)
    if recipe is None:
        return file, read_config(schema, loaded)
    return file, read_config(schema, loaded, lambda c: loss_faults(c.loss, recipe.provides, recipe.recipe))


def file_is_of_transformers(file):
    return f"{file.parent.name}/{file.stem}" in OF_TRANSFORMERS


def check_size(model, component):
    """The base has as many parameters as its makers publish, and adapters are on all of its linear layers."""
    published, _ = CAUSAL_LMS[component.kwargs["path"].removeprefix("models/")]
    adapters = {n: p for n, p in model.named_parameters() if ".lora_" in n}
    assert sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in adapters.values()) == published
    layers = model.config.num_hidden_layers
    if component.kwargs.get("lora") is None:
        assert not adapters
    else:
        assert component.kwargs["lora"] == {"rank": 16, "alpha": 32} and len(adapters) == 2 * 7 * layers
        assert all(min(p.shape) == 16 for p in adapters.values())


def test_components_can_be_built(shipped):
    _, cfg = shipped
    with torch.device("meta"):
        model = cfg.model.build()
    if file_is_of_transformers(shipped[0]):
        check_size(model, cfg.model)
    else:
        assert isinstance(model, TransformerDecoder)
    decoder_of(model).check()
    if isinstance(cfg, EstimateConfig):
        return  # its other components have been checked by the schema
    if isinstance(cfg, ContrastiveConfig):
        assert cfg.loss is None and cfg.method == "dpo"
    else:
        assert cfg.loss.build().needs
    if isinstance(cfg, TripletConfig):
        assert cfg.token_weights.build().kind == "weight" and cfg.weight_transform is None
        assert ("anchor" in cfg.loss.build().needs) == (cfg.anchors.build() is not None)
    if isinstance(cfg, TrainConfig):
        optimizer = cfg.optimizer.build(model.parameters())
        if cfg.lr_scheduler is not None:
            scheduler = cfg.lr_scheduler.build(optimizer, num_training_steps=10, last_epoch=-1)
            assert scheduler.get_last_lr()[0] > 0
        profiler, settings = cfg.profiler.build()
        assert not settings.enabled


@pytest.mark.parametrize("name", sorted(FILES))
def test_keys_at_their_default_are_not_named(name):
    data = OmegaConf.to_container(OmegaConf.load(FILES[name]))
    schema, _ = RECIPES[recipe_of(FILES[name].stem)]
    if "dataset" in data:
        data["dataset"].pop("split", None)  # is read together with the source
    for size in ("lora_rank", "lora_alpha"):  # always shown
        data.get("model", {}).pop(size, None)
    kept = without_defaults(schema, data)
    assert set(data) - set(kept) <= SHOWN
    for key in kept.keys() - METHOD:
        assert kept[key] == data[key]


def test_output_folder_is_the_configs_own(shipped):
    file, cfg = shipped
    name = f"{file.parent.name}_{file.stem}"
    assert cfg.output_dir == f"outputs/{name}"


def test_the_header_shows_its_command(shipped):
    file, _ = shipped
    text = file.read_text()
    name = f"{file.parent.name}/{file.stem}"
    assert f"recipes/{recipe_of(file.stem)} --config {name}" in text


def test_paper_settings_are_the_papers():
    """TDPO's appendix B: alpha 0.5, beta 0.1, RMSprop 5e-6, warm-up 150, 64 pairs a step, lengths 256 and 512, clip 10."""
    for name in ("llama3_2/1B_tdpo", "qwen2_5/0.5B_tdpo", "mistral/7B_tdpo"):
        cfg = OmegaConf.load(FILES[name])
        gpus = int(FILES[name].read_text().split("--nproc_per_node ")[1].split()[0])
        assert cfg.batch_size * cfg.gradient_accumulation_steps * gpus == 64
        assert (cfg.loss.beta, cfg.loss.alpha, cfg.loss.variant) == (0.1, 0.5, "tdpo2")
        assert (cfg.optimizer._component_, cfg.optimizer.lr) == ("torch.optim.RMSprop", 5e-6)
        assert cfg.lr_scheduler.num_warmup_steps == 150 and cfg.clip_grad_norm == 10.0
        assert (cfg.dataset.max_prompt_len, cfg.dataset.max_seq_len) == (256, 512)


@pytest.mark.parametrize("model", PIPELINES)
def test_the_configs_of_a_pipeline_fit_together(model):
    prefix = f"outputs/{model.replace('/', '_')}"
    pair, estimate, trained = (
        OmegaConf.load(FILES[f"{model}{n}"]) for n in ("contrastive_reference", "estimate_weights", "tis_dpo")
    )
    assert estimate.estimator.pair == pair.output_dir == f"{prefix}contrastive_reference"
    assert trained.token_weights.path == f"{estimate.output_dir}/weights"
    for part in ("dataset", "tokenizer"):  # otherwise the store would not fit
        assert trained[part] == estimate[part] == pair[part]
    assert trained.model == estimate.model == pair.model and trained.optimizer == pair.optimizer
    assert trained.checkpointer.checkpoint_dir == pair.checkpointer.checkpoint_dir
    for key in ("checkpoint_dir", "checkpoint_files", "model_type"):
        assert estimate.checkpointer.get(key) == pair.checkpointer.get(key)
    assert trained.loss.beta == 0.1 and "alpha" not in trained.loss


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_the_commands_of_a_header_make_what_the_config_reads(name, folders, monkeypatch):
    """Configs of transformers' models use the pair of Qwen3-1.7B's with another folder, so the header's commands count."""
    monkeypatch.chdir(folders)
    monkeypatch.setattr(estimate, "checkpoint_faults", lambda checkpointer, model: [])
    monkeypatch.setattr(config, "checkpoint_faults", lambda checkpointer, model: [])
    text = FILES[name].read_text()
    runs = {}
    for processes, recipe, words in COMMAND.findall(re.sub(r"\\\n#", "", text)):
        cfg = load_config(words.split())
        assert recipe_of(words.split()[1].split("/")[1]) == recipe
        read_config(RECIPES[recipe][0], cfg)
        runs[recipe] = (int(processes or 1), cfg)
    own_recipe = recipe_of(FILES[name].stem)
    processes, own = runs[own_recipe]
    assert own.checkpointer.checkpoint_dir in text.split("--output-dir ")[1].splitlines()[0]
    assert own.tokenizer.path == own.model.path == own.checkpointer.checkpoint_dir
    full = "lora" not in own.model
    for recipe, (processes, cfg) in runs.items():
        for part in ("tokenizer", "model", "dataset"):
            assert {k: v for k, v in cfg[part].items() if v is not None} == own[part]
        assert cfg.checkpointer.checkpoint_dir == own.checkpointer.checkpoint_dir
        assert FILES[name].parent.name in cfg.output_dir
        if recipe != "estimate_weights_distributed":
            assert cfg.batch_size * cfg.gradient_accumulation_steps * processes == (128 if full else 32)
            if "optimizer" in own:
                assert cfg.optimizer == own.optimizer and cfg.lr_scheduler == own.lr_scheduler
    made = {recipe: cfg.output_dir for recipe, (_, cfg) in runs.items()}
    if "estimate_weights_distributed" in runs:
        _, scores = runs["estimate_weights_distributed"]
        assert scores.estimator.pair == made["contrastive_reference_distributed"]
    if own_recipe == "tis_dpo_distributed":
        assert own.token_weights.path == f"{made['estimate_weights_distributed']}/weights"


@pytest.mark.parametrize("model", PRESETS)
def test_presets_of_tis_dpo_differ_in_their_settings_alone(model):
    names = ("tis_dpo", "tis_kl", "tis_paper", "tis_released")
    presets = {n: OmegaConf.load(FILES[f"{model}{n}"]) for n in names}
    own = {"output_dir", "loss", "weight_transform", "use_eos_score", "eos_weight"}
    for cfg in presets.values():
        assert cfg.loss.beta == 0.1
        shared, base = (OmegaConf.to_container(c, resolve=False) for c in (cfg, presets["tis_dpo"]))
        assert {k: shared[k] for k in shared.keys() - own} == {k: base[k] for k in base.keys() - own}
    paper, released = presets["tis_paper"], presets["tis_released"]
    assert paper.loss.alpha == 1 and paper.normalize_weights == "none"
    assert dict(paper.weight_transform) == {
        "_component_": "tokenpref.weights.transforms.exponential", "k": 1.0, "mu": 1.0, "lower": -0.5, "upper": 1.5
    }  # fmt: skip
    assert dict(released.weight_transform) == {
        "_component_": "tokenpref.weights.transforms.rank_based", "min_scale": 0.7, "max_scale": 1.3, "ties": "position"
    }  # fmt: skip
    assert (released.use_eos_score, released.eos_weight) == (False, 0.0) and "alpha" not in released.loss
    assert presets["tis_kl"].loss.alpha == 0.5 and "alpha" not in presets["tis_dpo"].loss


@pytest.mark.parametrize(
    "name",
    [
        "llama3_2/1B_tis_released",
        *(f"{m}tis_dpo" for m in RELEASED),
    ],
)
def test_tis_settings_are_the_releases(name):
    """The released code: RMSprop 5e-7, warm-up 150, 32 pairs a step, lengths 256 and 512, clip 10."""
    cfg = OmegaConf.load(FILES[name])
    gpus = int(FILES[name].read_text().split("--nproc_per_node ")[1].split()[0])
    assert cfg.batch_size * cfg.gradient_accumulation_steps * gpus == 32
    assert (cfg.optimizer._component_, cfg.optimizer.lr) == ("torch.optim.RMSprop", 5e-7)
    assert cfg.lr_scheduler.num_warmup_steps == 150 and cfg.clip_grad_norm == 10.0
    assert (cfg.dataset.max_prompt_len, cfg.dataset.max_seq_len) == (256, 512)


@pytest.mark.parametrize("model", PRESETS)
def test_ti_settings_are_the_papers_and_the_codes(model):
    """Paper: table B13 and equations 5 to 14. Code: the released yaml, and what its forward passes."""
    paper, code = (OmegaConf.load(FILES[f"{model}{n}"]) for n in ("ti_paper", "ti_code"))
    loss = {k: v for k, v in paper.loss.items() if k in ("beta", "gamma", "alpha", "length_normalization")}
    assert loss == {"beta": 0.1, "gamma": 0.1, "alpha": 0.0, "length_normalization": "none"}
    loss = {k: v for k, v in code.loss.items() if k in ("beta", "gamma", "margin", "alpha")}
    assert loss == {"beta": 0.2, "gamma": 0.001, "margin": 0.001, "alpha": 0.5}
    for cfg, position, span, mixture, sigma, normalized in (
        (paper, "before_last", "answer", 0.7, 1 / 4, False),
        (code, "last_valid", "prompt_and_answer", 0.2, 1 / 8, True),
    ):
        found = cfg.token_weights
        assert found.target._component_.endswith("MaxLogit") and found.target.position == position
        assert (found.norm, found.span, found.mixture, found.refresh) == ("l1", span, mixture, "every_step")
        assert (found.prior.sigma, found.prior.normalized) == (sigma, normalized)
    sampling = {k: code.anchors[k] for k in ("temperature", "top_k", "top_p", "start")}
    assert sampling == {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "start": "prompt"}
    assert paper.anchors.start == "chosen_prefix" and paper.loss.anchor_grad and code.loss.anchor_grad
    if model == "llama3_2/1B_":
        assert (code.dataset.max_prompt_len, code.dataset.max_seq_len) == (128, 256)
        assert (code.optimizer._component_, code.optimizer.lr) == ("torch.optim.RMSprop", 5e-6)
