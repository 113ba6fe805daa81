"""Evaluation of the tiny model, also on spawned ranks; the functions must be importable by name."""

from __future__ import annotations

from typing import Any

import torch

from tokenpref._paths import data_root
from tokenpref.data import PreferenceDataset, Tokenizer, preference_dataset, tokenizer_json
from tokenpref.distributed import World, shard
from tokenpref.losses import TokenDPOLoss
from tokenpref.models import tiny_llama
from tokenpref.models.reference import FrozenReference
from tokenpref.models.scoring import ScoringModel
from tokenpref.training.config.fields import Component
from tokenpref.training.config.keys import SamplingConfig
from tokenpref.training.evaluation.measures import evaluate_pairs, sample_rewards

NEEDS = frozenset({"ref", "kl_ref_policy", "kl_policy_ref"})


def tokenizer() -> Tokenizer:
    """The tiny model's."""
    return tokenizer_json(data_root() / "data" / "tiny" / "model")


def pairs(rows: int = 5) -> PreferenceDataset:
    """The first held-out pairs of ``data/tiny``."""
    return preference_dataset(tokenizer(), "package://data/tiny/eval.jsonl", max_rows=rows)


def scorer(seed: int, world: World | None = None) -> ScoringModel:
    """The tiny model in float64 with random weights; sharded in a world of ranks."""
    model = tiny_llama()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0, 0.15, generator=generator)
    model.double()
    if world is not None:
        shard(model, list(model.layers), world)
    return ScoringModel(model, head_memory_mb=0.002)


def sampling(path: str = "tokenpref.rewards.KeywordReward", **changes: Any) -> SamplingConfig:
    """Two samples of each tiny opening, scored by common letters unless ``path`` names another reward."""
    words = {"positive": list("eotsa"), "negative": list("inrdh")} if path.endswith("KeywordReward") else {}
    settings = {"num_samples": 2, "max_new_tokens": 5, "batch_size": 3, **changes}
    reward = Component("sampling.reward", path, words)
    return SamplingConfig(prompts="package://data/tiny/openings.txt", reward=reward, **settings)


def on_ranks(world: World) -> dict[str, Any]:
    """Held-out metrics and scored samples, as this rank knows them."""
    policy, reference = scorer(0, world), FrozenReference(scorer(1, world))
    metrics = evaluate_pairs(
        policy, reference, TokenDPOLoss(), pairs(), world, batch_size=2, pad_id=1, needs=NEEDS
    )
    return {"metrics": metrics, "records": sample_rewards(policy, tokenizer(), sampling(), world, seed=3)}
