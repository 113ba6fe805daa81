"""Tables and sentences out of finished cells; no number in the page is typed by hand."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.planted.constructions import CONSTRUCTIONS, PAIRS, TRAINED
from benchmarks.planted.frontier import ARMS
from benchmarks.planted.measures import at_level
from benchmarks.planted.task import Settings

__all__ = ["Results", "Sign", "page", "signs"]

BASELINE = "dpo"
PACE = 1.0  # the KL at which the speed of training is read


@dataclass(frozen=True)
class Results:
    """What all cells hold.

    Args:
        settings: sizes.
        seeds: the languages.
        facts: seed -> label accuracy and share of planted tokens.
        recovery: (seed, construction, pairs) -> measures; pairs 0 where nothing is trained.
        weights: seed -> mean exponential weights of planted tokens, raw, from the DPO pair.
        frontier: (seed, arm) -> points along training.
        cpu_seconds: of all cells.
    """

    settings: Settings
    seeds: tuple[int, ...]
    facts: dict[int, dict[str, float]]
    recovery: dict[tuple[int, str, int], dict[str, Any]]
    weights: dict[int, dict[str, float]]
    frontier: dict[tuple[int, str], list[dict[str, float]]]
    cpu_seconds: float

    def base_reward(self, seed: int) -> float:
        """Sampled reward of the base model."""
        return self.frontier[seed, BASELINE][0]["reward"]

    def at(self, seed: int, arm: str, level: float) -> tuple[float, float] | None:
        """Reward at a KL, and the half-width of its interval; None outside the measured range."""
        curve = [(p["kl"], p["reward"], p["reward_half"]) for p in self.frontier[seed, arm]]
        return at_level(curve, level)

    def gain(self, arm: str, level: float) -> Estimate | None:
        """Reward over the base model's at a KL, mean over the seeds that reach it."""
        found = [(self.at(seed, arm, level), self.base_reward(seed)) for seed in self.seeds]
        return Estimate.of([(value[0] - base, value[1]) for value, base in found if value is not None])

    def over_baseline(self, arm: str, level: float) -> Estimate | None:
        """Reward less DPO's at the same KL, mean over the seeds in which both reach it."""
        found = [(self.at(seed, arm, level), self.at(seed, BASELINE, level)) for seed in self.seeds]
        return Estimate.of(
            [(a[0] - b[0], math.hypot(a[1], b[1])) for a, b in found if a is not None and b is not None]
        )


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; ``half`` covers the sampling of answers, not the seeds."""

    value: float
    half: float
    seeds: int

    @classmethod
    def of(cls, parts: Sequence[tuple[float, float]]) -> Estimate | None:
        """None without parts."""
        if not parts:
            return None
        count = len(parts)
        return cls(sum(v for v, _ in parts) / count, math.sqrt(sum(h * h for _, h in parts)) / count, count)


@dataclass(frozen=True)
class Sign:
    """Something that has to hold if no sign is wrong."""

    claim: str
    holds: bool


def signs(results: Results) -> list[Sign]:
    """The sign checks, each over all seeds."""
    seeds = results.seeds
    most = max(results.settings.pair_counts)
    checks = []
    for name in PAIRS:
        values = [results.recovery[seed, name, most if name in TRAINED else 0]["sign"] for seed in seeds]
        checks.append(
            Sign(
                f"{name}: log ratios rank positive above negative planted tokens (smallest AUC {min(values):.3f})",
                min(values) > 0.5,
            )
        )
    weights = [results.weights[seed] for seed in seeds]
    checks.append(
        Sign(
            "weights of the DPO pair: on the chosen side positive planted tokens weigh more than negative ones",
            all(w["chosen+"] > w["chosen-"] for w in weights),
        )
    )
    checks.append(
        Sign(
            "weights of the DPO pair: on the rejected side negative planted tokens weigh more than positive ones",
            all(w["rejected-"] > w["rejected+"] for w in weights),
        )
    )
    for arm in (BASELINE, "oracle"):
        rises = [
            max(p["reward"] for p in results.frontier[seed, arm]) - results.base_reward(seed)
            for seed in seeds
        ]
        checks.append(
            Sign(
                f"{ARMS[arm].title}: training raises the hidden reward (at best by {min(rises):+.2f})",
                min(rises) > 0,
            )
        )
    for other in (BASELINE, "tis"):
        gaps = [
            a[0] - b[0]
            for seed in seeds
            for level in results.settings.levels
            if (a := results.at(seed, "swapped", level)) is not None
            and (b := results.at(seed, other, level)) is not None
        ]
        worst = f"; differences from {min(gaps):+.2f} to {max(gaps):+.2f}" if gaps else "; no common KL"
        checks.append(
            Sign(
                f"{ARMS['swapped'].title}: less reward than {ARMS[other].title} at every common KL{worst}",
                bool(gaps) and max(gaps) < 0,
            )
        )
    return checks


def page(results: Results) -> str:
    """The whole of docs/results/planted.md."""
    parts = [
        _head(results),
        "## Recovery of the hidden reward",
        _recovery_table(results),
        _recovery_words(results),
        "## Weights that come out",
        _weights_table(results),
        "## Reward against KL",
        _level_table(results, results.gain),
        _frontier_words(results),
        "The same less DPO's reward at that KL:",
        _level_table(results, results.over_baseline, skip=(BASELINE,)),
        "Last checkpoint of each arm, means over seeds:",
        _last_table(results),
        "## Signs",
        "\n".join(f"- {'right' if s.holds else '**WRONG**'}: {s.claim}" for s in signs(results)),
        _tail(results),
    ]
    return "\n\n".join(parts) + "\n"


def _paragraph(text: str, indent: str = "") -> str:
    return textwrap.fill(
        " ".join(text.split()), 150, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )


def _head(results: Results) -> str:
    s, facts = results.settings, results.facts
    accuracy = ", ".join(f"{100 * facts[seed]['accuracy']:.0f} %" for seed in results.seeds)
    share = ", ".join(f"{100 * facts[seed]['planted']:.0f} %" for seed in results.seeds)
    text = f"""`python -m benchmarks.planted --write-docs` made this page: a {s.layers}-layer Llama of width {s.width}, trained
    here on a random bigram language of {s.vocab} tokens, answers prompts of {s.prompt_tokens[0]}-{s.prompt_tokens[1]} tokens
    with {s.answer_tokens[0]}-{s.answer_tokens[1]}. {s.planted} planted tokens have a hidden reward of
    {", ".join(f"±{m:g}" for m in s.magnitudes)}, a third of them only after one half of the vocabulary; an answer is worth the
    sum. Bradley-Terry at temperature {s.temperature:g} labels pairs of its answers. Seeds
    {", ".join(map(str, results.seeds))}: {share} of answer tokens are worth something, and {accuracy} of the labels are right.
    Everything is trained with the library's own step, losses, weights and statistics. The DPO pair's and the frontier's
    learning rates were set on seed 0, which is not shown."""
    return "# Planted rewards\n\n" + _paragraph(text)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _rows(results: Results) -> list[tuple[str, int]]:
    return [
        (name, count)
        for name in CONSTRUCTIONS
        for count in (results.settings.pair_counts if name in TRAINED else (0,))
    ]


def _measure(results: Results, name: str, count: int, key: str) -> list[float]:
    found = [results.recovery[seed, name, count][key] for seed in results.seeds]
    return [value for value in found if value is not None]


def _recovery_table(results: Results) -> str:
    lines = [
        "| construction | pairs | AUC planted | AUC sign | Spearman | mean abs. log ratio |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, count in _rows(results):
        cells = []
        for key in ("planted", "sign", "spearman", "mean_abs"):
            values = _measure(results, name, count, key)
            spread = (
                f" ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 and key != "mean_abs" else ""
            )
            cells.append(f"{_mean(values):.3f}{spread}" if values else "-")
        lines.append(f"| {name} | {count or '-'} | {' | '.join(cells)} |")
    text = f"""Held-out answers, chosen and rejected ({results.settings.heldout} pairs a seed); mean over seeds, in brackets the
    least and the most. *AUC planted*: |log ratio| finds tokens that are worth something. *AUC sign*: among them, the log ratio
    tells good from bad. *Spearman*: log ratio and hidden reward over all tokens; as most rewards are exactly 0, even a
    perfect log ratio stays below 1 unless it is 0 there too. *attribution*: weights without prior, in place of the
    log ratio, by the largest logit where the last token is predicted (max) or the answer's log-probability (answer) on the base
    model, and the latter on a model trained by DPO on so many pairs (dpo); they have no sign, so the first column is theirs.
    *random* and *uniform*: the library's control weights, less one."""
    lines += ["", _paragraph(text)]
    return "\n".join(lines)


