import copy
import math
from functools import cache

import numpy as np
import pytest
import torch
from support import families, small, workers

from tokenpref.distributed import full_state_dict, load_full_state_dict, single_process_world
from tokenpref.distributed.testing import run_distributed
from tokenpref.errors import ConfigError
from tokenpref.losses import DPOLoss, TokenDPOLoss
from tokenpref.models import CausalLMCheckpointer
from tokenpref.models.activations import checkpoint_layers
from tokenpref.models.decoder_of import decoder_of
from tokenpref.models.float8 import Float8, convert_to_float8
from tokenpref.models.generation import sample
from tokenpref.models.padding_free import PackedRows
from tokenpref.models.reference import FrozenReference
from tokenpref.models.scoring import ScoringModel
from tokenpref.ops import AnswerRows, token_stats_from_logits
from tokenpref.stats import split_pair
from tokenpref.training.config.compute import Compute
from tokenpref.training.credit.gradients import token_importances
from tokenpref.training.loading.models import place_decoder
from tokenpref.weights.attribution import AnswerLogp

BATCH = small.batch([0, 1, 2, 3])
TDPO2 = TokenDPOLoss(beta=0.5, alpha=0.7)
PROMPTS = [[5, 9], [7, 3, 11, 60, 2 + 40, 8, 9, 90, 4], [44, 4, 61, 12, 30]]

every_family = pytest.mark.parametrize("family", families.FAMILIES)


