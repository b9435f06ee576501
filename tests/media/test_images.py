"""Images of every kind: what their pixels become, how much memory they may take, what is said of broken ones."""

import os
import pickle
import struct
import sys
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from linescan.errors import BrokenImage, InputError
from linescan.media import images, preprocess
from linescan.media.images import from_array, load_image, read_image, to_mode
from linescan.media.preprocess import Preprocess

from ..runs import python

COLOUR = (200, 100, 50)
GREY = 124  # of this colour


def pixel(image: Image.Image, channels: int = 3):
    """What the upper left pixel of an image becomes, from a file of its own where a format holds the mode."""
    return to_mode(image, channels).getpixel((0, 0))


def near(value, wanted, by: int = 1) -> bool:
    return np.abs(np.subtract(value, wanted)).max() <= by


@pytest.mark.parametrize(
    "suffix", ["png", "jpg", "bmp", "gif", "tiff", "webp", "ppm", "tga", "jp2", "avif", "ico", "qoi"]
)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_formats(tmp_path, suffix, channels):
    path = tmp_path / f"x.{suffix}"
    Image.new("RGBA" if suffix == "ico" else "RGB", (16, 16), COLOUR).save(path)
    pixels = np.asarray(read_image(path, channels))
    assert pixels.shape[:2] == (16, 16)
    assert np.abs(pixels.astype(int) - {1: GREY, 3: COLOUR, 4: (*COLOUR, 255)}[channels]).max() <= 6


# -- modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "RGBX", "P", "CMYK", "YCbCr", "LAB", "HSV"])
def test_modes_of_colours(mode):
    image = Image.new("RGB", (2, 2), COLOUR).convert(mode, palette=Image.Palette.ADAPTIVE)
    assert near(pixel(image), COLOUR) and near(pixel(image, 1), GREY) and near(pixel(image, 4), (*COLOUR, 255))


def test_modes_of_grey():
    assert pixel(Image.new("1", (2, 2), 1)) == (255,) * 3 and pixel(Image.new("1", (2, 2), 0), 1) == 0
    assert pixel(Image.new("L", (2, 2), 77), 4) == (77, 77, 77, 255)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, *COLOUR])
    assert pixel(palette) == COLOUR


def test_cmyk_is_multiplied_out():
    assert pixel(Image.new("CMYK", (1, 1), (255, 0, 128, 51))) == (0, 204, 102)


@pytest.mark.parametrize(
    "image",
    [
        Image.new("LA", (1, 1), (80, 0)),
        Image.new("La", (1, 1), (0, 0)),
        Image.new("RGBA", (1, 1), (*COLOUR, 0)),
        Image.new("RGBa", (1, 1), (0, 0, 0, 0)),
        Image.new("PA", (1, 1), (0, 0)),
    ],
    ids=lambda image: image.mode,
)
def test_what_is_transparent_is_white_and_not_its_hidden_colour(image):
    if image.mode == "PA":
        image.putpalette([*COLOUR])
    assert pixel(image) == (255, 255, 255) and pixel(image, 1) == 255 and pixel(image, 4)[3] == 0


def test_half_transparent_colours_are_mixed_with_white():
    for mode, value in (("RGBA", (*COLOUR, 51)), ("LA", (100, 51)), ("La", (20, 51)), ("RGBa", (40, 20, 10, 51))):
        grey = mode.upper() == "LA"
        assert near(pixel(Image.new(mode, (1, 1), value)), (224,) * 3 if grey else (244, 224, 214))
    assert pixel(Image.new("RGBA", (1, 1), (*COLOUR, 128)), 4) == (*COLOUR, 128), "kept for a model of four channels"


