"""From a teacher's features and a network's copies of them to maps of anomalies."""

import math
from typing import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ...layers.norm import at_least_float32
from ...layers.stems import mirror

__all__ = ["distance_map", "gaussian_blur"]


def distance_map(targets: Sequence[Tensor], rebuilt: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """How far the rebuilt features are from the teacher's, at each pixel: maps (B, H, W), at least float32.

    The sum over the levels of 1 - cos, each resized bilinearly with aligned corners, over the square of the number of
    levels, as the published tests have it.

    Args:
        targets, rebuilt: features (B, C, h, w) of each level, at any resolution.
        size: (H, W).
    """
    total = 0
    for target, own in zip(targets, rebuilt):
        distance = 1 - F.cosine_similarity(at_least_float32(target), at_least_float32(own))
        total = total + F.interpolate(distance[:, None], size, mode="bilinear", align_corners=True)[:, 0]
    return total / len(targets) ** 2


def gaussian_blur(maps: Tensor, sigma: float, truncate: float = 4.0) -> Tensor:
    """Maps (B, H, W), blurred by a Gaussian that is cut off at `truncate` standard deviations; the border is mirrored.

    What `scipy.ndimage.gaussian_filter` computes, on any device.
    """
    radius = math.floor(truncate * sigma + 0.5)
    if not radius:
        return maps
    offsets = torch.arange(-radius, radius + 1, dtype=maps.dtype, device=maps.device)
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    weights = (weights / weights.sum()).view(1, 1, 1, -1)
    x = mirror(maps[:, None], radius, radius, radius, radius)
    with torch.autocast(maps.device.type, enabled=False):
        return F.conv2d(F.conv2d(x, weights), weights.mT)[:, 0]
