"""Reward against KL for DPO, TDPO2 and TIS-DPO on the real small model, with points along training.

    python -m benchmarks.frontier                  # about an hour on two cores; it resumes if it is started again
    python -m benchmarks.frontier --seeds 3
    python -m benchmarks.frontier --write-docs     # writes docs/results/tis_frontier.md from existing results

Every point is a command that a user could type: a training run with validation, which samples from the current policy. All
methods see the same pairs in the same order, and all samples the same openings and noise.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torchtune

from benchmarks import tables

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
DOC = ROOT / "docs" / "results" / "tis_frontier.md"
PAIR = "outputs/smollm2_135M_contrastive_reference"
WEIGHTS = "outputs/smollm2_135M_estimate_weights"
KL = "eval_kl_policy_ref/chosen"
LEVELS = (1.0, 2.0, 4.0, 8.0, 16.0)
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184"}


@dataclass(frozen=True)
class Arm:
    """A way to train: a config and its overrides."""

    title: str
    recipe: str
    config: str
    overrides: tuple[str, ...] = ()


TIS = ("recipes/tis_dpo_distributed", "smollm2/135M_tis_dpo")
ORACLE = (
    "token_weights._component_=tokenpref.data.ColumnScores",
    "token_weights.kind=log_ratio",
    "token_weights.per=span",
    "token_weights.chosen=chosen_valence",
    "token_weights.rejected=rejected_valence",
)
ARMS = {
    "dpo": Arm("DPO", "recipes/tdpo_distributed", "smollm2/135M_dpo", ("log_stats=[]",)),
    "tdpo2": Arm("TDPO2 (alpha 0.5)", "recipes/tdpo_distributed", "smollm2/135M_tdpo"),
    "tis_mean_one": Arm("TIS-DPO, mean-one weights", *TIS, ("normalize_weights=answer",)),
    "tis_raw": Arm("TIS-DPO, raw weights", *TIS, ("normalize_weights=none",)),
    "tis_tdpo_kl": Arm(
        "TIS-DPO, mean-one, with TDPO2's KL",
        *TIS,
        ("normalize_weights=answer", "loss.alpha=0.5", "loss.kl=reference"),
    ),
    "oracle": Arm("TIS-DPO, oracle weights, mean-one", *TIS, ("normalize_weights=answer", *ORACLE)),
}


def call(*words: str | Path) -> None:
    """Run a command, shown as a user would type it."""
    print("\n$ " + " ".join(map(str, words)), flush=True)
    subprocess.run([str(w) for w in words], check=True, cwd=ROOT, env={**os.environ, **MALLOC})


def tune(recipe: str, config: str, *overrides: str) -> None:
    call(BIN / "tune", "run", recipe, "--config", config, *overrides)


def sampling(samples: int) -> list[str]:
    return [
        "sampling.prompts=package://data/sentiment/openings.txt",
        "sampling.reward._component_=tokenpref.rewards.VaderReward",
        f"sampling.num_samples={samples}",
        "sampling.max_new_tokens=40",
        "sampling.batch_size=96",
    ]


def prepare(output: Path, samples: int, seed: int) -> Path:
    """Model, pair, weights and the starting model's samples, where they are missing; returns the samples."""
    if not (ROOT / "models/smollm2-135m-instruct/model.safetensors").is_file():
        call(BIN / "tokenpref", "prepare", "smollm2")
    if not (ROOT / PAIR / "pair.yaml").is_file():
        tune("recipes/contrastive_reference_distributed", "smollm2/135M_contrastive_reference")
    if not (ROOT / WEIGHTS / "weights" / "metadata.json").is_file():
        tune("recipes/estimate_weights_distributed", "smollm2/135M_estimate_weights")
    start = output / f"start_{seed}"
    if not (start / "evaluation.json").is_file():
        settings = [f"output_dir={start}", f"seed={seed}", f"sampling.num_samples={samples}"]
        tune("recipes/evaluate_distributed", "smollm2/135M_evaluate", "~dataset", "~loss", *settings)
    return start / "samples.jsonl"


