"""Sets of images and videos, with labels or without."""

import random
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Sequence

import numpy as np
from PIL import Image

from ..errors import BrokenImage, InputError
from ..extras import require
from ..media.arrays import read_array
from ..media.find import find_images, find_videos
from ..media.images import read_image
from ..media.pixels import to_mode
from ..media.video import is_video, open_video

__all__ = ["Digits", "Files", "Folder", "ImageSet", "class_folders", "classes_of", "open_data", "roots", "split"]


class ImageSet(ABC):
    """Images, or the paths of videos, with labels.

    Attributes:
        classes: the name of each class.
        labels: the class of each sample.
        names: what to call each sample in messages; the path where there is one.
        channels: those of the images as they are kept.
        in_memory: whether reading takes no time.
    """

    classes: Sequence[str] = ()
    labels: Sequence[int]
    names: Sequence[str]
    channels: int = 3
    in_memory: bool = False

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def image(self, index: int, channels: int, size: tuple[int, int] | None = None) -> Image.Image:
        """Image `index` with 1, 3 or 4 channels; reduced as it is read, if (height, width) `size` will be made of it.

        Raises:
            BrokenImage: it cannot be read.
        """

    def preview(self, index: int, side: int = 336) -> Image.Image:
        """Sample `index` to be shown, RGB: the image, reduced as it is read; of a video the frame in the middle."""
        path = Path(self.names[index])
        if not (path.is_dir() or is_video(path)):
            return self.image(index, 3, (side, side))
        video = open_video(path)
        [frame] = video.images([len(video) // 2], 3)
        return frame

    def bands(self, index: int, channels: int) -> np.ndarray:
        """Image `index` of any number of channels, (H, W, channels), in its own type.

        Raises:
            BrokenImage: it cannot be read, or has other channels.
        """
        bands, _ = read_array(self.names[index])
        if bands.shape[-1] != channels:
            raise BrokenImage(f"{self.names[index]}: {bands.shape[-1]} channels; the model expects {channels}")
        return bands


class Digits(ImageSet):
    """Scikit-learn's 1,797 handwritten digits, 8 x 8 grey pixels: a fifth of each class held out by default.

    Args:
        held_out: the held-out images rather than those to train on.
        fraction: how much is held out.
    """

    channels = 1
    classes = tuple("0123456789")
    in_memory = True

    def __init__(self, held_out: bool, fraction: float = 0.2):
        require("sklearn", "demo")
        from sklearn.datasets import load_digits

        data = load_digits()
        chosen = sorted(split(data.target.tolist(), held_out, fraction))
        self.pixels = (data.images[chosen] * (255 / 16)).round().astype(np.uint8)
        self.labels = data.target[chosen].tolist()
        self.names = [f"digit {i}" for i in chosen]

    def image(self, index, channels, size=None):
        return to_mode(Image.fromarray(self.pixels[index]), channels)


class Files(ImageSet):
    """All images (or videos) in a folder and below it, without classes.

    Args:
        root: the folder.
        held_out, fraction: the part that is held out, or the rest; None: everything.
        videos: videos, and folders of frames, instead of images.

    Raises:
        InputError: no such folder, or nothing in it.
    """

    def __init__(self, root, held_out: bool | None = None, fraction: float = 0.1, videos: bool = False):
        files = _find(Path(root), videos)
        self.labels = [0] * len(files)
        if held_out is not None:
            files = [files[i] for i in sorted(split(self.labels, held_out, fraction))]
            self.labels = [0] * len(files)
        self.names = [str(path) for path in files]

    def image(self, index, channels, size=None):
        return read_image(self.names[index], channels, size)


class Folder(ImageSet):
    """Images (or videos) in one folder per class: ROOT/CLASS/**/IMAGE.

    Args:
        root: the folder of classes.
        classes: the classes there must be, in order; by default those found, sorted.
        held_out, fraction: the part of each class that is held out, or the rest; None: everything.
        videos: videos, and folders of frames, instead of images.

    Raises:
        InputError: no such folder, fewer than two classes, an empty class, or other classes than `classes`.
    """

    def __init__(self, root, classes=None, held_out: bool | None = None, fraction: float = 0.1, videos: bool = False):
        root = Path(root)
        found = class_folders(root, alone=classes is not None)
        self.classes = list(classes or found)
        if strange := sorted(set(found) - set(self.classes)):
            raise InputError(f"{root} holds the class {strange[0]!r}, which is none of the {len(self.classes)} known")
        files = [
            (path, label)
            for label, name in enumerate(self.classes)
            if name in found
            for path in _find(root / name, videos)
        ]
        if held_out is not None:
            chosen = sorted(split([label for _, label in files], held_out, fraction, self.classes))
            files = [files[i] for i in chosen]
        self.names = [str(path) for path, _ in files]
        self.labels = [label for _, label in files]

    def image(self, index, channels, size=None):
        return read_image(self.names[index], channels, size)


def _find(folder: Path, videos: bool) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    files = (find_videos if videos else find_images)(folder)
    if not files:
        other = (find_images if videos else find_videos)(folder)
        kinds = ("videos", "images") if videos else ("images", "videos")
        raise InputError(f"{folder} holds no {kinds[0]}" + (f", but {kinds[1]}" if other else ""))
    return files


def class_folders(root: Path, alone: bool = False) -> list[str]:
    if not root.is_dir():
        raise InputError(f"{root} is not a folder")
    found = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not found:
        raise InputError(f"{root} holds no class folders; a class's files belong in {root}/CLASS/")
    if not alone and len(found) == 1:
        raise InputError(f"{root} holds one class only ({found[0]}); a classifier needs two or more")
    return found


def split(labels: Sequence[int], held_out: bool, fraction: float, classes: Sequence[str] = ()) -> list[int]:
    """The indices of the held-out samples (at least one per class), or of the others; always the same ones.

    Raises:
        InputError: a class has a single sample; it is named where the names of `classes` are given.
    """
    chosen = []
    for label in sorted(set(labels)):
        members = [i for i, other in enumerate(labels) if other == label]
        if len(members) < 2:
            sample = f"the single sample of {classes[label]}" if classes else "a single sample"
            raise InputError(f"{sample} cannot be split; give the held-out samples with --val")
        random.Random(label).shuffle(members)
        border = min(max(1, round(len(members) * fraction)), len(members) - 1)
        chosen += members[:border] if held_out else members[border:]
    return chosen


def roots(data: str, val: str | None) -> tuple[Path, Path | None]:
    """Where the training set is, and the held-out set, if it has a folder of its own."""
    root = Path(data)
    if val is None and (root / "train").is_dir():
        val = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
        root = root / "train" if val else root
    return root, Path(val) if val else None


def classes_of(data: str, val: str | None = None) -> tuple[Sequence[str], int]:
    """The classes of what `open_data` opens, and the channels of its images.

    Raises:
        InputError: see `Folder`.
    """
    if data == "digits":
        return Digits.classes, Digits.channels
    return class_folders(roots(data, val)[0]), ImageSet.channels


def open_data(
    data: str, val: str | None = None, fraction: float = 0.1, videos: bool = False, labelled: bool = True
) -> tuple[ImageSet, ImageSet]:
    """The training set and the held-out set.

    Args:
        data: "digits"; or a folder of classes; or a folder with `train` and `val` (or `test`) folders of classes in it.
        val: a folder of classes to hold out. Without it, `fraction` of each class of `data` is.
        videos: videos instead of images.
        labelled: False for files of any folders, without classes.

    Raises:
        InputError: see `Folder` and `Files`.
    """
    if data == "digits":
        if videos:
            raise InputError("the digits are images, and the model is one for videos; give a folder of videos")
        return Digits(held_out=False), Digits(held_out=True)
    root, val = roots(data, val)
    kind = Folder if labelled else Files
    if val is None:
        return tuple(kind(root, held_out=part, fraction=fraction, videos=videos) for part in (False, True))
    train = kind(root, videos=videos)
    return train, Folder(val, classes=train.classes, videos=videos) if labelled else Files(val, videos=videos)
