"""Kill runs in every way that happens on a cluster, resume them, and compare the result with an undisturbed run.

    make chaos                                     # 30 kills, some minutes
    python scripts/chaos.py --kills 6 --jobs tdpo --seed 3

The jobs are tiny: TDPO (also with background saves, with a cached reference and with LoRA), TIS-DPO, TI-DPO, a contrastive pair
and weight estimation, in one process and in two. Results that are kept by row are also compared between two processes and one.
Each start gets a random kind of kill: SIGKILL of all processes or of one rank at a random time (also during a write), SIGTERM,
or a limit on the size of files that makes a save fail like a full disk. After the kills the job runs to its end. Its weights or
scores must equal those of the undisturbed run, bit for bit.

In the damage jobs (`harmed_*`), a bit of a file that a killed job left is flipped, or the file is truncated or removed, before
the job resumes. The job must end with the same bits as the undisturbed one, or be refused with exit code 2 and the name of the
damaged file. That is then removed, as the error says, and the job resumes.

Two jobs begin with a finished run. If its command is repeated, it must be refused without changing a byte. Then the run resumes
for more epochs, either with its own settings (``more``) or with another rate and other betas (``rate``). The undisturbed run of
``rate`` has an optimizer that changes both itself.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from tokenpref.data import WeightStore

TUNE = Path(sys.executable).parent / "tune"
SAVING = ("checkpoint_every_n_steps=2", "resume_from_checkpoint=auto", "keep_last=2")
QUIET = ("run_val_every_n_steps=null", "epochs=4")
KEPT = ("token_weights.refresh=every_n_steps", "token_weights.every_n_steps=5", "anchors.refresh=once")
IN_BACKGROUND = "enable_async_checkpointing=true"
PAIR, STORE = "pair", "store"
HALF = 16  # steps of the first two of four epochs
BY_HAND = """
import torch

class TwoPhases(torch.optim.AdamW):
    def __init__(self, params, steps, later, later_betas, **settings):
        super().__init__(params, **settings)
        self.steps, self.later = steps, {"lr": later, "betas": tuple(later_betas)}

    def step(self, closure=None):
        super().step(closure)
        self.steps -= all(group["lr"] > 0 for group in self.param_groups)  # PyTorch makes steps of rate 0 to see the state
        if self.steps == 0:
            for group in self.param_groups:
                group.update(self.later)
"""
KILLS = ("all", "one", "term", "full")


@dataclass(frozen=True)
class Job:
    """A command that can be resumed, and how its results are compared.

    Args:
        words: recipe, config and settings.
        result: reads its result from its folder, as comparable bytes.
        saves: whether it accepts the settings of checkpoints.
        first: settings of an earlier run in the same folder, which runs to its end first.
        whole: settings of the undisturbed run, if they differ.
        resumes: whether resuming needs a setting.
        ranks: the numbers of processes to test.
        as_one: whether two processes must end with the weights of one, up to rounding.
        harmed: patterns of files that are damaged between two starts.
    """

    words: tuple[str, ...]
    result: Callable[[Path], dict[str, bytes]]
    saves: bool = True
    first: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    resumes: bool = True
    ranks: tuple[int, ...] = (1, 2)
    as_one: bool = False
    harmed: tuple[str, ...] = ()


def trained(folder: Path) -> dict[str, bytes]:
    """The weights of every folder of weights below ``folder``."""
    files = sorted(folder.rglob("epoch_*/*.safetensors"))
    return {
        f"{file.relative_to(folder)}:{name}": tensor.contiguous().numpy().tobytes()
        for file in files
        for name, tensor in load_file(file).items()
    }


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below ``folder``."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def scored(folder: Path) -> dict[str, bytes]:
    """The scores of a store."""
    return {
        f"{row.row}:{side}": getattr(row, side).tobytes()
        for row in WeightStore.open(folder / "weights")
        for side in ("chosen", "rejected")
    }


PAIR_WORDS = (
    "recipes/contrastive_reference_distributed",
    "--config",
    "tiny/contrastive_reference",
    "epochs=2",
)
ESTIMATE_WORDS = (
    *("recipes/estimate_weights_distributed", "--config", "tiny/estimate_weights", f"estimator.pair={PAIR}"),
    *("shard_rows=2", "batch_tokens=64"),
)
TDPO_WORDS = ("recipes/tdpo_distributed", "--config", "tiny/tdpo", *QUIET)
KEPT_WORDS = (
    *("recipes/ti_dpo_distributed", "--config", "tiny/ti_dpo", "run_val_every_n_steps=null", "epochs=2"),
    # A larger eps, because Adam would turn the rounding error of a gradient near 0 into a full step.
    *("dataset.max_rows=32", "optimizer.eps=1e-4", *KEPT),
)
EXPORTS = "epoch_*/*"
TINY = Path(__file__).parents[1] / "data" / "tiny" / "model"
FAMILIES = ("qwen3", "gemma3_text")


def causal_lm_words(family: str) -> tuple[str, ...]:
    """Training of a model of transformers from the folder that :func:`make_model` makes."""
    return (
        *("recipes/tdpo_distributed", "--config", "tiny/tdpo", *QUIET),
        *("model=tokenpref.models.causal_lm", f"model.path={family}"),
        *("checkpointer=tokenpref.models.CausalLMCheckpointer", f"checkpointer.checkpoint_dir={family}"),
        *("~checkpointer.model_type", "~checkpointer.checkpoint_files"),
    )


def make_model(family: str, folder: Path) -> None:
    """Write a tiny random model of a family of transformers, with windows shorter than some sequences."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=384,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        **({"sliding_window": 5, "query_pre_attn_scalar": 8} if family == "gemma3_text" else {}),
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in TINY.glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)


