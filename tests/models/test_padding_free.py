import pytest
import torch
from support import small
from torchtune.models.gemma import gemma
from torchtune.models.gemma2 import gemma2
from torchtune.models.llama2 import llama2
from torchtune.models.llama3 import llama3
from torchtune.models.phi3 import phi3
from torchtune.models.qwen2 import qwen2
from torchtune.training import compile_model

from tokenpref._torchtune import TransformerSelfAttentionLayer, set_activation_checkpointing
from tokenpref.models.decoder_of import decoder_of
from tokenpref.models.padding_free import PackedRows, Segments
from tokenpref.models.scoring import ScoringModel, logits_of
from tokenpref.ops import AnswerRows

SIZES = {
    "vocab_size": small.VOCAB,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 32,
    "max_seq_len": 16,
    "intermediate_dim": 48,
}
BUILDERS = {
    "llama2": lambda: llama2(**SIZES),
    "llama3": lambda: llama3(**SIZES),
    "phi3": lambda: phi3(**SIZES),
    "qwen2": lambda: qwen2(**SIZES),
    "qwen2 tied": lambda: qwen2(**SIZES, tie_word_embeddings=True),
    "gemma": lambda: gemma(**SIZES, head_dim=8),
}
IGNORED = -100
TOKENS = torch.tensor(
    [
        [5, 6, 7, 8, 9, 0, 0],
        [1, 2, 3, 0, 0, 0, 0],
        [5, 6, 7, 6, 5, 4, 3],
        [1, 1, 1, 0, 0, 0, 0],
    ]
)
LABELS = torch.tensor(
    [
        [IGNORED, IGNORED, 7, IGNORED, 9, IGNORED, IGNORED],
        [IGNORED, 2, 3, IGNORED, IGNORED, IGNORED, IGNORED],
        [IGNORED, IGNORED, IGNORED, 6, 5, 4, 3],
        [IGNORED] * 7,
    ]
)
NEEDS = frozenset({"ref", "kl_ref_policy", "kl_policy_ref", "entropy"})


def randomised(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 or name.endswith("bias"):
            parameter.data.normal_(0, 0.15, generator=generator)
    return model.double()


def combination(stats):
    """One number with another factor for each value."""
    total = 0
    for place, name in enumerate(("policy_logps", "kl_ref_policy", "kl_policy_ref", "entropy")):
        value = getattr(stats, name)
        factors = torch.randn(value.shape, generator=torch.Generator().manual_seed(place), dtype=value.dtype)
        total = total + (value * factors).sum()
    return total


def scored(build, *, padding_free, prepare=lambda model: None, sides=2):
    """Statistics against another model and the gradients of all parameters."""
    policy, reference = randomised(build(), 0), randomised(build(), 1)
    prepare(policy)
    scorer, other = (ScoringModel(model, padding_free=padding_free) for model in (policy, reference))
    with torch.no_grad():
        ref_hidden = other.answer_hidden(TOKENS, LABELS, sides=sides)
    stats = scorer.token_stats(
        TOKENS,
        LABELS,
        needs=NEEDS,
        ref_hidden=ref_hidden,
        ref_head_weight=other.head_weight.detach(),
        sides=sides,
    )
    combination(stats).backward()
    return stats, {name: parameter.grad for name, parameter in policy.named_parameters()}


def assert_alike(found, wanted, of_gradients=1e-6):
    (stats, grads), (wanted_stats, wanted_grads) = found, wanted
    for name in ("policy_logps", "ref_logps", "kl_ref_policy", "kl_policy_ref", "entropy"):
        value = getattr(stats, name)
        assert value[stats.mask].abs().min() > 0
        # torchtune normalises in float32, where a last bit in float64 may turn one in float32.
        torch.testing.assert_close(value, getattr(wanted_stats, name), atol=1e-6, rtol=0)
    assert grads.keys() == wanted_grads.keys()
    for name, grad in wanted_grads.items():
        torch.testing.assert_close(grads[name], grad, atol=of_gradients, rtol=1e-5)


def test_positions_that_something_reads_by_hand():
    packed = PackedRows.of(TOKENS, LABELS, AnswerRows.of(LABELS))
    assert packed.tokens.tolist() == [5, 6, 7, 8, 1, 2, 5, 6, 7, 6, 5, 4]
    assert packed.positions.tolist() == [0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 4, 5]
    assert packed.segments == Segments((4, 2, 6)) and packed.segments.members is None
    assert packed.answers.tolist() == [1, 3, 4, 5, 8, 9, 10, 11]


def test_what_answers_share_enters_once_by_hand():
    # Row 2 begins as row 0 does, with 5 6 7; rows 1 and 3 with 1, of which row 3 reads nothing.
    packed = PackedRows.of(TOKENS, LABELS, AnswerRows.of(LABELS), sides=2)
    assert packed.tokens.tolist() == [5, 6, 7, 8, 1, 2, 6, 5, 4]
    assert packed.positions.tolist() == [0, 1, 2, 3, 0, 1, 3, 4, 5]
    assert packed.segments.lengths == (4, 2, 6)
    assert packed.segments.members.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 6, 7, 8]
    assert packed.segments.firsts.tolist() == [0, 1, 2, 3, 4, 5, 9, 10, 11]
    # The 6 of row 2 is predicted where row 0 predicts its 8.
    assert packed.answers.tolist() == [1, 3, 4, 5, 2, 6, 7, 8]


