"""Writes the page of results from finished cells; no number is typed by hand."""

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
        "## Mean weights",
        _weights_table(results),
        "## Reward against KL",
        _level_table(results, results.gain),
        _frontier_words(results),
        "The next table shows the difference from DPO's reward at the same KL:",
        _level_table(results, results.over_baseline, skip=(BASELINE,)),
        "The next table shows the last checkpoint of each method, as means over seeds:",
        _last_table(results),
        "## Sign checks",
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
    text = f"""This benchmark plants a known reward in a small artificial language, so that the true credit of every token
    is known. `python -m benchmarks.planted --write-docs` wrote this page. A {s.layers}-layer Llama of width {s.width} is
    first trained on a random bigram language of {s.vocab} tokens. It answers prompts of
    {s.prompt_tokens[0]}-{s.prompt_tokens[1]} tokens with {s.answer_tokens[0]}-{s.answer_tokens[1]} tokens. {s.planted}
    planted tokens have a hidden reward of {", ".join(f"±{m:g}" for m in s.magnitudes)}; a third of them have it only
    after tokens of one half of the vocabulary. The reward of an answer is the sum. Pairs of answers are labelled by the
    Bradley-Terry model at temperature {s.temperature:g}. For seeds {", ".join(map(str, results.seeds))}, {share} of the
    answer tokens have a reward, and {accuracy} of the labels are right. All training uses the library's own step, losses,
    weights and statistics. The learning rates of the DPO pair and of the comparison of rewards were chosen on seed 0,
    which is not shown."""
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
    text = f"""The measures are over held-out answers, chosen and rejected ({results.settings.heldout} pairs per seed).
    Values are means over seeds, with the lowest and highest in brackets. *AUC planted* says how well |log ratio| finds
    the tokens that have a reward. *AUC sign* says how well, among these, the log ratio separates good from bad ones.
    *Spearman* is the rank correlation of log ratio and hidden reward over all tokens. As most rewards are exactly 0, even
    a perfect log ratio stays below 1 unless it is 0 there too. *attribution* uses attribution weights without a prior in
    place of the log ratio: by the largest logit at the position that predicts the last token (max) or by the answer's
    log-probability (answer), on the base model; and the latter on a model that DPO trained on so many pairs (dpo). These
    weights have no sign, so only the first column applies to them. *random* and *uniform* are the library's control
    weights, minus one."""
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
    text = f"""- **prompt** needs no pairs of data. Its measures are
    {", ".join(f"{value:.3f}" for value in prompt.values())}. The task gives it a style that knows
    {results.settings.style_known:.0%} of the planted tokens and {results.settings.distractors} distractors, so these
    numbers say how well the style is read, not how good prompts are."""
    lines.append(_paragraph(text, "  "))
    for name in (n for n in TRAINED if n in PAIRS):
        enough = [
            n
            for n in results.settings.pair_counts
            if _mean(_measure(results, name, n, "spearman")) > prompt["spearman"]
        ]
        lines.append(
            f"- **{name}** has a higher rank correlation than prompt from {min(enough)} pairs on."
            if enough
            else f"- **{name}** does not reach the rank correlation of prompt with {most} pairs."
        )
    return "\n".join(lines)


def _weights_table(results: Results) -> str:
    lines = ["| side | reward > 0 | reward 0 | reward < 0 |", "| --- | --- | --- | --- |"]
    for side in ("chosen", "rejected"):
        cells = [
            f"{_mean([results.weights[seed][side + kind] for seed in results.seeds]):.3f}" for kind in "+0-"
        ]
        lines.append(f"| {side} | {' | '.join(cells)} |")
    text = f"""The values are mean exponential weights of a token (default settings, not normalised), grouped by the
    hidden reward, which the pair never saw. The DPO pair was trained on {results.settings.frontier_pairs} pairs and
    scores those same pairs."""
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
    text = f"""The values are the sampled hidden reward of an answer of {s.sampled_tokens} tokens minus that of the base
    model, where training first reaches a given KL(policy‖ref) per answer. The KL is in nats, summed over tokens, from the
    whole vocabulary at each position of the policy's own samples. Values are interpolated linearly between checkpoints
    and averaged over seeds. ± is the 95 % interval of the sampling of {s.samples} answers per seed; it does not cover
    seeds or training runs. A dash means that the KL was not reached within {max(s.checkpoints)} steps of {s.batch} pairs
    ({s.frontier_pairs} pairs in all), with AdamW {s.frontier_lr:g} and beta {s.beta:g}."""
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
        "A sign error in the weights would therefore be visible as a falling reward."
        if below == len(last)
        else "The differences from DPO are below."
    )
    text = f"""With the sides of the pair **swapped** the reward ends at {_mean(last):+.2f} (base model {base:+.2f}),
    below the base model in {below} of {len(last)} seeds. {verdict}"""
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
    again = """Run `OMP_NUM_THREADS=1 python -m benchmarks.planted --write-docs` in the root of the repository. `--quick`
    takes seconds and does not write the page. Finished cells stay in `outputs/planted` as JSON, with the numbers of every
    checkpoint. The command fails if a sign check fails."""
    machine = f"""The measurement took {results.cpu_seconds / 60:.0f} minutes of CPU time on one thread of {_processor()};
    Python {platform.python_version()}, torch {torch.__version__}, torchtune {_version("torchtune")}."""
    return "\n\n".join(["## How to repeat this", _paragraph(again), _paragraph(machine)])


def _version(name: str) -> str:
    return importlib.metadata.version(name)


def _processor() -> str:
    names = []
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
