import pytest
import torch
from support import small

from tokenpref.models.reference import KL_STATISTICS, FrozenReference
from tokenpref.models.scoring import logits_of
from tokenpref.ops import AnswerRows, token_stats_from_logits
from tokenpref.training.step.pair_loss import score_pairs

BATCH = small.batch([0, 1, 2])


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def reference(request):
    return small.reference(1, tied=request.param)


@pytest.fixture
def forwards(reference):
    """One entry for each forward of the reference."""
    calls = []
    reference.scorer.model.norm.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_what_it_provides():
    assert FrozenReference.provides == {"ref", "kl_ref_policy", "kl_policy_ref"}
    assert KL_STATISTICS == {"kl_ref_policy", "kl_policy_ref"}


@pytest.mark.parametrize("needs", [frozenset(), frozenset({"entropy"}), frozenset({"weights"})])
def test_nothing_is_run_when_nothing_is_needed(reference, forwards, needs):
    with reference.outputs(BATCH, needs) as output:
        assert (output.logps, output.hidden, output.head_weight) == (None, None, None)
    assert forwards == []


@pytest.mark.parametrize("more", [[], ["entropy", "weights"]])
def test_log_probabilities_when_they_suffice(reference, forwards, more):
    with reference.outputs(BATCH, frozenset({"ref", *more})) as output:
        assert output.hidden is None and output.head_weight is None
        logps = output.logps
    assert forwards == [1] and not logps.requires_grad
    logits = logits_of(reference.scorer.model, BATCH.tokens)
    expected = token_stats_from_logits(logits, None, BATCH.labels, needs=frozenset()).policy_logps
    torch.testing.assert_close(logps, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    "needs",
    [{"kl_ref_policy"}, {"kl_policy_ref"}, {"ref", "kl_ref_policy"}, {"ref", *KL_STATISTICS}],
    ids=lambda needs: "+".join(sorted(needs)),
)
def test_hidden_states_and_head_for_a_kl(reference, forwards, needs):
    with reference.outputs(BATCH, frozenset(needs)) as output:
        assert output.logps is None
        hidden, weight = output.hidden, output.head_weight
    assert forwards == [1] and not hidden.requires_grad and not weight.requires_grad
    torch.testing.assert_close(
        hidden @ weight.T,
        AnswerRows.of(BATCH.labels).take(logits_of(reference.scorer.model, BATCH.tokens)),
        atol=1e-12,
        rtol=0,
    )


def test_both_forms_give_the_policy_the_same_reference(reference):
    policy = small.scorer(0)
    found = []
    for needs in ({"ref"}, {"ref", "kl_ref_policy"}):
        score_pairs(policy, reference, BATCH, frozenset(needs), None, found.append)
    (alone, with_kl) = found
    for side in ("chosen", "rejected"):
        one, other = getattr(alone, side), getattr(with_kl, side)
        torch.testing.assert_close(one.ref_logps, other.ref_logps, atol=1e-12, rtol=0)
        assert one.kl_ref_policy is None
        assert (other.kl_ref_policy[other.mask] > 0).all()


def test_a_gradient_through_the_kl_leaves_the_reference_alone(reference):
    policy = small.scorer(0)
    model = reference.scorer.model
    model.requires_grad_(True)  # even a reference that someone forgot to freeze
    score_pairs(
        policy,
        reference,
        BATCH,
        frozenset({"ref", "kl_ref_policy"}),
        None,
        lambda pair: (pair.chosen.kl_ref_policy.sum() + pair.rejected.ref_logps.sum()).backward(),
    )
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in policy.model.parameters())
