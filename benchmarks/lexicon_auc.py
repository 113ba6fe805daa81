"""How well contrastive pairs and attribution find the words that make an answer preferred, on the real small model.

    python -m benchmarks.lexicon_auc               # builds the pairs that are missing, scores data/sentiment/eval.jsonl
    python -m benchmarks.lexicon_auc --write-docs  # and writes docs/results/lexicon_auc.md

The data comes with the lexicon's valence of every word, which decided what was preferred. The benchmark asks two questions
of each token's log pi+ - log pi-: does its size separate lexicon words from the rest, and does its sign separate good words
from bad ones? Attribution weights have no sign and answer the first alone.
"""

from __future__ import annotations

import argparse
import math
import platform
from pathlib import Path

import numpy as np
import torch

from benchmarks import tables
from benchmarks.frontier import PAIR, ROOT, tune
from benchmarks.planted.measures import auc
from tokenpref.data import WeightStore, load_rows
from tokenpref.weights import values_of_tokens

DATA = "package://data/sentiment/eval.jsonl"
DOC = ROOT / "docs" / "results" / "lexicon_auc.md"
METHODS = ("prompt", "sft", "dpo", "dpo_lora")
# Attribution alone (mixture 1), on the starting model: target, its settings, norm.
ATTRIBUTIONS = {
    "max_last": ("MaxLogit", ["estimator.target.position=last_valid"], "l1"),
    "max_before_last": ("MaxLogit", ["estimator.target.position=before_last"], "l1"),
    "answer": ("AnswerLogp", [], "l1"),
    "margin_ixg": ("PreferenceMargin", [], "input_times_gradient"),
}
INTRO = """# Which tokens a contrastive pair finds

`python -m benchmarks.lexicon_auc --write-docs` wrote this page: SmolLM2-135M-Instruct on the held-out pairs of
`data/sentiment/eval.jsonl`, {versions}, CPU, float32, one seed. An AUC of 0.5 is chance.

- `dpo` and `sft` train each side of the pair for 50 steps of 8 pairs on `train.jsonl`, with AdamW 5e-5. `prompt` uses the two
  prompts of `configs/smollm2/135M_contrastive_reference.yaml`. `dpo_lora` is `dpo` with two LoRA adapters over one base and
  twenty times the rate (`configs/smollm2/135M_contrastive_reference_lora.yaml`).
- A lexicon of sentiment words decided which answer was preferred. It knows neither negation nor context.
- The attribution rows use weights of the starting model, by target and norm, without a prior (mixture 1). They have mean one over
  each answer, so they cannot show which answers contain more sentiment words, and they have no sign.

"""


def pair_folder(method: str) -> Path:
    return ROOT / (PAIR if method == "dpo" else f"{PAIR}_{method}")


def store(method: str) -> WeightStore:
    """The scores of the held-out pairs under one construction, computed if missing."""
    pair, output = pair_folder(method), ROOT / "outputs" / f"lexicon_{method}"
    trained, _, lora = method.partition("_")
    ending = f"_{lora}" if lora else ""
    if not (pair / "pair.yaml").is_file():
        tune(
            "recipes/contrastive_reference_distributed",
            f"smollm2/135M_contrastive_reference{ending}",
            f"method={trained}",
            f"output_dir={pair}",
        )
    if not (output / "weights" / "metadata.json").is_file():
        tune(
            "recipes/estimate_weights_distributed",
            f"smollm2/135M_estimate_weights{ending}",
            f"estimator.pair={pair}",
            f"dataset.source={DATA}",
            f"output_dir={output}",
        )
    return WeightStore.open(output / "weights")


def attribution_store(name: str) -> WeightStore:
    """The attribution weights of the same pairs under the starting model, computed if missing."""
    target, settings, norm = ATTRIBUTIONS[name]
    output = ROOT / "outputs" / f"lexicon_attribution_{name}"
    if not (output / "weights" / "metadata.json").is_file():
        tune(
            "recipes/estimate_weights_distributed",
            "smollm2/135M_estimate_weights_attribution",
            f"estimator.target=tokenpref.weights.attribution.{target}",
            *settings,
            f"estimator.norm={norm}",
            "estimator.mixture=1.0",
            f"dataset.source={DATA}",
            f"output_dir={output}",
        )
    return WeightStore.open(output / "weights")


def measured(found: WeightStore) -> dict[str, float]:
    """AUCs over all answer tokens of both sides."""
    valences = load_rows(DATA).table
    ratios, values = [], []
    for row in found:
        for side in ("chosen", "rejected"):
            ratios.append(getattr(row, side))
            spans = [(int(start), int(end)) for start, end, _ in valences[row.row][f"{side}_valence"]]
            known = [value for _, _, value in valences[row.row][f"{side}_valence"]]
            values.append(values_of_tokens(getattr(row, f"{side}_spans"), spans, known, default=0.0))
    ratio, valence = np.concatenate(ratios), np.concatenate(values)
    lexicon = valence != 0
    return {
        "tokens": len(ratio),
        "lexicon tokens": int(lexicon.sum()),
        "size": auc(np.abs(ratio), lexicon),
        "sign": auc(ratio[lexicon], valence[lexicon] > 0) if found.kind == "log_ratio" else float("nan"),
        "mean": float(np.abs(ratio).mean()),
    }


def main() -> None:
    """Measure all constructions, print and perhaps write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--attributions", nargs="*", default=list(ATTRIBUTIONS), choices=list(ATTRIBUTIONS))
    parser.add_argument("--write-docs", action="store_true")
    arguments = parser.parse_args()
    found = {method: measured(store(method)) for method in arguments.methods}
    for name in arguments.attributions:
        target, settings, norm = ATTRIBUTIONS[name]
        where = "".join(f", {s.rpartition('=')[2]}" for s in settings)
        found[f"attribution: {target}{where}, {norm}"] = measured(attribution_store(name))
    rows = [
        [
            method,
            f"{m['size']:.3f}",
            "-" if math.isnan(m["sign"]) else f"{m['sign']:.3f}",
            f"{m['mean']:.3f}",
        ]
        for method, m in found.items()
    ]
    head = [
        "construction",
        "AUC of the size, lexicon word or not",
        "AUC of the sign, good or bad word",
        "mean size",
    ]
    text = tables.markdown(head, rows)
    first = next(iter(found.values()))
    words = first["lexicon tokens"]
    text += (
        f"\n\n{first['tokens']} answer tokens of 122 held-out pairs, {words} of them in words of the lexicon."
    )
    print(text)
    if arguments.write_docs:
        versions = f"torch {torch.__version__}, Python {platform.python_version()}"
        DOC.write_text(INTRO.format(versions=versions) + text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
