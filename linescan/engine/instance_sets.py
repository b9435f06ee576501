"""Images with the masks of their objects, and prompts that are drawn from masks: COCO's annotations, digits."""

import json
import random
from abc import ABC, abstractmethod
from bisect import bisect_left
from dataclasses import dataclass, field
from pathlib import Path
from typing import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from ..errors import InputError
from ..extras import require
from ..media.images import read_image
from ..media.pixels import to_mode
from ..media.preprocess import Preprocess
from .digit_scenes import Scene, scene_of
from .image_sets import Digits, roots, split

__all__ = ["CocoInstances", "DigitScenes", "InstanceSet", "PromptSamples", "centre", "open_instances"]


class InstanceSet(ABC):
    """Images with objects.

    Attributes:
        names: what to call each image in messages.
        in_memory: whether reading takes no time.
    """

    names: Sequence[str]
    in_memory: bool = False

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def image(self, index: int, channels: int) -> Image.Image:
        """Image `index`. Raises BrokenImage: it cannot be read."""

    @abstractmethod
    def masks(self, index: int) -> list[np.ndarray]:
        """Its objects, each (H, W) bool, in the size of the image. Raises InputError: they cannot be read."""


@dataclass
class DigitScenes(InstanceSet):
    """Scenes of digits, 96 pixels wide and high, with one to four objects each.

    Args:
        held_out: of the held-out digits rather than those to train on.
        count: how many scenes.
    """

    held_out: bool
    count: int = 2000
    in_memory: bool = True
    made: dict[int, Scene] = field(default_factory=dict)

    def __post_init__(self):
        self.digits = Digits(self.held_out)
        self.names = [f"scene {i}" for i in range(self.count)]

    def scene(self, index: int) -> Scene:
        if index not in self.made:
            self.made[index] = scene_of(self.digits, "val" if self.held_out else "train", index)
        return self.made[index]

    def image(self, index, channels):
        return to_mode(Image.fromarray(self.scene(index).image), channels)

    def masks(self, index):
        return list(self.scene(index).masks)


