"""Models of the zoo as the tools see them; they need no other library."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..checkpoint import CheckpointError, load_checkpoint, read_meta, read_state_dict
from ..errors import InputError
from ..media.preprocess import normalise
from ..zoo import create_model, fetch, find
from .results import names_and_colours

__all__ = ["NAMED", "NamedSegmentor", "stretched"]


def stretched(images: Tensor) -> Tensor:
    """Images (B, C, H, W), each so that its lowest value is 0 and its highest 255; float32. An even one is 0."""
    images = images.float()
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    return (images - low) * (255 / (high - low).clamp_min(1e-12))


class NamedSegmentor:
    """A segmentation model of the zoo: its network maps images (B, C, H, W) to logits (B, classes, H, W).

    One that reads several images of a scene gets them as one of all their channels, and its network each by itself.

    The entry's `preprocess` says how it is tested: `order` of the channels, "RGB" or "BGR"; `mean` and `std` of bytes,
    or `stretch` for images whose darkest value becomes 0 and whose brightest 255; `size`, to which an image is resized
    whatever its shape, or `scale` (longest, shortest), to which its sides are resized at most; `divisor`, of which both
    sides are multiples; `min_size`, up to which smaller images are padded. A network of one channel tells two classes
    apart, by the sign of its logits.

    Args:
        name: of the zoo, with or without a tag.
        checkpoint: weights; by default the published ones.
        args: of the model, over the entry's.

    Attributes:
        module: the network.
        images: that it reads of each scene.
        channels: of the logits.
        classes, palette: names and colours, as the checkpoint has them.
        window, stride, resizes, align_corners: see `linescan.openmmlab.models.MMSegmentor`.
    """

    window = stride = None
    resizes = True
    align_corners = False

    def __init__(self, name: str, checkpoint: str | Path | None, **args):
        entry = find(name)
        checkpoint = fetch(entry) if checkpoint is None else checkpoint
        head = read_state_dict(checkpoint).get(f"{entry.classifier}.weight")
        if head is None:
            raise CheckpointError(f"{checkpoint} is not a checkpoint of {name}: it has no {entry.classifier}.weight")
        try:
            self.module = load_checkpoint(create_model(name, num_classes=len(head), **args), checkpoint)
        except TypeError as error:
            raise InputError(f"cannot build {name} with these arguments: {error}") from None
        self.channels = max(len(head), 2)
        self.classes, self.palette = names_and_colours(read_meta(checkpoint), self.channels)
        how = entry.preprocess
        self.images = len(entry.inputs)
        self.reverse = how.get("order", "RGB") == "BGR"
        self.stretch, self.size, self.scale = how.get("stretch", False), how.get("size"), how.get("scale")
        self.mean, self.std = how.get("mean"), how.get("std")
        self.divisor, self.min_size = how.get("divisor", 1), how.get("min_size", 1)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Images (..., H, W, 3) of bytes, RGB -> as `logits` takes them: the same."""
        return images

    def prepare(self, image: np.ndarray) -> np.ndarray:
        """An image (H, W, 3 * images) of bytes, RGB -> at the scale of the test."""
        sides = image.shape[:2]
        if self.size:
            sides = self.size
        elif self.scale:
            factor = min(max(self.scale) / max(sides), min(self.scale) / min(sides))
            sides = [int(side * factor + 0.5) for side in sides]
        sides = [max(-(-side // self.divisor), 1) * self.divisor for side in sides]
        images = torch.from_numpy(np.array(image)).movedim(-1, 0)[None].float()
        images = F.interpolate(images, sides, mode="bilinear", align_corners=False)
        return images[0].movedim(0, -1).round().byte().numpy()

    def logits(self, images: Tensor) -> Tensor:
        """Images (B, 3 * images, H, W) of bytes, RGB -> logits (B, channels, H, W)."""
        height, width = images.shape[-2:]
        below, right = (max(-side % self.divisor, self.min_size - side) for side in (height, width))
        inputs = (x.flip(1) if self.reverse else x for x in images.chunk(self.images, 1))
        inputs = (stretched(x) if self.stretch else normalise(x, self.mean, self.std) for x in inputs)
        logits = self.module(*(F.pad(x, (0, right, 0, below)) for x in inputs))[..., :height, :width]
        return torch.cat([torch.zeros_like(logits), logits], 1) if logits.shape[1] == 1 else logits

    def decide(self, logits: Tensor) -> Tensor:
        """Logits (C, H, W) -> classes (H, W)."""
        return logits.argmax(0)


NAMED = {"segmentation": NamedSegmentor}
"""By task, what opens a model of the zoo: (name, checkpoint, **arguments)."""
