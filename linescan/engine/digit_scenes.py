"""Scenes of real handwritten digits on textured canvases, to segment and detect in: made, not read.

The digits are scikit-learn's; those that are held out are handwriting that does not occur among the others. A digit is
enlarged, turned a little and chalked onto a dark canvas of two colours, textured with clouds, stripes or a weave.
"""

import colorsys
from dataclasses import dataclass
from typing import NamedTuple, Sequence

import numpy as np
from PIL import Image

from .image_sets import Digits

__all__ = ["Scene", "pair_of", "render", "render_pair", "scene_of"]

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


class Placed(NamedTuple):
    """A digit in a scene.

    Attributes:
        label: the digit.
        place: rows and columns of its chalk.
        chalk: (h, w) from 0 to 1.
    """

    label: int
    place: tuple[slice, slice]
    chalk: np.ndarray


def _arranged(digits: Digits, rng: np.random.Generator, size: int, most: int) -> list[Placed]:
    """1 to `most` of `digits`, of which no two have a pixel in common; boxes overlap by a tenth at the most."""
    taken, written = np.zeros((2, size, size), bool)
    arranged: list[Placed] = []
    for attempt in range(10 * rng.integers(1, most + 1)):
        if len(arranged) > attempt // 10:
            continue  # ten attempts for each of them
        index = rng.integers(len(digits))
        chalk = _written(digits.pixels[index], rng, size)
        height, width = chalk.shape
        top, left = rng.integers(0, size - height + 1), rng.integers(0, size - width + 1)
        place = np.s_[top : top + height, left : left + width]
        if taken[place].mean() > 0.1 or written[place][chalk > 0].any():
            continue
        taken[place] = True
        written[place] |= chalk > 0.5
        arranged.append(Placed(digits.labels[int(index)], place, chalk))
    return arranged


def _canvas(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Its texture (size, size, 1), its image (size, size, 3), and the colour of the chalk (3,)."""
    canvas = _texture(size, rng)[..., None]
    first, second, colour = _colours(rng)
    return canvas, first + (second - first) * canvas + (canvas - 0.5) * 0.15, colour


def _as_bytes(image: np.ndarray) -> np.ndarray:
    return (255 * image).round().clip(0, 255).astype(np.uint8)


def render(digits: Digits, rng: np.random.Generator, size: int = 96, most: int = 4) -> Scene:
    """A scene of 1 to `most` of `digits`, `size` pixels wide and high; boxes overlap by a tenth at the most."""
    canvas, image, colour = _canvas(rng, size)
    return _painted(image, canvas, colour, arranged := _arranged(digits, rng, size, most), arranged)


def _painted(
    image: np.ndarray, canvas: np.ndarray, colour: np.ndarray, arranged: Sequence[Placed], seen: Sequence[Placed]
) -> Scene:
    """The scene of the digits that are `arranged`, of which those that are `seen` are chalked onto the canvas."""
    for _, place, chalk in seen:
        image[place] += (colour + 0.1 * (canvas[place] - 0.5) - image[place]) * chalk[..., None]
    masks = np.zeros((len(arranged), *image.shape[:2]), bool)
    for mask, (_, place, chalk) in zip(masks, arranged):
        mask[place] = chalk > 0.5
    return Scene(_as_bytes(image), np.array([one.label for one in arranged]), masks)


def render_pair(digits: Digits, rng: np.random.Generator, size: int = 96, most: int = 4) -> tuple[Scene, np.ndarray]:
    """A scene, and what a thermal camera sees of it, (size, size) of 16 bits: about half of the digits are warm, and
    not to be seen in the image; the others are chalked, and as cold as the canvas."""
    arranged = _arranged(digits, rng, size, most)
    warm = rng.random(len(arranged)) < 0.5
    canvas, image, colour = _canvas(rng, size)
    chalked = [one for one, hidden in zip(arranged, warm) if not hidden]
    heat = 0.1 + 0.3 * _texture(size, rng)
    for (_, place, chalk), hot in zip(arranged, warm):
        if hot:
            heat[place] += (rng.uniform(0.7, 0.9) - heat[place]) * chalk
    return _painted(image, canvas, colour, arranged, chalked), (65535 * heat.clip(0, 1)).round().astype(np.uint16)


def scene_of(digits: Digits, split: str, number: int, size: int = 96, seed: int = 0) -> Scene:
    """Scene `number` of "train" or "val": it depends on these, the seed and the size alone."""
    return render(digits, np.random.default_rng((seed, SPLITS.index(split), number)), size)


def pair_of(
    digits: Digits, split: str, number: int, size: int = 96, seed: int = 0, most: int = 4
) -> tuple[Scene, np.ndarray]:
    """Scene `number` as `scene_of` has it, and what a thermal camera sees of it; see `render_pair`."""
    return render_pair(digits, np.random.default_rng((seed, SPLITS.index(split), number)), size, most)