def train(name: str, folder: Path, start: Path, arguments: argparse.Namespace, seed: int) -> None:
    """Train one method, or resume its run."""
    if (folder / "finished.json").is_file():
        return
    arm = ARMS[name]
    tune(
        arm.recipe,
        arm.config,
        *arm.overrides,
        f"output_dir={folder}",
        f"seed={seed}",
        f"max_steps_per_epoch={arguments.steps}",
        f"run_val_every_n_steps={arguments.every}",
        f"checkpoint_every_n_steps={arguments.every}",
        "batch_size_val=16",
        f"dataset_val.max_rows={arguments.pairs}",
        "loss_val._component_=tokenpref.losses.DPOLoss",
        "log_stats_val=[kl_ref_policy,kl_policy_ref]",
        *sampling(arguments.samples),
        f"sampling.compare_to={start}",
        "resume_from_checkpoint=auto",
    )


def points(folder: Path) -> list[dict[str, float]]:
    """Validation metrics by step, from the run's logs (a continued run has several)."""
    found: dict[int, dict[str, float]] = {}
    for file in sorted((folder / "logs").glob("*.txt")):
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith("Step") and "eval_" in line:
                metrics = {key: float(value) for key, value in re.findall(r"(\S+?):(\S+)", line)}
                found[int(re.match(r"Step (\d+)", line)[1])] = metrics
    return [{"step": step, **found[step]} for step in sorted(found)]


def document(output: Path, arguments: argparse.Namespace) -> str:
    """The results as Markdown."""
    seeds = range(arguments.seeds)
    curves = {
        name: [curve for seed in seeds if (curve := points(output / f"{name}_{seed}"))] for name in ARMS
    }
    start = json.loads((output / "start_0" / "evaluation.json").read_text(encoding="utf-8"))
    rows, levels, widths = [], [], []
    ranking: dict[float, list[tuple[float, str]]] = {}
    for name, arm in ARMS.items():
        for seed, curve in enumerate(curves[name]):
            for p in curve:
                widths.append((p["eval_reward_high"] - p["eval_reward_low"]) / 2)
                rows.append(
                    [
                        arm.title if len(curves[name]) == 1 else f"{arm.title}, seed {seed}",
                        f"{p['step']:.0f}",
                        f"{p[KL]:.2f}",
                        f"{p['eval_kl_ref_policy/chosen']:.2f}",
                        f"{p['eval_reward']:+.3f} [{p['eval_reward_low']:+.3f}, {p['eval_reward_high']:+.3f}]",
                        f"{p['eval_reward_gain']:+.3f} [{p['eval_reward_gain_low']:+.3f}, {p['eval_reward_gain_high']:+.3f}]",
                        f"{p['eval_rewards/accuracies']:.3f}",
                    ]
                )
        found = [at_level(curves[name], level, start["reward"]) for level in LEVELS]
        levels.append([arm.title, *("-" if value is None else f"{value:+.3f}" for value in found)])
        for level, value in zip(LEVELS, found, strict=True):
            if value is not None:
                ranking.setdefault(level, []).append((value, arm.title))
    head = [
        "method",
        "step",
        "KL(policy‖ref)",
        "KL(ref‖policy)",
        "sampled reward",
        "gain, paired",
        "accuracy",
    ]
    return "\n".join(
        [
            tables.markdown(head, rows),
            "",
            "The next table compares the rewards at equal KL(policy‖ref). Values between the measured points are interpolated",
            f"linearly, from the starting model at KL 0 with reward {start['reward']:+.3f}. A dash means that the method did not",
            "reach this KL. Linear interpolation from the start underestimates a method whose first point has a large KL.",
            "",
            tables.markdown(["method", *(f"KL {level:g}" for level in LEVELS)], levels),
            "",
            sentences(ranking, sum(widths) / max(len(widths), 1)),
        ]
    )


