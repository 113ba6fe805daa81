"""Matrix products outside of autograd, by PyTorch or by a library that is faster on this machine.

The product of a row must not depend on the other rows, so that a policy that equals its reference gives the same numbers.
"""

from __future__ import annotations

from functools import cache
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Library", "add_product", "product", "use"]


class Library(Protocol):
    """A library for products; see :mod:`tokenpref.models.cpu`."""

    def takes(self, left: Tensor, right: Tensor) -> bool:
        """Whether the library multiplies these factors."""
        ...

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """``left right``."""
        ...

    def add_product(self, total: Tensor, left: Tensor, right: Tensor, begun: bool) -> Tensor:
        """``total += left right``, or ``total = left right`` if ``begun`` is False."""
        ...


_library: Library | None = None


def use(library: Library | None) -> None:
    """Use a library for all products that it supports, in this process. None: PyTorch multiplies everything."""
    global _library
    _library = library


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left right`` of ``[N, K]`` and ``[K, D]``."""
    if _library is not None and _library.takes(left, right):
        return _library.product(left, right)
    if not _multiplies(left.dtype, left.device.type):
        return product(left.float(), right.float()).to(left.dtype)
    return torch.mm(left, right)


def add_product(total: Tensor, left: Tensor, right: Tensor, *, begun: bool = True) -> Tensor:
    """``total += left right``, or ``total = left right``, in place.

    Args:
        total: ``[N, D]``; may have a wider dtype than the factors (float32 for half precision). Products of half precision
            are rounded before they are added on a CPU, but not on a GPU.
        left: ``[N, K]``.
        right: ``[K, D]``.
        begun: whether ``total`` already has values.
    """
    if _library is not None and _library.takes(left, right):
        return _library.add_product(total, left, right, begun)
    if total.dtype == left.dtype and _multiplies(left.dtype, left.device.type):
        return total.addmm_(left, right, beta=int(begun))
    made = torch.mm(left, right, out_dtype=total.dtype) if left.is_cuda else product(left, right)
    return total.add_(made) if begun else total.copy_(made)


@cache
def _multiplies(dtype: torch.dtype, device: str) -> bool:
    """Whether a device has instructions for products of a dtype. Otherwise PyTorch takes 10 to 100 times float32's time."""
    asked = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    if device != "cpu" or dtype not in asked:
        return True
    return torch.backends.mkldnn.is_available() and bool(getattr(torch.ops.mkldnn, asked[dtype])())
