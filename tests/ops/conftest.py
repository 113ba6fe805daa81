import pytest
import torch
from support.scoring import SCORERS

ALL = frozenset({"ref", "kl_ref_policy", "kl_policy_ref", "entropy"})


@pytest.fixture(params=SCORERS.values(), ids=SCORERS)
def score(request):
    """Both ways to token statistics, under the signature of ``token_stats_from_logits``."""
    return request.param


@pytest.fixture
def all_needs():
    return ALL


@pytest.fixture
def case():
    """float64 logits [3, 6, 5] of both models, and labels: prompt, answer, padding; one row without an answer."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 5, dtype=torch.float64, generator=generator) * 2
    ref = torch.randn(3, 6, 5, dtype=torch.float64, generator=generator) * 2
    labels = torch.tensor([[-100, -100, 3, 0, 4, 1], [-100, 2, 2, 1, -100, -100], [-100] * 6])
    return logits, ref, labels


def _by_autograd(logits, ref, labels):
    """The definitions, written down plainly and differentiated by autograd."""
    mask = labels[:, 1:] != -100
    targets = labels[:, 1:].masked_fill(~mask, 0)[..., None]
    log_p, log_q = logits[:, :-1].log_softmax(-1), ref[:, :-1].log_softmax(-1).detach()
    p, q = log_p.exp(), log_q.exp()
    values = {
        "policy_logps": log_p.gather(-1, targets)[..., 0],
        "ref_logps": log_q.gather(-1, targets)[..., 0],
        "kl_ref_policy": (q * (log_q - log_p)).sum(-1),
        "kl_policy_ref": (p * (log_p - log_q)).sum(-1),
        "entropy": -(p * log_p).sum(-1),
    }
    return {name: torch.where(mask, value, 0) for name, value in values.items()}


@pytest.fixture
def by_autograd():
    return _by_autograd
