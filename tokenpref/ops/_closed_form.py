"""The statistics of a row of logits, and their gradients, in closed form.

With policy logits z, reference logits z', p = softmax z, q = softmax z', D = log p - log q and target y:

====================  =============================  ========================================
statistic             value                          gradient with respect to z
====================  =============================  ========================================
log-probability       z_y - lse(z)                   e_y - p
KL(q || p)            sum_v (p - q - q D)            p - q
KL(p || q) = k        sum_v (q - p + p D)            p (D - k)
entropy H             -sum_v p log p                 -p (log p + H)
====================  =============================  ========================================

The summands p - q - q D = q (expm1(D) - D) are non-negative, and an error in a log-sum-exp, which shifts D by a
constant, cancels to first order: sum_v -q D alone would carry it in full. Where both models agree bit for bit, D and
every summand are exactly 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "KL_STATISTICS",
    "OUTPUTS",
    "RowStatistics",
    "accumulation_dtype",
    "logit_gradient",
    "row_statistics",
]

KL_STATISTICS = frozenset({"kl_ref_policy", "kl_policy_ref"})

OUTPUTS = ("policy_logps", "ref_logps", "kl_ref_policy", "kl_policy_ref", "entropy")
"""Order in which the autograd functions return the statistics."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the arithmetic: float32 for half precision, float64 stays."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class RowStatistics:
    """Statistics of N rows, ``[N]`` each.

    Args:
        values: by the name of their :class:`~tokenpref.stats.TokenStats` field; None or absent where not wanted.
        lse: log-sum-exp of the policy's logits.
        ref_lse: of the reference's logits.
    """

    values: Mapping[str, Tensor | None]
    lse: Tensor
    ref_lse: Tensor | None


def _at(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.gather(-1, targets[:, None]).squeeze(-1)


def _divergence(p: Tensor, q: Tensor, gap: Tensor) -> Tensor:
    """KL(q || p), ``[N]``, from probabilities ``[N, V]`` and gap = log p - log q."""
    # expm1 keeps the digits that p - q loses where the models are close; it would overflow where they are far apart.
    return torch.where(gap.abs() < 1, q * (gap.expm1() - gap), p - q - q * gap).sum(-1)


def row_statistics(
    logits: Tensor, ref_logits: Tensor | None, targets: Tensor, needs: frozenset[str]
) -> RowStatistics:
    """Statistics of N rows of logits.

    Args:
        logits: policy logits ``[N, V]``.
        ref_logits: reference logits ``[N, V]``; needed for "ref" and the KL terms.
        targets: ``[N]`` int64, the predicted tokens.
        needs: of "ref", "kl_ref_policy", "kl_policy_ref", "entropy".

    Returns:
        The wanted values, and the log-sum-exps that the backward needs.
    """
    logits = logits.to(accumulation_dtype(logits.dtype))
    lse = logits.logsumexp(-1)
    values = {"policy_logps": _at(logits, targets) - lse}
    log_p = logits - lse[:, None] if needs & (KL_STATISTICS | {"entropy"}) else None
    if log_p is not None and "entropy" in needs:
        values["entropy"] = -(log_p.exp() * log_p).sum(-1)
    if ref_logits is None:
        return RowStatistics(values, lse, None)
    ref_logits = ref_logits.to(accumulation_dtype(ref_logits.dtype))
    ref_lse = ref_logits.logsumexp(-1)
    if "ref" in needs:
        values["ref_logps"] = _at(ref_logits, targets) - ref_lse
    if log_p is not None and needs & KL_STATISTICS:
        log_q = ref_logits - ref_lse[:, None]
        p, q, gap = log_p.exp(), log_q.exp(), log_p - log_q
        if "kl_ref_policy" in needs:
            values["kl_ref_policy"] = _divergence(p, q, gap)
        if "kl_policy_ref" in needs:
            values["kl_policy_ref"] = _divergence(q, p, -gap)
    return RowStatistics(values, lse, ref_lse)


def logit_gradient(
    logits: Tensor,
    ref_logits: Tensor | None,
    targets: Tensor | None,
    rows: RowStatistics,
    grads: Mapping[str, Tensor],
) -> Tensor:
    """Gradient with respect to the policy's logits; see the table at the top of this module.

    Args:
        logits: policy logits ``[N, V]``, or some of their columns.
        ref_logits: reference logits ``[N, V]``, if a KL has a gradient.
        targets: ``[N]`` int64; None leaves e_y out, which a block of columns may not hold.
        rows: what :func:`row_statistics` returned for these rows.
        grads: incoming gradients ``[N]`` by statistic; absent means zero.

    Returns:
        ``[N, V]`` in the accumulation dtype.
    """
    log_p = logits.to(rows.lse.dtype) - rows.lse[:, None]
    p = log_p.exp()
    grad_logps = grads.get("policy_logps")
    grad_ref_policy, grad_policy_ref = grads.get("kl_ref_policy"), grads.get("kl_policy_ref")
    kl_policy_ref, entropy = rows.values.get("kl_policy_ref"), rows.values.get("entropy")
    slope = torch.zeros_like(p)  # the factor of p
    if grad_logps is not None:
        slope -= grad_logps[:, None]
    if "entropy" in grads:
        assert entropy is not None
        slope -= grads["entropy"][:, None] * (log_p + entropy[:, None])
    log_q = None
    if grad_ref_policy is not None or grad_policy_ref is not None:
        assert ref_logits is not None and rows.ref_lse is not None
        log_q = ref_logits.to(rows.ref_lse.dtype) - rows.ref_lse[:, None]
    if log_q is not None and grad_policy_ref is not None:
        assert kl_policy_ref is not None
        slope += grad_policy_ref[:, None] * (log_p - log_q - kl_policy_ref[:, None])
    gradient = slope.mul_(p)
    if log_q is not None and grad_ref_policy is not None:
        # p - q goes in as one difference: taken apart, its two large halves would leave rounding behind at p = q.
        gradient += grad_ref_policy[:, None] * (p - log_q.exp())
    if grad_logps is not None and targets is not None:
        gradient.scatter_add_(-1, targets[:, None], grad_logps[:, None])
    return gradient
