"""Sets of changes: two images of a place, of two dates, and what each pixel shows where something has changed.

    ROOT/{train,val,test}/im1/*  im2/*  label1/*  label2/*      SECOND, as it is published
    ROOT/{train,val,test}/A/*    B/*    labelA/*  labelB/*      the same, and Landsat-SCD
    ROOT/{train,val,test}/T1/*   T2/*   GT_T1/*   GT_T2/*
    ROOT/{train,val,test}/A/*    B/*    label/*                 changes alone (LEVIR-CD)

Files of one name belong together. Without train/, lists in ROOT (train.txt or train_list.txt, ...) say what is held
out. ROOT/classes.txt has the name of each class in a line, from 0, "unchanged", on; without it they are SECOND's.
Labels hold numbers of classes (255: not known), or the colours of SECOND or Landsat-SCD. Labels of changes alone are 0
where nothing has changed.
"""

import random
from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as V

from ..errors import InputError
from ..media.arrays import read_mask
from ..media.find import find_images
from ..media.images import read_image
from ..media.preprocess import Preprocess
from .image_sets import roots, split
from .mask_sets import IGNORED, lines_of
from .pairs import SYMMETRIES, symmetry

__all__ = ["COLOURS", "ChangePair", "ChangeSet", "find_changes", "open_changes"]

LAYOUTS = (
    ("im1", "im2", "label1", "label2"),
    ("A", "B", "labelA", "labelB"),
    ("T1", "T2", "GT_T1", "GT_T2"),
    ("A", "B", "label"),
)
"""Folders of the images before and after, and of their labels."""

COLOURS = {
    7: ((255, 255, 255), (0, 0, 255), (128, 128, 128), (0, 128, 0), (0, 255, 0), (128, 0, 0), (255, 0, 0)),
    5: ((255, 255, 255), (0, 155, 0), (255, 165, 0), (230, 30, 100), (0, 170, 240)),
}
"""The colours of the classes of SECOND and of Landsat-SCD, by how many these are."""


class ChangePair(NamedTuple):
    """Files of one place.

    Attributes:
        before, after: images.
        labels: of both dates; or one, of what has changed.
    """

    before: Path
    after: Path
    labels: tuple[Path, ...]


