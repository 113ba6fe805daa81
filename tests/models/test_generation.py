import numpy as np
import pytest
import torch
from support import sampling, small

from tokenpref.distributed import single_process_world
from tokenpref.distributed.testing import run_distributed
from tokenpref.errors import TokenprefError
from tokenpref.models.generation import sample, sampling_probabilities
from tokenpref.models.scoring import logits_of

NEVER = small.VOCAB  # an end that is in no vocabulary
PROMPTS = [[5], [9, 8, 7, 3, 2, 11, 30], [4, 4], [17, 2, 40, 1], [33, 12, 6, 6, 6]]
SEEDS = [3, 1, 4, 1, 59]
SETTINGS = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.6},
    {"temperature": 0.9, "top_k": 12, "top_p": 0.8},
]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request):
    made = small.decoder(0, tied=request.param)
    made.tok_embeddings.weight.data *= 3  # sharper distributions: settings differ from one another
    return made


def run(model, prompts=PROMPTS, seeds=SEEDS, *, count=9, eos=NEVER, **settings):
    """Continuations in a world of one."""
    settings = {"batch_size": 8, **settings}
    return sample(
        model,
        prompts,
        seeds=seeds,
        max_new_tokens=count,
        eos_id=eos,
        pad_id=0,
        world=single_process_world(),
        **settings,
    )


def recomputed(model, prompt, seed, count, temperature=1.0, top_k=None, top_p=None):
    """The same, one row and one whole forward a token, with the truncations written out over a sorted list."""
    noise = torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).numpy()
    tokens = list(prompt)
    for step in range(count):
        with torch.no_grad():
            logits = logits_of(model, torch.tensor([tokens]))[0, -1].double().numpy()
        likeliest = sorted(range(len(logits)), key=lambda i: -logits[i])
        if temperature == 0:
            tokens.append(likeliest[0])
            continue
        kept = likeliest[:top_k]
        mass = {i: np.exp((logits[i] - logits[kept[0]]) / temperature) for i in kept}
        if top_p is not None:
            total, reached, short = sum(mass.values()), 0.0, {}
            for i in kept:
                if reached < top_p:
                    short[i] = mass[i]
                reached += mass[i] / total
            mass = short
        target = noise[step] * sum(mass.values())
        for i in sorted(mass):
            target -= mass[i]
            if target < 0:
                break
        tokens.append(i)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_cache_and_left_padding_change_nothing(model, settings):
    outputs = run(model, **settings)
    assert outputs == [
        recomputed(model, prompt, seed, 9, **settings) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]
    assert len({tuple(row) for row in outputs}) == len(outputs)  # the rows have something to say


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 100])
def test_a_row_depends_on_no_other(model, batch_size):
    alone = [run(model, [prompt], [seed])[0] for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
    assert run(model, batch_size=batch_size) == alone
    assert run(model, PROMPTS[::-1], SEEDS[::-1], batch_size=batch_size) == alone[::-1]


def test_a_seed_gives_one_continuation_and_another_seed_another(model):
    first = run(model)
    assert run(model) == first
    assert all(a != b for a, b in zip(run(model, seeds=[s + 1000 for s in SEEDS]), first, strict=True))
    assert [row[:4] for row in first] == run(model, count=4)  # the length asked for does not shift the noise


def test_the_end_is_kept_and_ends_its_row_alone(model):
    free = run(model)
    for end in {row[3] for row in free}:
        expected = [row[: row.index(end) + 1] if end in row else row for row in free]
        assert run(model, eos=end) == expected
        assert run(model, eos=end, batch_size=2) == expected


def test_sampling_stops_when_all_rows_have_ended(model):
    lengths = []
    model.tok_embeddings.register_forward_pre_hook(lambda _m, inputs: lengths.append(inputs[0].shape[1]))
    (free,) = run(model, PROMPTS[1:2], SEEDS[1:2])
    lengths.clear()
    end = free[2]
    (row,) = run(model, PROMPTS[1:2], SEEDS[1:2], eos=end)
    assert lengths == [7] + [1] * (
        len(row) - 1
    )  # the prompt at once, then one token a forward, none after the end


def test_one_candidate_is_the_greedy_choice(model):
    assert run(model, top_k=1) == run(model, temperature=0)


def test_tokens_come_as_often_as_their_probability(model):
    rows = 4000
    outputs = run(model, [[5]] * rows, list(range(rows)), count=1, batch_size=rows)
    counts = np.bincount([row[0] for row in outputs], minlength=small.VOCAB)
    with torch.no_grad():
        p = logits_of(model, torch.tensor([[5]]))[0, -1].softmax(-1).numpy()
    # Binomial counts: within 5 standard deviations, plus one token for the rarest.
    assert np.all(np.abs(counts - rows * p) < 5 * np.sqrt(rows * p * (1 - p)) + 1)


def test_the_model_and_the_generator_are_left_as_they_were(model):
    model.train()
    model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    keys = list(model.state_dict())
    tokens = small.batch([0, 1]).tokens

    def gradient():
        model.zero_grad()
        logits_of(model, tokens).square().mean().backward()
        return model.layers[0].attn.q_proj.weight.grad.clone()

    before, state = gradient(), torch.get_rng_state()
    run(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert list(model.state_dict()) == keys
    assert not model.caches_are_setup() and not model.caches_are_enabled()
    assert torch.equal(gradient(), before)


def test_no_prompts_no_continuations(model):
    assert run(model, [], []) == []


def test_bfloat16_models_sample_too():
    model = small.decoder(0, dtype=torch.bfloat16)
    assert [len(row) for row in run(model)] == [9] * 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": [1]}, "got 1 seeds for 5 prompts"),
        ({"prompts": [[1], []], "seeds": [1, 2]}, "a prompt is empty"),
        ({"count": 0}, "max_new_tokens and batch_size must be at least 1, got 0 and 8"),
        ({"batch_size": 0}, "must be at least 1, got 9 and 0"),
        ({"temperature": -0.1}, "temperature must be at least 0"),
        ({"top_k": 0}, "top_k at least 1"),
        ({"top_p": 0.0}, r"top_p in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p in \(0, 1\]"),
        ({"count": 58}, "need 65 positions, the model has 64"),
    ],
)
def test_arguments_out_of_range_are_refused(model, change, message):
    with pytest.raises(ValueError, match=message):
        run(model, **change)


