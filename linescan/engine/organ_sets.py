"""Volumes with a label for each voxel, in the layout of BTCV and of the Medical Segmentation Decathlon.

    ROOT/dataset.json       {"labels": {"0": "background", "1": "spleen", ...},
                             "training": [{"image": "imagesTr/a.nii.gz", "label": "labelsTr/a.nii.gz"}, ...],
                             "validation": [the same]}

Any other name will do for the file, if it is the only one. Without "validation" a part of "training" is held out. Paths
are below the folder. Labels are 0, 1, ...; `name: number` is read as well as `number: name`.
"""

import json
from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from ..errors import InputError
from ..media.draw import draw_planes
from ..media.volumes import VolumePreprocess, read_volume
from .image_sets import split

__all__ = ["LabelledVolumes", "OrganSet", "Scan", "find_organs", "planes", "richest_planes"]

CACHE = 2**31
"""Bytes of resampled volumes that a set keeps in memory, once they are read."""

TURNS = 0.2, 0.2  # how often an axis is mirrored, and the first two axes are turned: as published for BTCV
TONES = 0.1, 0.1  # how often contrast and brightness change, and by how much


class Scan(NamedTuple):
    """Files of one volume."""

    image: Path
    label: Path


class OrganSet(NamedTuple):
    """What a folder holds.

    Attributes:
        classes: names of the labels, from 0, the background, on.
        train, held_out: the volumes.
    """

    classes: tuple[str, ...]
    train: list[Scan]
    held_out: list[Scan]


