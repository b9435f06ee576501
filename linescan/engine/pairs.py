"""Pairs of images, a degraded one and a sharp one, whole or in patches: what restoration is trained and scored on."""

import random
from pathlib import Path
from typing import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import InputError
from ..media.degrade import Degradation
from ..media.find import find_images
from ..media.images import read_image
from .image_sets import roots, split

__all__ = ["Pairs", "find_pairs", "open_pairs", "symmetry"]

CACHE = 2**28
"""Bytes of images that a set keeps in memory, once they are read."""

SYMMETRIES = 8

Files = tuple[list[Path], list[Path] | None]
"""Sharp images, and the degraded one of each, or None."""


def symmetry(image: Tensor, number: int, inverse: bool = False) -> Tensor:
    """One of the eight symmetries of the square, of images (..., H, W): 0 leaves them as they are.

    Args:
        number: of the symmetry: bits mirror the columns (1), the rows (2) and the diagonal (4), in this order.
        inverse: undo it.
    """
    flips = [axis for bit, axis in ((1, -1), (2, -2)) if number & bit]
    if inverse:
        return (image.mT if number & 4 else image).flip(flips)
    image = image.flip(flips)
    return image.mT if number & 4 else image


def find_pairs(folder: str | Path, scale: int = 1) -> Files:
    """The sharp images of a folder, and the degraded one of each; None where there are no degraded ones.

    Args:
        folder: of images; or with `high` and `low` in it, folders of images of the same names, of which those in `low`
            may end in the scale, as in "0001x2.png".
        scale: by which a degraded image is smaller.

    Raises:
        InputError: no such folder, no images in it, or an image without a partner.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    high, low = folder / "high", folder / "low"
    if not high.is_dir():
        if low.is_dir():
            raise InputError(f"{low} has no {high} beside it")
        if not (files := find_images(folder)):
            raise InputError(f"{folder} holds no images")
        return files, None

    def named(root: Path, ending: str = "") -> dict[str, Path]:
        if not (files := find_images(root)):
            raise InputError(f"{root} holds no images")
        return {str(path.relative_to(root).with_suffix("")).removesuffix(ending): path for path in files}

    sharp = named(high)
    if not low.is_dir():
        return list(sharp.values()), None
    degraded = named(low, f"x{scale}")
    if odd := sorted(sharp.keys() ^ degraded.keys()):
        raise InputError(f"{high} and {low} do not hold the same images: {odd[0]} is in one alone")
    return list(sharp.values()), [degraded[name] for name in sharp]


def open_pairs(data: str, val: str | None, fraction: float, scale: int) -> tuple[Files, Files]:
    """The files to train on, and those held out.

    Args:
        data: a folder as `find_pairs` takes it, or one with such folders `train` and `val` (or `test`) in it.
        val: such a folder to hold out. Without it, `fraction` of the files of `data` are, always the same ones.
        scale: by which degraded images are smaller.

    Raises:
        InputError: see `find_pairs`.
    """
    root, held_out = roots(data, val)
    high, low = find_pairs(root, scale)
    if held_out:
        return (high, low), find_pairs(held_out, scale)
    parts = []
    for part in (False, True):
        chosen = sorted(split([0] * len(high), part, fraction))
        parts.append(([high[i] for i in chosen], low and [low[i] for i in chosen]))
    return parts[0], parts[1]


class Pairs(Dataset):
    """Items {"low": (C, h, w), "high": (C, h * scale, w * scale)}, float32 in 0..1.

    Args:
        high: files of the sharp images.
        low: of the degraded ones; None to degrade them on the fly.
        channels: 1 (luma) or 3.
        scale: by which degraded images are smaller.
        degrade: how, where there is no `low`.
        patch: side of the patches, in pixels of the degraded image, for training: a random part of each image,
            mirrored and turned at random. None for whole images, always degraded with the same noise.
        repeats: patches of each image in an epoch.

    Attributes:
        least: side of a whole sharp image; a smaller one is refused.
    """

    least = 1

    def __init__(
        self,
        high: Sequence[Path],
        low: Sequence[Path] | None,
        channels: int,
        scale: int,
        degrade: Degradation | None = None,
        patch: int | None = None,
        repeats: int = 1,
    ):
        self.high, self.low, self.channels, self.scale = high, low, channels, scale
        self.degrade, self.patch, self.repeats = degrade, patch, repeats
        self._cache: dict[Path, Tensor] = {}
        self._cached = 0

    def __len__(self) -> int:
        return len(self.high)

    def order(self, generator: np.random.Generator) -> Sequence[int]:
        return generator.permutation(np.tile(np.arange(len(self)), self.repeats))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One pair. Raises InputError: a file cannot be read, is too small, or the two do not fit together."""
        low, high = self._whole(index) if self.patch is None else self._part(index)
        return {"low": low, "high": high}

    def _whole(self, index: int) -> tuple[Tensor, Tensor]:
        high = self._read(self.high[index])
        low = None if self.low is None else self._read(self.low[index])
        high = _to_multiple(high, self.scale) if low is None else self._fitted(index, low, high)
        if min(high.shape[-2:]) < self.least:
            size = " x ".join(map(str, high.shape[-2:]))
            raise InputError(f"{self.high[index]}: {size} pixels are too few, {self.least} x {self.least} are needed")
        if low is not None:
            return low / 255, high / 255
        np.random.seed(0)
        return self.degrade(high / 255), high / 255

    def _part(self, index: int) -> tuple[Tensor, Tensor]:
        high, scale, patch = self._read(self.high[index]), self.scale, self.patch
        low = None if self.low is None else self._read(self.low[index])
        high = _to_multiple(high, scale) if low is None else self._fitted(index, low, high)
        height, width = (side // scale for side in high.shape[-2:])
        if min(height, width) < patch:
            raise InputError(f"{self.high[index]}: {height} x {width} pixels are less than a patch of {patch}")
        top, left = random.randint(0, height - patch), random.randint(0, width - patch)
        if low is None:
            low = self._degraded(high, top, left)
        else:
            low = low[:, top : top + patch, left : left + patch] / 255
        high = high[:, scale * top : scale * (top + patch), scale * left : scale * (left + patch)] / 255
        number = random.randrange(SYMMETRIES)
        return tuple(symmetry(image, number).contiguous() for image in (low, high))

    def _degraded(self, high: Tensor, top: int, left: int) -> Tensor:
        """The patch of the degraded image, as if the whole image had been degraded."""
        cell, scale, patch = self.degrade.cell, self.scale, self.patch
        spans, starts = [], []
        for at, side in zip((top, left), high.shape[-2:]):
            first, last = at * scale // cell - 1, -(-(at + patch) * scale // cell) + 1
            spans.append(slice(max(first * cell, 0), min(last * cell, side)))
            starts.append(at - spans[-1].start // scale)
        low = self.degrade(high[:, spans[0], spans[1]] / 255)
        return low[:, starts[0] : starts[0] + patch, starts[1] : starts[1] + patch]

    def _fitted(self, index: int, low: Tensor, high: Tensor) -> Tensor:
        """The sharp image, cut to `scale` times the degraded one: published sets have a few pixels more."""
        height, width = (self.scale * side for side in low.shape[-2:])
        if not (0 <= high.shape[-2] - height < self.scale and 0 <= high.shape[-1] - width < self.scale):
            small, large = (" x ".join(map(str, image.shape[-2:])) for image in (low, high))
            raise InputError(
                f"{self.low[index]} has {small} pixels, {self.high[index]} {large}, which is not {self.scale} times it"
            )
        return high[:, :height, :width]

    def _read(self, path: Path) -> Tensor:
        """The bytes (C, H, W) of an image, kept in memory as far as `CACHE` goes."""
        if path in self._cache:
            return self._cache[path]
        pixels = np.array(read_image(path, self.channels))
        image = torch.from_numpy(np.ascontiguousarray(np.atleast_3d(pixels).transpose(2, 0, 1)))
        if self._cached + image.numel() <= CACHE:
            self._cache[path], self._cached = image, self._cached + image.numel()
        return image


def _to_multiple(image: Tensor, size: int) -> Tensor:
    """An image (C, H, W) without the last rows and columns, so that `size` divides both sides."""
    height, width = (side - side % size for side in image.shape[-2:])
    return image[:, :height, :width]
