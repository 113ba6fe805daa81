"""The cost of TI-DPO: steps with attribution, stored weights and anchors, compared with our DPO step on the same pairs.

    python -m benchmarks.ti_dpo                    # SmolLM2-135M, a few minutes on two idle cores
    python -m benchmarks.ti_dpo --rounds 5 --write-docs

Every round takes one step of each kind in turn, with the library's own step, on pairs of 16 prompt and 64 answer tokens.
Anchors also have 64 tokens. The table shows medians, as ratios to the DPO step. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import tables
from tokenpref.data import Answer, PairBatch, PairExample, collate_anchors, collate_pairs
from tokenpref.distributed import single_process_world
from tokenpref.losses import DPOLoss, TripletTIDPOLoss
from tokenpref.models.generation import sample
from tokenpref.models.reference import FrozenReference
from tokenpref.models.scoring import ScoringModel
from tokenpref.training import AnchorSampler, Attribution
from tokenpref.training.credit.live import LiveModels
from tokenpref.training.credit.weighing import in_columns
from tokenpref.training.step.train_step import no_anchors, train_step
from tokenpref.weights import AnswerLogp, MaxLogit

DOC = Path(__file__).parents[1] / "docs" / "results" / "ti_dpo_cost.md"
WORLD = single_process_world()
PROMPT, ANSWER, EOS = 16, 64, 2


def smollm2() -> ScoringModel:
    """The real model's shape with random weights, which do not affect the time."""
    from tokenpref.models import smollm2_135m

    torch.manual_seed(0)
    model = smollm2_135m()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0, 0.02)
    return ScoringModel(model)


def pairs(count: int, step: int, vocabulary: int) -> tuple[PairBatch, list[Answer]]:
    """Pairs and anchors of random tokens."""
    generator = torch.Generator().manual_seed(step)

    def draw(n: int) -> list[int]:
        return torch.randint(3, vocabulary, (n,), generator=generator).tolist()

    examples, anchors = [], []
    for row in range(count):
        prompt = draw(PROMPT)
        examples.append(
            PairExample(
                row, prompt + draw(ANSWER), PROMPT, prompt + draw(ANSWER), PROMPT, [], [], False, False, ""
            )
        )
        anchors.append((prompt + draw(ANSWER), PROMPT))
    return collate_pairs(examples, pad_id=0), anchors


class Steps:
    """One step of each kind on a model that keeps training."""

    def __init__(self, count: int) -> None:
        self.policy = smollm2()
        reference = smollm2()
        reference.model.requires_grad_(False)
        self.reference = FrozenReference(reference)
        self.optimizer = torch.optim.AdamW(self.policy.model.parameters(), lr=1e-6)
        self.count, self.done = count, 0

    def live(self) -> LiveModels:
        """The models as they are."""
        return LiveModels(self.policy, self.reference, WORLD, pad_id=0, eos_id=EOS, step=self.done)

    def take(self, loss: torch.nn.Module, attribution: Attribution | None = None) -> float:
        """Seconds of a step; weights are ready unless ``attribution`` makes them."""
        batch, answers = pairs(self.count, self.done, self.policy.model.tok_embeddings.num_embeddings)
        ready = [torch.ones(ANSWER)] * (2 * self.count)

        def weigh(batch: PairBatch):
            if "weights" not in loss.needs:
                return None
            made = ready if attribution is None else attribution.score(batch, self.live())
            return in_columns([(w, torch.zeros(len(w), dtype=torch.bool)) for w in made], batch)

        start = time.perf_counter()
        train_step(
            self.policy,
            self.reference,
            loss,
            self.optimizer,
            [batch],
            WORLD,
            step=self.done + 1,
            needs=loss.needs,
            weigh=weigh,
            anchor=(lambda batch: collate_anchors(answers, batch, 0))
            if "anchor" in loss.needs
            else no_anchors,
            clip_grad_norm=10.0,
        )
        self.done += 1
        return time.perf_counter() - start


