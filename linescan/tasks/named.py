"""Segmentors by name, which need no OpenMMLab."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..checkpoint import CheckpointError, load_checkpoint, read_meta, read_state_dict
from ..errors import InputError
from ..zoo import create_model, fetch, find
from .results import _names

__all__ = ["NamedSegmentor"]


class NamedSegmentor:
    """SegMAN, tested as published on ADE20K: the shorter side 512 (the longer 2048 at most), both multiples of 32."""

    window = stride = None
    resizes = True
    align_corners = False  # of the enlarging of logits
    scale = (2048, 512)
    smallest = 224  # what its neighbourhoods fit into; small windows are padded to it

    def __init__(self, name: str, checkpoint: str | Path | None, **args):
        if checkpoint is None:
            checkpoint = fetch(find(name))
        head = read_state_dict(checkpoint).get("decode_head.conv_seg.weight")
        if head is None:
            raise CheckpointError(f"{checkpoint} is not a segmentor of SegMAN: it has no decode_head.conv_seg.weight")
        try:
            self.module = load_checkpoint(create_model(name, num_classes=len(head), **args), checkpoint)
        except TypeError as error:
            raise InputError(f"{name} cannot be built so: {error}") from None
        self.channels = len(head)
        self.classes, self.palette = _names(read_meta(checkpoint), self.channels)
        self.mean, self.std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])

    def resize(self, pixels: np.ndarray) -> np.ndarray:
        """A picture (H, W, 3) at the scale of the test."""
        height, width = pixels.shape[:2]
        factor = min(self.scale[0] / max(height, width), self.scale[1] / min(height, width))
        size = [-(-int(side * factor + 0.5) // 32) * 32 for side in (height, width)]
        images = torch.from_numpy(np.array(pixels)).movedim(-1, 0)[None].float()
        images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        return images[0].movedim(0, -1).round().byte().numpy()

    def logits(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) of bytes, RGB -> logits (B, classes, H, W)."""
        height, width = pictures.shape[-2:]
        mean, std = (v.to(pictures.device)[:, None, None] for v in (self.mean, self.std))
        below, right = (max(-side % 32, self.smallest - side) for side in (height, width))
        x = F.pad((pictures.float() - mean) / std, (0, right, 0, below))
        return self.module(x)[..., :height, :width]

    def decide(self, logits: Tensor) -> Tensor:
        """Logits (C, H, W) -> classes (H, W)."""
        return logits.argmax(0)
