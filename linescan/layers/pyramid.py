"""Feature pyramids from the single-scale maps of plain backbones, and maps resized."""

from typing import Sequence

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from ..errors import InputError

__all__ = ["RescaledFeatures", "SimpleFeaturePyramid", "resize"]


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (B, C, H, W) resized to (height, width) `size`: bilinear, align_corners=False."""
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


class RescaledFeatures(nn.Module):
    """Brings four maps of stride 16 (or 8) to strides 4, 8, 16, 32, keeping their channels, as BEiT's dense code does.

    Parameter names (`fpn1.0.weight`, ...) are the published ones.

    Args:
        dim: channels of every map.
        patch_size: 16: x4 (two transposed convolutions with BatchNorm and GELU between), x2, x1, max-pool 2;
            8: x2, x1, max-pool 2, max-pool 4.
    """

    def __init__(self, dim: int, patch_size: int = 16):
        super().__init__()

        def up():
            return nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)

        if patch_size == 16:
            self.fpn1 = nn.Sequential(up(), nn.BatchNorm2d(dim), nn.GELU(), up())
            self.fpn2 = nn.Sequential(up())
            self.fpn3 = nn.Identity()
            self.fpn4 = nn.MaxPool2d(2)
        elif patch_size == 8:
            self.fpn1 = nn.Sequential(up())
            self.fpn2 = nn.Identity()
            self.fpn3 = nn.Sequential(nn.MaxPool2d(2))
            self.fpn4 = nn.Sequential(nn.MaxPool2d(4))
        else:
            raise InputError(f"a rescaled pyramid exists for patch sizes 16 and 8, not {patch_size}")

        self.dim, self.patch_size = dim, patch_size

    def describe(self) -> tuple[list[int], list[int], list[str]]:
        """Channels, strides and modules of the maps."""
        return [self.dim] * 4, [4, 8, 16, 32], [f"fpn{i}" for i in (1, 2, 3, 4)]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four (B, dim, H, W) maps of one scale -> maps at strides 4, 8, 16, 32.

        Raises:
            InputError: maps without a cell of stride 32.
        """
        if min(maps[-1].shape[2:]) < 32 // self.patch_size:
            raise InputError("a rescaled pyramid needs images of at least 32x32 pixels, its last map has stride 32")
        return [op(x) for op, x in zip((self.fpn1, self.fpn2, self.fpn3, self.fpn4), maps)]


class _NormedConv(nn.Conv2d):
    """A bias-free convolution followed by a LayerNorm over channels, named `norm` below it."""

    def __init__(self, in_chans: int, out_chans: int, kernel_size: int):
        super().__init__(in_chans, out_chans, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = LayerNorm2d(out_chans, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class SimpleFeaturePyramid(nn.Module):
    """Pyramid p2..p6 (strides 4..64) from one stride-16 map: Li et al., "Exploring Plain Vision Transformer Backbones
    for Object Detection", arXiv 2203.16527. Parameter names (`simfp_2.0.weight`, ...) are detectron2's.

    Args:
        dim: channels of the input map.
        patch_size: its stride; 16, as published.
        out_channels: channels of every level.

    Raises:
        InputError: another stride.
    """

    def __init__(self, dim: int, patch_size: int = 16, out_channels: int = 256):
        super().__init__()
        if patch_size != 16:
            raise InputError(f"a simple feature pyramid exists for patch size 16, not {patch_size}")
        half, quarter = dim // 2, dim // 4

        def up(inner: int, outer: int):
            return nn.ConvTranspose2d(inner, outer, kernel_size=2, stride=2)

        resize = {
            2: ([up(dim, half), LayerNorm2d(half, eps=1e-6), nn.GELU(), up(half, quarter)], quarter),
            3: ([up(dim, half)], half),
            4: ([], dim),
            5: ([nn.MaxPool2d(2)], dim),
        }
        for level, (layers, width) in resize.items():
            layers += [_NormedConv(width, out_channels, 1), _NormedConv(out_channels, out_channels, 3)]
            self.add_module(f"simfp_{level}", nn.Sequential(*layers))
        self.p6 = nn.MaxPool2d(1, 2)
        self.out_channels = out_channels

    def describe(self) -> tuple[list[int], list[int], list[str]]:
        """Channels, strides and modules of the maps."""
        return [self.out_channels] * 5, [4, 8, 16, 32, 64], [*(f"simfp_{level}" for level in (2, 3, 4, 5)), "p6"]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """The last of maps (B, dim, H, W) at stride 16 -> five (B, out_channels, ., .) at strides 4, 8, 16, 32, 64."""
        pyramid = [self.get_submodule(f"simfp_{level}")(maps[-1]) for level in (2, 3, 4, 5)]
        return [*pyramid, self.p6(pyramid[-1])]
