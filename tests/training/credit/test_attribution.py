"""Attribution through a real decoder: against a gradient worked by hand, and what it leaves behind."""

from dataclasses import replace

import pytest
import torch
from support import small, workers
from torch import nn

from tokenpref._torchtune import TransformerDecoder, set_activation_checkpointing
from tokenpref.distributed import single_process_world
from tokenpref.distributed.testing import run_distributed
from tokenpref.errors import ConfigError, TokenprefError, TrainingDiverged
from tokenpref.models.reference import NoReference
from tokenpref.models.scoring import ScoringModel
from tokenpref.training.credit.attribution import Attribution
from tokenpref.training.credit.gradients import token_importances
from tokenpref.training.credit.live import LiveModels, RefreshedScores
from tokenpref.weights.attribution import AnswerLogp, MaxLogit, PreferenceMargin

WORLD = single_process_world()
TARGETS = {
    "last": MaxLogit(),
    "before last": MaxLogit("before_last"),
    "answer": AnswerLogp(),
    "margin": PreferenceMargin(),
}


def models(policy=None, step=0, reference=None):
    return LiveModels(policy or small.scorer(), reference or small.reference(), WORLD, 0, 1, step)


def by_definition(scorer, batch, target):
    """The same gradient through the decoder's layers, fed with embeddings by hand."""
    model = scorer.model
    leaf = model.tok_embeddings(batch.tokens).detach().requires_grad_()
    hidden = leaf
    for layer in model.layers:
        hidden = layer(hidden)
    logits = model.norm(hidden) @ scorer.head_weight.T
    rows = torch.arange(len(batch.labels))
    last = torch.where(batch.labels != -100, torch.arange(batch.labels.shape[1]), 0).amax(-1)
    if isinstance(target, MaxLogit):
        value = logits[rows, last - int(target.position == "before_last")].amax(-1).sum()
    else:
        taken = logits[:, :-1].log_softmax(-1).gather(-1, batch.labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        sums = torch.where(batch.labels[:, 1:] != -100, taken, 0).sum(-1)
        half = len(sums) // 2
        value = sums[:half].sum() - sums[half:].sum() if target.needs_pair else sums.sum()
    return torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("tied", [True, False])
def test_it_is_the_gradient_at_the_embeddings(target, tied):
    scorer, batch = small.scorer(tied=tied), small.batch([0, 1, 2])
    expected = by_definition(scorer, batch, target).abs().sum(-1)
    found = token_importances(scorer, batch.tokens, batch.labels, target=target)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert found.any()


class Mix(nn.Module):
    """e_1 at the first token, e_1 + 2 e_2 at the second."""

    def forward(self, hidden, **_):
        first = hidden[:, :1]
        return hidden + torch.cat([torch.zeros_like(first), first + hidden[:, 1:]], 1)


class TwoTokens(TransformerDecoder):
    """h = e_1 + 2 e_2 at the second token, one token's own embedding at the first."""

    def __init__(self):
        table = nn.Embedding(3, 2)
        table.weight.data = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0]])
        head = nn.Linear(2, 3, bias=False)
        head.weight.data = torch.tensor([[1.0, -3.0], [0.5, 2.0], [0.0, 0.0]])
        super().__init__(
            tok_embeddings=table,
            layers=nn.ModuleList([Mix()]),
            max_seq_len=2,
            num_heads=1,
            head_dim=2,
            norm=nn.Identity(),
            output=head,
        )


