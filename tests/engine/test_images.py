"""Pictures of every kind, whole and broken; folders of classes."""

import numpy as np
import pytest
from PIL import Image

from linescan.engine.image_sets import Digits, Folder, open_data
from linescan.errors import BrokenImage, InputError
from linescan.media.images import read_image, to_mode

from ..conftest import write_pictures


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif", "tiff", "webp", "ppm"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_formats(tmp_path, suffix, channels):
    path = tmp_path / f"x.{suffix}"
    Image.new("RGB", (7, 5), (200, 100, 50)).save(path)
    pixels = np.asarray(read_image(path, channels))
    assert pixels.shape[:2] == (5, 7)
    expected = {1: 124, 3: (200, 100, 50), 4: (200, 100, 50, 255)}[channels]
    assert np.abs(pixels.astype(int) - expected).max() <= 6  # JPEG and the palette of GIF round


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    Image.fromarray(np.array([[0, 32768, 65535]], np.uint16)).save(tmp_path / "x.png")
    assert np.asarray(read_image(tmp_path / "x.png", 1)).tolist() == [[0, 127, 255]]


def test_floats(tmp_path):
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)).save(tmp_path / "x.tiff")
    assert np.asarray(read_image(tmp_path / "x.tiff", 1)).tolist() == [[0, 127, 255]]
    Image.fromarray(np.array([[0.0, np.nan]], np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(BrokenImage, match="x.tiff: the picture holds NaN"):
        read_image(tmp_path / "x.tiff")


def test_exif_turns_the_picture(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # stored lying on its side
    Image.new("RGB", (8, 4)).save(tmp_path / "x.jpg", exif=exif)
    assert read_image(tmp_path / "x.jpg").size == (4, 8)


def test_transparent_palette(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.save(tmp_path / "x.png", transparency=bytes([0, 255]))
    assert read_image(tmp_path / "x.png", 4).getpixel((0, 0)) == (255, 0, 0, 0)
    assert read_image(tmp_path / "x.png", 3).getpixel((0, 0)) == (255, 0, 0)


def test_no_mode_for_five_channels():
    with pytest.raises(InputError, match="5 input channels"):
        to_mode(Image.new("RGB", (2, 2)), 5)


def test_broken_pictures_are_named(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    for name, content in {"cut.png": data[: len(data) // 2], "empty.png": b"", "text.jpg": b"not a picture"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BrokenImage, match=f"{name}: .") as error:
            read_image(tmp_path / name)
        assert "\n" not in str(error.value)


def test_folder(pictures):
    (pictures / "circle" / "notes.txt").write_text("not a picture")
    (pictures / ".cache").mkdir()
    found = Folder(pictures)
    assert found.classes == ["circle", "square", "stripe"]
    assert np.bincount(found.labels).tolist() == [8, 8, 8]
    assert all(found.classes[label] in name for name, label in zip(found.names, found.labels))


def test_the_split_is_stratified_disjoint_and_always_the_same(pictures):
    train, held_out = open_data(str(pictures), fraction=0.25)
    assert np.bincount(held_out.labels).tolist() == [2, 2, 2]
    assert sorted(train.names + held_out.names) == Folder(pictures).names
    assert open_data(str(pictures), fraction=0.25)[1].names == held_out.names
    digits = Digits(False), Digits(True)
    assert [len(d) for d in digits] == [1438, 359]
    assert not set(digits[0].names) & set(digits[1].names)


def test_train_and_val_folders(tmp_path):
    write_pictures(tmp_path / "train")
    write_pictures(tmp_path / "val", each=2)
    train, held_out = open_data(str(tmp_path))
    assert (len(train), len(held_out)) == (24, 6)
    write_pictures(tmp_path / "other", classes=("circle", "star"))
    with pytest.raises(InputError, match="'star'"):
        open_data(str(tmp_path / "train"), str(tmp_path / "other"))


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no class folders"):
        Folder(tmp_path / "empty")
    with pytest.raises(InputError, match="is not a folder"):
        Folder(tmp_path / "nowhere")
    write_pictures(tmp_path / "one", classes=("only",))
    with pytest.raises(InputError, match="one class only"):
        Folder(tmp_path / "one")
    write_pictures(tmp_path / "hollow")
    (tmp_path / "hollow" / "void").mkdir()
    with pytest.raises(InputError, match="void holds no pictures"):
        Folder(tmp_path / "hollow")
    write_pictures(tmp_path / "single", each=1)
    with pytest.raises(InputError, match="cannot be split"):
        open_data(str(tmp_path / "single"))
