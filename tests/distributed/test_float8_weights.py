"""Weights that two ranks gather in float8."""

import pytest
from support import workers

from tokenpref.distributed.testing import run_distributed


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return run_distributed(workers.float8_shards, str(tmp_path_factory.mktemp("state")))


def test_layers_receive_float8(ranks):
    for rank in ranks:
        assert len(rank["gathered"]) == 14
        assert set(rank["gathered"].values()) == {("Float8TrainingTensor", "torch.float8_e4m3fn")}


def test_scales_are_those_of_whole_weights_whenever_these_change(ranks):
    """448, float8's largest number, over the largest of the weight: after loading, after a step, after restoring."""
    assert ranks[0]["loaded"] == ranks[1]["loaded"] and ranks[0]["stepped"] == ranks[1]["stepped"]
    for name, largest in ranks[0]["largest"].items():
        assert ranks[0]["stepped"][name] == pytest.approx(448 / largest, rel=1e-6)
        assert ranks[0]["restored"][name] == ranks[0]["stepped"][name] != ranks[0]["loaded"][name]


def test_state_dicts_hold_plain_tensors_and_come_back(ranks):
    for rank in ranks:
        assert rank["kinds"] <= {"Tensor"} and rank["stored"] == {"Tensor"} and rank["same"]
    assert ranks[0]["kinds"] == {"Tensor"}
