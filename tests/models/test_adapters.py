"""Adapters of a decoder: their names and first values, the base without them, and what is refused."""

import math

import pytest
import torch
from support import small
from torchtune.training import compile_model

from tokenpref._torchtune import LoRALinear, TiedLinear
from tokenpref.distributed import single_process_world
from tokenpref.models import FrozenReference, ScoringModel, lora_tiny_llama, tiny_llama
from tokenpref.models.activations import checkpoint_layers
from tokenpref.models.adapters import (
    adapter_names,
    adapter_state,
    adapters_off,
    base_tensors,
    check_adapters,
    has_adapters,
    initial_adapters,
    merged,
)
from tokenpref.models.scoring import logits_of
from tokenpref.stats import split_pair

WORLD = single_process_world()
TOKENS = small.batch([0, 1]).tokens
KINDS = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])


@torch.no_grad()
def logits(decoder):
    return logits_of(decoder, TOKENS)


@KINDS
def test_the_base_has_the_names_of_a_decoder_without_adapters(dora):
    with torch.device("meta"):
        plain, adapted = tiny_llama(), lora_tiny_llama(["q_proj", "v_proj"], use_dora=dora, lora_rank=4)
    parts = ["lora_a.weight", "lora_b.weight", *(["magnitude"] if dora else [])]
    assert sorted(adapter_names(adapted)) == sorted(
        f"layers.{n}.attn.{layer}.{part}" for n in (0, 1) for layer in ("q_proj", "v_proj") for part in parts
    )
    assert base_tensors(adapted).keys() == plain.state_dict().keys()
    assert has_adapters(adapted) and not has_adapters(plain)
    assert base_tensors(plain).keys() == plain.state_dict().keys()


def test_names_do_not_depend_on_activation_checkpointing():
    decoder = small.lora_decoder()
    names, tensors = adapter_names(decoder), base_tensors(decoder).keys()
    checkpoint_layers(decoder)
    assert adapter_names(decoder) == names and base_tensors(decoder).keys() == tensors
    assert adapter_state(decoder, WORLD).keys() == set(names)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@KINDS
def test_new_adapters_change_no_bit(dora, dtype):
    assert torch.equal(
        logits(small.lora_decoder(dora=dora, new=True, dtype=dtype)), logits(small.decoder(dtype=dtype))
    )


@KINDS
def test_adapters_off_computes_the_base(dora):
    decoder = small.lora_decoder(dora=dora)
    base, adapted = logits(small.decoder()), logits(decoder)
    assert not torch.allclose(base, adapted)
    with adapters_off(decoder):
        assert torch.equal(logits(decoder), base)
        with adapters_off(decoder):
            assert torch.equal(logits(decoder), base)
        assert torch.equal(logits(decoder), base)  # the inner block has not switched them on
    assert torch.equal(logits(decoder), adapted)
    with pytest.raises(RuntimeError), adapters_off(decoder):
        raise RuntimeError
    assert torch.equal(logits(decoder), adapted)


def test_layers_compiled_one_by_one_can_be_switched(monkeypatch):
    monkeypatch.setenv(
        "TORCH_COMPILE_BACKEND", "eager"
    )  # what is traced and guarded is the same as with kernels
    torch.compiler.reset()
    decoder = small.lora_decoder()
    base, adapted = logits(small.decoder()), logits(decoder)
    compile_model(decoder, verbose=False)
    for _ in range(2):
        torch.testing.assert_close(logits(decoder), adapted)
        with adapters_off(decoder):
            torch.testing.assert_close(logits(decoder), base)


@KINDS
def test_first_values_depend_on_the_seed_and_the_base_alone(dora):
    decoder = small.lora_decoder(dora=dora)

    def first(seed, **kwargs):
        return initial_adapters(
            decoder, base, seed=seed, compute_dtype=torch.float64, device=torch.device("cpu"), **kwargs
        )

    base = small.decoder().state_dict()
    once = first(5)
    torch.manual_seed(1)
    again, other = first(5), first(6)
    assert once.keys() == set(adapter_names(decoder))
    for name, tensor in once.items():
        assert torch.equal(tensor, again[name])
        if name.endswith("lora_a.weight"):
            assert not torch.equal(tensor, other[name])
            assert tensor.abs().max() <= 1 / math.sqrt(tensor.shape[1])  # as in the LoRA paper's code
        elif name.endswith("lora_b.weight"):
            assert not tensor.any()
        else:
            weight = base[name.replace("magnitude", "weight")]
            torch.testing.assert_close(tensor, weight.square().sum(1).sqrt())


@KINDS
def test_merged_weights_compute_the_same(dora):
    decoder, plain = small.lora_decoder(dora=dora), small.decoder()
    state = decoder.state_dict()
    whole = merged(state, decoder)
    assert list(whole) == [name for name in state if name not in adapter_names(decoder)]
    plain.load_state_dict(whole)
    torch.testing.assert_close(logits(plain), logits(decoder))
    untouched = plain.state_dict()
    assert merged(untouched, plain) == untouched


