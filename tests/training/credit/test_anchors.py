"""Sampled anchors: what they continue, whose noise they use, when they are drawn anew, and what they leave untouched."""

import pytest
import torch
from support import evaluating, workers

from tokenpref.distributed import single_process_world
from tokenpref.distributed.testing import run_distributed
from tokenpref.errors import ConfigError
from tokenpref.losses import DPOLoss
from tokenpref.models.reference import FrozenReference
from tokenpref.stats import split_pair
from tokenpref.training.credit.anchors import AnchorSampler
from tokenpref.training.credit.live import LiveModels, Refresh
from tokenpref.training.step.batches import pair_batches

WORLD = single_process_world()
TOKENIZER = evaluating.tokenizer()
SETTINGS = {"max_new_tokens": 5, "top_k": None, "top_p": None, "temperature": 1.0}


@pytest.fixture(scope="module")
def data():
    return evaluating.pairs(6)


def models(seed=0, step=0):
    policy, reference = evaluating.scorer(seed), FrozenReference(evaluating.scorer(1))
    return LiveModels(policy, reference, WORLD, TOKENIZER.pad_id, TOKENIZER.eos_id, step)


def sampler(data, **settings):
    source = AnchorSampler(**{**SETTINGS, **settings})
    source.bind(data)
    return source


def test_an_anchor_continues_the_prompt_and_keeps_its_eos(data):
    found = sampler(data).answers([0, 1, 2, 3, 4, 5], models())
    for row, (ids, start) in enumerate(found):
        assert ids[:start] == data.prompt_ids(row) and 1 <= len(ids) - start <= 5
        assert TOKENIZER.eos_id not in ids[start:-1]
        assert len(ids) - start == 5 or ids[-1] == TOKENIZER.eos_id


def test_it_may_continue_the_beginning_of_the_chosen_answer(data):
    found = sampler(data, start="chosen_prefix", prefix_share=0.5).answers([0, 1], models())
    for row, (ids, start) in enumerate(found):
        example = data[row]
        answer = example.chosen_ids[example.chosen_start :]
        kept = -(-(len(answer) - example.chosen_has_eos) // 2)
        assert start == example.chosen_start and ids[: start + kept] == example.chosen_ids[: start + kept]
        assert len(ids) > start + kept
    ((whole, start),) = sampler(data, start="chosen_prefix", prefix_share=1.0).answers([2], models())
    answer = data[2].chosen_ids[: len(data[2].chosen_ids) - data[2].chosen_has_eos]
    assert whole[: len(answer)] == answer and len(whole) > len(answer)


def test_noise_belongs_to_seed_row_and_step(data):
    def drawn(rows, step=0, **settings):
        return dict(zip(rows, sampler(data, **settings).answers(rows, models(step=step)), strict=True))

    all_rows = drawn([0, 1, 2, 3, 4, 5])
    for rows in ([3, 1], [5], [0, 2, 4]):  # other companions, other padding
        assert drawn(rows, batch_size=2) == {row: all_rows[row] for row in rows}
    assert drawn([0, 1, 2, 3, 4, 5], step=1) != all_rows
    assert drawn([0, 1, 2, 3, 4, 5], seed=1) != all_rows


def test_refresh(data):
    rows = [0, 1, 2]
    fresh = [sampler(data).answers(rows, models(7 if step else 0, step)) for step in range(4)]
    assert fresh[0] != fresh[1] != fresh[2]
    for settings, expected in (
        ({"refresh": "every_step"}, [0, 1, 2, 3]),
        ({"refresh": "every_n_steps", "every_n_steps": 2}, [0, 0, 2, 2]),
        ({"refresh": "once"}, [0, 0, 0, 0]),
    ):
        source = sampler(data, **settings)
        found = [source.answers(rows, models(7 if step else 0, step)) for step in range(4)]
        assert found == [fresh[step] for step in expected]
    source = sampler(data, refresh="once")
    source.answers([0], models())
    assert source.answers([0, -1, 1], models(7, 1)) == [fresh[0][0], None, fresh[1][1]]


def test_sampling_before_a_step_changes_nothing_in_it(data):
    """Loss and gradients are bit for bit those of a step without it."""

    def gradients(sample_first):
        run = models()
        (batch,) = pair_batches(data, WORLD, pad_id=TOKENIZER.pad_id, step=0, batch_size=3)
        state = torch.get_rng_state()
        if sample_first:
            sampler(data).answers([0, 1, 2], run)
        assert torch.equal(torch.get_rng_state(), state)
        with run.reference.outputs(batch, frozenset({"ref"})) as ref:
            stats = run.policy.token_stats(
                batch.tokens, batch.labels, needs=frozenset({"ref"}), ref_logps=ref.logps
            )
        losses = DPOLoss()(split_pair(stats)).losses
        losses.sum().backward()
        return [losses.detach(), *(p.grad for p in run.policy.model.parameters())]

    for one, other in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(one, other)


def test_ranks_draw_what_one_process_draws():
    """Ranks with unequal numbers of rows, one with none, whose answers stop at different lengths."""
    data = evaluating.pairs(6)
    split = [[0, 1, 2, 3], []], [[4], [5, -1]]
    found = {}
    for rank in run_distributed(workers.sampled_anchors, split):
        found.update(rank)
    expected = sampler(data, top_k=5).answers(list(range(6)), models())
    assert found == dict(enumerate(expected))


def test_too_little_context_is_an_error_with_the_numbers(data):
    with pytest.raises(
        ConfigError, match=r"anchors.max_new_tokens: 500 after the longest beginning of \d+ tokens"
    ):
        sampler(data, max_new_tokens=500).answers([0], models())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
        ({"top_k": 0}, "top_k must be"),
        ({"top_p": 1.5}, "top_p must be a finite number > 0 and <= 1, got 1.5"),
        ({"temperature": -1}, "temperature must be"),
        ({"start": "prefix"}, "start must be one of"),
        ({"prefix_share": 0}, "prefix_share must be"),
        ({"refresh": "sometimes"}, "refresh must be one of"),
        ({"refresh": "once", "every_n_steps": 2}, "refresh is once"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        AnchorSampler(**settings)


def test_refresh_says_when():
    assert Refresh().is_stale(3, 3) and not Refresh("once").is_stale(0, 10**6)
    every = Refresh("every_n_steps", 4)
    assert [every.is_stale(2, step) for step in (2, 5, 6)] == [False, False, True]
