"""Scenes to segment and detect in: real handwritten digits on textured canvases, written as mmseg and mmdet read them.

The digits are scikit-learn's; those of `val` are handwriting that does not occur in `train`. A digit is enlarged,
turned a little and chalked onto a dark canvas of two colours, textured with clouds, stripes or a weave. A scene depends
on its seed, its split and its number alone.

    ROOT/SPLIT/images/00000.png       RGB
    ROOT/SPLIT/masks/00000.png        class of each pixel: 0 the canvas, d + 1 the digit d (palette PNG)
    ROOT/SPLIT/instances.json         COCO: category d + 1 is the digit d, masks as RLE, boxes around them
"""

import colorsys
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..engine.atomic import atomic
from ..engine.image_sets import Digits
from ..engine.progress import progress_bar

__all__ = ["CLASSES", "PALETTE", "Scene", "read_pixels", "render", "write_scenes"]

CLASSES = ("canvas", *Digits.classes)
PALETTE = [(38, 40, 56)] + [
    tuple(round(255 * c) for c in colorsys.hsv_to_rgb(d / 10, 0.62 + 0.2 * (d % 2), 0.98 - 0.16 * (d % 2)))
    for d in range(10)
]  # fmt: skip
SPLITS = ("train", "val")


@dataclass
class Scene:
    """An image and what is in it.

    Attributes:
        image: (H, W, 3) RGB of 8 bits.
        labels: (N,) the digits, 0 to 9.
        masks: (N, H, W) bool, their visible pixels; no pixel belongs to two.
    """

    image: np.ndarray
    labels: np.ndarray
    masks: np.ndarray

    @property
    def semantic(self) -> np.ndarray:
        """(H, W) uint8, the class of each pixel."""
        classes = np.zeros(self.image.shape[:2], np.uint8)
        for label, mask in zip(self.labels, self.masks):
            classes[mask] = label + 1
        return classes

    @property
    def boxes(self) -> np.ndarray:
        """(N, 4) float: left, top, width, height of the masks, as COCO has them."""
        boxes = []
        for mask in self.masks:
            (top, bottom), (left, right) = (np.flatnonzero(mask.any(axis))[[0, -1]] for axis in (1, 0))
            boxes.append((left, top, right + 1 - left, bottom + 1 - top))
        return np.array(boxes, float).reshape(-1, 4)


def _enlarged(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(h, w) values to (H, W), smoothly; size is (W, H), as Pillow has it."""
    return np.asarray(Image.fromarray(pixels.astype(np.float32)).resize(size, Image.Resampling.BICUBIC))


def _texture(size: int, rng: np.random.Generator) -> np.ndarray:
    """(size, size) values from about 0 to 1: clouds, with stripes or a weave over them."""
    octaves = [(4, 0.5), (8, 0.3), (20, 0.2)]
    clouds = sum(weight * _enlarged(rng.random((n, n)), (size, size)) for n, weight in octaves)
    angle, period = rng.uniform(0, np.pi), rng.uniform(5, 14)
    y, x = np.mgrid[:size, :size] * (2 * np.pi / period)
    along, across = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    pattern = (0, np.sin(along), np.sin(along) * np.sin(across))[rng.integers(3)]
    return clouds + 0.16 * pattern + rng.normal(0, 0.04, (size, size))


def _colours(rng: np.random.Generator) -> np.ndarray:
    """(3, 3) RGB from 0 to 1: two dark ones of the canvas, and the bright one of the chalk."""
    low, high = (0.15, 0.15, 0.05), (0.8, 0.8, 0.45)
    values = rng.uniform((0.1, 0.1, 0.8), (0.45, 0.45, 1))
    return np.array([colorsys.hsv_to_rgb(*hsv) for hsv in zip(rng.random(3), rng.uniform(low, high), values)])


def _written(pixels: np.ndarray, rng: np.random.Generator, room: int) -> np.ndarray:
    """The digit's chalk, (h, w) from 0 to 1, without margins: enlarged to a part of `room`, stretched and turned."""
    height = rng.uniform(0.44, 0.6) * room
    size = round(height * rng.uniform(0.8, 1.05)), round(height)
    large = Image.fromarray(_enlarged(np.pad(pixels / 255, 1), size))
    turned = np.asarray(large.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC, expand=True))
    chalk = np.clip((turned - 0.4) * 4 + 0.5, 0, 1)  # a soft edge at the level 0.4
    rows, columns = (np.flatnonzero((chalk > 0.5).any(axis)) for axis in (1, 0))
    return chalk[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def render(digits: Digits, rng: np.random.Generator, size: int = 96, most: int = 4) -> Scene:
    """A scene of 1 to `most` of `digits`, `size` pixels wide and high; boxes overlap by a tenth at the most."""
    canvas = _texture(size, rng)[..., None]
    first, second, colour = _colours(rng)
    image = first + (second - first) * canvas + (canvas - 0.5) * 0.15
    taken = np.zeros((size, size), bool)
    labels, masks = [], []
    for attempt in range(10 * rng.integers(1, most + 1)):
        if len(labels) > attempt // 10:
            continue  # ten attempts for each of them
        index = rng.integers(len(digits))
        chalk = _written(digits.pixels[index], rng, size)
        height, width = chalk.shape
        top, left = rng.integers(0, size - height + 1), rng.integers(0, size - width + 1)
        place = np.s_[top : top + height, left : left + width]
        if taken[place].mean() > 0.1 or (labels and np.logical_or.reduce(masks)[place][chalk > 0].any()):
            continue
        taken[place] = True
        mask = np.zeros((size, size), bool)
        mask[place] = chalk > 0.5
        image[place] += (colour + 0.1 * (canvas[place] - 0.5) - image[place]) * chalk[..., None]
        labels.append(digits.labels[int(index)])
        masks.append(mask)
    image = (255 * image).round().clip(0, 255).astype(np.uint8)
    return Scene(image, np.array(labels), np.array(masks))


def write_scenes(root: str | Path, split: str, count: int, size: int = 96, seed: int = 0) -> Path:
    """Renders `count` scenes of "train" or "val" into `root`, replacing what is there; returns the COCO file's path.

    The COCO file comes last, and whole: where it is, everything is.
    """
    from pycocotools import mask as coco_mask

    folder = Path(root) / split
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    path = folder / "instances.json"
    path.unlink(missing_ok=True)
    digits = Digits(held_out=split == "val")
    images, annotations = [], []
    with progress_bar(f"writing {folder}", count) as advance:
        for i in range(count):
            scene = render(digits, np.random.default_rng((seed, SPLITS.index(split), i)), size)
            name = f"{i:05}.png"
            Image.fromarray(scene.image).save(folder / "images" / name)
            classes = Image.fromarray(scene.semantic, "P")
            classes.putpalette(np.array(PALETTE, np.uint8).tobytes())
            classes.save(folder / "masks" / name)
            images.append({"id": i, "file_name": name, "width": size, "height": size})
            for label, mask, box in zip(scene.labels, scene.masks, scene.boxes):
                rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
                annotations.append({
                    "id": len(annotations) + 1, "image_id": i, "category_id": int(label) + 1, "iscrowd": 0,
                    "bbox": box.tolist(), "area": int(mask.sum()),
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
                })  # fmt: skip
            advance()
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES) if i]
    with atomic(path) as file:
        file.write(json.dumps({"images": images, "annotations": annotations, "categories": categories}).encode())
    return path


def read_pixels(path: str | Path) -> np.ndarray:
    """An image file's values as they are: (H, W, 3) RGB, or (H, W) classes of a mask."""
    with Image.open(path) as image:
        return np.asarray(image)
