import pytest
import torch

from tokenpref.training import get_constant_schedule_with_warmup


def rates(warmup, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.8)
    schedule = get_constant_schedule_with_warmup(optimizer, warmup)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_first_step_moves_and_the_rate_stays_after_warmup():
    assert rates(4, 6) == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


def test_no_warmup_is_constant():
    assert rates(0, 3) == pytest.approx([0.8, 0.8, 0.8])


def test_negative_warmup_is_refused():
    with pytest.raises(ValueError, match="num_warmup_steps"):
        get_constant_schedule_with_warmup(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), -1)
