"""The frame of restoration networks at full resolution: a convolution, groups of blocks around residuals, a head.

    f = conv_first(x - mean);    f = f + conv_after_body(norm(groups(f)));    y = head(f)

Liang et al., "SwinIR: Image Restoration Using Swin Transformer", ICCV workshops 2021, arXiv 2108.10257, whose frame
MambaIR and MambaIRv2 took over with other blocks. Nothing changes the resolution but the head, so that any size runs.
"""

import re
from itertools import chain
from typing import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ...checkpoint import fit_shapes, rename
from ...errors import InputError, known
from ...layers.blocks import Stage
from ...layers.linear import init_linear
from ...layers.norm import LayerNorm
from ...layers.stems import MapConv2d, mirror_to_multiple

__all__ = ["HEADS", "Group", "RestorationFrame", "residual_conv"]

HEAD_DIM = 64  # channels between the layers of a head


def residual_conv(dim: int, kind: str) -> nn.Module:
    """The convolution at the end of a residual, over maps (B, H, W, dim).

    Args:
        dim: channels.
        kind: "1conv" (3x3) or "3conv" (3x3, 1x1, 3x3 through a quarter of the channels, with LeakyReLUs between).
    """
    if known("resi_connection", kind, ("1conv", "3conv")) == "1conv":
        return MapConv2d(dim, dim, 3, padding=1)
    inner = dim // 4
    layers = MapConv2d(dim, inner, 3, padding=1), MapConv2d(inner, inner, 1), MapConv2d(inner, dim, 3, padding=1)
    return nn.Sequential(layers[0], nn.LeakyReLU(0.2), layers[1], nn.LeakyReLU(0.2), layers[2])


class Group(Stage):
    """Blocks and a convolution, around which there is a residual.

    Args:
        dim: channels of the map (B, H, W, dim).
        blocks: the blocks.
        resi_connection: of `residual_conv`.
    """

    def __init__(self, dim: int, blocks: Iterable[nn.Module], resi_connection: str = "1conv"):
        super().__init__(None, blocks)
        self.conv = residual_conv(dim, resi_connection)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(super().forward(x))


# -- heads: features (B, C, H, W) -> images (B, out_chans, H * s, W * s) ----------------------------------------------


def _conv(in_chans: int, out_chans: int) -> nn.Conv2d:
    return nn.Conv2d(in_chans, out_chans, 3, padding=1)


def _entry(dim: int) -> tuple[nn.Module, nn.Module]:
    return _conv(dim, HEAD_DIM), nn.LeakyReLU(0.01)


def residual_head(dim: int, out_chans: int, scale: int) -> nn.Sequential:
    """What is added to the image. Raises InputError: a scale other than 1."""
    if scale != 1:
        raise InputError(f"a model that enlarges {scale} times needs an upsampler: {', '.join(filter(None, HEADS))}")
    return nn.Sequential(_conv(dim, out_chans))


def shuffle_head(dim: int, out_chans: int, scale: int) -> nn.Sequential:
    """Steps of x2 (or one of x3), each a convolution and a pixel shuffle, between two convolutions."""
    steps = {1: [], 2: [2], 3: [3], 4: [2, 2], 8: [2, 2, 2]}[known("upscale", scale, (1, 2, 3, 4, 8))]
    shuffles = ((_conv(HEAD_DIM, HEAD_DIM * step**2), nn.PixelShuffle(step)) for step in steps)
    return nn.Sequential(*_entry(dim), *chain.from_iterable(shuffles), _conv(HEAD_DIM, out_chans))


def direct_head(dim: int, out_chans: int, scale: int) -> nn.Sequential:
    """One convolution and one pixel shuffle."""
    return nn.Sequential(_conv(dim, out_chans * scale**2), nn.PixelShuffle(scale))


def nearest_head(dim: int, out_chans: int, scale: int) -> nn.Sequential:
    """Two steps of x2, each the nearest pixel and a convolution: x4 without patterns, for real images."""
    known("upscale", scale, (4,))
    steps = ((nn.Upsample(scale_factor=2), _conv(HEAD_DIM, HEAD_DIM), nn.LeakyReLU(0.2)) for _ in range(2))
    last = _conv(HEAD_DIM, HEAD_DIM), nn.LeakyReLU(0.2), _conv(HEAD_DIM, out_chans)
    return nn.Sequential(*_entry(dim), *chain.from_iterable(steps), *last)