def test_the_base_of_a_scoring_model_has_its_own_statistics_and_trains_nothing():
    batch = small.batch([0, 1, 2])
    policy = ScoringModel(small.lora_decoder())
    base, twin = policy.base(), small.scorer(frozen=True)
    assert torch.equal(base.logps(batch.tokens, batch.labels), twin.logps(batch.tokens, batch.labels))
    assert torch.equal(base.hidden(batch.tokens), twin.hidden(batch.tokens))
    assert not torch.equal(policy.logps(batch.tokens, batch.labels), twin.logps(batch.tokens, batch.labels))
    assert base.model is policy.model
    assert base.trainable_parameters() == [] and len(policy.trainable_parameters()) == 20
    with pytest.raises(ValueError, match="no adapters"):
        twin.base()


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("needs", [("ref",), ("ref", "kl_ref_policy"), ("kl_policy_ref",)], ids="+".join)
def test_the_policys_base_is_the_reference_that_a_second_model_would_be(needs, checkpointed):
    batch, needs = small.batch([0, 1, 2]), frozenset(needs)

    def scored(reference):
        decoder = small.lora_decoder()
        if checkpointed:
            checkpoint_layers(decoder)
        policy = ScoringModel(decoder, head_memory_mb=0.002)
        with reference(policy).outputs(batch, needs) as ref:
            stats = policy.token_stats(
                batch.tokens,
                batch.labels,
                needs=needs,
                ref_logps=ref.logps,
                ref_hidden=ref.hidden,
                ref_head_weight=ref.head_weight,
                sides=2,
            )
            pair = split_pair(stats, batch.sides)
            values = [
                getattr(side, name)
                for side in (pair.chosen, pair.rejected)
                for name in ("policy_logps", "ref_logps", "kl_ref_policy", "kl_policy_ref")
                if getattr(side, name) is not None
            ]
            sum((value * (n + 1)).sum() for n, value in enumerate(values) if value.requires_grad).backward()
        return values, [p.grad for p in policy.trainable_parameters()]

    second = FrozenReference(small.scorer(0, frozen=True))
    values, grads = scored(lambda policy: FrozenReference(policy.base(), shares_head=True))
    for own, other in zip((values, grads), scored(lambda _: second), strict=True):
        assert len(own) == len(other) >= 2
        for mine, theirs in zip(own, other, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("how", ["plain", "checkpointed", "padded"])
@KINDS
def test_another_adapter_scores_in_the_place_of_the_decoders_own(dora, how):
    batch = small.batch([0, 1, 2])
    decoder, twin = small.lora_decoder(dora=dora), small.lora_decoder(dora=dora)
    state = other_adapter(twin)
    if how == "checkpointed":
        checkpoint_layers(decoder)
    policy, other = (ScoringModel(d, padding_free=how != "padded") for d in (decoder, twin))
    own, wanted = policy.logps(batch.tokens, batch.labels), other.logps(batch.tokens, batch.labels)
    before = {name: tensor.clone() for name, tensor in adapter_state(decoder, WORLD).items()}
    scorer = policy.with_adapter(state, WORLD)
    for _ in range(2):
        assert torch.equal(scorer.logps(batch.tokens, batch.labels), wanted)
        assert torch.equal(policy.logps(batch.tokens, batch.labels), own)
    assert torch.equal(
        policy.base().logps(batch.tokens, batch.labels), scorer.base().logps(batch.tokens, batch.labels)
    )
    assert torch.equal(policy.base().with_adapter(state, WORLD).logps(batch.tokens, batch.labels), wanted)
    with pytest.raises(RuntimeError, match="while it scores"), scorer.switched():
        raise RuntimeError("while it scores")
    for name, tensor in adapter_state(decoder, WORLD).items():
        assert torch.equal(tensor, before[name]), name
    assert scorer.trainable_parameters() == [] and scorer.model is decoder


def test_a_model_without_adapters_takes_none():
    with pytest.raises(ValueError, match="no adapters that could have other values"):
        small.scorer().with_adapter({}, WORLD)


def other_adapter(decoder):
    """Give a decoder another adapter, and return it."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in decoder.named_parameters():
        if name in adapter_names(decoder):
            parameter.data.mul_(1 + 0.5 * torch.rand(parameter.shape, generator=generator))
    return adapter_state(decoder, WORLD)


def test_adapters_that_cannot_be_trained_are_refused():
    with torch.device("meta"):
        decoder = lora_tiny_llama(["q_proj"])
        check_adapters(decoder)
        check_adapters(tiny_llama())
        decoder.layers[1].attn.q_proj = LoRALinear(32, 32, rank=4, alpha=8)
        with pytest.raises(ValueError, match="its adapters differ"):
            check_adapters(decoder)

        class Other(LoRALinear):
            pass

        decoder.layers[1].attn.q_proj = Other(32, 32, rank=8, alpha=16)
        with pytest.raises(
            ValueError, match=r"layers.1.attn.q_proj is a Other; .* use a lora_ or qlora_ builder"
        ):
            check_adapters(decoder)
        assert isinstance(decoder.output, TiedLinear)
        decoder.output = LoRALinear(32, 384, rank=8, alpha=16)
        with pytest.raises(ValueError, match="apply_lora_to_output=false"):
            check_adapters(decoder)


@pytest.mark.parametrize("builder", ["lora_tiny_llama", "lora_smollm2_135m"])
def test_models_that_are_too_small_for_nf4_say_so(builder):
    from tokenpref import models

    with pytest.raises(ValueError, match="quantize_base: NF4 .* set quantize_base=false"):
        getattr(models, builder)(["q_proj"], quantize_base=True)
