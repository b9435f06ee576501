"""Pictures larger than memory: read in parts, they are what Pillow reads; written in parts, Pillow reads them back."""

import io

import numpy as np
import pytest
from PIL import Image

from linescan.engine import BrokenImage, read_image
from linescan.media import large as pixels
from linescan.media.images import to_mode

SIZE = 143, 97  # width, height


@pytest.fixture
def everything_is_large(monkeypatch):
    monkeypatch.setattr(pixels, "LARGE", 1000)
    monkeypatch.setattr(pixels, "ROWS", 16)


@pytest.fixture
def whole(monkeypatch):
    """Counts the pictures that Pillow decodes as a whole."""
    seen = []
    monkeypatch.setattr(pixels, "to_mode", lambda image, n: seen.append(image.size) or to_mode(image, n))
    return seen


def picture(mode="RGB", size=SIZE):
    """Smooth, with some noise: an encoder uses every filter on it."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    noise = np.random.default_rng(0).integers(0, 40, (size[1], size[0], 4))
    values = np.stack([x, y, x + y, 255 - x], 2) + noise * (x > 60)[..., None]
    return Image.fromarray(values.astype(np.uint8), "RGBA").convert(mode)


def read_all(path):
    opened = pixels.open_pixels(path)
    assert opened.file is not None
    return opened.read(0, opened.size[0], 0, opened.size[1])


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA"])
def test_png_in_strips(mode, tmp_path, everything_is_large, whole):
    picture(mode).save(tmp_path / "x.png")
    np.testing.assert_array_equal(read_all(tmp_path / "x.png"), np.asarray(read_image(tmp_path / "x.png")))
    assert whole == []


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_tiff_in_strips(mode, compression, tmp_path, everything_is_large, whole):
    picture(mode).save(tmp_path / "x.tif", tiffinfo={278: 16}, compression=compression)
    np.testing.assert_array_equal(read_all(tmp_path / "x.tif"), np.asarray(read_image(tmp_path / "x.tif")))
    assert SIZE not in whole and len(whole) > 1


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_tiled_tiff(compression, byteorder, tmp_path, everything_is_large, whole):
    tifffile = pytest.importorskip("tifffile")
    values = np.asarray(picture())
    options = {"tile": (32, 48), "compression": compression, "byteorder": byteorder, "photometric": "rgb"}
    tifffile.imwrite(tmp_path / "x.tif", values, predictor=compression is not None or None, **options)
    np.testing.assert_array_equal(read_all(tmp_path / "x.tif"), values)
    assert SIZE not in whole and (48, 32) in whole


@pytest.mark.parametrize("name, options", [("x.jpg", {}), ("x.bmp", {}), ("x.webp", {"lossless": True})])
def test_other_formats_are_read_as_a_whole(name, options, tmp_path, everything_is_large, whole):
    picture().save(tmp_path / name, **options)
    np.testing.assert_array_equal(read_all(tmp_path / name), np.asarray(read_image(tmp_path / name)))
    assert whole == [SIZE]


def test_sixteen_bits_and_turned_pictures_are_what_pillow_says(tmp_path, everything_is_large):
    Image.fromarray(np.arange(97 * 143, dtype=np.uint16).reshape(97, 143) * 4).save(tmp_path / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture().save(tmp_path / "turned.png", exif=exif)
    for name in ("deep.png", "turned.png"):
        np.testing.assert_array_equal(read_all(tmp_path / name), np.asarray(read_image(tmp_path / name)))
    assert read_all(tmp_path / "turned.png").shape == (143, 97, 3)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
def test_a_large_file_that_is_cut_short(suffix, tmp_path, everything_is_large):
    buffer = io.BytesIO()
    picture().save(buffer, {".png": "PNG", ".tif": "TIFF", ".jpg": "JPEG"}[suffix])
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(buffer.getvalue()[: int(0.6 * len(buffer.getvalue()))])
    with pytest.raises(BrokenImage, match=f"cut{suffix}: "):
        pixels.open_pixels(path)


def test_parts_and_reductions(tmp_path, everything_is_large):
    picture().save(tmp_path / "x.png")
    large, small = pixels.open_pixels(tmp_path / "x.png"), pixels.Pixels(np.asarray(picture()))
    np.testing.assert_array_equal(large.read(30, 50, 7, 100), np.asarray(picture())[30:50, 7:100])
    for factor in (1, 2, 5, 200):
        np.testing.assert_array_equal(large.reduced(factor), small.reduced(factor))
        np.testing.assert_array_equal(large.reduced(factor), np.asarray(picture().reduce(factor)))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_masks_are_written_row_by_row(dtype, tmp_path, everything_is_large):
    mask = pixels.blank(SIZE[::-1], dtype)
    assert isinstance(mask, np.memmap)
    mask[:] = np.random.default_rng(1).integers(0, 7 if dtype == np.uint8 else 900, mask.shape)
    palette = [(10 * i, 5, 255 - i) for i in range(7)]
    with open(tmp_path / "m.png", "wb") as file:
        pixels.write_mask(file, mask, palette)
    with Image.open(tmp_path / "m.png") as image:
        image.load()
        np.testing.assert_array_equal(np.asarray(image), mask)
        assert image.mode == ("P" if dtype == np.uint8 else "I;16")
        if image.mode == "P":
            assert image.getpalette()[:21] == [c for colour in palette for c in colour]
