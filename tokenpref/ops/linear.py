"""Token statistics from hidden states and the LM head, without the logits of all positions in memory."""

from __future__ import annotations

from torch import Tensor

from tokenpref.ops.answers import AnswerRows, check_needs, check_reference, check_shapes, needs_of_rows
from tokenpref.ops.final_logits import LogitMap
from tokenpref.ops.head import head_statistics, logit_budget
from tokenpref.stats import TokenStats

__all__ = ["linear_token_stats", "score_tokens"]


def linear_token_stats(
    hidden: Tensor,
    head_weight: Tensor,
    ref_hidden: Tensor | None,
    ref_head_weight: Tensor | None,
    labels: Tensor,
    *,
    weights: Tensor | None = None,
    needs: frozenset[str] = frozenset({"ref"}),
    memory_mb: float | None = None,
    ref_logps: Tensor | None = None,
    compiled: bool = False,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
) -> TokenStats:
    """Token statistics from the last hidden states and the LM heads of both models.

    The numbers and gradients equal those of :func:`~tokenpref.ops.token_stats_from_logits` on ``hidden @ head_weight.T``, or on
    :func:`~tokenpref.ops.final_logits` of it. But only positions that predict an answer's token are multiplied with the head, one
    block of the vocabulary at a time. The gradient flows to ``hidden`` and to ``head_weight``. If the head is frozen, the forward
    pass already computes the gradient vectors of the hidden states, and the backward pass needs no matrix product.

    Args:
        hidden: policy's last hidden states ``[B, L, D]``, the input of its LM head (after the final norm).
        head_weight: policy's LM head ``[V, D]``.
        ref_hidden: reference's last hidden states ``[B, L, D']``; None if ``needs`` names nothing of the reference,
            or with ``ref_logps``.
        ref_head_weight: reference's LM head ``[V, D']``; must not change before the backward pass.
        labels: ``[B, L]`` int64, -100 where no token is scored. The shift happens here: position t predicts
            label t + 1.
        weights: token weights ``[B, T]`` with T = L - 1, in the columns of the predicted tokens.
        needs: of "ref", "kl_ref_policy", "kl_policy_ref", "entropy": what to compute in addition to the policy's
            log-probabilities ("weights" and "anchor" are ignored, because the loss checks them).
        memory_mb: MiB of logits that are kept for the backward pass, twice that with a KL, which is of two models; the others are
            recomputed. It changes time and memory, and no bit of the result. None: a sixteenth of the free memory, at most
            seven times the head's weight.
        ref_logps: the reference's log-probabilities ``[B, T]`` instead of ``ref_hidden``, if no KL is needed.
        compiled: make one kernel of each pass over a block of logits, with Triton on CUDA where it is installed and with
            ``torch.compile`` otherwise. That takes some ten seconds the first time and, on a CPU, a C++ compiler. Numbers change
            by rounding only.
        logit_scale: factor of both models' logits, as in :func:`~tokenpref.ops.final_logits`.
        soft_cap: bound of both models' logits, as in :func:`~tokenpref.ops.final_logits`; None: no bound.

    Returns:
        Statistics ``[B, T]`` in nats, in float32, or in float64 for float64 hidden states.

    Raises:
        ValueError: for wrong shapes, unknown names in ``needs``, a reference that does not serve them, or a ``logit_scale`` or
            ``soft_cap`` that is not a number above 0.
    """
    from_hidden = needs_of_rows(needs, ref_hidden, ref_logps)
    check_shapes(
        labels, {"hidden": hidden, "ref_hidden": ref_hidden}, {"weights": weights, "ref_logps": ref_logps}
    )
    rows = AnswerRows.of(labels)
    use_reference = ref_hidden is not None and from_hidden - {"entropy"}
    values = score_tokens(
        rows.take(hidden),
        head_weight,
        rows.targets,
        ref_hidden=rows.take(ref_hidden.detach()) if ref_hidden is not None and use_reference else None,
        ref_head_weight=ref_head_weight,
        needs=from_hidden,
        memory_mb=memory_mb,
        compiled=compiled,
        logit_scale=logit_scale,
        soft_cap=soft_cap,
    )
    return rows.token_stats(values, ref_logps, weights)


def score_tokens(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    ref_hidden: Tensor | None = None,
    ref_head_weight: Tensor | None = None,
    needs: frozenset[str] = frozenset(),
    memory_mb: float | None = None,
    compiled: bool = False,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
) -> dict[str, Tensor]:
    """Statistics of rows that are already selected, which :func:`linear_token_stats` scatters to ``[B, T]``.

    Args:
        hidden: policy's last hidden states ``[N, D]`` at the positions to score.
        head_weight: policy's LM head ``[V, D]``.
        targets: ``[N]`` int64, the token that each position predicts.
        ref_hidden: reference's last hidden states ``[N, D']``.
        ref_head_weight: reference's LM head ``[V, D']``.
        needs: of "ref", "kl_ref_policy", "kl_policy_ref", "entropy".
        memory_mb: as in :func:`linear_token_stats`.
        compiled: as in :func:`linear_token_stats`.
        logit_scale: as in :func:`linear_token_stats`.
        soft_cap: as in :func:`linear_token_stats`.

    Returns:
        ``[N]`` tensors by the name of their :class:`~tokenpref.stats.TokenStats` field: "policy_logps" and what
        ``needs`` names. With N = 0 they are empty but still part of the graph.

    Raises:
        ValueError: for wrong shapes, unknown names in ``needs``, a missing reference, or a ``logit_scale`` or ``soft_cap`` that
            is not a number above 0.
    """
    computed = check_needs(needs)
    check_reference(computed, "ref_hidden", ref_hidden, None)
    _check_heads(hidden, head_weight, targets, ref_hidden, ref_head_weight)
    if memory_mb is not None and not memory_mb > 0:
        raise ValueError(f"memory_mb must be a number above 0, or None, got {memory_mb!r}")
    if ref_hidden is not None and ref_head_weight is not None:
        ref_hidden, ref_head_weight = ref_hidden.detach(), ref_head_weight.detach()
    return head_statistics(
        hidden,
        head_weight,
        targets,
        ref_hidden,
        ref_head_weight,
        computed,
        LogitMap(logit_scale, soft_cap),
        budget=logit_budget(memory_mb, head_weight.nbytes, hidden.device),
        compiled=compiled,
    )


def _check_heads(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    ref_hidden: Tensor | None,
    ref_head_weight: Tensor | None,
) -> None:
    def check_head(prefix: str, states: Tensor, weight: Tensor) -> None:
        if states.dim() != 2 or weight.dim() != 2 or states.shape[1] != weight.shape[1]:
            raise ValueError(
                f"{prefix}hidden [..., D] and {prefix}head_weight [V, D] must agree in D, "
                f"got {list(states.shape)} and {list(weight.shape)}"
            )
        if states.shape[0] != targets.shape[0]:
            raise ValueError(f"{prefix}hidden has {states.shape[0]} rows for {targets.shape[0]} targets")

    check_head("", hidden, head_weight)
    if ref_hidden is None:
        return
    if ref_head_weight is None:
        raise ValueError("ref_hidden was given without ref_head_weight; pass the reference's LM head [V, D]")
    check_head("ref_", ref_hidden, ref_head_weight)
    if ref_head_weight.shape[0] != head_weight.shape[0]:
        raise ValueError(
            f"the heads differ in vocabulary: head_weight has {head_weight.shape[0]} rows, "
            f"ref_head_weight {ref_head_weight.shape[0]}"
        )