@pytest.fixture(scope="module", autouse=True)
def quiet():
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Writes the config of a family once."""

    @cache
    def written(family):
        return families.folder_of(tmp_path_factory.mktemp(family), families.config_of(family))

    return written


def one_at_a_time(own, tokens=BATCH.tokens, labels=BATCH.labels):
    """Logits ``[B, L, V]`` of a model of transformers, of which each sequence is a batch of its own; 0 after its end."""
    lengths = torch.where(labels != -100, torch.arange(labels.shape[1]) + 1, 0).amax(1).tolist()
    rows = [
        own(input_ids=row[None, :n], use_cache=False).logits[0]
        for row, n in zip(tokens, lengths, strict=True)
    ]
    return torch.stack([torch.nn.functional.pad(row, (0, 0, 0, tokens.shape[1] - len(row))) for row in rows])


def loss_of(stats):
    return TDPO2(split_pair(stats)).losses.sum()


def scored(policy, reference):
    """Statistics of the batch."""
    with reference.outputs(BATCH, TDPO2.needs) as outputs:
        return policy.token_stats(
            BATCH.tokens,
            BATCH.labels,
            needs=TDPO2.needs,
            ref_logps=outputs.logps,
            ref_hidden=outputs.hidden,
            ref_head_weight=outputs.head_weight,
            sides=2,
        )


def gradients(model, needed=None):
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if needed is None or name in needed
    }


@every_family
def test_statistics_and_gradients_are_those_of_the_models_own_logits(family, folder):
    own, own_reference = (families.own_model(families.config_of(family), seed) for seed in (0, 1))
    made = {
        padding_free: [
            ScoringModel(
                families.ours(folder(family), model), padding_free=padding_free, head_memory_mb=0.005
            )
            for model in (own, own_reference)
        ]
        for padding_free in (True, False)
    }
    with families.Float64():
        with torch.no_grad():
            ref_logits = one_at_a_time(own_reference)
        expected = token_stats_from_logits(one_at_a_time(own), ref_logits, BATCH.labels, needs=TDPO2.needs)
        loss_of(expected).backward()
        for policy, reference in made.values():
            found = scored(policy, FrozenReference(reference))
            loss_of(found).backward()
            for name in ("policy_logps", "ref_logps", "kl_ref_policy"):
                torch.testing.assert_close(getattr(found, name), getattr(expected, name), atol=1e-9, rtol=0)
            grads = gradients(policy.model)
            for name, wanted in gradients(own, grads).items():
                assert wanted is None or wanted.abs().max() > 1e-6, name
                torch.testing.assert_close(grads[name], wanted, atol=1e-9, rtol=0, msg=name)


@every_family
def test_packed_rows_are_the_sequences_one_at_a_time(family, folder):
    own = families.own_model(families.config_of(family))
    rows = AnswerRows.of(BATCH.labels)
    decoder = decoder_of(families.ours(folder(family), own))
    decoder.install_padding_free()
    with families.Float64(), torch.no_grad():
        expected = rows.take(one_at_a_time(own))
        for sides in (1, 2):  # with two, what both answers of a pair begin with enters once
            packed = PackedRows.of(BATCH.tokens, BATCH.labels, rows, sides)
            found = decoder.run_packed(packed, lambda hidden, weight: decoder.final_logits(hidden, weight))
            torch.testing.assert_close(found[packed.answers], expected, atol=1e-9, rtol=0)
    decoder.prove(padding_free=True)


@every_family
def test_the_first_loss_is_log_2_and_checkpointing_changes_no_bit(family, folder):
    own = families.own_model(families.config_of(family), dtype=torch.float32)
    reference = FrozenReference(ScoringModel(families.ours(folder(family), own).requires_grad_(False)))
    results = []
    for checkpointed in (False, True):
        policy = ScoringModel(families.ours(folder(family), own).train())
        if checkpointed:
            checkpoint_layers(policy.model)
        stats = scored(policy, reference)
        for loss in (DPOLoss(), TDPO2):
            assert loss(split_pair(stats)).losses.tolist() == [pytest.approx(math.log(2), rel=1e-7)] * 4
        assert torch.equal(stats.policy_logps, stats.ref_logps)
        loss_of(stats).backward()
        results.append(
            [stats.policy_logps, *(p.grad for p in policy.model.parameters() if p.grad is not None)]
        )
    assert len(results[0]) == len(results[1])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_family
def test_filled_from_a_folder_trained_and_read_by_transformers_again(family, folder, tmp_path):
    from transformers import AutoModelForCausalLM

    world = single_process_world()
    own = families.own_model(families.config_of(family), dtype=torch.float32)
    own.save_pretrained(tmp_path / "start")
    checkpointer = CausalLMCheckpointer(str(tmp_path / "start"), str(tmp_path / "out"))
    with torch.device("meta"):
        model = families.causal_lm_of(str(tmp_path / "start"), torch.float32)
    place_decoder(model, Compute(dtype=torch.float32), world, trainable=True)
    load_full_state_dict(model, checkpointer.load_checkpoint()["model"], world)
    model.eval().set_attn_implementation("eager")

    def logits_of(model):
        with torch.no_grad():
            return model(input_ids=BATCH.tokens, use_cache=False).logits

    assert torch.equal(logits_of(model), logits_of(own))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0625)
    checkpointer.save_checkpoint({"model": full_state_dict(model, world)}, epoch=0)
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out" / "epoch_0", dtype=torch.float32, attn_implementation="eager"
    )
    assert torch.equal(logits_of(model), logits_of(again))


def greedy(model, prompts, count):
    return sample(
        model,
        prompts,
        seeds=[0] * len(prompts),
        max_new_tokens=count,
        eos_id=families.VOCAB,
        pad_id=0,
        world=single_process_world(),
        temperature=0,
    )


def generated(own, prompt, count):
    """What transformers itself continues a prompt with."""
    from transformers import GenerationConfig

    own.generation_config = GenerationConfig(pad_token_id=0)
    out = own.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
    return out[0, len(prompt) :].tolist()


@every_family
def test_greedy_samples_are_those_of_transformers(family, folder):
    own = families.own_model(families.config_of(family))
    expected = [generated(own, prompt, 8) for prompt in PROMPTS]
    assert len({token for row in expected for token in row}) > 6  # they have something to say
    for padding_free in (True, False):
        scorer = ScoringModel(families.ours(folder(family), own), padding_free=padding_free)
        with families.Float64():
            assert greedy(scorer.model, PROMPTS, 8) == expected


@every_family
def test_attribution_is_the_gradient_at_the_embeddings(family, folder):
    own = families.own_model(families.config_of(family))
    scorers = [ScoringModel(families.ours(folder(family), own), padding_free=free) for free in (True, False)]
    with families.Float64():
        embedded = own.get_input_embeddings()(BATCH.tokens).detach().requires_grad_()
        logits = own(inputs_embeds=embedded, use_cache=False).logits
        stats = token_stats_from_logits(logits, None, BATCH.labels, needs=frozenset())
        (gradient,) = torch.autograd.grad(stats.policy_logps.sum(), embedded)
        for scorer in scorers:
            found = token_importances(scorer, BATCH.tokens, BATCH.labels, target=AnswerLogp())
            torch.testing.assert_close(found, gradient.abs().sum(-1), atol=1e-9, rtol=1e-9)


@every_family
def test_adapters(family, folder):
    own = families.own_model(families.config_of(family))
    model = families.ours(folder(family), own, {"rank": 2, "alpha": 4})
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert names and not any(name.startswith(decoder_of(model).head_name) for name in names)
    with families.Float64(), torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        merged = copy.deepcopy(own)
        for name in names:
            if name.endswith("lora_a.weight"):
                layer = name.removesuffix(".lora_a.weight")
                adapted = model.get_submodule(layer)
                merged.get_submodule(layer).weight += 2 * adapted.lora_b.weight @ adapted.lora_a.weight
        scorer = ScoringModel(model)
        for side, expected in ((scorer, merged), (scorer.base(), own)):
            stats = token_stats_from_logits(one_at_a_time(expected), None, BATCH.labels, needs=frozenset())
            found = side.logps(BATCH.tokens, BATCH.labels, sides=2)
            torch.testing.assert_close(found, stats.policy_logps, atol=1e-9, rtol=0)


def test_two_ranks_do_the_steps_of_one_process(folder, tmp_path):
    def untied(family):
        config = families.config_of(family, {**families.FAMILIES[family], "tie_word_embeddings": False})
        return families.folder_of(tmp_path / family, config)

    def tied(family):
        config = families.config_of(family, {**families.FAMILIES[family], "tie_word_embeddings": True})
        return families.folder_of(tmp_path / f"{family}_tied", config)

    cases = [
        (folder("qwen3"), "float64"),
        (tied("qwen3"), "float64"),
        (folder("gemma3_text"), "float64"),
        (untied("gemma3_text"), "float64"),
        (folder("deepseek_v3"), "float64"),
        (folder("qwen3_moe"), "float32"),
    ]
    rows = [[[0, 1], [2]], [[3], []]]
    first, second = run_distributed(workers.causal_lm_steps, cases, rows)
    alone = workers.causal_lm_steps(single_process_world(), cases, [[[0, 1, 2, 3]]])
    for (path, dtype), found, other, expected in zip(cases, first, second, alone, strict=True):
        tolerance = 1e-9 if dtype == "float64" else 2e-4
        assert found["norm"] == pytest.approx(expected["norm"], rel=tolerance), path
        assert found["norm"] == other["norm"] and found["metrics"] == other["metrics"]
        for name, value in expected["metrics"].items():
            assert found["metrics"][name] == pytest.approx(value, rel=tolerance, abs=tolerance), (path, name)
        assert found["state"].keys() == expected["state"].keys()
        for name, tensor in expected["state"].items():
            np.testing.assert_allclose(
                found["state"][name], tensor, rtol=0, atol=tolerance, err_msg=f"{path}: {name}"
            )
        assert found["samples"] == expected["samples"]


# --- what is refused


@pytest.mark.parametrize("name", families.PADDED)
def test_other_attentions_are_refused_and_work_padded(name, tmp_path):
    config = families.padded_config_of(name)
    path, own = families.folder_of(tmp_path, config), families.own_model(config)
    scorer = ScoringModel(families.ours(path, own))
    with pytest.raises(ConfigError, match="padding_free=false") as refusal:
        scorer.decoder.prove(padding_free=True)
    assert str(refusal.value).startswith("model: ")
    padded = ScoringModel(families.ours(path, own), padding_free=False)
    with families.Float64(), torch.no_grad():
        padded.decoder.prove(padding_free=False)
        expected = token_stats_from_logits(one_at_a_time(own), None, BATCH.labels, needs=frozenset())
        found = padded.logps(BATCH.tokens, BATCH.labels)
        torch.testing.assert_close(found, expected.policy_logps, atol=1e-9, rtol=0)
        found = greedy(padded.model, PROMPTS, 8)
    assert found == [generated(own, prompt, 8) for prompt in PROMPTS]


def test_chunks_longer_than_the_proof_are_refused(tmp_path):
    name, settings = families.PADDED["llama4_text"]
    config = families.config_of(name, {**settings, "attention_chunk_size": 8192})
    path, own = families.folder_of(tmp_path, config), families.own_model(config)
    with pytest.raises(
        ConfigError, match=r"model: Llama4TextAttention does not see all keys before it.*padding_free=false"
    ):
        ScoringModel(families.ours(path, own)).decoder.prove(padding_free=True)


@pytest.mark.parametrize("window", [3, 4096])
def test_windows_longer_than_the_proof_are_compared_as_rules(window, tmp_path):
    settings = {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": window}
    config = families.config_of("qwen2", settings)
    path, own = families.folder_of(tmp_path, config), families.own_model(config)
    model = families.ours(path, own)
    ScoringModel(model).decoder.prove(padding_free=True)
    for wrong in (window - 1, window + 1, 2 * window, None):
        model.model.layers[2].self_attn.sliding_window = wrong
        with pytest.raises(ConfigError, match="padding_free=false"):
            decoder_of(model).prove(padding_free=True)
    model.model.layers[2].self_attn.sliding_window = window
    model.model.layers[0].self_attn.sliding_window = window  # this one sees all keys
    with pytest.raises(ConfigError, match="padding_free=false"):
        decoder_of(model).prove(padding_free=True)


def test_a_model_that_fails_in_its_own_code_is_named(folder):
    model = families.ours(folder("qwen3"), families.own_model(families.config_of("qwen3")))
    scorer = ScoringModel(model)
    model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(
        ConfigError, match=r"^model: Qwen3ForCausalLM fails in its own forward \(ZeroDivisionError: "
    ):
        scorer.decoder.prove(padding_free=True)


def test_a_head_that_does_more_is_refused(folder):
    model = families.ours(folder("granite"), families.own_model(families.config_of("granite")))
    model.config.logits_scaling, forward = 1.0, model.forward

    def scaled(**arguments):
        output = forward(**arguments)
        output.logits = output.logits * 2
        return output

    model.forward = scaled
    with pytest.raises(ConfigError, match="makes its logits from its last hidden states in another way"):
        ScoringModel(model).decoder.prove(padding_free=True)


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_the_attention_of_padded_batches_is_compared(folder, factor):
    from transformers import AttentionInterface

    def attention(module, q, k, v, mask, scaling, **_):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        output = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=factor * scaling
        )
        return output.transpose(1, 2), None

    AttentionInterface.register("careless", attention)
    model = families.ours(folder("qwen3"), families.own_model(families.config_of("qwen3")))
    model.set_attn_implementation("careless")
    if factor == 1:
        decoder_of(model).prove(padding_free=False)
    else:
        with pytest.raises(ConfigError, match="something else with the attention 'careless' than with eager"):
            decoder_of(model).prove(padding_free=False)


def test_soft_caps_are_left_to_eager_attention(folder):
    model = families.ours(folder("gemma2"), families.own_model(families.config_of("gemma2")))
    assert model.config._attn_implementation == "eager"
    decoder_of(model).prove(padding_free=False)


def test_noise_in_training_is_refused(tmp_path):
    settings = families.FAMILIES["mixtral"]
    for noise in (0.0, 0.1):
        config = families.config_of("mixtral", {**settings, "router_jitter_noise": noise})
        scorer = ScoringModel(families.ours(families.folder_of(tmp_path, config), families.own_model(config)))
        if noise:
            with pytest.raises(ConfigError, match=r"draws random numbers in training.*config.json"):
                scorer.decoder.prove(padding_free=True)
            assert not scorer.model.training
        else:
            scorer.decoder.prove(padding_free=True)


@pytest.mark.parametrize("family", ["gemma3_text", "qwen3_moe", "mixtral", "deepseek_v3"])
def test_rounding_is_not_refused(family, folder):
    # Some of these weights let a token in a row go to other experts where sequences are packed.
    for seed in range(5):
        model = families.randomise(families.causal_lm_of(folder(family), torch.bfloat16), seed)
        ScoringModel(model).decoder.prove(padding_free=True)


@pytest.mark.parametrize("name", families.PADDED)
def test_other_attentions_are_refused_in_bfloat16(name, tmp_path):
    path = families.folder_of(tmp_path, families.padded_config_of(name))
    for seed in range(3):
        model = families.randomise(families.causal_lm_of(path, torch.bfloat16), seed)
        with pytest.raises(ConfigError, match="set padding_free=false"):
            ScoringModel(model).decoder.prove(padding_free=True)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_rounding_to_float8_is_not_refused(recipe, tmp_path):
    config = families.config_of("qwen3", {"intermediate_size": 64, "hidden_size": 64, "head_dim": 16})
    model = families.causal_lm_of(families.folder_of(tmp_path, config), torch.float32)
    families.randomise(model)
    assert convert_to_float8(model, Float8(recipe, emulate=True), sharded=False)
    ScoringModel(model).decoder.prove(padding_free=True)


# --- what is built


@pytest.mark.parametrize("family", ["llama", "phi3", "starcoder2", "gpt_neox", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_dtype_no_dropout_and_no_loss_of_routers(family, dtype, folder):
    with torch.device("meta"):
        model = families.causal_lm_of(folder(family), dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))
    config = model.config.to_dict()
    assert not any(value for name, value in config.items() if "dropout" in name or "pdrop" in name)
    assert not config.get("output_router_logits")


def test_a_config_without_a_context(tmp_path, folder):
    assert decoder_of(families.causal_lm_of(folder("llama"), torch.float32)).context == 64
    path = families.folder_of(tmp_path, families.config_of("bloom", {"max_position_embeddings": None}))
    assert decoder_of(families.causal_lm_of(path, torch.float32)).context == 1 << 20
