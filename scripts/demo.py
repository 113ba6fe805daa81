"""The whole pipeline on a real model: a contrastive pair, token weights and TIS-DPO, compared with DPO and TDPO2 in a table.

``make demo`` runs it. Every stage is the command that a user would type. A stage with an existing result is not repeated (remove
``outputs/demo`` to start again). ``python scripts/demo.py --lora`` adds DPO with LoRA, which takes about a quarter of the time of
everything else. ``--ti`` adds TI-DPO in the forms of its paper and of its authors' code, which takes about ten minutes more for
each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OUTPUT = Path("outputs/demo")
BIN = Path(sys.executable).parent
# One pass over the first 192 pairs in 24 steps, with a high rate because the steps are few; the same for every method.
TRAINING = [
    "dataset.max_rows=192",
    "max_steps_per_epoch=24",
    "optimizer.lr=1e-4",
    "lr_scheduler.num_warmup_steps=4",
]
# Adapters take a higher rate than all weights together; see docs/adapters.md.
LORA_RATE = "optimizer.lr=1e-3"
# The model of configs/smollm2/135M_dpo_lora.yaml. Without a ref_checkpointer, the reference is the model with its adapters off.
LORA_MODEL = [
    "model._component_=tokenpref.models.lora_smollm2_135m",
    "model.lora_attn_modules=[q_proj,k_proj,v_proj,output_proj]",
    "model.apply_lora_to_mlp=true",
    "model.lora_rank=16",
    "model.lora_alpha=32",
    "ref_checkpointer=null",
]
SAMPLES = "sampling.num_samples=8"
TRAINED = "checkpointer.checkpoint_files=[model-00001-of-00001.safetensors]"
# Keep freed memory instead of returning it to the kernel after each large temporary tensor (glibc reads these at start).
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184"}


def call(*command: str | Path) -> None:
    """Print a command and run it; stop the demo if it fails."""
    print("\n$ " + " ".join(str(part) for part in command), flush=True)
    subprocess.run([str(part) for part in command], check=True, env={**os.environ, **MALLOC})


def tune(recipe: str, config: str, *overrides: str) -> None:
    """``tune run`` of one of our recipes."""
    call(BIN / "tune", "run", f"recipes/{recipe}", "--config", f"smollm2/135M_{config}", *overrides)


def evaluate(name: str, *overrides: str) -> dict[str, Any]:
    """Evaluate a model on held-out pairs and by samples."""
    folder = OUTPUT / name
    if not (folder / "evaluation.json").is_file():
        tune("evaluate_distributed", "evaluate", f"output_dir={folder}", SAMPLES, *overrides)
    result: dict[str, Any] = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    return result


def evaluate_trained(name: str, *weights: str) -> dict[str, Any]:
    """Evaluate a trained model, with its samples paired with the starting model's."""
    start = OUTPUT / "start" / "samples.jsonl"
    return evaluate(f"{name}_evaluation", *weights, f"sampling.compare_to={start}")


def whole(folder: Path) -> tuple[str, ...]:
    """The settings of an evaluation that reads a whole trained model."""
    return f"checkpointer.checkpoint_dir={folder}", TRAINED


def train(name: str, recipe: str, config: str, *overrides: str) -> Path:
    """Train a model; returns the folder of its weights."""
    folder = OUTPUT / name
    if not (folder / "finished.json").is_file():
        tune(recipe, config, f"output_dir={folder}", *TRAINING, *overrides)
    return folder / "epoch_0"


def token_weights(pair: Path) -> Path:
    """Score the training pairs' tokens with the contrastive pair; returns the store."""
    folder = OUTPUT / "estimate_weights"
    if not (folder / "weights" / "metadata.json").is_file():
        rows = TRAINING[0]
        tune(
            "estimate_weights_distributed",
            "estimate_weights",
            f"output_dir={folder}",
            f"estimator.pair={pair}",
            rows,
        )
    return folder / "weights"


def row(name: str, result: dict[str, Any]) -> list[str]:
    """One model's line of the table."""
    low, high = result["reward_interval"]
    reward = f"{result['reward']:+.3f} [{low:+.3f}, {high:+.3f}]"
    if "reward_gain" not in result:
        return [name, "-", reward, "-", "0", "0"]
    accuracy_low, accuracy_high = result["rewards/accuracies_interval"]
    gain_low, gain_high = result["reward_gain_interval"]
    return [
        name,
        f"{result['rewards/accuracies']:.3f} [{accuracy_low:.3f}, {accuracy_high:.3f}]",
        reward,
        f"{result['reward_gain']:+.3f} [{gain_low:+.3f}, {gain_high:+.3f}]",
        f"{result['kl_ref_policy/chosen']:.2f}",
        f"{result['kl_policy_ref/chosen']:.2f}",
    ]


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    head = [
        "model",
        "held-out accuracy",
        "sampled reward",
        "gain, paired",
        "KL(ref‖policy)",
        "KL(policy‖ref)",
    ]
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(head), line(["-" * w for w in widths]), *(line(r) for r in rows)])


def main() -> None:
    """Run all stages and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lora", action="store_true", help="train DPO with LoRA too")
    parser.add_argument("--ti", action="store_true", help="train TI-DPO too, in both published forms")
    arguments = parser.parse_args()
    start = time.perf_counter()
    call(BIN / "tokenpref", "prepare", "smollm2")
    before = evaluate("start", "~dataset", "~loss")  # its own reference: nothing to measure on pairs
    pair = OUTPUT / "pair"
    if not (pair / "pair.yaml").is_file():
        tune("contrastive_reference_distributed", "contrastive_reference", f"output_dir={pair}", *TRAINING)
    store = token_weights(pair)
    trained = {
        # The positive side of a DPO pair is the model that DPO gives.
        "DPO (the pair's positive side)": evaluate_trained("dpo", *whole(pair / "positive" / "epoch_0")),
        "TDPO2": evaluate_trained("tdpo", *whole(train("tdpo", "tdpo_distributed", "tdpo"))),
        "TIS-DPO": evaluate_trained(
            "tis", *whole(train("tis", "tis_dpo_distributed", "tis_dpo", f"token_weights.path={store}"))
        ),
    }
    if arguments.lora:
        adapter = train("dpo_lora", "tdpo_distributed", "dpo_lora", LORA_RATE, "log_stats=[]")
        trained["DPO with LoRA"] = evaluate_trained("dpo_lora", *LORA_MODEL, f"adapter_checkpoint={adapter}")
    for name, title in (("ti_paper", "TI-DPO (paper)"), ("ti_code", "TI-DPO (code)")) if arguments.ti else ():
        trained[title] = evaluate_trained(name, *whole(train(name, "ti_dpo_distributed", name)))
    text = table(
        [row("SmolLM2-135M-Instruct", before), *(row(name, result) for name, result in trained.items())]
    )
    (OUTPUT / "table.md").write_text(text + "\n", encoding="utf-8")
    call(BIN / "tokenpref", "show-weights", store, "--row", "0")
    after = trained["TIS-DPO"]
    print(f"\n{text}\n")
    print(
        f"{after['num_pairs']} held-out pairs; {after['num_samples']} samples of each model, same openings and noise."
    )
    print(
        "Accuracy: the policy's implicit reward prefers the chosen answer (95 % Wilson interval); undefined before"
    )
    print(
        "training. Reward: VADER compound of the sampled continuation, -1 to 1 (95 % interval). KL: nats, summed over"
    )
    print(f"the chosen answer's tokens. {time.perf_counter() - start:.0f} s in all.")


if __name__ == "__main__":
    main()
