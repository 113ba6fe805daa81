import math

import pytest
import torch
from support.scoring import golden

from tokenpref.weights.attribution import (
    AnswerLogp,
    GaussianPrior,
    MaxLogit,
    PreferenceMargin,
    TargetInputs,
    attribution_weights,
    importances,
)

EXPECTED = golden("tidpo_attr", "")
ATTENDED = EXPECTED["attn"].bool()
ANSWER = EXPECTED["labels"] != -100


def toy_logits(embeddings):
    """The golden file's language model from its input embeddings."""
    w = {name: EXPECTED[f"model/{name}"] for name in ("wq", "wk", "wv", "ws", "wh")}
    size = embeddings.shape[1]
    scores = (embeddings @ w["wq"]) @ (embeddings @ w["wk"]).transpose(1, 2) / math.sqrt(embeddings.shape[-1])
    seen = torch.ones(size, size).tril().bool() & ATTENDED[:, None, :] | torch.eye(size).bool()
    mixed = scores.masked_fill(~seen, -math.inf).softmax(-1) @ (embeddings @ w["wv"])
    return (torch.tanh(mixed) + embeddings @ w["ws"]) @ w["wh"]


def toy_importances(target, norm="l1"):
    embeddings = EXPECTED["model/emb"][EXPECTED["ids"]].requires_grad_()
    logits, labels = toy_logits(embeddings), EXPECTED["labels"]
    taken = logits[:, :-1].log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    inputs = TargetInputs(
        logits_at=lambda at: logits[torch.arange(5), at],
        logps=lambda: torch.where(labels[:, 1:] != -100, taken, 0),
        labels=labels,
        last=ATTENDED.sum(-1) - 1,
        sides=("answer",),
    )
    (gradient,) = torch.autograd.grad(target(inputs).sum(), embeddings)
    return importances(gradient, embeddings.detach(), norm)


def test_golden_importances():
    torch.testing.assert_close(
        toy_logits(EXPECTED["model/emb"][EXPECTED["ids"]]), EXPECTED["logits"], atol=1e-12, rtol=0
    )
    torch.testing.assert_close(toy_importances(MaxLogit()), EXPECTED["importances"], atol=1e-12, rtol=0)


@pytest.mark.parametrize("span", ["prompt+resp", "resp"])
@pytest.mark.parametrize("division", [4.0, 8.0])
@pytest.mark.parametrize("mixture", [0.0, 0.2, 1.0])
def test_golden_weights(span, division, mixture):
    expected = EXPECTED[f"weights/lam{mixture}_div{division}_{span}"]
    over = ATTENDED if span == "prompt+resp" else ANSWER
    found = attribution_weights(
        EXPECTED["importances"], ANSWER, over, mixture=mixture, prior=GaussianPrior(1 / division)
    )
    assert not found[~ANSWER].any()
    for row in range(5):
        if over[row].sum() > 1:  # one token alone: the released code has 0 there, we have 1
            torch.testing.assert_close(
                found[row][ANSWER[row]].float(), expected[row][ANSWER[row]], atol=1e-5, rtol=0
            )
        else:
            assert not expected[row].any() and found[row][ANSWER[row]].tolist() == [1.0]


def test_without_importances_the_prior_has_all_of_it():
    expected = EXPECTED["weights/prior_only_div4_resp"]
    found = attribution_weights(torch.zeros(5, 14), ANSWER, ANSWER, mixture=0.7, prior=GaussianPrior(0.25))
    torch.testing.assert_close(found[:3], expected[:3], atol=1e-5, rtol=0)


def spans(*lengths, start=2, width=12):
    places = torch.arange(width)
    return torch.stack([(places >= start) & (places < start + n) for n in lengths])


def test_numbers_by_hand():
    # importances 1 and 3: shares 1/4, 3/4. The prior of two tokens is 1/2 each. Mixture 0.6: 0.35 and 0.65, times two.
    span = spans(2, width=5)
    found = attribution_weights(torch.tensor([[9.0, 9, 1, 3, 9]]), span, span, mixture=0.6)
    torch.testing.assert_close(found, torch.tensor([[0, 0, 0.7, 1.3, 0]]))
    # The prompt takes part: shares 1/8, 1/8, 2/8, 4/8 of four tokens, of which the answer has the last two.
    whole = torch.tensor([[True, True, True, True, False]])
    found = attribution_weights(torch.tensor([[1.0, 1, 2, 4, 9]]), span, whole, mixture=1.0)
    torch.testing.assert_close(found, torch.tensor([[0, 0, 1.0, 2.0, 0]]))


