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

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "KL_STATISTICS",
    "OUTPUTS",
    "RowStatistics",
    "accumulation_dtype",
    "exponentials",
    "logit_gradient",
    "row_statistics",
]

_LOG2E = 1 / math.log(2)

KL_STATISTICS = frozenset({"kl_ref_policy", "kl_policy_ref"})

OUTPUTS = ("policy_logps", "ref_logps", "kl_ref_policy", "kl_policy_ref", "entropy")
"""The order in which the autograd functions return the statistics."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: float32 for half precision, and otherwise the input's dtype."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class RowStatistics:
    """Statistics of N rows, ``[N]`` each.

    Args:
        values: by the name of their :class:`~tokenpref.stats.TokenStats` field; None or missing if not requested.
        lse: log-sum-exp of the policy's logits.
        ref_lse: of the reference's logits.
    """

    values: Mapping[str, Tensor | None]
    lse: Tensor
    ref_lse: Tensor | None

    def of(self, part: slice) -> RowStatistics:
        """Of some of the rows."""
        values = {name: value[part] for name, value in self.values.items() if value is not None}
        return RowStatistics(values, self.lse[part], None if self.ref_lse is None else self.ref_lse[part])


def _at(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.gather(-1, targets[:, None]).squeeze(-1)


def _divergence(p: Tensor, q: Tensor, gap: Tensor) -> Tensor:
    """KL(q || p), ``[N]``, from probabilities ``[N, V]`` and gap = log p - log q."""
    # expm1 keeps digits that p - q loses if the models are close. It would overflow if they are far apart.
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
        The requested values, and the log-sum-exps for the backward pass.
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
    logits: Tensor, ref_logits: Tensor | None, rows: RowStatistics, grads: Mapping[str, Tensor]
) -> Tensor:
    """Gradient with respect to the policy's logits, without the term e_y; see the table at the top of this module.

    Args:
        logits: policy logits ``[N, V]``, or some of their columns.
        ref_logits: reference logits of the same columns, if a KL has a gradient.
        rows: what :func:`row_statistics` returned for these rows.
        grads: incoming gradients ``[N]`` by statistic; absent means zero.

    Returns:
        ``[N, V]`` in the accumulation dtype. A caller adds the log-probability's gradient at the columns of the targets.
    """
    of_logps, of_ref_policy = grads.get("policy_logps"), grads.get("kl_ref_policy")
    of_policy_ref, of_entropy = grads.get("kl_policy_ref"), grads.get("entropy")
    slope = torch.zeros_like(rows.lse)  # the factor of p, which is the same in all columns
    if of_logps is not None:
        slope = slope - of_logps
    if of_ref_policy is not None:
        slope = slope + of_ref_policy
    slope = slope[:, None]
    if of_entropy is not None:
        entropy, log_p = rows.values["entropy"], logits - rows.lse[:, None]
        assert entropy is not None
        slope = slope - of_entropy[:, None] * (log_p + entropy[:, None])
    if of_policy_ref is not None:
        divergence = rows.values["kl_policy_ref"]
        assert ref_logits is not None and rows.ref_lse is not None and divergence is not None
        apart = (rows.lse - rows.ref_lse + divergence)[:, None]
        slope = slope + of_policy_ref[:, None] * (logits.to(rows.lse.dtype) - ref_logits - apart)
    gradient = exponentials(logits, rows.lse).mul_(slope)
    if of_ref_policy is not None:
        assert ref_logits is not None and rows.ref_lse is not None
        # Each product is rounded before the subtraction, so a KL alone has a gradient of exactly 0 where p = q.
        gradient -= exponentials(ref_logits, rows.ref_lse).mul_(of_ref_policy[:, None])
    return gradient


def exponentials(logits: Tensor, shift: Tensor) -> Tensor:
    """``exp(logits - shift)`` of ``[N, V]`` in the dtype of ``shift`` ``[N]``.

    On a CPU powers of two take a quarter of the time of powers of e. The shift is subtracted first, so that the largest logit's
    exponential is exactly 1.
    """
    distance = logits - shift[:, None]
    return distance.exp_() if distance.is_cuda else distance.mul_(_LOG2E).exp2_()