def kinds(steps: Steps) -> dict[str, Callable[[], float]]:
    """What is timed, by its title; the first is what the others are compared with."""
    plain, code = TripletTIDPOLoss(gamma=0), TripletTIDPOLoss(gamma=0, alpha=0.5)
    still = TripletTIDPOLoss(anchor_grad=False)
    return {
        "DPO": lambda: steps.take(DPOLoss()),
        "stored weights": lambda: steps.take(plain),
        "attribution every step, target AnswerLogp": lambda: steps.take(plain, Attribution(AnswerLogp())),
        "attribution every step, target MaxLogit": lambda: steps.take(plain, Attribution(MaxLogit())),
        "stored weights, anchors from data": lambda: steps.take(TripletTIDPOLoss()),
        "stored weights, anchors from data, no gradient through them": lambda: steps.take(still),
        "stored weights, TDPO2's KL (alpha 0.5)": lambda: steps.take(code),
    }


LIMITS = {
    "stored weights": 1.05,
    "attribution every step, target AnswerLogp": 1.8,
    "attribution every step, target MaxLogit": 1.8,
    "stored weights, anchors from data": 1.65,
    "stored weights, anchors from data, no gradient through them": 1.3,
}


def sampling(steps: Steps, count: int) -> tuple[float, float]:
    """Tokens per second of sampling ``count`` anchors in a batch, and the bound from reading all weights once per step."""
    vocabulary = steps.policy.model.tok_embeddings.num_embeddings
    prompts = [ids[:PROMPT] for ids, _ in pairs(count, 0, vocabulary)[1]]
    settings = AnchorSampler()._sampling
    start = time.perf_counter()
    drawn = sample(
        steps.policy.model, prompts, seeds=list(range(count)), max_new_tokens=ANSWER, eos_id=-1, pad_id=0, world=WORLD, **settings
    )  # fmt: skip
    seconds = time.perf_counter() - start
    tokens = sum(len(row) for row in drawn)
    size = sum(p.numel() * p.element_size() for p in steps.policy.model.parameters())
    return tokens / seconds, count * reading_rate() / size


def reading_rate() -> float:
    """Bytes per second that are read to sum a large array."""
    array = torch.ones(128 * 2**20)
    array.sum()
    start = time.perf_counter()
    for _ in range(5):
        array.sum()
    return 5 * array.numel() * array.element_size() / (time.perf_counter() - start)


def main() -> None:
    """Time all variants in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--write-docs", action="store_true")
    arguments = parser.parse_args()
    steps = Steps(arguments.pairs)
    found: dict[str, list[float]] = {}
    for round_ in range(arguments.rounds + 1):  # the first warms up
        for title, take in kinds(steps).items():
            seconds = take()
            if round_:
                found.setdefault(title, []).append(seconds)
                print(f"{title}: {seconds:.2f} s", flush=True)
    base = statistics.median(found["DPO"])
    rows = []
    for title, times in found.items():
        ratios = [time / dpo for time, dpo in zip(times, found["DPO"], strict=True)]
        limit = f"{LIMITS[title]:g}" if title in LIMITS else "-"
        median = statistics.median(times)
        rows.append(
            [title, f"{median:.2f}", f"{median / base:.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}", limit]
        )
    text = tables.markdown(["step", "seconds", "ratio to DPO", "in single rounds", "at most"], rows)
    lines = []
    for count in (arguments.pairs, 4 * arguments.pairs):
        ours, bound = sampling(steps, count)
        lines.append(
            f"Sampling {count} anchors of {ANSWER} tokens in one batch: {ours:.0f} tokens/s. The bound from reading all weights "
            f"once per step of the batch is {bound:.0f} tokens/s."
        )
    text += "\n\n" + "\n".join(lines)
    print(text)
    if arguments.write_docs:
        head = (
            "# What TI-DPO costs\n\n`python -m benchmarks.ti_dpo --write-docs` measured this page: a model with the shape of "
            f"SmolLM2-135M, float32, {arguments.pairs} pairs per step of\n{PROMPT} prompt and {ANSWER} answer tokens, AdamW. "
            f"The variants took turns, for {arguments.rounds} rounds. Python {platform.python_version()}, "
            f"torch {torch.__version__}, two cores.\n\n"
        )
        DOC.write_text(head + text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
