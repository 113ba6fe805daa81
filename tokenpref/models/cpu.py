"""Code that only CPUs need: float32 products by oneDNN, and layers that keep less and make fewer temporary tensors.

:func:`install_on_cpu` is the only entry point. Nothing in this module is used on a GPU.

**Products.** PyTorch multiplies float32 with MKL, which uses AVX-512 on Intel processors only. oneDNN, which is part of PyTorch,
uses it on other processors too. On two cores of a fifth-generation AMD EPYC it reaches 380 to 470 GFLOP/s, and MKL 180 to 200.

**Layers.** On a CPU, a step's peak memory includes the fragmentation that temporary tensors cause in the C library's heap.
SwiGLU therefore keeps only the two factors of ``silu(w1 x) * w3 x`` and processes some rows at a time, and norms keep one number
per row. The results equal torchtune's up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tokenpref._torchtune import (
    LoRALinear,
    RMSNorm,
)
from tokenpref.models.activations import gated_feed_forward, is_rms_norm, is_swiglu, projections
from tokenpref.ops import products
from tokenpref.ops.products import add_product, product

__all__ = ["OneDNN", "install_on_cpu", "use_fast_products", "uses_onednn"]

_SMALLEST = 1 << 14
"""Smallest size of the second factor. Below it the call, about 10 us, may take longer than the product.

The number of rows does not matter, because a row must give the same numbers for any number of rows.
"""

_AT_A_TIME = 1 << 20
"""The size of the pieces of a product that is added to a tensor: 4 MiB, because oneDNN allocates its results."""

_ROWS = 1024
"""The number of rows of a SwiGLU at a time; products of this size run at full speed."""


def install_on_cpu(model: nn.Module) -> None:
    """Call :func:`use_fast_products`, and replace the forwards of a decoder's layers by those of this module (in place).

    Other kinds of modules are not changed, nor are modules with hooks, float8 or NF4 weights or other dtypes, or under
    ``torch.compile``.
    """
    use_fast_products()
    for module in model.modules():
        forward = _forward_of(module)
        if forward is not None:
            module.forward = MethodType(forward, module)


def use_fast_products() -> None:
    """Use oneDNN's products in this process if they are faster."""
    if uses_onednn():
        products.use(OneDNN())


# --- products ----------------------------------------------------------------------------------------------------------


@cache
def uses_onednn() -> bool:
    """Whether this processor has AVX-512, which MKL leaves unused unless it is Intel's.

    The processor decides, not a measurement: two runs, or two ranks, must not choose differently.
    """
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


