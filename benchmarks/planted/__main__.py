"""Recovery of a planted reward, and the reward-KL frontier; see the package.

python -m benchmarks.planted [--quick] [--seeds N] [--output FOLDER] [--write-docs]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.planted.constructions import CONSTRUCTIONS, TRAINED, load, log_ratios, recovery, score_all
from benchmarks.planted.frontier import ARMS, Evaluation, run_arm, sign_check
from benchmarks.planted.report import Results, page, signs
from benchmarks.planted.task import Language, Pairs, Settings, make_pairs, pretrain

PAGE = Path(__file__).parents[2] / "docs" / "results" / "planted.md"
FIRST_SEED = 1  # learning rates were set on seed 0

QUICK = replace(
    Settings(),
    vocab=40,
    planted=6,
    distractors=4,
    temperature=0.5,
    width=32,
    pretrain_steps=100,
    pretrain_lr=1e-2,
    heldout=128,
    pair_counts=(64, 512),
    min_steps=16,
    epochs=3,
    sft_lr=3e-3,
    dpo_lr=2e-3,
    frontier_pairs=512,
    frontier_lr=1e-3,
    checkpoints=(8, 24),
    samples=256,
    levels=(0.5, 1.0),
)


class Cells:
    """Finished results, one small JSON file each, with the CPU time that they took.

    Args:
        folder: where they lie.
        settings: what they belong to; other settings in the same folder are refused.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        path, mine = folder / "settings.json", json.dumps(asdict(settings), indent=1)
        if path.exists() and path.read_text(encoding="utf-8") != mine:
            raise SystemExit(
                f"{folder} holds results of other settings; remove it or set --output to another folder"
            )
        path.write_text(mine, encoding="utf-8")
        self.cpu_seconds = 0.0

    def get(self, name: str, compute: Callable[[], Any]) -> Any:
        """The cell's value, computed unless it is there."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            start = time.process_time()
            value = compute()
            cell = {"value": value, "cpu_seconds": round(time.process_time() - start, 2)}
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(cell), encoding="utf-8")
            partial.replace(path)
            print(f"{name}: {cell['cpu_seconds']} s", flush=True)
        cell = json.loads(path.read_text(encoding="utf-8"))
        self.cpu_seconds += cell["cpu_seconds"]
        return cell["value"]


class Seed:
    """One language with its model and pairs, made only when a cell asks for them."""

    def __init__(self, settings: Settings, seed: int, folder: Path) -> None:
        self.settings, self.seed, self.folder = settings, seed, folder
        self.language = Language(settings, seed)

    def _kept(self, name: str, compute: Callable[[], Any]) -> Any:
        path = self.folder / f"{name}_{self.seed}.pt"
        if not path.exists():
            partial = path.with_suffix(".partial")
            torch.save(compute(), partial)
            partial.replace(path)
        return torch.load(path, weights_only=True)

    @cached_property
    def base(self) -> dict[str, torch.Tensor]:
        """Weights of the base model."""
        return self._kept("base", lambda: pretrain(self.language).state_dict())

    @cached_property
    def pairs(self) -> Pairs:
        """Training pairs; smaller numbers of pairs are its beginning."""
        count = max(*self.settings.pair_counts, self.settings.frontier_pairs)
        return make_pairs(self.language, load(self.settings, self.base).model, count, stream=0)

    @cached_property
    def heldout(self) -> Pairs:
        """Held-out pairs."""
        return make_pairs(
            self.language, load(self.settings, self.base).model, self.settings.heldout, stream=1
        )

    @cached_property
    def frontier_pairs(self) -> Pairs:
        """What the frontier's arms train on."""
        return self.pairs.first(self.settings.frontier_pairs)

    @cached_property
    def dpo_scores(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Log ratios of the DPO pair on the frontier's pairs, which it was trained on."""

        def compute() -> list[tuple[torch.Tensor, torch.Tensor]]:
            ratios = log_ratios("dpo", self.settings, self.base, self.frontier_pairs, self.seed)
            return score_all(ratios, self.frontier_pairs)

        return [tuple(pair) for pair in self._kept("scores", compute)]

    @cached_property
    def evaluation(self) -> Evaluation:
        """How a policy is measured."""
        return Evaluation(self.language, load(self.settings, self.base, frozen=True), self.heldout)

    def facts(self) -> dict[str, float]:
        """Of the pairs: how many labels are right, how many tokens are worth something."""
        truth = np.concatenate([side for pair in self.pairs.rewards for side in pair])
        return {"accuracy": self.pairs.accuracy(), "planted": float((truth != 0).mean())}

    def recovery(self, construction: str, count: int) -> dict[str, Any]:
        """One row of the recovery table."""
        ratios = log_ratios(construction, self.settings, self.base, self.pairs.first(count), self.seed)
        return recovery(score_all(ratios, self.heldout), self.heldout)

    def frontier(self, arm: str, start: dict[str, float] | None) -> list[dict[str, float]]:
        """The points of one arm; ``start`` is the base model's, if it has been measured."""
        return run_arm(
            ARMS[arm],
            self.settings,
            self.base,
            self.frontier_pairs,
            self.dpo_scores,
            self.evaluation,
            self.seed,
            start=start,
        )


def run(settings: Settings, seeds: tuple[int, ...], folder: Path) -> Results:
    cells = Cells(folder, settings)
    facts, table, weights, frontier = {}, {}, {}, {}
    for number in seeds:
        seed = Seed(settings, number, folder)
        facts[number] = cells.get(f"facts_{number}", seed.facts)
        for name in CONSTRUCTIONS:
            for count in settings.pair_counts if name in TRAINED else (0,):
                table[number, name, count] = cells.get(
                    f"recovery_{number}_{name}_{count}", lambda s=seed, n=name, c=count: s.recovery(n, c)
                )
        weights[number] = cells.get(
            f"weights_{number}", lambda s=seed: sign_check(s.dpo_scores, s.frontier_pairs)
        )
        start = None
        for arm in ARMS:
            points = cells.get(f"frontier_{number}_{arm}", lambda s=seed, a=arm, p=start: s.frontier(a, p))
            frontier[number, arm], start = points, points[0]
    return Results(settings, seeds, facts, table, weights, frontier, cells.cpu_seconds)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planted", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a very small task, for seconds; no page")
    parser.add_argument("--seeds", type=int, help="number of languages (default 2; quick 1)")
    parser.add_argument(
        "--output", type=Path, help="finished cells (default outputs/planted, quick outputs/planted_quick)"
    )
    parser.add_argument("--write-docs", action="store_true", help=f"write {PAGE.name} into docs/results")
    options = parser.parse_args(arguments)
    if options.quick and options.write_docs:
        parser.error("--quick is too small for the page; leave one of the two out")
    count = options.seeds or (1 if options.quick else 2)
    output = options.output or Path("outputs/planted_quick" if options.quick else "outputs/planted")
    torch.set_num_threads(1)
    settings = QUICK if options.quick else Settings()
    results = run(settings, tuple(range(FIRST_SEED, FIRST_SEED + count)), output)
    text = page(results)
    print(text)
    if options.write_docs:
        PAGE.write_text(text, encoding="utf-8")
    return 0 if all(sign.holds for sign in signs(results)) else 1


if __name__ == "__main__":
    sys.exit(main())