def test_a_broken_model_is_an_error_and_leaves_no_cache():
    model = small.decoder(0)
    model.train()
    model.layers[0].mlp.w1.weight.data[0, 0] = float("nan")
    with pytest.raises(TokenprefError, match="logits for new token 1 are nan or infinite"):
        run(model)
    assert model.training and not model.caches_are_setup()


class TestProbabilities:
    P = torch.tensor([[0.125, 0.5, 0.25, 0.125]], dtype=torch.float64)

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({}, [1 / 8, 4 / 8, 2 / 8, 1 / 8]),
            # squares: 1/64, 16/64, 4/64, 1/64, of 22/64 in all
            ({"temperature": 0.5}, [1 / 22, 16 / 22, 4 / 22, 1 / 22]),
            ({"top_k": 2}, [0, 2 / 3, 1 / 3, 0]),
            # ids 0 and 3 tie for the third place: the lower id has it
            ({"top_k": 3}, [1 / 7, 4 / 7, 2 / 7, 0]),
            ({"top_k": 9}, [1 / 8, 4 / 8, 2 / 8, 1 / 8]),
            ({"top_p": 0.49}, [0, 1, 0, 0]),  # the first token reaches it by itself
            ({"top_p": 0.51}, [0, 2 / 3, 1 / 3, 0]),
            ({"top_p": 0.8}, [1 / 7, 4 / 7, 2 / 7, 0]),
            ({"top_p": 0.01}, [0, 1, 0, 0]),
            ({"top_p": 1.0}, [1 / 8, 4 / 8, 2 / 8, 1 / 8]),
            # after top_k: 1/7, 4/7, 2/7; 4/7 = 0.571 is short of 0.6, 6/7 is not
            ({"top_k": 3, "top_p": 0.6}, [0, 2 / 3, 1 / 3, 0]),
            ({"top_k": 3, "top_p": 0.57}, [0, 1, 0, 0]),
        ],
        ids=str,
    )
    def test_by_hand(self, settings, expected):
        found = sampling_probabilities(self.P.log() + 3.0, **settings)
        torch.testing.assert_close(found[0], torch.tensor(expected, dtype=torch.float64), atol=1e-15, rtol=0)

    def test_ties_leave_exactly_k(self):
        level = torch.zeros(2, 1000)
        assert (sampling_probabilities(level, top_k=1) > 0).nonzero().tolist() == [[0, 0], [1, 0]]
        assert (sampling_probabilities(level, top_k=7) > 0).sum(-1).tolist() == [7, 7]
        assert (sampling_probabilities(level, top_p=0.25) > 0).nonzero()[:, 1].max() == 249

    def test_a_tiny_temperature_is_greedy(self):
        logits = torch.tensor([[900.0, 901.0, -900.0]])
        assert sampling_probabilities(logits, temperature=1e-308).tolist() == [[0.0, 1.0, 0.0]]


def test_ranks_with_unequal_prompts_equal_one_process():
    settings = {"max_new_tokens": 6, "batch_size": 2, "temperature": 0.9}
    cases = [[PROMPTS[:3], PROMPTS[3:]], [PROMPTS, []], [[], PROMPTS[:1]], [[], []]]
    ranks = run_distributed(sampling.on_ranks, cases, settings)
    one = sampling.on_ranks(single_process_world(), [[sum(case, [])] for case in cases], settings)
    for number, expected in enumerate(one["outputs"]):
        assert [row for rank in ranks for row in rank["outputs"][number]] == expected
    assert [rank["loss"] for rank in ranks] == pytest.approx([one["loss"]] * 2, rel=1e-6)
    # A rank with a bad prompt keeps no other waiting.
    assert ranks[1]["refusal"].startswith("ValueError: prompt and 2 new tokens need 65 positions")
    assert ranks[0]["refusal"].startswith(
        "TokenprefError: rank 1 failed: ValueError: prompt and 2 new tokens"
    )
