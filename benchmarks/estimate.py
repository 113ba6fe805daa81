"""The rate of weight estimation, compared with two bare forward passes over the same tokens in the same run.

    python -m benchmarks.estimate                  # SmolLM2-135M, prompt pair, the held-out pairs; a few minutes
    python -m benchmarks.estimate --rows 32 --repeats 3

Both sides see the same batches. The bare passes return logits of all positions and do nothing else; estimation scores,
subtracts, checks, and writes the store. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time

import torch
from omegaconf import OmegaConf

from benchmarks.frontier import ROOT
from tokenpref.data import padded
from tokenpref.models.scoring import logits_of
from tokenpref.training import ContrastiveReference, WeightEstimation
from tokenpref.training.estimation.estimators import ContrastiveEstimator


def config(name: str, *overrides: str) -> OmegaConf:
    base = OmegaConf.load(ROOT / "configs" / "smollm2" / f"135M_{name}.yaml")
    return OmegaConf.merge(base, OmegaConf.from_dotlist(list(overrides)))


def bare(estimation: WeightEstimation, batches: list[list[tuple[int, int]]]) -> float:
    """Seconds of one plain forward pass per model and batch."""
    source = estimation.source
    assert isinstance(source, ContrastiveEstimator)
    examples = estimation.dataset
    prepared = []
    for batch in batches:
        answers = [
            (e.rejected_ids, e.rejected_start) if side else (e.chosen_ids, e.chosen_start)
            for e, side in ((examples[i], side) for i, side in batch)
        ]
        prepared.append(padded(answers, 0)[0])
    start = time.perf_counter()
    with torch.no_grad():
        for tokens in prepared:
            for scorer in source.scorers(estimation._models):
                logits_of(scorer.model, tokens)
    return time.perf_counter() - start


def main() -> None:
    """Alternate the two and print the rates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=122)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--pair", default=None, help="a pair's folder; default: two trained sides' worth of the base model"
    )
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        pair = arguments.pair
        if pair is None:
            pair = f"{folder}/pair"
            cfg = config(
                "contrastive_reference",
                "method=prompt",
                f"output_dir={pair}",
                # One character each: the tokens of both sides stay the data's own but for one.
                "positive_prompt=a",
                "negative_prompt=b",
            )
            ContrastiveReference(cfg).run()
        rates = []
        for repeat in range(arguments.repeats):
            cfg = config(
                "estimate_weights",
                f"estimator.pair={pair}",
                "dataset.source=package://data/sentiment/eval.jsonl",
                f"dataset.max_rows={arguments.rows}",
                f"output_dir={folder}/store_{repeat}",
            )
            estimation = WeightEstimation(cfg)
            seconds: dict[str, float] = {}
            scored = estimation._score

            def timed(*args, scored=scored, seconds=seconds) -> None:
                start = time.perf_counter()
                scored(*args)
                seconds["estimation"] = time.perf_counter() - start

            estimation._score = timed
            estimation.run()
            shards = range(-(-len(estimation.dataset) // estimation.config.shard_rows))
            batches = [batch for shard in shards for batch in estimation._batches(shard)]
            seconds["bare"] = bare(estimation, batches)
            tokens = sum(estimation._tokens(answer) for batch in batches for answer in batch)
            rates.append((tokens / seconds["estimation"], tokens / seconds["bare"]))
            ours, plain = rates[-1]
            print(
                f"estimation {ours:7.0f} tokens/s   two bare forwards {plain:7.0f} tokens/s   ratio {ours / plain:.3f}"
            )
    ours, plain = (sum(r[i] for r in rates) / len(rates) for i in (0, 1))
    print(f"mean ratio {ours / plain:.3f} over {len(rates)} runs, {tokens} tokens of {arguments.rows} pairs")


if __name__ == "__main__":
    main()