def test_three_blocks_and_answers_that_are_one_anothers_beginning():
    tokens = torch.tensor([[4, 5, 6, 7], [4, 5, 6, 0], [4, 5, 6, 7]])
    labels = torch.tensor([[IGNORED, 5, 6, 7], [IGNORED, 5, 6, IGNORED], [IGNORED, 5, 6, 7]])
    packed = PackedRows.of(tokens, labels, AnswerRows.of(labels), sides=3)
    assert packed.tokens.tolist() == [4, 5, 6, 5, 6]  # each keeps its last position
    assert packed.segments.members.tolist() == [0, 1, 2, 0, 3, 0, 1, 4]
    assert packed.answers.tolist() == [0, 1, 2, 0, 3, 0, 1, 4]


def test_runs_of_one_length():
    assert list(Segments((3, 3, 2, 3)).runs()) == [(2, 3), (1, 2), (1, 3)]


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("sides", [1, 2])
def test_padding_changes_nothing(name, sides):
    build = BUILDERS[name]
    assert_alike(scored(build, padding_free=True, sides=sides), scored(build, padding_free=False))


@pytest.mark.parametrize("name", ["llama3", "qwen2"])
def test_checkpointed_layers_compute_the_same(name):
    def checkpoint(model):
        set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})

    found, grads = scored(BUILDERS[name], padding_free=True, prepare=checkpoint)
    grads = {key.replace("_checkpoint_wrapped_module.", ""): grad for key, grad in grads.items()}
    assert_alike((found, grads), scored(BUILDERS[name], padding_free=False))


def test_compiled_layers_compute_the_same():
    def compiled(model):
        compile_model(model, verbose=False)

    found, grads = scored(BUILDERS["llama3"], padding_free=True, prepare=compiled)
    grads = {key.replace("_orig_mod.", ""): grad for key, grad in grads.items()}
    # A compiler orders the float32 sums of the norms as the CPU's vectors are wide: with AVX-512 one gradient differs by 1.3e-6.
    assert_alike((found, grads), scored(BUILDERS["llama3"], padding_free=False), of_gradients=2e-6)


def test_only_the_positions_that_are_read_meet_a_layer():
    scorer = small.scorer()
    seen = []
    scorer.model.layers[0].mlp.register_forward_hook(lambda _m, inputs, _out: seen.append(inputs[0].shape))
    scorer.logps(TOKENS, LABELS)
    scorer.logps(TOKENS, LABELS, sides=2)
    assert seen == [torch.Size([12, 1, 32]), torch.Size([9, 1, 32])]


def test_a_batch_without_labels_still_runs_and_adds_nothing():
    scorer = small.scorer()
    seen = []
    scorer.model.layers[0].register_forward_hook(lambda _m, inputs, _out: seen.append(inputs[0].shape))
    stats = scorer.token_stats(TOKENS, torch.full_like(LABELS, IGNORED), needs=frozenset())
    assert seen == [torch.Size([1, 1, 32])]
    assert stats.policy_logps.shape == (4, 6) and not stats.mask.any()
    stats.policy_logps.sum().backward()
    assert all(not parameter.grad.any() for parameter in scorer.model.parameters())


def test_hidden_states_of_answers():
    scorer = small.scorer()
    rows = AnswerRows.of(LABELS)
    torch.testing.assert_close(
        scorer.answer_hidden(TOKENS, LABELS), rows.take(scorer.hidden(TOKENS)), atol=1e-13, rtol=0
    )


def test_padded_forwards_go_on_as_before():
    model = small.decoder()
    logits = logits_of(model, TOKENS)
    mask = torch.ones(4, 7, 7, dtype=torch.bool).tril()
    decoder_of(model).install_padding_free()
    decoder_of(model).install_padding_free()  # once is enough
    assert torch.equal(logits_of(model, TOKENS), logits)
    torch.testing.assert_close(logits_of(model, TOKENS, mask=mask), logits, atol=1e-13, rtol=0)


def test_more_positions_than_the_context_but_no_longer_sequence():
    scorer = small.scorer()  # of 64 positions
    tokens = torch.randint(1, small.VOCAB, (3, 40), generator=torch.Generator().manual_seed(0))
    labels = tokens.clone()
    labels[:, :5] = IGNORED
    plain = ScoringModel(small.decoder(), padding_free=False)
    torch.testing.assert_close(scorer.logps(tokens, labels), plain.logps(tokens, labels), atol=1e-12, rtol=0)
    long = torch.ones(1, 66, dtype=torch.long)
    with pytest.raises(ValueError, match="65 tokens.*context is 64"):
        scorer.logps(long, long)


def test_another_attention_is_refused_and_works_padded():
    def build():
        # Its layers turn the mask into a sliding window of their own.
        return gemma2(**SIZES, head_dim=8)

    with pytest.raises(TypeError, match="padding_free=false"):
        decoder_of(build()).install_padding_free()

    model = small.decoder()
    model.layers[1].attn.is_causal = False
    with pytest.raises(TypeError, match="2 layers, 1 of them"):
        ScoringModel(model)
    assert ScoringModel(model, padding_free=False).logps(TOKENS, LABELS).shape == (4, 6)