JOBS = {
    "tdpo": Job(TDPO_WORDS, trained),
    "async": Job((*TDPO_WORDS, IN_BACKGROUND), trained),
    "cached": Job((*TDPO_WORDS, "reference=cached"), trained),
    "causal_lm": Job(causal_lm_words("qwen3"), trained),
    "causal_lm_lora": Job((*causal_lm_words("gemma3_text"), "model.lora={rank: 4}"), trained),
    "lora": Job(("recipes/tdpo_distributed", "--config", "tiny/tdpo_lora", *QUIET), trained),
    "more": Job(TDPO_WORDS, trained, first=("epochs=2",)),
    "rate": Job(
        (
            "recipes/tdpo_distributed",
            "--config",
            "tiny/tdpo",
            *QUIET,
            "optimizer.lr=1e-5",
            "optimizer.betas=[0.5,0.7]",
        ),
        trained,
        first=("epochs=2", "optimizer.lr=1e-3", "optimizer.betas=[0.9,0.999]"),
        whole=(
            "optimizer=by_hand.TwoPhases",
            "optimizer.lr=1e-3",
            "optimizer.betas=[0.9,0.999]",
            f"optimizer.steps={HALF}",
            "optimizer.later=1e-5",
            "optimizer.later_betas=[0.5,0.7]",
        ),
    ),
    "tis": Job(
        (
            "recipes/tis_dpo_distributed",
            "--config",
            "tiny/tis_dpo",
            *QUIET,
            f"token_weights.path={STORE}/weights",
        ),
        trained,
    ),
    "ti": Job(("recipes/ti_dpo_distributed", "--config", "tiny/ti_dpo", *QUIET, *KEPT), trained),
    "kept": Job(KEPT_WORDS, trained, ranks=(2,), as_one=True),
    "pair": Job(PAIR_WORDS, trained, resumes=False),
    "weights": Job(ESTIMATE_WORDS, scored, saves=False),
    "harmed_run": Job((*TDPO_WORDS, "dataset.max_rows=16"), trained, harmed=(EXPORTS,)),
    "harmed_pair": Job(PAIR_WORDS, trained, resumes=False, harmed=(f"*/{EXPORTS}",)),
    "harmed_store": Job(ESTIMATE_WORDS, scored, saves=False, harmed=("weights/*",)),
}


