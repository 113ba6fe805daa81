"""DPO step by step against TRL's DPOTrainer on the same work: same random Llama, same pairs, same order.

The losses of TRL 1.16.0 below were logged by its trainer (transformers 5.23.0, torch 2.13.0, CPU, float32): AdamW 1e-4,
beta 0.1, no clipping, no shuffling, 4 pairs of 512 tokens a step. This script makes the model and the pairs again (it
needs transformers, whose random initialisation decides the weights), trains our recipe, and compares the losses.

    python -m benchmarks.trl_parity --work outputs/trl_parity

With ``--lora`` both sides train adapters (rank 8, alpha 16, queries and values) that start from the same random A. TRL then runs
with peft in an environment of its own, which is made on first use, and its losses are those of this run.

    python -m benchmarks.trl_parity --lora
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.cpu.work import LORA_ALPHA, LORA_RANK, LORA_TARGETS

TRL_LOSSES = [0.6931472, 0.6465857, 0.6839899, 0.6810249, 0.7108927, 0.6763706, 0.7700412, 0.7527712]
TOLERANCE = 1e-4
VOCAB, WIDTH, LAYERS, HEADS, MLP = 32000, 256, 4, 8, 1024
PROMPT, LENGTH, BATCH = 128, 512, 4

CONFIG = """
output_dir: {work}/run
tokenizer: {{_component_: tokenpref.data.tokenizer_json, path: {work}/model}}
model:
  _component_: torchtune.models.llama3.llama3
  vocab_size: {vocab}
  num_layers: {layers}
  num_heads: {heads}
  num_kv_heads: {heads}
  embed_dim: {width}
  intermediate_dim: {mlp}
  max_seq_len: 2048
  rope_base: 500000
  norm_eps: 1.0e-5
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: {work}/model
  checkpoint_files: [model.safetensors]
  output_dir: {work}/run
  model_type: LLAMA3
dataset:
  _component_: tokenpref.data.preference_dataset
  source: {work}/pairs.jsonl
  format: explicit
  append_eos: true
  max_seq_len: {length}
shuffle: false
loss: {{_component_: tokenpref.losses.DPOLoss, beta: 0.1}}
optimizer: {{_component_: torch.optim.AdamW, lr: 1.0e-4, weight_decay: 0.0}}
batch_size: {batch}
metric_logger:
  _component_: torchtune.training.metric_logging.DiskLogger
  log_dir: {work}/run/logs
  filename: metrics.txt
"""


# With the full model's rate, 8 steps of LoRA would hardly move the loss.
LORA_LR = 2e-3


def make_work(work: Path) -> None:
    """Write the random model with its one-word-one-token tokenizer, and the pairs."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3} | {f"w{i}": i for i in range(4, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocab=words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(work / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=MLP,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(work / "model")
    rng = random.Random(0)

    def text(count: int) -> str:
        return " ".join(f"w{rng.randrange(4, VOCAB)}" for _ in range(count))

    answer = LENGTH - PROMPT - 1  # EOS comes on top
    with (work / "pairs.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(len(TRL_LOSSES) * BATCH):
            row = {"prompt": text(PROMPT), "chosen": " " + text(answer), "rejected": " " + text(answer)}
            file.write(json.dumps(row) + "\n")


def make_lora_work(work: Path) -> None:
    """Write the same model and pairs, with token ids, and the adapter that both sides start from: random A, zero B."""
    from benchmarks.cpu.ours import write_first_adapter
    from benchmarks.cpu.work import Task, write

    write(work, Task(length=LENGTH, prompt=PROMPT, batch=BATCH, steps=len(TRL_LOSSES), lr=LORA_LR))
    write_first_adapter(work)


def train_peer(work: Path) -> list[float]:
    """TRL's losses on the same folder, with peft, in an environment of its own."""
    from benchmarks.cpu.__main__ import Processes, peer_environment

    peer = peer_environment(Path("outputs/bench/trl-env").absolute())
    found = Processes(work, peer).run(
        "benchmarks.cpu.peer", {"mode": "lora"}, "default", folder=work, peer=True
    )
    losses: list[float] = found["value"]["losses"]
    return losses


def train(work: Path, lora: bool = False) -> list[float]:
    """Run the recipe; returns the logged loss of every step."""
    sizes = {"vocab": VOCAB, "layers": LAYERS, "heads": HEADS, "width": WIDTH, "mlp": MLP}
    config, words = work / "dpo.yaml", []
    text = CONFIG.format(work=work, length=LENGTH, batch=BATCH, **sizes)
    if lora:
        text += f"adapter_checkpoint: {work}/adapter\n"
        words = [
            "model._component_=torchtune.models.llama3.lora_llama3",
            f"model.lora_attn_modules=[{','.join(LORA_TARGETS)}]",
            f"model.lora_rank={LORA_RANK}",
            f"model.lora_alpha={LORA_ALPHA}",
            f"optimizer.lr={LORA_LR}",
        ]
    config.write_text(text, encoding="utf-8")
    shutil.rmtree(work / "run", ignore_errors=True)
    tune = Path(sys.executable).parent / "tune"
    subprocess.run(
        [str(tune), "run", "recipes/tdpo_distributed", "--config", str(config), *words], check=True
    )
    lines = (work / "run" / "logs" / "metrics.txt").read_text(encoding="utf-8").splitlines()
    steps = [re.search(r"Step (\d+) \|.*?(?:^|\s|\|)loss:(\S+)", line) for line in lines]
    return [float(match.group(2)) for match in steps if match][-len(TRL_LOSSES) :]


def main() -> int:
    """Print both columns; exit 1 when a step differs by more than the tolerance."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, help="default outputs/trl_parity, with --lora outputs/trl_parity_lora"
    )
    parser.add_argument("--lora", action="store_true", help="train adapters, against TRL with peft")
    options = parser.parse_args()
    default = Path("outputs/trl_parity_lora" if options.lora else "outputs/trl_parity")
    work: Path = (options.work or default).absolute()
    work.mkdir(parents=True, exist_ok=True)
    (make_lora_work if options.lora else make_work)(work)
    peer = train_peer(work) if options.lora else TRL_LOSSES
    ours = train(work, options.lora)
    name = "TRL 1.16.0 with peft" if options.lora else "TRL 1.16.0"
    print(f"| step | {name} | tokenpref | difference |\n| --- | --- | --- | --- |")
    for step, (trl, own) in enumerate(zip(peer, ours, strict=True), 1):
        print(f"| {step} | {trl:.7f} | {own:.7f} | {own - trl:+.1e} |")
    worst = max(abs(own - trl) for trl, own in zip(peer, ours, strict=True))
    print(f"largest difference {worst:.1e}, allowed {TOLERANCE:.0e}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