def test_prior_by_hand():
    # three tokens, width 0.25 * 3 < 1: normalised, the width is one token: e^-1/2, 1, e^-1/2
    span = spans(3, start=1, width=5)
    side = math.exp(-0.5)
    expected = torch.tensor([[0, side, 1, side, 0]], dtype=torch.float64)
    torch.testing.assert_close(GaussianPrior(0.25)(span), expected / (1 + 2 * side))
    # as written: width 0.75, and the top at 1
    side = math.exp(-((1 / 0.75) ** 2) / 2)
    expected = torch.tensor([[0, side, 1, side, 0]], dtype=torch.float64)
    torch.testing.assert_close(GaussianPrior(0.25, normalized=False)(span), expected)


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("mixture", [0.0, 0.3, 1.0])
def test_weights_average_one_over_the_span_whatever_the_scale(mixture, normalized):
    span = spans(7, 4, 1, 2)
    found = torch.rand(4, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prior = GaussianPrior(0.3, normalized)
    weights = attribution_weights(found, span, span, mixture=mixture, prior=prior)
    assert (weights >= 0).all() and not weights[~span].any()
    torch.testing.assert_close(weights.sum(-1), span.sum(-1).double(), atol=1e-12, rtol=0)
    scaled = attribution_weights(17 * found, span, span, mixture=mixture, prior=prior)
    torch.testing.assert_close(scaled, weights, atol=1e-12, rtol=0)
    # batch companions and padding do not count
    alone = attribution_weights(found[1:2, :7], span[1:2, :7], span[1:2, :7], mixture=mixture, prior=prior)
    torch.testing.assert_close(alone, weights[1:2, :7], atol=1e-12, rtol=0)
    if mixture == 0:
        row = weights[0, 2:9]
        torch.testing.assert_close(row, row.flip(0), atol=1e-12, rtol=0)
    if mixture == 1:
        torch.testing.assert_close(
            weights[0, 2:9], 7 * found[0, 2:9] / found[0, 2:9].sum(), atol=1e-12, rtol=0
        )


def test_the_last_token_keeps_the_priors_share_where_it_has_no_gradient():
    """At before_last the last token is not seen by the target."""
    found = toy_importances(MaxLogit("before_last"))
    last = ATTENDED.sum(-1) - 1
    assert not found[torch.arange(4), last[:4]].any() and found[torch.arange(4), last[:4] - 1].all()
    weights = attribution_weights(found, ANSWER, ANSWER, mixture=0.7, prior=GaussianPrior(0.25))
    prior = GaussianPrior(0.25)(ANSWER)
    expected = 0.3 * prior[0, last[0]] * ANSWER[0].sum()
    torch.testing.assert_close(weights[0, last[0]].double(), expected, atol=1e-12, rtol=0)
    assert weights[3, last[3]] == 1.0  # a one-token answer


def margin_inputs(logps):
    return TargetInputs(
        logits_at=lambda at: None, logps=lambda: logps, labels=None, last=None, sides=("chosen", "rejected")
    )


def test_answer_and_margin_targets():
    logps = torch.tensor([[-1.0, -2.0], [-4.0, 0.0], [-0.5, -0.5], [-3.0, -3.0]])
    assert AnswerLogp()(margin_inputs(logps)).tolist() == [-3.0, -4.0, -1.0, -6.0]
    assert PreferenceMargin()(margin_inputs(logps)).tolist() == [-3.0 + 1.0, -4.0 + 6.0]
    assert PreferenceMargin.needs_pair and not AnswerLogp.needs_pair and not MaxLogit.needs_pair


def test_norms_by_hand():
    gradient = torch.tensor([[[3.0, -4.0], [1.0, 0.0]]])
    embeddings = torch.tensor([[[1.0, 0.5], [-2.0, 7.0]]])
    assert importances(gradient, embeddings).tolist() == [[7.0, 1.0]]
    assert importances(gradient, embeddings, "l2").tolist() == [[5.0, 1.0]]
    # 3 - 2 = 1, and -2, which lowers the target, counts nothing
    assert importances(gradient, embeddings, "input_times_gradient").tolist() == [[1.0, 0.0]]
    assert importances(gradient.bfloat16(), embeddings.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_bad_importances_are_refused_by_row(bad):
    span = spans(3, 2, 4)
    found = torch.ones(3, 12)
    found[1, 3] = bad
    with pytest.raises(ValueError, match=r"rows \[1\] are negative, nan or infinite"):
        attribution_weights(found, span, span, mixture=0.5)
    found[1, 3], found[1, 11] = 1.0, bad  # outside the span nothing counts
    assert attribution_weights(found, span, span, mixture=0.5).isfinite().all()


def test_bad_settings_are_named():
    span = spans(2)
    with pytest.raises(ValueError, match=r"mixture \(lambda\) must be .*<= 1, got 1.5"):
        attribution_weights(torch.ones(1, 12), span, span, mixture=1.5)
    with pytest.raises(ValueError, match="sigma must be"):
        GaussianPrior(0)
    with pytest.raises(ValueError, match="position must be one of 'last_valid', 'before_last', got 'last'"):
        MaxLogit("last")
    with pytest.raises(ValueError, match="norm must be one of"):
        importances(torch.ones(1, 1, 1), torch.ones(1, 1, 1), "l3")
    with pytest.raises(ValueError, match=r"rows \[0\] have neither importances nor a prior"):
        attribution_weights(torch.zeros(1, 12), span, span, prior=GaussianPrior(1e-9, normalized=False))
