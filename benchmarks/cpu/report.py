"""Writes the page of results from the raw results; only the targets are typed by hand."""

from __future__ import annotations

import statistics
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import tables
from benchmarks.cpu.floor import KINDS, head_floor, step_floor, step_teraflop
from benchmarks.cpu.work import COMPARED_WITH, PAIRED_MODES, SHAPES, TOLERANCE

__all__ = ["TOLERANCE", "Difference", "Results", "differences", "line", "page", "rounds"]

Results = dict[str, Any]

TOKENS_WANTED = {"fixed": 2.0, "varied": 3.0}
PEAK_WANTED = 6.0
BASE_WANTED = 1.05
"""Time of the reference with adapters off over that of a model without adapters, at most; 5 % for the clock's noise."""
KL_WANTED = {"llama-20m": 1.4, "smollm2-135m": 1.2}
HEAD_VOCABULARY = 128_256
HEAD_WANTED = {"": (5.0, 1.1), "-128": (15.0, 1.5)}
"""Eager's peak over ours at least, time over eager's at most: with the default budget, and with 128 MiB of logits a model."""
GROWTH_WANTED = 0.1
BUSY = 0.1  # cores that others may use before the page says so

TITLES = {
    "ref": "DPO, reference model",
    "precompute": "DPO, reference precomputed",
    "lora": "DPO with LoRA (q and v, rank 8)",
    "tdpo2-ref": "TDPO2, reference model",
    "causal-lm-ref": "DPO, reference model, both by causal_lm",
    "tdpo2-cached": "TDPO2, hidden states cached",
}
FORWARDS = {
    "adapters_off": "the policy with its adapters switched off, without gradient (the reference)",
    "plain": "a model without adapters, without gradient",
    "training": "the policy in training, whose head is frozen",
}
SIDES = {"peer": "TRL", "ours": "tokenpref"}
HEAD_TITLES = {
    "eager": "eager, full logits",
    "liger": "Liger, chunked DPO (a pair at a time)",
    "trl": "TRL, chunked log-probs",
    "ours": "tokenpref",
    "ours-128": "tokenpref, 128 MiB kept",
    "ours-compiled": "tokenpref, compiled",
    "eager-kl": "eager, full logits, KL",
    "ours-kl": "tokenpref, KL",
    "ours-128-kl": "tokenpref, KL, 128 MiB kept",
    "ours-compiled-kl": "tokenpref, KL, compiled",
}


@dataclass(frozen=True)
class Runs:
    """The runs of one side in one mode, over all rounds."""

    runs: list[dict[str, Any]]

    def best(self, name: str) -> float:
        """The best round; a rate is good when it is high, a time when it is low."""
        return (max if name.startswith("tokens") else min)(r[name] for r in self.runs)

    def median(self, name: str) -> float:
        """The median round."""
        return statistics.median(r[name] for r in self.runs)

    def memory(self, name: str = "peak") -> float:
        """Highest memory of training, or of ``precompute_peak``, above the loaded model, in GiB; the median round."""
        return statistics.median(r["memory_mib"][name] - r["memory_mib"]["loaded"] for r in self.runs) / 1024


@dataclass(frozen=True)
class Difference:
    """How far our losses are from the peer's.

    Args:
        task: name of the work.
        mode: of the step.
        worst: the largest difference of a step, over all rounds and allocators.
    """

    task: str
    mode: str
    worst: float


def _find(results: Results, side: str, task: str, mode: str, malloc: str) -> Runs | None:
    wanted = (side, task, mode, malloc)
    found = [r for r in results["runs"] if (r["side"], r["task"], r["mode"], r["malloc"]) == wanted]
    return Runs(found) if found else None


def _tasks(results: Results) -> list[tuple[str, str, str]]:
    """Name, shape and lengths of the work that was done, in its order."""
    return list(dict.fromkeys((r["task"], r["shape"], r["lengths"]) for r in results["runs"]))


