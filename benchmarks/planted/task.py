"""What is planted: a Markov source, a hidden reward of its tokens, a small model of it, and noisy preference pairs.

- *Source*: a random bigram language over ``vocab`` content tokens. Every sequence starts with BOS.
- *Hidden reward* r(previous token, token): a few planted tokens are worth plus or minus ``magnitudes``, a third of
  them only after one half of the vocabulary; all other tokens are worth 0. An answer is worth the sum over its tokens.
- *Base model*: a two-layer Llama trained on the source. Half of its training sequences carry a control token, <good> or
  <bad>, behind BOS, and are drawn from a source tilted by exp(+style) or exp(-style). The style agrees with the reward on
  some of the planted tokens and holds distractors, tokens that it likes or dislikes and that are worth nothing: what
  a prompt can tell about a reward is fixed, and partly wrong.
- *Pairs*: two answers of the base model to a prompt without control token; the preferred one is drawn by
  Bradley-Terry from the two sums, so some labels are wrong. Answers are cut to random lengths, and there is no EOS.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tokenpref._torchtune import TransformerDecoder, llama3_2
from tokenpref.data import IGNORE_INDEX, PairBatch, PairExample, collate_pairs, epoch_order
from tokenpref.distributed import World, single_process_world
from tokenpref.models.generation import sample
from tokenpref.models.scoring import ScoringModel

__all__ = [
    "BAD",
    "GOOD",
    "Language",
    "Pairs",
    "Settings",
    "answer_rewards",
    "make_pairs",
    "new_model",
    "pretrain",
]

PAD = BOS = 0
GOOD, BAD = 1, 2
FIRST_CONTENT = 3
NO_EOS = -1  # no token has this id: sampled answers run to their full length
WORLD: World = single_process_world()


@dataclass(frozen=True)
class Settings:
    """Sizes of the task; the defaults are the published ones."""

    vocab: int = 93
    planted: int = 12
    magnitudes: tuple[float, ...] = (0.5, 1.0, 1.5)
    style_known: float = 0.5
    distractors: int = 8
    temperature: float = 2.0
    width: int = 64
    layers: int = 2
    prompt_tokens: tuple[int, int] = (4, 8)
    answer_tokens: tuple[int, int] = (16, 24)
    sampled_tokens: int = 20
    pretrain_steps: int = 500
    pretrain_batch: int = 64
    pretrain_lr: float = 3e-3
    batch: int = 32
    heldout: int = 512
    pair_counts: tuple[int, ...] = (64, 256, 1024, 4096)
    epochs: int = 2
    min_steps: int = 60
    beta: float = 0.1
    sft_lr: float = 1e-3
    dpo_lr: float = 3e-4
    frontier_pairs: int = 2048
    frontier_lr: float = 1e-4
    checkpoints: tuple[int, ...] = (16, 32, 64, 128, 192, 256)
    samples: int = 1024
    levels: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


class Language:
    """Source, hidden reward and style of one seed.

    Args:
        settings: sizes.
        seed: another seed, another language with other planted tokens.
    """

    def __init__(self, settings: Settings, seed: int) -> None:
        self.settings, self.seed = settings, seed
        rng = np.random.default_rng([seed, 0])
        size = settings.vocab
        logits = rng.normal(size=(size, 8)) @ rng.normal(size=(8, size)) / np.sqrt(8) * 1.5
        self._source = _softmax(logits)
        # Planted tokens are of middling frequency, so that each of them occurs.
        frequency = np.full(size, 1 / size)
        for _ in range(100):
            frequency = frequency @ self._source
        middling = np.argsort(np.abs(np.log(frequency * size)))[: settings.planted * 2 + settings.distractors]
        chosen = rng.permutation(middling)[: settings.planted + settings.distractors]
        tokens, distractors = chosen[: settings.planted], chosen[settings.planted :]
        signs = np.where(np.arange(len(tokens)) % 2 == 0, 1.0, -1.0)
        values = signs * np.resize(np.repeat(settings.magnitudes, 2), len(tokens))
        context = rng.permutation(size) < size // 2
        content = np.zeros((size, size))
        for number, (token, value) in enumerate(zip(tokens, values, strict=True)):
            in_context = number >= len(tokens) - len(tokens) // 3
            content[:, token] = np.where(context, value, 0) if in_context else value
        known = rng.permutation(len(tokens))[: round(settings.style_known * len(tokens))]
        style = np.zeros((size, size))
        style[:, tokens[known]] = content[:, tokens[known]]
        style[:, distractors] = np.where(np.arange(len(distractors)) % 2 == 0, 1.0, -1.0)
        self.planted = np.sort(tokens) + FIRST_CONTENT
        self._tilted = {sign: _softmax(np.log(self._source) + sign * style) for sign in (0, 1, -1)}
        # Rewards after BOS and control tokens never count: answers follow a prompt with content.
        self.reward = np.zeros((size + FIRST_CONTENT,) * 2)
        self.reward[FIRST_CONTENT:, FIRST_CONTENT:] = content

    def sequences(self, rng: np.random.Generator, count: int, length: int, tilt: int = 0) -> np.ndarray:
        """``[count, length]`` content tokens from the source, tilted by ``tilt`` (-1, 0, 1) times the style."""
        cumulative = self._tilted[tilt].cumsum(-1)
        tokens = np.empty((count, length), dtype=np.int64)
        tokens[:, 0] = rng.integers(self.settings.vocab, size=count)
        for t in range(1, length):
            tokens[:, t] = (cumulative[tokens[:, t - 1]] < rng.random((count, 1))).sum(-1)
        return np.minimum(tokens, self.settings.vocab - 1) + FIRST_CONTENT


def answer_rewards(reward: np.ndarray, prompt: Sequence[int], answer: Sequence[int]) -> np.ndarray:
    """Hidden reward of each answer token, given the token before it."""
    ids = np.asarray([prompt[-1], *answer])
    return reward[ids[:-1], ids[1:]]


def new_model(settings: Settings, seed: int) -> TransformerDecoder:
    """A random Llama over the task's vocabulary."""
    model = llama3_2(
        vocab_size=settings.vocab + FIRST_CONTENT,
        num_layers=settings.layers,
        num_heads=4,
        num_kv_heads=4,
        embed_dim=settings.width,
        max_seq_len=64,
        intermediate_dim=2 * settings.width,
        rope_base=10000,
        scale_factor=1,
        tie_word_embeddings=True,
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0, settings.width**-0.5, generator=generator)
    return model


