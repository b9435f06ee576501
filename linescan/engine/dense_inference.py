"""Pictures in; masks, or boxes with masks, out.

    seg = Segmenter("segmentation/vmamba_tiny_upernet_ade20k", "weights.pth")
    mask = seg("photo.jpg")                                             # (H, W), the class of each pixel
    seg.draw("photo.jpg", mask).save("overlay.png")

Sliding windows are read from the picture, answered and blended strip by strip, so that memory does not grow with the
picture: what is kept of the logits is a strip one window high and as wide as `memory` allows.
"""

from collections import defaultdict
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Callable, Iterable, Iterator, NamedTuple, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_area, box_iou

from .dense_models import Found, open_detector, open_segmentor
from .errors import InputError
from .evaluate import precision
from .inference import Picture
from .overlay import draw_boxes, draw_masks
from .pixels import Pixels, blank, open_pixels
from .processes import pick_device

__all__ = ["Block", "Detections", "Detector", "Segmenter", "enlarge", "positions", "slide"]

Progress = Callable[[float], None]
Size = tuple[int, int]
LARGEST_DRAWING = 4096  # the longer side of an overlay at most
LARGEST_WHOLE = 4096  # of what a model is shown at once


def _silent(share: float) -> None:
    pass


# -- windows ----------------------------------------------------------------------------------------------------------


