"""Linear maps of tokens, one for all or one per route, by the faster one of a CPU's libraries.

torch hands float32 matrices to MKL, which uses the full width of the vectors on Intel's processors only. oneDNN, which
torch carries for its convolutions, does so on all of them: half the time on AMD's with AVX-512, forward and backward.
`linear` takes it there in eager mode; on Intel's, where MKL is the faster one, by up to a seventh of a small model's
time, and where a call is traced or transformed, it is `torch.nn.functional.linear`.

In bfloat16 torch takes oneDNN on all of them, but has it add to outputs that begin as copies of the bias, which costs a
quarter of a small product; `linear` hands over the bias.
"""

import os
import platform

import torch
import torch.nn.functional as F
from torch import Tensor

from .._compat import has_bfloat16_products, linear_pointwise
from .recurrence import is_plain, wants_gradient

__all__ = ["linear", "matmul", "project_routes", "project_routes_backward"]

# torch keeps a compiled kernel for every shape that oneDNN has multiplied, in two caches of 1,024 each: hundreds of MB
# after images of changing sizes. 256 have room for several sizes: a training step of these models has 10 to 70 shapes.
# torch reads these variables at its first product; a value that is set already stands.
for _cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "256")


def _is_intel() -> bool:
    try:
        with open("/proc/cpuinfo") as about:
            return "GenuineIntel" in about.read(4096)
    except OSError:  # not Linux
        return "GenuineIntel" in platform.processor()


# Elsewhere torch takes the best library by itself.
_onednn = linear_pointwise() if platform.machine().lower() in ("x86_64", "amd64") else None
_through_onednn = None if _is_intel() and torch.backends.mkl.is_available() else _onednn
_has_bfloat16 = _onednn is not None and has_bfloat16_products()


class _Recorded(torch.autograd.Function):
    """The product with a derivative, which is made of such products again."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _through_onednn(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            linear(grad, weight.T) if of_x else None,
            linear(rows.T, x.flatten(0, -2).T) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., C), weight (C', C), bias (C',) -> (..., C'): `torch.nn.functional.linear`, faster where it can be."""
    inputs = x, weight, bias
    in_bfloat16 = (
        _has_bfloat16 and bias is not None and x.dtype == bias.dtype == torch.bfloat16 and not wants_gradient(inputs)
    )
    if not (
        (in_bfloat16 or (_through_onednn is not None and x.dtype == torch.float32))
        and x.is_cpu
        and is_plain(inputs)
        and x.dtype == weight.dtype
        and x.ndim > 1
        and x.numel()
        and x.shape[-1] == weight.shape[-1]
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
    ):
        return F.linear(*inputs)
    forward = _onednn if in_bfloat16 else _through_onednn
    return (_Recorded.apply if wants_gradient(inputs) else forward)(*inputs)


class _Precise(torch.autograd.Function):
    generate_vmap_rule = True  # and the other transforms of torch.func

    @staticmethod
    def forward(x, y):
        with torch.autocast(x.device.type, enabled=False):
            return x @ y

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        return matmul(grad, y.mT).sum_to_size(x.shape), matmul(x.mT, grad).sum_to_size(y.shape)

    @staticmethod
    def jvp(ctx, of_x, of_y):
        x, y = ctx.saved_tensors
        return matmul(of_x, y) + matmul(x, of_y)


def matmul(x: Tensor, y: Tensor) -> Tensor:
    """x @ y of matrices, whose products and their gradients autocast leaves as they are."""
    cast = not x.is_meta and torch.is_autocast_enabled(x.device.type)
    return _Precise.apply(x, y) if cast else x @ y


def project_routes(x: Tensor, weight: Tensor) -> Tensor:
    """One linear map per route: x (B, K or 1, L, C), weight (K or 1, C', C) -> (B, K, L, C')."""
    if x.shape[1] == 1:  # one linear map for all routes, from tokens that they share
        return linear(x[:, 0], weight.flatten(0, 1)).unflatten(-1, weight.shape[:2]).movedim(2, 1)
    if weight.shape[0] == 1:
        return linear(x, weight[0])
    one_by_mkl = _through_onednn is None and is_plain((x, weight)) and x.shape[0] == 1
    if one_by_mkl or not x.is_cpu:
        return torch.matmul(x, weight.mT)
    # On CPUs faster than a batched product, which lays the weights out for every sample.
    return torch.stack([linear(x[:, k], w) for k, w in enumerate(weight)], 1)


def project_routes_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient (B, K, L, C') of `project_routes(x, weight)` to those of x and weight."""
    of_x, of_weight = project_routes(grad, weight.mT), torch.matmul(grad.mT, x).sum(0)
    return of_x.sum_to_size(x.shape), of_weight.sum_to_size(weight.shape)
