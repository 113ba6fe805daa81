"""A run that goes on uses what its config says now: rates, decay, betas and the schedule, in the same bits as by hand."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.killed import train_until
from torch import nn
from torch.optim import SGD, Adam, AdamW
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, MultiStepLR, OneCycleLR
from torchtune.training import get_cosine_schedule_with_warmup

from tokenpref._sealed import seal
from tokenpref.distributed import load_sharded, sharded_state, single_process_world, write_sharded
from tokenpref.errors import ConfigError, TokenprefError
from tokenpref.training import PreferenceTrainer, TripletTrainer, get_constant_schedule_with_warmup
from tokenpref.training.config.command_line import load_config
from tokenpref.training.saving.checkpoints import Checkpoints, Progress
from tokenpref.training.saving.hyperparameters import Hyperparameters, replay_schedule

WORLD = single_process_world()


class Toy:
    """A linear model that fits random numbers, with checkpoints in a folder.

    Args:
        folder: of the checkpoints.
        optimizer: makes one of parameters.
        schedule: makes one of an optimizer.
    """

    def __init__(self, folder, optimizer, schedule=None):
        self.model = nn.Linear(3, 2)
        nn.init.constant_(self.model.weight, 0.5)
        nn.init.zeros_(self.model.bias)
        self.optimizer = optimizer(self.model.parameters())
        self.scheduler = schedule(self.optimizer) if schedule is not None else None
        self.built = Hyperparameters.of(self.optimizer)
        self.checkpoints = Checkpoints(folder, WORLD)
        self.step, self.rates = 0, []

    def train(self, steps):
        for _ in range(steps):
            generator = torch.Generator().manual_seed(self.step)
            inputs, wanted = torch.randn(4, 3, generator=generator), torch.randn(4, 2, generator=generator)
            self.optimizer.zero_grad()
            (self.model(inputs) - wanted).square().sum().backward()
            self.rates.append(self.optimizer.param_groups[0]["lr"])
            self.optimizer.step()
            if self.scheduler is not None:
                self.scheduler.step()
            self.step += 1
        return self

    def save(self):
        self.checkpoints.save(
            self.model,
            self.optimizer,
            self.scheduler,
            Progress(step=self.step),
            live={},
            facts={},
            built=self.built,
            keep_last=1,
        )
        return self

    def resume(self, *, same_config):
        folder, _ = self.checkpoints.newest()
        progress, _ = self.checkpoints.load(
            folder, self.model, self.optimizer, self.scheduler, built=self.built, same_config=same_config
        )
        self.step = progress.step
        return self


def assert_equal(one, other):
    assert all(a.equal(b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


def adamw(**settings):
    return lambda params: AdamW(params, **{"lr": 0.1, **settings})


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 0.01},
        {"weight_decay": 0.5},
        {"betas": (0.5, 0.7), "eps": 1e-3},
        {"maximize": True},
        {"foreach": True},
        {"fused": True, "lr": 0.02},
    ],
    ids=str,
)
def test_changed_settings_are_those_of_two_phases_by_hand(tmp_path, change):
    by_hand = Toy(tmp_path, adamw()).train(4)
    by_hand.optimizer.param_groups[0].update(change)
    Toy(tmp_path, adamw()).train(4).save()
    mine = Toy(tmp_path, adamw(**change)).resume(same_config=False)
    assert_equal(mine.train(4), by_hand.train(4))
    group = mine.optimizer.param_groups[0]
    assert {name: group[name] for name in change} == change


def cosine(**settings):
    words = {"num_warmup_steps": 2, "num_training_steps": 12, **settings}
    return lambda optimizer: get_cosine_schedule_with_warmup(optimizer, **words)


def constant(optimizer):
    return get_constant_schedule_with_warmup(optimizer, num_warmup_steps=8)


def steps_down(milestone):
    return lambda optimizer: MultiStepLR(optimizer, [milestone])


def one_cycle(optimizer):
    return OneCycleLR(optimizer, max_lr=0.3, total_steps=12)  # it drives the momentum too


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((0.1, cosine()), (0.1, cosine())),
        ((0.1, cosine()), (0.02, cosine())),
        ((0.1, cosine()), (0.1, cosine(num_training_steps=40))),
        ((0.1, cosine()), (0.1, cosine(num_warmup_steps=9))),
        ((0.1, cosine()), (0.1, cosine(num_cycles=1.5))),
        ((0.1, cosine()), (0.1, constant)),
        ((0.1, steps_down(5)), (0.1, steps_down(5))),
        ((0.1, steps_down(2)), (0.1, steps_down(6))),
        ((0.1, one_cycle), (0.1, one_cycle)),
    ],
    ids=["same", "rate", "length", "warm-up", "cycles", "another", "steps", "later step", "one cycle"],
)
def test_the_rate_is_what_the_schedule_of_the_config_gives_at_that_step(tmp_path, before, after):
    def toy(rate, schedule):
        return Toy(tmp_path, lambda params: SGD(params, lr=rate, momentum=0.5), schedule)

    undisturbed = toy(*after).train(10)
    toy(*before).train(3).save()
    mine = toy(*after).resume(same_config=before == after).train(7)
    assert mine.rates == undisturbed.rates[3:]
    if before == after:
        assert_equal(mine, undisturbed)


def two_groups(params):
    params = list(params)
    return AdamW([{"params": params[:1]}, {"params": params[1:], "lr": 0.3}], lr=0.1)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda p: SGD(p, lr=0.1), r"written by torch\.optim\.adamw\.AdamW, and this run has torch\.optim\.sgd\.SGD; set optim"),
        (lambda p: Adam(p, lr=0.1), r"written by torch\.optim\.adamw\.AdamW, and this run has torch\.optim\.adam\.Adam; set"),
        (adamw(amsgrad=True), "has no 'max_exp_avg_sq', which this optimizer needs.; set optimizer as it was"),
        (two_groups, "written with 1 parameter groups, and this run has 2; set optimizer as it was"),
    ],
    ids=["class", "class with the same state", "amsgrad", "groups"],
)  # fmt: skip
def test_state_that_does_not_fit_is_refused(tmp_path, other, message):
    Toy(tmp_path, adamw()).train(2).save()
    with pytest.raises(TokenprefError, match=rf"^optimizer: .*step_2 was .*{message}"):
        Toy(tmp_path, other).resume(same_config=False)


@pytest.mark.parametrize("one_way", [True, False])
def test_state_that_is_left_over_is_refused_in_an_old_checkpoint(tmp_path, one_way):
    makers = [lambda p: SGD(p, lr=0.1), adamw()]
    then, now = makers if one_way else reversed(makers)
    Toy(tmp_path, then).train(2).save()
    without_record(tmp_path / "step_2")
    with pytest.raises(TokenprefError, match="written by another kind of optimizer"):
        Toy(tmp_path, now).resume(same_config=False)


def without_record(folder, **changes):
    """Make a checkpoint one of an earlier version, which recorded no settings; or change the record."""
    file = folder / "progress.json"
    record = json.loads(file.read_text())
    del record["optimizer"]
    file.write_text(json.dumps(record | changes))
    (folder / "manifest.json").unlink()
    seal(folder)


@pytest.mark.parametrize("same", [True, False])
def test_an_old_checkpoint_takes_the_configs_word_for_what_changed(tmp_path, same):
    rate = 0.1 if same else 0.02
    undisturbed = Toy(tmp_path, adamw(lr=rate), cosine()).train(8)
    Toy(tmp_path, adamw(), cosine()).train(3).save()
    without_record(tmp_path / "step_3")
    mine = Toy(tmp_path, adamw(lr=rate), cosine()).resume(same_config=same).train(5)
    assert mine.rates == undisturbed.rates[3:]


@pytest.mark.parametrize(
    "record",
    [3, {"class": 3, "groups": []}, {"class": "a", "groups": 3}, {"class": "a", "groups": [3]}],
    ids=str,
)
def test_a_record_that_is_none_is_refused(tmp_path, record):
    Toy(tmp_path, adamw()).train(2).save()
    without_record(tmp_path / "step_2", optimizer=record)
    with pytest.raises(ConfigError, match="progress.json: optimizer"):
        Toy(tmp_path, adamw()).resume(same_config=True)


def test_every_group_keeps_its_own_settings(tmp_path):
    Toy(tmp_path, two_groups, cosine()).train(3).save()
    mine = Toy(tmp_path, two_groups, cosine(num_warmup_steps=6)).resume(same_config=False)
    assert [group["lr"] for group in mine.optimizer.param_groups] == [0.1 * 0.5, 0.3 * 0.5]


class Counting(SGD):
    """Keeps what it counts in its group, as schedule-free optimizers do."""

    def __init__(self, params, lr, momentum=0.9):
        super().__init__(params, lr=lr, momentum=momentum)
        for group in self.param_groups:
            group["count"] = 0

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            group["count"] += group["lr"] > 0  # PyTorch asks for a step without effect to see the state


def test_what_an_optimizer_counts_in_its_groups_goes_on(tmp_path):
    Toy(tmp_path, lambda p: Counting(p, lr=0.1)).train(3).save()
    mine = Toy(tmp_path, lambda p: Counting(p, lr=0.1, momentum=0.5)).resume(same_config=False).train(2)
    assert mine.optimizer.param_groups[0]["count"] == 5
    assert mine.optimizer.param_groups[0]["momentum"] == 0.5


class Remembering(LRScheduler):
    """A schedule that depends on more than the number of steps."""

    def __init__(self, optimizer, last_epoch=-1):
        self.factor = 1.0
        super().__init__(optimizer, last_epoch)

    def get_lr(self):
        return [self.factor * rate for rate in self.base_lrs]


def test_a_schedule_with_a_memory_keeps_it(tmp_path):
    then = Toy(tmp_path, adamw(), Remembering)
    then.scheduler.factor = 0.5
    then.train(3).save()
    assert Toy(tmp_path, adamw(), Remembering).resume(same_config=True).train(2).rates == [0.05, 0.05]


def test_flags_of_the_optimizer_are_known_before_its_state_is_taken(tmp_path):
    """A GPU keeps the step counters of fused optimizers: PyTorch places them by the flags of the groups that it is given."""
    then = Toy(tmp_path, adamw(fused=False)).train(1)
    write_sharded(tmp_path, sharded_state(then.model, then.optimizer), WORLD)
    mine, seen = Toy(tmp_path, adamw(fused=True)), []
    load = mine.optimizer.load_state_dict

    def watched_load(state_dict):
        seen.extend(group["fused"] for group in state_dict["param_groups"])
        load(state_dict)

    mine.optimizer.load_state_dict = watched_load

    def settle(groups):
        mine.built.settle(groups, then.built.record(), same_config=False)

    load_sharded(tmp_path, mine.model, mine.optimizer, settle)
    assert seen[-1] is True and mine.optimizer.param_groups[0]["fused"] is True


def test_a_schedule_replayed_touches_only_what_it_governs():
    optimizer = SGD([nn.Parameter(torch.ones(2))], lr=1.0, momentum=0.9)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    built = Hyperparameters.of(optimizer)
    optimizer.param_groups[0].update(momentum=0.3, lr=7.0)
    replay_schedule(optimizer, scheduler, built, 3, None)
    assert optimizer.param_groups[0]["lr"] == 0.125 and optimizer.param_groups[0]["momentum"] == 0.3
    assert scheduler.last_epoch == 3


# --- the same through a whole run -----------------------------------------------------------------------------

WORDS = ("log_stats=[]", "run_val_every_n_steps=null", "dataset.max_rows=32", "dataset_val=null")
EVERY = "checkpoint_every_n_steps=1"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Train a tiny config up to a step, if one is given; ``at`` is a step and what to do before it."""
    monkeypatch.chdir(tmp_path)

    def train(*overrides, config="tiny/dpo", until=None, at=(None, None), trainer_class=PreferenceTrainer):
        trainer = trainer_class(load_config(["--config", config, *WORDS, *overrides]))

        def change(trainer):
            if trainer.progress.step == at[0]:
                at[1](trainer)

        train_until(trainer, until, change)

    return train


