"""Direct preference optimisation."""

from __future__ import annotations

from tokenpref.losses._base import PreferenceLoss

__all__ = ["DPOLoss"]


class DPOLoss(PreferenceLoss):
    """DPO (Rafailov et al., arXiv 2305.18290): unweighted sums of token log ratios.

    loss = -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h),  h = M(chosen) - M(rejected),  M = sum_t r_t

    with r_t = log pi_theta(y_t | x, y_<t) - log pi_ref(y_t | x, y_<t) and label smoothing e. Rewards: beta M.

    Args:
        beta: strength of the pull to the reference, > 0.
        label_smoothing: share e of pairs that are taken to be swapped, in [0, 0.5).

    Raises:
        ValueError: for a value out of its range.

    Example:
        >>> import torch
        >>> from tokenpref.stats import PairStats, TokenStats
        >>> mask = torch.tensor([[True, True]])
        >>> same = torch.tensor([[-1.0, -2.0]])
        >>> answer = TokenStats(policy_logps=same, ref_logps=same, mask=mask)
        >>> round(DPOLoss()(PairStats(answer, answer)).losses.item(), 4)  # log 2
        0.6931
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
        invariants = {
            "log2_at_reference",
            "antisymmetric",
            "reward_margin_is_logit",
            "sums_over_tokens",
            "vanishes_with_beta",
        }
        if label_smoothing == 0:
            invariants |= {"gradient_direction"}  # smoothing reverses the gradient where the margin is large
        super().__init__(beta, label_smoothing=label_smoothing, invariants=frozenset(invariants))
