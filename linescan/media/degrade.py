"""Degradations made on the fly: what restoration is trained to undo.

    bicubic            smaller by the model's factor, as Matlab's imresize, rounded to bytes
    noise 25           Gaussian noise of this standard deviation, of 255, neither rounded nor clipped
    jpeg 40            JPEG of this quality, without subsampling of colours

Steps are separated by commas and done in order; a range, as in "noise 0-50", is drawn from for each image.
"""

import io
import math
import re
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import InputError
from .quality import to_8_bits
from .resize import reduce_bicubic

__all__ = ["Degradation"]


@dataclass(frozen=True)
class Step:
    """One step, and the range that its value is drawn from."""

    kind: str
    low: float = 0.0
    high: float = 0.0


RANGES = {"noise": (0, 255), "jpeg": (1, 100)}
"""Values that a step takes."""

JPEG_BLOCK = 8


class Degradation:
    """What is done to an image, in order; see the module.

    Args:
        spec: as in "bicubic, noise 5-15, jpeg 60-95".
        scale: by how much the model enlarges; if not 1, `bicubic` is one of the steps.

    Raises:
        InputError: a step or a value that is none, or steps that do not fit the scale.
    """

    def __init__(self, spec: str, scale: int = 1):
        self.scale = scale
        self.steps = [self._parse(part.strip()) for part in spec.split(",")]
        if [step.kind for step in self.steps].count("bicubic") != (scale > 1):
            wanted = "bicubic once among its steps" if scale > 1 else "no bicubic"
            raise InputError(f"--degrade has {wanted} for a model of scale {scale}, not {spec!r}")

    @staticmethod
    def _parse(part: str) -> Step:
        if part == "bicubic":
            return Step(part)
        match = re.fullmatch(r"(noise|jpeg)\s+(\d+(?:\.\d+)?)(?:\s*-\s*(\d+(?:\.\d+)?))?", part)
        if not match:
            raise InputError(f"--degrade takes steps such as bicubic, noise 25, noise 0-50 or jpeg 40, not {part!r}")
        kind, low, high = match[1], float(match[2]), float(match[3] or match[2])
        least, most = RANGES[kind]
        if not least <= low <= high <= most:
            raise InputError(f"--degrade {kind} takes values of {least} to {most}, the lower one first, not {part!r}")
        return Step(kind, low, high)

    @property
    def cell(self) -> int:
        """The grid of an image, in its pixels, that parts of it must begin on to be degraded as in the whole."""
        blocks = JPEG_BLOCK if any(step.kind == "jpeg" for step in self.steps) else 1
        return self.scale * math.lcm(blocks, 4)  # four small pixels are more than the kernel of bicubic reaches

    def __call__(self, image: Tensor) -> Tensor:
        """An image (C, H, W) in 0..1, of sides that the scale divides -> (C, H / scale, W / scale).

        Random numbers are NumPy's.
        """
        for step in self.steps:
            value = np.random.uniform(step.low, step.high) if step.low < step.high else step.low
            if step.kind == "bicubic":
                image = to_8_bits(reduce_bicubic(image[None], self.scale)[0])
            elif step.kind == "noise":
                image = image + _noise(image, value)
            else:
                image = _jpeg(image, round(value))
        return image


def _noise(image: Tensor, sigma: float) -> Tensor:
    """Drawn pixel by pixel, as it always was in tests: the same seed gives the papers' noise."""
    noise = np.random.normal(0, sigma / 255, (*image.shape[1:], image.shape[0]))
    return torch.from_numpy(noise).movedim(-1, 0).to(image.dtype)


def _jpeg(image: Tensor, quality: int) -> Tensor:
    pixels = to_8_bits(image).mul(255).round().byte().movedim(0, -1).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(
        buffer, "JPEG", quality=quality, subsampling=0
    )
    decoded = np.array(Image.open(buffer))
    return torch.from_numpy(decoded.reshape(pixels.shape)).movedim(-1, 0).to(image.dtype) / 255
