"""Images larger than memory: read in parts, they are what Pillow reads; written in parts, Pillow reads them back."""

import io
import sys

import numpy as np
import PIL
import pytest
from PIL import Image

from linescan.errors import BrokenImage
from linescan.media import large, vips
from linescan.media.arrays import write_array
from linescan.media.images import read_image

from ..runs import python
from .test_images import tiff

SIZE = 143, 97  # width, height


@pytest.fixture
def everything_is_large(monkeypatch):
    monkeypatch.setattr(large, "LARGE", 1000)
    monkeypatch.setattr(large, "ROWS", 16)
    monkeypatch.setattr(vips, "ROWS", 16)


@pytest.fixture(params=["pyvips", "Pillow"])
def library(request, monkeypatch):
    """With the extra `large` and without it."""
    if request.param == "pyvips":
        pytest.importorskip("pyvips")
    else:
        monkeypatch.setitem(sys.modules, "pyvips", None)
    return request.param


def image(mode="RGB", size=SIZE):
    """Smooth, with some noise: an encoder uses every filter on it."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    noise = np.random.default_rng(0).integers(0, 40, (size[1], size[0], 4))
    values = np.stack([x, y, x + y, 255 - x], 2) + noise * (x > 60)[..., None]
    return Image.fromarray(values.astype(np.uint8), "RGBA").convert(mode)


def agrees(path) -> np.ndarray:
    """What is read part by part, which is what is read at once."""
    opened = large.open_pixels(path)
    assert opened.file is not None
    parts = [opened.read(top, min(top + 40, opened.size[0]), 0, opened.size[1]) for top in range(0, opened.size[0], 40)]
    np.testing.assert_array_equal(np.concatenate(parts), np.asarray(read_image(path)))
    return np.concatenate(parts)


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg", "bmp", "tga", "ppm"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_formats_and_modes(mode, suffix, tmp_path, everything_is_large, library):
    values = np.arange(97 * 143).reshape(97, 143)
    picture = Image.fromarray((values * 4).astype(np.uint16)) if mode == "I;16" else image(mode)
    try:
        picture.save(tmp_path / f"x.{suffix}")
    except (OSError, KeyError):
        pytest.skip("no such files")
    agrees(tmp_path / f"x.{suffix}")


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
@pytest.mark.parametrize("rows", [8, 16, 97])
def test_tiff_in_strips(rows, compression, tmp_path, everything_is_large, library):
    image().save(tmp_path / "x.tif", tiffinfo={278: rows}, compression=compression)
    agrees(tmp_path / "x.tif")


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_tiled_tiff(compression, byteorder, tmp_path, everything_is_large, library):
    tifffile = pytest.importorskip("tifffile")
    values = np.asarray(image())
    options = {"tile": (32, 48), "compression": compression, "byteorder": byteorder, "photometric": "rgb"}
    tifffile.imwrite(tmp_path / "x.tif", values, predictor=compression is not None or None, **options)
    np.testing.assert_array_equal(agrees(tmp_path / "x.tif"), values)


@pytest.mark.parametrize("values", [[0, 200], [0, 3000], [-5, 900], [0.0, 0.7], [-1.0, 1.0]], ids=str)
def test_the_range_of_the_whole_image_counts(values, tmp_path, everything_is_large, library):
    pixels = np.zeros((97, 143), np.float32 if isinstance(values[1], float) else np.int32)
    pixels[:16], pixels[-1, -1] = values  # the largest comes in the last strip
    pixels[40:60] = values[1] / 2
    Image.fromarray(pixels).save(tmp_path / "x.tif")
    assert len(np.unique(agrees(tmp_path / "x.tif"))) == (4 if values[0] < 0 else 3)


@pytest.mark.parametrize("suffix", ["PNG", "TIFF"])
@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colours_of_16_bits(channels, suffix, tmp_path, everything_is_large):
    pytest.importorskip("pyvips")
    if (channels, suffix) == (2, "TIFF"):
        pytest.skip("Pillow reads no such files")
    values = np.random.default_rng(0).integers(0, 65535, (97, 143, channels)).astype(np.uint16)
    with open(tmp_path / "x", "wb") as file:
        write_array(file, values, format=suffix)
    agrees(tmp_path / "x")


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("values", [np.arange(97 * 143) % 251, np.arange(97 * 143) * 4, np.arange(97 * 143) * 10])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_tiff_files_where_zero_may_be_white(dtype, values, photometric, tmp_path, everything_is_large, library):
    path = tmp_path / "x.tif"
    try:
        agrees(tiff(path, values.reshape(97, 143).astype(dtype), photometric=photometric, order="<"))
    except BrokenImage:
        assert (dtype, photometric) == (np.uint32, 0), "Pillow reads no such files"


@pytest.mark.parametrize("mode", ["L", "I;16"])
def test_a_transparent_grey(mode, tmp_path, everything_is_large, library):
    pixels = (np.arange(97 * 143).reshape(97, 143) % 251).astype(np.uint8 if mode == "L" else np.uint16)
    Image.fromarray(pixels).save(tmp_path / "x.png", transparency=40)
    agrees(tmp_path / "x.png")


BEFORE_13 = int(PIL.__version__.partition(".")[0]) < 13
YCBCR = pytest.param("YCbCr", marks=pytest.mark.skipif(BEFORE_13, reason="older Pillow cannot read what it writes"))


@pytest.mark.parametrize("mode", ["LAB", YCBCR, "PA"])
def test_modes_that_only_pillow_decodes(mode, tmp_path, everything_is_large, library):
    (image("RGBA") if mode == "PA" else image()).convert(mode).save(tmp_path / "x.tif")
    agrees(tmp_path / "x.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_turned_images(orientation, suffix, tmp_path, everything_is_large, library):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image().save(tmp_path / f"x [{orientation}].{suffix}", exif=exif)
    turned = agrees(tmp_path / f"x [{orientation}].{suffix}")
    assert turned.shape == ((143, 97, 3) if orientation > 4 else (97, 143, 3))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".webp"])
@pytest.mark.parametrize("share", [0.02, 0.6, 0.95])
def test_a_large_file_that_is_cut_short(suffix, share, tmp_path, everything_is_large, library):
    buffer = io.BytesIO()
    image().save(buffer, {".png": "PNG", ".tif": "TIFF", ".jpg": "JPEG", ".webp": "WEBP"}[suffix])
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(buffer.getvalue()[: int(share * len(buffer.getvalue()))])
    with pytest.raises(BrokenImage, match=f"^{path}: ") as error:
        large.open_pixels(path)
    assert "\n" not in str(error.value)


def test_parts_and_reductions(tmp_path, everything_is_large):
    image().save(tmp_path / "x.png")
    file, memory = large.open_pixels(tmp_path / "x.png"), large.Pixels(np.asarray(image()))
    np.testing.assert_array_equal(file.read(30, 50, 7, 100), np.asarray(image())[30:50, 7:100])
    for factor in (1, 2, 5, 200):
        np.testing.assert_array_equal(file.reduced(factor), memory.reduced(factor))
        np.testing.assert_array_equal(file.reduced(factor), np.asarray(image().reduce(factor)))


def test_a_full_temporary_folder(tmp_path, everything_is_large, monkeypatch):
    image().save(tmp_path / "x.png")
    monkeypatch.setattr(large.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 41_000}))
    with pytest.raises(BrokenImage, match=r"x.png: takes 0.0 GB in .*, where 0.0 GB are free; TMPDIR"):
        large.open_pixels(tmp_path / "x.png")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_image(tmp_path):
    """100 million pixels, 300 MB: in a process of its own."""
    pyvips = pytest.importorskip("pyvips")
    black = pyvips.Image.black(4_000, 25_000, bands=3)
    black.write_to_file(str(tmp_path / "x.png"))
    black.write_to_file(str(tmp_path / "x.tif[compression=deflate,tile]"))
    script = """