class CocoInstances(InstanceSet):
    """The images of a COCO data set that have objects: crowds, which are many objects in one mask, are left out.

    Args:
        annotations: the JSON file, with masks as polygons or run lengths.
        folder: of the images.

    Raises:
        InputError: no such file, one of another kind, or one without objects.
    """

    def __init__(self, annotations: Path, folder: Path):
        require("pycocotools", "prompting")
        self.annotations = annotations
        try:
            content = json.loads(annotations.read_text())
            images = {image["id"]: str(image["file_name"]) for image in content["images"]}
            objects: dict[int, list] = {key: [] for key in images}
            for one in content["annotations"]:
                if one["segmentation"] and not one.get("iscrowd"):
                    objects[one["image_id"]].append(one["segmentation"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            said = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else error
            raise InputError(f"{annotations} is no COCO data set with masks ({said})") from None
        self.kept = [key for key in images if objects[key]]
        if not self.kept:
            raise InputError(f"{annotations} holds no objects with masks")
        self.objects = [objects[key] for key in self.kept]
        self.names = [str(folder / images[key]) for key in self.kept]

    def pick(self, chosen: Sequence[int]) -> "CocoInstances":
        """The same with some of the images."""
        picked = object.__new__(CocoInstances)
        picked.annotations = self.annotations
        for name in ("kept", "objects", "names"):
            setattr(picked, name, [getattr(self, name)[i] for i in chosen])
        return picked

    def image(self, index, channels):
        return read_image(self.names[index], channels)

    def masks(self, index):
        from pycocotools import mask as coco

        with Image.open(self.names[index]) as image:
            width, height = image.size
        masks = []
        for number, one in enumerate(self.objects[index]):
            try:
                if isinstance(one, list):
                    one = coco.merge(coco.frPyObjects(one, height, width))
                elif isinstance(one["counts"], list):
                    one = coco.frPyObjects(one, height, width)
                mask = coco.decode(one).astype(bool)
            except Exception as error:  # compiled code, which raises anything
                raise InputError(
                    f"{self.names[index]}: mask {number} of {self.annotations} is damaged: {error}"
                ) from None
            if mask.shape != (height, width):
                raise InputError(
                    f"{self.names[index]}: {height} x {width} pixels, mask {number} of {self.annotations} has "
                    f"{mask.shape[0]} x {mask.shape[1]}"
                )
            masks.append(mask)
        return masks


def open_instances(data: str, val: str | None, fraction: float) -> tuple[InstanceSet, InstanceSet]:
    """The training set and the held-out set.

    Args:
        data: "digits"; a folder with instances.json and images/ in it; one with such folders train/ and val/ in it; or
            COCO as it comes, with annotations/instances_train*.json and the folders of images.
        val: such a folder to hold out. Without it, `fraction` of the images of `data` are, always the same ones.

    Raises:
        InputError: there is no such layout, or nothing in it.
    """
    if data == "digits":
        return DigitScenes(False), DigitScenes(True, 100)
    if val is None and (official := sorted(Path(data, "annotations").glob("instances_train*.json"))):
        return tuple(_official(Path(data), official[-1].stem.replace("train", part)) for part in ("train", "val"))
    root, held_out = roots(data, val)
    train = _folder(root)
    if held_out:
        return train, _folder(held_out)
    return tuple(train.pick(sorted(split([0] * len(train), part, fraction))) for part in (False, True))


def _official(root: Path, name: str) -> CocoInstances:
    return CocoInstances(root / "annotations" / f"{name}.json", root / name.removeprefix("instances_"))


def _folder(root: Path) -> CocoInstances:
    if not (root / "instances.json").is_file():
        raise InputError(f"{root} has no instances.json (COCO's annotations) beside its images/")
    return CocoInstances(root / "instances.json", root / "images")


# -- prompts ----------------------------------------------------------------------------------------------------------


def centre(mask: np.ndarray) -> tuple[int, int]:
    """(x, y) of the middle of the largest square inside a mask; of several the one nearest to the mask's mean."""
    sums = np.pad(mask.cumsum(0).cumsum(1), ((1, 0), (1, 0)))

    def squares(side: int) -> np.ndarray:
        """Where the left upper corners of squares are that lie in the mask."""
        count = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
        return count == side * side

    side = bisect_left(range(1, min(mask.shape) + 1), True, key=lambda side: not squares(side).any())
    rows, columns = np.nonzero(mask)
    ys, xs = (corner + (side - 1) // 2 for corner in np.nonzero(squares(side)))
    nearest = np.hypot(ys - rows.mean(), xs - columns.mean()).argmin()
    return int(xs[nearest]), int(ys[nearest])


class PromptSamples(Dataset):
    """Images with some of their objects, and a click and a box for each.

    Items are {"input": (C, S, S), "masks": (K, S, S) bool, "points": (K, 2), "boxes": (K, 4)}, in pixels of the input.

    Args:
        instances: the set.
        preprocess: how the model wants its images.
        objects: K, for training: drawn at random, with random clicks on them, and boxes moved by a tenth of their sides
            (at most 20 pixels). None for all of them, each with the click farthest from its border and its own box.
        flip: how often a training image is mirrored.
    """

    def __init__(self, instances: InstanceSet, preprocess: Preprocess, objects: int | None = None, flip: float = 0.0):
        self.instances, self.preprocess, self.objects, self.flip = instances, preprocess, objects, flip
        self.in_memory = instances.in_memory

    def __len__(self) -> int:
        return len(self.instances)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One sample. Raises InputError: it cannot be read, or no object is left at the model's size."""
        image = self.instances.image(index, self.preprocess.channels)
        tensor, (height, width) = self.preprocess.fitted(image)
        masks = [mask for mask in map(self._resized(height, width), self.instances.masks(index)) if mask.any()]
        if not masks:
            raise InputError(f"{self.instances.names[index]}: no object has a pixel at {height} x {width}")
        if self.objects is not None:
            masks = random.sample(masks, min(self.objects, len(masks)))
            masks += random.choices(masks, k=self.objects - len(masks))
            if random.random() < self.flip:
                tensor[..., :width] = tensor[..., :width].flip(-1)
                masks = [mask[:, ::-1] for mask in masks]
        whole = np.zeros((len(masks), *tensor.shape[1:]), bool)
        whole[:, :height, :width] = masks
        points = [centre(mask) if self.objects is None else _any_pixel(mask) for mask in masks]
        boxes = [_box(mask) if self.objects is None else _jittered(_box(mask), height, width) for mask in masks]
        return {
            "input": tensor,
            "masks": torch.from_numpy(whole),
            "points": torch.tensor(points, dtype=torch.float32),
            "boxes": torch.tensor(np.array(boxes), dtype=torch.float32),
        }

    @staticmethod
    def _resized(height: int, width: int):
        return lambda mask: np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST))

    @staticmethod
    def collate(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """A batch: images stacked, objects of all images in a row, and in "image" which is of which."""
        of = torch.cat([torch.full((len(sample["masks"]),), i) for i, sample in enumerate(samples)])
        joined = {name: torch.cat([sample[name] for sample in samples]) for name in ("masks", "points", "boxes")}
        return {"input": default_collate([sample["input"] for sample in samples]), "image": of, **joined}


def _any_pixel(mask: np.ndarray) -> tuple[int, int]:
    ys, xs = np.nonzero(mask)
    i = random.randrange(len(ys))
    return int(xs[i]), int(ys[i])


def _box(mask: np.ndarray) -> np.ndarray:
    """Left, top, right, bottom."""
    (top, bottom), (left, right) = (np.flatnonzero(mask.any(axis))[[0, -1]] for axis in (1, 0))
    return np.array([left, top, right + 1, bottom + 1], float)


def _jittered(box: np.ndarray, height: int, width: int) -> np.ndarray:
    sides = np.tile(box[2:] - box[:2], 2)
    moved = box + np.clip(np.random.normal(0, 0.1, 4) * sides, -20, 20).clip(-0.4 * sides, 0.4 * sides)
    return moved.clip(0, [width, height, width, height])
