"""Images as arrays of their own depth, alpha and profile kept: what restoration reads and writes."""

import io
import math
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Sequence

import numpy as np
from PIL import Image
from PIL.ExifTags import Base

from ..errors import BrokenImage, InputError
from . import vips
from .images import LARGE, TIFF, check_whole, open_file
from .large import blank
from .pixels import upright

__all__ = ["ImageFacts", "array_of", "expect_format", "read_array", "read_mask", "write_array"]

_KEPT = {"L", "LA", "RGB", "RGBA", "I;16", "I", "F"}  # modes that are arrays as they are; the others are colours
_BY_ROWS = {"L", "LA", "RGB", "RGBA", "I;16", "I;16B"}  # that libvips gives as they are
_OTHER_SPACES = {"CMYK", "LAB", "HSV"}  # whose profiles do not fit the RGB that becomes of them
_DESCRIPTIVE = {Base.ImageDescription, Base.Make, Base.Model, Base.Software, Base.DateTime, Base.Artist}
_DESCRIPTIVE |= {Base.Copyright, Base.ExifOffset, Base.GPSInfo}
_DEEP = {np.dtype(np.uint16): {"PNG", "TIFF"}, np.dtype(np.float32): {"TIFF"}}  # formats of more than 8 bits
_LONGEST = {"JPEG": 65500, "WEBP": 16383}  # pixels of a side at most


class ImageFacts(NamedTuple):
    """What a file says beside its pixels.

    Attributes:
        icc: the colour profile.
        exif: the EXIF data, without an orientation: the pixels are upright.
    """

    icc: bytes | None = None
    exif: bytes | None = None


def read_array(path: str | Path) -> tuple[np.ndarray, ImageFacts]:
    """An image file as an array (H, W, C), upright, in the depth of the file, and what else the file says.

    C is 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGB and alpha); of TIFF files with other channels it is what they
    have. The type is uint8, uint16 (PNG and TIFF files of 16 bits), or that of a TIFF file: int32, float32, ...
    Palettes, CMYK, YCbCr, HSV and LAB become RGB of 8 bits; bits become 0 and 255.

    With the extra `large`, images of more than `LARGE` pixels, grey or RGB, with alpha or not, lie in a temporary file
    that is mapped into memory, and are read a few rows at a time.

    Raises:
        BrokenImage: it cannot be read, it has more than 180 million pixels and cannot be read by rows, or it holds
            colours of 16 bits and the extra `large` is not installed; the message starts with the path.
    """
    try:
        array, facts = _read(path)
    except BrokenImage as error:
        if not (_is_tiff(path) and vips.is_installed()):
            raise
        try:  # TIFF files of channels and depths that Pillow does not know
            array, facts = vips.read(path), ImageFacts()
        except InputError:
            raise error from None
    return (array[..., None] if array.ndim == 2 else array), facts


def array_of(image: Image.Image) -> np.ndarray:
    """A PIL image as `read_array` has that of a file: (H, W, C), upright, palettes and other spaces as RGB."""
    array = np.array(_plain(upright(image)))
    array = array[..., None] if array.ndim == 2 else array
    if array.dtype == np.uint16 and isinstance(clear := image.info.get("transparency"), int):
        array = np.dstack([array, np.where(array == clear, 0, 65535).astype(np.uint16)])
    return array


def read_mask(path: str | Path, colours: Sequence[tuple[int, int, int]] = ()) -> np.ndarray:
    """The numbers of a mask (H, W), upright: of a grey image, or the indices of a palette; bits become 0 and 1.

    Colours that are grey are read as such; alpha is left out.

    Args:
        path: the file.
        colours: of the classes 0, 1, ...; an image of these alone is read as their numbers.

    Raises:
        BrokenImage: it cannot be read, or holds (other) colours; the message starts with the path.
    """
    with open_file(path) as image:
        if image.mode in ("1", "P"):
            check_whole(image.size)
            image.load()
            return np.array(upright(image)).astype(np.uint8)
    array, _ = read_array(path)
    array = array[..., : 3 if array.shape[2] > 2 else 1]
    is_of = [(array == colour).all(-1) for colour in colours if array.shape[2] == 3]
    known = np.any(is_of, 0) if is_of else np.zeros(array.shape[:2], bool)
    if known.all():
        return np.argmax(is_of, 0).astype(np.uint8)
    if (array == array[..., :1]).all():
        return array[..., 0]
    if not colours:
        raise BrokenImage(f"{path}: a mask is grey or has a palette; this one has colours")
    colour = tuple(map(int, array[~known][0]))
    raise BrokenImage(f"{path}: the colour {colour} is none of those of {len(colours)} classes")


