import copy

import pytest
import torch
from support import small
from torch import nn
from torchtune.modules import TransformerDecoder

from tokenpref.models.decoder_of import decoder_of
from tokenpref.models.scoring import ScoringModel, logits_of
from tokenpref.ops import token_stats_from_logits

NEEDS = frozenset({"ref", "kl_ref_policy", "kl_policy_ref", "entropy"})
NAMES = ("policy_logps", "ref_logps", "kl_ref_policy", "kl_policy_ref", "entropy")
BATCH = small.batch([0, 1, 2])


def own_logits(model, tokens=BATCH.tokens):
    """What an untouched decoder returns, in its own dtype."""
    model.set_num_output_chunks(1)
    return model(tokens)[0]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tied(request):
    return request.param


def combination(stats):
    """One number with another factor for each value of each statistic that carries gradient."""
    total = 0
    for place, name in enumerate(name for name in NAMES if name != "ref_logps"):
        value = getattr(stats, name)
        factors = torch.randn(value.shape, generator=torch.Generator().manual_seed(place), dtype=value.dtype)
        total = total + (value * factors).sum()
    return total


@pytest.mark.parametrize("memory_mb", [1e-4, 0.01, 100])
def test_statistics_are_those_of_the_decoders_logits(tied, memory_mb):
    plain, reference = small.decoder(0, tied=tied), small.decoder(1, tied=tied)
    weights = torch.rand(BATCH.labels.shape[0], BATCH.labels.shape[1] - 1, dtype=torch.float64)
    with torch.no_grad():
        ref_logits = own_logits(reference)
    expected = token_stats_from_logits(
        own_logits(plain), ref_logits, BATCH.labels, needs=NEEDS, weights=weights
    )
    combination(expected).backward()

    scorer = ScoringModel(small.decoder(0, tied=tied), head_memory_mb=memory_mb)
    other = ScoringModel(reference)
    with torch.no_grad():
        ref_hidden = other.answer_hidden(BATCH.tokens, BATCH.labels)
    stats = scorer.token_stats(
        BATCH.tokens,
        BATCH.labels,
        needs=NEEDS,
        ref_hidden=ref_hidden,
        ref_head_weight=other.head_weight.detach(),
        weights=weights,
    )
    combination(stats).backward()
    assert torch.equal(stats.mask, BATCH.labels[:, 1:] != -100)
    for name in (*NAMES, "weights"):
        found = getattr(stats, name)
        assert found.dtype == torch.float64 and found[stats.mask].abs().min() > 0
        torch.testing.assert_close(found, getattr(expected, name), atol=1e-12, rtol=0)
    for (name, found), (_, wanted) in zip(
        scorer.model.named_parameters(), plain.named_parameters(), strict=True
    ):
        torch.testing.assert_close(found.grad, wanted.grad, atol=1e-12, rtol=1e-10, msg=name)


def test_scoring_changes_neither_logits_nor_names(tied):
    model = small.decoder(0, tied=tied)
    names, logits = list(model.state_dict()), own_logits(copy.deepcopy(model))
    scorer = ScoringModel(model)
    scorer.logps(BATCH.tokens, BATCH.labels)
    assert list(model.state_dict()) == names and ("output.weight" in names) is not tied
    for found in (logits_of(model, BATCH.tokens), own_logits(model)):
        torch.testing.assert_close(found, logits, atol=0, rtol=0)
    assert scorer.head_weight is (model.tok_embeddings.weight if tied else model.output.weight)
    model.load_state_dict(small.decoder(3, tied=tied).state_dict())
    torch.testing.assert_close(
        logits_of(model, BATCH.tokens), own_logits(small.decoder(3, tied=tied)), atol=0, rtol=0
    )


def test_a_copy_has_a_head_of_its_own(tied):
    scorer = small.scorer(0, tied=tied)
    logits_of(scorer.model, BATCH.tokens)
    twin = ScoringModel(copy.deepcopy(scorer.model))
    with torch.no_grad():
        twin.head_weight.zero_()
        assert logits_of(twin.model, BATCH.tokens).abs().max() == 0
        assert logits_of(scorer.model, BATCH.tokens).abs().max() > 0


