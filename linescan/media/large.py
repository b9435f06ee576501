"""Images that may be larger than memory: read once, then used part by part.

An image of up to 32 megapixels is kept in memory. Of a larger one the pixels go into a temporary file, and memory holds
the part in use. With the extra `large` (libvips) JPEG, PNG, TIFF and WebP files are decoded a few rows at a time, and
may hold up to `LARGEST` pixels; all others are decoded as a whole by Pillow, and may hold 180 million.
"""

import shutil
import tempfile
import weakref
from math import prod
from pathlib import Path
from typing import Sequence

import numpy as np
from PIL import Image

from ..errors import InputError
from . import vips
from .images import LARGE, LARGEST, ImageLike, check_whole, load_image, open_file
from .pixels import to_mode
from .vips import ROWS

__all__ = ["LARGEST", "PairedPixels", "Pixels", "blank", "open_pixels", "write_mask"]


class Pixels:
    """The pixels of an image: an array (H, W, 3), or a file of its bytes."""

    def __init__(self, array: np.ndarray | None = None, file=None, size: tuple[int, int] | None = None):
        self.array, self.file = array, file
        self.size: tuple[int, int] = size if array is None else array.shape[:2]
        if file:
            weakref.finalize(self, file.close)

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """A part of the image, (bottom - top, right - left, 3)."""
        if self.array is not None:
            return self.array[top:bottom, left:right]
        width = self.size[1]
        self.file.seek(top * width * 3)
        rows = np.fromfile(self.file, np.uint8, (bottom - top) * width * 3).reshape(bottom - top, width, 3)
        return rows[:, left:right]

    def reduced(self, factor: int) -> np.ndarray:
        """The whole image, each `factor` x `factor` pixels averaged into one: (ceil(H / f), ceil(W / f), 3)."""
        height, width = self.size
        if factor == 1:
            return self.read(0, height, 0, width)
        rows = max(ROWS // factor, 1) * factor
        strips = (self.read(top, min(top + rows, height), 0, width) for top in range(0, height, rows))
        return np.concatenate([np.asarray(Image.fromarray(strip).reduce(factor)) for strip in strips])


class PairedPixels(Pixels):
    """Images of one scene and one size, read as one of all their channels, (H, W, 3 * images).

    Args:
        images: of the scene.
        grey_extra: read all but the first as grey.

    Raises:
        InputError: they differ in size.
    """

    def __init__(self, images: Sequence[Pixels], grey_extra: bool = False):
        if len(sizes := dict.fromkeys(image.size for image in images)) > 1:
            raise InputError(f"both images are of one size, got {' and '.join(f'{h}x{w}' for h, w in sizes)} pixels")
        self.images, self.grey_extra = images, grey_extra
        super().__init__(size=images[0].size)

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """A part of all images, (bottom - top, right - left, 3 * images)."""
        return self._joined([image.read(top, bottom, left, right) for image in self.images])

    def reduced(self, factor: int) -> np.ndarray:
        """All of all images, as `Pixels.reduced`: (ceil(H / f), ceil(W / f), 3 * images)."""
        return self._joined([image.reduced(factor) for image in self.images])

    def _joined(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        first, *others = parts
        if self.grey_extra:
            others = [np.asarray(Image.fromarray(part).convert("L").convert("RGB")) for part in others]
        return np.concatenate([first, *others], -1)


def open_pixels(image: ImageLike | Pixels) -> Pixels:
    """The pixels of an image, RGB: a file, a PIL image, or an array; see `load_image`.

    Raises:
        BrokenImage: a file that cannot be read; the message starts with the path.
        InputError: an array that is not an image.
    """
    if isinstance(image, Pixels):
        return image
    if isinstance(image, (str, Path)):
        with open_file(image) as opened:
            if opened.width * opened.height > LARGE:
                return _spool(opened, image)
    return Pixels(np.asarray(load_image(image)))


def _spool(opened: Image.Image, path: str | Path) -> Pixels:
    """The pixels of a large image in a temporary file."""
    _check_room(3 * opened.width * opened.height)
    size, strips = _strips(opened, path)
    file = tempfile.TemporaryFile()
    try:
        for strip in strips:
            file.write(np.ascontiguousarray(strip).data)
        file.flush()
    except BaseException:
        file.close()
        raise
    return Pixels(file=file, size=size)


def _check_room(needed: int) -> None:
    """Raises InputError if a temporary file of so many bytes has no room."""
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if needed > free:
        raise InputError(
            f"takes {needed / 1e9:.1f} GB in {tempfile.gettempdir()}, where {free / 1e9:.1f} GB are free; TMPDIR names "
            "another folder"
        )


def _strips(opened: Image.Image, path: str | Path) -> vips.Strips:
    """The image, (rows, W, 3) at a time."""
    if vips.is_installed() and vips.reads(opened):
        return vips.strips(path)
    check_whole(opened.size)
    opened.load()
    image = to_mode(opened, 3)
    tops = range(0, image.height, ROWS)
    parts = (image.crop((0, top, image.width, min(top + ROWS, image.height))) for top in tops)
    return vips.Strips(image.size[::-1], map(np.asarray, parts))


def blank(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Zeros (H, W) or (H, W, C); those of a large image lie in a temporary file that is mapped into memory.

    Raises:
        InputError: there is no room for the file.
    """
    if shape[0] * shape[1] <= LARGE:
        return np.zeros(shape, dtype)
    _check_room(prod(shape) * np.dtype(dtype).itemsize)
    with tempfile.TemporaryFile() as file:  # the map outlives it
        return np.memmap(file, dtype, "w+", shape=shape)


def write_mask(file, mask: np.ndarray, palette) -> None:
    """Writes a mask (H, W) as PNG: bytes with a palette, or 16 bits for more than 256 classes.

    Args:
        file: open for writing.
        mask: uint8 or uint16; not copied, so that it may be a map of a file.
        palette: (classes, 3) bytes, RGB; values that are no class are white.
    """
    mode = "P" if mask.dtype == np.uint8 else "I;16"
    mask = np.ascontiguousarray(mask, "<u2" if mode == "I;16" else np.uint8)
    image = Image.frombuffer(mode, mask.shape[::-1], mask, "raw", mode, 0, 1)
    if mode == "P":
        colours = np.full((256, 3), 255, np.uint8)  # all of them: to fewer, Pillow would give fewer bits
        colours[: len(palette)] = palette
        image.putpalette(colours.tobytes())
    image.save(file, "PNG")
