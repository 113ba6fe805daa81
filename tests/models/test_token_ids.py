"""Token ids that a model does not embed: padding is exchanged, everything else is refused before weights are read."""

import json
import shutil

import pytest
from tokenizers import AddedToken, Tokenizer

from tokenpref._paths import data_root
from tokenpref.errors import ConfigError, DryRun
from tokenpref.models.token_ids import check_token_ids
from tokenpref.training import Evaluator, PreferenceTrainer, TripletTrainer, WeightEstimation
from tokenpref.training.config.command_line import load_config

TINY = data_root() / "data" / "tiny" / "model"
BEYOND = 384  # the first id without a row


@pytest.fixture
def extended(tmp_path, monkeypatch):
    """A copy of the tiny tokenizer with one more token, ``[NEW]``, and a way to change its settings."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY, "other")
    file = tmp_path / "other" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.add_special_tokens([AddedToken("[NEW]", special=True, normalized=False)])
    assert tokenizer.token_to_id("[NEW]") == BEYOND
    tokenizer.save(str(file))

    def change(name="tokenizer_config.json", **settings):
        file = tmp_path / "other" / name
        file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | settings))

    return change


def run(kind, name, *words):
    recipe = kind(load_config(["--config", name, "tokenizer.path=other", *words]))
    try:
        if not hasattr(recipe, "setup"):
            return recipe.run()
        recipe.setup()
        return recipe.train()
    finally:
        recipe.close()


def losses(folder):
    (file,) = (folder / "logs").glob("*.txt")
    return [
        line.partition(" loss:")[2].split()[0] for line in file.read_text().splitlines() if "loss:" in line
    ]


def test_padding_beyond_the_embedding_changes_no_number(extended, tmp_path, caplog):
    words = ("padding_free=false", "max_steps_per_epoch=2", "dataset_val.max_rows=4")
    run(PreferenceTrainer, "tiny/tdpo", "output_dir=plain", *words)
    extended(pad_token="[NEW]")
    with caplog.at_level("INFO", "tokenpref"):
        run(PreferenceTrainer, "tiny/tdpo", "output_dir=exchanged", *words)
    assert "the padding token is id 384 ('[NEW]')" in caplog.text
    assert losses(tmp_path / "plain") == losses(tmp_path / "exchanged") != []


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        (Evaluator, "tiny/evaluate", ("dataset.max_rows=4", "padding_free=false", "sampling.num_samples=1")),
        (WeightEstimation, "tiny/estimate_weights_attribution", ("dataset.max_rows=4", "padding_free=false")),
        (
            TripletTrainer,
            "tiny/ti_dpo",
            (
                "dataset.max_rows=8",
                "batch_size=4",
                "padding_free=false",
                "dataset_val=null",
                "run_val_every_n_steps=null",
            ),
        ),
    ],
    ids=["evaluation", "attribution", "anchors"],
)
def test_padding_beyond_the_embedding_everywhere(extended, kind, name, words):
    extended(pad_token="[NEW]")
    run(kind, name, "output_dir=out", *words)


@pytest.mark.parametrize(
    ("file", "settings", "says"),
    [
        (
            "tokenizer_config.json",
            {"eos_token": "[NEW]"},
            r"eos_token is token id 384 \('\[NEW\]'\).* embeds 384",
        ),
        (
            "generation_config.json",
            {"eos_token_id": [0, BEYOND]},
            "a further end of an answer .* is token id 384",
        ),
        (
            "generation_config.json",
            {"eos_token_id": [0, 9999]},
            "a further end of an answer .* is token id 9999",
        ),
    ],
)
@pytest.mark.parametrize("recipe", ["train", "evaluate"])
def test_other_ids_are_refused_in_dry_runs_too(extended, file, settings, says, recipe):
    extended(file, **settings)
    kind, name = {"train": (PreferenceTrainer, "tiny/tdpo"), "evaluate": (Evaluator, "tiny/evaluate")}[recipe]
    with pytest.raises(ConfigError, match=says):
        run(kind, name, "dry_run=true", "dataset.append_eos=false")


def test_the_templates_tokens_are_found_in_the_data(extended, tmp_path):
    template = "{% for m in messages %}[NEW]{{ m['content'] }}{% endfor %}"
    extended(chat_template=template)
    row = {"chosen": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
           "rejected": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "c"}]}  # fmt: skip
    (tmp_path / "chats.jsonl").write_text((json.dumps(row) + "\n") * 2)
    words = ("dry_run=true", "dataset.source=chats.jsonl", "dataset.format=auto", "dataset_val=null")
    with pytest.raises(ConfigError, match=r"token id 384 \('\[NEW\]'\) of dataset"):
        run(PreferenceTrainer, "tiny/tdpo", *words, "run_val_every_n_steps=null")
    # Text does not go through the template.
    with pytest.raises(DryRun):
        run(PreferenceTrainer, "tiny/tdpo", "dry_run=true")


def test_openings_are_checked(extended, tmp_path):
    (tmp_path / "openings.txt").write_text("once\n[NEW] upon\n")
    with pytest.raises(ConfigError, match="sampling.prompts: opening 2 .* token id 384"):
        run(Evaluator, "tiny/evaluate", "dry_run=true", "sampling.prompts=openings.txt")


def test_anchors_of_a_column_are_checked(extended, tmp_path):
    row = {"prompt": "a", "chosen": " b", "rejected": " c", "anchor": " [NEW]"}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 2)
    with pytest.raises(ConfigError, match=r"anchors \(column 'anchor'\): it holds token id 384"):
        run(
            TripletTrainer, "tiny/ti_dpo", "dry_run=true", "dataset.source=rows.jsonl", "dataset_val=null",
            "run_val_every_n_steps=null", "anchors=tokenpref.data.ColumnAnchors",
        )  # fmt: skip


def test_a_tokenizer_whose_padding_cannot_be_changed_is_refused():
    class Fixed:
        eos_id, bos_id, vocab_size, stop_ids = 0, None, 9, frozenset({0})

        @property
        def pad_id(self):
            return 8

        def encode_with_offsets(self, text, add_bos=None):
            return [1], [(0, 1)]

        def decode_special(self, token_id):
            return "<pad>"

    with pytest.raises(ConfigError, match="pad_id is 8.* below 4"):
        check_token_ids(Fixed(), 4)
