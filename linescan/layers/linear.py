"""Linear maps of float32 tokens on a CPU, through oneDNN.

torch hands float32 matrices to MKL, which uses the full width of the vectors on Intel's processors only. oneDNN, which
torch carries for its convolutions, does so on all of them: half the time on AMD's with AVX-512. `linear` takes it where
nothing records or traces the call; everywhere else it is `torch.nn.functional.linear`.
"""

import platform

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..scans.recurrence import is_plain

__all__ = ["Linear", "linear", "through_onednn"]

_ONEDNN = (
    platform.machine().lower() in ("x86_64", "amd64")  # elsewhere torch takes the best library by itself
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., C), weight (C', C), bias (C',) -> (..., C'): `torch.nn.functional.linear`, faster where it can be."""
    if (
        _ONEDNN
        and x.dtype == weight.dtype == torch.float32
        and x.is_cpu
        and x.ndim > 1
        and x.numel()
        and x.shape[-1] == weight.shape[-1]
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
        and is_plain((x, weight, bias))
    ):
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear` that computes with `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in_features) -> (..., out_features)."""
        return linear(x, self.weight, self.bias)


def through_onednn(model: nn.Module) -> None:
    """Makes every plain `nn.Linear` inside a model, timm's included, a `Linear`; weights and names stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
