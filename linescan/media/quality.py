"""How near an image is to another: PSNR and SSIM, as the papers of image restoration measure them.

Images are tensors (C, H, W) in 0..1 that came from bytes: `to_8_bits` first. Super-resolution is measured on the luma
of colour images (`luma`), without as many pixels at the borders as the factor; noise on RGB; JPEG on luma.
"""

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..extras import require

__all__ = ["SSIM_WINDOW", "luma", "psnr", "ssim", "to_8_bits"]

SSIM_WINDOW = 11
"""Side of SSIM's windows, in pixels."""

LUMA = (65.481, 128.553, 24.966)
"""Weights of red, green and blue in 0..1 for ITU-R BT.601's luma, which runs from 16 to 235 of 255."""


def luma(image: Tensor) -> Tensor:
    """Colours (..., 3, H, W) in 0..1 -> their luma (..., 1, H, W) in 16/255..235/255: Matlab's, not rounded."""
    weights = torch.tensor(LUMA, dtype=image.dtype, device=image.device)[:, None, None]
    return ((image * weights).sum(-3, keepdim=True) + 16) / 255


def to_8_bits(image: Tensor) -> Tensor:
    """Values as a file of bytes holds them: clipped to 0..1 and rounded to 255 steps."""
    return image.clamp(0, 1).mul(255).round() / 255


def psnr(image: Tensor, target: Tensor, crop: int = 0) -> float:
    """The peak signal-to-noise ratio in dB: 10 log10(1 / mean squared error), over all channels; infinity for equals.

    Args:
        image, target: (C, H, W) in 0..1.
        crop: pixels at each border that are left out.

    Raises:
        InputError: another shape, or nothing is left.
    """
    image, target = _cropped(image, target, crop)
    return (-10 * (image - target).square().mean().log10()).item()


def ssim(image: Tensor, target: Tensor, crop: int = 0) -> float:
    """Structural similarity (Wang et al., 2004): its mean over the map and the channels.

    Gaussian windows of 11 x 11 pixels with sigma 1.5, whole ones only, K1 = 0.01, K2 = 0.03, and the plain covariance,
    as Wang's own Matlab program; by scikit-image (the extra `restoration`). torchmetrics 1.9 counts windows that reach
    beyond the border as well, over reflected pixels: 0.4892 instead of 0.4936 for scikit-image's astronaut with noise
    of 15/255 (the whole image, RGB). Its map without 5 pixels at each border has the mean that is computed here.

    Args:
        image, target, crop: as for `psnr`.

    Raises:
        InputError: another shape, less than a window is left, or scikit-image is missing.
    """
    require("skimage", "restoration")
    from skimage.metrics import structural_similarity

    image, target = (x.cpu().numpy() for x in _cropped(image, target, crop))
    if min(image.shape[1:]) < SSIM_WINDOW:
        raise InputError(f"SSIM takes 11 x 11 pixels or more, not {image.shape[1]} x {image.shape[2]}")
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    return float(np.mean([structural_similarity(a, b, **options) for a, b in zip(image, target)]))


def _cropped(image: Tensor, target: Tensor, crop: int) -> tuple[Tensor, Tensor]:
    """Both in float64, without their borders."""
    if image.shape != target.shape:
        raise InputError(f"images of {tuple(image.shape)} and {tuple(target.shape)} cannot be compared")
    height, width = image.shape[-2:]
    if min(height, width) <= 2 * crop:
        raise InputError(f"nothing is left of {height} x {width} pixels without {crop} at each border")
    return tuple(x.double()[..., crop : height - crop, crop : width - crop] for x in (image, target))
