"""Products of float32 matrices on a CPU, by the library that is fast there.

PyTorch multiplies float32 with MKL, which takes AVX-512 on Intel's processors alone. On others that have it oneDNN, which is
in PyTorch too, runs at about twice that rate: on two cores of an AMD EPYC of the fifth generation at 380 to 470 GFLOP/s where
MKL reaches 180 to 200 (gradients of weights: 280 to 420). Everywhere else, and for other dtypes, devices and small products,
these functions are PyTorch's own.

Both libraries sum in float32. A row's product does not depend on the rows beside it, so that a policy equal to its reference
has the reference's numbers, however many rows each of them multiplies at a time.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["add_product", "product", "takes_onednn", "uses_onednn"]

_SMALLEST = 1 << 14
"""Numbers of a second factor below which the call, some 10 us, may cost more than the product.

The rows do not count: however many of them there are at a time, their numbers shall be the same.
"""

_TURNED = 1 << 22
"""Numbers at a time of a result that is made transposed: 16 MiB."""


@cache
def uses_onednn() -> bool:
    """Whether this processor has AVX-512, which MKL leaves unused unless it is Intel's."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and _vendor() not in ("GenuineIntel", "")
    )


def _vendor(about: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's maker in the kernel's words; empty if it does not say, as on other systems than Linux."""
    if about.exists():
        for line in about.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("vendor_id"):
                return line.partition(":")[2].strip()
    return ""


def takes_onednn(left: Tensor, right: Tensor) -> bool:
    """Whether oneDNN multiplies ``left [N, ...]`` with ``right``, or with its transpose.

    One row alone it would sum in another order than many.
    """
    return (
        left.dtype == right.dtype == torch.float32
        and left.device.type == right.device.type == "cpu"
        and left.shape[0] > 1
        and right.numel() >= _SMALLEST
        and bool(torch.backends.mkldnn.enabled)
        and uses_onednn()
    )


def _by_onednn(x: Tensor, weight: Tensor) -> Tensor:
    """``x weight^T``; what oneDNN takes in no other way is copied first.

    That are rows of ``x`` that do not follow each other in memory, and a ``weight`` with gaps, which it would read number by
    number, a hundred times slower.
    """
    if not weight.is_contiguous() and not weight.T.is_contiguous():
        weight = weight.contiguous()
    made: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return made


def product(left: Tensor, right: Tensor, place: Tensor | None = None) -> Tensor:
    """``left right`` of ``[N, K]`` and ``[K, D]``, outside of autograd.

    Args:
        left: ``[N, K]``.
        right: ``[K, D]``.
        place: memory for the result ``[N, D]``, which is not always taken: oneDNN makes its own.
    """
    if takes_onednn(left, right):
        return _by_onednn(left, right.T)
    return torch.mm(left, right, out=place)


def add_product(total: Tensor, left: Tensor, right: Tensor, *, begun: bool = True) -> Tensor:
    """``total += left right``, or ``total = left right``, in place.

    Args:
        total: ``[N, D]``.
        left: ``[N, K]``.
        right: ``[K, D]``.
        begun: whether ``total`` holds something already.
    """
    if not takes_onednn(left, right):
        return total.addmm_(left, right, beta=int(begun))
    if left.is_contiguous() or right.numel() > left.numel():
        _put(total, _by_onednn(left, right.T), begun)
        return total
    # Of two factors that would have to be copied the smaller one: right^T left^T is the transpose of what is wanted. It is made
    # of some rows at a time, since a product makes its own memory.
    turned = right.T.contiguous()
    size = max(_TURNED // total.shape[1], 1)
    for rows, part in zip(total.split(size), left.split(size), strict=True):
        _put(rows, _by_onednn(turned, part).T, begun)
    return total


def _put(total: Tensor, made: Tensor, begun: bool) -> None:
    if begun:
        total.add_(made)
    else:
        torch.mul(made, 1.0, out=total)  # copying a transpose takes one thread and several times as long