import resource, sys
from linescan.media.large import open_pixels
from linescan.media.images import read_image
read = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in ("x.png", "x.tif"):
    path = f"{sys.argv[1]}/{name}"
    assert min(read_image(path, size=(224, 224)).size) >= 448
    pixels = open_pixels(path)
    assert pixels.size == (25_000, 4_000) and pixels.read(24_990, 25_000, 0, 4_000).max() == 0
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - read) // 1024)
"""
    done = python(tmp_path, script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 150


@pytest.mark.parametrize("dtype, classes", [(np.uint8, 2), (np.uint8, 7), (np.uint8, 256), (np.uint16, 900)])
def test_masks_are_written_without_a_copy(dtype, classes, tmp_path, everything_is_large):
    mask = large.blank(SIZE[::-1], dtype)
    assert isinstance(mask, np.memmap)
    mask[:] = np.random.default_rng(1).integers(0, classes, mask.shape)
    mask[0] = 255  # no class
    palette = [(i % 250, 5, 255 - i % 250) for i in range(classes)]
    with open(tmp_path / "m.png", "wb") as file:
        large.write_mask(file, mask, palette)
    with Image.open(tmp_path / "m.png") as saved:
        np.testing.assert_array_equal(np.asarray(saved), mask)
        assert saved.mode == ("P" if dtype == np.uint8 else "I;16")
        if saved.mode == "P":
            assert saved.getpalette()[: 3 * classes] == [c for colour in palette for c in colour]
