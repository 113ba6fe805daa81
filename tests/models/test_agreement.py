"""Decoders against config.json files as the models' makers publish them."""

import copy
import json

import pytest
import torch
from support.published import FAMILIES, GEMMA_2B, PHI_3_MINI, SCALING
from torch import nn
from torchtune.models import (
    gemma,
    gemma2,
    llama2,
    llama3_1,
    mistral,
    phi3,
    phi4,
    qwen2,
)
from torchtune.training import FullModelHFCheckpointer

from tokenpref._torchtune import TransformerDecoder
from tokenpref.models import tiny_llama
from tokenpref.models.agreement import compare_with_config, is_tied, pairs_interleaved
from tokenpref.models.scoring import logits_of

LONGEST = 512


def built(make) -> TransformerDecoder:
    with torch.device("meta"):
        return make()


def keys(config, make, longest=LONGEST) -> list[str]:
    return [d.key for d in compare_with_config(config, built(make), longest=longest).differences]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_published_numbers_of_a_family_agree_with_its_builder(name):
    make, config = FAMILIES[name]
    found = compare_with_config(config, built(make), longest=LONGEST)
    assert found.differences == [] and found.notes == []


CHANGES = {
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 15,
    "vocab_size": 128257,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "gelu",
    "tie_word_embeddings": False,
    "mlp_bias": True,
    "partial_rotary_factor": 0.5,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "query_pre_attn_scalar": 224,
    "residual_multiplier": 0.22,
    "no_rope_layers": [1, 1, 1, 0] * 4,
}


@pytest.mark.parametrize("key", CHANGES)
def test_each_number_that_decides_the_function_is_compared(key):
    make, config = FAMILIES["llama3_2"]
    assert key in keys({**config, key: CHANGES[key]}, make)


@pytest.mark.parametrize(
    ("changed", "key"),
    [
        ({"factor": 8.0}, "factor"),
        ({"low_freq_factor": 2.0}, "low_freq_factor"),
        ({"high_freq_factor": 8.0}, "high_freq_factor"),
        ({"original_max_position_embeddings": 4096}, "original_max_position_embeddings"),
        ({"rope_type": "yarn"}, "factor"),
        ({"rope_type": "default"}, "factor"),
    ],
)
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_rotary_scaling_is_compared_in_both_spellings(changed, key, spelling):
    make, config = FAMILIES["llama3_2"]
    config = {k: v for k, v in config.items() if k not in ("rope_scaling", "rope_theta")}
    scaling = {**SCALING, "factor": 32.0, "rope_theta": 500000.0}
    assert keys({**config, spelling: scaling}, make) == []
    assert keys({**config, spelling: {**scaling, **changed}}, make) == [f"{spelling}.{key}"]


