"""Resizing as published trainings and tests do it.

Super-resolution: bicubic, by whole factors, as Matlab's `imresize`. YOLO: into the middle of a square, as OpenCV.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..layers.stems import mirror

__all__ = ["BORDER", "Letterbox", "enlarge_bicubic", "letterbox", "reduce_bicubic"]

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


class Letterbox(NamedTuple):
    """An image as large as fits into a size, with a border around it: `letterbox`.

    Attributes:
        image: (H, W, 3) bytes.
        scale: (across, down), pixels per pixel of the original.
        corner: (left, top) of the image inside.
    """

    image: np.ndarray
    scale: tuple[float, float]
    corner: tuple[int, int]

    def undo(self, boxes: Tensor) -> Tensor:
        """Boxes (N, 4) left, top, right, bottom in this image -> in the original."""
        return (boxes - boxes.new_tensor(self.corner * 2)) / boxes.new_tensor(self.scale * 2)

    def apply(self, boxes: Tensor) -> Tensor:
        """The inverse of `undo`."""
        return boxes * boxes.new_tensor(self.scale * 2) + boxes.new_tensor(self.corner * 2)


def letterbox(image: np.ndarray, size: tuple[int, int], fill: int = 114) -> Letterbox:
    """An image (H, W, 3) of bytes in the middle of one of (height, width) `size`, in its own proportions.

    Made smaller, each pixel is the mean of what it covers; made larger, pixels are interpolated linearly (OpenCV's
    "area" and "linear", as YOLO is trained and tested).
    """
    before = image.shape[:2]
    ratio = min(size[0] / before[0], size[1] / before[1])
    inner = tuple(max(int(side * ratio), 1) for side in before)
    if ratio < 1:
        image = _means(_means(image, 0, inner[0]), 1, inner[1])
    elif ratio > 1:
        pixels = torch.from_numpy(image.astype(np.float32)).movedim(-1, 0)[None]
        image = F.interpolate(pixels, inner, mode="bilinear", align_corners=False)[0].movedim(0, -1).numpy()
    top, left = ((side - part) // 2 for side, part in zip(size, inner))
    whole = np.full((*size, 3), fill, np.uint8)
    whole[top : top + inner[0], left : left + inner[1]] = np.rint(image)
    return Letterbox(whole, (inner[1] / before[1], inner[0] / before[0]), (left, top))


def _means(x: np.ndarray, axis: int, count: int) -> np.ndarray:
    """Means over `count` equal parts of an axis; values on a border count with the share that lies inside."""
    x = np.moveaxis(x, axis, 0)
    sums = np.concatenate([np.zeros_like(x[:1], np.float64), np.cumsum(x, 0, dtype=np.float64)])
    edges = np.linspace(0, len(x), count + 1)
    at = np.minimum(edges.astype(int), len(x) - 1)
    until = sums[at] + (edges - at).reshape(-1, *[1] * (x.ndim - 1)) * x[at]
    return np.moveaxis(np.diff(until, axis=0) * (count / len(x)), 0, axis)
