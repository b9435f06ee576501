"""Detection: images in, boxes out, with masks where the model has them."""

import json
from pathlib import Path
from typing import Sequence

import numpy as np
import torch
from PIL import Image
from torchvision.ops import batched_nms

from ..engine.atomic import atomic
from ..errors import InputError
from ..media.draw import draw_boxes
from ..media.find import Source
from ..media.images import ImageLike
from ..media.large import Pixels, open_pixels
from .open import open_model
from .results import Detections, Found, patch_of
from .tool import Progress, Writer, silent
from .windows import Size, WindowTool, bounded, positions, reduced_for_drawing, windows

__all__ = ["Detector", "Instances"]

FRAME_LEGEND = 2  # rows of the legend below frames of a video, which are all of one size


class Detector(WindowTool):
    """Finds the instances in an image.

        det = Detector("detection/vmamba_tiny_mask_rcnn_1x_coco", "weights.pth")
        found = det("photo.jpg").above(0.5)
        print(len(found), found.boxes, found.names)

    A model of the zoo finds what prompts name, in words or as embeddings (`linescan.tasks.named.NamedDetector`):

        det = Detector("mamba_yolo_world_small", "weights.pth", text="cat, red car")
        det.save("cats_and_cars.safetensors")             # Detector(checkpoint=...) needs no text any more

    With `window`, windows slide over the image in its own resolution, each is tested as the config says, and what
    several of them have found is kept once: small things in large images are found so.

    Args:
        model: a name of the zoo (`linescan list --task detection`); or an mmdet config: a file, a name of one of
            linescan's, or "mmdet::...".
        checkpoint, device, dtype, batch, window, stride, strict: as for `Segmenter`.
        score: instances of at least this score are drawn.
        args: of a model of the zoo: `text`, `embeddings`, `text_encoder`, `img_size`, and those of its class.

    Raises:
        InputError, CheckpointError: as for `Segmenter`.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        checkpoint: str | Path | None = None,
        *,
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
        batch: int = 1,
        window: int | Size | None = None,
        stride: int | Size | None = None,
        score: float = 0.3,
        strict: bool = False,
        **args,
    ):
        window, stride = windows(window, stride)
        opened = open_model("detection", model, checkpoint, **args)
        super().__init__(str(model or opened.name), opened, device, dtype, batch, window, stride, strict)
        self.score = score

    def save(self, path: str | Path) -> None:
        """Writes a model of the zoo with its prompts, as a file that needs neither text nor an encoder any more.

        Raises:
            InputError: the model is that of a config.
        """
        if not hasattr(self.model, "save"):
            raise InputError("only models by name are saved with their prompts; a config's knows its own classes")
        self.model.save(path)

    def draw(
        self, opened: ImageLike | Pixels, answer: Detections, frame: bool = False, score: float | None = None
    ) -> Image.Image:
        """The image with what was found, if its score is high enough; large images are drawn smaller."""
        image, factor = reduced_for_drawing(open_pixels(opened))
        found = answer.above(self.score if score is None else score)
        masks = None if found.patches is None else found.each_mask(factor)
        return draw_boxes(
            image, found.boxes / factor, found.labels, found.scores, self.classes, masks, self.palette,
            legend_rows=FRAME_LEGEND if frame else None,
        )  # fmt: skip

    def answer(self, opened: Sequence[Pixels], progress: Progress = silent) -> list[Detections]:
        if self.window:
            return [self._slide(pixels, progress) for pixels in opened]
        images, factors = zip(*map(bounded, opened))
        return [
            self._detections(one, pixels.size, scale=factor)
            for one, pixels, factor in zip(self._find(images), opened, factors)
        ]

    def _find(self, images: Sequence[np.ndarray]) -> list[Found]:
        try:
            return self.model.detect(images)
        except ValueError as error:  # the backbone says which sizes it takes
            raise InputError(f"images of {'x'.join(map(str, images[0].shape[:2]))} pixels: {error}") from error

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
                part = self._detections(found, pixels.size, (y, x))
                inner = np.array([x > 0, y > 0, x + wide < width, y + high < height])
                border = np.array([x, y, x + window.shape[1], y + window.shape[0]])
                cut.append((inner & (abs(part.boxes - border) < 2)).any(1))
                parts.append(part)
            progress(len(together) / len(corners))
        patches = None if parts[0].patches is None else [patch for part in parts for patch in part.patches]
        boxes, scores, labels = (
            np.concatenate([getattr(part, name) for part in parts]) for name in ("boxes", "scores", "labels")
        )
        everything = Detections(pixels.size, boxes, scores, labels, patches, self.classes)
        return everything.pick(distinct(everything, np.concatenate(cut)))

    def _detections(self, found: Found, size: Size, corner: Size = (0, 0), scale: int = 1) -> Detections:
        """What the model found in a part of an image of `size`, which starts at `corner` and is `scale` times less."""
        found = Found(*(None if part is None else part.cpu() for part in found))
        order = found.scores.argsort(descending=True, stable=True)
        y, x = corner
        boxes = found.boxes[order].numpy() * scale + np.array([x, y, x, y], np.float32)
        limit = np.array([size[1], size[0], size[1], size[0]], np.float32)
        patches = None
        if found.masks is not None:
            patches = [patch_of(found.masks[i].numpy(), size, corner, scale) for i in order.tolist()]
        scores, labels = found.scores[order].numpy(), found.labels[order].numpy()
        return Detections(size, boxes.clip(0, limit), scores, labels, patches, self.classes)


# -- what several windows have found ----------------------------------------------------------------------------------

SHARED = 0.5  # of the joint area of two boxes, or of the area of one that is cut: more is the same instance


def distinct(found: Detections, cut: np.ndarray) -> np.ndarray:
    """Indices, best first, of instances without those that another one of their class has found, too.

    Whole instances go before those that the border of a window cuts, then by score. An instance is dropped if it shares
    more than half of the joint area with one that stays or, if it is cut, half of its own area.
    """
    whole, parts = np.flatnonzero(~cut), np.flatnonzero(cut)
    tensors = (torch.from_numpy(values[whole]) for values in (found.boxes, found.scores, found.labels))
    whole = whole[batched_nms(*tensors, SHARED).numpy()]
    # For one that is cut, half of its own area is the weaker condition.
    parts = parts[np.argsort(-found.scores[parts], kind="stable")]
    parts = parts[~_covered(found, parts, whole)]
    kept: list[int] = []
    for i in range(len(parts)):
        if not _covered(found, parts[i : i + 1], parts[kept]).any():
            kept.append(i)
    stays = np.concatenate([whole, parts[kept]])
    return stays[np.argsort(-found.scores[stays], kind="stable")]


def _covered(found: Detections, parts: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Of each instance in `parts`, whether more than half of its box lies in that of one in `by` of its class."""
    covered = np.zeros(len(parts), bool)
    others = found.boxes[None, by]
    for at in range(0, len(parts), 1024):  # a matrix of all pairs would take memory
        these = parts[at : at + 1024]
        boxes = found.boxes[these, None]
        sides = np.minimum(boxes[..., 2:], others[..., 2:]) - np.maximum(boxes[..., :2], others[..., :2])
        area = (boxes[..., 2:] - boxes[..., :2]).prod(-1).clip(min=1e-6)
        share = sides.clip(min=0).prod(-1) / area
        alike = found.labels[these, None] == found.labels[None, by]
        covered[at : at + 1024] = (alike & (share > SHARED)).any(1)
    return covered