def test_logits_keep_the_models_dtype(tied):
    model = small.decoder(0, tied=tied, dtype=torch.bfloat16)
    assert model(BATCH.tokens).dtype == torch.float32  # torchtune's decoder casts
    assert logits_of(model, BATCH.tokens).dtype == torch.bfloat16


def test_a_decoder_with_a_forward_of_its_own_is_refused():
    class Other(TransformerDecoder):
        def forward(self, tokens, **kwargs):
            return super().forward(tokens, **kwargs) / 2

    model = small.decoder(0)
    model.__class__ = Other
    with pytest.raises(TypeError, match="Other has a forward of its own"):
        ScoringModel(model)


@pytest.mark.parametrize(
    "layer", [nn.Linear(32, small.VOCAB, bias=True), nn.Sequential(nn.Linear(32, small.VOCAB, bias=False))]
)
def test_other_output_layers_are_refused_and_stay(layer):
    model = small.decoder(0, tied=False)
    model.output = layer.double()
    with pytest.raises(
        TypeError, match=f"output layer is {type(layer).__name__}; token statistics need a plain linear head"
    ):
        decoder_of(model).check()
    assert model.output is layer
    assert model(BATCH.tokens).shape == (6, 12, small.VOCAB)


@torch.no_grad()
def test_next_token_logits_are_the_last_column(tied):
    model = small.decoder(0, tied=tied)
    for tokens in (BATCH.tokens, BATCH.tokens[:1, :1]):
        last = decoder_of(model).next_token_logits(tokens)
        torch.testing.assert_close(last, logits_of(model, tokens)[:, -1], atol=1e-13, rtol=0)
    # Keywords reach the decoder: positions shifted by one turn the rotary pairs of single tokens only together.
    positions = torch.arange(12).flip(0).expand(6, 12)
    torch.testing.assert_close(
        decoder_of(model).next_token_logits(BATCH.tokens, positions=positions),
        logits_of(model, BATCH.tokens, positions=positions)[:, -1],
        atol=1e-13,
        rtol=0,
    )


def test_hidden_states_times_the_head_are_the_logits(tied):
    scorer = small.scorer(0, tied=tied)
    hidden = scorer.hidden(BATCH.tokens)
    assert hidden.shape == (6, 12, 32) and hidden.requires_grad
    torch.testing.assert_close(
        hidden @ scorer.head_weight.T, logits_of(scorer.model, BATCH.tokens), atol=1e-13, rtol=0
    )


def test_logps_have_no_gradient_and_are_zero_off_the_answer(tied):
    scorer = small.scorer(0, tied=tied)
    logps = scorer.logps(BATCH.tokens, BATCH.labels)
    assert not logps.requires_grad and logps.shape == (6, 11)
    whole = logits_of(scorer.model, BATCH.tokens).log_softmax(-1)
    for row in range(6):
        for column in range(11):
            label = int(BATCH.labels[row, column + 1])
            expected = 0.0 if label == -100 else whole[row, column, label].item()
            assert logps[row, column].item() == pytest.approx(expected, abs=1e-12)


def test_what_does_not_fit_is_refused(tied):
    scorer = small.scorer(0, tied=tied)
    with pytest.raises(ValueError, match="ref_hidden"):
        scorer.token_stats(BATCH.tokens, BATCH.labels, needs=frozenset({"kl_ref_policy"}))
    too_long = torch.ones(1, 66, dtype=torch.long)
    for call in (
        scorer.hidden,
        lambda tokens: scorer.decoder.next_token_logits(tokens),
        lambda tokens: scorer.logps(tokens, tokens),
    ):
        with pytest.raises(ValueError, match="a sequence has 6[56] tokens and the model's context is 64"):
            call(too_long)