def _mallocs(results: Results, kind: str = "runs") -> list[str]:
    return list(dict.fromkeys(r["malloc"] for r in results[kind]))


def differences(results: Results) -> list[Difference]:
    """Losses of both sides, wherever both ran."""
    found = []
    for task, _, _ in _tasks(results):
        for mode in PAIRED_MODES:
            runs = [r for r in results["runs"] if (r["task"], r["mode"]) == (task, mode)]
            peers = [r["losses"] for r in runs if r["side"] == "peer"]
            ours = [r["losses"] for r in runs if r["side"] == "ours"]
            gaps = [abs(a - b) for one in peers for other in ours for a, b in zip(one, other, strict=True)]
            if gaps:
                found.append(Difference(task, mode, max(gaps)))
    return found


def _floor(results: Results, run: dict[str, Any]) -> float:
    """Seconds of the products that a timed step needs, on average."""
    positions, answers = _per_step(run)
    rates = results["rates"][run["task"]]["float32"]
    return step_floor(SHAPES[run["shape"]], run["mode"], positions, answers, rates)


def _per_step(run: dict[str, Any]) -> tuple[float, float]:
    """Positions, with a prompt once for both answers, and answers' tokens of a timed step, on average."""
    warmup = run["warmup"]
    tokens, answers = (statistics.mean(run[name][warmup:]) for name in ("tokens", "answer_tokens"))
    return (tokens + answers) / 2, answers


def _floor_share(results: Results, runs: Runs) -> float:
    """Floor over the time of a step, on average; the best round."""
    run = runs.runs[0]
    return _floor(results, run) * (len(run["step_s"]) - run["warmup"]) / runs.best("timed_s")


def line(kind: str, record: dict[str, Any]) -> str:
    """A line for the terminal, as soon as something is measured."""
    others = f"  (others used {record['others']:.2f} cores)" if record["others"] > BUSY else ""
    if kind == "runs":
        above = (record["memory_mib"]["peak"] - record["memory_mib"]["loaded"]) / 1024
        ratios = "".join(
            f", adapters off / {name} {_off_over(record, name):.2f}"
            for name in FORWARDS
            if name in _compared(record)
        )
        return (
            f"{record['task']} {record['malloc']:7} {SIDES[record['side']]:9} {record['mode']:11} "
            f"{record['median_step_s']:.3f} s/step {record['tokens_per_s']:6.0f} tokens/s {above:.2f} GiB{ratios}{others}"
        )
    about = f"head V={record['vocab']} N={record['rows']} {record['dtype']} {record['malloc']:7} {record['name']:8}"
    if "failed" in record:
        return f"{about} {record['failed']}"
    return f"{about} {record['best_s']:.3f} s {record['above_mib'] / 1024:.2f} GiB{others}"


def page(results: Results) -> str:
    """The whole of docs/results/cpu.md."""
    parts = ["# Speed and memory on the CPU", _head(results)]
    summary = list(_summary(results))
    if summary:
        parts += ["## Summary", "\n".join(f"- {sentence}" for sentence in summary)]
    parts += ["## How to read this page", _glossary()]
    asked = _asked(results)
    if asked:
        head = ["target", "measured", "wanted", "reached"]
        parts += ["## Targets", tables.markdown(head, [a.cells() for a in asked])]
    if results["runs"]:
        parts += ["## DPO steps", _step_words(results), _step_table(results)]
        if differences(results):
            parts += [
                "## Comparison with TRL",
                _ratio_table(results),
                "## Losses",
                _loss_words(results),
                _loss_table(results),
            ]
        if any("forward_s" in r for r in results["runs"]):
            parts += ["## Cost of the reference with adapters", _base_words(), _base_table(results)]
        if any(r["mode"] in COMPARED_WITH for r in results["runs"]):
            parts += ["## Cost of the KL and of transformers' layers", _kl_words(), _kl_table(results)]
    if results["heads"]:
        parts += ["## The head alone", _heads_words(results), *_heads_tables(results)]
    if results["growth"]:
        parts += [
            "## Memory of the head by number of positions",
            _growth_words(results),
            _growth_table(results),
        ]
    if results["rates"]:
        parts += ["## Speed of matrix products", _rates_table(results)]
    return "\n\n".join(parts) + "\n"


