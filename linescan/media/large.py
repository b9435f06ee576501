"""Pictures that may be larger than memory: read once, then looked at part by part.

A picture of up to 32 megapixels is kept in memory. Of a larger one the bytes go into a temporary file, and memory holds
what is being looked at. PNG and TIFF files (8 bits a channel, not interlaced) are decoded a few rows at a time; other
files once as a whole, as Pillow does it.
"""

import io
import struct
import tempfile
import warnings
import weakref
import zlib
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import numpy as np
from PIL import Image, TiffImagePlugin

from ..errors import BrokenImage
from .images import Picture, _from_array, read_image, to_mode

__all__ = ["Pixels", "blank", "open_pixels", "write_mask"]

LARGE = 2**25
_ORIENTATION = 0x0112
ROWS = 256  # of a large picture that are decoded at a time


class Pixels:
    """The pixels of a picture: an array (H, W, 3), or a file of its bytes."""

    def __init__(self, array: np.ndarray | None = None, file=None, size: tuple[int, int] | None = None):
        self.array, self.file = array, file
        self.size: tuple[int, int] = size if array is None else array.shape[:2]
        if file:
            weakref.finalize(self, file.close)

    def read(self, top: int, bottom: int, left: int, right: int) -> np.ndarray:
        """A part of the picture, (bottom - top, right - left, 3)."""
        if self.array is not None:
            return self.array[top:bottom, left:right]
        width = self.size[1]
        self.file.seek(top * width * 3)
        rows = np.fromfile(self.file, np.uint8, (bottom - top) * width * 3).reshape(bottom - top, width, 3)
        return rows[:, left:right]

    def reduced(self, factor: int) -> np.ndarray:
        """The whole picture, each `factor` x `factor` pixels averaged into one: (ceil(H / f), ceil(W / f), 3)."""
        height, width = self.size
        if factor == 1:
            return self.read(0, height, 0, width)
        rows = max(ROWS // factor, 1) * factor
        strips = (self.read(top, min(top + rows, height), 0, width) for top in range(0, height, rows))
        return np.concatenate([np.asarray(Image.fromarray(strip).reduce(factor)) for strip in strips])


def open_pixels(picture: Picture | Pixels) -> Pixels:
    """The pixels of a picture, RGB: a file, a PIL image, or an array as `Classifier` takes them.

    Raises:
        BrokenImage: a file that cannot be read.
        InputError: an array that is not a picture.
    """
    if isinstance(picture, Pixels):
        return picture
    if isinstance(picture, (str, Path)):
        if (size := _large(picture)) is None:
            return Pixels(np.asarray(read_image(picture)))
        file = tempfile.TemporaryFile()
        try:
            return _spool(Path(picture), size, file)
        except Exception as error:
            file.close()
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise BrokenImage(f"{picture}: {reason}") from None
    if not isinstance(picture, Image.Image):
        picture = _from_array(picture)
    return Pixels(np.asarray(to_mode(picture, 3)))


def _spool(path: Path, size: tuple[int, int], file) -> Pixels:
    """The pixels of a large picture, written to `file`."""
    rows = 0
    for strip in _strips(path):
        file.write(np.ascontiguousarray(strip).data)
        rows += len(strip)
    if (rows, strip.shape[1]) not in (size, size[::-1]):
        raise BrokenImage(f"the file ends in row {rows}")
    file.flush()
    return Pixels(file=file, size=(rows, strip.shape[1]))


def blank(size: tuple[int, int], dtype: type) -> np.ndarray:
    """Zeros (H, W); those of a large picture lie in a temporary file that is mapped into memory."""
    if size[0] * size[1] <= LARGE:
        return np.zeros(size, dtype)
    with tempfile.TemporaryFile() as file:  # the map outlives it
        return np.memmap(file, dtype, "w+", shape=size)


# -- reading rows -----------------------------------------------------------------------------------------------------


@contextmanager
def _open_any_size(path: Path) -> Iterator[Image.Image]:
    """As `Image.open`, without its limit: what is opened here is read in parts, or was named by the user."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                yield image
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _large(path: str | Path) -> tuple[int, int] | None:
    """(height, width) of a file's picture if it is large."""
    try:
        with _open_any_size(path) as image:
            return image.size[::-1] if image.width * image.height > LARGE else None
    except Exception:
        return None  # `read_image` says what is wrong


def _strips(path: Path) -> Iterator[np.ndarray]:
    """The picture from the top down, (rows, W, 3) at a time."""
    with _open_any_size(path) as image:
        if image.format == "PNG" and _plain_png(path, image):
            yield from _png_strips(path, image)
            return
        if image.format == "TIFF" and _plain_tiff(image):
            yield from _tiff_strips(path, image.tag_v2)
            return
        image.load()
        image = to_mode(image, 3)
    for top in range(0, image.height, ROWS):
        yield np.asarray(image.crop((0, top, image.width, min(top + ROWS, image.height))))


_PNG_BYTES = {"L": 1, "P": 1, "LA": 2, "RGB": 3, "RGBA": 4}  # of a pixel, which the filters of its rows go by
_PNG_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
_PNG_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}


def _plain_png(path: Path, image: Image.Image) -> bool:
    """Whether it can be decoded in strips: 8 bits a channel, not interlaced, upright."""
    coded = image.tile[0].args if image.tile else None
    if coded != image.mode or image.mode not in _PNG_BYTES or image.info.get("interlace"):
        return False
    exif = Image.Exif()
    exif.load(b"".join(_png_data(path, b"eXIf")))
    return exif.get(_ORIENTATION, 1) == 1


