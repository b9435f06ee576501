"""Images as arrays of their own depth: there and back, without Pillow's losses."""

import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageCms

from linescan.errors import BrokenImage, InputError
from linescan.media.arrays import ImageFacts, read_array, write_array
from linescan.media.images import read_image

PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def values(shape, dtype):
    random = np.random.default_rng(0)
    if dtype == np.float32:
        return random.random(shape).astype(dtype)
    return random.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def written(path, *args):
    with open(path, "wb") as file:
        write_array(file, *args)
    return path


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "dtype, format", [("u1", "PNG"), ("u1", "TIFF"), ("u1", "WEBP"), ("u2", "PNG"), ("u2", "TIFF")]
)
def test_there_and_back(channels, dtype, format, tmp_path):
    if dtype == "u2" and channels > 1:
        pytest.importorskip("pyvips")
    array = values((9, 7, channels), np.dtype(dtype))
    if format == "WEBP":
        array[..., -1] = array[..., -1] // 2 + 100  # colours under full transparency are not kept
    path = written(tmp_path / "x", array, ImageFacts(), format)
    again, facts = read_array(path)
    if format == "WEBP" and channels < 3:
        again = again[..., [0, 3][:channels]]  # which has no grey
    assert again.dtype == array.dtype and facts == ImageFacts()
    np.testing.assert_array_equal(again, array)


@pytest.mark.parametrize("channels", [1, 3])
def test_floats(channels, tmp_path):
    if channels > 1:
        pytest.importorskip("pyvips")
    array = values((9, 7, channels), np.float32)
    np.testing.assert_array_equal(read_array(written(tmp_path / "x", array, ImageFacts(), "TIFF"))[0], array)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("format", ["PNG", "TIFF", "JPEG"])
def test_profile_and_exif_travel_along(dtype, format, tmp_path):
    pytest.importorskip("pyvips")
    if dtype == np.uint16 and format == "JPEG":
        pytest.skip("holds 8 bits")
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    path = written(tmp_path / "x", values((9, 7, 3), dtype), ImageFacts(PROFILE, exif.tobytes()), format)
    array, facts = read_array(path)
    assert array.dtype == dtype and facts.icc == PROFILE
    if (dtype, format) == (np.uint16, "TIFF"):
        return  # libvips writes no EXIF data there
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        assert image.getexif()[0x010F].rstrip("\0") == "a camera" and image.info["icc_profile"] == PROFILE
    read = Image.Exif()
    read.load(facts.exif)
    assert read[0x010F].rstrip("\0") == "a camera"