def rounds(results: Results) -> tuple[int, int]:
    """How often the processes of steps and heads ran, at least and at most."""
    of_steps = Counter((r["side"], r["task"], r["mode"], r["malloc"]) for r in results["runs"])
    counts = [*of_steps.values(), *_starts(results)]
    return (min(counts), max(counts)) if counts else (0, 0)


def _starts(results: Results) -> list[int]:
    """How often the processes of each head ran."""
    return [len(h.get("peaks_mib", [None])) for h in results["heads"] if "failed" not in h]


def _head(results: Results) -> str:
    machine, plan, (fewest, most) = results["machine"], results["plan"], rounds(results)
    lines = [
        "`python -m benchmarks.cpu --write-docs` wrote this page. `make bench` measures the same and prints it. Every number "
        f"comes from a fresh process with {plan['threads']} threads. The two sides take turns, for "
        + (f"{fewest} rounds." if fewest == most else f"{fewest} to {most} rounds."),
        f"Machine: {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"{', '.join(machine['instructions']) or 'no vector extensions named'}; {machine['system']}.",
    ]
    if results.get("onednn"):
        lines.append(
            "On this processor tokenpref multiplies float32 matrices with oneDNN, which uses AVX-512. Eager heads, Liger and TRL "
            "use PyTorch's default, MKL, which does not use AVX-512 here. The speeds of products and the minimum times on this "
            "page are those of oneDNN."
        )
    for side in ("ours", "peer"):
        found = [r["versions"] for r in results["runs"] if r["side"] == side]
        found += [h["versions"] for h in results["heads"] if "versions" in h and not found and side == "ours"]
        if found:
            lines.append(f"{SIDES[side]}: " + ", ".join(f"{k} {v}" for k, v in found[0].items()) + ".")
    measured = [r for kind in ("runs", "heads", "growth") for r in results[kind]]
    busy = [r["others"] for r in measured]
    starts = len(results["load"]) // 2
    if busy:
        lines.append(
            f"During the {len(busy)} measured processes, other processes used {statistics.mean(busy):.2f} cores on average and "
            f"{max(busy):.2f} at most. The measurement took {results['seconds'] / 60:.0f} minutes"
            # The load is read when a command begins and when it ends.
            + (f", in {starts} commands whose results were merged." if starts > 1 else ".")
            + (" **The machine was not idle.**" if statistics.mean(busy) > BUSY else "")
        )
    if not results["complete"]:
        lines.append("**This is not a complete run**: some sizes, parts or rounds were left out.")
    return "\n\n".join(_wrapped(text) for text in lines)


def _summary(results: Results) -> Iterator[str]:
    """What the numbers mean, in a sentence each."""
    for malloc in _mallocs(results):
        for lengths, title in (("fixed", "equal"), ("varied", "varied")):
            pairs = [
                (peer, ours)
                for task, _, own in _tasks(results)
                for mode in PAIRED_MODES
                for peer, ours in [[_find(results, side, task, mode, malloc) for side in ("peer", "ours")]]
                if own == lengths and peer and ours
            ]
            if pairs:
                speed = _range(
                    [ours.median("tokens_per_s") / peer.median("tokens_per_s") for peer, ours in pairs]
                )
                memory = _range([peer.memory() / ours.memory() for peer, ours in pairs])
                yield (
                    f"With sequences of {title} length and malloc `{malloc}`, DPO here processes {speed} times as many tokens "
                    f"per second as TRL. TRL's peak memory is {memory} times ours."
                )
    if gaps := differences(results):
        yield f"The loss of a step differs from TRL's by at most {max(gap.worst for gap in gaps):.1e}."
    costs = [asked.measured for asked in _asked_of_the_kl(results)]
    if costs:
        yield f"A TDPO2 step with cached hidden states takes {_range(costs)} times as long as a DPO step."


