"""Bicubic resizing by whole factors, as Matlab's `imresize` does it: what super-resolution is trained and tested on."""

import torch.nn.functional as F
from torch import Tensor

from ..layers.stems import mirror

__all__ = ["BORDER", "enlarge_bicubic", "reduce_bicubic"]

BORDER = 3
"""Pixels of the smaller image, beside one of it, that its value depends on."""


def reduce_bicubic(image: Tensor, factor: int) -> Tensor:
    """Images (B, C, H, W) of sides that `factor` divides -> (B, C, H / factor, W / factor).

    Keys' kernel with a = -1/2, widened by `factor` against aliasing; beyond the border the image is mirrored, with the
    border's own pixels doubled. Matlab's `imresize(image, 1 / factor)` before its rounding.
    """
    size = [side // factor for side in image.shape[-2:]]
    return _resize(image, size, BORDER * factor, BORDER)


def enlarge_bicubic(image: Tensor, factor: int) -> Tensor:
    """Images (B, C, H, W) -> (B, C, H * factor, W * factor): Matlab's `imresize(image, factor)` before its rounding."""
    size = [side * factor for side in image.shape[-2:]]
    return _resize(image, size, BORDER, BORDER * factor)


def _resize(image: Tensor, size: list[int], border: int, cut: int) -> Tensor:
    """Mirrored by `border` pixels, resized, and cut to `size` after `cut` pixels."""
    padded = [side + 2 * cut for side in size]
    # Without "antialias" torch takes another kernel, a = -3/4.
    y = F.interpolate(mirror(image, *[border] * 4), padded, mode="bicubic", align_corners=False, antialias=True)
    return y[..., cut : cut + size[0], cut : cut + size[1]]