def _recovery_words(results: Results) -> str:
    least, most = min(results.settings.pair_counts), max(results.settings.pair_counts)
    lines = []
    for name in TRAINED:
        parts = []
        measures = (("planted", "AUC planted"), ("sign", "AUC sign"), ("spearman", "Spearman"))
        for key, title in measures if name in PAIRS else measures[:1]:
            first, last = (_mean(_measure(results, name, n, key)) for n in (least, most))
            verb = "grows" if last > first else "falls"
            parts.append(f"{title} {verb} from {first:.3f} to {last:.3f}")
        lines.append(f"- **{name}**, from {least} to {most} pairs: {', '.join(parts)}.")
    prompt = {key: _mean(_measure(results, "prompt", 0, key)) for key in ("planted", "sign", "spearman")}
    text = f"""- **prompt** needs no pairs and stays where its control tokens put it:
    {", ".join(f"{value:.3f}" for value in prompt.values())}. Its style knows {results.settings.style_known:.0%} of the planted
    tokens and {results.settings.distractors} distractors, by construction of the task; the numbers say how well the style is
    read, not how good prompts are."""
    lines.append(_paragraph(text, "  "))
    for name in (n for n in TRAINED if n in PAIRS):
        enough = [
            n
            for n in results.settings.pair_counts
            if _mean(_measure(results, name, n, "spearman")) > prompt["spearman"]
        ]
        lines.append(
            f"- {name} has the better rank correlation than prompt from {min(enough)} pairs on."
            if enough
            else f"- {name} does not reach prompt's rank correlation with {most} pairs."
        )
    return "\n".join(lines)


