"""Images in, masks out."""

from collections import defaultdict
from pathlib import Path
from typing import Iterable, Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import InputError
from ..media.draw import draw_masks
from ..media.images import Picture
from ..media.large import Pixels, blank, open_pixels
from .base import LARGEST_DRAWING, _bounded, _Tool
from .open import open_segmentor
from .windows import Block, Progress, Size, enlarge, slide

__all__ = ["Segmenter"]


class Segmenter(_Tool):
    """Says what each pixel of a picture shows.

        seg = Segmenter("my_config.py", "weights.pth")
        mask = seg("photo.jpg")                                         # (H, W), the class of each pixel
        print(seg.classes[mask[0, 0]])

    Without `window` a picture is tested as its config says: resized, then whole or by windows; one whose longer side
    is above 4096 pixels is reduced by a whole factor before. With `window`, windows slide over the picture in its own
    resolution, and it may be larger than memory.

    Args:
        model: an mmseg config: a file, a name of one of linescan's, or "mmseg::..."; or a model by name, such as
            "segman_seg_tiny", which needs no OpenMMLab.
        checkpoint: its weights (.pth, .safetensors). Without it, those that the config names as `load_from`.
        device: by default CUDA where there is one.
        dtype: torch.bfloat16 or torch.float16 for half precision.
        batch: pictures, or windows, in one forward pass.
        window: (height, width) of windows, or one number for both.
        stride: from one window to the next; by default two thirds of it.
        memory: bytes that logits may take at a time.
        args: further arguments of a model by name.

    Raises:
        InputError, CheckpointError: no such config or model, a package is missing, or the weights do not belong to it.
    """

    def __init__(
        self,
        model: str | Path,
        checkpoint: str | Path | None = None,
        *,
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
        batch: int = 1,
        window: int | Size | None = None,
        stride: int | Size | None = None,
        memory: int = 2**30,
        **args,
    ):
        super().__init__(open_segmentor(model, checkpoint, **args), device, dtype, batch, window, stride)
        self.memory = memory
        if not self.window and self.model.window and not self.model.resizes:
            self.window, self.stride = self.model.window, self.model.stride

    def draw(self, picture: Picture | Pixels, mask: np.ndarray, legend_rows: int | None = None) -> Image.Image:
        """The picture tinted by its mask, with a legend (`linescan.media.draw`); large ones are drawn smaller."""
        pixels = open_pixels(picture)
        factor = -(-max(pixels.size) // LARGEST_DRAWING)
        mask = np.asarray(mask[factor // 2 :: factor, factor // 2 :: factor])
        image = pixels.reduced(factor)[: mask.shape[0], : mask.shape[1]]
        return draw_masks(image, mask, self.classes, self.palette, legend_rows=legend_rows)

    def _forward(self, pictures: np.ndarray) -> Tensor:
        """(B, h, w, 3) -> logits (B, C, h, w), float32."""
        tensor = torch.from_numpy(np.ascontiguousarray(pictures)).to(self.device).movedim(-1, 1)
        try:
            logits = self.model.logits(tensor).float()
        except ValueError as error:  # the backbone says which sizes it takes
            raise InputError(f"windows of {'x'.join(map(str, pictures.shape[1:3]))} pixels: {error}") from error
        if not logits.sum().isfinite():  # of the sum: a mask of them all would take memory
            raise InputError("the model answers NaN or infinity; its weights are damaged, or the precision too low")
        return logits

    def _answer(self, opened: dict[int, Pixels], progress: Progress) -> dict[int, np.ndarray]:
        if self.window:
            return {i: self._mask(pixels.size, self._slide(pixels, progress)) for i, pixels in opened.items()}
        resized = {i: Pixels(self.model.resize(_bounded(pixels))) for i, pixels in opened.items()}
        alike = defaultdict(list)  # by size: pictures of one size can be answered together
        for i, pixels in resized.items():
            alike[pixels.size].append(i)
        answers = {}
        for size, members in alike.items():
            if self.model.window:
                logits = (self._gather(resized[i], progress) for i in members)
            else:
                logits = self._forward(np.stack([resized[i].read(0, size[0], 0, size[1]) for i in members]))
            for i, whole in zip(members, logits):
                target = opened[i].size
                same = target == size
                blocks = [Block(0, size[0], 0, size[1], whole)] if same else self._enlarge(whole, target)
                answers[i] = self._mask(target, blocks)
                progress(0 if self.model.window else 1)
        return answers

    def _slide(self, pixels: Pixels, progress: Progress) -> Iterator[Block]:
        window, stride = (self.window, self.stride) if self.window else (self.model.window, self.model.stride)
        return slide(
            pixels, self._forward, self.model.channels, window, stride,
            batch=self.batch, memory=self.memory, device=self.device, progress=progress,
        )  # fmt: skip

    def _gather(self, pixels: Pixels, progress: Progress) -> Tensor:
        whole = torch.empty(self.model.channels, *pixels.size, device=self.device)
        for top, bottom, left, right, logits in self._slide(pixels, progress):
            whole[:, top:bottom, left:right] = logits
        return whole

    def _enlarge(self, logits: Tensor, size: Size) -> Iterator[Block]:
        return enlarge(logits, size, self.model.align_corners, self.memory)

    def _mask(self, size: Size, blocks: Iterable[Block]) -> np.ndarray:
        mask = blank(size, np.uint8 if len(self.classes) <= 256 else np.uint16)
        for top, bottom, left, right, logits in blocks:
            mask[top:bottom, left:right] = self.model.decide(logits).cpu().numpy()
        return mask