def test_a_two_token_model_by_hand():
    # tokens 1, 2: e_1 = (0, 2), e_2 = (-1, 1), h_2 = e_1 + 2 e_2 = (-2, 4); logits -14, 7, 0: the largest is token 1's,
    # w = (0.5, 2). Its gradient is w at e_1 (L1: 2.5) and 2 w at e_2 (L1: 5).
    model = TwoTokens()
    scorer = ScoringModel(model, padding_free=False)
    tokens, labels = torch.tensor([[1, 2]]), torch.tensor([[-100, 2]])
    found = token_importances(scorer, tokens, labels, target=MaxLogit(), sides=("chosen",))
    torch.testing.assert_close(found, torch.tensor([[2.5, 5.0]]))
    # before the last token: h_1 = e_1 = (0, 2), logits -6, 4, 0: gradient w at e_1, none at e_2
    found = token_importances(scorer, tokens, labels, target=MaxLogit("before_last"), sides=("chosen",))
    torch.testing.assert_close(found, torch.tensor([[2.5, 0.0]]))
    # log p(2 | 1): 0 - logsumexp(-6, 4, 0); the gradient at e_1 is -(p_0 w_0 + p_1 w_1)
    p = torch.tensor([-6.0, 4.0, 0.0]).softmax(0)
    expected = (p[0] * 1.0 + p[1] * 0.5).abs() + (p[0] * -3.0 + p[1] * 2.0).abs()
    found = token_importances(scorer, tokens, labels, target=AnswerLogp(), sides=("chosen",))
    torch.testing.assert_close(found, torch.tensor([[expected, 0.0]]))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_nothing_is_left_behind(checkpointed):
    """Gradients, modes and random numbers are as before, with activation checkpointing too."""
    scorer, batch = small.scorer(), small.batch([0, 1])
    plain = token_importances(scorer, batch.tokens, batch.labels, target=AnswerLogp())
    if checkpointed:
        set_activation_checkpointing(scorer.model, auto_wrap_policy={type(scorer.model.layers[0])})
    scorer.model.train()
    scorer.model.layers[1].eval()
    modes = [m.training for m in scorer.model.modules()]
    stats = scorer.token_stats(batch.tokens, batch.labels, needs=frozenset())
    stats.policy_logps.sum().backward()
    grads = [p.grad.clone() for p in scorer.model.parameters()]
    state = torch.get_rng_state()
    found = token_importances(scorer, batch.tokens, batch.labels, target=AnswerLogp())
    torch.testing.assert_close(found, plain, atol=1e-12, rtol=0)
    assert all(torch.equal(p.grad, g) for p, g in zip(scorer.model.parameters(), grads, strict=True))
    assert modes == [m.training for m in scorer.model.modules()]
    assert torch.equal(torch.get_rng_state(), state)
    assert not scorer.model.tok_embeddings._forward_hooks


def test_it_works_without_gradients_around_it_and_on_a_frozen_model():
    batch = small.batch([0, 1])
    plain = token_importances(small.scorer(), batch.tokens, batch.labels, target=MaxLogit())
    with torch.no_grad():
        found = token_importances(small.scorer(frozen=True), batch.tokens, batch.labels, target=MaxLogit())
    assert torch.equal(found, plain) and not found.requires_grad


def test_padding_and_companions_do_not_count():
    scorer, batch = small.scorer(), small.batch([0, 1, 2])
    whole = token_importances(scorer, batch.tokens, batch.labels, target=AnswerLogp())
    wider = small.batch([1], length=17)
    alone = token_importances(scorer, wider.tokens, wider.labels, target=AnswerLogp())
    torch.testing.assert_close(alone[:, :12], whole[[1, 4]], atol=1e-12, rtol=0)
    assert not alone[:, 12:].any()


def test_the_margin_looks_like_the_answers_to_the_norms_but_not_to_input_times_gradient():
    scorer, batch = small.scorer(), small.batch([0, 1])

    def found(target, norm):
        return token_importances(scorer, batch.tokens, batch.labels, target=target, norm=norm)

    for norm in ("l1", "l2"):
        torch.testing.assert_close(
            found(PreferenceMargin(), norm), found(AnswerLogp(), norm), atol=1e-12, rtol=0
        )
    one, two = (found(target, "input_times_gradient") for target in (PreferenceMargin(), AnswerLogp()))
    torch.testing.assert_close(one[:2], two[:2], atol=1e-12, rtol=0)
    assert not (one[2:] * two[2:]).any() and one[2:].any() and two[2:].any()


def test_weights_of_a_batch():
    batch = small.batch([3, 4, 5])
    found = Attribution(span="answer", mixture=0.7).score(batch, models())
    lengths = (batch.labels[:, 1:] != -100).sum(-1)
    assert [len(w) for w in found] == lengths.tolist()
    for weights in found:
        assert weights.sum().item() == pytest.approx(len(weights), abs=1e-9) and (weights >= 0).all()
    whole = Attribution(span="prompt_and_answer", mixture=0.7).score(batch, models())
    assert any(abs(w.mean().item() - 1) > 0.05 for w in whole)
    # a filler has no answer
    assert [len(w) for w in Attribution().score(small.batch([], filler=True), models())] == [0, 0]