def at_level(curves: list[list[dict[str, float]]], level: float, origin: float) -> float | None:
    """Mean over seeds of the interpolated reward at a KL; None where no seed reaches it."""
    found = [
        interpolated([(0.0, origin), *((p[KL], p["eval_reward"]) for p in curve)], level) for curve in curves
    ]
    values = [value for value in found if value is not None]
    return sum(values) / len(values) if values else None


def sentences(ranking: dict[float, list[tuple[float, str]]], half_width: float) -> str:
    """The ranking at each KL in words, and the noise of a reward."""
    lines = []
    for level, found in sorted(ranking.items()):
        if len(found) > 1:
            (best, winner), *others = sorted(found, reverse=True)
            rest = ", ".join(f"{title} {value:+.3f}" for value, title in others)
            lines.append(f"- At KL {level:g}: **{winner}** {best:+.3f}; then {rest}.")
    lines.append(
        f"\nThe 95 % interval of each reward is about ±{half_width:.2f}. Smaller differences are not significant."
    )
    return "\n".join(lines)


def interpolated(curve: list[tuple[float, float]], level: float) -> float | None:
    """Reward where the curve first passes a KL level, or None."""
    for (x0, y0), (x1, y1) in zip(curve, curve[1:], strict=False):
        if x0 <= level <= x1 and x1 > x0:
            return y0 + (y1 - y0) * (level - x0) / (x1 - x0)
    return None


HEADER = """# Reward against KL

`python -m benchmarks.frontier --write-docs` wrote this page: SmolLM2-135M-Instruct on `data/sentiment`, {versions}, CPU,
float32.

- Every method trains {steps} steps of 8 pairs with AdamW 5e-5 and beta 0.1, on the same pairs in the same order; {seeds}.
- It is measured every {every} steps on {pairs} held-out pairs: both KL divergences in nats, summed over the chosen answer's
  tokens, and the accuracy of the implicit reward beta log(policy/ref).
- The reward is VADER's sentiment of {samples} sampled continuations of 40 tokens, with the same openings and noise for all
  methods. Brackets are 95 % intervals over samples, not over training runs.
- The sides of the contrastive pair are DPO on the same data and DPO on the data with swapped answers, 50 steps each.
- The weights are exp(log ratio), with the log ratio clamped to [-0.5, 1.5]. "mean-one" weights are divided by their mean over
  each answer. "oracle" uses the lexicon's valence in place of the log ratio.

"""


def main() -> None:
    """Run what is missing, then print (and write) the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=36)
    parser.add_argument("--every", type=int, default=12, help="steps between points")
    parser.add_argument("--pairs", type=int, default=48, help="held-out pairs of a point")
    parser.add_argument("--samples", type=int, default=6, help="samples of each opening")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "frontier")
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--write-docs", action="store_true", help="write docs/results/tis_frontier.md")
    parser.add_argument("--no-run", action="store_true", help="only tabulate what is there")
    arguments = parser.parse_args()
    output = arguments.output.absolute()
    if not arguments.no_run:
        for seed in range(arguments.seeds):
            start = prepare(output, arguments.samples, seed)
            for name in arguments.arms:
                train(name, output / f"{name}_{seed}", start, arguments, seed)
    text = document(output, arguments)
    print(text)
    if arguments.write_docs:
        versions = f"torch {torch.__version__}, torchtune {torchtune.__version__}, Python {platform.python_version()}"
        header = HEADER.format(
            versions=versions,
            steps=arguments.steps,
            every=arguments.every,
            pairs=arguments.pairs,
            samples=24 * arguments.samples,
            seeds="one seed" if arguments.seeds == 1 else f"{arguments.seeds} seeds",
        )
        footer = (
            "\n\nThe same arms on a task with a known reward for every token: [planted.md](planted.md).\n"
        )
        DOC.write_text(header + text + footer, encoding="utf-8")
        print(f"wrote {DOC.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
