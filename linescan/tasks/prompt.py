"""Promptable segmentation: an image and points or boxes in, the masks of what they show out (`Prompter`)."""

import math
from collections import defaultdict
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import masks_to_boxes, nms

from ..engine.atomic import atomic, write_all
from ..errors import InputError
from ..media.draw import draw_objects
from ..media.find import Source
from ..media.images import ImageLike, to_mode
from ..media.large import Pixels, open_pixels
from .open import restore_for
from .report import csv_bytes
from .results import Detections, patch_of
from .tool import Progress, Tool, Writer, expect_finite, silent
from .windows import Size, bounded, reduced_for_drawing

__all__ = ["Everything", "Objects", "Prompt", "PromptedMasks", "Prompter"]

TOGETHER = 64
"""Prompts in one forward pass of the decoder."""

Point = tuple[float, float]
"""(x, y) in pixels of the image: its left upper pixel is (0, 0)."""


# -- prompts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """What shows one object, in pixels of the image.

    Attributes:
        points: (x, y) on the object.
        negatives: (x, y) beside it, on what does not belong to it.
        box: (x0, y0, x1, y1) around it.

    Raises:
        InputError: neither a point on the object nor a box; numbers that are none, or below 0; a box without area.
    """

    points: Sequence[Point] = ()
    negatives: Sequence[Point] = ()
    box: tuple[float, float, float, float] | None = None

    def __post_init__(self):
        points = [_numbers(point, 2, "a point is x,y") for point in self.points]
        negatives = [_numbers(point, 2, "a point is x,y") for point in self.negatives]
        box = None if self.box is None else _numbers(self.box, 4, "a box is x0,y0,x1,y1")
        if not points and box is None:
            raise InputError("a prompt needs a point on the object, or a box around it")
        if box is not None and not (box[0] < box[2] and box[1] < box[3]):
            raise InputError(f"a box is x0,y0,x1,y1 with x0 < x1 and y0 < y1, not {_said(box)}")
        for place in (*points, *negatives, *([box] if box else [])):
            if min(place) < 0:
                raise InputError(f"pixels are counted from 0 on, {_said(place)} lies outside of every image")
        for name, value in (("points", points), ("negatives", negatives), ("box", box)):
            object.__setattr__(self, name, value)

    def expect_inside(self, size: Size) -> None:
        """Raises InputError: something lies outside of an image of this (height, width)."""
        height, width = size
        for x, y in (*self.points, *self.negatives):
            if x >= width or y >= height:
                raise InputError(f"the point {_said((x, y))} is outside of the image, {_extent(size)}")
        if self.box is not None:
            if self.box[2] > width or self.box[3] > height:
                raise InputError(f"the box {_said(self.box)} reaches out of the image, {_extent(size)}")


def _numbers(values: Sequence[float], count: int, what: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != count or not all(map(math.isfinite, numbers)):
        raise InputError(f"{what}, {count} numbers, not {values!r}")
    return numbers


def _said(numbers: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in numbers)


def _extent(size: Size) -> str:
    return f"which is {size[1]} pixels wide and {size[0]} high"


@dataclass(frozen=True)
class Everything:
    """All objects: a grid of points, whose masks are filtered as SAM does it ("Segment Anything", appendix B).

    Attributes:
        side: points along each side of the image.
        iou: masks of at least this expected IoU are kept;
        stability: of them those of at least this stability: the IoU of the masks at the levels 1 and -1 of the logits;
        overlap: and of two whose boxes have a higher IoU than this, the better one.

    Raises:
        InputError: numbers out of their range.
    """

    side: int = 32
    iou: float = 0.88
    stability: float = 0.95
    overlap: float = 0.7

    def __post_init__(self):
        if self.side < 1:
            raise InputError(f"a grid has 1 point or more along a side, not {self.side}")
        for name in ("iou", "stability", "overlap"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is from 0 to 1, not {getattr(self, name)}")

    def prompts(self, size: Size) -> list[Prompt]:
        """One for each point of the grid over an image of this (height, width), row by row."""
        shares = (np.arange(self.side) + 0.5) / self.side
        return [Prompt([(x * size[1], y * size[0])]) for y in shares.tolist() for x in shares.tolist()]


# -- answers ----------------------------------------------------------------------------------------------------------


@dataclass
class Objects(Detections):
    """Objects of an image with their masks: one for each prompt, in order, or all of them, the best first.

    Attributes:
        scores: the IoU that the model expects of each mask, 0 to 1.
        boxes: around the masks; zeros for an empty mask.
        stability: (N,) float32, of each mask (see `Everything`).
        areas: (N,) pixels of each mask.
    """

    stability: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))

    @property
    def areas(self) -> np.ndarray:
        return np.array([int(patch.sum()) for _, _, patch in self.patches or ()], np.int64)

    def pick(self, chosen: np.ndarray) -> "Objects":
        picked = super().pick(chosen)
        assert isinstance(picked, Objects)
        picked.stability = self.stability[chosen]
        return picked


class Opened(NamedTuple):
    """An image that has been read.

    Attributes:
        pixels: the image.
        factor: by which it is reduced, if it is very large.
        tensor: (C, S, S), as the network wants it.
        inner: height and width of what is not padding in it.
    """

    pixels: Pixels
    factor: int
    tensor: Tensor
    inner: Size


class Encoded(NamedTuple):
    """An image that has been encoded: what the decoder reads of it."""

    opened: Opened
    features: tuple[Tensor, ...]


class Prompter(Tool):
    """Segments what prompts show.

        prompter = Prompter(checkpoint="runs/digits/best.safetensors")
        prompter.set_image("photo.jpg")                              # encodes it, once
        found = prompter.predict(Prompt([(120, 80)]), Prompt(box=(10, 20, 200, 160)))
        found.masks, found.scores                                    # (2, H, W) bool, (2,)
        found = prompter.predict(Everything())                       # all objects, the best first

    As a tool it gives all images the same `prompts`: `prompter(["a.jpg", "b.jpg"])`.

    Images of any size are scaled to fit into the model's square and padded; masks have the image's own size. One whose
    longer side is above 4096 pixels is reduced by a whole factor before.

    Args:
        model: a name of `linescan list --task prompting`; not needed where the checkpoint names it.
        checkpoint: its weights (.pth, .safetensors). Without it, the published ones.
        prompts: of each image: a list of `Prompt`, one for each object, or `Everything`.
        device, dtype, batch: as for `Tool`.
        args: further arguments of the model.

    Raises:
        InputError, CheckpointError: no such model, one that takes no prompts, or no weights for it.
    """

    kinds = ("image",)

    def __init__(
        self,
        model: str | None = None,
        checkpoint: str | Path | None = None,
        *,
        prompts: Sequence[Prompt] | Everything = (),
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
        batch: int = 1,
        **args,
    ):
        module, card = restore_for("prompting", model, checkpoint, **args)
        super().__init__(card.model, module, device, dtype, batch)
        self.prompts = prompts if isinstance(prompts, Everything) else list(prompts)
        self.preprocess = card.preprocess
        self.encoded: Encoded | None = None

    # -- one image, many prompts ---------------------------------------------------------------------------------------

    def set_image(self, image: ImageLike) -> None:
        """Reads and encodes an image, which `predict` then answers for.

        Raises:
            InputError: it cannot be read.
        """
        self.encoded = None
        opened = self.open(image)
        with torch.inference_mode(), self.precision():
            [self.encoded] = self._encode([opened])

    def predict(self, *prompts: Prompt | Everything, progress: Progress = silent) -> Objects:
        """The objects that prompts show in the image of `set_image`.

        Args:
            prompts: one for each object, or `Everything` alone.
            progress: gets the shares of the work.

        Raises:
            InputError: there is no image, no prompt, or a prompt lies outside of the image.
        """
        if self.encoded is None:
            raise InputError("there is no image to predict for; set_image(image) comes first")
        everything = len(prompts) == 1 and isinstance(prompts[0], Everything)
        if not everything and any(isinstance(prompt, Everything) for prompt in prompts):
            raise InputError("Everything() stands alone, without other prompts")
        with torch.inference_mode(), self.precision():
            return self._find(self.encoded, prompts[0] if everything else prompts, progress)

    # -- as a tool -----------------------------------------------------------------------------------------------------

    def open(self, given: ImageLike) -> Opened:
        """A file, a PIL image or an array -> the image, and as the network wants it."""
        pixels = open_pixels(given)
        reduced, factor = bounded(pixels)
        image = to_mode(Image.fromarray(np.ascontiguousarray(reduced)), self.preprocess.channels)
        return Opened(pixels, factor, *self.preprocess.fitted(image))

    def answer(self, opened: Sequence[Opened], progress: Progress = silent) -> list[Objects]:
        if not isinstance(self.prompts, Everything):
            for one in opened:
                self._expect_prompts(self.prompts, one.pixels.size)  # before the work
        return [self._find(encoded, self.prompts, progress) for encoded in self._encode(opened)]

    def draw(self, opened: Opened, answer: Objects, frame: bool = False) -> Image.Image:
        """The image with a colour for each object, and the prompts: points on objects, points beside, boxes."""
        image, factor = reduced_for_drawing(opened.pixels)
        prompts = () if isinstance(self.prompts, Everything) else self.prompts
        marks = {
            "points": [point for prompt in prompts for point in prompt.points],
            "negatives": [point for prompt in prompts for point in prompt.negatives],
            "boxes": [prompt.box for prompt in prompts if prompt.box is not None],
        }
        scaled = {name: np.asarray(values, float) / factor for name, values in marks.items()}
        order = np.argsort(-answer.areas, kind="stable")  # small objects on top of large ones
        return draw_objects(image, answer.pick(order).each_mask(factor), **scaled)

    # -- the work ------------------------------------------------------------------------------------------------------

    @staticmethod
    def _expect_prompts(prompts: Sequence[Prompt], size: Size) -> None:
        if not prompts:
            raise InputError("no prompt is given: a point, a box, or Everything()")
        for prompt in prompts:
            prompt.expect_inside(size)

    def _encode(self, opened: Sequence[Opened]) -> list[Encoded]:
        features = self.module.encode(torch.stack([one.tensor for one in opened]).to(self.device))
        parts = zip(*(expect_finite(part).split(1) for part in features))
        return [Encoded(one, type(features)(*part)) for one, part in zip(opened, parts)]

    def _find(self, encoded: Encoded, prompts: Sequence[Prompt] | Everything, progress: Progress) -> Objects:
        opened = encoded.opened
        size = opened.pixels.size
        everything = prompts if isinstance(prompts, Everything) else None
        prompts = everything.prompts(size) if everything else prompts
        self._expect_prompts(prompts, size)
        logits, scores = self._decode(encoded, prompts, progress)
        stability = (logits > 1).sum((1, 2)) / (logits > -1).sum((1, 2)).clamp_min(1)
        if everything:
            good = (scores >= everything.iou) & (stability >= everything.stability) & (logits > 0).any(-1).any(-1)
            logits, scores, stability = logits[good], scores[good], stability[good]
            if len(logits):
                boxes = masks_to_boxes(logits > 0) + logits.new_tensor([0, 0, 1, 1])
                kept = nms(boxes, scores, everything.overlap)  # the best first
                logits, scores, stability = logits[kept], scores[kept], stability[kept]
        patches = [self._patch(mask, opened) for mask in logits]
        return Objects(
            size,
            np.array([_box(patch) for patch in patches], np.float32).reshape(-1, 4),
            scores.cpu().numpy(),
            np.zeros(len(patches), np.int64),
            patches,
            ["object"],
            stability.cpu().numpy(),
        )

    def _decode(self, encoded: Encoded, prompts: Sequence[Prompt], progress: Progress) -> tuple[Tensor, Tensor]:
        """For each prompt the logits of its mask, at a quarter of the network's resolution, and its score; float32."""
        opened = encoded.opened
        inner, (height, width) = opened.inner, opened.pixels.size
        scale = np.array([inner[1] / width, inner[0] / height], np.float32)
        alike = defaultdict(list)  # prompts of one number of points are answered together, as each would be alone
        for i, prompt in enumerate(prompts):
            alike[len(prompt.points), len(prompt.negatives), prompt.box is not None].append(i)
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for (on, beside, boxed), members in alike.items():
            for start in range(0, len(members), TOGETHER):
                these = members[start : start + TOGETHER]
                given = {}
                if on + beside:
                    given["points"] = _floats([[*prompts[i].points, *prompts[i].negatives] for i in these]) * scale
                    given["labels"] = np.array([[1] * on + [0] * beside] * len(these))
                if boxed:
                    given["boxes"] = _floats([prompts[i].box for i in these]) * np.tile(scale, 2)
                tensors = {name: torch.from_numpy(values).to(self.device) for name, values in given.items()}
                masks, scores = self.module.decode(encoded.features, **tensors)
                masks = expect_finite(masks, large=True)[:, 0, : -(-inner[0] // 4), : -(-inner[1] // 4)].float()
                found |= zip(these, zip(masks, scores[:, 0].float().clamp(0, 1)))
                progress(len(these) / len(prompts))
        return tuple(torch.stack(parts) for parts in zip(*(found[i] for i in range(len(prompts)))))

    @staticmethod
    def _patch(logits: Tensor, opened: Opened) -> tuple[int, int, np.ndarray]:
        """The mask of logits (h / 4, w / 4), in the size of the image."""
        height, width = (-(-side // opened.factor) for side in opened.pixels.size)
        whole = F.interpolate(logits[None, None], scale_factor=4, mode="bilinear", align_corners=False)
        whole = whole[..., : opened.inner[0], : opened.inner[1]]
        whole = F.interpolate(whole, (height, width), mode="bilinear", align_corners=False)[0, 0]
        return patch_of((whole > 0).cpu().numpy(), opened.pixels.size, scale=opened.factor)


_floats = partial(np.array, dtype=np.float32)


def _box(patch: tuple[int, int, np.ndarray]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what there is of a mask."""
    top, left, mask = patch
    return left, top, left + mask.shape[1], top + mask.shape[0]


class PromptedMasks(Writer):
    """A PNG file for each object, and their scores.

        OUT/masks/NAME/000.png, 001.png, ...     255 on the object, 0 beside it; in the order of the prompts
        OUT/scores.csv                           of each: expected IoU, stability, pixels, box

    Args:
        out: the folder.
    """

    def __init__(self, out: Path):
        self.out = out
        self.rows: list[list] = []

    def save(self, source: Source, answer: Objects, frame: int | None = None) -> list[Path]:
        """Writes the masks of an image; of an earlier run with more of them, none stays."""
        folder, files = self.out / "masks" / source.name, []
        for i, mask in enumerate(answer.each_mask()):
            files.append(path := folder / f"{i:03}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic(path) as file:
                Image.fromarray(np.where(mask, np.uint8(255), np.uint8(0))).save(file, "PNG")
        for path in folder.glob("*.png"):
            if path.stem.isdecimal() and path not in files and path.is_file():
                path.unlink()
        for path, one in zip(files, self.as_json(answer)):
            facts = f"{one['score']:.4f}", f"{one['stability']:.4f}", one["area"], *one["box"]
            self.rows.append([source.path, path.relative_to(self.out), *facts])
        return files

    def describe(self, answer: Objects) -> str:
        """How many objects there are; of a few the expected IoU and the share of the image."""
        if not len(answer):
            return "no objects with as high an --iou and --stability"
        if len(answer) > 3:
            return f"{len(answer)} objects"
        pixels = answer.size[0] * answer.size[1]
        said = (f"IoU {score:.2f}, {area / pixels:.1%} of the image" for score, area in
                zip(answer.scores, answer.areas))  # fmt: skip
        return "; ".join(said)

    def as_json(self, answer: Objects) -> list[dict]:
        """Of each object the expected IoU (`score`), stability, area in pixels, and box (left, top, right, bottom)."""
        facts = zip(answer.scores, answer.stability, answer.areas, answer.boxes.astype(int).tolist())
        return [
            {"score": round(float(score), 5), "stability": round(float(steady), 5), "area": int(area), "box": box}
            for score, steady, area, box in facts
        ]

    def close(self) -> None:
        """Writes scores.csv."""
        header = ["image", "mask", "iou", "stability", "area", "left", "top", "right", "bottom"]
        write_all(self.out, {"scores.csv": csv_bytes(header, self.rows)})
