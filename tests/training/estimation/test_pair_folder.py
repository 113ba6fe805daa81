"""The pair's folder: what is written is read, it names nothing that is called, and every fault in it is one error."""

import pytest
import yaml

from tokenpref.components import COMPONENT
from tokenpref.distributed import single_process_world
from tokenpref.errors import DataError
from tokenpref.models.decoder_of import decoder_of
from tokenpref.training.config.command_line import load_config
from tokenpref.training.config.fields import Component, read_config
from tokenpref.training.estimation.estimators import EstimateConfig
from tokenpref.training.estimation.pair_folder import PAIR_FILE, SIDES, base_digest, read_pair, write_pair
from tokenpref.training.loading.models import ModelMaker, weights_digest

TOKENIZER = "f" * 64


@pytest.fixture
def base(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"base")
    return Component(
        "checkpointer",
        "torchtune.training.FullModelHFCheckpointer",
        {
            "checkpoint_dir": str(tmp_path / "base"),
            "checkpoint_files": ["model.safetensors"],
            "output_dir": str(tmp_path / "out"),
            "model_type": "LLAMA3_2",
        },
    )


def maker(base, **arguments):
    config = read_config(EstimateConfig, load_config(["--config", "tiny/estimate_weights_attribution"]))
    model = Component("model", "tokenpref.models.tiny_llama", arguments)
    return ModelMaker(config, single_process_world(), model=model, checkpointer=base)


@pytest.fixture
def pair(tmp_path, base):
    folder = tmp_path / "pair"
    for side in SIDES:
        (folder / side / "epoch_0").mkdir(parents=True)
        (folder / side / "epoch_0" / "model.safetensors").write_bytes(side.encode())
    write_pair(
        folder,
        method="dpo",
        tokenizer=TOKENIZER,
        model=decoder_of(maker(base).on_meta()).numbers(),
        base=base_digest(base),
        sides={side: {"checkpoint": f"{side}/epoch_0", "prompt": None} for side in SIDES},
        config={"method": "dpo"},
    )
    return folder


def changed(folder, change):
    record = yaml.safe_load((folder / PAIR_FILE).read_text())
    change(record)
    (folder / PAIR_FILE).write_text(yaml.safe_dump(record))


def of_prompts(record):
    record.update({side: {"checkpoint": None, "prompt": side} for side in SIDES})


def former(base):
    """The record as the former format has it: with the components of model and checkpointer."""
    model = {COMPONENT: "tokenpref.models.tiny_llama"}
    kept = {COMPONENT: base.path, **base.kwargs}
    return lambda record: record.update(format="tokenpref-pair/1", model=model, base=kept)


def test_round_trip(pair, base):
    found = read_pair(pair)
    assert found.method == "dpo" and found.tokenizer == TOKENIZER and found.negative.adapter is None
    found.check(maker(base), TOKENIZER)
    readers = [found.reader(side, base) for side in SIDES]
    assert readers[0].path == base.path and readers[0].kwargs["model_type"] == "LLAMA3_2"
    assert readers[0].kwargs["checkpoint_dir"] == str(pair / "positive" / "epoch_0")
    assert readers[0].kwargs["checkpoint_files"] == ["model.safetensors"]
    assert weights_digest(readers[0]) != weights_digest(readers[1])


def test_it_names_nothing_that_is_called(pair):
    record = yaml.safe_load((pair / PAIR_FILE).read_text())
    del record["config"]  # it tells how the pair was made, and nothing reads it
    assert COMPONENT not in yaml.safe_dump(record)
    assert record["model"]["num_hidden_layers"] == 2 and record["model"]["rope_theta"] == 10000


def test_prompt_pair_shares_its_base(pair, base):
    changed(pair, of_prompts)
    found = read_pair(pair)
    assert found.positive.checkpoint is None and (found.positive.prompt, found.negative.prompt) == SIDES
    assert weights_digest(found.reader("negative", base)) == weights_digest(base)


@pytest.mark.parametrize("form", ["present", "former"])
def test_what_a_config_names_must_be_the_pairs(pair, base, form, tmp_path):
    if form == "former":
        changed(pair, of_prompts)
        changed(pair, former(base))
    found = read_pair(pair)
    found.check(maker(base), TOKENIZER)
    with pytest.raises(DataError, match="another tokenizer .ffffffffffff, here 000000000000"):
        found.check(maker(base), "0" * 64)
    with pytest.raises(DataError, match=r"another model .num_.*layers is .* there and 3 here.*; set model"):
        found.check(maker(base, num_layers=3), TOKENIZER)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").write_bytes(b"other")
    other = Component(base.key, base.path, {**base.kwargs, "checkpoint_dir": str(tmp_path / "other")})
    with pytest.raises(DataError, match="another base model .*; set checkpointer to the pair's"):
        found.check(maker(other), TOKENIZER)


def test_every_number_of_the_model_is_compared(pair, base):
    changed(pair, lambda r: r["model"].update(rope_theta=1000.0))
    with pytest.raises(DataError, match="another model .rope_theta is 1000.0 there and 10000"):
        read_pair(pair).check(maker(base), TOKENIZER)


def test_trained_sides_of_the_former_format_may_have_lost_their_base(pair, base, tmp_path):
    changed(pair, former(base))
    moved = (tmp_path / "base").rename(tmp_path / "moved")
    found = read_pair(pair)
    elsewhere = Component(base.key, base.path, {**base.kwargs, "checkpoint_dir": str(moved)})
    found.check(maker(elsewhere), TOKENIZER)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(format="x"), "format is 'x', expected 'tokenpref-pair/2'; build the pair again"),
        (lambda r: r.update(method="ppo"), "method is 'ppo', expected one of prompt, sft, dpo"),
        (lambda r: r.pop("negative"), "negative is None, expected a mapping"),
        (lambda r: r.update(model={}), "model is {}, expected a mapping"),
        (lambda r: r.update(base=["x"]), r"base is \['x'\], expected text or null"),
        (lambda r: r.update(tokenizer=5), "tokenizer is 5, expected text"),
        (lambda r: r["negative"].update(tokenizer="0" * 64), "negative has 'tokenizer', and a side has only"),
        (lambda r: r["positive"].update(prompt=3), "positive.prompt is 3, expected text or null"),
        (lambda r: r["positive"].update(checkpoint=["x"]), "positive.checkpoint is .'x'., expected text"),
        (
            lambda r: r["positive"].update(checkpoint="../base"),
            "positive.checkpoint '../base' leaves the pair's folder",
        ),
        (lambda r: r["positive"].update(checkpoint="elsewhere"), "no weights of the positive side"),
        (lambda r: r["positive"].update(adapter=7), "positive.adapter is 7, expected text or null"),
        (lambda r: r["positive"].update(adapter="positive"), "positive has a checkpoint and an adapter"),
        (
            lambda r: r["negative"].update(checkpoint=None, adapter="../base"),
            "negative.adapter '../base' leaves the pair's folder",
        ),
        (
            lambda r: r["negative"].update(checkpoint=None, adapter="negative/epoch_0"),
            "no adapter of the negative side",
        ),
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
