"""The sign of a score, on both sides, from the store to the gradient of the logits."""

import numpy as np
import pytest
import torch
from support.evaluating import pairs

from tokenpref.data import StoredRow, StoredScores, StoreWriter, collate_pairs, provenance
from tokenpref.losses import TISDPOLoss
from tokenpref.ops import token_stats_from_logits
from tokenpref.stats import split_pair
from tokenpref.training.config.fields import Component
from tokenpref.training.credit.weighing import KnownScores, TokenWeights, Weighing

TOKEN = 1  # the answer token whose score changes


def scored_store(folder, data, score):
    """A store in which token 1 of every answer has a score and all others have 0."""
    rows = []
    for index, example in enumerate(data):
        texts = data.text(index)
        sides = {
            "chosen": np.zeros(len(example.chosen_ids) - example.chosen_start, dtype=np.float32),
            "rejected": np.zeros(len(example.rejected_ids) - example.rejected_start, dtype=np.float32),
        }
        for values in sides.values():
            values[TOKEN] = score
        rows.append(
            StoredRow(
                row=example.row, key=example.key, prompt=texts.prompt, chosen_text=texts.chosen,
                rejected_text=texts.rejected, chosen_spans=example.chosen_offsets,
                rejected_spans=example.rejected_offsets, **sides,
            )
        )  # fmt: skip
    writer = StoreWriter(folder, kind="log_ratio", job=provenance(data), shards=1)
    writer.write(0, rows)
    writer.finish()
    return StoredScores(folder)


def pushes(data, source, transform="exponential"):
    """How far a step of gradient descent would move the label's logit of each pair's scored token: chosen, rejected."""
    component = Component("weight_transform", f"tokenpref.weights.transforms.{transform}", {})
    known = KnownScores(source)
    known.bind(data)
    weights = TokenWeights(data, known, Weighing("log_ratio", component, "none", 1.0))
    batch = collate_pairs(list(data), pad_id=0)
    generator = torch.Generator().manual_seed(0)
    shape = (*batch.tokens.shape, data.tokenizer.vocab_size)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    reference = logits.clone()
    logits.requires_grad_()
    stats = token_stats_from_logits(logits, reference, batch.labels, weights=weights(batch).weights.double())
    TISDPOLoss()(split_pair(stats)).losses.sum().backward()
    starts = [e.chosen_start for e in data] + [e.rejected_start for e in data]
    moved = torch.stack(
        [
            -logits.grad[row, start + TOKEN - 1, batch.tokens[row, start + TOKEN]]
            for row, start in enumerate(starts)
        ]
    )
    return moved[: len(data)], moved[len(data) :]


@pytest.mark.parametrize("transform", ["exponential", "rank_based", "threshold_and_scale"])
def test_what_the_positive_side_prefers_rises_more_and_falls_less(tmp_path, transform):
    data = pairs(4)
    stores = {score: scored_store(tmp_path / str(score), data, score) for score in (-0.4, 0.0, 0.4)}
    against, neutral, favoured = (pushes(data, stores[score], transform) for score in (-0.4, 0.0, 0.4))
    # chosen: pushed up, the more the higher the score; rejected: pushed down, the less the higher the score
    assert (against[0] > 0).all() and (favoured[1] < 0).all()
    assert (favoured[0] > neutral[0]).all() and (neutral[0] > against[0]).all()
    assert (favoured[1] > neutral[1]).all() and (neutral[1] > against[1]).all()


def test_the_size_is_the_formulas(tmp_path):
    data = pairs(4)
    neutral = pushes(data, scored_store(tmp_path / "0", data, 0.0))
    favoured = pushes(data, scored_store(tmp_path / "1", data, 0.4))
    torch.testing.assert_close(
        favoured[0] / neutral[0], torch.full((4,), float(np.exp(0.4)), dtype=torch.float64)
    )
    torch.testing.assert_close(
        favoured[1] / neutral[1], torch.full((4,), float(np.exp(-0.4)), dtype=torch.float64)
    )
