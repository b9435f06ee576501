"""Linear layers of models: ordinary `nn.Linear`s, computed on the fast path of `linescan.scans.matmul` on a CPU."""

import timm.layers
import torch
from torch import Tensor, nn

from .._compat import is_jit_tracing, is_observed
from ..scans import matmul

__all__ = ["init_linear", "linear", "trunc_normal_"]


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)`; an `nn.Linear` that nothing observes is computed by `linescan.scans.matmul.linear`.

    So the layers of a model are `nn.Linear` by type, as tools expect (quantisation, FLOP counters, low-rank adapters),
    and what such a tool hooks to a layer, or puts in its place, is called.

    Args:
        layer: an `nn.Linear`, or what stands in its place.
        x: (..., in_features).

    Returns:
        (..., out_features).
    """
    if (
        type(layer) is not nn.Linear
        or type(x) is not Tensor
        or torch.compiler.is_compiling()
        or is_jit_tracing()
        or is_observed(layer)
    ):
        return layer(x)
    return matmul.linear(x, layer.weight, layer.bias)


def trunc_normal_(x: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """timm's, in place; a tensor on the meta device, where it takes as long as a small model, is left as it is."""
    return x if x.is_meta else timm.layers.trunc_normal_(x, mean, std)


def init_linear(module: nn.Module) -> None:
    """The initialisation that most systems share, for `nn.Module.apply`: weights trunc-normal (0.02), biases 0."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
