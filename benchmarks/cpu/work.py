"""The fixed work of both sides: a random Llama as an HF checkpoint, and preference pairs in the order of training.

Runs in either environment (it needs torch, transformers and tokenizers, and nothing of ours):

    python -m benchmarks.cpu.work FOLDER '{"lengths": "fixed"}'

A folder holds ``task.json``, ``model/`` and ``pairs.jsonl`` (texts and token ids, one pair a line). The tokens of a step are all
tokens that are not padding, with the prompt counted in both answers. Every side is credited with them, even if it computes fewer.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "ADAPTER",
    "COMPARED_WITH",
    "LORA_ALPHA",
    "LORA_RANK",
    "LORA_TARGETS",
    "MALLOC",
    "PAIRED_MODES",
    "SHAPES",
    "SMOLLM2",
    "TOLERANCE",
    "Shape",
    "Task",
    "go_offline",
    "write",
]

PAIRED_MODES = ("ref", "precompute", "lora")
"""Modes of DPO that both sides run: with a reference model in memory, with precomputed log-probabilities, and with adapters,
whose reference is the model without them."""

ADAPTER = "adapter"
"""Folder of a task's initial adapter in PEFT's format, for those that train one."""
LORA_RANK, LORA_ALPHA, LORA_TARGETS = 8, 16, ("q_proj", "v_proj")

COMPARED_WITH = {"tdpo2-ref": "ref", "causal-lm-ref": "ref", "tdpo2-cached": "precompute"}
"""Modes of ours alone, and the mode of our DPO that each is compared with."""

TOLERANCE = 1e-4
"""How far the losses of a step may differ between the sides."""

MALLOC: dict[str, dict[str, str]] = {
    # The process keeps freed memory. Without this, each large temporary tensor costs page faults.
    "keep": {
        "MALLOC_MMAP_THRESHOLD_": "4294967296",
        "MALLOC_TRIM_THRESHOLD_": "17179869184",
        "MALLOC_TOP_PAD_": "67108864",
    },
    "default": {},
}
"""Settings that glibc reads when a process starts; both sides always run under the same."""

ROPE_BASE = 500_000
NORM_EPS = 1e-5
SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3}
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "TOKENIZERS_PARALLELISM": "false",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama without biases."""

    vocab: int = 32_000
    width: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 8
    mlp: int = 1024
    tied: bool = False

    @property
    def body_weights(self) -> int:
        """Weights of all matrices in the layers, each of which multiplies every token once."""
        attention = 2 * self.width**2 * (1 + self.kv_heads / self.heads)
        return self.layers * int(attention + 3 * self.width * self.mlp)

    @property
    def head_weights(self) -> int:
        """Weights of the LM head."""
        return self.vocab * self.width

    @property
    def parameters(self) -> int:
        """All weights, norms and embeddings included."""
        tables = (1 if self.tied else 2) * self.head_weights
        return self.body_weights + tables + (2 * self.layers + 1) * self.width


SHAPES = {
    "llama-20m": Shape(),
    "smollm2-135m": Shape(49_152, 576, 30, 9, 3, 1536, tied=True),
    "llama3.2-1b": Shape(128_256, 2048, 16, 32, 8, 8192, tied=True),
    "tiny": Shape(96, 16, 2, 2, 2, 32),
}
"""Models by name. Those of published models have their sizes and random weights, which do not affect the time."""


