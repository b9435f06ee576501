"""Images in, boxes with masks out."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.ops import box_area, box_iou

from ..errors import InputError
from ..media.draw import draw_boxes
from ..media.images import Picture
from ..media.large import Pixels, open_pixels
from .base import LARGEST_DRAWING, LARGEST_WHOLE, _bounded, _Tool
from .open import open_detector
from .results import Detections, Found
from .windows import Progress, Size, positions

__all__ = ["Detector"]


class Detector(_Tool):
    """Finds the instances in a picture.

        det = Detector("detection/vmamba_tiny_mask_rcnn_1x_coco", "weights.pth")
        found = det("photo.jpg").above(0.5)
        print(len(found), found.boxes, [det.classes[i] for i in found.labels])

    With `window`, windows slide over the picture in its own resolution, each is tested as the config says, and what
    several of them have found is kept once: small things in large pictures are found so.

    Args:
        model: an mmdet config: a file, a name of one of linescan's, or "mmdet::...".
        checkpoint, device, dtype, batch, window, stride: as for `Segmenter`.

    Raises:
        InputError, CheckpointError: as for `Segmenter`.
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
    ):
        super().__init__(open_detector(model, checkpoint), device, dtype, batch, window, stride)

    def draw(
        self, picture: Picture | Pixels, found: Detections, score: float = 0.3, legend_rows: int | None = None
    ) -> Image.Image:
        """The picture with what was `found`, if its score is high enough; large ones are drawn smaller."""
        pixels, found = open_pixels(picture), found.above(score)
        factor = -(-max(pixels.size) // LARGEST_DRAWING)
        size = [len(range(factor // 2, side, factor)) for side in pixels.size]
        masks = None if found.patches is None else found.each_mask(factor)
        return draw_boxes(
            pixels.reduced(factor)[: size[0], : size[1]], found.boxes / factor, found.labels, found.scores,
            self.classes, masks, self.palette, legend_rows=legend_rows,
        )  # fmt: skip

    def _find(self, pictures: list[np.ndarray]) -> list[Found]:
        try:
            return self.model.detect(pictures)
        except ValueError as error:  # the backbone says which sizes it takes
            raise InputError(f"pictures of {'x'.join(map(str, pictures[0].shape[:2]))} pixels: {error}") from error

    def _answer(self, opened: dict[int, Pixels], progress: Progress) -> dict[int, Detections]:
        if self.window:
            return {i: self._slide(pixels, progress) for i, pixels in opened.items()}
        if not opened:
            return {}
        found = self._find([_bounded(pixels) for pixels in opened.values()])
        answers = {}
        for (i, pixels), one in zip(opened.items(), found):
            answers[i] = _detections(one, pixels.size, scale=-(-max(pixels.size) // LARGEST_WHOLE))
            progress(1)
        return answers

    def _slide(self, pixels: Pixels, progress: Progress) -> Detections:
        (height, width), (high, wide) = pixels.size, self.window
        corners = [
            (y, x) for y in positions(height, high, self.stride[0]) for x in positions(width, wide, self.stride[1])
        ]
        parts, cut = [], []
        for at in range(0, len(corners), self.batch):
            together = corners[at : at + self.batch]
            windows = [pixels.read(y, min(y + high, height), x, min(x + wide, width)) for y, x in together]
            for (y, x), window, found in zip(together, windows, self._find(windows)):
                part = _detections(found, pixels.size, (y, x))
                inner = np.array([x > 0, y > 0, x + wide < width, y + high < height])
                border = np.array([x, y, x + window.shape[1], y + window.shape[0]])
                cut.append((inner & (abs(part.boxes - border) < 2)).any(1))
                parts.append(part)
            progress(len(together) / len(corners))
        patches = None if parts[0].patches is None else [patch for part in parts for patch in part.patches]
        everything = Detections(
            pixels.size,
            *(np.concatenate([getattr(part, name) for part in parts]) for name in ("boxes", "scores", "labels")),
            patches,
        )
        return everything.pick(_distinct(everything, np.concatenate(cut)))


def _detections(found: Found, size: Size, corner: Size = (0, 0), scale: int = 1) -> Detections:
    """What a model found in a part of a picture of `size` that starts at `corner` and is `scale` times smaller."""
    found = Found(*(None if part is None else part.cpu() for part in found))
    order = found.scores.argsort(descending=True, stable=True)
    y, x = corner
    boxes = found.boxes[order].numpy() * scale + np.array([x, y, x, y], np.float32)
    limit = np.array([size[1], size[0], size[1], size[0]], np.float32)
    patches = None
    if found.masks is not None:
        patches = [_patch(found.masks[i].numpy(), size, corner, scale) for i in order.tolist()]
    return Detections(size, boxes.clip(0, limit), found.scores[order].numpy(), found.labels[order].numpy(), patches)


def _patch(mask: np.ndarray, size: Size, corner: Size, scale: int) -> tuple[int, int, np.ndarray]:
    """What there is of a mask (h, w), and where in the picture that is."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return *corner, np.zeros((0, 0), bool)
    top, left = corner[0] + rows[0] * scale, corner[1] + columns[0] * scale
    part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].repeat(scale, 0).repeat(scale, 1)
    return int(top), int(left), part[: size[0] - top, : size[1] - left].copy()


def _distinct(found: Detections, cut: np.ndarray) -> np.ndarray:
    """Indices, best first, of instances without those that another one of their class has found, too.

    Whole instances go before those that the border of a window cuts, then by score. An instance is dropped if it shares
    more than half of the joint area with one that stays or, if it is cut, half of its own.
    """
    order = np.lexsort((-found.scores, cut))
    boxes, labels = torch.from_numpy(found.boxes), torch.from_numpy(found.labels)
    areas = box_area(boxes).clamp(min=1e-6)
    kept: list[int] = []
    for i in order.tolist():
        rivals = [k for k in kept if labels[k] == labels[i]]
        if rivals:
            joint = box_iou(boxes[i : i + 1], boxes[rivals])[0]
            shared = joint / (1 + joint) * (areas[i] + areas[rivals])  # the intersection
            if (joint > 0.5).any() or (cut[i] and (shared > 0.5 * areas[i]).any()):
                continue
        kept.append(i)
    return np.array(sorted(kept, key=lambda i: -found.scores[i]), int)