def find_changes(folder: str | Path, names: Sequence[str] | None = None) -> list[ChangePair]:
    """The pairs of a folder in one of the layouts.

    Args:
        folder: with im1, im2, ... in it.
        names: of the files that are wanted, with or without suffixes; default: all.

    Raises:
        InputError: no such folder or layout, nothing in it, or a file without partners.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{root} is not a folder")
    layout = next((one for one in LAYOUTS if all((root / name).is_dir() for name in one)), None)
    if layout is None:
        raise InputError(f"{root} is no set of changes: im1, im2, label1 and label2 are in one, as SECOND has it, or A,"
                         " B, labelA and labelB; A, B and label in one of changes alone")  # fmt: skip
    by_name = []
    for name in layout:
        if not (files := find_images(root / name)):
            raise InputError(f"{root / name} holds no images")
        by_name.append({str(path.relative_to(root / name).with_suffix("")): path for path in files})
    for name, files in zip(layout[1:], by_name[1:]):
        if odd := sorted(files.keys() ^ by_name[0].keys()):
            raise InputError(
                f"{root / layout[0]} and {root / name} do not hold the same images: {odd[0]} is in one alone"
            )
    wanted = list(by_name[0]) if names is None else [str(Path(name).with_suffix("")) for name in names]
    if missing := [name for name in wanted if name not in by_name[0]]:
        raise InputError(f"{root / layout[0]} has no {missing[0]}, which a list beside it names")
    return [ChangePair(one[0], one[1], one[2:]) for one in (tuple(f[name] for f in by_name) for name in wanted)]


def open_changes(data: str, val: str | None, fraction: float) -> tuple[list[ChangePair], list[ChangePair]]:
    """The pairs to train on, and those held out.

    Args:
        data: a folder in one of the layouts, or one with such folders `train` and `val` (or `test`) in it.
        val: such a folder to hold out. Without it those that a list names, or `fraction` of them, always the same ones.

    Raises:
        InputError: see `find_changes`.
    """
    root, held_out = roots(data, val)
    if held_out:
        return find_changes(root), find_changes(held_out)
    lists = {part: found for part in ("train", "val", "test") if (found := _listed(root, part)) is not None}
    if "train" in lists and len(lists) > 1:
        return find_changes(root, lists["train"]), find_changes(root, lists.get("val", lists.get("test")))
    pairs = find_changes(root)
    train, test = ([pairs[i] for i in sorted(split([0] * len(pairs), part, fraction))] for part in (False, True))
    return train, test


def _listed(root: Path, part: str) -> list[str] | None:
    path = next((p for p in (root / f"{part}.txt", root / f"{part}_list.txt") if p.is_file()), None)
    return None if path is None else lines_of(path)


class ChangeSet(Dataset):
    """Items {"before", "after": (3, H, W), "change": (H, W), "labels": (2, H, W), "index"}.

    "change" is 1 where a label of either date is not 0, "labels" have the classes of both dates; int64, 255 where it is
    not known. Sets of changes alone have no "labels".

    Args:
        pairs: the files.
        classes: how many; 0 for changes alone.
        preprocess: how the model wants its images.
        crop: side of the squares that are trained on; smaller images are filled up. None for whole images.
        augment: words joined by +: turn (one of the eight symmetries of the square) and jitter (brightness, contrast
            and saturation of each image); or none.

    Raises:
        InputError: an unknown word.
    """

    WORDS = "turn", "jitter"

    def __init__(
        self,
        pairs: Sequence[ChangePair],
        classes: int,
        preprocess: Preprocess,
        crop: int | None = None,
        augment: str = "none",
    ):
        self.words = [] if augment == "none" else augment.split("+")
        if strange := [word for word in self.words if word not in self.WORDS]:
            raise InputError(f"--augment is none, or of {', '.join(self.WORDS)}, joined by +; not {strange[0]!r}")
        self.pairs, self.classes, self.preprocess, self.crop = pairs, classes, preprocess, crop

    @property
    def names(self) -> list[str]:
        """What to call each pair: the path of its first image."""
        return [str(pair.before) for pair in self.pairs]

    def __len__(self) -> int:
        return len(self.pairs)

    def preview(self, index: int, side: int = 336) -> Image.Image:
        """A pair as it is shown: both images side by side."""
        pair = self.pairs[index]
        images = [read_image(path, 3, (side, side)) for path in pair[:2]]
        sheet = Image.new("RGB", (images[0].width + images[1].width, images[0].height))
        for image, left in zip(images, (0, images[0].width)):
            sheet.paste(image, (left, 0))
        return sheet

    def whole(self, index: int) -> tuple[Tensor, Tensor]:
        """Bytes (6, H, W) of both images, and labels (1 or 2, H, W).

        Raises:
            InputError: a file cannot be read, the sizes differ, or a label is none.
        """
        pair = self.pairs[index]
        images = [np.asarray(read_image(path, 3)) for path in pair[:2]]
        labels = [self._labels(path, len(pair.labels) > 1) for path in pair.labels]
        for path, array in zip((pair.after, *pair.labels), (images[1], *labels)):
            if array.shape[:2] != images[0].shape[:2]:
                own, other = ("x".join(map(str, shape[:2])) for shape in (images[0].shape, array.shape))
                raise InputError(f"{pair.before} has {own} pixels, {path} {other}; all of a pair have one size")
        return torch.from_numpy(np.concatenate(images, -1)).movedim(-1, 0), torch.from_numpy(np.stack(labels))

    def _labels(self, path: Path, of_classes: bool) -> np.ndarray:
        labels = read_mask(path, COLOURS.get(self.classes or 7, ()) if of_classes else ())
        if not self.classes:
            return (labels > 0).astype(np.uint8)
        if wrong := sorted(set(np.unique(labels).tolist()) - {*range(self.classes), IGNORED}):
            raise InputError(f"{path}: {wrong[0]} is none of {self.classes} classes, from 0 on")
        return labels.astype(np.uint8)

    def __getitem__(self, index: int) -> dict:
        images, labels = self.whole(index)
        if self.crop:
            images, labels = self._cut(images, labels)
        if "turn" in self.words:
            number = random.randrange(SYMMETRIES)
            images, labels = symmetry(images, number), symmetry(labels, number)
        before, after = (self._seen(x) for x in images.split(3))
        labels = labels.contiguous().long()
        unknown, changed = (labels == IGNORED).any(0), ((labels > 0) & (labels != IGNORED)).any(0)
        change = torch.where(changed, 1, torch.where(unknown, IGNORED, 0))
        item = {"before": before, "after": after, "change": change, "index": index}
        return item | ({"labels": labels} if self.classes else {})

    def _cut(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """A random square; black and not known, where there is no more of the images."""
        below, right = (max(self.crop - side, 0) for side in labels.shape[1:])
        images, labels = F.pad(images, (0, right, 0, below)), F.pad(labels, (0, right, 0, below), value=IGNORED)
        top, left = (random.randint(0, side - self.crop) for side in labels.shape[1:])
        return tuple(x[:, top : top + self.crop, left : left + self.crop] for x in (images, labels))

    def _seen(self, image: Tensor) -> Tensor:
        """Bytes (3, H, W) -> as the model wants them; "jitter" as published."""
        if "jitter" in self.words:
            for change, deviation, most in JITTER:
                image = change(image, min(max(random.gauss(1, deviation), 1 - most), 1 + most))
        return self.preprocess.normalised(image)


JITTER = (
    (V.adjust_brightness, 0.1, 0.2),
    (V.adjust_contrast, 0.1, 0.1),
    (V.adjust_saturation, 0.05, 0.1),
)
"""What is changed by a factor around 1, by which deviation, and how far at most."""
