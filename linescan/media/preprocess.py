"""How a model wants its images."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Callable, Sequence

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from .images import LARGE

__all__ = ["Preprocess", "normalise"]


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(images - mean) / std in float32, of images (..., C, H, W) of bytes; mean and std of each channel, of bytes."""
    mean, std = (torch.tensor(v, dtype=torch.float32, device=images.device)[:, None, None] for v in (mean, std))
    return (images - mean) / std


@dataclass(frozen=True)
class Preprocess:
    """How a model wants its images.

    Attributes:
        size: (channels, height, width).
        mean, std: of each channel, of values in 0..1.
        interpolation: of the resize.
        crop_pct: the share of the shorter side that the centre crop keeps.
        crop_mode: what is resized for evaluation: "center", so that the image covers the crop; "squash", all of it to
            the crop's shape.
    """

    size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"

    @classmethod
    def from_dict(cls, values: dict) -> "Preprocess":
        """The inverse of `asdict`, from JSON too."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def as_dict(self) -> dict:
        """Plain values."""
        return asdict(self)

    @property
    def channels(self) -> int:
        """The number of input channels."""
        return self.size[0]

    @property
    def resized(self) -> tuple[int, int]:
        """(height, width) that an image covers before its centre is cropped: `read_image` takes it as `size`."""
        return tuple(math.floor(side / self.crop_pct) for side in self.size[1:])

    def seen(self, image: Tensor) -> Tensor:
        """What the model is given, (C, H, W) -> the pixels that it stands for, in 0..1."""
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (image * std + mean).clamp(0, 1)

    def whole(self, image: Image.Image) -> Tensor:
        """All of an image, (C, H, W): resized to `size` whatever its shape, and normalised."""
        height, width = self.size[1:]
        pixels = image.resize((width, height), Image.Resampling[self.interpolation.upper()])
        return self.normalised(torch.from_numpy(np.asarray(pixels).copy()).view(height, width, -1).permute(2, 0, 1))

    def normalised(self, images: Tensor) -> Tensor:
        """Bytes (..., C, H, W) of any size as the model wants them, float32."""
        return normalise(images, *(tuple(255 * v for v in of) for of in (self.mean, self.std)))

    def fitted(self, image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
        """All of an image in its own shape, and the height and width of what is not padding.

        It is scaled to just fit into `size`, normalised, and padded with zeros at the right and below, (C, H, W).
        """
        height, width = self.size[1:]
        scale = min(height / image.height, width / image.width)
        sides = [min(max(round(side * scale), 1), most) for side, most in zip(image.size, (width, height))]
        part = replace(self, size=(self.channels, sides[1], sides[0])).whole(image)
        return F.pad(part, (0, width - sides[0], 0, height - sides[1])), (sides[1], sides[0])

    def transform(self, augment: str | None = None, erasing: float = 0.0, flip: float | None = None) -> "Transform":
        """PIL image -> normalised tensor (C, H, W), by timm's `create_transform`.

        Of a very long or tall image only the middle is resized, so that no image of more than `LARGE` pixels is made.

        Args:
            augment: None, to resize and crop as in evaluation; "none", the same with training's resize; "light", small
                shifts and scales only; "crop", random crops of at least a fifth of the area, and mirroring;
                "standard", random crops, mirroring and colour jitter; or a policy of timm ("rand-m9-mstd0.5-inc1") on
                top of that.
            erasing: how often a rectangle is erased.
            flip: how often the image is mirrored; by default half of them, and none with "light".

        Raises:
            InputError: an unknown augmentation.
        """
        common = dict(
            input_size=self.size, mean=self.mean, std=self.std, interpolation=self.interpolation, crop_pct=self.crop_pct
        )
        if augment is None:
            steps = create_transform(**common, crop_mode=self.crop_mode)
            return Transform(steps, None if self.crop_mode == "squash" else self.resized)
        strength: dict[str, dict[str, Any]] = {
            "none": dict(no_aug=True),
            "crop": dict(scale=(0.2, 1.0), color_jitter=0.0),
            "light": dict(scale=(0.7, 1.0), ratio=(0.85, 1.18), hflip=0.0, color_jitter=0.0),
            "standard": dict(),
        }
        if augment == "standard" and self.channels not in (1, 3, 4):
            raise InputError(f"--augment standard changes colours, of which {self.channels} channels are none")
        if augment not in strength and self.channels != 3:
            raise InputError(f"--augment {augment} is for RGB images; here: {', '.join(strength)}")
        try:
            options = strength.get(augment, dict(auto_augment=augment))
            options |= {} if flip is None or augment == "none" else dict(hflip=flip)
            steps = create_transform(**common, is_training=True, re_prob=erasing, re_mode="pixel", **options)
        except (AssertionError, ValueError, KeyError):
            raise InputError(
                f"unknown augmentation {augment!r}; there are: {', '.join(strength)}, and timm's policies "
                "(rand-m9-mstd0.5-inc1, augmix-m5-w4-d2, original, ...)"
            ) from None
        return Transform(steps, self.resized)


class Transform:
    """The steps of a transform, applied to no more of an image than can be resized to cover `size` (height, width).

    None for all of it.
    """

    def __init__(self, steps: Callable[[Image.Image], Tensor], size: tuple[int, int] | None):
        self.steps, self.size = steps, size

    def __call__(self, image: Image.Image) -> Tensor:
        """PIL image -> tensor (C, H, W)."""
        return self.steps(image if self.size is None else middle(image, self.size))


def middle(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """`image`, or as much of its middle as has `LARGE` pixels once resized to cover `size` (height, width).

    What is left out would be cropped off afterwards: the result is the same, up to a shift of less than a pixel.
    """
    scale = max(size[0] / image.height, size[1] / image.width)
    if image.width * image.height * scale**2 <= LARGE:
        return image
    width, height = image.size
    short, long = min(image.size), max(image.size)
    kept = max(int(LARGE / (short * scale**2)), math.ceil(max(size) / scale) + 8)  # what is cropped, and its neighbours
    start = max(long - kept, 0) // 2  # as much at either end
    return image.crop((start, 0, width - start, height) if width > height else (0, start, width, height - start))