def _png_strips(path: Path, image: Image.Image) -> Iterator[np.ndarray]:
    """Rows inflated as far as needed, and given to Pillow as small PNG files of their own.

    The first row of each is the last one of the strip before, which its filters refer to.
    """
    width, height = image.size
    depth = _PNG_BYTES[image.mode]
    inflate, pending, previous, done = zlib.decompressobj(), b"", b"", 0
    pieces = _png_data(path, b"IDAT")
    while done < height:
        rows = min(ROWS, height - done)
        wanted = rows * (1 + width * depth)
        filtered = bytearray()
        while len(filtered) < wanted:
            pending = pending or next(pieces, b"")
            if not pending or inflate.eof:
                raise BrokenImage(f"the file ends in row {done}")
            filtered += inflate.decompress(pending, wanted - len(filtered))
            pending = inflate.unconsumed_tail
        header = struct.pack(">IIBBBBB", width, rows + bool(previous), 8, _PNG_TYPES[depth], 0, 0, 0)
        data = (b"\0" + previous if previous else b"") + bytes(filtered)
        chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(data, 0)), (b"IEND", b""))
        part = np.asarray(Image.open(io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(*c) for c in chunks))))
        part = part[bool(previous) :]
        previous, done = part[-1].tobytes(), done + rows
        strip = Image.fromarray(part, None if image.mode != "P" else "L")
        if image.mode == "P":
            strip.putpalette(image.getpalette("RGB"))
        yield np.asarray(strip.convert("RGB"))


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png_data(path: Path, kind: bytes, piece: int = 2**20) -> Iterator[bytes]:
    """The content of all chunks of a kind in a PNG file, in pieces."""
    with open(path, "rb") as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length = int.from_bytes(head[:4], "big")
            if head[4:] == kind:
                for at in range(0, length, piece):
                    yield file.read(min(piece, length - at))
            else:
                file.seek(length, 1)
            file.seek(4, 1)


_TIFF_KEPT = (258, 259, 262, 266, 277, 284, 317, 320, 338, 339, 347, 530, 532)  # all that says how pixels are coded


def _plain_tiff(image: TiffImagePlugin.TiffImageFile) -> bool:
    tags = image.tag_v2
    bits = tags.get(258, (1,))
    plain = all(b == 8 for b in bits) and tags.get(284, 1) == 1 and tags.get(_ORIENTATION, 1) == 1
    return plain and (322 in tags or 278 in tags)


def _tiff_strips(path: Path, tags) -> Iterator[np.ndarray]:
    """Each strip, or each row of tiles, given to Pillow as a small TIFF file of its own."""
    width, height = tags[256], tags[257]
    tiled = 322 in tags
    wide, high = (tags[322], tags[323]) if tiled else (width, min(tags[278], height))
    offsets, lengths = (tags[324], tags[325]) if tiled else (tags[273], tags[279])
    across = -(-width // wide)
    with open(path, "rb") as file:
        for row, top in enumerate(range(0, height, high)):
            parts = []
            rows = high if tiled else min(high, height - top)
            for i in range(row * across, (row + 1) * across):
                file.seek(offsets[i])
                with Image.open(io.BytesIO(_tiff_file(file.read(lengths[i]), (wide, rows), tags))) as part:
                    parts.append(np.asarray(to_mode(part, 3)))
            yield np.concatenate(parts, 1)[: height - top, :width]


def _tiff_file(data: bytes, size: tuple[int, int], tags) -> bytes:
    """A TIFF file of one strip, coded as `tags` say."""
    own = TiffImagePlugin.ImageFileDirectory_v2(prefix=tags.prefix)
    for tag in _TIFF_KEPT:
        if tag in tags:
            own.tagtype[tag] = tags.tagtype[tag]
            own[tag] = tags[tag]
    own[256], own[257], own[278], own[279] = *size, size[1], len(data)
    own[273] = 0  # after the directory, as Pillow has it
    magic, number = (b"II*\0", "<I") if tags.prefix == b"II" else (b"MM\0*", ">I")
    return magic + struct.pack(number, 8) + own.tobytes(8) + data


# -- writing ----------------------------------------------------------------------------------------------------------


def write_mask(file, mask: np.ndarray, palette) -> None:
    """A mask (H, W) as a PNG file, row by row: bytes with a palette, or 16 bits for more than 256 classes."""
    height, width = mask.shape
    wide = mask.dtype.itemsize == 2
    file.write(b"\x89PNG\r\n\x1a\n")
    header = struct.pack(">IIBBBBB", width, height, *((16, 0) if wide else (8, 3)), 0, 0, 0)
    file.write(_png_chunk(b"IHDR", header))
    if not wide:
        file.write(_png_chunk(b"PLTE", np.array(palette, np.uint8).tobytes()))
    deflate = zlib.compressobj(6)
    for top in range(0, height, ROWS):
        rows = np.asarray(mask[top : top + ROWS]).astype(">u2" if wide else np.uint8)
        lines = np.zeros((len(rows), 1 + width * rows.itemsize), np.uint8)  # each with the filter "none" before it
        lines[:, 1:] = np.ascontiguousarray(rows).view(np.uint8)
        if data := deflate.compress(lines.tobytes()):
            file.write(_png_chunk(b"IDAT", data))
    file.write(_png_chunk(b"IDAT", deflate.flush()))
    file.write(_png_chunk(b"IEND", b""))
