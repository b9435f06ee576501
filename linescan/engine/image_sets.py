"""Pictures: reading them, and sets of them with labels."""

import random
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Sequence

import numpy as np
from PIL import Image

from ..errors import InputError
from ..media.images import find_images, read_image, to_mode

__all__ = ["read_image", "to_mode", "find_images", "ImageSet", "Digits", "Folder", "open_data"]


class ImageSet(ABC):
    """Labelled pictures.

    Attributes:
        classes: the name of each class.
        labels: the class of each picture.
        names: what to call each picture in messages.
        channels: those of the pictures as they are kept.
    """

    classes: Sequence[str]
    labels: Sequence[int]
    names: Sequence[str]
    channels: int = 3

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def image(self, index: int, channels: int) -> Image.Image:
        """Picture `index` with so many channels. Raises BrokenImage if it cannot be read."""


class Digits(ImageSet):
    """Scikit-learn's 1,797 handwritten digits, 8 x 8 grey pixels: a fifth of each class held out by default.

    Args:
        held_out: the held-out pictures rather than those to learn from.
        fraction: how much is held out.
    """

    channels = 1
    classes = tuple("0123456789")

    def __init__(self, held_out: bool, fraction: float = 0.2):
        from sklearn.datasets import load_digits

        data = load_digits()
        chosen = sorted(_split(data.target.tolist(), held_out, fraction))
        self.pixels = (data.images[chosen] * (255 / 16)).round().astype(np.uint8)
        self.labels = data.target[chosen].tolist()
        self.names = [f"digit {i}" for i in chosen]

    def image(self, index, channels):
        return to_mode(Image.fromarray(self.pixels[index]), channels)


class Folder(ImageSet):
    """Pictures in one folder a class: ROOT/CLASS/**/PICTURE.

    Args:
        root: the folder of classes.
        classes: the classes there must be, in order; by default those found, sorted.
        held_out, fraction: the part of each class that is held out, or the rest; None: everything.

    Raises:
        InputError: no such folder, fewer than two classes, a class without pictures, or other classes than `classes`.
    """

    def __init__(self, root, classes=None, held_out: bool | None = None, fraction: float = 0.1):
        root = Path(root)
        if not root.is_dir():
            raise InputError(f"{root} is not a folder")
        found = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
        if not found:
            raise InputError(f"{root} holds no class folders; pictures belong in {root}/CLASS/")
        if classes is None and len(found) == 1:
            raise InputError(f"{root} holds one class only ({found[0]}); a classifier needs two or more")
        self.classes = list(classes or found)
        if strange := sorted(set(found) - set(self.classes)):
            raise InputError(f"{root} holds the class {strange[0]!r}, which is none of the {len(self.classes)} known")
        files = [(path, label) for label, name in enumerate(self.classes) for path in find_images(root / name)]
        present = {label for _, label in files}
        if empty := [name for label, name in enumerate(self.classes) if label not in present and name in found]:
            raise InputError(f"{root / empty[0]} holds no pictures")
        if held_out is not None:
            chosen = sorted(_split([label for _, label in files], held_out, fraction))
            files = [files[i] for i in chosen]
        self.names = [str(path) for path, _ in files]
        self.labels = [label for _, label in files]

    def image(self, index, channels):
        return read_image(self.names[index], channels)


def _split(labels: Sequence[int], held_out: bool, fraction: float) -> list[int]:
    """The indices of the held-out pictures (at least one a class), or of the others; always the same ones."""
    chosen = []
    for label in sorted(set(labels)):
        members = [i for i, other in enumerate(labels) if other == label]
        if len(members) < 2:
            raise InputError("a class with a single picture cannot be split; give the held-out pictures with --val")
        random.Random(label).shuffle(members)
        border = min(max(1, round(len(members) * fraction)), len(members) - 1)
        chosen += members[:border] if held_out else members[border:]
    return chosen


def open_data(data: str, val: str | None = None, fraction: float = 0.1) -> tuple[ImageSet, ImageSet]:
    """The training set and the held-out set.

    Args:
        data: "digits"; or a folder of classes; or a folder with `train` and `val` (or `test`) folders of classes in it.
        val: a folder of classes to hold out. Without it, `fraction` of each class of `data` is.

    Raises:
        InputError: see `Folder`.
    """
    if data == "digits":
        return Digits(held_out=False), Digits(held_out=True)
    root = Path(data)
    if val is None and (root / "train").is_dir():
        val = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
        root = root / "train" if val else root
    if val is None:
        return Folder(root, held_out=False, fraction=fraction), Folder(root, held_out=True, fraction=fraction)
    train = Folder(root)
    return train, Folder(val, classes=train.classes)