class Chaos:
    """Runs jobs in a folder and disturbs them.

    Args:
        folder: working folder.
        seed: seed of the kills.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.kills: Counter[str] = Counter()
        self.log = folder / "log.txt"
        self.harms: Counter[str] = Counter()

    def words(self, job: Job, ranks: int, output: str) -> list[str]:
        """The command of a job."""
        launch = ["--nproc_per_node", str(ranks)] if ranks > 1 else []
        batch = ["batch_size=4"] if ranks > 1 and job.saves else []
        saving = [w for w in SAVING if job.saves and (job.resumes or not w.startswith("resume"))]
        return [str(TUNE), "run", *launch, *job.words, *saving, *batch, f"output_dir={output}"]

    def start(self, words: list[str], limit: int | None = None) -> subprocess.Popen[bytes]:
        """Start a command in a new session, optionally with a limit on the size of its files."""
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

        def before() -> None:
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))

        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        with self.log.open("ab") as log:
            return subprocess.Popen(
                words,
                cwd=self.folder,
                env=env,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=before,  # one thread here
            )

    def finish(self, words: list[str]) -> None:
        """Run a command to its end."""
        process = self.start(words)
        if process.wait(600) != 0:
            raise SystemExit(f"{' '.join(words)} failed:\n{self.log.read_text()[-4000:]}")

    def repeat(self, words: list[str], output: str) -> None:
        """Repeat the command of a finished run: it must fail without changing a byte."""
        before = content(self.folder / output)
        if self.start([*words, "resume_from_checkpoint=false"]).wait(600) == 0:
            raise SystemExit(f"{' '.join(words)}: a finished run was begun again in its folder")
        if content(self.folder / output) != before:
            raise SystemExit(f"{' '.join(words)}: the second start changed the finished run in {output}")

    def disturb(self, words: list[str], output: str, seconds: float) -> bool:
        """One start that is killed; True if the job ended before the kill."""
        kind = self.random.choice(KILLS)
        process = self.start(words, limit=self.random.choice([2_000, 60_000]) if kind == "full" else None)
        self._wait_for_a_sign_of_life(process, output)
        if kind != "full":
            time.sleep(self.random.uniform(0, seconds))
        family = self._family(process.pid)
        if kind == "all":
            self._kill(family)
        elif kind == "one":
            self._kill([self.random.choice(family[1:] or family)])
        elif kind == "term" and process.poll() is None:
            process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        try:
            code = process.wait(120)
        except subprocess.TimeoutExpired:
            self._kill(self._family(process.pid))
            raise SystemExit(
                f"{kind}: still running after 120 s; a rank that died left others waiting"
            ) from None
        self.kills[kind] += code != 0
        print(f"  {kind}: exit {code} after {time.monotonic() - began:.1f} s", flush=True)
        return code == 0

    def _wait_for_a_sign_of_life(self, process: subprocess.Popen[bytes], output: str) -> None:
        deadline = time.monotonic() + 120
        before = {p: p.stat().st_mtime_ns for p in (self.folder / output).rglob("*") if p.is_file()}
        while process.poll() is None and time.monotonic() < deadline:
            now = {
                p: p.stat().st_mtime_ns
                for p in (self.folder / output).rglob("*")
                if p.exists() and p.is_file()
            }
            if now != before:
                return
            time.sleep(0.02)

    @staticmethod
    def _family(pid: int) -> list[int]:
        """A process and its descendants, itself first. torchrun's workers have separate sessions."""
        parents: dict[int, int] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has just ended
        family = [pid]
        for member in family:
            family += [child for child, parent in parents.items() if parent == member]
        return family

    @staticmethod
    def _kill(pids: Sequence[int]) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def harm(self, job: Job, output: Path) -> Path | None:
        """Flip a bit of an existing file, truncate it, or remove it; None if there is no file yet."""
        files = sorted(f for pattern in job.harmed for f in output.glob(pattern) if f.is_file())
        if not files:
            return None
        file = self.random.choice(files)
        kind = self.random.choice(("flip", "flip", "cut", "remove"))
        data = bytearray(file.read_bytes())
        place = self.random.randrange(max(len(data), 1))
        if kind == "remove":
            file.unlink()
        elif kind == "cut" or not data:
            file.write_bytes(data[:place])
        else:
            data[place] ^= 1 << self.random.randrange(8)
            file.write_bytes(data)
        self.harms[kind] += 1
        print(f"  {kind}: {file.relative_to(self.folder)}, byte {place} of {len(data)}", flush=True)
        return file

    def go_on_over(self, words: list[str], harmed: Path) -> Path | None:
        """Resume a job with a damaged file. Returns the folder that the job refused, which is then removed as its error says."""
        said = self.log.stat().st_size
        code = self.start(words).wait(600)
        errors = [
            line for line in self.log.read_bytes()[said:].decode().splitlines() if line.startswith("error: ")
        ]
        if code == 0:
            print("    went on to its end", flush=True)
            return None
        if (
            code not in (1, 2) or not errors or str(harmed.parent) not in errors[0]
        ):  # torchrun itself exits with 1
            raise SystemExit(f"{harmed} was damaged, exit {code}, and the error does not name it: {errors}")
        print(f"    refused: {errors[0][:150]}", flush=True)
        shutil.rmtree(harmed.parent)
        self.finish(words)
        return harmed.parent

    def damage(self, name: str, ranks: int, times: int) -> None:
        """Kill a job once, damage a file, resume it, and compare the result with an undisturbed job."""
        job, whole = JOBS[name], f"whole_{name}_{ranks}"
        self.finish(self.words(job, ranks, whole))
        print(f"{name}, {ranks} process(es)", flush=True)
        expected = job.result(self.folder / whole)
        for number in range(times):
            output = f"harmed_{name}_{ranks}_{number}"
            words = self.words(job, ranks, output)
            self.disturb(words, output, 3)
            harmed = self.harm(job, self.folder / output)
            removed = None
            if harmed is None:
                self.finish(words)
            else:
                removed = self.go_on_over(words, harmed)
            found = job.result(self.folder / output)
            # The last weights always exist; those of an earlier epoch that had to be removed are not written again.
            gone = removed if removed is not None and not removed.is_dir() else None
            kept = {
                key: value
                for key, value in expected.items()
                if gone is None or not (self.folder / output / key).is_relative_to(gone)
            }
            last = {key for key in expected if f"epoch_{max(map(_epoch, expected), default=0)}/" in key}
            if not found or found != kept or not last <= found.keys():
                raise SystemExit(f"{output}: results differ from the undisturbed ones")
            print(f"    {len(found)} results are the same bits", flush=True)

    def compare_with_one(self, name: str, two: Path) -> None:
        """Compare the weights of two processes with those of one."""
        one = self.folder / f"whole_{name}_1"
        self.finish(self.words(JOBS[name], 1, one.name))
        files = sorted(one.rglob("epoch_*/*.safetensors"))
        if not files:
            raise SystemExit(f"{name}: one process wrote no weights to compare with")
        for file in files:
            other = load_file(two / file.relative_to(one))
            for key, tensor in load_file(file).items():
                if not torch.allclose(tensor, other[key], rtol=0, atol=1e-5):
                    raise SystemExit(
                        f"{name}: {key} of {file.parent.name} differs between one process and two"
                    )
        print("  one process ends with the same weights, up to 1e-5", flush=True)

    def trial(self, name: str, ranks: int, kills: int) -> None:
        """Run a job undisturbed and then with kills, and compare the results."""
        job = JOBS[name]
        whole, killed = f"whole_{name}_{ranks}", f"killed_{name}_{ranks}"
        began = time.monotonic()
        self.finish([*self.words(job, ranks, whole), *job.whole])
        print(f"{name}, {ranks} process(es): undisturbed {time.monotonic() - began:.0f} s", flush=True)
        words = self.words(job, ranks, killed)
        if job.first:
            self.finish([*words, *job.first])
            self.repeat([*words, *job.first], killed)
            print("  the finished run was not begun again, and no byte of it changed", flush=True)
        for _ in range(kills):
            if self.disturb(words, killed, 1.5):
                break
        self.finish(words)
        one, other = job.result(self.folder / whole), job.result(self.folder / killed)
        if not one or one != other:
            differing = sorted(k for k in one.keys() | other.keys() if one.get(k) != other.get(k))
            raise SystemExit(
                f"{name}, {ranks} process(es): {len(differing)} results differ, first {differing[:3]}"
            )
        if job.as_one:
            self.compare_with_one(name, self.folder / whole)
        partial = [p for p in (self.folder / killed).rglob("*.partial") if p.is_dir()]
        print(
            f"  {len(one)} results are the same bits; {len(partial)} unfinished folders left, none was read",
            flush=True,
        )