@dataclass(frozen=True)
class Task:
    """The task of a training.

    Args:
        shape: name of the model's shape.
        lengths: "fixed": all sequences have ``length`` tokens; "varied": log-uniform from 32 up to it.
        length: tokens of prompt and answer together.
        prompt: tokens of the prompt (fixed lengths).
        batch: pairs a step.
        steps: optimizer steps; the pairs are as many as they take.
        warmup: first steps that are not timed.
        beta: of the loss.
        lr: of AdamW, without weight decay; gradients are not clipped.
        seed: of weights and pairs.
        dtype: of the stored weights, in which both sides compute.
    """

    shape: str = "llama-20m"
    lengths: str = "fixed"
    length: int = 512
    prompt: int = 128
    batch: int = 4
    steps: int = 8
    warmup: int = 2
    beta: float = 0.1
    lr: float = 1e-4
    seed: int = 0
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """Of its folder: one for each different task."""
        return f"{self.shape}_{self.lengths}_{self.batch}x{self.length}_{self.steps}"

    @property
    def sizes(self) -> Shape:
        """The model's sizes."""
        return SHAPES[self.shape]

    @classmethod
    def read(cls, folder: Path) -> Task:
        """The task of a folder."""
        return cls(**json.loads((folder / "task.json").read_text(encoding="utf-8")))

    def pairs(self, folder: Path) -> list[dict[str, Any]]:
        """The pairs of a folder: prompt, chosen, rejected, and their ``_ids``."""
        return [
            json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
        ]

    def tokens(self, folder: Path) -> tuple[list[int], list[int]]:
        """For each step, the tokens that it is credited with, and those of answers."""
        answers = [len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in self.pairs(folder)]
        prompts = [2 * len(p["prompt_ids"]) for p in self.pairs(folder)]
        parts = [slice(step * self.batch, (step + 1) * self.batch) for step in range(self.steps)]
        return [sum(prompts[p]) + sum(answers[p]) for p in parts], [sum(answers[p]) for p in parts]


SMOLLM2 = Task(shape="smollm2-135m", length=128, prompt=32, steps=6)
"""The work on which the cost of the KL is read a second time."""


def _answer_lengths(task: Task, rng: random.Random) -> tuple[int, int, int]:
    """Tokens of prompt, chosen and rejected; an answer's last token is EOS."""
    if task.lengths == "fixed":
        return task.prompt, task.length - task.prompt, task.length - task.prompt
    total = round(2 ** rng.uniform(5, math.log2(task.length)))
    prompt = max(4, total // 4)
    longer = max(4, total - prompt)
    shorter = max(4, int(longer * rng.uniform(0.4, 1.0)))
    return (prompt, shorter, longer) if rng.random() < 0.5 else (prompt, longer, shorter)


def go_offline(device: str) -> None:
    """Set :data:`OFFLINE` where it is not set. A process that computes on "cuda" still sees its GPU."""
    for name, value in OFFLINE.items():
        if device == "cpu" or name != "CUDA_VISIBLE_DEVICES":
            os.environ.setdefault(name, value)


def write(folder: Path, task: Task, device: str = "cpu") -> None:
    """Write model and pairs, unless they are there; ``device`` draws the weights."""
    if (folder / "task.json").exists() and Task.read(folder) == task:
        return
    go_offline(device)
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    sizes = task.sizes
    words = SPECIAL | {f"w{i}": i for i in range(len(SPECIAL), sizes.vocab)}
    tokenizer = Tokenizer(models.WordLevel(vocab=words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=2**20,
    )
    wrapped.save_pretrained(folder / "model")
    torch.manual_seed(task.seed)
    config = LlamaConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        intermediate_size=sizes.mlp,
        max_position_embeddings=max(2048, task.length),
        rms_norm_eps=NORM_EPS,
        tie_word_embeddings=sizes.tied,
        rope_parameters={"rope_type": "default", "rope_theta": float(ROPE_BASE)},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
        use_cache=False,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config)
    model.to(getattr(torch, task.dtype)).save_pretrained(folder / "model")
    rng = random.Random(task.seed)

    def text(count: int) -> str:
        return " ".join(f"w{rng.randrange(len(SPECIAL), sizes.vocab)}" for _ in range(count))

    with (folder / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(task.steps * task.batch):
            prompt, chosen, rejected = _answer_lengths(task, rng)
            row = {
                "prompt": text(prompt),
                "chosen": " " + text(chosen - 1),
                "rejected": " " + text(rejected - 1),
            }
            ids = {"prompt_ids": tokenizer.encode(row["prompt"]).ids}
            for side in ("chosen", "rejected"):
                ids[f"{side}_ids"] = [*tokenizer.encode(row[side]).ids, SPECIAL["</s>"]]
            file.write(json.dumps(row | ids) + "\n")
    (folder / "task.json").write_text(
        json.dumps(asdict(task)), encoding="utf-8"
    )  # last: the folder is complete


if __name__ == "__main__":
    write(Path(sys.argv[1]), Task(**json.loads(sys.argv[2])))