class OneDNN:
    """oneDNN's products of float32; see :class:`tokenpref.ops.products.Library`.

    A row's product does not depend on the rows beside it, but for one row alone, which would be summed in another order.
    """

    def takes(self, left: Tensor, right: Tensor) -> bool:
        """Whether it multiplies ``left [N, K]`` with ``right [K, D]``."""
        return (
            left.dtype == right.dtype == torch.float32
            and left.device.type == right.device.type == "cpu"
            and left.shape[0] > 1
            and right.numel() >= _SMALLEST
            and bool(torch.backends.mkldnn.enabled)
        )

    def product(self, left: Tensor, right: Tensor) -> Tensor:
        """``left right``."""
        return self._by_weight(left, right.T)

    def add_product(self, total: Tensor, left: Tensor, right: Tensor, begun: bool) -> Tensor:
        """``total += left right``, or ``total = left right``; some rows at a time."""
        count = max(-(-total.numel() // _AT_A_TIME), 1)
        # One factor has to be copied where neither follows memory's order: the smaller one. Then right^T left^T is made, the
        # transpose of what is wanted.
        turned = None if left.is_contiguous() or right.numel() > left.numel() else right.T.contiguous()
        parts = zip(total.tensor_split(count), left.tensor_split(count), strict=True)
        for rows, part in parts:
            made = self._by_weight(part, right.T) if turned is None else self._by_weight(turned, part).T
            if begun:
                rows.add_(made)
            else:
                torch.mul(
                    made, 1.0, out=rows
                )  # copying a transpose takes one thread and several times as long
        return total

    @staticmethod
    def _by_weight(x: Tensor, weight: Tensor) -> Tensor:
        """``x weight^T``. A ``weight`` with gaps is copied first: oneDNN would read it number by number."""
        if not weight.is_contiguous() and not weight.T.is_contiguous():
            weight = weight.contiguous()
        made: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return made


# --- layers --------------------------------------------------------------------------------------------------------------


def _forward_of(module: nn.Module) -> Callable[..., Tensor] | None:
    """The forward that replaces a module's; None for other kinds of modules."""
    if type(module) is LoRALinear:
        return _lora_linear
    if type(module) is nn.Linear:
        plain = module.bias is None and ("forward" not in vars(module) or _has_our_forward(module))
        return _linear if plain else None
    if is_swiglu(module):
        return _feed_forward
    return _norm if is_rms_norm(module) else None


def _has_our_forward(module: nn.Linear) -> bool:
    return getattr(vars(module).get("forward"), "__func__", None) is _linear


def _lean(x: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether an input is of one of these dtypes, on a CPU (or on no device), and neither compiled nor under autocast."""
    return (
        x.device.type in ("cpu", "meta")
        and x.dtype in dtypes
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


def _feed_forward(layer: nn.Module, x: Tensor) -> Tensor:
    """``w2 (silu(w1 x) * w3 x)`` of ``[..., D]``."""
    gate, up, down = projections(layer)
    if _lean(x, torch.float32, torch.float64) and all(_is_plain(p, x.dtype) for p in (gate, up, down)):
        weights = [p.weight for p in (gate, down, up)]
        rows = x.flatten(0, -2)
        output = _SwiGLU.apply(rows, *weights) if torch.is_grad_enabled() else _swiglu(rows, *weights)
        return output.unflatten(0, x.shape[:-1])
    return gated_feed_forward(layer, x)


def _is_plain(projection: nn.Module | None, dtype: torch.dtype) -> bool:
    """A product with a weight and nothing else, so that it need not be called."""
    return (
        type(projection) is nn.Linear
        and projection.bias is None
        and projection.weight.dtype == dtype
        and ("forward" not in vars(projection) or _has_our_forward(projection))
        and not projection._forward_hooks
        and not projection._forward_pre_hooks
        and not projection._backward_hooks
        and not projection._backward_pre_hooks
    )


def _pieces(count: int) -> Iterator[slice]:
    """As few as ``_ROWS`` allows, of about one size: products of a few rows alone may round otherwise than those of many."""
    size = -(-count // max(-(-count // _ROWS), 1))
    for start in range(0, count, max(size, 1)):
        yield slice(start, min(start + size, count))


def _swiglu(
    x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, factors: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """``w2 (silu(w1 x) * w3 x)`` of rows ``[N, D]``; ``factors``: w1 x and w3 x ``[N, H]``, if they are there."""
    output = x.new_empty(x.shape[0], w2.shape[0])
    place = x.new_empty(min(_ROWS, x.shape[0]), w1.shape[0])
    for rows in _pieces(x.shape[0]):
        if factors is None:
            gate, up = product(x[rows], w1.T), product(x[rows], w3.T)
        else:
            gate, up = (f[rows] for f in factors)
        gated = torch.ops.aten.silu.out(gate, out=place[: gate.shape[0]]).mul_(up)
        add_product(output[rows], gated, w2.T, begun=False)
    return output


class _SwiGLU(torch.autograd.Function):
    """``w2 (silu(w1 x) * w3 x)``, of which only w1 x and w3 x are kept whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
        factors = (product(x, w1.T), product(x, w3.T))
        # Only the gradients of weights need the input.
        ctx.save_for_backward(x if any(ctx.needs_input_grad[1:]) else None, w1, w2, w3, *factors)
        return _swiglu(x, w1, w2, w3, factors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w1, w2, w3, gate, up = ctx.saved_tensors
        want_x, *want_weights = ctx.needs_input_grad
        grad_x = grad.new_zeros(grad.shape[0], w1.shape[1]) if want_x else None
        grad_weights = [
            torch.zeros_like(weight) if wanted else None
            for weight, wanted in zip((w1, w2, w3), want_weights, strict=True)
        ]
        places = [grad.new_empty(min(_ROWS, grad.shape[0]), w1.shape[0]) for _ in range(2)]
        for rows in _pieces(grad.shape[0]):
            of_x = None if x is None else x[rows]
            of_gate, of_up, of_output = gate[rows], up[rows], grad[rows]
            silu, other = (place[: of_output.shape[0]] for place in places)
            of_product = product(of_output, w2)
            torch.ops.aten.silu.out(of_gate, out=silu)
            _add_weight(grad_weights[1], of_output, torch.mul(silu, of_up, out=other))
            grad_up = silu.mul_(of_product)
            of_silu = of_product.mul_(of_up)
            grad_gate = torch.ops.aten.silu_backward.grad_input(of_silu, of_gate, grad_input=other)
            _add_weight(grad_weights[0], grad_gate, of_x)
            _add_weight(grad_weights[2], grad_up, of_x)
            if grad_x is not None:
                add_product(add_product(grad_x[rows], grad_gate, w1), grad_up, w3)
        return grad_x, *grad_weights


def _add_weight(total: Tensor | None, grad: Tensor, x: Tensor | None) -> None:
    """``total += grad^T x``, where a total is wanted."""
    if total is not None and x is not None:
        add_product(total, grad.T, x)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """``x W^T`` of ``[..., D]``, by the library that is fast; see :mod:`tokenpref.ops.products`."""
    weight = layer.weight
    if not _lean(x, torch.float32) or weight.dtype != x.dtype:
        return nn.Linear.forward(layer, x)
    rows = x.flatten(0, -2)
    if not (uses_onednn() and OneDNN().takes(rows, weight.T)):
        return nn.Linear.forward(layer, x)
    output: Tensor = _Linear.apply(rows, weight) if torch.is_grad_enabled() else product(rows, weight.T)
    return output.unflatten(0, x.shape[:-1])


class _Linear(torch.autograd.Function):
    """``x weight^T`` of rows ``[N, D]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return product(x, weight.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        want_x, want_weight = ctx.needs_input_grad
        grad_weight = torch.empty_like(weight) if want_weight else None
        if grad_weight is not None:
            add_product(grad_weight, grad.T, x, begun=False)
        return product(grad, weight) if want_x else None, grad_weight


def _lora_linear(layer: LoRALinear, x: Tensor) -> Tensor:
    """``W x + (alpha / rank) B A x`` of ``[..., D]``; the product with ``W`` as in :func:`_linear`."""
    weight = layer.weight
    plain = layer.bias is None and not layer._quantize_base and weight.dtype == x.dtype
    rows = x.flatten(0, -2)
    if not (plain and _lean(x, torch.float32) and uses_onednn() and OneDNN().takes(rows, weight.T)):
        return LoRALinear.forward(layer, x)
    base: Tensor = _Linear.apply(rows, weight) if torch.is_grad_enabled() else product(rows, weight.T)
    base = base.unflatten(0, x.shape[:-1])
    if layer.disabled:
        return base
    return base + (layer.alpha / layer.rank) * layer.lora_b(layer.lora_a(layer.dropout(x)))


def _norm(norm: Any, x: Tensor) -> Tensor:
    """``scale * x / sqrt(mean(x^2) + eps)`` of ``[..., D]``."""
    weight, eps = (
        (norm.scale, norm.eps) if isinstance(norm, RMSNorm) else (norm.weight, norm.variance_epsilon)
    )
    # Both libraries take float64 to float32 and back.
    if not _lean(x, torch.float32) or weight.dtype != x.dtype:
        found: Tensor = type(norm).forward(norm, x)
        return found
    normed: Tensor = _RootMeanSquare.apply(x, weight, eps)
    return normed


class _RootMeanSquare(torch.autograd.Function):
    """``scale * x / sqrt(mean(x^2) + eps)``, of which x and one number a row are kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        factor = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, scale, factor)
        return (x * factor).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, scale, factor = ctx.saved_tensors
        want_x, want_scale, _ = ctx.needs_input_grad
        normed = x * factor
        product = grad * normed
        grad_scale = product.flatten(0, -2).sum(0) if want_scale else None
        if not want_x:
            return None, grad_scale, None
        # g = grad * scale: (g - normed * mean(g * normed)) * factor
        mean = product.mul_(scale).mean(-1, keepdim=True)
        grad_x = torch.mul(grad, scale, out=product).sub_(normed.mul_(mean)).mul_(factor)
        return grad_x, grad_scale, None