@pytest.mark.parametrize(
    "mode, transparency", [("P", bytes([0, 255])), ("P", 0), ("L", 0), ("RGB", (0, 0, 0)), ("1", 0)]
)
def test_transparency_of_png_files(mode, transparency, tmp_path):
    image = Image.new(mode, (2, 1))
    if mode == "P":
        image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 0), {"RGB": (0, 255, 0), "1": 1, "P": 1, "L": 200}[mode])
    image.save(tmp_path / "x.png", transparency=transparency)
    first, second = (read_image(tmp_path / "x.png").getpixel((x, 0)) for x in (0, 1))
    assert first == (255, 255, 255)
    assert second == {"RGB": (0, 255, 0), "1": (255,) * 3, "P": (0, 255, 0), "L": (200,) * 3}[mode]
    assert [read_image(tmp_path / "x.png", 4).getpixel((x, 0))[3] for x in (0, 1)] == [0, 255]


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    values = np.array([[0, 25700, 32768, 51400, 65535]], np.uint16)
    wanted = [0, 100, 128, 200, 255]
    for suffix in ("png", "tif", "jp2", "pgm"):
        Image.fromarray(values.repeat(8, 0).repeat(8, 1)).save(tmp_path / f"x.{suffix}")
        assert np.asarray(read_image(tmp_path / f"x.{suffix}", 1))[0, 4::8].tolist() == wanted, suffix
    for order in "<>":
        assert np.asarray(to_mode(Image.fromarray(values.astype(f"{order}u2")), 1)).tolist() == [wanted]
    for mode in ("I;16", "I;16L", "I;16B", "I;16N"):
        image = Image.new(mode, (1, 1), 51400)
        assert pixel(image, 1) == 200 and pixel(image) == (200,) * 3, mode
    image = Image.fromarray(values)
    image.save(tmp_path / "x.png", transparency=25700)
    assert np.asarray(read_image(tmp_path / "x.png", 1)).tolist() == [[0, 255, 128, 200, 255]]


def tiff(path, values: np.ndarray, sample_format=1, bits: int | None = None, photometric: int = 1, order=">"):
    """A TIFF file with tags that Pillow does not set, in a byte order."""
    height, width = values.shape
    bits = bits or 8 * values.itemsize
    entries = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 277: 1, 278: height, 339: sample_format}
    if sample_format is None:
        del entries[339]
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    entries |= {273: 8 + 2 + 12 * (len(entries) + 2) + 4, 279: len(data)}
    directory = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, entries[tag]) for tag in sorted(entries))
    head = struct.pack(f"{order}HIH", 42, 8, len(entries))
    path.write_bytes((b"MM" if order == ">" else b"II") + head + directory + bytes(4) + data)
    return path


def test_integers_of_32_bits(tmp_path):
    """Bytes where they would do, otherwise the range of the image."""
    for values, wanted in (
        ([200, 200, 200], [200, 200, 200]),
        ([0, 100, 255], [0, 100, 255]),
        ([0, 500, 1000], [0, 128, 255]),
        ([1000, 1000, 1000], [255, 255, 255]),
        ([-1000, 0, 1000], [0, 128, 255]),
        ([-7, -7, -7], [0, 0, 0]),
        ([0, 1, 2**31 - 1], [0, 0, 255]),
    ):
        Image.fromarray(np.array([values], np.int32)).save(tmp_path / "x.tif")
        assert np.asarray(read_image(tmp_path / "x.tif", 1)).tolist() == [wanted], values
    assert pixel(Image.new("I", (1, 1), 200)) == (200,) * 3


def test_tiff_files_of_rare_depths(tmp_path):
    def grey(values, *more):
        return np.asarray(read_image(tiff(tmp_path / "x.tif", np.array([values] * 2), *more), 1))[0].tolist()

    assert grey(np.array([0, 2**32 - 1], np.uint32), 1, 32, 1, "<") == [0, 255], "unsigned, unlike Pillow's integers"
    assert grey(np.array([0, 2**32 - 1], np.uint32), None, 32, 1, "<") == [0, 255], "unsigned, unless said otherwise"
    assert grey(np.array([-1000, 1000], np.int16), 2) == [0, 255]
    assert grey(np.array([-100, 100], np.int8), 2) == [0, 255] and grey(np.array([0, 100], np.int8), 2) == [0, 100]
    assert grey(np.array([10, 200], np.int16), 2) == [10, 200]
    assert grey(np.array([0, 0.25], np.float32), 3) == [0, 64]
    assert grey(np.array([0, 51400], np.uint16), 1, 16, 0, "<") == [255, 55], "zero is white"
    packed = np.array([0x000, 0xFFF, 0x7FF, 0x800])
    packed = (packed[0::2] << 12 | packed[1::2]).astype(">u4").view(np.uint8).reshape(-1, 4)[:, 1:]
    path = tiff(tmp_path / "x.tif", np.ascontiguousarray(packed).reshape(1, -1), 1, 12, 1, "<")
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack("<HHII", 256, 4, 1, 6)) + 8
    data[at : at + 4] = struct.pack("<I", 4)  # four pixels in six bytes
    path.write_bytes(data)
    assert np.asarray(read_image(path, 1)).tolist() == [[0, 255, 127, 128]]