def test_refresh():
    """every_step follows the policy; every_n_steps keeps a row for n steps; once for good; reference never moves."""
    batch = small.batch([0, 1])
    one, other = small.scorer(0), small.scorer(7)

    def scored(source, policy, step):
        return source.score(batch, models(policy, step))

    fresh = [scored(Attribution(), policy, 0) for policy in (one, other)]
    assert not torch.equal(fresh[0][0], fresh[1][0])
    for settings, expected in (
        ({"refresh": "every_step"}, [0, 1, 1, 1]),
        ({"refresh": "every_n_steps", "every_n_steps": 3}, [0, 0, 0, 1]),
        ({"refresh": "once"}, [0, 0, 0, 0]),
    ):
        source = RefreshedScores(Attribution(**settings))
        for step, want in enumerate(expected):
            found = scored(source, one if step == 0 else other, step)
            assert all(torch.equal(a, b) for a, b in zip(found, fresh[want], strict=True)), (settings, step)
    frozen = [scored(Attribution(model="reference"), policy, 0) for policy in (one, other)]
    assert torch.equal(frozen[0][0], frozen[1][0])


def test_one_side_is_not_enough_for_the_margin():
    half = small.batch([0, 1]).only("rejected")
    assert len(Attribution(AnswerLogp()).score(half, models())) == 2
    with pytest.raises(
        ConfigError, match="PreferenceMargin compares both answers of a pair, and only 'rejected'"
    ):
        Attribution(PreferenceMargin()).score(half, models())


def test_a_gradient_that_is_not_finite_names_the_rows():
    scorer, batch = small.scorer(tied=False), small.batch([4, 8, 15])
    token = batch.answer_ids("rejected")[1][0]
    scorer.model.tok_embeddings.weight.data[token] = torch.inf
    rows = [r for i, r in enumerate(batch.rows) if token in batch.tokens[i] or token in batch.tokens[i + 3]]
    with pytest.raises(
        TrainingDiverged, match=rf"step 4: the attribution of rows \[{', '.join(map(str, rows))}\]"
    ):
        Attribution(AnswerLogp(), model="policy").score(batch, models(scorer, step=3))


def test_an_estimation_says_so_without_a_step():
    scorer, batch = small.scorer(tied=False), small.batch([4, 8, 15])
    scorer.model.tok_embeddings.weight.data[batch.answer_ids("rejected")[1][0]] = torch.inf
    with pytest.raises(TokenprefError, match=r"^the attribution of rows \[.*8.* is nan or infinite; inspect"):
        Attribution(AnswerLogp()).score(batch, replace(models(scorer), trained=False))


def test_a_model_that_embeds_its_tokens_twice_is_refused():
    model = TwoTokens()

    class Again(nn.Module):
        def forward(self, hidden, **_):
            return hidden + model.tok_embeddings(torch.tensor([[1, 2]]))

    model.layers = nn.ModuleList([Again()])
    tokens, labels = torch.tensor([[1, 2]]), torch.tensor([[-100, 2]])
    with pytest.raises(ConfigError, match="ran 2 times in one forward"):
        token_importances(
            ScoringModel(model, padding_free=False), tokens, labels, target=MaxLogit(), sides=("chosen",)
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixture": 1.2}, r"mixture \(lambda\) must be .* got 1.2"),
        ({"norm": "L1"}, "norm must be one of"),
        ({"span": "prompt"}, "span must be one of"),
        ({"model": "policies"}, "did you mean 'policy'"),
        ({"target": "max_logit"}, "target: must be a component with needs_pair"),
        ({"prior": 0.3}, "prior: must be a component"),
        ({"refresh": "never"}, "refresh must be one of"),
        ({"refresh": "every_n_steps"}, "needs a whole number of at least 1, found None"),
        ({"every_n_steps": 3}, "refresh is every_step"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Attribution(**settings)


def test_the_reference_has_to_be_there():
    with pytest.raises(ConfigError, match="this run has none"):
        Attribution(model="reference").score(small.batch([0]), models(reference=NoReference()))


@pytest.mark.parametrize("tied", [True, False])
def test_two_ranks_find_what_one_process_finds(tied):
    """FSDP2, a rank without pairs, and gradients of an earlier micro-batch that must survive."""
    split = [[0, 1], [2]], [[3], []]
    expected = {
        row: [
            weights.tolist()
            for weights in Attribution(AnswerLogp()).score(
                small.batch([row]), models(small.scorer(0, tied=tied))
            )
        ]
        for row in range(4)
    }
    found = {}
    for rank in run_distributed(workers.attribution, split, tied):
        assert rank["grads_unchanged"]
        found.update(rank["weights"])
    assert found.keys() == expected.keys()
    for row, sides in expected.items():
        for one, other in zip(found[row], sides, strict=True):
            assert one == pytest.approx(other, abs=1e-10)