# -- files ------------------------------------------------------------------------------------------------------------


class Instances(Writer):
    """All instances in one file of COCO's result format, and the images and categories beside it.

        OUT/detections.json     COCO's result format, masks as RLE
        OUT/images.json         the images and categories that it speaks of, as a COCO dataset

    Args:
        out: the folder.
        classes: the names.
        score: instances of at least this score are counted; the file has all.
        annotations: a COCO dataset, whose ids of images (by file name) and categories (by name) are used, so that the
            results can be evaluated with it.

    Raises:
        InputError: `annotations` is no such file, or lacks a category.
    """

    def __init__(self, out: Path, classes: Sequence[str], score: float = 0.3, annotations: Path | None = None):
        self.out, self.classes, self.score = out, classes, score
        self.images: list[dict] = []
        self.results: list[dict] = []
        self.ids: dict[str, int] | None = None
        self.categories = [{"id": i, "name": name} for i, name in enumerate(classes, 1)]
        if annotations:
            self.ids, known = _read_annotations(annotations)
            if strange := [name for name in classes if name not in known]:
                raise InputError(f"{annotations} has no category {strange[0]!r}, which the model knows")
            self.categories = [{"id": known[name], "name": name} for name in classes]
        out.mkdir(parents=True, exist_ok=True)

    def save(self, source: Source, answer: Detections, frame: int | None = None) -> list[Path]:
        """Keeps the instances of an image, or of a frame of a video."""
        image_id = len(self.images) + 1
        if self.ids is not None:
            if source.path.name not in self.ids:
                raise InputError(f"{source.path} is not among the images of the annotations")
            image_id = self.ids[source.path.name]
        image = {"id": image_id, "file_name": str(source.path), "height": answer.size[0], "width": answer.size[1]}
        self.images.append(image | ({} if frame is None else {"frame": frame}))
        self.results += answer.coco(image_id, [category["id"] for category in self.categories])
        return []

    def describe(self, answer: Detections) -> str:
        """How many there are of each class."""
        counts = np.bincount(answer.above(self.score).labels, minlength=len(self.classes))
        order = np.argsort(-counts, kind="stable")
        return ", ".join(f"{counts[i]} {self.classes[i]}" for i in order if counts[i]) or "nothing"

    def as_json(self, answer: Detections) -> list[dict]:
        """Class, score and box (left, top, right, bottom) of each instance that is counted."""
        found = answer.above(self.score)
        return [
            {"label": name, "score": round(float(score), 5), "index": int(label), "box": [round(v, 2) for v in box]}
            for name, score, label, box in zip(found.names, found.scores, found.labels, found.boxes.tolist())
        ]

    def close(self) -> None:
        """Writes the files."""
        dataset = {"images": self.images, "annotations": [], "categories": self.categories}
        for name, content in (("images.json", dataset), ("detections.json", self.results)):
            with atomic(self.out / name) as file:
                file.write(json.dumps(content).encode())


def _read_annotations(path: Path) -> tuple[dict[str, int], dict[str, int]]:
    try:
        content = json.loads(Path(path).read_text())
        images = {Path(image["file_name"]).name: image["id"] for image in content["images"]}
        return images, {category["name"]: category["id"] for category in content["categories"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{path} is not a COCO dataset (images and categories in JSON)") from None
