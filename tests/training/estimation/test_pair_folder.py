"""The pair's folder: what is written is read, and every way in which it can be wrong is one error."""

import pytest
import yaml
from omegaconf import OmegaConf

from tokenpref._registry import config_files
from tokenpref.components import COMPONENT
from tokenpref.errors import DataError
from tokenpref.training.config.fields import Component
from tokenpref.training.estimation.pair_folder import PAIR_FILE, SIDES, check_weights, read_pair, write_pair
from tokenpref.training.loading.models import weights_digest
from tokenpref.training.saving.checkpoints import seal

MODEL = Component("model", "tokenpref.models.tiny_llama", {})


@pytest.fixture
def pair(tmp_path):
    folder = tmp_path / "pair"
    for side in ("positive", "negative"):
        (folder / side / "epoch_0").mkdir(parents=True)
        (folder / side / "epoch_0" / "model.safetensors").write_bytes(side.encode())
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"base")
    base = Component(
        "checkpointer",
        "torchtune.training.FullModelHFCheckpointer",
        {
            "checkpoint_dir": str(tmp_path / "base"),
            "checkpoint_files": ["model.safetensors"],
            "model_type": "LLAMA3_2",
        },
    )
    sides = {side: {"checkpoint": f"{side}/epoch_0", "prompt": None} for side in ("positive", "negative")}
    write_pair(
        folder,
        method="dpo",
        tokenizer="f" * 64,
        model=MODEL,
        base=base,
        sides=sides,
        config={"method": "dpo"},
    )
    return folder


def changed(folder, change):
    record = yaml.safe_load((folder / PAIR_FILE).read_text())
    change(record)
    (folder / PAIR_FILE).write_text(yaml.safe_dump(record))


def test_round_trip(pair):
    found = read_pair(pair)
    assert found.method == "dpo" and found.tokenizer == "f" * 64 and found.model.path == MODEL.path
    assert found.positive.checkpointer.kwargs["checkpoint_dir"] == str(pair / "positive" / "epoch_0")
    assert found.positive.checkpointer.kwargs["checkpoint_files"] == ["model.safetensors"]
    assert not found.shares_weights
    assert weights_digest(found.positive.checkpointer) != weights_digest(found.negative.checkpointer)


def test_prompt_pair_shares_its_base(pair):
    changed(
        pair, lambda r: r.update({s: {"checkpoint": None, "prompt": s} for s in ("positive", "negative")})
    )
    found = read_pair(pair)
    assert found.shares_weights and (found.positive.prompt, found.negative.prompt) == ("positive", "negative")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(format="x"), "format is 'x', expected"),
        (lambda r: r.update(method="ppo"), "method is 'ppo', expected one of prompt, sft, dpo"),
        (lambda r: r.pop("negative"), "'negative'.*is missing or of the wrong type"),
        (
            lambda r: r["negative"].update(tokenizer="0" * 64),
            "the sides have different tokenizers .ffffffffffff and 0000",
        ),
        (
            lambda r: r["negative"].update(model={COMPONENT: "torchtune.models.gemma.gemma_2b"}),
            "the sides have different architectures",
        ),
        (
            lambda r: r["positive"].update(checkpoint="../base"),
            "positive.checkpoint '../base' leaves the pair's folder",
        ),
        (lambda r: r["positive"].update(checkpoint="elsewhere"), "no weights of the positive side"),
    ],
)
def test_faults(pair, change, message):
    changed(pair, change)
    with pytest.raises(DataError, match=message):
        read_pair(pair)


def test_half_built(pair):
    (pair / PAIR_FILE).unlink()
    (pair / "positive" / "finished.json").write_text("{}")
    with pytest.raises(DataError, match="half built .positive is done, negative is not.*it continues"):
        read_pair(pair)


def test_no_pair(tmp_path):
    with pytest.raises(DataError, match="no contrastive pair there; build one with"):
        read_pair(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is no contrastive pair"):
        read_pair(tmp_path)
    (tmp_path / PAIR_FILE).write_text("{: :")
    with pytest.raises(DataError, match="not valid YAML"):
        read_pair(tmp_path)


WITH_MODEL = {name: file for name, file in config_files().items() if "\nmodel:" in file.read_text()}


@pytest.mark.parametrize("file", WITH_MODEL.values(), ids=WITH_MODEL)
def test_what_our_configs_name_may_stand_in_a_pair(pair, file):
    config = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    model, base = config["model"][COMPONENT], config["checkpointer"][COMPONENT]
    changed(pair, lambda r: (r.update(model={COMPONENT: model}), r["base"].update({COMPONENT: base})))
    assert read_pair(pair).model.path == model


@pytest.mark.parametrize(
    ("path", "known"),
    [
        ("tokenpref.models.smollm2_135m", True),
        ("torchtune.models.llama3_2.lora_llama3_2_1b", True),
        ("torchtune.models.llama2.qlora_llama2_7b", True),
        ("torchtune.models.llama2.llama2_tokenizer", False),
        ("torchtune.models.llama2.NoSuch", False),
        ("torchtune.models.llama2._model_builders.partial", False),
        ("torchtune.modules.TransformerDecoder", False),
        ("tokenpref.models.smollm2.prepare", False),
        ("tokenpref.models.ScoringModel", False),
        ("my_models.mine", False),
    ],
)
def test_only_models_are_called(pair, path, known):
    changed(pair, lambda r: r.update(model={COMPONENT: path}))
    if known:
        assert read_pair(pair).model.path == path
        return
    with pytest.raises(DataError, match=f"model is '{path}'.*set estimator.trusted_components=.{path}."):
        read_pair(pair)
    assert read_pair(pair, [path]).model.path == path  # at the reader's word, and not yet imported


def test_a_checkpointer_of_the_readers_own(pair):
    changed(
        pair, lambda r: r["base"].update({COMPONENT: "my_models.Checkpointer", "adapter_checkpoint": "a"})
    )
    with pytest.raises(
        DataError, match="base is 'my_models.Checkpointer'.*not one of torchtune.training.Full"
    ):
        read_pair(pair)
    assert read_pair(pair, ["my_models.Checkpointer"]).positive.checkpointer.path == "my_models.Checkpointer"


def test_damaged_weights_of_a_side(pair):
    check_weights(read_pair(pair))  # sides without a manifest are taken as they are
    for side in SIDES:
        seal(pair / side / "epoch_0")
    (pair / "negative/epoch_0/README.md").write_text("a note that somebody added")
    check_weights(read_pair(pair))
    for side in SIDES:
        file = pair / side / "epoch_0" / "model.safetensors"
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + b"f")
        with pytest.raises(DataError, match=f"{side}/epoch_0: model.safetensors is not what was written"):
            check_weights(read_pair(pair))
        file.write_bytes(whole)
