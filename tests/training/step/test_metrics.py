import math

import pytest
import torch

from tokenpref.distributed import single_process_world
from tokenpref.stats import LossOutput
from tokenpref.training.evaluation.intervals import mean_interval, wilson_interval
from tokenpref.training.step.metrics import MetricSums, loss_metrics


def test_means_are_over_pairs_not_over_micro_batches():
    sums = MetricSums()
    sums.add({"x": torch.tensor([1.0, 2.0, 6.0])}, torch.tensor([True, True, True]))
    sums.add({"x": torch.tensor([5.0])}, torch.tensor([True]))
    # (1 + 2 + 6 + 5) / 4 = 3.5; the mean of the micro-batches' means would be (3 + 5) / 2 = 4
    assert sums.reduce(single_process_world()) == {"x": 3.5}


def test_filler_pairs_count_neither_above_nor_below_the_line():
    sums = MetricSums()
    sums.add({"x": torch.tensor([1.0, math.nan])}, torch.tensor([True, False]))
    assert sums.reduce(single_process_world()) == {"x": 1.0}


def test_accuracy_is_strict_and_margins_are_differences():
    output = LossOutput(
        losses=torch.tensor([0.5, 0.7]),
        chosen_rewards=torch.tensor([1.0, 2.0]),
        rejected_rewards=torch.tensor([0.25, 2.0]),
        metrics={"extra": torch.tensor([3.0, 4.0])},
    )
    metrics = loss_metrics(output)
    assert metrics["rewards/accuracies"].tolist() == [1.0, 0.0]  # a tie is no win
    assert metrics["rewards/margins"].tolist() == [0.75, 0.0]
    assert metrics["extra"].tolist() == [3.0, 4.0]


def test_wilson_interval_by_hand():
    # p = 0.8, n = 100, z = 2: (0.8 + 4/200 -+ 2 sqrt(0.0016 + 4/40000)) / (1 + 4/100)
    # = (0.82 -+ 2 sqrt(0.0017)) / 1.04 = (0.82 -+ 0.0824621) / 1.04
    low, high = wilson_interval(0.8, 100, z=2.0)
    assert low == pytest.approx(0.7091710, abs=1e-6)
    assert high == pytest.approx(0.8677520, abs=1e-6)


def test_mean_interval_by_hand():
    # mean 2, variance ((1)^2 + 0 + 1^2) / 2 = 1, standard error 1 / sqrt 3, half width 1.96 / sqrt 3 = 1.131607
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert (high - low) / 2 == pytest.approx(1.96 / math.sqrt(3))


def test_mean_interval_needs_two_values():
    with pytest.raises(ValueError, match="at least two"):
        mean_interval([1.0])
