"""Blocks of scans and of convolutions gated by channel, over maps (B, H, W, dim): MambaIR's (arXiv 2402.15648)."""

from typing import Callable

import torch
from timm.layers import DropPath, SqueezeExcite
from torch import Tensor, nn

from .norm import LayerNorm
from .ss2d import SS2D
from .stems import ChannelsFirst

__all__ = ["ChannelAttentionBlock", "ResidualStateSpaceBlock"]


class ChannelAttentionBlock(ChannelsFirst):
    """Convolutions through fewer channels, then a gate per channel from all of the map.

    Args:
        dim: channels in and out.
        light: depthwise 3x3 convolutions (the second dilated by 2) between Linear layers through dim / 2 channels,
            instead of two 3x3 convolutions through dim / 3.
        gate_layer: (dim, rd_channels) -> the gate over maps (B, dim, H, W); by default from the mean of the map.
    """

    def __init__(self, dim: int, light: bool = False, gate_layer: Callable[..., nn.Module] = SqueezeExcite):
        inner = dim // 2 if light else dim // 3
        gate = gate_layer(dim, rd_channels=dim // 30)
        if light:
            layers = (
                nn.Conv2d(dim, inner, 1), nn.Conv2d(inner, inner, 3, padding=1, groups=inner), nn.GELU(),
                nn.Conv2d(inner, dim, 1), nn.Conv2d(dim, dim, 3, padding=2, dilation=2, groups=dim),
            )  # fmt: skip
        else:
            layers = nn.Conv2d(dim, inner, 3, padding=1), nn.GELU(), nn.Conv2d(inner, dim, 3, padding=1)
        super().__init__(*layers, gate)


class ResidualStateSpaceBlock(nn.Module):
    """Two branches, before each of which the stream is scaled by channel:

        x = skip1 * x + drop_path(mixer(norm1(x)));    x = skip2 * x + attention(norm2(x))

    Args:
        dim: channels.
        d_state, expand: of `SS2D`.
        light, gate_layer: of `ChannelAttentionBlock`.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        d_state: int,
        expand: float,
        light: bool = False,
        drop_path: float = 0.0,
        gate_layer: Callable[..., nn.Module] = SqueezeExcite,
    ):
        super().__init__()
        self.skip1, self.skip2 = (nn.Parameter(torch.ones(dim)) for _ in range(2))
        self.norm1, self.norm2 = LayerNorm(dim), LayerNorm(dim)
        self.mixer = SS2D(dim, expand=expand, d_state=d_state)
        self.attention = ChannelAttentionBlock(dim, light, gate_layer)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.skip1 * x + self.drop_path(self.mixer(self.norm1(x)))
        return self.skip2 * x + self.attention(self.norm2(x))
