"""Sets of normal and of defective images, as MVTec-AD and VisA have them, or as plain folders of normal images.

    ROOT/CLASS/train/good/*      MVTec-AD; one CLASS alone will do as ROOT
    ROOT/CLASS/test/good/*  ROOT/CLASS/test/DEFECT/*  ROOT/CLASS/ground_truth/DEFECT/NAME_mask.png

    ROOT/CLASS/Data/Images/{Normal,Anomaly}/*      VisA; ROOT/split_csv/1cls.csv says what is held out
    ROOT/CLASS/Data/Masks/Anomaly/NAME.png

    ROOT/**/*                    any other folder: normal images

Only normal images are trained on. Where there are no masks, images alone are scored.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np
import torch
from PIL import Image
from PIL.ExifTags import Base
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import InputError
from ..media.arrays import read_array
from ..media.find import find_images
from ..media.images import open_file, read_image
from ..media.preprocess import Preprocess
from .image_sets import split

__all__ = ["AnomalySet", "Inspected", "find_anomalies"]

GOOD = "good"


class Inspected(NamedTuple):
    """An image of which it is known whether it is normal.

    Attributes:
        path: of the image.
        category: what it shows: number of a class of objects.
        defect: what kind of defect it has; "" for a normal image.
        mask: where the defect is: an image that is 0 where there is none; None where that is not known.
    """

    path: Path
    category: int
    defect: str = ""
    mask: Path | None = None


@dataclass(frozen=True)
class Found:
    """What a folder holds.

    Attributes:
        categories: names of the classes of objects.
        train: normal images to train on.
        test: normal and defective images to score on.
    """

    categories: Sequence[str]
    train: Sequence[Inspected]
    test: Sequence[Inspected]


def find_anomalies(folder: str | Path, fraction: float = 0.1) -> Found:
    """The images of a folder.

    Args:
        folder: in one of the layouts above.
        fraction: of the normal images that is held out, where the layout does not say which are.

    Raises:
        InputError: no such folder, nothing in it, or a defective image without a mask where others have one.
    """
    root = Path(folder)
    if not root.is_dir():
        raise InputError(f"{root} is not a folder")
    if _is_mvtec(root) or _is_visa(root):
        places = [root]
    else:
        places = sorted(p for p in root.iterdir() if p.is_dir() and (_is_mvtec(p) or _is_visa(p)))
    train: list[Inspected] = []
    test: list[Inspected] = []
    held_out = _visa_test(root)
    for category, place in enumerate(places):
        if _is_mvtec(place):
            parts = _mvtec(place, category)
        else:
            parts = _visa(place, category, held_out, fraction)
        train += parts[0]
        test += parts[1]
    if not places:
        files = find_images(root)
        if len(files) < 2:
            raise InputError(f"{root} holds no images to train on: neither CLASS/train/good as MVTec-AD has it, nor "
                             "CLASS/Data/Images/Normal as VisA has it, nor two images or more")  # fmt: skip
        places, every = [root], [Inspected(path, 0) for path in files]
        train, test = _parted(every, fraction)
    return Found([place.name for place in places], train, test)


def _parted(normal: Sequence[Inspected], fraction: float) -> tuple[list[Inspected], list[Inspected]]:
    labels = [0] * len(normal)
    train, test = ([normal[i] for i in sorted(split(labels, part, fraction))] for part in (False, True))
    return train, test


def _images(folder: Path) -> list[Path]:
    files = find_images(folder) if folder.is_dir() else []
    if not files:
        raise InputError(f"{folder} holds no images")
    return files


def _is_mvtec(place: Path) -> bool:
    return (place / "train" / GOOD).is_dir()


def _mvtec(place: Path, category: int) -> tuple[list[Inspected], list[Inspected]]:
    train = [Inspected(path, category) for path in _images(place / "train" / GOOD)]
    test, truth = [], place / "ground_truth"
    folders = sorted(p for p in (place / "test").iterdir() if p.is_dir()) if (place / "test").is_dir() else []
    for folder in folders:
        for path in _images(folder):
            if folder.name == GOOD:
                test.append(Inspected(path, category))
            else:
                mask = _mask(truth / folder.name, path.stem) if truth.is_dir() else None
                test.append(Inspected(path, category, folder.name, mask))
    return train, test


def _mask(folder: Path, stem: str) -> Path:
    for path in (folder / f"{stem}_mask.png", folder / f"{stem}.png"):
        if path.exists():
            return path
    raise InputError(f"{folder} holds no mask of {stem}: neither {stem}_mask.png nor {stem}.png")


def _is_visa(place: Path) -> bool:
    return (place / "Data" / "Images" / "Normal").is_dir()


def _visa(
    place: Path, category: int, held_out: set[str] | None, fraction: float
) -> tuple[list[Inspected], list[Inspected]]:
    images, masks = place / "Data" / "Images", place / "Data" / "Masks" / "Anomaly"
    normal = [Inspected(path, category) for path in _images(images / "Normal")]
    if held_out is None:
        train, test = _parted(normal, fraction)
    else:
        train, test = ([one for one in normal if (_row(one.path) in held_out) == part] for part in (False, True))
    for path in find_images(images / "Anomaly") if (images / "Anomaly").is_dir() else ():
        test.append(Inspected(path, category, "defect", _mask(masks, path.stem) if masks.is_dir() else None))
    return train, test


def _row(path: Path) -> str:
    """How VisA's tables name an image: by its last five parts, from the class on."""
    return "/".join(path.parts[-5:])


