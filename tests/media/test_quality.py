"""PSNR, SSIM, luma and bicubic resizing against their published definitions, and degradations of parts."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from linescan.errors import InputError
from linescan.media.degrade import Degradation
from linescan.media.quality import luma, psnr, ssim, to_8_bits
from linescan.media.resize import enlarge_bicubic, reduce_bicubic


def photo(channels=3, height=48, width=60, seed=0):
    """Smooth shapes and some grain, as a file of bytes has them."""
    random = np.random.default_rng(seed)
    coarse = torch.from_numpy(random.random((1, channels, height // 6, width // 6)))
    image = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0]
    return to_8_bits(image + 0.03 * torch.from_numpy(random.standard_normal(image.shape)))


# -- scores -----------------------------------------------------------------------------------------------------------


def defined_ssim(x, y):
    """Wang et al., 2004, of images in 0..255, term by term: windows of 11 x 11, sigma 1.5, inside the image alone."""
    at = np.arange(11) - 5
    weights = np.exp(-(at[:, None] ** 2 + at**2) / (2 * 1.5**2))
    weights /= weights.sum()

    def mean(z):
        return (np.lib.stride_tricks.sliding_window_view(z, (11, 11)) * weights).sum((-2, -1))

    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return ((2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean()


@pytest.mark.parametrize("crop", [0, 4])
@pytest.mark.parametrize("channels, contrast", [(1, 1), (3, 1), (3, 0.1)])
def test_scores_are_as_published(channels, contrast, crop):
    a = to_8_bits(0.5 + contrast * (photo(channels) - 0.5))
    b = to_8_bits(a + 0.05 * contrast * torch.from_numpy(np.random.default_rng(5).standard_normal(a.shape)))
    x, y = (255 * z.numpy()[:, crop : 48 - crop, crop : 60 - crop] for z in (a, b))
    assert psnr(a, b, crop) == pytest.approx(20 * math.log10(255 / math.sqrt(((x - y) ** 2).mean())), abs=1e-4)
    assert ssim(a, b, crop) == pytest.approx(np.mean([defined_ssim(i, j) for i, j in zip(x, y)]), abs=1e-4)
    assert psnr(a, a) == math.inf and ssim(a, a) == pytest.approx(1)
    with pytest.raises(InputError, match="nothing is left of 48 x 60 pixels without 24"):
        psnr(a, b, 24)
    with pytest.raises(InputError, match="cannot be compared"):
        psnr(a, b[:, 1:])
    with pytest.raises(InputError, match="11 x 11 pixels or more, not 8 x 20"):
        ssim(a, b, 20)


def test_torchmetrics_ssim_has_a_border_of_reflected_pixels():
    """Its values, of version 1.9.0 for data_range=1: the mean over all pixels, where ours has whole windows alone."""
    for channels, inside, everywhere in ((1, 0.910963, 0.900571), (3, 0.919861, 0.905990)):
        a = photo(channels)
        b = to_8_bits(a + 0.05 * torch.from_numpy(np.random.default_rng(5).standard_normal(a.shape)))
        assert ssim(a, b) == pytest.approx(inside, abs=1e-6)
        a, b = (torch.nn.functional.pad(x[None], (5, 5, 5, 5), mode="reflect")[0] for x in (a, b))
        assert ssim(a, b) == pytest.approx(everywhere, abs=1e-6)


def test_luma_is_matlabs():
    """rgb2ycbcr of white, black, pure colours, and of its own example."""
    colours = torch.tensor([[255, 255, 255], [0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 100, 200.0]]) / 255
    want = [235, 16, 81.481, 144.553, 40.966, 16 + (65.481 * 10 + 128.553 * 100 + 24.966 * 200) / 255]
    got = 255 * luma(colours.double().T[None, :, :, None])
    assert got.flatten().tolist() == pytest.approx(want, abs=1e-4)


# -- bicubic ----------------------------------------------------------------------------------------------------------


def imresize_axis(x, size):
    """Matlab's imresize along the last axis, weight by weight."""
    length = x.shape[-1]
    scale = size / length

    def cubic(d):
        d = abs(d)
        if d <= 1:
            return 1.5 * d**3 - 2.5 * d**2 + 1
        return -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2 if d < 2 else 0.0

    reach = 2 / min(scale, 1)
    out = np.zeros((*x.shape[:-1], size))
    for i in range(size):
        centre = (i + 0.5) / scale - 0.5
        near = range(math.floor(centre - reach), math.ceil(centre + reach) + 1)
        weights = np.array([cubic((centre - j) * min(scale, 1)) for j in near])
        weights /= weights.sum()
        for j, weight in zip(near, weights):
            j %= 2 * length
            out[..., i] += weight * x[..., min(j, 2 * length - 1 - j)]
    return out


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_bicubic_is_matlabs(factor):
    x = photo(2, 36, 24).double()
    for resize, size in ((reduce_bicubic, lambda n: n // factor), (enlarge_bicubic, lambda n: n * factor)):
        want = imresize_axis(x.numpy(), size(24)).swapaxes(-1, -2)
        want = imresize_axis(want, size(36)).swapaxes(-1, -2)
        np.testing.assert_allclose(resize(x[None], factor)[0].numpy(), want, atol=1e-6)
    assert reduce_bicubic(torch.ones(1, 1, factor, factor), factor).item() == pytest.approx(1)


# -- degradations -----------------------------------------------------------------------------------------------------


def test_steps():
    image = photo(3, 32, 32).float()
    assert torch.equal(Degradation("bicubic", 2)(image), to_8_bits(reduce_bicubic(image[None], 2)[0]))
    np.random.seed(0)
    noisy = Degradation("noise 25")(image)
    np.random.seed(0)
    want = image.permute(1, 2, 0).numpy() + np.random.normal(0, 25 / 255, (32, 32, 3))
    np.testing.assert_allclose(noisy.permute(1, 2, 0).numpy(), want, atol=1e-6)
    small, large = (Degradation(f"jpeg {q}")(image) for q in (10, 95))
    assert psnr(small, image) < psnr(large, image) - 5 and torch.equal(small, to_8_bits(small))
    stripes = torch.zeros(3, 16, 16)
    stripes[0, :, ::2] = stripes[2, :, 1::2] = 1  # red and blue, which would run together at half of their resolution
    assert (Degradation("jpeg 95")(stripes) - stripes).abs().max() < 0.1
    grey = Degradation("jpeg 40")(image[:1])
    assert grey.shape == (1, 32, 32)
    spread = [(Degradation("noise 0-50")(image) - image).std().item() * 255 for _ in range(40)]
    assert min(spread) < 10 and max(spread) > 40
    for spec, scale, message in (
        ("blur 3", 1, "takes steps such as bicubic, noise 25"),
        ("noise 300", 1, "takes values of 0 to 255"),
        ("jpeg 60-40", 1, "the lower one first"),
        ("noise 25", 2, "has bicubic once among its steps for a model of scale 2"),
        ("bicubic", 1, "has no bicubic for a model of scale 1"),
        ("", 1, "not ''"),
    ):
        with pytest.raises(InputError, match=message):
            Degradation(spec, scale)


@pytest.mark.parametrize(
    "spec, scale", [("bicubic", 3), ("jpeg 30", 1), ("bicubic, jpeg 50", 2), ("jpeg 50, bicubic", 4)]
)
def test_patches_are_those_of_the_degraded_image(spec, scale, tmp_path):
    from linescan.engine.pairs import Pairs

    whole = photo(3, 41 * scale, 50 * scale)
    Image.fromarray((255 * whole).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / "photo.png")
    data = Pairs([tmp_path / "photo.png"], None, 3, scale, Degradation(spec, scale), patch=13)
    low = Degradation(spec, scale)(whole.float())
    for top, left in ((0, 0), (28, 37), (5, 20), (17, 3)):
        part = data._degraded((255 * whole).round().byte(), top, left)
        assert (part - low[:, top : top + 13, left : left + 13]).abs().max() < 1e-6
