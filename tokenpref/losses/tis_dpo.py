"""Token-level importance sampling DPO: weighted log ratios."""

from __future__ import annotations

from tokenpref._checks import check_choice
from tokenpref.losses._base import Centring, PreferenceLoss, coefficient

__all__ = ["TISDPOLoss"]


class TISDPOLoss(PreferenceLoss):
    """TIS-DPO (Liu et al., arXiv 2410.04350), as in the authors' code or with TDPO2's KL instead of its own.

    kl="policy":     h = M(chosen) - M(rejected) - alpha (K(chosen) - K(rejected))
    kl="reference":  h = M(chosen) - M(rejected) - alpha (F(rejected) - sg[F(chosen)])
    loss = -log sigmoid(beta h)

    with M = sum_t w_t (log pi_theta - log pi_ref), K = sum_t w_t KL(pi_theta || pi_ref) and F = sum_t KL(pi_ref || pi_theta)
    over the vocabulary at each position, and token weights w_t from a contrastive pair of models
    (``tokenpref.weights``). "policy" is the published form: alpha = 0 is the released code without its KL, alpha = 0.5 its
    default with the KL, and alpha = 1 the difference of advantages under the policy. "reference" is our own combination:
    TIS-DPO's weights with TDPO2's KL term, which is not weighted and has no gradient on the chosen side.

    The rewards are beta M for alpha = 0, and beta (M - K) or beta (M + F) for any other alpha. Their margin is therefore
    not the trained logit in general; the logit is logged as ``rewards/train_margins``.

    Args:
        beta: strength of the pull to the reference, > 0.
        alpha: factor of the KL terms, >= 0.
        kl: "policy" or "reference"; it has no effect for alpha = 0.

    Raises:
        ValueError: for a value out of its range.
    """

    def __init__(self, beta: float = 0.1, alpha: float = 0.0, kl: str = "policy") -> None:
        alpha = coefficient("alpha", alpha, at_least=0)
        kl = check_choice("kl", kl, ("policy", "reference"))
        invariants = {
            "log2_at_reference",
            "antisymmetric",
            "sums_over_tokens",
            "vanishes_with_beta",
            "gradient_direction",
        }
        if alpha == 0:
            invariants.add("unit_weights_are_dpo")
        if alpha in (0, 1):
            invariants.add("reward_margin_is_logit")
        if alpha == 0 or kl == "policy":
            invariants.add("zero_weights_are_silent")
        if kl == "policy":
            centring = Centring("policy", alpha=alpha, weighted=True)
        else:
            centring = Centring("reference", alpha=alpha, detach_chosen=True)
        super().__init__(beta, weighted=True, centring=centring, invariants=frozenset(invariants))
        self.alpha = alpha
        self.kl = kl
