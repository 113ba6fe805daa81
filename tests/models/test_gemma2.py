"""torchtune's Gemma 2 against that of transformers, with caps, windows and norms that matter."""

import pytest
import torch
from torchtune.models.gemma2 import gemma2
from torchtune.models.gemma2._convert_weights import gemma2_hf_to_tune, gemma2_tune_to_hf

from tokenpref._torchtune import TransformerSelfAttentionLayer, set_activation_checkpointing
from tokenpref.distributed import single_process_world
from tokenpref.errors import ConfigError
from tokenpref.models.generation import sample
from tokenpref.models.scoring import ScoringModel, logits_of
from tokenpref.ops import token_stats_from_logits
from tokenpref.training import PreferenceTrainer
from tokenpref.training.config.command_line import load_config

transformers = pytest.importorskip("transformers")
VOCAB, WIDTH, HEADS, KV_HEADS, HEAD_DIM = 64, 32, 4, 2, 16
ALL = frozenset({"ref", "kl_ref_policy", "kl_policy_ref", "entropy"})
TOKENS = torch.randint(3, VOCAB, (4, 24), generator=torch.Generator().manual_seed(0))
LABELS = TOKENS.clone()
LABELS[:, :9] = -100
LABELS[1, 17:] = -100


def hf_model(window=8, seed=0, vocab=VOCAB):
    config = transformers.Gemma2Config(
        vocab_size=vocab,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=64,
        query_pre_attn_scalar=24,
        sliding_window=window,
        attn_logit_softcapping=0.8,
        final_logit_softcapping=2.0,
        attn_implementation="eager",
    )
    model = transformers.Gemma2ForCausalLM(config).double().eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.25, generator=generator)
    return model


def to_torchtune(state):
    state = {name: value.clone() for name, value in state.items() if name != "lm_head.weight"}
    return gemma2_hf_to_tune(state, HEADS, KV_HEADS, WIDTH, HEAD_DIM)


def arguments_of(theirs):
    return {
        "vocab_size": theirs.config.vocab_size,
        "num_layers": 3,
        "num_heads": HEADS,
        "num_kv_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "embed_dim": WIDTH,
        "intermediate_dim": 48,
        "max_seq_len": 64,
        "query_pre_attn_scalar": 24,
        "sliding_window_size": theirs.config.sliding_window,
        "hidden_capping_value": 0.8,
        "final_capping_value": 2.0,
    }


def decoder_of(theirs):
    decoder = gemma2(**arguments_of(theirs)).double()
    decoder.load_state_dict(to_torchtune(theirs.state_dict()))
    return decoder


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "activation checkpointing"])
def test_logits_and_the_gradients_of_all_parameters(checkpointed):
    theirs = hf_model()
    decoder = decoder_of(theirs)
    if checkpointed:
        set_activation_checkpointing(decoder, auto_wrap_policy={TransformerSelfAttentionLayer})
    logits = [logits_of(decoder, TOKENS), theirs(TOKENS).logits]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=0)  # rotary tables are float32
    for each in logits:
        each.log_softmax(-1)[..., 5].sum().backward()
    ours = {name: p.grad for name, p in decoder.named_parameters()}
    ours = {name.replace("_checkpoint_wrapped_module.", ""): grad for name, grad in ours.items()}
    ours = gemma2_tune_to_hf(ours, HEADS, KV_HEADS, WIDTH, HEAD_DIM)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, atol=1e-5, rtol=1e-5, msg=name)


def test_token_statistics_and_their_gradients_are_those_of_the_capped_logits():
    theirs, reference = hf_model(), ScoringModel(decoder_of(hf_model(seed=1)), padding_free=False)
    scorer = ScoringModel(decoder_of(theirs), padding_free=False)
    stats = scorer.token_stats(
        TOKENS,
        LABELS,
        needs=ALL,
        ref_hidden=reference.answer_hidden(TOKENS, LABELS).detach(),
        ref_head_weight=reference.head_weight.detach(),
    )
    expected = token_stats_from_logits(
        theirs(TOKENS).logits, logits_of(reference.model, TOKENS), LABELS, needs=ALL
    )
    values = []
    for found in (stats, expected):
        parts = (found.policy_logps, found.kl_ref_policy, found.kl_policy_ref, found.entropy)
        values.append(torch.stack([part.sum() for part in parts]))
    torch.testing.assert_close(*values, atol=1e-5, rtol=0)
    torch.testing.assert_close(stats.ref_logps, expected.ref_logps, atol=1e-6, rtol=0)
    values[0].sum().backward()
    values[1].sum().backward()
    ours = {name: p.grad for name, p in scorer.model.named_parameters()}
    ours = gemma2_tune_to_hf(ours, HEADS, KV_HEADS, WIDTH, HEAD_DIM)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, atol=1e-4, rtol=1e-5, msg=name)


def sampled(decoder, prompts, new):
    return sample(
        decoder,
        prompts,
        seeds=[0] * len(prompts),
        max_new_tokens=new,
        eos_id=1,
        pad_id=0,
        world=single_process_world(),
        temperature=0,
    )


def test_the_likeliest_continuations_are_those_of_transformers():
    theirs = hf_model(window=20)
    prompts = [TOKENS[0, :8].tolist(), TOKENS[1, :5].tolist()]
    found = sampled(decoder_of(theirs), prompts, 12)
    for prompt, ours in zip(prompts, found, strict=True):
        tokens = list(prompt)
        for _ in ours:
            tokens.append(int(theirs(torch.tensor([tokens])).logits[0, -1].argmax()))
        assert tokens[len(prompt) :] == ours


def test_a_run_exports_what_transformers_computes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs = hf_model(vocab=384)
    theirs.float().save_pretrained("base")
    words = [
        "--config",
        "tiny/tdpo",
        *(f"model.{name}={value}" for name, value in arguments_of(theirs).items()),
    ]
    words += ["model._component_=torchtune.models.gemma2.gemma2", "checkpointer.model_type=GEMMA2"]
    words += [
        "checkpointer.checkpoint_dir=base",
        "output_dir=out",
        "max_steps_per_epoch=2",
        "run_val_every_n_steps=null",
    ]

    refused = PreferenceTrainer(load_config([*words, "dry_run=true"]))
    with pytest.raises(
        ConfigError, match=r"model \(torchtune.models.gemma2.gemma2\): .*set padding_free=false"
    ):
        refused.setup()
    refused.close()

    trainer = PreferenceTrainer(load_config([*words, "padding_free=false"]))
    trainer.setup()
    trainer.train()
    trainer.close()
    exported = transformers.AutoModelForCausalLM.from_pretrained("out/epoch_0", attn_implementation="eager")
    with torch.no_grad():
        trained = exported.eval()(TOKENS).logits
        torch.testing.assert_close(logits_of(trainer.policy.model, TOKENS), trained, atol=1e-5, rtol=0)
        assert (trained - theirs(TOKENS).logits).abs().max() > 1e-3


def test_samples_beyond_the_window_are_refused():
    decoder = decoder_of(hf_model(window=20))
    with pytest.raises(ValueError, match=r"need 21 positions.*20.*tokenpref\.models\.causal_lm"):
        sampled(decoder, [TOKENS[0, :8].tolist()], 13)
