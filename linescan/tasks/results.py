"""What detectors answer, and the names of classes."""

from dataclasses import dataclass, replace
from html import escape
from typing import Iterator, NamedTuple, Sequence

import numpy as np
from torch import Tensor

from ..media.draw import default_palette
from ..media.images import LARGE
from .windows import Size, thin

__all__ = ["Detections", "Found", "dataset_names", "names_and_colours", "patch_of", "run_lengths"]


@dataclass
class Detections:
    """The instances found in an image, best first.

    Attributes:
        size: (height, width) of the image.
        boxes: (N, 4) float32: left, top, right, bottom in pixels.
        scores: (N,) float32, 0 to 1.
        labels: (N,) the class of each.
        patches: of each its mask, as (top, left, (h, w) bool); None from a detector without masks.
        classes: names of the classes; None where they are not known.
    """

    size: Size
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    patches: list[tuple[int, int, np.ndarray]] | None = None
    classes: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def pick(self, chosen: np.ndarray) -> "Detections":
        """Those of the instances that `chosen`, a boolean array or indices, names."""
        indices = np.arange(len(self))[chosen]
        patches = None if self.patches is None else [self.patches[i] for i in indices]
        return replace(
            self, boxes=self.boxes[indices], scores=self.scores[indices], labels=self.labels[indices], patches=patches
        )

    def above(self, score: float) -> "Detections":
        """Those of at least this score."""
        return self.pick(self.scores >= score)

    @property
    def names(self) -> list[str]:
        """The name of the class of each."""
        return [self.classes[label] if self.classes else f"class {label}" for label in self.labels]

    @property
    def masks(self) -> np.ndarray | None:
        """(N, H, W) bool."""
        return None if self.patches is None else np.array([*self.each_mask()], bool).reshape(-1, *self.size)

    def each_mask(self, factor: int = 1) -> Iterator[np.ndarray]:
        """The masks (H, W) one by one; of every `factor`-th pixel (`linescan.tasks.windows.thin`)."""
        first = [thin(side, factor).start for side in self.size]
        size = [-(-side // factor) for side in self.size]
        for top, left, patch in self.patches or ():
            mask = np.zeros(size, bool)
            y, x = (-(-max(edge - start, 0) // factor) for edge, start in zip((top, left), first))
            part = patch[y * factor + first[0] - top :: factor, x * factor + first[1] - left :: factor]
            mask[y : y + part.shape[0], x : x + part.shape[1]] = part
            yield mask

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{score:.2f}</td><td>{', '.join(f'{v:.0f}' for v in box)}</td></tr>"
            for name, score, box in zip(self.names, self.scores, self.boxes)
        )
        return f"<table><tr><th>class</th><th>score</th><th>left, top, right, bottom</th></tr>{rows}</table>"

    def coco(self, image_id: int, categories: Sequence[int] | None = None) -> list[dict]:
        """COCO's result format: `bbox` as left, top, width, height; `segmentation` as compressed RLE.

        Args:
            image_id: the image's.
            categories: the category of each label; by default label + 1.
        """
        results = []
        for i, (left, top, right, bottom) in enumerate(self.boxes.tolist()):
            label = int(self.labels[i])
            result = {
                "image_id": image_id,
                "category_id": categories[label] if categories else label + 1,
                "bbox": [round(v, 2) for v in (left, top, right - left, bottom - top)],
                "score": round(float(self.scores[i]), 5),
            }
            if self.patches is not None:
                result["segmentation"] = run_lengths(self.patches[i], self.size)
            results.append(result)
        return results


def patch_of(mask: np.ndarray, size: Size, corner: Size = (0, 0), scale: int = 1) -> tuple[int, int, np.ndarray]:
    """What there is of a mask, and where: (top, left, (h, w) bool) in an image of `size`.

    Args:
        mask: (h, w) bool of a part of the image, `scale` times smaller.
        size: of the image.
        corner: where the part starts, (top, left).
        scale: by which the mask is smaller.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return *corner, np.zeros((0, 0), bool)
    top, left = corner[0] + rows[0] * scale, corner[1] + columns[0] * scale
    part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].repeat(scale, 0).repeat(scale, 1)
    return int(top), int(left), part[: size[0] - top, : size[1] - left].copy()


def run_lengths(patch: tuple[int, int, np.ndarray], size: Size) -> dict:
    """COCO's compressed RLE of a mask that is `patch` (top, left, (h, w) bool) in an image of `size`, else empty."""
    from pycocotools.mask import encode

    if size[0] * size[1] > LARGE:
        return _run_lengths_by_edges(patch, size)
    top, left, part = patch
    whole = np.zeros(size, np.uint8, order="F")
    whole[top : top + part.shape[0], left : left + part.shape[1]] = part
    return {"size": list(size), "counts": encode(whole)["counts"].decode("ascii")}


def _run_lengths_by_edges(patch: tuple[int, int, np.ndarray], size: Size) -> dict:
    """The same, without ever holding a mask as large as the image."""
    from pycocotools.mask import frPyObjects

    top, left, mask = patch
    columns = np.pad(mask.T, ((0, 0), (1, 1))).astype(np.int8)  # runs go down the columns, and end with them
    x, y = np.nonzero(np.diff(columns, axis=1))
    ends = (x + left) * size[0] + y + top  # start, end, start, end, ...
    whole = np.flatnonzero(ends[1:-1:2] == ends[2::2]) * 2 + 1  # a run over the bottom into the next column
    ends = np.delete(ends, np.concatenate([whole, whole + 1]))
    counts = np.diff(np.concatenate([[0], ends, [size[0] * size[1]]]))
    counts = counts[:-1] if not counts[-1] else counts
    packed = frPyObjects({"size": list(size), "counts": counts.tolist()}, *size)
    return {"size": list(size), "counts": packed["counts"].decode("ascii")}


class Found(NamedTuple):
    """The instances in one image: (N, 4) left, top, right, bottom; (N,); (N,); (N, H, W) bool or None."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None


def dataset_names(meta: dict) -> dict:
    """`classes` and `palette` of what a checkpoint or a config says of its dataset, where they are plain data."""
    said = meta.get("dataset_meta") or meta
    said = {str(key).lower(): value for key, value in said.items()} if isinstance(said, dict) else {}
    names = {}
    classes, palette = said.get("classes"), said.get("palette")
    if isinstance(classes, (list, tuple)) and classes and all(isinstance(name, str) for name in classes):
        names["classes"] = list(classes)
    if isinstance(palette, (list, tuple)) and all(np.shape(colour) == (3,) for colour in palette):
        names["palette"] = [tuple(map(int, colour)) for colour in palette]
    return names


def names_and_colours(meta: dict, count: int) -> tuple[list[str], list[tuple[int, int, int]]]:
    """Names and colours of `count` classes: those that are known, if they are that many."""
    names = dataset_names(meta)
    classes, palette = names.get("classes", []), names.get("palette", [])
    if len(classes) != count:
        classes, palette = [f"class {i}" for i in range(count)], []
    return classes, palette if len(palette) >= count else default_palette(count)