def find_organs(data: str | Path, fraction: float = 0.1) -> OrganSet:
    """The volumes of a folder, or of a list: a .json file in it.

    Args:
        data: the folder or the file.
        fraction: of the training volumes that is held out, where the list does not say which are.

    Raises:
        InputError: no list, one that is none, or that names files that are not there.
    """
    path = _list_of(Path(data))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        classes = _classes(content["labels"])
        train, held_out = (_scans(path, content.get(name) or []) for name in ("training", "validation"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        said = f"{path} is no list of volumes as BTCV has it: labels, training, validation ({error})"
        raise InputError(said) from None
    if not train:
        raise InputError(f"{path} lists no volumes under training")
    if not held_out:
        parts = [sorted(split([0] * len(train), part, fraction)) for part in (False, True)]
        train, held_out = ([train[i] for i in part] for part in parts)
    return OrganSet(classes, train, held_out)


def _list_of(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(f"{path} is not a folder")
    found = sorted(path.glob("*.json"))
    named = [one for one in found if one.name == "dataset.json"] or found
    if len(named) != 1:
        what = f"{len(named)} .json files; name one of them" if named else "no .json file that lists them"
        raise InputError(f"{path} is no set of volumes: it holds {what}, and BTCV has dataset.json beside imagesTr/")
    return named[0]


def _classes(labels: dict) -> tuple[str, ...]:
    pairs = labels.items() if all(str(key).isdecimal() for key in labels) else ((v, k) for k, v in labels.items())
    named = {int(number): str(name) for number, name in pairs}
    if sorted(named) != list(range(len(named))) or not 2 <= len(named) <= 255:
        raise ValueError("labels are numbered from 0 on, 2 to 255 of them")
    return tuple(named[i] for i in range(len(named)))


def _scans(path: Path, rows: Sequence[dict]) -> list[Scan]:
    scans = []
    for row in rows:
        files = [Path(row["image"]), Path(row["label"])]
        for file in files:
            if file.is_absolute() or ".." in file.parts:
                raise InputError(f"{path}: {file} is not below its folder")
            if not (path.parent / file).is_file():
                raise InputError(f"{path} lists {file}, which is not there")
        scans.append(Scan(*(path.parent / file for file in files)))
    return scans


class LabelledVolumes(Dataset):
    """Items {"volume": (1, X, Y, Z) float32 in 0..1, "labels": (X, Y, Z) uint8, "index": ...} at the model's spacing.

    Args:
        scans: the files.
        classes: names of the labels.
        preprocess: how the model wants its volumes.
        repeats: for training: cubes of each volume in an epoch, changed at random; half of them have their middle in an
            organ. None for whole volumes.
    """

    def __init__(self, scans: Sequence[Scan], classes: Sequence[str], preprocess: VolumePreprocess, repeats=None):
        self.scans, self.classes, self.preprocess, self.repeats = scans, classes, preprocess, repeats
        self._cache: dict[int, tuple[Tensor, Tensor]] = {}
        self._cached = 0

    @property
    def names(self) -> list[str]:
        """What to call each volume: its path."""
        return [str(scan.image) for scan in self.scans]

    def __len__(self) -> int:
        return len(self.scans)

    def order(self, generator: np.random.Generator) -> Sequence[int]:
        return generator.permutation(np.tile(np.arange(len(self)), self.repeats or 1))

    def whole(self, index: int) -> tuple[Tensor, Tensor]:
        """A volume and its labels (X, Y, Z), kept in memory as far as `CACHE` goes.

        Raises:
            InputError: a file cannot be read, sizes differ, or a label is no class.
        """
        if index in self._cache:
            return self._cache[index]
        scan = self.scans[index]
        image, label = read_volume(scan.image), read_volume(scan.label)
        if image.array.shape != label.array.shape:
            own, other = ("x".join(map(str, v.array.shape)) for v in (image, label))
            raise InputError(f"{scan.image} has {own} voxels, its labels {scan.label} have {other}")
        if not 0 <= label.array.min() <= label.array.max() < len(self.classes):
            raise InputError(f"{scan.label}: labels of {label.array.min():g} to {label.array.max():g}; there are "
                             f"{len(self.classes)} classes, from 0 on")  # fmt: skip
        pair = self.preprocess(image), self.preprocess.labels(label)
        size = sum(one.numel() * one.element_size() for one in pair)
        if self._cached + size <= CACHE:
            self._cache[index], self._cached = pair, self._cached + size
        return pair

    def __getitem__(self, index: int) -> dict:
        volume, labels = self.whole(index)
        if self.repeats is not None:
            volume, labels = _changed(*self._cube(volume, labels))
        return {"volume": volume[None], "labels": labels, "index": index}

    def _cube(self, volume: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        side = self.preprocess.window
        room = [n for length in reversed(volume.shape) for n in (0, max(side - length, 0))]
        volume, labels = F.pad(volume, room), F.pad(labels, room)
        start = [int(torch.randint(length - side + 1, ())) for length in labels.shape]
        if torch.rand(()) < 0.5 and len(inside := labels.flatten().nonzero()):
            middle = np.unravel_index(int(inside[torch.randint(len(inside), ())]), labels.shape)
            start = [min(max(int(at) - side // 2, 0), length - side) for at, length in zip(middle, labels.shape)]
        part = tuple(slice(at, at + side) for at in start)
        return volume[part], labels[part]

    def preview(self, index: int, side: int = 336) -> Image.Image:
        """A volume as it is shown: three planes, tinted by their labels."""
        volume, labels = self.whole(index)
        drawn = draw_planes(planes(volume.numpy(), labels.numpy()), self.classes, legend_rows=0)
        drawn.thumbnail((2 * side, 2 * side))
        return drawn


def _changed(volume: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    for axis in range(3):
        if torch.rand(()) < TURNS[0]:
            volume, labels = volume.flip(axis), labels.flip(axis)
    if torch.rand(()) < TURNS[1]:
        times = int(torch.randint(1, 4, ()))
        volume, labels = (one.rot90(times, (0, 1)) for one in (volume, labels))
    often, much = TONES
    if torch.rand(()) < often:
        volume = volume * float(torch.empty(()).uniform_(1 - much, 1 + much))
    if torch.rand(()) < often:
        volume = volume + float(torch.empty(()).uniform_(-much, much))
    return volume.contiguous(), labels.contiguous()


PLANES = ("sagittal", "x"), ("coronal", "y"), ("axial", "z")
"""What the planes across each axis are called, and the axis."""


def richest_planes(labels: np.ndarray) -> tuple[int, int, int]:
    """Of each axis of labels (X, Y, Z) the plane across it that has most of the classes, all of which count alike.

    A class counts by the share of its voxels that lies in the plane; 0 is the background. The middle, where there is no
    class.
    """
    places = []
    for axis, length in enumerate(labels.shape):
        rows = [np.bincount(np.take(labels, at, axis).ravel(), minlength=256)[1:] for at in range(length)]
        counts = np.stack(rows)
        shares = counts / counts.sum(0).clip(1)
        places.append(int(shares.sum(1).argmax()) if counts.any() else length // 2)
    return tuple(places)


def planes(
    volume: np.ndarray, labels: np.ndarray, places: tuple[int, int, int] | None = None
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Planes across each axis for `draw_planes`: axial, coronal, sagittal; each with its name, bytes and mask (H, W).

    Args:
        volume: (X, Y, Z) in 0..1; what rises along an axis is drawn upwards, or to the right.
        labels: (X, Y, Z), bytes; 0, the background, is 255 in the mask.
        places: of the planes along x, y and z; default: `richest_planes`.
    """
    places, pieces = places or richest_planes(labels), []
    for axis in (2, 1, 0):
        name, letter = PLANES[axis]
        grey, own = (np.take(one, places[axis], axis).T[::-1] for one in (volume, labels))
        image = np.rint(grey.clip(0, 1) * 255).astype(np.uint8)
        pieces.append((f"{name}, {letter} = {places[axis]}", image, np.where(own == 0, 255, own).astype(np.uint8)))
    return pieces
