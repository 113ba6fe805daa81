"""Hidden states and heads to score, and a scalar to go back from."""

from unittest import mock

import torch

from tokenpref.ops import head

LABELS = torch.tensor([[-100, -100, 3, 0, 4, 1, 6], [-100, 2, 2, 1, -100, -100, -100]])


def make(dtype=torch.float64, vocab=7, width=4, ref_width=3):
    """The policy's hidden states and head, both with gradient, and the reference's."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    hidden, weight = normal(2, 7, width).requires_grad_(), normal(vocab, width).requires_grad_()
    return hidden, weight, normal(2, 7, ref_width), normal(vocab, ref_width)


def total(stats):
    """A scalar in which every statistic counts differently at every token."""
    places = torch.arange(1, stats.mask.numel() + 1, device=stats.mask.device).view_as(stats.mask)
    parts = {"policy_logps": 3, "kl_ref_policy": -2, "kl_policy_ref": 1, "entropy": 0.5}
    return sum(
        (places * factor * v).sum()
        for name, factor in parts.items()
        if (v := getattr(stats, name)) is not None
    )


def blocks_of(nbytes):
    """A context in which the head cuts the vocabulary into blocks of so many bytes of logits."""
    return mock.patch.dict(head._BLOCK_BYTES, cpu=nbytes, cuda=nbytes)
