"""Segmenting two images of one scene together, with a small Sigma, in Python and from the command line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import linescan
from linescan.cli import app
from linescan.errors import InputError
from linescan.tasks import Segmenter

SMALL = {"depths": (1, 1, 1, 1), "dim": 32, "decoder_depths": (1, 1, 1)}
ARGS = [part for key, value in SMALL.items() for part in ("--model-arg", f"{key}={json.dumps(value)}")]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "sigma.pth"
    torch.save({"model": linescan.create_model("sigma_tiny", num_classes=4, **SMALL).state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def seg(weights):
    return Segmenter("sigma_tiny", weights, device="cpu", **SMALL)


def images(height=45, width=70):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (height, width, 3), np.uint8), rng.integers(0, 256, (height, width), np.uint8)


def test_a_mask_is_that_of_both_images(seg):
    rgb, grey = images()
    bgr, extra = rgb[..., ::-1], np.repeat(grey[..., None], 3, -1)
    mean, std = np.array((123.675, 116.28, 103.53)), np.array((58.395, 57.12, 57.375))
    inputs = (torch.from_numpy((x - mean) / std).float().movedim(-1, 0)[None] for x in (bgr, extra))
    with torch.no_grad():
        expected = seg.module(*inputs)[0].argmax(0)
    [mask] = seg([(rgb, grey)])
    assert (mask == expected.numpy()).mean() > 0.999 and len(np.unique(mask)) > 1
    assert (seg([(rgb, rgb)])[0] != mask).any() and (seg([(rgb[..., ::-1], grey)])[0] != mask).any()
    np.testing.assert_array_equal(seg.draw(seg.open((rgb, grey)), mask), seg.draw(rgb, mask))


def test_the_second_image_is_read_as_grey_of_whatever_kind(seg, tmp_path):
    rgb, grey = images()
    luma = np.asarray(Image.fromarray(rgb).convert("L"))
    np.testing.assert_array_equal(seg([(rgb, rgb)])[0], seg([(rgb, luma)])[0])
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(grey).save(tmp_path / "grey.jpg", quality=100)
    [mask] = seg([(rgb, grey)])
    np.testing.assert_array_equal(seg([(rgb, tmp_path / "deep.png")])[0], mask)
    assert (seg([(rgb, tmp_path / "grey.jpg")])[0] == mask).mean() > 0.9


def test_windows_cut_both_images_alike(seg, weights):
    rgb, grey = images(64, 96)
    tool = Segmenter("sigma_tiny", weights, device="cpu", window=(64, 48), stride=48, **SMALL)
    halves = [seg([(rgb[:, at], grey[:, at])])[0] for at in (slice(0, 48), slice(48, 96))]
    np.testing.assert_array_equal(tool([(rgb, grey)])[0], np.concatenate(halves, 1))


def test_what_is_no_pair_is_refused_in_one_line(seg):
    rgb, grey = images()
    with pytest.raises(InputError, match="sigma_tiny reads 2 images of each scene .--extra., got 1"):
        seg([rgb])
    with pytest.raises(InputError, match="both images are of one size, got 45x70 and 40x70 pixels"):
        seg([(rgb, grey[5:])])


def test_folders_from_the_command_line(seg, weights, tmp_path):
    rgb, grey = images()
    for folder in ("rgb", "thermal"):
        (tmp_path / folder).mkdir()
    for name in ("a", "b", "alone"):
        Image.fromarray(rgb).save(tmp_path / f"rgb/{name}.png")
    for name, image in (("a", grey), ("b", grey[5:])):
        Image.fromarray(image).save(tmp_path / f"thermal/{name}.png")
    options = ["-m", "sigma_tiny", "-c", weights, "-o", tmp_path / "out", "--device", "cpu", *ARGS]
    ran = CliRunner().invoke(
        app, ["segment", *map(str, (tmp_path / "rgb", "--extra", tmp_path / "thermal", *options)), "--json"]
    )
    assert ran.exit_code == 1
    outcomes = {source.rpartition("/")[2]: one for one in json.loads(ran.stdout)
                for source in [one["source"][0] if isinstance(one["source"], list) else one["source"]]}  # fmt: skip
    assert "both images are of one size" in outcomes["b.png"]["error"]
    assert "has no partner" in outcomes["alone.png"]["error"]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out/masks/a.png")), seg([(rgb, grey)])[0])


def test_what_is_wrong_with_all_files_is_said_once(weights, tmp_path, linescan_here):
    for i in range(3):
        Image.fromarray(images()[0]).save(tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"never read")
    options = ["-m", "sigma_tiny", "-c", weights, "-o", tmp_path / "out", "--device", "cpu", *ARGS]
    said = linescan_here("segment", tmp_path, *options)
    assert said == (2, "", "linescan: sigma_tiny reads 2 images of each scene (--extra), got 1\n")