def _epoch(key: str) -> int:
    """The epoch in a result's name; 0 if it names none."""
    found = re.search(r"epoch_(\d+)/", key)
    return int(found[1]) if found else 0


def main() -> None:
    """Run all jobs with their share of the kills."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--jobs", nargs="*", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    trials = [(job, n) for job in arguments.jobs for n in arguments.ranks if n in JOBS[job].ranks]
    with tempfile.TemporaryDirectory() as place:
        chaos = Chaos(Path(place), arguments.seed)
        (Path(place) / "by_hand.py").write_text(BY_HAND, encoding="utf-8")
        for family in FAMILIES:
            make_model(family, Path(place) / family)
        chaos.finish(chaos.words(JOBS["pair"], 1, PAIR))
        chaos.finish(chaos.words(JOBS["weights"], 1, STORE))
        for number, (job, ranks) in enumerate(trials):
            share = arguments.kills // len(trials) + (number < arguments.kills % len(trials))
            (chaos.damage if JOBS[job].harmed else chaos.trial)(job, ranks, share)
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(chaos.kills.items()))
    harms = ", ".join(f"{count} {kind}" for kind, count in sorted(chaos.harms.items()))
    print(
        f"{sum(chaos.kills.values())} kills that hit ({counts}) and {sum(chaos.harms.values())} damaged files ({harms}); all "
        "jobs ended with the bits of undisturbed ones, or named the damage first"
    )


if __name__ == "__main__":
    main()