def pretrain(language: Language) -> TransformerDecoder:
    """The base model: a language model of the source and, behind a control token, of its two styles."""
    settings = language.settings
    rng = np.random.default_rng([language.seed, 1])
    model = new_model(settings, language.seed)
    scorer = ScoringModel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.pretrain_lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.pretrain_steps)
    length = settings.prompt_tokens[1] + settings.answer_tokens[1]
    quarter = settings.pretrain_batch // 4
    for _ in range(settings.pretrain_steps):
        plain = language.sequences(rng, settings.pretrain_batch - 2 * quarter, length)
        rows = [[BOS, *row] for row in plain.tolist()]
        for control, tilt in ((GOOD, 1), (BAD, -1)):
            styled = language.sequences(rng, quarter, length - 1, tilt)
            rows += [[BOS, control, *row] for row in styled.tolist()]
        tokens = torch.tensor(rows)
        labels = tokens.clone()
        labels[:, 0] = IGNORE_INDEX
        logps = scorer.token_stats(tokens, labels, needs=frozenset()).policy_logps
        (-logps.mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model


@dataclass(frozen=True)
class Pairs:
    """Preference pairs with their hidden truth.

    Args:
        examples: the pairs, row i at position i.
        rewards: for each pair the hidden rewards of the chosen and of the rejected answer's tokens.
    """

    examples: list[PairExample]
    rewards: list[tuple[np.ndarray, np.ndarray]]

    def first(self, count: int) -> Pairs:
        """The first ``count`` pairs."""
        return Pairs(self.examples[:count], self.rewards[:count])

    def batches(self, size: int) -> Iterator[PairBatch]:
        """All pairs in order."""
        for start in range(0, len(self.examples), size):
            yield collate_pairs(self.examples[start : start + size], PAD)

    def shuffled(self, size: int, steps: int, seed: int) -> Iterator[PairBatch]:
        """``steps`` batches of ``size`` pairs, in the library's own epoch order; short last batches are left out."""
        done = epoch = 0
        while done < steps:
            order = epoch_order(len(self.examples), seed=seed, epoch=epoch, shuffle=True).tolist()
            epoch += 1
            for start in range(0, len(order) - size + 1, size):
                if done == steps:
                    return
                done += 1
                yield collate_pairs([self.examples[i] for i in order[start : start + size]], PAD)

    def accuracy(self) -> float:
        """Share of pairs whose chosen answer is worth more, of those that differ."""
        gaps = np.array([chosen.sum() - rejected.sum() for chosen, rejected in self.rewards])
        return float((gaps[gaps != 0] > 0).mean())


def make_prompts(language: Language, count: int, stream: int) -> list[list[int]]:
    """Prompts without control token, of random lengths."""
    low, high = language.settings.prompt_tokens
    rng = np.random.default_rng([language.seed, 2, stream])
    contents = language.sequences(rng, count, high).tolist()
    return [
        [BOS, *row[: int(n)]] for row, n in zip(contents, rng.integers(low, high + 1, count), strict=True)
    ]


def sample_answers(
    model: TransformerDecoder, prompts: list[list[int]], length: int, seed: int
) -> list[list[int]]:
    """One answer of ``length`` tokens a prompt."""
    return sample(
        model,
        prompts,
        seeds=[seed * 1_000_003 + row for row in range(len(prompts))],
        max_new_tokens=length,
        eos_id=NO_EOS,
        pad_id=PAD,
        world=WORLD,
        batch_size=512,
    )


def make_pairs(language: Language, base: TransformerDecoder, count: int, stream: int) -> Pairs:
    """Pairs of the base model's answers, labelled by Bradley-Terry.

    Args:
        language: where the reward comes from.
        base: the model that answers.
        count: number of pairs.
        stream: another stream, other pairs.
    """
    settings = language.settings
    rng = np.random.default_rng([language.seed, 3, stream])
    prompts = make_prompts(language, count, stream)
    low, high = settings.answer_tokens
    sides = [
        [
            answer[: int(n)]
            for answer, n in zip(
                sample_answers(base, prompts, high, (language.seed * 10 + stream) * 10 + side),
                rng.integers(low, high + 1, count),
                strict=True,
            )
        ]
        for side in (1, 2)
    ]
    examples, rewards = [], []
    for row, (prompt, *answers) in enumerate(zip(prompts, *sides, strict=True)):
        truth = [answer_rewards(language.reward, prompt, answer) for answer in answers]
        gap = (truth[0].sum() - truth[1].sum()) / settings.temperature
        first = 0 if rng.random() < 1 / (1 + np.exp(-gap)) else 1
        examples.append(_example(row, prompt, answers[first], answers[1 - first]))
        rewards.append((truth[first], truth[1 - first]))
    return Pairs(examples, rewards)


def with_control(batch: PairBatch, control: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels of a batch with a control token behind BOS."""
    tokens = torch.cat(
        [batch.tokens[:, :1], torch.full_like(batch.tokens[:, :1], control), batch.tokens[:, 1:]], dim=1
    )
    labels = torch.cat([torch.full_like(batch.labels[:, :1], IGNORE_INDEX), batch.labels], dim=1)
    return tokens, labels


def swapped(pairs: Pairs) -> Pairs:
    """The same pairs with chosen and rejected exchanged."""
    examples = []
    for example in pairs.examples:
        prompt = example.chosen_ids[: example.chosen_start]
        answers = (example.chosen_ids[example.chosen_start :], example.rejected_ids[example.rejected_start :])
        examples.append(_example(example.row, prompt, answers[1], answers[0]))
    return Pairs(examples, [(rejected, chosen) for chosen, rejected in pairs.rewards])


def _example(row: int, prompt: list[int], chosen: list[int], rejected: list[int]) -> PairExample:
    # Each token stands for one character.
    return PairExample(
        row=row,
        chosen_ids=prompt + chosen,
        chosen_start=len(prompt),
        rejected_ids=prompt + rejected,
        rejected_start=len(prompt),
        chosen_offsets=[(i, i + 1) for i in range(len(chosen))],
        rejected_offsets=[(i, i + 1) for i in range(len(rejected))],
        chosen_has_eos=False,
        rejected_has_eos=False,
        key=hashlib.sha256(repr((prompt, chosen, rejected)).encode()).hexdigest(),
    )


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)