def _weights_table(results: Results) -> str:
    lines = ["| side | reward > 0 | reward 0 | reward < 0 |", "| --- | --- | --- | --- |"]
    for side in ("chosen", "rejected"):
        cells = [
            f"{_mean([results.weights[seed][side + kind] for seed in results.seeds]):.3f}" for kind in "+0-"
        ]
        lines.append(f"| {side} | {' | '.join(cells)} |")
    text = f"""Mean exponential weight (defaults, not normalised) of a token, by the hidden reward that the pair never saw; the
    DPO pair trained on {results.settings.frontier_pairs} pairs scores those same pairs."""
    lines += ["", _paragraph(text)]
    return "\n".join(lines)


def _level_table(
    results: Results, read: Callable[[str, float], Estimate | None], skip: tuple[str, ...] = ()
) -> str:
    levels = results.settings.levels
    lines = [
        f"| method | {' | '.join(f'KL {level:g}' for level in levels)} |",
        f"| --- |{' --- |' * len(levels)}",
    ]
    for arm, spec in ARMS.items():
        if arm in skip:
            continue
        cells = []
        for level in levels:
            found = read(arm, level)
            if found is None:
                cells.append("-")
                continue
            some = f" ({found.seeds} of {len(results.seeds)})" if found.seeds < len(results.seeds) else ""
            cells.append(f"{found.value:+.2f} ±{found.half:.2f}{some}")
        lines.append(f"| {spec.title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _frontier_words(results: Results) -> str:
    s = results.settings
    text = f"""Sampled hidden reward of an answer of {s.sampled_tokens} tokens, over the base model's, where training first passes
    a given KL(policy‖ref) per answer (nats, summed over tokens, from the whole vocabulary at each position of the policy's own
    samples); linear between checkpoints, mean over seeds. ±: 95 % interval of the sampling of {s.samples} answers a seed, not
    of seeds or training runs. A dash: not passed within {max(s.checkpoints)} steps of {s.batch} pairs
    ({s.frontier_pairs} pairs in all), AdamW {s.frontier_lr:g}, beta {s.beta:g}."""
    lines = [_paragraph(text), ""]
    for arm, spec in ARMS.items():
        if arm == BASELINE:
            continue
        found = [(level, results.over_baseline(arm, level)) for level in s.levels]
        gaps = [(level, gap) for level, gap in found if gap is not None]
        if not gaps:
            lines.append(f"- {spec.title}: no KL in common with DPO.")
            continue
        words = [
            (
                "the other levels" if clear is None else "more" if clear else "less",
                [f"{level:g}" for level, gap in gaps if _clear(gap) is clear],
            )
            for clear in (True, False, None)
        ]
        text = ", ".join(
            f"{word} reward than DPO at KL {' '.join(at)}"
            if word != "the other levels"
            else f"no clear difference at KL {' '.join(at)}"
            for word, at in words
            if at
        )
        lines.append(f"- {spec.title}: {text}.")
    base = _mean([results.base_reward(seed) for seed in results.seeds])
    last = [results.frontier[seed, "swapped"][-1]["reward"] for seed in results.seeds]
    below = sum(value < results.base_reward(seed) for value, seed in zip(last, results.seeds, strict=True))
    verdict = (
        "A sign error in the weights turns improvement into harm."
        if below == len(last)
        else "Read it together with the differences to DPO below."
    )
    text = f"""With the sides of the pair **swapped** the reward ends at {_mean(last):+.2f} (base model {base:+.2f}): below the
    base model in {below} of {len(last)} seeds. {verdict}"""
    lines += ["", _paragraph(text)]
    return "\n".join(lines)


def _clear(gap: Estimate) -> bool | None:
    """True above, False below, None within the interval."""
    return None if abs(gap.value) <= gap.half else gap.value > 0


def _last_table(results: Results) -> str:
    lines = [
        f"| method | reward | KL(policy‖ref), own samples | KL(ref‖policy), held-out chosen | pairs seen at KL {PACE:g} |",
        "| --- | --- | --- | --- | --- |",
    ]
    for arm, spec in ARMS.items():
        points = [results.frontier[seed, arm][-1] for seed in results.seeds]
        half = math.sqrt(sum(p["reward_half"] ** 2 for p in points)) / len(points)
        reward, own, chosen = (
            _mean([p[key] for p in points]) for key in ("reward", "kl", "kl_ref_policy_chosen")
        )
        lines.append(
            f"| {spec.title} | {reward:+.2f} ±{half:.2f} | {own:.2f} | {chosen:.2f} | {_pairs_seen(results, arm)} |"
        )
    return "\n".join(lines)


def _pairs_seen(results: Results, arm: str) -> str:
    """After how many pairs (repetitions counted) training passes KL ``PACE``."""
    curves = [
        [(p["kl"], p["step"] * results.settings.batch, 0.0) for p in results.frontier[seed, arm]]
        for seed in results.seeds
    ]
    seen = [found[0] for curve in curves if (found := at_level(curve, PACE)) is not None]
    return f"{_mean(seen):.0f}" if len(seen) == len(results.seeds) else "-"


def _tail(results: Results) -> str:
    again = """`OMP_NUM_THREADS=1 python -m benchmarks.planted --write-docs` from the repository's root; `--quick` for seconds,
    without the page. Finished cells stay in `outputs/planted` as JSON, with every checkpoint's numbers. The command fails when
    a sign is wrong."""
    machine = f"""{results.cpu_seconds / 60:.0f} minutes of CPU time on one thread of {_processor()}; Python
    {platform.python_version()}, torch {torch.__version__}, torchtune {_version("torchtune")}."""
    return "\n\n".join(["## Again", _paragraph(again), _paragraph(machine)])


def _version(name: str) -> str:
    return importlib.metadata.version(name)


def _processor() -> str:
    names = []
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