def _range(values: Sequence[float]) -> str:
    lowest, highest = f"{min(values):.2f}", f"{max(values):.2f}"
    return lowest if lowest == highest else f"{lowest} to {highest}"


def _glossary() -> str:
    return "\n".join(
        [
            "- **tokens/s** counts all tokens that are not padding, for both sides alike; a prompt counts in both answers.",
            "- **Peak** is the highest resident memory during training minus the memory of the loaded models. It includes "
            "gradients and optimizer state.",
            "- **malloc**: with `keep`, the C library (glibc) keeps freed memory for reuse; `default` is glibc as it is shipped.",
            "- **Needed TFLOP** counts the matrix products that a step cannot avoid. The **floor** is the time that they take at "
            "the speeds in the last table. **Floor share** is the floor divided by the measured time. At 100 % a step would do "
            "nothing else.",
            "- **Best** and **median** are over rounds. **CPU s** is processor time, summed over all cores.",
            "- **Precompute** is the reference's pass over the data before training, which is not part of a step's time.",
        ]
    )


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 130, break_long_words=False, break_on_hyphens=False)


@dataclass(frozen=True)
class Asked:
    """A target, and what was measured."""

    claim: str
    measured: float
    wanted: float
    at_most: bool = False

    def cells(self) -> list[str]:
        """Of the table."""
        met = self.measured <= self.wanted if self.at_most else self.measured >= self.wanted
        digits = ".1e" if self.wanted == TOLERANCE else ".2f"
        wanted = f"{'at most' if self.at_most else 'at least'} {self.wanted:g}"
        return [self.claim, format(self.measured, digits), wanted, "yes" if met else "**no**"]


def _asked(results: Results) -> list[Asked]:
    return [
        *_asked_of_losses(results),
        *_asked_of_steps(results),
        *_asked_of_the_base(results),
        *_asked_of_the_kl(results),
        *_asked_of_heads(results),
        *_asked_of_growth(results),
    ]


def _asked_of_losses(results: Results) -> Iterator[Asked]:
    if gaps := differences(results):
        claim = "largest difference of a step's loss from TRL's"
        yield Asked(claim, max(d.worst for d in gaps), TOLERANCE, at_most=True)


def _asked_of_steps(results: Results) -> Iterator[Asked]:
    for task, _, lengths in _tasks(results):
        for mode in PAIRED_MODES:
            for malloc in _mallocs(results):
                peer, ours = (_find(results, side, task, mode, malloc) for side in ("peer", "ours"))
                if peer and ours:
                    where = f"{TITLES[mode]}, {lengths} lengths, malloc {malloc}"
                    speed = ours.median("tokens_per_s") / peer.median("tokens_per_s")
                    yield Asked(f"tokens/s relative to TRL: {where}", speed, TOKENS_WANTED[lengths])
                    memory = peer.memory() / ours.memory()
                    yield Asked(f"TRL's peak relative to ours: {where}", memory, PEAK_WANTED)


def _asked_of_the_base(results: Results) -> Iterator[Asked]:
    for task, _, lengths in _tasks(results):
        for malloc in _mallocs(results):
            runs = _with_forwards(results, task, malloc)
            if runs:
                ratio = min(_off_over(run, "plain") for run in runs)
                claim = "forward pass with adapters off, relative to a model without adapters"
                where = f"{lengths} lengths, malloc {malloc}"
                yield Asked(f"{claim}: {where}", ratio, BASE_WANTED, at_most=True)


