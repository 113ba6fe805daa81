"""Learning-rate schedules of the papers that torchtune lacks."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["get_constant_schedule_with_warmup"]


def get_constant_schedule_with_warmup(
    optimizer: Optimizer, num_warmup_steps: int, num_training_steps: int | None = None, last_epoch: int = -1
) -> LambdaLR:
    """Linear warm-up to the optimizer's rate, then constant: ``lr * min(1, (step + 1) / num_warmup_steps)``.

    The first step already has an effect; torchtune's cosine schedule starts at a rate of zero. This is the schedule
    of the TDPO and TIS-DPO experiments.

    Args:
        optimizer: the optimizer whose learning rate is scheduled.
        num_warmup_steps: steps until the full rate; 0 for none.
        num_training_steps: ignored, because a constant rate does not depend on it; recipes pass it.
        last_epoch: index of the last step done, -1 at the start.

    Returns:
        The scheduler.

    Raises:
        ValueError: if ``num_warmup_steps`` is negative.
    """
    if num_warmup_steps < 0:
        raise ValueError(f"num_warmup_steps must be at least 0, got {num_warmup_steps}")
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, num_warmup_steps)), last_epoch)
