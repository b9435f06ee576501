"""Images and clips as tensors: data sets for training and evaluation, made of an `ImageSet`."""

from typing import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import Dataset

from ..media.preprocess import Preprocess, Transform
from ..media.video import Clips, Views, open_video, random_segments
from .data import seed_all
from .image_sets import ImageSet

__all__ = ["AugmentedClip", "Samples", "ViewsOfClip", "reader"]

Reader = Callable[[ImageSet, int], Tensor]
"""(set, index) -> the sample as the model wants it."""


class Samples(Dataset):
    """Items {"input": what `read` makes of a sample, "label": its class, "index": its number in the set}.

    Args:
        images: the set.
        read: makes the tensor.
        repeats: in an epoch, a `repeats`-th of the samples, each this many times in a row: repeated augmentation. The
            length of the epoch stays.
    """

    def __init__(self, images: ImageSet, read: Reader, repeats: int = 1):
        self.images, self.read, self.repeats = images, read, repeats
        self.in_memory = images.in_memory

    @property
    def names(self) -> Sequence[str]:
        """What to call each sample."""
        return self.images.names

    def preview(self, index: int) -> Image.Image:
        """A sample as it is shown."""
        return self.images.preview(index)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {"input": self.read(self.images, index), "label": self.images.labels[index], "index": index}

    def order(self, generator: np.random.Generator) -> Sequence[int]:
        return np.repeat(generator.permutation(len(self)), self.repeats)[: len(self)]


class ReadImage:
    """An image, (C, H, W). In training, one is read large enough for the smallest crop."""

    def __init__(self, preprocess: Preprocess, transform: Transform, training: bool):
        self.channels, self.transform = preprocess.channels, transform
        self.size = tuple(4 * side if training else side for side in preprocess.resized)

    def __call__(self, images: ImageSet, index: int) -> Tensor:
        return self.transform(images.image(index, self.channels, self.size))


class ReadBands:
    """An image of other channels than Pillow knows, (C, H, W): integers are scaled to 0..1 by their type."""

    def __init__(self, preprocess: Preprocess, transform: Transform):
        self.channels, self.transform = preprocess.channels, transform

    def __call__(self, images: ImageSet, index: int) -> Tensor:
        bands = images.bands(index, self.channels)
        scale = np.iinfo(bands.dtype).max if bands.dtype.kind in "iu" else 1
        tensor = torch.from_numpy(np.ascontiguousarray(bands.astype(np.float32) / scale))
        return self.transform.steps(tensor.movedim(-1, 0))


class ViewsOfClip:
    """All views of a video as in evaluation, (views, C, T, H, W)."""

    def __init__(self, frames: int, preprocess: Preprocess, views: Views):
        self.clips = Clips(frames, preprocess, views)

    def __call__(self, images: ImageSet, index: int) -> Tensor:
        return torch.stack(list(self.clips.views(images.names[index])))


class AugmentedClip:
    """One clip of a video for training, (C, T, H, W): a random frame of each segment, all of them changed alike.

    Crop, mirroring and colours are drawn once for a clip; the rectangle that is erased is the same in all frames, and
    its noise is not.

    Args:
        frames: of a clip.
        preprocess: how the model wants its images.
        transform: of one frame.
        erasing: how often a rectangle is erased.
    """

    def __init__(self, frames: int, preprocess: Preprocess, transform: Callable, erasing: float = 0.0):
        self.frames, self.channels, self.transform = frames, preprocess.channels, transform
        self.erase = RandomErasing(erasing, mode="pixel", device="cpu") if erasing else None

    def __call__(self, images: ImageSet, index: int) -> Tensor:
        video = open_video(images.names[index])
        chosen = random_segments(len(video), self.frames)
        draw = int(torch.randint(2**31, ()))
        frames = []
        for image in video.images(chosen, self.channels):
            seed_all(draw, "frame")
            frames.append(self.transform(image))
        clip = torch.stack(frames, 1)
        seed_all(draw, "erasing")
        if self.erase:
            clip = self.erase(clip.flatten(0, 1)).unflatten(0, clip.shape[:2])
        return clip


def reader(
    preprocess: Preprocess,
    frames: int = 0,
    *,
    augment: str | None = None,
    erasing: float = 0.0,
    flip: float | None = None,
    views: Views = Views(),
) -> Reader:
    """What makes samples of images, or of clips of `frames` frames, for training (`augment`) or for evaluation.

    Args:
        preprocess: how the model wants its images.
        frames: of a clip; 0 for images.
        augment, erasing, flip: see `Preprocess.transform`; without `augment` as in evaluation.
        views: of each video in evaluation.
    """
    if not frames:
        transform = preprocess.transform(augment, erasing, flip)
        if preprocess.channels not in (1, 3, 4):
            return ReadBands(preprocess, transform)
        return ReadImage(preprocess, transform, training=augment is not None)
    if augment is None:
        return ViewsOfClip(frames, preprocess, views)
    return AugmentedClip(frames, preprocess, preprocess.transform(augment, flip=flip), erasing)