def _with_forwards(results: Results, task: str, malloc: str) -> list[dict[str, Any]]:
    """The runs whose forward passes were timed by themselves; earlier results have none."""
    runs = _find(results, "ours", task, "lora", malloc)
    return [run for run in runs.runs if "forward_s" in run] if runs else []


def _compared(run: Mapping[str, Any]) -> list[str]:
    """The forward passes that the reference of a run with adapters is compared with."""
    return [name for name in run.get("forward_s", {}) if name != "adapters_off"]


def _off_over(run: Mapping[str, Any], other: str) -> float:
    """Time of a forward pass with adapters off over that of another."""
    seconds = run["forward_s"]
    return float(seconds["adapters_off"] / seconds[other])


def _asked_of_the_kl(results: Results) -> Iterator[Asked]:
    mode = "tdpo2-cached"
    for task, shape, lengths in _tasks(results):
        for malloc in _mallocs(results):
            cached, dpo = (_find(results, "ours", task, m, malloc) for m in (mode, COMPARED_WITH[mode]))
            if cached and dpo and shape in KL_WANTED:
                claim = (
                    f"step time relative to DPO: {TITLES[mode]}, {shape}, {lengths} lengths, malloc {malloc}"
                )
                ratio = cached.median("timed_s") / dpo.median("timed_s")
                yield Asked(claim, ratio, KL_WANTED[shape], at_most=True)


def _asked_of_heads(results: Results) -> Iterator[Asked]:
    for malloc in _mallocs(results, "heads"):
        for dtype in dict.fromkeys(h["dtype"] for h in results["heads"]):
            for more, gives in (("", "log-probs"), ("-kl", "log-probs and KL")):
                # The targets for half precision are for compiled operations, which are faster there.
                for budget in ("", "-128") if dtype == "float32" else ("",):
                    how = budget if dtype == "float32" else "-compiled"
                    names = ("eager" + more, "ours" + how + more)
                    eager, ours = (_head_of(results, n, HEAD_VOCABULARY, dtype, malloc) for n in names)
                    if eager and ours:
                        words = {"": "", "-128": ", 128 MiB kept", "-compiled": ", compiled"}[how]
                        where = (
                            f"head alone, {gives}, V = {HEAD_VOCABULARY:,}, {dtype}{words}, malloc {malloc}"
                        )
                        peak = _over(eager["above_mib"], ours["above_mib"])
                        wanted_peak, wanted_time = HEAD_WANTED[budget]
                        yield Asked(f"eager's peak relative to ours: {where}", peak, wanted_peak)
                        ratio = ours["best_s"] / eager["best_s"]
                        yield Asked(f"time relative to eager: {where}", ratio, wanted_time, at_most=True)


def _asked_of_growth(results: Results) -> Iterator[Asked]:
    for malloc in _mallocs(results, "growth"):
        peaks = [g["above_mib"] for g in results["growth"] if g["malloc"] == malloc]
        claim = f"growth of the head's memory with the number of positions, malloc {malloc}"
        yield Asked(claim, _over(max(peaks), min(peaks)) - 1, GROWTH_WANTED, at_most=True)


def _over(one: float, other: float) -> float:
    """The ratio of two amounts of memory, either of which may be too small to measure."""
    return one / max(other, 1.0)


def _step_words(results: Results) -> str:
    task = results["plan"]["tasks"][0]
    shape = SHAPES[task["shape"]]
    optimizer = "fused AdamW" if results["plan"]["fused_adamw"] else "AdamW"
    return _wrapped(
        f"Both sides train the same Llama with random weights ({shape.parameters / 1e6:.1f} M parameters, vocabulary of "
        f"{shape.vocab:,}, float32) on the same pairs in the same order. A step has {task['batch']} pairs of up to "
        f"{task['length']} tokens. Both use {optimizer} with learning rate {task['lr']:g}, no weight decay, no gradient "
        f"clipping, and beta {task['beta']:g}. Of {task['steps']} steps, the first {task['warmup']} are not timed."
    )


