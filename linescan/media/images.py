"""Reading images."""

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import BrokenImage, InputError

__all__ = ["Picture", "find_images", "read_image", "to_mode"]

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


def _mode(channels: int) -> str:
    if channels not in _MODES:
        raise InputError(f"a model with {channels} input channels cannot be fed pictures; 1, 3 and 4 channels can")
    return _MODES[channels]


def to_mode(image: Image.Image, channels: int) -> Image.Image:
    """`image` with 1 (grey), 3 (RGB) or 4 (RGBA) channels of 8 bits, upright as its EXIF data say.

    Sixteen-bit pictures are scaled to eight bits (Pillow alone would clip them); floating-point ones are taken to run
    over 0..1 if no value exceeds 1, else over 0..255.

    Raises:
        InputError: another number of channels, or values that are not finite.
    """
    mode = _mode(channels)
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        values = np.asarray(image)
        if not np.isfinite(values).all():
            raise InputError("the picture holds NaN or infinite values")
        image = Image.fromarray((values * (255 if values.max() <= 1 else 1)).clip(0, 255).astype(np.uint8))
    elif image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    elif "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)


def read_image(path: str | Path, channels: int = 3) -> Image.Image:
    """Reads a picture file of any format that Pillow knows; see `to_mode`.

    Raises:
        BrokenImage: it cannot be read; the message starts with the path.
        InputError: no picture has so many channels.
    """
    _mode(channels)
    try:
        with Image.open(path) as image:
            image.load()
            return to_mode(image, channels)
    except Image.UnidentifiedImageError:
        raise BrokenImage(f"{path}: not a picture, or damaged") from None
    except Exception as error:  # Pillow's decoders raise anything from struct.error to SyntaxError
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise BrokenImage(f"{path}: {reason}") from None


@lru_cache
def _suffixes() -> frozenset[str]:
    return frozenset(Image.registered_extensions()) - {".pdf", ".mpg", ".mpeg", ".h5", ".hdf"}


def find_images(folder: str | Path) -> list[Path]:
    """Every picture file in `folder` and below it, sorted; told by their suffixes."""
    return sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in _suffixes() and p.is_file())


Picture = str | Path | Image.Image | np.ndarray | Tensor
"""A file, a PIL image, or an array: (H, W) or (H, W, C) as numpy, (C, H, W) as torch; bytes, or floats in 0..1."""


def _from_array(array: np.ndarray | Tensor) -> Image.Image:
    if isinstance(array, Tensor):
        array = array.detach().cpu().numpy()
        array = np.moveaxis(array, 0, -1) if array.ndim == 3 else array
    if not isinstance(array, np.ndarray):
        raise InputError(f"a picture is a path, a PIL image, a numpy array or a tensor, not {type(array).__name__}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if 0 in array.shape or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise InputError(f"an array of shape {array.shape} is not a picture; (H, W) and (H, W, 1 or 3 or 4) are")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise InputError("the picture holds NaN or infinite values")
        if array.min() < 0 or array.max() > 1:
            raise InputError(f"a picture of floats runs over 0..1; this one over {array.min():g}..{array.max():g}")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8:
        raise InputError(f"a picture holds bytes, or floats in 0..1; this array holds {array.dtype}")
    return Image.fromarray(array)
