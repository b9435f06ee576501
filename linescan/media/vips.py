"""Images of any size from the top down, a few rows at a time, by libvips (the `large` extra)."""

from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Callable, Iterator, Mapping, NamedTuple

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION

from ..errors import InputError
from .pixels import to_bytes, to_mode

__all__ = ["ROWS", "WHOLE", "is_installed", "read", "reads", "require", "strips", "write", "Strips"]

ROWS = 256
"""How many rows are decoded at a time."""

WHOLE = 180_000_000
"""Pixels of the largest image that is ever decoded as a whole."""

_FORMATS = {"JPEG", "MPO", "PNG", "TIFF", "WEBP"}  # that libvips decodes to the same values as Pillow
_MODES = {"1": "L", "L": "L", "LA": "LA", "P": "RGB", "RGB": "RGB", "RGBA": "RGBA", "CMYK": "CMYK"}
_MODES |= dict.fromkeys(["I;16", "I;16B", "I", "F"], "L")
_TYPES = {"uchar": np.uint8, "char": np.int8, "ushort": np.uint16, "short": np.int16, "uint": np.uint32}
_TYPES |= {"int": np.int32, "float": np.float32, "double": np.float64}
_MODE_OF_BANDS = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def is_installed() -> bool:
    """Whether pyvips and libvips are there."""
    try:
        import pyvips  # noqa: F401
    except (ImportError, OSError):  # OSError: the package without the library
        return False
    return True


def reads(image: Image.Image) -> bool:
    """Whether `strips` gives what Pillow would, of a file that Pillow has opened."""
    tags = getattr(image, "tag_v2", {})
    if image.mode[0] in "IF" and ("transparency" in image.info or not _is_ordinary(tags)):
        return False
    return image.format in _FORMATS and image.mode in _MODES


def _is_ordinary(tags: Mapping) -> bool:
    """Whether the numbers of a TIFF file are whole words, and the larger the brighter; other files have no tags."""
    return tags.get(PHOTOMETRIC_INTERPRETATION, 1) == 1 and tags.get(BITSPERSAMPLE, (16,))[0] in (16, 32)


def _open(path: str | Path, access: str):
    import pyvips

    source = pyvips.Source.new_from_file(str(path))  # not the path: in that, brackets would be options
    return pyvips.Image.new_from_source(source, "", access=access, fail_on="error")


class Strips(NamedTuple):
    """An image that is decoded from the top down.

    Attributes:
        size: (height, width), upright.
        rows: bytes (rows, W), or (rows, W, channels), one strip after the other.
    """

    size: tuple[int, int]
    rows: Iterator[np.ndarray]


def strips(path: str | Path, channels: int = 3, rows: int = ROWS) -> Strips:
    """The image in a file, upright, mapped as by `to_mode`, `rows` rows at a time.

    Memory does not grow with the height of the image, unless the file is interlaced or progressive; such files may hold
    up to `WHOLE` pixels.

    Raises:
        InputError: libvips cannot read it, or it has channels that are no colours.
    """
    with _one_line():
        image = _open(path, "sequential")
        if image.get_typeof("interlaced") and image.width * image.height > WHOLE:
            raise InputError(f"interlaced or progressive, and of more than {WHOLE / 1e6:.0f} million pixels")
        if image.get_typeof("orientation") and image.get("orientation") > 1:
            image = _open(path, "random").autorot()
        mode = "CMYK" if image.interpretation == "cmyk" else _MODE_OF_BANDS.get(image.bands)
        if mode is None or image.format not in _TYPES:
            raise InputError(f"an image of {image.bands} channels of {image.format}")
    return Strips((image.height, image.width), _decode(image, mode, path, channels, rows))


def _decode(image, mode: str, path: str | Path, channels: int, rows: int) -> Iterator[np.ndarray]:
    import pyvips

    with _one_line():
        kind, limits = _TYPES[image.format], None
        if kind not in (np.uint8, np.uint16):
            whole = _open(path, "sequential").stats()
            limits = kind(whole(0, 0)[0]), kind(whole(1, 0)[0])
        region = pyvips.Region.new(image)
        for top in range(0, image.height, rows):
            size = image.width, min(rows, image.height - top)
            part = np.frombuffer(region.fetch(0, top, *size), kind).reshape(size[1], size[0], image.bands)
            if kind == np.uint16 and image.bands > 1:  # of colours, Pillow reads the upper byte
                part = (part >> 8).astype(np.uint8)
            strip = Image.frombytes(mode, size, to_bytes(part, limits).tobytes())
            yield np.asarray(to_mode(strip, channels))


def read(path: str | Path, room: Callable[[tuple[int, ...], type], np.ndarray] | None = None) -> np.ndarray:
    """The whole image in a file as it is, upright: (H, W, C).

    Args:
        room: (shape, type) -> the array to read into, a few rows at a time; by default memory.

    Raises:
        InputError: libvips cannot read it, it has more than `WHOLE` pixels for memory, or pyvips is not installed.
    """
    require()
    import pyvips

    with _one_line():
        image = _open(path, "sequential")
        if image.get_typeof("orientation") and image.get("orientation") > 1:
            image = _open(path, "random").autorot()
        if image.format not in _TYPES:
            raise InputError(f"an image of {image.format}")
        if room is None and image.width * image.height > WHOLE:
            raise InputError(f"more than {WHOLE / 1e6:.0f} million pixels")
        region, width, bands = pyvips.Region.new(image), image.width, image.bands
        array = (room or np.empty)((image.height, width, bands), _TYPES[image.format])
        for top in range(0, image.height, ROWS):
            rows = array[top : top + ROWS]
            rows[...] = np.frombuffer(region.fetch(0, top, width, len(rows)), array.dtype).reshape(rows.shape)
        return array


def write(file: BinaryIO, array: np.ndarray, format: str, icc: bytes | None, exif: bytes | None) -> None:
    """Writes `array` (H, W, C) in its depth as a "PNG" or "TIFF", a few rows at a time. Raises InputError."""
    require()
    import pyvips

    with _one_line():
        image = pyvips.Image.new_from_array(np.ascontiguousarray(array))
        space = {np.dtype(np.uint8): ("b-w", "srgb")}.get(array.dtype, ("grey16", "rgb16"))
        image = image.copy(interpretation=space[array.shape[2] > 2])
        for name, content in (("icc-profile-data", icc), ("exif-data", exif)):
            if content:
                image.set_type(pyvips.GValue.blob_type, name, content)
        keep = "icc" if exif is None else "icc,exif"  # it would make EXIF data of its own
        options = {"bitdepth": 8 * array.itemsize} if format == "PNG" else {}
        if format == "TIFF" and array.nbytes > 2**32 - 2**20:
            options["bigtiff"] = True
        target = pyvips.TargetCustom()
        target.on_write(file.write)
        target.on_seek(file.seek)
        image.write_to_target(target, f".{format.lower()}", keep=keep, **options)


def require() -> None:
    """Raises InputError: pyvips is not installed."""
    if not is_installed():
        raise InputError("colours of 16 bits take pyvips; `pip install 'linescan[large]'` installs it")


@contextmanager
def _one_line() -> Iterator[None]:
    """What libvips says of an error, in a line."""
    import pyvips

    try:
        yield
    except pyvips.Error as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InputError(lines[-1] if lines else "cannot be decoded") from None