def test_floats(tmp_path):
    for values, wanted in (
        ([0.0, 0.25, 1.0], [0, 64, 255]),
        ([0.0, 0.5, 1.03], [0, 128, 255]),  # bicubic filters overshoot
        ([0.0, 100.4, 255.0], [0, 100, 255]),
        ([0.0, 1500.0, 3000.0], [0, 128, 255]),
        ([-1.0, 0.0, 1.0], [0, 128, 255]),
    ):
        Image.fromarray(np.array([values], np.float32)).save(tmp_path / "x.tiff")
        assert np.asarray(read_image(tmp_path / "x.tiff", 1)).tolist() == [wanted], values
    for bad in (np.nan, np.inf, -np.inf):
        Image.fromarray(np.array([[0.0, bad]], np.float32)).save(tmp_path / "x.tiff")
        with pytest.raises(BrokenImage, match="x.tiff: the image holds NaN or infinite"):
            read_image(tmp_path / "x.tiff")


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "I;16", "I;16B", "I", "F", "1", "CMYK", "LAB"])
def test_exif_turns_the_image(mode):
    if mode.startswith("I") or mode == "F":
        image = Image.new(mode, (3, 2))
        image.putpixel((0, 0), 65535)
    else:
        image = Image.new("RGB", (3, 2))
        image.putpixel((0, 0), (255, 255, 255))
        image = image.convert(mode)
    exif = image.getexif()
    exif[0x0112] = 6  # stored lying on its side
    image.info["exif"] = exif.tobytes()
    turned = to_mode(image, 1)
    assert turned.size == (2, 3)
    corner, others = np.asarray(turned)[0, 1], np.delete(np.asarray(turned).ravel(), 1)
    assert (corner != others).all()


