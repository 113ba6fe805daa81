import json
import shutil
import stat

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import folders

from tokenpref.errors import ConfigError
from tokenpref.models import CausalLMCheckpointer
from tokenpref.models import causal_lm_checkpointer as checkpointing
from tokenpref.models.lazy_weights import shapes_of
from tokenpref.models.tensor_files import INDEX, TensorFiles

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    """A folder of several files, and the tensors of its model."""
    folder = tmp_path_factory.mktemp("qwen3")
    return folder, folders.saved(folder, folders.causal_lm("qwen3"))


@pytest.fixture
def copy(qwen3, tmp_path):
    """A copy of the folder that a test may spoil, and the tensors of its model."""
    folder = tmp_path / "model"
    shutil.copytree(qwen3[0], folder)
    return folder, qwen3[1]


def checkpointer(folder, output="out", **kwargs):
    return CausalLMCheckpointer(str(folder), str(output), **kwargs)


def weights(folder, **kwargs):
    return checkpointer(folder, **kwargs).load_checkpoint()["model"]


def loaded(folder):
    """The tensors with which transformers fills a model from a folder."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()


def check_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)


# Tied and untied heads, renamed tensors, and experts that are apart on disk and together in memory.
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "gpt_neox", "qwen3_moe", "mixtral", "olmoe"])
def test_a_folder_is_read_and_written_bit_by_bit_as_transformers_does(kind, tmp_path, monkeypatch):
    own = folders.saved(tmp_path / "model", folders.causal_lm(kind))
    tied = "lm_head.weight" if kind == "gemma3_text" else None
    expected = {name: tensor for name, tensor in own.items() if name != tied}
    monkeypatch.setattr(checkpointing, "SHARD_BYTES", 20_000)
    mine = checkpointer(tmp_path / "model", tmp_path / "out")

    read = mine.load_checkpoint()["model"]
    check_equal(read, expected)
    assert shapes_of(read) == {name: tensor.shape for name, tensor in expected.items()}
    mine.save_checkpoint({"model": dict(read)}, epoch=3)

    written = tmp_path / "out" / "epoch_3"
    check_equal(loaded(written), own)
    check_equal(weights(written), expected)
    assert TensorFiles(written).shapes == TensorFiles(tmp_path / "model").shapes
    files = sorted(written.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)
    ]
    index = json.loads((written / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    for file in files:
        with safe_open(file, "pt") as stream:
            assert stream.metadata() == {"format": "pt"}


def test_shapes_are_known_without_reading_and_a_tensor_is_read_when_it_is_looked_up(qwen3, monkeypatch):
    folder, own = qwen3
    read = weights(folder)
    asked = []
    monkeypatch.setattr(
        TensorFiles,
        "read",
        lambda self, names, was=TensorFiles.read: was(self, asked.append(list(names)) or asked[-1]),
    )
    assert len(read) == len(own)
    assert "model.norm.weight" in read
    assert shapes_of(read)["model.norm.weight"] == (32,)
    assert asked == []
    assert torch.equal(read["model.norm.weight"], own["model.norm.weight"])
    assert asked == [["model.norm.weight"]]
    with pytest.raises(KeyError):
        read["model.more"]


def test_tensors_can_be_set_and_dropped_beside_those_of_the_files(qwen3):
    read = weights(qwen3[0])
    read.update({"model.layers.0.adapter": torch.ones(2, 3)})
    assert shapes_of(read)["model.layers.0.adapter"] == (2, 3)
    assert torch.equal(read["model.layers.0.adapter"], torch.ones(2, 3))
    read.pop("model.norm.weight")
    assert "model.norm.weight" not in read
    assert len(read) == len(qwen3[1])


def test_a_single_file_and_listed_files_are_read_too(copy, tmp_path):
    folder, own = copy
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    whole = {name: tensor for file in names for name, tensor in load_file(folder / file).items()}
    (folder / INDEX).unlink()
    check_equal(weights(folder, checkpoint_files=names[::-1]), own)
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    check_equal(weights(folder), own)
    mine = checkpointer(folder, tmp_path / "out")
    mine.save_checkpoint(mine.load_checkpoint(), epoch=0)
    assert [file.name for file in (tmp_path / "out/epoch_0").glob("*.safetensors")] == ["model.safetensors"]
    assert not (tmp_path / "out/epoch_0" / INDEX).exists()


@pytest.fixture
def tied(tmp_path):
    """A folder whose model ties the head to the embedding, and its tensors."""
    folder = tmp_path / "tied"
    own = folders.saved(folder, folders.causal_lm("qwen3", tie_word_embeddings=True), shard="1GB")
    own.pop("lm_head.weight")
    return folder, own


def change(folder, **tensors):
    """Add tensors to the single file of a folder, by names with __ for a dot; None removes one."""
    held = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        held.pop(name.replace("__", "."), None)
        if tensor is not None:
            held[name.replace("__", ".")] = tensor.clone()
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_head_in_the_files_of_a_tied_model_must_equal_the_embedding(tied):
    folder, own = tied
    embedding = own["model.embed_tokens.weight"]
    assert weights(folder).notes == ()
    change(folder, lm_head__weight=embedding)
    read = weights(folder)
    check_equal(read, own)
    assert "so the head is dropped" in read.notes[0]
    change(folder, lm_head__weight=embedding + 1)
    with pytest.raises(ConfigError, match="differs from the embedding.*tie_word_embeddings to false"):
        weights(folder)


def test_files_may_hold_a_tied_tensor_under_the_name_of_the_head_only(tied):
    folder, own = tied
    change(folder, lm_head__weight=own["model.embed_tokens.weight"], model__embed_tokens__weight=None)
    check_equal(weights(folder), own)


def test_a_head_is_not_written_for_a_tied_model(tied, tmp_path):
    folder, own = tied
    state = {**own, "lm_head.weight": own["model.embed_tokens.weight"]}
    checkpointer(folder, tmp_path / "out").save_checkpoint({"model": state}, epoch=0)
    check_equal(weights(tmp_path / "out/epoch_0"), own)


def test_tensors_that_transformers_ignores_are_ignored_and_others_are_not(tied):
    folder, own = tied
    change(folder, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    check_equal(weights(folder), own)
    change(folder, model__layers__0__more=torch.ones(4))
    assert set(weights(folder)) - set(own) == {"model.layers.0.more"}


@pytest.mark.parametrize("prefix", ["language_model.", "model."])
def test_of_a_model_that_sees_images_the_language_model_is_read_and_written(prefix, tmp_path):
    config = transformers.Gemma3Config(
        text_config={**folders.SIZES, **folders.FURTHER["gemma3_text"]},
        vision_config={
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
    )  # fmt: skip
    model = transformers.Gemma3ForConditionalGeneration(config)
    folder = tmp_path / "model"
    # Older folders begin the names of the language model with language_model., newer ones with model.language_model.
    model.save_pretrained(folder, save_original_format=prefix == "language_model.")
    assert any(name.startswith(prefix) for name in TensorFiles(folder).shapes)
    expected = {
        name.replace("model.language_model.", "model."): tensor
        for name, tensor in model.state_dict().items()
        if name.startswith("model.language_model.")
    }
    mine = checkpointer(folder, tmp_path / "out")
    read = mine.load_checkpoint()["model"]
    check_equal(read, expected)
    assert "tensors are not of the language model" in read.notes[0]
    mine.save_checkpoint({"model": dict(read)}, epoch=0)
    written = tmp_path / "out/epoch_0"
    again = transformers.AutoModelForCausalLM.from_pretrained(written, dtype="auto")
    assert type(again) is transformers.Gemma3ForCausalLM
    check_equal({n: t for n, t in again.state_dict().items() if n != "lm_head.weight"}, expected)
    check_equal(weights(written), expected)


def test_what_lies_beside_the_weights_travels_along(copy, tmp_path):
    folder, _ = copy
    texts = {
        "LICENSE": "free", "README.md": "a card", "tokenizer.json": "{}", "chat_template.jinja": "{{ messages }}",
        "generation_config.json": '{"eos_token_id": 2}', "additional_chat_templates/tool_use.jinja": "{{ tools }}",
    }  # fmt: skip
    left = {
        "pytorch_model.bin": "x", "model.gguf": "x", "pytorch_model.bin.index.json": "{}", "adapter_config.json": "{}",
        "manifest.json": "{}", ".gitattributes": "x", "original/params.json": "{}",
    }  # fmt: skip
    for name, text in {**texts, **left}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "LICENSE").chmod(0o400)
    written = tmp_path / "out/epoch_0"
    mine = checkpointer(folder, tmp_path / "out")
    for _ in range(2):  # the second time over what is there
        mine.save_checkpoint(mine.load_checkpoint(), epoch=0)
    found = {str(path.relative_to(written)) for path in written.rglob("*") if path.is_file()}
    assert found == {*texts, "config.json", "model.safetensors"}
    assert {name: (written / name).read_text() for name in texts} == texts
    assert (written / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    plain = tmp_path / "plain"
    plain.touch()
    for file in written.glob("*.safetensors"):
        assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


def test_files_of_an_interrupted_write_do_not_stay(copy, tmp_path):
    folder, own = copy
    left = tmp_path / "out/epoch_0"
    left.mkdir(parents=True)
    for name in ("model-00001-of-00009.safetensors", INDEX):
        (left / name).write_text("half")
    checkpointer(folder, tmp_path / "out").save_checkpoint({"model": own}, epoch=0)
    check_equal(loaded(left), own)
    assert [file.name for file in left.glob("model*")] == ["model.safetensors"]


def cut(file):
    file.write_bytes(file.read_bytes()[:-10])


def edit(file, **changes):
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, **changes}))


def first(folder):
    return min(folder.glob("model-*.safetensors"))


def only_pickled(folder):
    for file in (*folder.glob("*.safetensors"), folder / INDEX):
        file.unlink()
    torch.save({}, folder / "pytorch_model.bin")


def without_names(folder):
    (folder / INDEX).write_text('{"weight_map": ["model.safetensors"]}')


def twice(folder):
    one, two, *_ = sorted(folder.glob("model-*.safetensors"))
    save_file({**load_file(one), **load_file(two)}, two, metadata={"format": "pt"})


def elsewhere(folder):
    edit(folder / INDEX, weight_map={"model.norm.weight": first(folder).name})
    save_file({"other": torch.ones(1)}, first(folder))


SPOILT = {
    "a missing file": (lambda f: first(f).unlink(), r"lists model-00001-of-.*which is not in the folder; download"),
    "a file that is cut off": (lambda f: cut(first(f)), r"model-00001-of-.* is cut off or damaged .*download it again"),
    "a pointer of Git LFS": (
        lambda f: first(f).write_text("version https://git-lfs.github.com/spec/v1\n"),
        r"pointer of Git LFS: run `git lfs pull`",
    ),
    "an index that is no JSON": (lambda f: (f / INDEX).write_text("{"), r"index.json cannot be read .*download"),
    "an index without names": (without_names, r"index.json cannot be read"),
    "an index that leaves the folder": (
        lambda f: edit(f / INDEX, weight_map={"a": "../a.safetensors"}),
        r"lists '../a.safetensors', which is not the name of a file",
    ),
    "an index of another file": (elsewhere, r"says that 'model.norm.weight' is in .*, which does not hold it"),
    "a tensor in two files": (twice, r"both hold '.*'; list the files of one model in checkpoint_files"),
    "pickled weights": (only_pickled, r"holds its weights as pytorch_model.bin, and only .*convert it.*save_pretrained"),
    "no index": (lambda f: (f / INDEX).unlink(), r"but neither model.safetensors nor .*list the files in checkpoint_files"),
    "no config": (lambda f: (f / "config.json").unlink(), r"gives no model that transformers .* knows .*set checkpoint_dir"),
    "an unknown family": (lambda f: edit(f / "config.json", model_type="abcd"),
            r"gives no model that transformers .*abcd.*set checkpoint_dir"),
    "a model that is no language model": (
        lambda f: (f / "config.json").write_text('{"model_type": "vit"}'),
        r"is a vit, and transformers .* makes no causal language model of it",
    ),
    "quantised weights": (
        lambda f: edit(f / "config.json", quantization_config={"quant_method": "awq"}),
        r"is quantised \(awq\).*set checkpoint_dir to the weights from which it was quantised",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(SPOILT))
def test_a_folder_that_cannot_be_read_says_what_to_do(name, copy):
    spoil, says = SPOILT[name]
    spoil(copy[0])
    with pytest.raises(ConfigError, match=says):
        weights(copy[0])


def test_experts_that_are_missing_are_named(tmp_path):
    folder = tmp_path / "model"
    folders.saved(folder, folders.causal_lm("qwen3_moe"), shard="1GB")
    change(folder, model__layers__0__mlp__experts__3__down_proj__weight=None)
    read = weights(folder)
    with pytest.raises(
        ConfigError, match=r"'model.layers.0.mlp.experts.down_proj' cannot be made of the 3 tensors.*\[3, "
    ):
        read["model.layers.0.mlp.experts.down_proj"]


def test_code_that_comes_with_a_folder_is_not_run(copy):
    folder, own = copy
    (folder / "modeling.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    edit(folder / "config.json", auto_map={"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"})
    check_equal(weights(folder), own)
    edit(folder / "config.json", model_type="abcd")
    with pytest.raises(ConfigError, match="gives no model that transformers"):
        weights(folder)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize(
    "files", ["model.safetensors", {"filename_format": "m-{}", "max_filename": "3"}, [3]]
)
def test_listed_files_are_a_list_of_names(files):
    with pytest.raises(ConfigError, match="checkpoint_files: expected a list of names"):
        checkpointer("model", checkpoint_files=files)


def test_intermediate_checkpoints_are_written_elsewhere(copy):
    with pytest.raises(ValueError, match="writes weights only"):
        checkpointer(copy[0]).save_checkpoint({"model": copy[1]}, epoch=0, intermediate_checkpoint=True)