def test_a_run_goes_on_with_the_settings_of_its_config(run, tmp_path, caplog):
    change = ("optimizer.lr=1e-5", "optimizer.betas=[0.5,0.7]", "loss.beta=0.5")

    def by_hand(trainer):
        trainer.optimizer.param_groups[0].update(lr=1e-5, betas=(0.5, 0.7))
        trainer.loss.beta = 0.5

    run("output_dir=hand", at=(2, by_hand))
    run("output_dir=mine", EVERY, until=2)
    with caplog.at_level("INFO", logger="tokenpref"):
        run("output_dir=mine", "resume_from_checkpoint=auto", EVERY, *change)
    hand, mine = (
        load_file(tmp_path / name / "epoch_0/model-00001-of-00001.safetensors") for name in ("hand", "mine")
    )
    assert all(tensor.equal(mine[name]) for name, tensor in hand.items())
    said = {line for line in caplog.messages if line.startswith("continuing with another setting")}
    assert said == {
        f"continuing with another setting: {line}; the new value is used"
        for line in (
            "optimizer.lr is 1e-05 and was 0.001",
            "optimizer.betas is [0.5, 0.7] and was at its default",
            "loss.beta is 0.5 and was 0.1",
        )
    }


def test_a_schedule_that_was_not_there_is_refused(run):
    run("output_dir=mine", EVERY, until=2)
    schedule = "lr_scheduler._component_=torchtune.training.get_cosine_schedule_with_warmup"
    with pytest.raises(ConfigError, match="lr_scheduler: .*step_2 was written without one"):
        run("output_dir=mine", "resume_from_checkpoint=auto", schedule, "lr_scheduler.num_warmup_steps=2")