def test_damaged_exif_is_no_reason_to_refuse(tmp_path):
    Image.new("RGB", (8, 4), COLOUR).save(tmp_path / "x.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert read_image(tmp_path / "x.png").size == (8, 4)


def test_no_mode_for_five_channels():
    with pytest.raises(InputError, match="this model expects 5"):
        to_mode(Image.new("RGB", (2, 2)), 5)


# -- arrays -----------------------------------------------------------------------------------------------------------

BYTES = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
BYTES[0, 0] = 0, 128, 255


@pytest.mark.parametrize("dtype", "u1 >u2 u4 u8 i2 >i2 i4 i8 f2 >f2 f4 f8 g".split())
def test_arrays_in_bytes_of_every_type(dtype):
    values = BYTES.astype(dtype)
    if dtype == ">u2":
        values = (values * 257).astype(dtype)  # these have a white of their own
    np.testing.assert_array_equal(from_array(values), BYTES)
    np.testing.assert_array_equal(from_array(values[:, :, 0]), BYTES[:, :, 0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64])
def test_tensors_have_their_channels_first(dtype):
    np.testing.assert_array_equal(from_array(torch.from_numpy(BYTES).movedim(-1, 0).to(dtype)), BYTES)


@pytest.mark.parametrize(
    "dtype, off", [(torch.float16, 0), (torch.bfloat16, 1), (torch.float32, 0), (torch.float64, 0)]
)
def test_floats_from_0_to_1(dtype, off):
    tensor = (torch.from_numpy(BYTES).movedim(-1, 0) / 255).to(dtype).requires_grad_()
    assert near(np.asarray(from_array(tensor)).astype(int), BYTES.astype(int), off)
    if dtype != torch.bfloat16:
        np.testing.assert_array_equal(from_array(tensor.detach().movedim(0, -1).numpy()), BYTES)


def test_strides_booleans_and_single_channels():
    for view in (BYTES[::2, ::-1], BYTES.transpose(1, 0, 2), np.asfortranarray(BYTES), BYTES[:, :, ::-1]):
        np.testing.assert_array_equal(from_array(view), view)
    np.testing.assert_array_equal(from_array(BYTES[:, :, :1] > 99), (BYTES[:, :, 0] > 99) * 255)
    assert from_array(torch.ones(1, 2, 3)).getpixel((2, 1)) == 255
    assert from_array(torch.ones(4, 2, 3, dtype=torch.bool)).mode == "RGBA"
    assert pixel(load_image(np.array([[[200, 100, 50, 0]]], np.uint8))) == (255, 255, 255)


@pytest.mark.parametrize(
    "array, words",
    [
        (np.zeros((2, 2, 2)), r"shape \(2, 2, 2\) is not an image"),
        (np.zeros((3, 8, 8)), r"shape \(3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8), r"shape \(1, 3, 8, 8\)"),
        (np.zeros((0, 4)), r"shape \(0, 4\)"),
        (np.zeros(4), r"shape \(4,\)"),
        (np.zeros((2, 2), complex), "real numbers; this array holds complex128"),
        (np.array([["a"]]), "real numbers"),
        (np.array([[None]]), "real numbers"),
        (np.array([[0, 256]]), r"int64 runs over 0..255; this one over 0..256"),
        (np.array([[-1, 5]], np.int16), r"int16 runs over 0..255; this one over -1..5"),
        (np.array([[-0.5, 1.0]]), r"float64 runs over 0..1 or 0..255; this one over -0.5..1"),
        (np.array([[0, 1.2]], np.float32), r"0..1 or 0..255; this one over 0..1.2"),
        (np.array([[0, 256.0]], np.float32), r"this one over 0..256"),
        (np.array([[0, np.nan]]), "NaN or infinite"),
        (np.array([[0, np.inf]], np.float16), "NaN or infinite"),
        (torch.zeros(3, 4, 4, device="meta"), "not a meta one"),
        (torch.eye(4).to_sparse(), "not a sparse one"),
        ([[0, 1]], "not list"),
        (None, "not NoneType"),
    ],
    ids=str,
)
def test_what_is_no_image(array, words):
    with pytest.raises(InputError, match=words) as error:
        load_image(array)
    assert "\n" not in str(error.value)


# -- files that are broken, large, or of odd shapes -------------------------------------------------------------------


def test_broken_images_are_named(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    for name, content, words in (
        ("cut.png", data[: len(data) // 2], "truncated"),
        ("empty.png", b"", "the file is empty"),
        ("text.png", b"hello, I am not an image", "not an image, or damaged"),
        ("two.jpg", b"no", "not an image, or damaged"),
        ("script.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n", "not an image, or damaged"),
        ("missing.png", None, "No such file"),
        ("folder.png", None, "not a file"),
        ("pipe.png", None, "not a file"),
        ("x" * 300 + ".png", None, "File name too long"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(BrokenImage) as error:
            read_image(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name}: ") and words in str(error.value)
        assert "\n" not in str(error.value)
    image = Image.open(tmp_path / "cut.png")
    with pytest.raises(BrokenImage, match="cut.png: .*truncated"):
        load_image(image)


def png_of(width: int, height: int, rows: int = 0) -> bytes:
    """A grey PNG file that claims a size, and holds some rows of zeros."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes((1 + width) * rows), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_bombs_are_refused_by_their_size(tmp_path, monkeypatch):
    for size, words in (
        ((100_000, 100_000), "10000 million pixels; 4294 at most"),
        ((20_000, 20_000), "400 million pi"),
    ):
        (tmp_path / "bomb.png").write_bytes(png_of(*size))
        with pytest.raises(BrokenImage, match=f"bomb.png: {words}"):
            read_image(tmp_path / "bomb.png")
    monkeypatch.setitem(sys.modules, "pyvips", None)
    with pytest.raises(BrokenImage, match=r"180 at most are read at once; `pip install 'linescan\[large\]'`"):
        read_image(tmp_path / "bomb.png", size=(224, 224))
    (tmp_path / "wide.png").write_bytes(png_of(2**31 - 1, 1))
    with pytest.raises(BrokenImage, match="wide.png: 2147 million pixels"):
        read_image(tmp_path / "wide.png", size=(224, 224))


def test_pillows_limit_is_left_alone(tmp_path):
    (tmp_path / "x.png").write_bytes(png_of(9600, 9600, 9600))  # Pillow would warn
    limit = Image.MAX_IMAGE_PIXELS
    assert read_image(tmp_path / "x.png", 1).size == (9600, 9600) and Image.MAX_IMAGE_PIXELS == limit


@pytest.fixture
def all_are_large(monkeypatch):
    monkeypatch.setattr(images, "LARGE", 10_000)
    monkeypatch.setattr(preprocess, "LARGE", 10_000)


def smooth(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 6, width), np.linspace(0, 6, height))
    return Image.fromarray((127 + 120 * np.stack([np.sin(x), np.cos(y), np.sin(x + y)], 2)).astype(np.uint8))


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tif", "webp"])
@pytest.mark.parametrize("library", ["pyvips", "Pillow"])
def test_large_files_are_reduced_as_they_are_read(suffix, library, tmp_path, all_are_large, monkeypatch):
    if library == "Pillow":
        monkeypatch.setitem(sys.modules, "pyvips", None)
    else:
        pytest.importorskip("pyvips")
    whole = smooth(400, 600)
    whole.save(tmp_path / f"x.{suffix}", quality=95)
    reduced = read_image(tmp_path / f"x.{suffix}", size=(40, 40))
    assert min(reduced.size) >= 80 and reduced.width * reduced.height < 20_000
    wanted = np.asarray(whole.resize(reduced.size, Image.Resampling.BOX), int)
    assert np.abs(np.asarray(reduced) - wanted).max() <= (12 if suffix == "jpg" else 5 if suffix == "webp" else 1)
    if suffix == "jpg":
        with Image.open(tmp_path / "x.jpg") as image:
            image.draft("RGB", (80, 120))
            np.testing.assert_array_equal(reduced, image)
    assert read_image(tmp_path / f"x.{suffix}").size == (400, 600), "not unless its purpose is known"
    assert read_image(tmp_path / f"x.{suffix}", size=(300, 300)).size == (400, 600), "nor where the size is needed"


@pytest.mark.slow
def test_memory_of_large_and_of_long_images(tmp_path):
    """In a process of its own: what classifying takes on top of a small image."""
    folder = tmp_path / "images"
    folder.mkdir()
    Image.new("RGB", (12_000, 8_000), COLOUR).save(folder / "large.jpg")
    for i, size in enumerate([(1, 65_500), (65_500, 1), (3, 60_000)]):
        Image.new("RGB", size, COLOUR).save(folder / f"long{i}.png")
        Image.new("RGB", size, COLOUR).save(folder / f"long{i}.jpg")
    script = """
import resource, sys
from pathlib import Path
from linescan.media.images import load_image
from linescan.media.preprocess import Preprocess
model = Preprocess((3, 224, 224), (0.0,) * 3, (1.0,) * 3, crop_pct=0.9)
transforms = [model.transform(), model.transform("none"), model.transform("light"), model.transform("standard")]
transforms[0](load_image(Path(sys.argv[1]) / "long2.png", 3, model.resized).crop((0, 0, 3, 3)))
now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 2**31, now + 2**31))  # should it fail, then before the machine does
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(Path(sys.argv[1]).iterdir()):
    for transform in transforms:
        tensor = transform(load_image(path, 3, model.resized))
        assert tensor.shape == (3, 224, 224)
        assert transform is transforms[-1] or abs(tensor.mean() - 350 / 765) < 0.02, path
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = python(tmp_path, script, folder)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 450


@pytest.mark.parametrize("size", [(3, 2000), (2000, 3), (3, 2001), (5, 3000), (16, 16), (1, 700)])
@pytest.mark.parametrize("target", [(24, 24), (20, 32)])
def test_the_middle_of_a_long_image_gives_what_all_of_it_would(size, target, all_are_large):
    """Up to a pixel of the result: a pixel of the source away, values would differ by eight."""
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    wave = np.abs((8 * (x + y)) % 500 - 250)
    image = Image.fromarray(np.stack([wave, 255 - wave, wave // 2], 2).astype(np.uint8))
    ours = Preprocess((3, *target), (0.0,) * 3, (1.0,) * 3, crop_pct=0.9)
    theirs = create_transform((3, *target), mean=ours.mean, std=ours.std, interpolation="bicubic", crop_pct=0.9)
    assert (ours.transform()(image) - theirs(image)).abs().max() * 255 < 4


def test_a_model_that_squashes_sees_all_of_an_image():
    image = smooth(640, 200)  # of which a centre crop would leave out two thirds
    ours = Preprocess((3, 224, 224), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "squash")
    theirs = create_transform((3, 224, 224), mean=ours.mean, std=ours.std, interpolation="bicubic", crop_pct=1.0,
                              crop_mode="squash")  # fmt: skip
    assert torch.equal(ours.transform()(image), theirs(image))


def test_ordinary_images_are_transformed_by_timm_to_the_bit():
    image = smooth(640, 480)
    for augment, options in ((None, {}), ("standard", dict(is_training=True)), ("none", dict(no_aug=True))):
        ours = Preprocess((3, 224, 224), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9)
        options |= {"is_training": True, "re_mode": "pixel"} if augment else {}
        theirs = create_transform((3, 224, 224), mean=ours.mean, std=ours.std, crop_pct=0.9, interpolation="bicubic",
                                  **options)  # fmt: skip
        results = []
        for transform in (ours.transform(augment), theirs):
            torch.manual_seed(0)
            np.random.seed(0)
            __import__("random").seed(0)
            results.append(transform(image))
        assert torch.equal(*results)
    assert torch.equal(pickle.loads(pickle.dumps(ours.transform()))(image), ours.transform()(image))
