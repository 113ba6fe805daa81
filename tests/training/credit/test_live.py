"""Weights and anchors that are kept by row: the same results on any number of ranks, and after a restart."""

import pytest
import torch
from safetensors.torch import load_file
from support import commands, workers

from tokenpref.distributed import single_process_world
from tokenpref.distributed.testing import run_distributed
from tokenpref.training.credit.live import LiveModels, Refresh, RowCache

WORLD = single_process_world()
EPOCHS, STEPS = 3, 3
SHORT = (
    f"epochs={EPOCHS}", f"dataset.max_rows={8 * STEPS}", "dataset_val.max_rows=8", "run_val_every_n_steps=2", "loss_val=null",
    "log_stats_val=[]", "checkpoint_every_n_steps=1", "keep_last=10", "anchors.max_new_tokens=4",
    "optimizer.eps=1e-4",  # with less, Adam makes a step of what rounding leaves of a gradient near 0
)  # fmt: skip
EVERY = ("refresh=every_n_steps", "every_n_steps=4")
KEPT = {
    "weights_once": ("token_weights.refresh=once", *(f"anchors.{word}" for word in EVERY)),
    "anchors_once": ("anchors.refresh=once", *(f"token_weights.{word}" for word in EVERY)),
}
STOP = 5  # in the second epoch


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Every setting on two ranks, undisturbed and continued from the middle of the second epoch, and in one process."""
    folder = tmp_path_factory.mktemp("kept")
    on_two, alone = [], []
    for name, kept in KEPT.items():
        words = [*SHORT, *kept]
        resumed = f"resume_from_checkpoint=two_{name}/checkpoints/step_{STOP}"
        on_two += [
            [*words, "batch_size=4", f"output_dir=two_{name}"],
            [*words, "batch_size=4", f"output_dir=resumed_{name}", resumed],
        ]
        alone += [
            [*words, "batch_size=8", f"output_dir=one_{name}"],
            [*words, "batch_size=8", f"output_dir=alone_{name}", resumed],
        ]
    two = run_distributed(workers.ti_trainings, str(folder), on_two)
    assert two == [[EPOCHS * STEPS] * len(on_two)] * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        workers.ti_trainings(WORLD, str(folder), alone)
    return folder


def last_weights(folder, run):
    return load_file(folder / run / f"epoch_{EPOCHS - 1}" / "model-00001-of-00001.safetensors")


def curve(folder, run):
    """Losses by step, of training and of validation."""
    lines = commands.logged(folder, run)
    return {(line["step"], key): line[key] for line in lines for key in ("loss", "eval_loss") if key in line}


@pytest.mark.parametrize("name", KEPT)
def test_two_ranks_keep_what_one_process_keeps(trained, name):
    one, two = (curve(trained, f"{ranks}_{name}") for ranks in ("one", "two"))
    assert len(one) == EPOCHS * STEPS + 4 and two == pytest.approx(one, abs=1e-6)
    other = last_weights(trained, f"two_{name}")
    for key, tensor in last_weights(trained, f"one_{name}").items():
        assert torch.allclose(tensor, other[key], atol=1e-6), key


@pytest.mark.parametrize("name", KEPT)
def test_two_ranks_that_were_stopped_end_with_the_same_bits(trained, name):
    whole, resumed = (curve(trained, f"{how}_{name}") for how in ("two", "resumed"))
    assert resumed == {key: value for key, value in whole.items() if key[0] > STOP}
    other = last_weights(trained, f"resumed_{name}")
    for key, tensor in last_weights(trained, f"two_{name}").items():
        assert tensor.equal(other[key]), key


@pytest.mark.parametrize("name", KEPT)
def test_a_checkpoint_of_two_ranks_goes_on_in_one_process(trained, name):
    whole, alone = (curve(trained, f"{how}_{name}") for how in ("two", "alone"))
    assert alone == pytest.approx({key: value for key, value in whole.items() if key[0] > STOP}, abs=1e-6)


def test_a_checkpoint_holds_each_row_once(trained):
    for name in KEPT:
        live = load_file(trained / f"two_{name}" / "checkpoints" / f"step_{STOP}" / "live.safetensors")
        found = [
            (key.partition(".")[0].partition("_")[0], len(rows), len(rows.unique()))
            for key, rows in sorted(live.items())
            if key.endswith(".rows")
        ]
        assert found == [(source, n, n) for source in ("anchors", "weights") for n in (8 * STEPS, 8)]


def models(step):
    return LiveModels(None, None, WORLD, pad_id=0, eos_id=1, step=step)


def cache(refresh):
    return RowCache(
        refresh,
        lambda pair: [torch.tensor(part) for part in pair],
        lambda parts: tuple(p.tolist() for p in parts),
    )


def test_kept_results_are_copies_that_come_back_from_a_checkpoint():
    one = cache(Refresh("every_n_steps", 3))
    made = [([1.0, 2.0], [3.0]), ([], [4.0])]
    assert one.get([7, -1, 2], models(0), lambda places: made) == [made[0], None, made[1]]
    assert one.get([2, 7], models(2), lambda places: pytest.fail("nothing is missing")) == made[::-1]
    other = cache(Refresh("every_n_steps", 3))
    state = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    other.load_state_dict(state)
    state["values"].fill_(0)
    assert other.get([2, 7], models(2), lambda places: pytest.fail("nothing is missing")) == made[::-1]
    newer = [([5.0], [6.0])]
    assert other.get([7, 2], models(3), lambda places: newer * len(places)) == newer * 2
    # Of a row that several ranks had, the newest counts, in either order.
    for states in ((one, other), (other, one)):
        third = cache(Refresh("once"))
        for part in states:
            third.load_state_dict(part.state_dict())
        assert third.get([7], models(9), lambda places: pytest.fail("it is known")) == newer


def test_nothing_is_kept_where_every_step_looks_anew():
    one = cache(Refresh())
    assert one.get([7, -1], models(0), lambda places: [([1.0], [2.0])]) == [([1.0], [2.0]), None]
    assert one.state_dict() == {}