def _step_table(results: Results) -> str:
    head = [
        "model",
        "lengths",
        "mode",
        "malloc",
        "side",
        "s/step, best",
        "median",
        "CPU s",
        "tokens/s, best",
        "median",
    ]
    head += ["tokens/CPU s", "peak GiB", "precompute s", "its peak GiB", "needed TFLOP", "floor share"]
    rows = []
    for task, shape, lengths in _tasks(results):
        for mode in PAIRED_MODES:
            for malloc in _mallocs(results):
                for side, title in SIDES.items():
                    runs = _find(results, side, task, mode, malloc)
                    if runs:
                        about = [shape, lengths, TITLES[mode], malloc, title]
                        rows.append([*about, *_step_cells(results, runs)])
    return tables.markdown(head, rows)


def _step_cells(results: Results, runs: Runs) -> list[str]:
    run = runs.runs[0]
    first = run["precompute_s"] is not None
    return [
        f"{runs.best('median_step_s'):.3f}",
        f"{runs.median('median_step_s'):.3f}",
        f"{runs.median('median_step_cpu_s'):.2f}",
        f"{runs.best('tokens_per_s'):.0f}",
        f"{runs.median('tokens_per_s'):.0f}",
        f"{runs.median('tokens_per_cpu_s'):.0f}",
        f"{runs.memory():.2f}",
        f"{runs.median('precompute_s'):.1f}" if first else "-",
        f"{runs.memory('precompute_peak'):.2f}" if first else "-",
        f"{step_teraflop(SHAPES[run['shape']], run['mode'], *_per_step(run)):.3f}",
        f"{_floor_share(results, runs):.0%}",
    ]


def _ratio_table(results: Results) -> str:
    head = [
        "lengths",
        "mode",
        "malloc",
        "tokens/s, best",
        "tokens/s, median",
        "tokens/CPU s",
        "TRL's peak over ours",
    ]
    rows = []
    for task, _, lengths in _tasks(results):
        for mode in PAIRED_MODES:
            for malloc in _mallocs(results):
                peer, ours = (_find(results, side, task, mode, malloc) for side in ("peer", "ours"))
                if peer and ours:
                    rows.append(
                        [
                            lengths,
                            TITLES[mode],
                            malloc,
                            f"{ours.best('tokens_per_s') / peer.best('tokens_per_s'):.2f} x",
                            f"{ours.median('tokens_per_s') / peer.median('tokens_per_s'):.2f} x",
                            f"{ours.median('tokens_per_cpu_s') / peer.median('tokens_per_cpu_s'):.2f} x",
                            f"{peer.memory() / ours.memory():.1f} x",
                        ]
                    )
    return tables.markdown(head, rows)


def _loss_words(results: Results) -> str:
    worst = max(d.worst for d in differences(results))
    return _wrapped(
        f"The table shows the first round, with a reference model and malloc {_mallocs(results)[0]}. Over all rounds, modes and "
        f"allocators, the largest difference of a step's loss is {worst:.1e}. The target is at most {TOLERANCE:.0e}."
    )


def _loss_table(results: Results) -> str:
    columns: list[list[float]] = []
    head = ["step"]
    for task, _, lengths in _tasks(results):
        peer, ours = (_find(results, side, task, "ref", _mallocs(results)[0]) for side in ("peer", "ours"))
        if peer and ours:
            head += [f"TRL, {lengths}", f"tokenpref, {lengths}", "difference"]
            both = [runs.runs[0]["losses"] for runs in (peer, ours)]
            columns += [*both, [b - a for a, b in zip(*both, strict=True)]]
    rows = []
    for step, values in enumerate(zip(*columns, strict=True), 1):
        cells = [f"{v:+.1e}" if i % 3 == 2 else f"{v:.7f}" for i, v in enumerate(values)]
        rows.append([str(step), *cells])
    worst = [f"{d.worst:.1e} ({TITLES[d.mode]}, {d.task.split('_')[1]})" for d in differences(results)]
    return tables.markdown(head, rows) + "\n\nLargest differences: " + "; ".join(worst) + "."


