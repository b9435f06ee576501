"""Reading images: files of every format that Pillow knows, PIL images, arrays and tensors."""

import struct
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Iterator

import numpy as np
from PIL import Image
from torch import Tensor

from ..errors import BrokenImage, InputError
from . import vips
from .find import find_images
from .formats import image_formats
from .pixels import from_array, image_mode, to_mode

__all__ = ["LARGE", "LARGEST", "ImageLike", "find_images", "from_array", "load_image", "read_image", "to_mode"]

LARGE = 2**25
"""Pixels (33 million) above which an image is not treated as a whole where that can be avoided."""

LARGEST = 2**32
"""Pixels (4,295 million) of the largest image that is read."""

ImageLike = str | Path | Image.Image | np.ndarray | Tensor
"""A file, a PIL image, or an array (see `from_array`)."""

TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""How such files begin."""


@contextmanager
def one_line(path: str | Path) -> Iterator[None]:
    """Whatever goes wrong with a file in the block becomes a `BrokenImage` of one line, which names it."""
    try:
        yield
    except MemoryError:
        raise BrokenImage(f"{path}: there is not enough memory to read it") from None
    except Exception as error:  # Pillow's decoders raise anything from struct.error to SyntaxError
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise BrokenImage(f"{path}: {reason.splitlines()[0]}") from None


@contextmanager
def open_file(path: str | Path) -> Iterator[Image.Image]:
    """An image file whose head Pillow has read; see `one_line` for what goes wrong with it in the block.

    Raises:
        BrokenImage: it cannot be read; the message starts with the path.
    """
    with one_line(path):
        if not Path(path).is_file():
            raise BrokenImage("not a file" if Path(path).exists() else "No such file")
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's notes on odd files
            image = _identify(file, path)
            if image.width * image.height > LARGEST:
                raise BrokenImage(f"{_millions(image.size)} million pixels; {LARGEST // 10**6} at most are read")
            yield image


def _identify(file, path: str | Path) -> Image.Image:
    """As `Image.open`, without its limit on pixels, which would have to be lifted for all threads."""
    head = file.read(16)
    if not head:
        raise BrokenImage("the file is empty")
    for name in image_formats():
        factory, accepts = Image.OPEN[name]
        with suppress(SyntaxError, IndexError, TypeError, struct.error):  # not this format
            accepted = accepts is None or accepts(head)
            if accepted and not isinstance(accepted, str):  # a text says why the format cannot be read
                file.seek(0)
                # Without its name: Pillow 13 maps plain TIFF files by it, those that are to be turned with wrong rows.
                return factory(file, "" if head[:4] in TIFF else str(path))
    if head[:4] in TIFF:
        kinds = "colours of 32 bits, floats of 64 bits, five channels"
        raise BrokenImage(f"a TIFF file of a kind that is not read ({kinds}), or damaged")
    raise BrokenImage("not an image, or damaged")


def _millions(size: tuple[int, int]) -> int:
    return round(size[0] * size[1] / 1e6)


def read_image(path: str | Path, channels: int = 3, size: tuple[int, int] | None = None) -> Image.Image:
    """Reads an image file of any format that Pillow knows, its first frame; see `to_mode` for what pixels become.

    Args:
        channels: 1, 3 or 4.
        size: (height, width) of what will be made of it. An image of more than `LARGE` pixels is then reduced while it
            is read, as far as both sides stay at least twice as long: JPEG files by their decoder, others by averaging.

    Raises:
        BrokenImage: it cannot be read, or it has more than 180 million pixels and `size` is not given or the extra
            `large` not installed; the message starts with the path.
        InputError: images do not have that many channels.
    """
    image_mode(channels)
    with open_file(path) as image:
        full = image.size
        if image.info.get("progressive"):
            check_whole(full)  # the decoder keeps all of it
        if (factor := _reduction(full, size)) > 1:
            image.draft(image.mode, (image.width // factor, image.height // factor))
        factor = _reduction(image.size, size)
        if factor > 1 and image.size == full and vips.is_installed() and vips.reads(image):
            check_whole((image.width // factor, image.height // factor))
            return _reduced(path, channels, factor)
        check_whole(image.size)
        image.load()
        whole = to_mode(image, channels)
        return whole.reduce(factor) if factor > 1 else whole


def check_whole(size: tuple[int, int]) -> None:
    """Raises InputError if an image is too large to be decoded as a whole."""
    if size[0] * size[1] > vips.WHOLE:
        advice = "" if vips.is_installed() else "; `pip install 'linescan[large]'` reads larger ones part by part"
        raise InputError(f"{_millions(size)} million pixels; {vips.WHOLE // 10**6} at most are read at once{advice}")


def _reduction(size: tuple[int, int], wanted: tuple[int, int] | None) -> int:
    """By how much an image of `size` may be reduced that will be made as small as `wanted` (height, width)."""
    if wanted is None or size[0] * size[1] <= LARGE:
        return 1
    return max(min(size) // (2 * max(wanted)), 1)


def _reduced(path: str | Path, channels: int, factor: int) -> Image.Image:
    """As `read_image(path, channels).reduce(factor)`, without the whole image in memory."""
    step = max(vips.ROWS // factor, 1)
    (height, width), strips = vips.strips(path, channels, step * factor)
    shape = -(-height // factor), -(-width // factor)
    reduced = np.empty(shape if channels == 1 else (*shape, channels), np.uint8)
    for i, strip in enumerate(strips):
        reduced[i * step : (i + 1) * step] = np.asarray(Image.fromarray(strip).reduce(factor))
    return Image.fromarray(reduced)


def load_image(image: ImageLike, channels: int = 3, size: tuple[int, int] | None = None) -> Image.Image:
    """An image of any kind as an 8-bit PIL image; see `read_image`, `to_mode` and `from_array`.

    Raises:
        BrokenImage: a file, or the file of a PIL image that is not loaded yet, cannot be read.
        InputError: an array that is not an image; images do not have that many channels.
    """
    if isinstance(image, (str, Path)):
        return read_image(image, channels, size)
    if not isinstance(image, Image.Image):
        return to_mode(from_array(image), channels)
    try:
        image.load()
    except Exception as error:
        raise BrokenImage(f"{getattr(image, 'filename', '') or 'a PIL image'}: {error}") from None
    return to_mode(image, channels)