def _read(path: str | Path) -> tuple[np.ndarray, ImageFacts]:
    with open_file(path) as image:
        mode, large = image.mode, image.width * image.height > LARGE
        if large and mode in _BY_ROWS and vips.is_installed() and vips.reads(image):
            array = vips.read(path, blank)
        else:
            check_whole(image.size)
            if _is_deep_colour(image):
                array = vips.read(path)
            else:
                image.load()
                array = array_of(image)
        exif = image.getexif()
        exif.pop(Base.Orientation, None)
        if image.format == "TIFF":  # whose tags are also those that say how the pixels are coded
            for tag in set(exif) - _DESCRIPTIVE:
                del exif[tag]
        icc = image.info.get("icc_profile") if mode not in _OTHER_SPACES else None
        return array, ImageFacts(icc or None, exif.tobytes() if len(exif) else None)


def _plain(image: Image.Image) -> Image.Image:
    """In a mode of which numpy makes an array of grey or of colours."""
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.asarray(image).astype(np.uint16))
    if "transparency" in image.info or (image.has_transparency_data and image.mode not in _KEPT):
        return image.convert("LA" if image.mode in ("1", "L", "La") else "RGBA")
    return image if image.mode in _KEPT else image.convert("L" if image.mode == "1" else "RGB")


def _is_tiff(path: str | Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(4) in TIFF
    except OSError:
        return False


def _is_deep_colour(image: Image.Image) -> bool:
    """Whether the file holds colours of 16 bits, of which Pillow would keep eight."""
    tiles = getattr(image, "tile", ())
    coded = tiles[0].args if tiles else ""
    coded = coded if isinstance(coded, str) else (coded or ("",))[0]
    return not image.mode.startswith("I") and ";16" in str(coded)


def expect_format(format: str, shape: Sequence[int], dtype: np.dtype) -> None:
    """Looks whether `write_array` can write an array (H, W, C).

    Raises:
        InputError: the format cannot hold it, or colours of more than 8 bits without the extra `large`.
    """
    if dtype != np.uint8 and format not in _DEEP.get(dtype, ()):
        raise InputError(f"{format} files do not hold {dtype}; PNG and TIFF hold uint16, TIFF holds float32")
    if shape[2] in (2, 4) and format == "JPEG":
        raise InputError("JPEG files hold no alpha; PNG, TIFF and WEBP files do")
    if max(shape[:2]) > (longest := _LONGEST.get(format, math.inf)):
        raise InputError(f"{format} files hold at most {longest} pixels a side, not {shape[0]} x {shape[1]}")
    if shape[2] > 1 and dtype != np.uint8:
        vips.require()


def write_array(file: BinaryIO, array: np.ndarray, facts: ImageFacts = ImageFacts(), format: str = "PNG") -> None:
    """Writes an array as `read_array` gives it, with its profile and EXIF data.

    Args:
        file: open for writing; `linescan.engine.atomic` gives one that is whole or absent.
        array: (H, W, C) or (H, W); uint8; uint16 for PNG and TIFF; float32 for TIFF.
        facts: what else the file should say. TIFF files of colours of 16 bits get the profile only.
        format: "PNG", "TIFF", "JPEG" or "WEBP".

    Raises:
        InputError: the format cannot hold the array, or colours of more than 8 bits without the extra `large`.
    """
    array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    expect_format(format, (*array.shape, 1)[:3], array.dtype)
    deep = array.ndim == 3 and array.dtype != np.uint8
    if deep or (isinstance(array, np.memmap) and format in ("PNG", "TIFF") and vips.is_installed()):
        vips.write(file, np.atleast_3d(array), format, facts.icc, facts.exif)
        return
    buffer = io.BytesIO()  # some of Pillow's encoders read back what they have written
    said: dict[str, Any] = {name: value for name, value in (("icc_profile", facts.icc), ("exif", facts.exif)) if value}
    of_format: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
    said |= of_format.get(format, {})
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, format, **said)
    file.write(buffer.getbuffer())