def _base_words() -> str:
    return _wrapped(
        "With adapters, the reference is the policy with its adapters switched off. The table times one forward pass over all "
        "batches of the work, alone, after the training: the sum of the best times of the batches, in the best round. A ratio "
        "belongs to one process, in which the three take turns."
    )


def _base_table(results: Results) -> str:
    head = ["lengths", "malloc", "forward pass", "s", "adapters off, relative to it"]
    rows = []
    for task, _, lengths in _tasks(results):
        for malloc in _mallocs(results):
            for name, title in FORWARDS.items():
                if runs := _with_forwards(results, task, malloc):
                    best = min(run["forward_s"][name] for run in runs)
                    ratio = min(_off_over(run, name) for run in runs)
                    rows.append([lengths, malloc, title, f"{best:.3f}", f"{ratio:.2f}"])
    return tables.markdown(head, rows)


def _kl_words() -> str:
    return _wrapped(
        "The table compares the median step of TDPO2, and of DPO on a model of transformers, with the median DPO step of "
        "tokenpref with the same kind of reference; they take turns. The last column is the ratio of their minimum times. "
        "The KL is exact, over the whole vocabulary. The rows of causal_lm show what transformers' layers cost in place "
        "of torchtune's."
    )


def _kl_table(results: Results) -> str:
    head = [
        "model",
        "lengths",
        "malloc",
        "mode",
        "compared with",
        "s/step",
        "tokens/s",
        "peak GiB",
        "floor share",
    ]
    head += ["time over DPO", "floor over DPO's"]
    rows = []
    for task, shape, lengths in _tasks(results):
        for mode, base in COMPARED_WITH.items():
            for malloc in _mallocs(results):
                runs, dpo = (_find(results, "ours", task, m, malloc) for m in (mode, base))
                if runs and dpo:
                    rows.append(
                        [
                            shape,
                            lengths,
                            malloc,
                            TITLES[mode],
                            TITLES[base],
                            f"{runs.median('median_step_s'):.3f}",
                            f"{runs.median('tokens_per_s'):.0f}",
                            f"{runs.memory():.2f}",
                            f"{_floor_share(results, runs):.0%}",
                            f"{runs.median('timed_s') / dpo.median('timed_s'):.2f}",
                            f"{_floor(results, runs.runs[0]) / _floor(results, dpo.runs[0]):.2f}",
                        ]
                    )
    return tables.markdown(head, rows)


def _head_of(results: Results, name: str, vocab: int, dtype: str, malloc: str) -> dict[str, Any] | None:
    for found in results["heads"]:
        if (found["name"], found["vocab"], found["dtype"], found["malloc"]) == (name, vocab, dtype, malloc):
            return found if "failed" not in found else None
    return None


def _heads_words(results: Results) -> str:
    plan, fewest, most = results["plan"], min(_starts(results)), max(_starts(results))
    each = (
        f"in each of {fewest if fewest == most else f'{fewest} to {most}'} processes"
        if most > 1
        else "in one process"
    )
    return _wrapped(
        f"This is one forward and backward pass of the output layer for N = {plan['rows']:,} positions of width D = "
        f"{plan['width']:,}, including the gradients of the hidden states and of the layer's weight. Times are the best of "
        f"{plan['repeats']} {each}. Peak is the highest resident memory above inputs, weights and these gradients; with several "
        "processes it is their median. *Eager* converts all logits to float32 and applies a log-softmax, as TDPO's own code does "
        "for the KL. *Liger* runs its chunked DPO loss without a reference, so that it does the same work. *TRL* is the chunked "
        "computation of its trainers, and gives the log-probabilities only. *Compiled* means that `torch.compile` fuses the "
        "operations on blocks of logits (`compile: true`). The targets for bfloat16 are for this form. The time to compile is "
        "not counted."
    )