def test_scaling_that_begins_beyond_the_trained_positions_matters_to_longer_sequences():
    make, config = FAMILIES["llama2"]
    config = {**config, "max_position_embeddings": 4096, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    assert keys(config, make, longest=4096) == []
    assert keys(config, make, longest=4097) == keys(config, make, longest=None) == ["rope_scaling.rope_type"]


def test_positions_beyond_the_trained_ones_are_noted():
    make, config = FAMILIES["qwen2"]
    assert keys({**config, "max_position_embeddings": 256}, make) == []
    (note,) = compare_with_config({**config, "max_position_embeddings": 256}, built(make), longest=257).notes
    assert "257 tokens" in note and "256" in note


def test_both_spellings_have_to_agree_with_the_builder():
    make, config = FAMILIES["mistral"]
    both = {**config, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    assert keys(both, make) == ["rope_parameters.rope_theta"]


@pytest.mark.parametrize(
    "scaling", [{"type": "linear", "factor": 2.0}, {"rope_type": "yarn", "factor": 4.0}, SCALING]
)
def test_scaling_that_a_plain_builder_does_not_have_is_a_difference(scaling):
    make, config = FAMILIES["llama2"]
    assert keys({**config, "rope_scaling": scaling}, make) == ["rope_scaling.rope_type"]
    assert keys({**config, "rope_scaling": {"type": "linear", "factor": 1.0}}, make) == []


def test_a_window_matters_to_sequences_that_are_longer():
    make, config = FAMILIES["mistral"]
    assert keys(config, make, longest=4096) == []
    assert keys(config, make, longest=4097) == ["sliding_window (with sequences of 4097 tokens)"]
    (note,) = compare_with_config(config, built(make)).notes
    assert "4096" in note
    assert keys({**config, "sliding_window": None}, make, longest=10**6) == []


def test_torchtunes_own_departures_are_seen():
    """Its Phi 4 has the rotary base of Phi 3, and its builders of Gemma 2's sizes exchange two caps."""
    config = {**PHI_3_MINI, "hidden_size": 5120, "intermediate_size": 17920, "num_attention_heads": 40,
              "num_hidden_layers": 40, "num_key_value_heads": 10, "rope_theta": 250000, "sliding_window": None,
              "vocab_size": 100352}  # fmt: skip
    assert keys(config, phi4.phi4_14b) == ["rope_theta"]
    config = {**GEMMA_2B, "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216,
              "num_hidden_layers": 26, "num_key_value_heads": 4, "attn_logit_softcapping": 50.0,
              "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256, "sliding_window": 4096,
              "hidden_activation": "gelu_pytorch_tanh"}  # fmt: skip
    assert keys(config, gemma2.gemma2_2b) == ["attn_logit_softcapping", "final_logit_softcapping"]
    silent = {k: v for k, v in config.items() if not k.endswith("softcapping")}
    assert keys(silent, gemma2.gemma2_2b) == ["attn_logit_softcapping", "final_logit_softcapping"]
    sizes = {"vocab_size": 256000, "num_layers": 26, "num_heads": 8, "num_kv_heads": 4, "head_dim": 256,
             "embed_dim": 2304, "intermediate_dim": 9216, "max_seq_len": 8192}  # fmt: skip
    assert keys(config, lambda: gemma2.gemma2(**sizes)) == keys(silent, lambda: gemma2.gemma2(**sizes)) == []


def test_biases_are_compared():
    make, config = FAMILIES["qwen2"]
    as_llama = {**config, "model_type": "llama", "attention_bias": False}
    assert keys(as_llama, make) == [f"attention_bias (of {name})" for name in "qkv"]


def test_gemmas_embeddings_and_norms_are_told_from_the_others():
    make, config = FAMILIES["gemma"]
    assert "model_type" in keys({**config, "model_type": "llama", "tie_word_embeddings": True}, make)
    make, config = FAMILIES["llama2"]
    assert "model_type" in keys({**config, "model_type": "gemma"}, make)


def test_layers_that_differ_among_themselves_are_seen():
    def make() -> TransformerDecoder:
        model = tiny_llama()
        model.layers[1].sa_norm.eps = 1e-6
        return model

    config = {"model_type": "llama", "hidden_size": 32, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
              "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    (difference,) = compare_with_config(config, make()).differences
    assert difference.built == (1e-5, 1e-6)


def test_what_cannot_be_read_off_a_decoder_is_named():
    model = copy.deepcopy(tiny_llama())

    class OwnAttention(nn.Module):
        pass

    for layer in model.layers:
        layer.attn = OwnAttention()
    found = compare_with_config({"model_type": "llama", "num_attention_heads": 4, "hidden_size": 32,
                                 "tie_word_embeddings": True, "rms_norm_eps": 1e-5}, model)  # fmt: skip
    assert found.differences == []
    said = " ".join(found.notes)
    for key in ("num_attention_heads", "head_dim", "rope_theta", "rope_scaling"):
        assert f"{key} was not compared" in said


def test_an_unknown_family_is_named_and_compared_as_far_as_it_goes():
    make, config = FAMILIES["llama2"]
    found = compare_with_config(
        {**config, "model_type": "granite", "logits_scaling": 8.0}, built(make), longest=9
    )
    assert [d.key for d in found.differences] == ["logits_scaling"]
    assert "granite" in found.notes[0]


def test_head_and_rotary_order():
    assert is_tied(tiny_llama()) and pairs_interleaved(tiny_llama())
    small = {
        "vocab_size": 8,
        "num_layers": 1,
        "num_heads": 2,
        "num_kv_heads": 1,
        "embed_dim": 8,
        "max_seq_len": 8,
    }
    qwen = qwen2.qwen2(**small, intermediate_dim=8)
    assert not is_tied(qwen) and pairs_interleaved(qwen) is False


ODD = (None, True, -1, 0, 2.5, float("nan"), "x", [], [1], {}, {"factor": "x"}, {"rope_type": ["x"]})


@pytest.mark.parametrize("name", ["llama3_2", "mistral", "gemma"])
def test_odd_values_are_differences_and_not_tracebacks(name):
    make, config = FAMILIES[name]
    decoder = built(make)
    for key in {
        *config,
        *CHANGES,
        "rope_parameters",
        "attention_multiplier",
        "text_config",
        "hidden_activation",
    }:
        for value in ODD:
            found = compare_with_config({**config, key: value}, decoder, longest=9)
            assert all(isinstance(d.key, str) for d in found.differences)
    assert keys({**config, "rms_norm_eps": "x", "sliding_window": "x"}, make) == [
        "rms_norm_eps",
        "sliding_window",
    ]


TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
BUILT = {
    "vocab_size": 64,
    "embed_dim": 32,
    "intermediate_dim": 48,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "max_seq_len": 64,
}
LLAMA3_SCALING = {**SCALING, "factor": 8.0, "original_max_position_embeddings": 8192, "rope_theta": 500000.0}
# Caps that the tiny model's scores and logits reach, and a window that is shorter than the sequences.
GEMMA_2 = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window_size": 8, "hidden_capping_value": 0.5,
           "final_capping_value": 0.3}  # fmt: skip
GEMMA_2_SETTINGS = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 8, "attn_logit_softcapping": 0.5,
                    "final_logit_softcapping": 0.3, "attn_implementation": "eager"}  # fmt: skip
PARITY = {
    "Llama": (llama2.llama2, {"norm_eps": 1e-6}, {}, "LLAMA2"),
    "Llama 3.1": (llama3_1.llama3_1, {"norm_eps": 1e-6}, {"rope_parameters": LLAMA3_SCALING}, "LLAMA3"),
    "Mistral": (mistral.mistral, {"norm_eps": 1e-6}, {"sliding_window": None}, "MISTRAL"),
    "Qwen2": (qwen2.qwen2, {"norm_eps": 1e-6, "rope_base": 10000}, {}, "QWEN2"),
    "Phi3": (phi3.phi3, {}, {"pad_token_id": 0, "sliding_window": None}, "PHI3_MINI"),
    "Gemma": (gemma.gemma, {"head_dim": 16}, {"head_dim": 16}, "GEMMA"),
    "Gemma2": (gemma2.gemma2, GEMMA_2, GEMMA_2_SETTINGS, "GEMMA2"),
}


@pytest.mark.parametrize("name", PARITY)
def test_what_agrees_computes_what_transformers_computes(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    make, arguments, settings, model_type = PARITY[name]
    family = name.split()[0]
    config = getattr(transformers, f"{family}Config")(**TINY, **settings)
    theirs = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in theirs.parameters():  # norms and biases too, which begin alike
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    theirs.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    written = json.loads(file.read_text())
    # torchtune's reader of Qwen wants a key that transformers leaves out.
    file.write_text(json.dumps({"tie_word_embeddings": False, **written} if family == "Qwen2" else written))
    decoder = make(**BUILT, **arguments)
    found = compare_with_config(written, decoder, longest=64)
    assert found.differences == [] and found.notes == []
    reader = FullModelHFCheckpointer(
        str(tmp_path / "model"), ["model.safetensors"], model_type, str(tmp_path / "out")
    )
    decoder.load_state_dict(reader.load_checkpoint()["model"])
    tokens = torch.randint(0, 64, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(logits_of(decoder, tokens), theirs(tokens).logits, atol=2e-5, rtol=2e-4)
