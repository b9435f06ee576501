"""A convolution, its BatchNorm and its activation, as mmcv bundles them, over maps (B, C, H, W)."""

from collections import OrderedDict
from typing import Callable

from torch import nn

__all__ = ["conv_module"]


def conv_module(
    in_chans: int,
    out_chans: int,
    kernel_size: int = 1,
    stride: int = 1,
    padding: int | None = None,
    act_layer: Callable[[], nn.Module] = nn.ReLU,
    **norm,
) -> nn.Sequential:
    """(B, in_chans, H, W) -> (B, out_chans, H', W'): convolution without bias, BatchNorm, activation.

    Parameters are named as in mmcv's `ConvModule`: `conv.weight`, `bn.weight`, ...

    Args:
        kernel_size, stride: of the convolution.
        padding: of zeros; by default half of the kernel, so that stride 1 keeps the size.
        act_layer: the activation.
        norm: of `nn.BatchNorm2d`: `eps`, `momentum`.
    """
    padding = kernel_size // 2 if padding is None else padding
    conv = nn.Conv2d(in_chans, out_chans, kernel_size, stride, padding, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_chans, **norm), activate=act_layer()))
