"""Our steps beside TRL's, and our head beside others, on the CPU; see the package.

    python -m benchmarks.cpu                     # all of it, on an idle machine
    python -m benchmarks.cpu --write-docs        # and the page
    python -m benchmarks.cpu --quick             # ours alone, tiny, a minute
    python -m benchmarks.cpu --parts steps --lengths fixed --malloc keep
    python -m benchmarks.cpu --parts steps --rounds 1 --add   # more rounds of the same work, to what is there

TRL's environment is made on first use, below the output folder's parent. All raw numbers are in OUTPUT/results.json, what
the processes said in OUTPUT/log.txt.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.cpu import report
from benchmarks.cpu.floor import head_floor
from benchmarks.cpu.process import busy_seconds, machine, save
from benchmarks.cpu.work import ADAPTER, COMPARED_WITH, MALLOC, OFFLINE, PAIRED_MODES, SMOLLM2, Task
from tokenpref.models.cpu import uses_onednn

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results" / "cpu.md"
PARTS = ("steps", "smollm2", "heads", "growth")
LONGEST_HEAD_S = 60.0
"""Products of a head in its own dtype that take longer are not run: a CPU without bfloat16 takes minutes for eager's."""

SAME = ("threads", "fused_adamw", "rows", "width", "repeats")
"""Settings that results must share to be put together."""

OURS_ALONE = ("tdpo2-ref", "causal-lm-ref", "tdpo2-cached")
"""Modes without a peer; each runs beside the DPO that it is compared with."""

TRL = ("trl==1.16.0", "transformers==5.23.0", "accelerate", "peft")
LIGER = "liger-kernel"


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Args:
        tasks: work of the steps.
        smollm2: work of the second reading of the KL's cost.
        mallocs: settings of the allocator, of :data:`benchmarks.cpu.work.MALLOC`.
        rounds: how often every process is started.
        parts: of :data:`PARTS`.
        threads: of torch.
        fused_adamw: on both sides.
        peer: whether TRL takes part.
        rows: positions of the head alone.
        width: hidden size of the head alone.
        vocabularies: sizes of the head alone.
        dtypes: of the head alone.
        compiled: whether our heads are measured with compiled passes too.
        growth: positions between which the head's memory should not grow.
        growth_starts: processes of each of them, of which the one in the middle counts.
        repeats: forwards and backwards of a head.
        rate_seconds: spent on the rate of each matrix product.
    """

    tasks: tuple[Task, ...] = (Task(lengths="fixed"), Task(lengths="varied"))
    smollm2: Task = SMOLLM2
    mallocs: tuple[str, ...] = tuple(MALLOC)
    rounds: int = 2
    parts: tuple[str, ...] = PARTS
    threads: int = 2
    fused_adamw: bool = True
    peer: bool = True
    rows: int = 2048
    width: int = 512
    vocabularies: tuple[int, ...] = (32_000, 128_256)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    compiled: bool = True
    growth: tuple[int, ...] = (512, 2048, 8192)
    growth_starts: int = 5
    repeats: int = 4
    rate_seconds: float = 1.0


QUICK = Plan(
    tasks=(
        Task(shape="tiny", length=48, prompt=8, steps=3, warmup=1),
        Task(shape="tiny", lengths="varied", length=48, steps=3, warmup=1),
    ),
    mallocs=("keep",),
    rounds=1,
    threads=1,
    parts=("steps", "heads", "growth"),
    peer=False,
    rows=64,
    width=16,
    vocabularies=(96,),
    dtypes=("float32",),
    compiled=False,
    growth=(32, 64),
    growth_starts=1,
    repeats=2,
    rate_seconds=0.01,
)


class Processes:
    """Starts the processes that measure, one at a time.

    Args:
        output: folder of work, results and the log.
        peer: TRL's Python; None without it.
    """

    def __init__(self, output: Path, peer: Path | None) -> None:
        self.output, self.peer = output, peer

    def run(
        self,
        module: str,
        settings: Mapping[str, Any],
        malloc: str,
        *,
        folder: Path | None = None,
        peer: bool = False,
    ) -> Any:
        """What ``measure`` of a module returns in a fresh process, with the cores that others used meanwhile.

        Raises:
            SystemExit: if it fails.
        """
        result = self.output / "result.json"
        result.unlink(missing_ok=True)
        before = busy_seconds() - _own_seconds(), time.perf_counter()
        places = [*([str(folder)] if folder else []), str(result)]
        self._call(module, [*places, json.dumps(dict(settings))], malloc, peer=peer)
        found = json.loads(result.read_text(encoding="utf-8"))
        others = (busy_seconds() - _own_seconds() - before[0]) / (time.perf_counter() - before[1])
        return {"value": found, "others": max(0.0, others)}

    def prepare(self, task: Task) -> Path:
        """The folder of a task's model and pairs, written by TRL's environment where there is one."""
        folder = self.output / "work" / task.name
        if not (folder / "task.json").exists() or Task.read(folder) != task:
            settings = json.dumps(asdict(task))
            self._call("benchmarks.cpu.work", [str(folder), settings], "default", peer=self.peer is not None)
        if not (folder / ADAPTER).exists():
            self._call("benchmarks.cpu.ours", [str(folder)], "default", peer=False)
        return folder

    def _call(self, module: str, arguments: list[str], malloc: str, *, peer: bool) -> None:
        python = str(self.peer) if peer else sys.executable
        kept = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
        if peer:
            kept.pop("PYTHONPATH", None)
        with (self.output / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"\n$ {module} {' '.join(arguments)} ({malloc})\n")
            log.flush()
            done = subprocess.run(
                [python, "-m", module, *arguments],
                cwd=ROOT,
                env={**kept, **OFFLINE, **MALLOC[malloc]},
                stdout=log,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode:
            lines = (self.output / "log.txt").read_text(encoding="utf-8").splitlines()[-25:]
            raise SystemExit(
                "\n".join([*lines, f"{module} failed ({done.returncode}); see log.txt in the output folder"])
            )


def _own_seconds() -> float:
    """CPU seconds of this process and of all that it has started and that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(u.ru_utime + u.ru_stime for u in used)