def _heads_tables(results: Results) -> list[str]:
    head = [
        "malloc",
        "head",
        "best s",
        "floor share",
        "peak GiB",
        "time over eager's",
        "eager's peak over it",
    ]
    parts = []
    for vocab in dict.fromkeys(h["vocab"] for h in results["heads"]):
        for dtype in dict.fromkeys(h["dtype"] for h in results["heads"]):
            found = [h for h in results["heads"] if (h["vocab"], h["dtype"]) == (vocab, dtype)]
            rows = [_head_row(results, h) for h in found]
            parts += [f"V = {vocab:,}, {dtype}:", tables.markdown(head, rows)]
    return parts


def _head_row(results: Results, found: dict[str, Any]) -> list[str]:
    title = [found["malloc"], HEAD_TITLES[found["name"]]]
    if "failed" in found:
        return [*title, f"not run: {found['failed']}", "-", "-", "-", "-"]
    more = "-kl" if found["name"].endswith("-kl") else ""
    # If products are slow in one dtype, the other dtype can be used.
    of_dtype = results["rates"]["heads"]
    rated = [of_dtype[d][str(found["vocab"])] for d in {found["dtype"], "float32"} & of_dtype.keys()]
    rates = {kind: max(rate[kind] for rate in rated) for kind in KINDS}
    floor = head_floor(found["rows"], found["width"], found["vocab"], rates, reference=bool(more))
    eager = _head_of(results, "eager" + more, found["vocab"], found["dtype"], found["malloc"])
    return [
        *title,
        f"{found['best_s']:.3f}",
        f"{floor / found['best_s']:.0%}",
        f"{found['above_mib'] / 1024:.3f}",
        f"{found['best_s'] / eager['best_s']:.2f}" if eager else "-",
        f"{_over(eager['above_mib'], found['above_mib']):.1f}" if eager else "-",
    ]


def _growth_words(results: Results) -> str:
    first = results["growth"][0]
    return _wrapped(
        f"This is our head for log-probabilities with D = {first['width']:,}, a vocabulary of {first['vocab']:,}, "
        f"{first['dtype']}, and a memory budget of 128 MiB, which is less than the logits of the fewest positions. The table "
        "shows the peak of one forward and backward pass above hidden states, weights and their gradients, in MiB: the median "
        f"of {results['plan']['growth_starts']} processes, and the lowest and highest in brackets. The growth in the targets "
        "compares the highest median with the lowest."
    )


def _growth_table(results: Results) -> str:
    counts = list(dict.fromkeys(g["rows"] for g in results["growth"]))
    rows = []
    for malloc in _mallocs(results, "growth"):
        found = {g["rows"]: g for g in results["growth"] if g["malloc"] == malloc}
        rows.append([malloc, *(_peak_of_starts(found[n]) if n in found else "-" for n in counts)])
    return tables.markdown(["malloc", *(f"{n:,} positions" for n in counts)], rows)


def _peak_of_starts(record: Mapping[str, Any]) -> str:
    starts = record["starts_mib"]
    return f"{record['above_mib']:.0f} ({starts[0]:.0f}, {starts[-1]:.0f})"


def _rates_table(results: Results) -> str:
    head = ["work", "dtype", "layer", *(f"{kind.replace('_', ' ')}, GFLOP/s" for kind in KINDS)]
    layer: Callable[[str], str] = lambda name: f"head, V = {int(name):,}" if name.isdigit() else name  # noqa: E731
    rows = [
        [work, dtype, layer(name), *(f"{rate[kind] / 1e9:.0f}" for kind in KINDS)]
        for work, dtypes in results["rates"].items()
        for dtype, names in dtypes.items()
        for name, rate in names.items()
    ]
    return tables.markdown(head, rows)