def positions(length: int, window: int, stride: int) -> list[int]:
    """Where windows start along a side: `stride` apart, the last one at the end."""
    count = max(-(-(length - window) // stride), 0) + 1
    return [max(min(i * stride, length - window), 0) for i in range(count)]


class Block(NamedTuple):
    """A part of a picture and its logits (C, bottom - top, right - left)."""

    top: int
    bottom: int
    left: int
    right: int
    logits: Tensor


def slide(
    pixels: Pixels,
    forward: Callable[[np.ndarray], Tensor],
    channels: int,
    window: Size,
    stride: Size,
    *,
    batch: int = 1,
    memory: int = 2**30,
    device: torch.device | str = "cpu",
    progress: Progress = _silent,
) -> Iterator[Block]:
    """The mean of the logits of all windows over each pixel, block by block, each pixel once.

    The logits of a block are good until the next one is asked for.

    The sums are kept for a strip as high as a window. Where a strip as wide as the picture would take more than
    `memory` bytes, the picture is done in several columns, and windows across their borders once in each.

    Args:
        pixels: the picture.
        forward: windows (B, h, w, 3) -> logits (B, channels, h, w).
        window, stride: (height, width); a window is never larger than the picture.
        batch: windows in one call of `forward`.
        memory: bytes for the sums of logits; never less than what one window takes.
        device: where `forward` answers.
        progress: gets the shares of the work as they are done, 1 in all.
    """
    height, width = pixels.size
    high, wide = min(window[0], height), min(window[1], width)
    tops, lefts = positions(height, high, stride[0]), positions(width, wide, stride[1])
    columns = -(-width // max(memory // (channels * high * 4), wide))
    edges = [width * i // columns for i in range(columns + 1)]
    widest = torch.empty(channels, high, max(b - a for a, b in zip(edges, edges[1:])), device=device)
    for left, right in zip(edges, edges[1:]):
        ours = [x for x in lefts if x < right and x + wide > left]
        across = _cover(ours, wide, left, right)
        sums = widest[..., : right - left].zero_()
        for top, following in zip(tops, [*tops[1:], height]):
            strip = pixels.read(top, top + high, ours[0], ours[-1] + wide)
            for at in range(0, len(ours), batch):
                together = ours[at : at + batch]
                answers = forward(np.stack([strip[:, x - ours[0] :][:, :wide] for x in together]))
                for x, answer in zip(together, answers):
                    a, b = max(x, left), min(x + wide, right)
                    sums[..., a - left : b - left] += answer[..., a - x : b - x]
                progress(len(together) / (len(tops) * len(ours) * columns))
            done = following - top
            counts = np.outer(_cover(tops, high, top, following), across)
            yield Block(top, following, left, right, sums[:, :done].div_(torch.from_numpy(counts).to(sums)))
            sums[:, : high - done] = sums[:, done:].clone()
            sums[:, high - done :] = 0


def _cover(starts: Sequence[int], length: int, first: int, last: int) -> np.ndarray:
    """How many of the windows that start at `starts` lie over each position from `first` to `last`."""
    at = np.arange(first, last)
    return sum(((start <= at) & (at < start + length)).astype(int) for start in starts)


def enlarge(logits: Tensor, size: Size, align_corners: bool = False, memory: int = 2**30) -> Iterator[Block]:
    """Logits (C, h, w) as `F.interpolate(logits, size, mode="bilinear")` has them, in strips of `memory` bytes."""
    height, width = size
    above, below, share_y = _neighbours(logits.shape[1], height, align_corners, logits.device)
    before, after, share_x = _neighbours(logits.shape[2], width, align_corners, logits.device)
    rows = max(memory // (4 * logits.shape[0] * width * 4), 1)  # four of them at a time, at the most
    for top in range(0, height, rows):
        at = slice(top, top + rows)
        strip = torch.lerp(logits[:, above[at]], logits[:, below[at]], share_y[at, None])
        yield Block(top, min(top + rows, height), 0, width, torch.lerp(strip[..., before], strip[..., after], share_x))


def _neighbours(small: int, large: int, align_corners: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each position of a side of `large` the two of `small` that it lies between, and how near to the second."""
    at = torch.arange(large, dtype=torch.float32, device=device)
    if align_corners:
        at = at * ((small - 1) / max(large - 1, 1))
    else:
        at = ((at + 0.5) * (small / large) - 0.5).clamp(min=0)
    first = at.long().clamp(max=small - 1)
    return first, (first + 1).clamp(max=small - 1), at - first


class _Tool:
    """What segmenting and detecting have in common: a model somewhere, and pictures one after the other."""

    def __init__(self, model, device: str | None, dtype: torch.dtype, batch: int, window, stride):
        self.device, self.dtype, self.batch = pick_device(device), dtype, batch
        precision(self.device, dtype)
        self.model = model
        self.model.module.to(self.device).eval()
        self.window, self.stride = _pair(window, "window"), _pair(stride, "stride")
        if self.stride and not self.window:
            raise InputError("a stride is one of windows: give their size as well")
        if self.window and not self.stride:
            self.stride = tuple(max(2 * side // 3, 1) for side in self.window)
        if self.window and any(step > side for step, side in zip(self.stride, self.window)):
            raise InputError(f"windows of {self.window} every {self.stride} pixels leave gaps: strides are no larger")

    @property
    def classes(self) -> list[str]:
        """The names of the classes."""
        return self.model.classes

    @property
    def palette(self) -> list[tuple[int, int, int]]:
        """A colour (red, green, blue) for each class."""
        return self.model.palette

    def each(self, pictures: Iterable[Picture], progress: Progress = _silent) -> Iterator[tuple]:
        """For each picture in turn (pixels, answer); or (None, the InputError that it cannot be read).

        `pictures` may be endless; they are taken `batch` at a time. `progress` gets shares of one picture.
        """
        pictures = iter(pictures)
        while together := list(islice(pictures, self.batch)):
            opened, answers = {}, {}
            for i, picture in enumerate(together):
                try:
                    opened[i] = open_pixels(picture)
                except InputError as error:
                    answers[i] = error
            with torch.inference_mode(), precision(self.device, self.dtype):
                answers |= self._answer(opened, progress)
            yield from ((opened.get(i), answers[i]) for i in range(len(together)))

    def __call__(self, pictures: Picture | Sequence[Picture]):
        """The answer for a picture: a path, a PIL image, or an array; a list of answers for a list.

        Raises:
            BrokenImage, InputError: one that cannot be read, or is no picture.
        """
        one = not isinstance(pictures, (list, tuple))
        answers = []
        for _, answer in self.each([pictures] if one else pictures):
            if isinstance(answer, InputError):
                raise answer
            answers.append(answer)
        return answers[0] if one else answers


def _pair(value: int | Size | None, name: str) -> Size | None:
    if value is None:
        return None
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(not isinstance(side, int) or side < 1 for side in pair):
        raise InputError(f"a {name} is (height, width) in pixels, not {value!r}")
    return pair


# -- segmentation -----------------------------------------------------------------------------------------------------


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
            "segman_tiny", which needs no OpenMMLab.
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
        """The picture tinted by its mask, with a legend (`linescan.engine.overlay`); large ones are drawn smaller."""
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


def _bounded(pixels: Pixels) -> np.ndarray:
    """The picture, (H, W, 3); a larger one than models are ever shown at once is reduced by a whole factor first."""
    return pixels.reduced(-(-max(pixels.size) // LARGEST_WHOLE))


# -- detection --------------------------------------------------------------------------------------------------------


@dataclass
class Detections:
    """The instances found in a picture, best first.

    Attributes:
        size: (height, width) of the picture.
        boxes: (N, 4) float32: left, top, right, bottom in pixels.
        scores: (N,) float32, 0 to 1.
        labels: (N,) the class of each.
        patches: of each its mask, as (top, left, (h, w) bool); None from a detector without masks.
    """

    size: Size
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    patches: list[tuple[int, int, np.ndarray]] | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def pick(self, chosen: np.ndarray) -> "Detections":
        """Those of the instances that `chosen`, a boolean array or indices, names."""
        indices = np.arange(len(self))[chosen]
        patches = None if self.patches is None else [self.patches[i] for i in indices]
        return Detections(self.size, self.boxes[indices], self.scores[indices], self.labels[indices], patches)

    def above(self, score: float) -> "Detections":
        """Those of at least this score."""
        return self.pick(self.scores >= score)

    @property
    def masks(self) -> np.ndarray | None:
        """(N, H, W) bool."""
        return None if self.patches is None else np.array([*self.each_mask()], bool).reshape(-1, *self.size)

    def each_mask(self, factor: int = 1) -> Iterator[np.ndarray]:
        """The masks (H, W) one by one; of every `factor`-th pixel."""
        size = [len(range(factor // 2, side, factor)) for side in self.size]
        for top, left, patch in self.patches or ():
            mask = np.zeros(size, bool)
            y, x = (-(-max(edge - factor // 2, 0) // factor) for edge in (top, left))
            part = patch[y * factor + factor // 2 - top :: factor, x * factor + factor // 2 - left :: factor]
            mask[y : y + part.shape[0], x : x + part.shape[1]] = part
            yield mask

    def coco(self, image_id: int, categories: Sequence[int] | None = None) -> list[dict]:
        """COCO's result format: `bbox` as left, top, width, height; `segmentation` as compressed RLE.

        Args:
            image_id: the picture's.
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


def run_lengths(patch: tuple[int, int, np.ndarray], size: Size) -> dict:
    """COCO's compressed RLE of a mask that is `patch` (top, left, (h, w) bool) in a picture of `size`, else empty."""
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