def peer_environment(folder: Path) -> Path:
    """TRL's Python, in an environment that is made when it is missing or when what belongs into it has changed."""
    torch = os.environ.get("TORCH") or f"torch=={importlib.metadata.version('torch').partition('+')[0]}"
    wanted = "\n".join([torch, *TRL, LIGER])
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    print(f"making an environment for {TRL[0]}", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # torch first and alone: named without its exact version, pip may take gigabytes of CUDA.
    for packages in ([torch], [torch, *TRL]):
        subprocess.run([*pip, *packages], check=True)
    if subprocess.run([*pip, torch, LIGER], check=False).returncode:
        print(f"{LIGER} cannot be installed here; its head is left out", flush=True)
    stamp.write_text(wanted, encoding="utf-8")
    return python


def measure(
    plan: Plan, output: Path, processes: Processes, before: report.Results | None = None
) -> report.Results:
    """Run all of a plan; results are written after every process, so that nothing is lost when one fails.

    Args:
        plan: what to measure.
        output: folder of the results.
        processes: what starts processes.
        before: results of the same work on this machine, to which these are added.
    """
    results: report.Results = before or {
        "plan": asdict(plan),
        "complete": False,
        "real_sizes": plan.rows == Plan.rows,
        "machine": machine(),
        "onednn": uses_onednn(),
        "rates": {},
        "runs": [],
        "heads": [],
        "growth": [],
        "load": [],
        "seconds": 0.0,
    }
    if "growth" in plan.parts:
        results["plan"]["growth_starts"] = plan.growth_starts
    results["load"].append(os.getloadavg()[0])
    start = time.perf_counter() - results["seconds"]
    for kind, record in _records(plan, processes):
        if kind == "rates":
            _merge_rates(results["rates"], record)
        else:
            print(report.line(kind, record), flush=True)
            if kind != "runs":
                earlier = [r for r in results[kind] if _work(r) == _work(record)]
                results[kind] = [r for r in results[kind] if r not in earlier]
                if kind == "heads":  # of the growth the later reading counts
                    record = _together([*earlier, record])
            results[kind].append(record)
        results["seconds"] = time.perf_counter() - start
        save(output / "results.json", results)
    whole = json.loads(json.dumps(asdict(Plan())))  # as the file has it
    results["complete"] = (
        _read(output)["plan"] | {"rounds": whole["rounds"]} == whole
        and report.rounds(results)[0] >= Plan.rounds
    )
    results["load"].append(os.getloadavg()[0])
    save(output / "results.json", results)
    return _read(output)


def _work(record: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a head was measured on."""
    return tuple(record[key] for key in ("name", "vocab", "rows", "dtype", "malloc"))


def _read(output: Path) -> report.Results:
    """Results as they come back from their file."""
    results: report.Results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    return results


def _records(plan: Plan, processes: Processes) -> Iterator[tuple[str, dict[str, Any]]]:
    if "steps" in plan.parts:
        for task in plan.tasks:
            yield from _steps(plan, processes, task, plan.mallocs, peer=plan.peer)
    if "smollm2" in plan.parts:
        yield from _steps(plan, processes, plan.smollm2, plan.mallocs[:1], peer=False)
    if "heads" in plan.parts:
        yield from _heads(plan, processes)
    if "growth" in plan.parts:
        for malloc in plan.mallocs:
            for rows in plan.growth:
                # The largest vocabulary: of the others the fewest rows' logits would not fill the budget.
                settings: dict[str, Any] = {
                    "name": "ours-128",
                    "rows": rows,
                    "vocab": max(plan.vocabularies),
                    "dtype": "float32",
                }
                # Once: what an allocator's heap makes of the second time is not the head's.
                once = replace(plan, repeats=1)
                found = [_head(once, processes, settings, malloc) for _ in range(plan.growth_starts)]
                # What else lies in a heap is another thing every time; a mean would carry the odd one.
                found.sort(key=lambda record: record["above_mib"])
                starts = [record["above_mib"] for record in found]
                yield "growth", {**found[len(found) // 2], "starts_mib": starts}


def _steps(
    plan: Plan, processes: Processes, task: Task, mallocs: tuple[str, ...], *, peer: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each mode's peer, ours, and what is compared with ours, by turns."""
    folder = processes.prepare(task)
    tokens, answers = (sum(counts) // task.steps for counts in task.tokens(folder))
    sizes = task.sizes
    products = {
        "body": (tokens, sizes.width, sizes.mlp),
        "head": (answers, sizes.width, sizes.vocab),
    }
    yield "rates", _rates(plan, processes, task.name, products, ("float32",))
    for malloc in mallocs:
        for mode in PAIRED_MODES:
            turns = [("peer", mode)] if peer else []
            turns += [("ours", mode), *(("ours", m) for m in OURS_ALONE if COMPARED_WITH[m] == mode)]
            for number in range(plan.rounds):
                for side, which in turns:
                    found = processes.run(
                        f"benchmarks.cpu.{side}",
                        {"mode": which, "threads": plan.threads, "fused_adamw": plan.fused_adamw},
                        malloc,
                        folder=folder,
                        peer=side == "peer",
                    )
                    about = {"task": task.name, "shape": task.shape, "lengths": task.lengths, "mode": which}
                    about |= {"side": side, "malloc": malloc}
                    more = {"round": number, "others": found["others"]}
                    yield "runs", about | more | found["value"]
    yield "rates", _rates(plan, processes, task.name, products, ("float32",))


def _heads(plan: Plan, processes: Processes) -> Iterator[tuple[str, dict[str, Any]]]:
    """All heads at one size after another, by turns."""
    from benchmarks.cpu.heads import COMPILED, HEADS, NATIVE, PEERS

    products = {str(vocab): (plan.rows, plan.width, vocab) for vocab in plan.vocabularies}
    rates = _rates(plan, processes, "heads", products, plan.dtypes)
    yield "rates", rates
    for vocab in plan.vocabularies:
        for dtype in plan.dtypes:
            for malloc in plan.mallocs:
                found: dict[str, list[dict[str, Any]]] = {}
                for name in list(HEADS) * plan.rounds:
                    if (name in PEERS and not plan.peer) or (name in COMPILED and not plan.compiled):
                        continue
                    settings: dict[str, Any] = {
                        "name": name,
                        "rows": plan.rows,
                        "vocab": vocab,
                        "dtype": dtype,
                    }
                    kl = name.endswith("-kl")
                    needed = head_floor(
                        plan.rows, plan.width, vocab, rates["heads"][dtype][str(vocab)], reference=kl
                    )
                    if needed > LONGEST_HEAD_S and name in NATIVE:
                        failed = f"its products in {dtype} alone take {needed:.0f} s here"
                        more = {"malloc": malloc, "others": 0.0, "failed": failed}
                        record = {**settings, "width": plan.width} | more
                    else:
                        record = _head(plan, processes, settings, malloc, peer=name in PEERS)
                    found.setdefault(name, []).append(record)
                for records in found.values():
                    yield "heads", _together(records)


def _head(
    plan: Plan, processes: Processes, settings: dict[str, Any], malloc: str, peer: bool = False
) -> dict[str, Any]:
    settings = {**settings, "width": plan.width}
    more = {"threads": plan.threads, "repeats": plan.repeats}
    found = processes.run("benchmarks.cpu.heads", settings | more, malloc, peer=peer)
    record: dict[str, Any] = {**settings, "malloc": malloc, "others": found["others"]}
    return record | found["value"]


def _together(records: list[dict[str, Any]]) -> dict[str, Any]:
    """A head's processes as one record: its best time, and the middle of its peaks."""
    for record in records:
        if "failed" in record:
            return record
    times = [seconds for record in records for seconds in record["times_s"]]
    peaks = [peak for record in records for peak in record.get("peaks_mib", [record["above_mib"]])]
    return records[0] | {
        "times_s": times,
        "best_s": min(times),
        "peaks_mib": peaks,
        "above_mib": statistics.median(peaks),
        "others": statistics.mean(record["others"] for record in records),
    }


def _rates(
    plan: Plan,
    processes: Processes,
    name: str,
    products: Mapping[str, tuple[int, ...]],
    dtypes: tuple[str, ...],
) -> dict[str, Any]:
    settings = {"products": products, "dtypes": dtypes, "threads": plan.threads, "seconds": plan.rate_seconds}
    return {name: processes.run("benchmarks.cpu.floor", settings, "keep")["value"]}


def _merge_rates(rates: dict[str, Any], found: Mapping[str, Any]) -> None:
    """Keep the higher rate of each product: what a floor is made from is what the machine can do."""
    for name, value in found.items():
        if isinstance(value, Mapping):
            _merge_rates(rates.setdefault(name, {}), value)
        else:
            rates[name] = max(rates.get(name, 0.0), value)


def _parse(arguments: list[str] | None) -> tuple[argparse.Namespace, Plan]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ours alone at tiny sizes; no page")
    parser.add_argument("--rounds", type=int, help="starts of every process (default 2)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all")
    parser.add_argument("--lengths", nargs="+", choices=("fixed", "varied"), help="default: both")
    parser.add_argument("--malloc", nargs="+", choices=tuple(MALLOC), help="default: both")
    parser.add_argument("--dtypes", nargs="+", choices=Plan.dtypes, help="of the head alone; default: both")
    parser.add_argument(
        "--add",
        action="store_true",
        help="keep the results in the output folder and add these rounds and parts",
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--fused-adamw",
        action=argparse.BooleanOptionalAction,
        help="on both sides; default: yes, as TRL's trainers and our configs have it",
    )
    parser.add_argument("--no-peer", action="store_true", help="ours alone")
    parser.add_argument(
        "--output", type=Path, help="default outputs/bench/cpu, quick outputs/bench/cpu_quick"
    )
    parser.add_argument(
        "--report-only", action="store_true", help="measure nothing; print what the output folder holds"
    )
    parser.add_argument(
        "--write-docs",
        action="store_true",
        help=f"write docs/results/{PAGE.name}, which says if parts were left out",
    )
    options = parser.parse_args(arguments)
    plan = QUICK if options.quick else Plan()
    given = {
        "rounds": options.rounds,
        "parts": options.parts and tuple(options.parts),
        "mallocs": options.malloc and tuple(options.malloc),
        "dtypes": options.dtypes and tuple(options.dtypes),
        "threads": options.threads,
        "fused_adamw": options.fused_adamw,
        "peer": False if options.no_peer else None,
        "tasks": options.lengths and tuple(t for t in plan.tasks if t.lengths in options.lengths),
    }
    plan = replace(plan, **{name: value for name, value in given.items() if value is not None})
    if options.write_docs and options.quick:
        parser.error("--write-docs wants the real sizes: leave out --quick")
    return options, plan


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; 1 when a loss differs by more than the tolerance."""
    options, plan = _parse(arguments)
    default = Path("outputs/bench/cpu_quick" if options.quick else "outputs/bench/cpu")
    output: Path = (options.output or default).absolute()
    output.mkdir(parents=True, exist_ok=True)
    if options.report_only:
        results = _read(output)
    else:
        before = _read(output) if options.add else None
        if before is None:
            (output / "log.txt").write_text("", encoding="utf-8")
        elif before["machine"] != machine():
            raise SystemExit(f"--add: the results in {output} are another machine's; measure without it")
        elif strange := [name for name in SAME if before["plan"][name] != getattr(plan, name)]:
            raise SystemExit(
                f"--add: the results in {output} have other settings of {strange}; measure without it"
            )
        peer = peer_environment(output.parent / "trl-env") if plan.peer else None
        results = measure(plan, output, Processes(output, peer), before)
    text = report.page(results)
    print("\n" + text)
    if options.write_docs:  # the page says itself if parts were left out
        if not results["real_sizes"]:
            raise SystemExit("the results are those of tiny sizes; the page is left as it is")
        PAGE.write_text(text, encoding="utf-8")
    return int(any(d.worst > report.TOLERANCE for d in report.differences(results)))


if __name__ == "__main__":
    sys.exit(main())