def _visa_test(root: Path) -> set[str] | None:
    """What VisA's table holds out; None without one."""
    path = next((p for p in (root, root.parent) if (p / "split_csv" / "1cls.csv").exists()), None)
    if path is None:
        return None
    path = path / "split_csv" / "1cls.csv"
    try:
        with open(path, newline="") as file:
            return {row["image"] for row in csv.DictReader(file) if row["split"] == "test"}
    except (KeyError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is no table with the columns split and image ({error})") from None


class AnomalySet(Dataset):
    """Items {"input": (3, H, W), "label": 1 for a defect, "category": its number, "mask": (H, W) bool, "index": ...}.

    Images are resized to the model's size whatever their shape, so that all of each is looked at; masks as well.

    Args:
        images: the images.
        categories: names of the classes of objects.
        preprocess: how the model wants its images.
    """

    def __init__(self, images: Sequence[Inspected], categories: Sequence[str], preprocess: Preprocess):
        self.images, self.categories, self.preprocess = images, categories, preprocess
        self.masked = any(one.mask for one in images)

    @property
    def names(self) -> list[str]:
        """What to call each image: its path."""
        return [str(one.path) for one in self.images]

    def __len__(self) -> int:
        return len(self.images)

    def preview(self, index: int, side: int = 336) -> Image.Image:
        """An image as it is shown."""
        return read_image(self.images[index].path, 3, (side, side))

    def __getitem__(self, index: int) -> dict:
        """One item. Raises InputError: a file cannot be read."""
        one, size = self.images[index], self.preprocess.size[1:]
        image = read_image(one.path, self.preprocess.channels, size)
        item = {"input": self.preprocess.whole(image), "label": int(bool(one.defect)), "category": one.category}
        if self.masked:
            item["mask"] = torch.zeros(size, dtype=torch.bool) if one.mask is None else _read_mask(one, size)
        return item | {"index": index}


def _sides(path: Path) -> tuple[int, int]:
    """(height, width) of an image that stands upright."""
    with open_file(path) as image:
        turned = image.getexif().get(Base.Orientation, 1) > 4
        return image.size if turned else image.size[::-1]


def _read_mask(one: Inspected, size: tuple[int, int]) -> Tensor:
    """Where a mask of any depth is not 0, at another (height, width). Raises InputError: it is not of its image."""
    array, _ = read_array(one.mask)
    if array.shape[:2] != (sides := _sides(one.path)):
        own, other = ("x".join(map(str, shape)) for shape in (sides, array.shape[:2]))
        raise InputError(f"{one.path} has {own} pixels, its mask {one.mask} has {other}")
    defect = array[..., : 3 if array.shape[2] > 2 else 1].any(-1)
    resized = Image.fromarray(np.where(defect, 255, 0).astype(np.uint8)).resize(size[::-1], Image.Resampling.BILINEAR)
    return torch.from_numpy(np.asarray(resized) > 127)
