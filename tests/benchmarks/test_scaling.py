"""What processes hold and exchange, counted on two and four gloo ranks, against the arithmetic of benchmarks/scaling.py."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from support import small
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[2]))  # benchmarks/ is no part of the package

from benchmarks.scaling import Groups, own_bytes, own_numbers, step_traffic
from tokenpref.distributed import shard
from tokenpref.distributed.testing import run_distributed
from tokenpref.losses import DPOLoss, TokenDPOLoss
from tokenpref.models.adapters import adapter_names
from tokenpref.models.reference import FrozenReference
from tokenpref.models.scoring import ScoringModel
from tokenpref.training.step.pair_loss import no_weights
from tokenpref.training.step.train_step import train_step

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16

CASES = {
    "full, float32, DPO": (small.decoder, FLOAT32, None, DPOLoss, 1),
    "full, mixed, TDPO2, two micro-batches": (small.decoder, FLOAT32, BFLOAT16, TokenDPOLoss, 2),
    "untied, bfloat16, TDPO2": ("untied", BFLOAT16, None, TokenDPOLoss, 1),
    "LoRA, float32, TDPO2": (small.lora_decoder, FLOAT32, None, TokenDPOLoss, 1),
    "QLoRA, float32, DPO": ("nf4", FLOAT32, None, DPOLoss, 1),
}
"""Builder, dtype of the weights, dtype of the computation, loss, micro-batches."""


def make(name, trainable=True):
    builder, dtype, _, _, _ = CASES[name]
    if builder == "nf4":
        torch.manual_seed(0)
        model = small.nf4_llama()
    elif builder == "untied":
        model = small.decoder(0, tied=False, dtype=dtype)
    else:
        model = builder(0, dtype=dtype)
    if adapter_names(model):
        trained = set(adapter_names(model))
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter_name in trained)
    else:
        model.requires_grad_(trainable)
    return model


class Counted(TorchDispatchMode):
    """Bytes of the whole buffers of all-gathers and reduce-scatters."""

    def __init__(self):
        super().__init__()
        self.gathered = self.reduced = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.c10d._allgather_base_.default:
            self.gathered += args[0].nbytes  # the output
        elif func is torch.ops.c10d._reduce_scatter_base_.default:
            self.reduced += args[1].nbytes  # the input
        return func(*args, **(kwargs or {}))


def local_bytes(model):
    total = 0
    for parameter in model.parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        parts = ("quantized_data", "quantized_scalers", "quantization_factor")
        stored = [getattr(local, part) for part in parts] if hasattr(local, parts[0]) else [local]
        total += sum(tensor.nbytes for tensor in stored)
    return total


def on_a_rank(world):
    """For each case the bytes of a rank's weights, and those gathered and reduced in the second step."""
    found = {}
    for name, (_, _, compute_dtype, loss_class, micro_batches) in CASES.items():
        loss, model = loss_class(), make(name)
        shard(model, model.layers, world, compute_dtype=compute_dtype)
        policy = ScoringModel(model)
        if adapter_names(model):
            reference = FrozenReference(policy.base(), shares_head=True)
        else:
            frozen = make(name, trainable=False).to(compute_dtype or model.norm.scale.dtype)
            shard(frozen, frozen.layers, world)
            reference = FrozenReference(ScoringModel(frozen))
        optimizer = torch.optim.SGD(policy.trainable_parameters(), lr=1e-4)
        batches = [small.batch([2 * i, 2 * i + 1]) for i in range(micro_batches)]
        for step in (1, 2):
            with Counted() as counted:
                train_step(
                    policy,
                    reference,
                    loss,
                    optimizer,
                    batches,
                    world,
                    step=step,
                    needs=loss.needs,
                    weigh=no_weights,
                )
        found[name] = (local_bytes(model), counted.gathered, counted.reduced)
    return found


def expected(name, size):
    _, dtype, compute_dtype, loss_class, micro_batches = CASES[name]
    model = make(name)
    policy = Groups.of(model, size, compute_dtype or dtype)
    traffic = step_traffic(
        policy,
        None if adapter_names(model) else policy,
        own_numbers(model, size, trained=True) * size,
        kl=loss_class is TokenDPOLoss,
        reduce_dtype=FLOAT32 if compute_dtype else dtype,
        micro_batches=micro_batches,
    )
    return own_bytes(model, size, dtype), traffic.gathered, traffic.reduced


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_bytes_of_ranks(size):
    """Of rank 0, which has most; rows of 61 tokens do not divide by two, and those of the last rank are fewer."""
    found = run_distributed(on_a_rank, size=size)
    for name in CASES:
        assert found[0][name] == expected(name, size), name
        assert all(
            rank[name][1:] == found[0][name][1:] and rank[name][0] <= found[0][name][0] for rank in found
        )


def test_traffic_by_hand():
    """Layers of 10 bytes, a root of 3; two micro-batches: all of the policy twice, of the reference once, its root once more."""
    groups = Groups(layers=10, root=3, largest=5)
    kl = step_traffic(groups, groups, 7, kl=True, reduce_dtype=FLOAT32, micro_batches=2)
    assert (kl.gathered, kl.reduced) == (2 * (2 * 13 + 13 + 3), 28)
    assert kl.received(4) == (84 + 28) * 3 / 4
    assert step_traffic(groups, groups, 7, kl=False, reduce_dtype=BFLOAT16).gathered == 3 * 13
    assert step_traffic(groups, None, 7, kl=True, reduce_dtype=BFLOAT16).gathered == 3 * 13


def test_numbers_of_a_rank_by_hand():
    """Five rows of three on two ranks: rank 0 has three rows. A vector of four: two. Half of them is frozen."""
    model = torch.nn.Linear(3, 5)
    model.bias = torch.nn.Parameter(torch.zeros(4), requires_grad=False)
    assert own_numbers(model, 2) == 9 + 2 and own_numbers(model, 2, trained=True) == 9
    assert own_bytes(copy.deepcopy(model), 1, BFLOAT16) == 2 * 19
    assert isinstance(model.weight, Tensor)
