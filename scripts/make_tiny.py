"""Make ``data/tiny``: a random model with 31 k parameters, its tokenizer, and invented pairs. The bytes are always the same.

python scripts/make_tiny.py [--output data/tiny]
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from tokenpref._torchtune import tune_to_hf
from tokenpref.models.tiny import TINY_SIZES, tiny_llama

SPECIAL = ["<|end|>", "<|pad|>", "<|user|>", "<|assistant|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SUBJECTS = [
    "The soup",
    "This song",
    "The new chair",
    "Our train ride",
    "The garden",
    "Her drawing",
    "That story",
    "The bread",
]
VERBS = ["was", "seemed", "turned out", "felt"]
GOOD = [
    "good and warm.",
    "great, I love it.",
    "fine, we were happy.",
    "so good that we stayed.",
    "great fun for all.",
]
BAD = [
    "bad and cold.",
    "awful, I hate it.",
    "poor, we were sad.",
    "so bad that we left.",
    "poor value for all.",
]
OPENINGS = [
    "The tea was",
    "This game seemed",
    "The old clock was",
    "Our walk felt",
    "The cake was",
    "His joke seemed",
]


def pairs(count: int, rng: random.Random) -> list[dict[str, str]]:
    """Distinct pairs of a good and a bad ending to the same opening."""
    every = [
        {"prompt": f"{subject} {verb}", "chosen": f" {good}", "rejected": f" {bad}"}
        for subject in SUBJECTS
        for verb in VERBS
        for good in GOOD
        for bad in BAD
    ]
    return rng.sample(every, count)


def tokenizer(lines: list[str]) -> Tokenizer:
    """Byte-level BPE over the pairs' own text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_SIZES["vocab_size"],
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(lines, trainer)
    return made


def write_model(folder: Path, lines: list[str]) -> None:
    """An HF checkpoint folder: config, weights, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_llama()
    generator = torch.Generator().manual_seed(20)
    state = {
        name: torch.randn(tensor.shape, generator=generator) * 0.1
        if tensor.dim() == 2
        else torch.ones_like(tensor)
        for name, tensor in model.state_dict().items()
    }
    heads, kv_heads, dim = TINY_SIZES["num_heads"], TINY_SIZES["num_kv_heads"], TINY_SIZES["embed_dim"]
    weights = tune_to_hf(state, num_heads=heads, num_kv_heads=kv_heads, dim=dim)
    save_file(
        {k: v.contiguous() for k, v in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": TINY_SIZES["vocab_size"],
        "hidden_size": dim,
        "intermediate_size": TINY_SIZES["intermediate_dim"],
        "num_hidden_layers": TINY_SIZES["num_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 256,
        "rms_norm_eps": TINY_SIZES["norm_eps"],
        "rope_theta": float(TINY_SIZES["rope_base"]),
        "rope_parameters": {"rope_type": "default", "rope_theta": float(TINY_SIZES["rope_base"])},
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "dtype": "float32",
        "torch_dtype": "float32",
    }
    write_json(folder / "config.json", config)
    made = tokenizer(lines)
    made.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": SPECIAL[0],
            "pad_token": SPECIAL[1],
            "model_max_length": 256,
            "clean_up_tokenization_spaces": False,
            "chat_template": TEMPLATE,
        },
    )


def write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Write everything."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).resolve().parent.parent / "data" / "tiny"
    )
    output = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    rows = pairs(80, random.Random(7))
    for name, part in (("train", rows[:64]), ("eval", rows[64:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (output / f"{name}.jsonl").write_text(text, encoding="utf-8")
    openings = [*OPENINGS, "The lake felt", "My coat seemed"]
    (output / "openings.txt").write_text("\n".join(openings) + "\n", encoding="utf-8")
    lines = [
        text for row in rows for text in (row["prompt"] + row["chosen"], row["prompt"] + row["rejected"])
    ]
    write_model(output / "model", lines)


if __name__ == "__main__":
    main()
