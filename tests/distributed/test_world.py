import sys

import pytest
import torch
from support import workers

from tokenpref.distributed import init_world, single_process_world
from tokenpref.distributed.testing import run_distributed
from tokenpref.errors import ConfigError
from tokenpref.losses import DPOLoss


def test_one_process_needs_no_group():
    world = single_process_world()
    assert world.sum(torch.tensor([2.0])).tolist() == [2.0]
    assert world.any(True) and not world.any(False)
    assert world.max(3) == 3
    assert world.broadcast_object("x") == "x"
    assert world.gather_objects(1) == [1]
    assert world.together(lambda: 5) == 5
    assert world.is_main and not world.is_distributed


def test_collectives_on_two_ranks():
    first, second = run_distributed(workers.collectives)
    for rank in (first, second):
        assert rank["sum"] == [2.0, 1.0]
        assert rank["any"] is True and rank["none"] is False
        assert rank["max"] == 10
        assert rank["broadcast"] == {"from": 0}
        assert rank["gather"] == [0, 2]
    # rank 1 divides by zero; rank 0 learns of it instead of waiting
    assert second["together"] == "own error"
    assert first["together"].startswith("rank 1 failed: ZeroDivisionError")


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_no_thread_of_a_process_group_outlives_the_run():
    # One that frees a tensor while the interpreter is torn down would end the process with an abort.
    for running, left in run_distributed(workers.threads_of_groups, DPOLoss()):
        assert running > 0 and left == 0


def test_unknown_device_is_refused():
    with pytest.raises(ConfigError, match="device: 'tpu' is not supported"):
        init_world("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_refused():
    with pytest.raises(ConfigError, match="no usable GPU"):
        init_world("cuda")
