"""Stems and downsamplings of hierarchical backbones, over channels-last maps (B, H, W, C)."""

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from timm.models import register_notrace_module
from torch import Tensor, nn

from .._compat import is_observed
from ..scans.recurrence import is_plain
from .linear import linear
from .norm import LayerNorm
from .tracing import opaque

__all__ = [
    "ChannelsFirst",
    "ConvDownsample",
    "ConvStem",
    "ImageStem",
    "MapConv2d",
    "PatchConv2d",
    "PatchConv3d",
    "PatchExpand",
    "PatchMerging",
    "PatchStem",
    "batch_norm",
    "channels_first",
    "depthwise",
    "mirror",
    "mirror_to_multiple",
    "pad_for_patches",
    "pad_to_multiple",
    "plus_depthwise",
    "up_to_multiple",
]


class MapConv2d(nn.Conv2d):
    """`nn.Conv2d` over a channels-last map (B, H, W, C) -> (B, H', W', C'); the permutations are views."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class _PatchConv(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if not (x.is_cpu and dtype in (torch.bfloat16, torch.float16) and is_plain((x, self.weight, self.bias))):
            return super().forward(x)
        if max(self.kernel_size) < 8 or any(self.padding):
            last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
            return super().forward(x.contiguous(memory_format=last))
        n = len(self.kernel_size)
        for axis, (size, step) in enumerate(zip(self.kernel_size, self.stride)):
            x = x.unfold(2 + axis, size, step)
        patches = x.movedim(1, 1 + n).flatten(1 + n)  # (B, *grid, in_chans * kernel)
        return F.linear(patches, self.weight.flatten(1), self.bias).movedim(-1, 1)


@register_notrace_module
class PatchConv2d(_PatchConv, nn.Conv2d):
    """`nn.Conv2d` over images (B, in_chans, H, W) that are cut into patches; fast in half precision on CPUs, too.

    oneDNN's convolutions in half precision take up to 70 times as long for so few channels, as the size of the image
    falls. So patches of 8 pixels or more are one matrix there, and smaller or padded ones are read channels last.
    """


@register_notrace_module
class PatchConv3d(_PatchConv, nn.Conv3d):
    """The same over videos (B, in_chans, T, H, W)."""


def depthwise(dim: int, kernel_size: int | tuple[int, int], bias: bool = True, dilation: int = 1) -> MapConv2d:
    """A depthwise convolution over a map (B, H, W, dim), which keeps its size; the kernel's sides are odd."""
    padding = tuple(dilation * (side // 2) for side in to_2tuple(kernel_size))
    return MapConv2d(dim, dim, kernel_size, padding=padding, dilation=dilation, groups=dim, bias=bias)


def plus_depthwise(conv: nn.Module, x: Tensor) -> Tensor:
    """x + conv(x) over maps (B, H, W, dim), for a convolution that `depthwise` made or what stands in its place.

    In float32 on CPUs the convolution takes x along, with 1 added to its central weights; in half precision, and in the
    TF32 of GPUs, digits would be lost.
    """
    if type(conv) is not MapConv2d or is_observed(conv):
        return x + conv(x)
    return _plus_convolution(x, conv.weight, conv.bias, conv.padding, conv.dilation)


@opaque
def _plus_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, padding, dilation) -> Tensor:
    whole = (
        is_plain((x, weight, bias))
        and x.dtype == weight.dtype == torch.float32
        and x.is_cpu
        and not torch.is_autocast_enabled(x.device.type)
    )
    if whole:
        centre = torch.zeros(weight.shape[2:], device=x.device)
        centre[weight.shape[2] // 2, weight.shape[3] // 2] = 1
        weight = weight + centre
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, 1, padding, dilation, x.shape[-1]).permute(0, 2, 3, 1)
    return y if whole else x + y


def channels_first(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer over maps (B, C, H, W), applied to a map (B, H, W, C)."""
    return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class ChannelsFirst(nn.Sequential):
    """Layers over maps (B, C, H, W), one after the other, applied to a map (B, H, W, C).

    For layers whose type matters, such as BatchNorms that are converted to SyncBatchNorms.
    """

    def forward(self, x: Tensor) -> Tensor:
        return channels_first(super().forward, x)


def batch_norm(dim: int, eps: float = 1e-5) -> ChannelsFirst:
    """A BatchNorm over the channels of a map (B, H, W, dim)."""
    return ChannelsFirst(nn.BatchNorm2d(dim, eps))


class ImageStem(nn.Sequential):
    """Layers over images (B, in_chans, H, W), one after the other, whose last output becomes a map (B, H', W', C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(_channels_last(x)).permute(0, 2, 3, 1)


@opaque
def _channels_last(x: Tensor) -> Tensor:
    """Images as convolutions make contiguous maps of them; in a graph, which may run anywhere, as they are."""
    return x.contiguous(memory_format=torch.channels_last) if is_plain((x,)) else x


def up_to_multiple(n: int, size: int) -> int:
    """What is missing from n to a multiple of `size`."""
    return (n + size - 1) // size * size - n  # not `-n % size`, of which torch.compile makes no tensor if n is a symbol


@opaque
def pad_to_multiple(x: Tensor, size: int) -> Tensor:
    """Images (B, C, H, W), or volumes, with zeros at the end of each axis, so that `size` divides all sides."""
    return F.pad(x, [n for side in reversed(x.shape[2:]) for n in (0, up_to_multiple(side, size))])


@opaque
def pad_for_patches(x: Tensor, patch_size: int, stride: int) -> Tensor:
    """Images (B, C, H, W) with zeros at the bottom and the right, for H / stride by W / stride patches, rounded up.

    mmcv's "corner" padding of patches that overlap; where they do not, that of `pad_to_multiple`.
    """
    bottom, right = (max((-(-n // stride) - 1) * stride + patch_size - n, 0) for n in x.shape[-2:])
    return F.pad(x, (0, right, 0, bottom))


@opaque
def mirror(x: Tensor, top: int, bottom: int, left: int, right: int) -> Tensor:
    """Images (B, C, H, W) with so many rows and columns more, mirrored at the border, whose own pixels are doubled.

    numpy's `pad(mode="symmetric")`: any number of them, from images of any size.
    """
    for axis, before, after in ((-2, top, bottom), (-1, left, right)):
        size = x.shape[axis]
        if before or after:
            at = torch.arange(-before, size + after, device=x.device) % (2 * size)
            x = x.index_select(axis, torch.minimum(at, 2 * size - 1 - at))
    return x


@opaque
def mirror_to_multiple(x: Tensor, size: int) -> Tensor:
    """Images (B, C, H, W) mirrored at the bottom and the right (see `mirror`), so that `size` divides both sides."""
    bottom, right = (up_to_multiple(n, size) for n in x.shape[-2:])
    return mirror(x, 0, bottom, 0, right)


class PatchStem(nn.Module):
    """Images (B, in_chans, H, W) -> (B, H / patch_size, W / patch_size, dim): one convolution, then LayerNorm.

    Args:
        in_chans: input channels.
        dim: output channels.
        patch_size: side of the square patches, and the step between them.
        kernel_size: side of the convolution, for patches that overlap; by default `patch_size`.
        padding: of the convolution.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int = 4, kernel_size: int | None = None, padding: int = 0):
        super().__init__()
        self.conv = PatchConv2d(in_chans, dim, kernel_size or patch_size, patch_size, padding)
        self.norm = LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).permute(0, 2, 3, 1))


class ConvStem(nn.Module):
    """Images (B, in_chans, H, W) -> (B, H / 4, W / 4, dim), sizes rounded up: two 3x3 convolutions of stride 2.

    Each is followed by LayerNorm, an activation stands between them, and the first makes dim / 2 channels.

    Args:
        in_chans: input channels.
        dim: output channels.
        kernel_size, stride: of the first convolution, which is padded by 1.
        act_layer: the activation.
    """

    def __init__(self, in_chans: int, dim: int, kernel_size: int = 3, stride: int = 2, act_layer: type = nn.GELU):
        super().__init__()
        self.conv1 = PatchConv2d(in_chans, dim // 2, kernel_size, stride, 1)
        self.norm1 = LayerNorm(dim // 2)
        self.act = act_layer()
        self.conv2 = MapConv2d(dim // 2, dim, 3, 2, 1)
        self.norm2 = LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.conv1(x).permute(0, 2, 3, 1)))
        return self.norm2(self.conv2(x))


@register_notrace_module
class PatchMerging(nn.Module):
    """(B, H, W, C) -> (B, H / 2, W / 2, out): LayerNorm and a Linear over each 2x2 patch, as Swin has it.

    The four neighbours are concatenated in the order (0, 0), (1, 0), (0, 1), (1, 1) of (row, column). An odd side gets
    a zero row or column at the bottom or right, before the norm.
    """

    def __init__(self, dim: int, out_dim: int):
        super().__init__()
        self.norm = LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        x = torch.cat([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], -1)
        return linear(self.reduction, self.norm(x))


class ConvDownsample(nn.Module):
    """(B, H, W, C) -> (B, H / 2, W / 2, out): a convolution of stride 2, then LayerNorm.

    Args:
        dim: input channels.
        out_dim: output channels.
        kernel_size: 3 (padded; odd sizes are rounded up) or 2 (odd sizes are rounded down).
    """

    def __init__(self, dim: int, out_dim: int, kernel_size: int = 3):
        super().__init__()
        self.conv = MapConv2d(dim, out_dim, kernel_size, 2, kernel_size // 2 if kernel_size % 2 else 0)
        self.norm = LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class PatchExpand(nn.Module):
    """(B, H, W, C) -> (B, factor H, factor W, out): a Linear to the patch that each position becomes, then LayerNorm.

    The outputs of the Linear are (row of the patch, column, channel). The reverse of `PatchMerging`, as Swin-Unet has
    it (Cao et al., arXiv 2105.05537).
    """

    def __init__(self, dim: int, out_dim: int, factor: int = 2):
        super().__init__()
        self.factor = factor
        self.expand = nn.Linear(dim, factor**2 * out_dim, bias=False)
        self.norm = LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, _ = x.shape
        x = linear(self.expand, x).view(batch, height, width, self.factor, self.factor, -1).transpose(2, 3)
        return self.norm(x.reshape(batch, self.factor * height, self.factor * width, -1))