HEADS: dict[str, Callable[[int, int, int], nn.Sequential]] = {
    "": residual_head,
    "pixelshuffle": shuffle_head,
    "pixelshuffledirect": direct_head,
    "nearest+conv": nearest_head,
}
"""By the published names of the upsamplers: (channels, channels of the image, scale) -> the head."""

# What published files call the convolutions of a head, in the order of the head.
_HEAD_NAMES = {
    "": ["conv_last"],
    "pixelshuffle": ["conv_before_upsample.0", "upsample.0", "upsample.2", "upsample.4", "conv_last"],
    "pixelshuffledirect": ["upsample.0"],
    "nearest+conv": ["conv_before_upsample.0", "conv_up1", "conv_up2", "conv_hr", "conv_last"],
}


class RestorationFrame(nn.Module):
    """Degraded images in 0..1 -> restored ones, `upscale` times as large, not clipped.

    Subclasses give the blocks, and `names`: what published files call their parts.

    Args:
        in_chans: channels of the images, in and out; of three the mean of DIV2K is taken away.
        upscale: how much larger the result is.
        upsampler: the head, see `HEADS`; "" adds the answer to the image.
        embed_dim: channels C.
        depths: blocks in each group.
        img_range: factor of the images inside.
        patch_norm: a LayerNorm before the first group.
        resi_connection: of `residual_conv`.
        group: (number of the group, number of blocks) -> its blocks, over maps (B, H, W, C).
        divisor: of the sides that the blocks take; images are mirrored at the bottom and the right up to it.

    Raises:
        InputError: no such head, or not for this scale.
    """

    names: Sequence[tuple[str, str]] = ()
    classifiers = ("head",)  # its shapes follow the scale: left out of a file for another one

    def __init__(
        self,
        in_chans: int,
        upscale: int,
        upsampler: str,
        embed_dim: int,
        depths: Sequence[int],
        img_range: float,
        patch_norm: bool,
        resi_connection: str,
        group: Callable[[int, int], Iterable[nn.Module]],
        divisor: int = 1,
    ):
        super().__init__()
        self.in_chans, self.upscale, self.upsampler, self.divisor = in_chans, upscale, upsampler, divisor
        self.img_range = img_range
        mean = (0.4488, 0.4371, 0.4040) if in_chans == 3 else (0.0,) * in_chans
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.conv_first = _conv(in_chans, embed_dim)
        self.patch_norm = LayerNorm(embed_dim) if patch_norm else nn.Identity()
        self.groups = nn.ModuleList(
            Group(embed_dim, group(i, depth), resi_connection) for i, depth in enumerate(depths)
        )
        self.norm = LayerNorm(embed_dim)
        self.conv_after_body = residual_conv(embed_dim, resi_connection)
        self.head = HEADS[known("upsampler", upsampler, HEADS)](embed_dim, in_chans, upscale)
        self.apply(init_linear)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W), normalised, of sides that `divisor` divides -> features (B, H, W, C)."""
        first = self.conv_first(x).permute(0, 2, 3, 1)
        y = self.patch_norm(first)
        for group in self.groups:
            y = group(y)
        return first + self.conv_after_body(self.norm(y))

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> (B, in_chans, H * upscale, W * upscale)."""
        height, width = (self.upscale * side for side in x.shape[-2:])
        x = mirror_to_multiple((x - self.mean) * self.img_range, self.divisor)
        y = self.head(self.forward_features(x).permute(0, 3, 1, 2))
        y = y if self.upsampler else x + y
        return (y / self.img_range + self.mean)[..., :height, :width]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass, block by block."""
        for group in self.groups:
            group.grad_checkpointing = enable

    def checkpoint_filter(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The official code's keys to linescan's."""
        convs = [i for i, layer in enumerate(self.head) if isinstance(layer, nn.Conv2d)]
        names = _HEAD_NAMES[self.upsampler]
        if self.upsampler == "pixelshuffle":  # of which there are as many as steps
            names = [names[0], *names[1 : len(convs) - 1], names[-1]]
        head = [(rf"^{re.escape(name)}\.", f"head.{i}.") for name, i in zip(names, convs)]
        frame = [(r"^patch_embed\.norm\.", "patch_norm."), (r"^layers\.(\d+)\.", r"groups.\1.")]
        return fit_shapes(rename(state, [*frame, *head, *self.names]), self)