def test_arrays_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = values((2, 3, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    array, facts = read_array(tmp_path / "x.png")
    np.testing.assert_array_equal(array, np.rot90(pixels, -1))
    assert facts.exif is None, "and say so"
    np.testing.assert_array_equal(array, read_image(tmp_path / "x.png"))


@pytest.mark.parametrize("turned", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_plain_tiff_files_are_upright(mode, turned, tmp_path):
    """Which Pillow maps into memory: Pillow 13 gives pixels of other places for those that stand on their side."""
    pixels = values((5, 8, 3), np.uint8)
    image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257 if mode == "I;16" else pixels)
    image = image if mode == "I;16" else image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = turned
    image.save(tmp_path / "x.tif", exif=exif)
    image.save(tmp_path / "plain.tif")
    want = read_array(tmp_path / "plain.tif")[0]
    want = {2: want[:, ::-1], 3: want[::-1, ::-1], 4: want[::-1]}.get(turned, want)
    if turned > 4:
        want = {5: want, 6: want[::-1], 7: want[::-1, ::-1], 8: want[:, ::-1]}[turned].swapaxes(0, 1)
    np.testing.assert_array_equal(read_array(tmp_path / "x.tif")[0], want)
    if mode not in ("RGBA", "I;16"):
        np.testing.assert_array_equal(np.atleast_3d(read_image(tmp_path / "x.tif", want.shape[2])), want)


def test_a_grey_that_means_transparency(tmp_path):
    pixels = values((4, 5), np.uint16)
    Image.fromarray(pixels).save(tmp_path / "x.png", transparency=int(pixels[1, 2]))
    array, _ = read_array(tmp_path / "x.png")
    np.testing.assert_array_equal(array[..., 0], pixels)
    np.testing.assert_array_equal(array[..., 1], np.where(pixels == pixels[1, 2], 0, 65535))


@pytest.mark.parametrize("mode, shape", [("1", 1), ("P", 3), ("CMYK", 3), ("LA", 2), ("PA", 4), ("I", 1), ("F", 1)])
def test_other_modes(mode, shape, tmp_path):
    image = Image.new("RGBA", (4, 4), (200, 100, 50, 255)).convert("RGB" if mode in ("1", "CMYK", "P") else "RGBA")
    image = image.convert("L").convert(mode) if mode in "IF" else image.convert(mode)
    image.save(tmp_path / "x.tif") if mode != "PA" else image.convert("P").save(
        tmp_path / "x.tif", "PNG", transparency=0
    )
    array, _ = read_array(tmp_path / "x.tif")
    assert array.shape == (4, 4, shape)
    assert array.dtype == {"I": np.int32, "F": np.float32}.get(mode, np.uint8)
    if mode in ("CMYK", "I"):
        assert np.abs(array[0, 0].astype(int) - {"CMYK": (200, 100, 50), "I": 124}[mode]).max() <= 1


def test_what_a_format_cannot_hold(tmp_path):
    for array, format, words in (
        (values((4, 4, 3), np.uint16), "JPEG", "JPEG files do not hold uint16"),
        (values((4, 4), np.float32), "PNG", "PNG files do not hold float32"),
        (np.zeros((4, 4), np.int64), "TIFF", "do not hold int64"),
        (values((4, 4, 4), np.uint8), "JPEG", "no alpha"),
    ):
        with pytest.raises(InputError, match=words):
            write_array(io.BytesIO(), array, ImageFacts(), format)


def test_without_pyvips(tmp_path, monkeypatch):
    pytest.importorskip("pyvips")
    path = written(tmp_path / "x.png", values((4, 4, 3), np.uint16))
    grey = written(tmp_path / "y.png", values((4, 4, 1), np.uint16))
    monkeypatch.setitem(sys.modules, "pyvips", None)
    with pytest.raises(BrokenImage, match=r"x.png: .*pip install 'linescan\[large\]'"):
        read_array(path)
    assert read_array(grey)[0].dtype == np.uint16
    with pytest.raises(InputError, match="large"):
        write_array(io.BytesIO(), values((4, 4, 3), np.uint16))


def test_broken_files(tmp_path):
    (tmp_path / "x.png").write_bytes(b"not an image")
    with pytest.raises(BrokenImage, match="x.png: not an image"):
        read_array(tmp_path / "x.png")


@pytest.mark.parametrize("channels, dtype", [(1, "u1"), (3, "u1"), (4, "u1"), (3, "u2"), (1, "u2")])
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_large_images_lie_in_a_file(channels, dtype, format, tmp_path, monkeypatch):
    pytest.importorskip("pyvips")
    from linescan.media import arrays, large

    array = values((700, 31, channels), np.dtype(dtype))  # more rows than are decoded at a time
    kept = ImageFacts(PROFILE if channels > 2 else None)
    path = written(tmp_path / "x", array, kept, format)
    monkeypatch.setattr(arrays, "LARGE", 1000)
    monkeypatch.setattr(large, "LARGE", 1000)
    again, facts = read_array(path)
    assert isinstance(again, np.memmap) and facts.icc == kept.icc
    np.testing.assert_array_equal(again, array)
    copy = written(tmp_path / "copy", again, facts, format)
    np.testing.assert_array_equal(read_array(copy)[0], array)
    assert read_array(copy)[1].icc == kept.icc
    if format == "PNG":
        monkeypatch.setattr(large.shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
        with pytest.raises(BrokenImage, match="takes 0.0 GB in .*, where 0.0 GB are free; TMPDIR names another folder"):
            read_array(path)
