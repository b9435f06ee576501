"""What pixels of every kind become: 8-bit images with 1, 3 or 4 channels."""

from typing import Mapping

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.ExifTags import Base
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT
from torch import Tensor

from ..errors import InputError

__all__ = ["from_array", "image_mode", "scale_to_bytes", "to_bytes", "to_mode", "upright"]

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_WHITE = {"?": 1, "H": 65535}  # by numpy's character of a type
_TOGETHER = 2**20  # numbers that are scaled at a time
_FIRST = {"LAB": "RGB", "La": "LA"}  # modes that Pillow converts in two steps only
_UNSIGNED, _SIGNED, _WHITE_IS_ZERO = 1, 2, 0  # values of TIFF tags


def image_mode(channels: int) -> str:
    """Pillow's mode of an 8-bit image with so many channels. Raises InputError where there is none."""
    if channels not in _MODES:
        raise InputError(f"images have 1, 3 or 4 channels; this model expects {channels}")
    return _MODES[channels]


def to_bytes(values: np.ndarray, limits: tuple[float, float] | None = None) -> np.ndarray:
    """Numbers of any real type as bytes, rounded.

    - bool: 0 and 255. uint8: as they are. uint16: 65535 is white, as PNG and TIFF define it.
    - Other integers and floats have no white of their own, so it is taken from the values. Floats of an image in which
      none is below 0, and none as large as 2, run over 0..1 (larger ones are clipped). Otherwise, if all lie in
      0..255, they are kept. Otherwise the range of the image, from its lowest value (0, if none is negative) to its
      highest, is stretched over 0..255.

    Args:
        values: of any shape.
        limits: lowest and highest value of the image, if `values` are a part of it.

    Raises:
        InputError: values that are not finite.
    """
    if values.dtype == np.uint8:
        return values
    black, white = 0, _WHITE.get(values.dtype.char)
    if white is None:
        low, high = limits or (values.min(), values.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise InputError("the image holds NaN or infinite values")
        if values.dtype.kind == "f" and low >= 0 and high < 2:
            white = 1
        elif low >= 0 and high <= 255:
            white = 255
        else:
            black, white = min(float(low), 0.0), max(float(high), 0.0)
    return scale_to_bytes(values, black, white)


def scale_to_bytes(values: np.ndarray, black: float, white: float) -> np.ndarray:
    """Numbers as bytes: `black` as 0, `white` as 255, rounded in between and clipped outside."""
    scaled = np.empty(values.shape, np.uint8)
    rows = max(_TOGETHER * len(values) // max(values.size, 1), 1)
    for top in range(0, len(values), rows):  # floats take eight times the memory of the bytes
        part = (values[top : top + rows].astype(np.float64) - black) * (255 / (white - black))
        scaled[top : top + rows] = np.rint(part).clip(0, 255)
    return scaled


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """`image` with 1 (grey), 3 (RGB) or 4 (RGBA) channels of 8 bits, upright as its EXIF data say.

    By Pillow's mode:
    - 1, L, LA, P, PA, RGB, RGBA, RGBX, HSV, YCbCr, LAB: the colours they mean; grey is ITU-R 601's luma. Colour
      profiles are not applied, except that LAB is read for a white point of D50.
    - CMYK: (255 - C)(255 - K) / 255, and so on: Pillow's formula, without a profile.
    - I;16 in both byte orders: 65535 is white, in TIFF files of 9 to 15 bits the largest number of so many bits. RGB of
      16 bits: Pillow reads the upper byte.
    - I (integers of 32 bits), F (floats): see `to_bytes`.
    - Transparency (an alpha channel, a transparent colour, a palette with alpha) is kept with 4 channels, else the
      image is composited on white.

    Raises:
        InputError: another number of channels, or values that are not finite.
    """
    mode = image_mode(channels)
    file_format, tags = image.format, getattr(image, "tag_v2", {})
    image = upright(image)
    signed = image.mode == "L" and _sample_format(tags) == _SIGNED
    if signed or image.mode == "F" or image.mode.startswith("I"):
        image = _grey(image, file_format, tags)
    elif image.mode in _FIRST:
        image = image.convert(_FIRST[image.mode])
    if not image.has_transparency_data:
        return _convert(image, mode)
    image = _convert(image, "RGBA")
    if channels == 4:
        return image
    if image.getextrema()[3][0] < 255:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return _convert(image.convert("RGB"), mode)


def upright(image: Image.Image) -> Image.Image:
    """The image turned and mirrored as its EXIF data say; the image itself, where they say nothing."""
    try:
        turned = image.getexif().get(Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except MemoryError:
        raise
    except Exception:  # damaged EXIF data are no reason to refuse the pixels
        return image


def _convert(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)


def _sample_format(tags: Mapping) -> int:
    """What the numbers of a TIFF file are; where it does not say, they are unsigned."""
    return tags.get(SAMPLEFORMAT, (_UNSIGNED,))[0]


def _grey(image: Image.Image, file_format: str | None, tags: Mapping) -> Image.Image:
    """Numbers of more than 8 bits, or signed ones, as L, or as LA where one of them means transparency.

    `tags` are those of a TIFF file.
    """
    values = np.asarray(image)
    bits = tags.get(BITSPERSAMPLE, (16,))[0]
    if image.mode == "I" and file_format in ("PNG", "PPM"):  # these hold 16 bits
        values = values.clip(0, 65535).astype(np.uint16)
    elif image.mode == "I" and bits == 32 and file_format == "TIFF" and _sample_format(tags) == _UNSIGNED:
        values = values.view(np.uint32)
    elif image.mode == "L":
        values = values.view(np.int8)
    is_short = values.dtype.char == "H" and 8 < bits < 16  # TIFF has 12 bits, too
    grey = scale_to_bytes(values, 0, 2**bits - 1) if is_short else to_bytes(values)
    grey = Image.fromarray(255 - grey if tags.get(PHOTOMETRIC_INTERPRETATION) == _WHITE_IS_ZERO else grey)
    if isinstance(transparent := image.info.get("transparency"), int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def from_array(array: np.ndarray | Tensor) -> Image.Image:
    """The image that an array holds: (H, W) or (H, W, C) as numpy, (C, H, W) as torch, C of 1, 3 or 4.

    Values: booleans; integers in 0..255; uint16, where 65535 is white; floats in 0..1 or in 0..255 (bfloat16 and
    float16 too). Strides and byte order do not matter.

    Raises:
        InputError: another shape or type, or values outside these ranges.
    """
    shape, shapes = tuple(getattr(array, "shape", ())), "(H, W) and (H, W, 1 or 3 or 4)"
    if isinstance(array, Tensor):
        shapes = "(H, W) and (1 or 3 or 4, H, W)"
        if array.is_meta or array.is_quantized or array.layout != torch.strided:
            kind = "meta" if array.is_meta else "quantized" if array.is_quantized else "sparse"
            raise InputError(f"an image is a dense tensor with values, not a {kind} one")
        array = array.detach().cpu().resolve_conj().resolve_neg()
        if array.is_floating_point():
            array = array.double() if array.dtype == torch.float64 else array.float()
        array = array.numpy()
        array = np.moveaxis(array, 0, -1) if array.ndim == 3 else array
    if not isinstance(array, np.ndarray):
        raise InputError(f"an image is a path, a PIL image, a numpy array or a tensor, not {type(array).__name__}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if 0 in array.shape or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise InputError(f"an array of shape {shape} is not an image; {shapes} are")
    if array.dtype.kind not in "buif":
        raise InputError(f"an image holds real numbers; this array holds {array.dtype}")
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    low, high = array.min(), array.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError("the image holds NaN or infinite values")
    floats = array.dtype.kind == "f"
    wide = array.dtype == np.uint16
    if low < 0 or (high > 255 and not wide) or (floats and 1 < high < 2):
        allowed = "0..1 or 0..255" if floats else "0..255"
        raise InputError(f"an image of {array.dtype} runs over {allowed}; this one over {low:g}..{high:g}")
    return Image.fromarray(to_bytes(array))
