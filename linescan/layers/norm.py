"""Norms that compute in float32 whatever the stream's dtype, on a CPU in a kernel where no gradient is wanted."""

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..scans.kernels import cpu
from ..scans.recurrence import is_plain, precise, wants_gradient
from .tracing import opaque

__all__ = ["LayerNorm", "RMSNorm", "RowNorm", "at_least_float32"]


@opaque
def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or float64 if it is: the dtype of a residual stream between half-precision layers."""
    return precise(x)


@register_notrace_module
class LayerNorm(nn.LayerNorm):
    """torch's, (..., C) -> (..., C); on a CPU a kernel computes it where no gradient is wanted."""

    def forward(self, x: Tensor) -> Tensor:
        inputs = x, self.weight, self.bias
        if is_plain(inputs) and not wants_gradient(inputs):
            if all(t is not None and t.dtype is x.dtype and t.shape == x.shape[-1:] for t in inputs[1:]):
                out = cpu.norm(*inputs, self.eps)
                if out is not None:
                    return out
        return super().forward(x)


@register_notrace_module
class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis: w * x / sqrt(mean(x^2) + eps) (Zhang and Sennrich, arXiv 1910.07467).

    Half-precision inputs are normalised in float32; the output has the weight's dtype, so that a float32 residual
    stream feeds half-precision layers.

    Args:
        dim: size of the last axis.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        own = self.weight
        if is_plain((x, own)) and not wants_gradient((x, own)):
            out = cpu.norm(x, own, None, self.eps, dtype=own.dtype)
            if out is not None:
                return out
        x = precise(x)
        weight = own if own.dtype is x.dtype else own.to(x.dtype)
        out = F.rms_norm(x, weight.shape, weight, self.eps)
        return out if out.dtype is own.dtype else out.to(own.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class RowNorm(nn.BatchNorm1d):
    """Batch norm of as many rows (N, C) as there are, as of voxels; a single one by the running statistics.

    One row has no deviation, and torch raises an error in training.
    """

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != 1:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