def test_rows_kept_under_other_settings_are_computed_again(run, caplog):
    words = ("token_weights.refresh=once", "anchors.refresh=once", "token_weights.every_n_steps=null", EVERY)
    words += ("dataset.max_rows=16", "batch_size=8", "anchors.every_n_steps=null")
    settings = {"config": "tiny/ti_dpo", "trainer_class": TripletTrainer}
    run("output_dir=mine", *words, until=1, **settings)
    with caplog.at_level("INFO", logger="tokenpref"):
        run("output_dir=mine", *words, "token_weights.mixture=0.1", "resume_from_checkpoint=auto", **settings)
    assert (
        "token_weights: has other settings than before; what was kept by row is computed again" in caplog.text
    )
    assert "anchors: has other settings" not in caplog.text


def test_a_best_value_of_another_measure_counts_no_more(run, tmp_path, caplog):
    words = ("run_val_every_n_steps=1", "dataset_val.max_rows=8", EVERY)
    held_out = ("dataset_val._component_=tokenpref.data.preference_dataset",)
    held_out += ("dataset_val.source=package://data/tiny/eval.jsonl", "dataset_val.append_eos=false")
    run("output_dir=mine", *held_out, *words, "best.metric=loss", "best.goal=min", until=2)
    now = ("best.metric=rewards/accuracies", "best.goal=max", "resume_from_checkpoint=auto")
    with caplog.at_level("INFO", logger="tokenpref"):
        run("output_dir=mine", *held_out, *words, *now)
    assert "the search for the best starts again" in caplog.text
    assert json.loads((tmp_path / "mine/best/best.json").read_text())["metric"] == "rewards/accuracies"
