"""Volumes: NIfTI files (the extra `volumes`) and arrays of three axes, and how a model wants them."""

import gzip
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import BrokenImage, InputError
from ..extras import require
from .images import one_line

__all__ = ["LARGEST_VOLUME", "Volume", "VolumePreprocess", "read_volume", "write_labels"]

LARGEST_VOLUME = 2**30
"""Voxels of the largest volume that is read."""


@dataclass(frozen=True, eq=False)
class Volume:
    """Numbers on a grid of three axes.

    Attributes:
        array: (X, Y, Z); of a file with a place in space x rises to the right, y to the front, z to the top ("RAS").
        affine: (4, 4), from voxels to mm, of these axes; None where nothing is known.
        stored: how the file had its axes, (3, 2) as nibabel has orientations; None as here.
    """

    array: np.ndarray
    affine: np.ndarray | None = None
    stored: np.ndarray | None = None

    @property
    def spacing(self) -> tuple[float, float, float] | None:
        """Millimetres from voxel to voxel along each axis."""
        return None if self.affine is None else tuple(map(float, np.linalg.norm(self.affine[:3, :3], axis=0)))


def read_volume(path: str | Path) -> Volume:
    """Reads .nii, .nii.gz or .npy.

    Raises:
        BrokenImage: it cannot be read, has not three axes, is too large, or holds values that are not finite; the
            message starts with the path.
        InputError: nibabel is not installed.
    """
    path = Path(path)
    if path.suffix.lower() == ".npy":
        with one_line(path):
            array, affine, stored = np.load(path, allow_pickle=False, mmap_mode="r"), None, None
            _check_shape(array.shape)
            array = np.array(array)
    else:
        require("nibabel", "volumes")
        with one_line(path):
            array, affine, stored = _read_nifti(path)
    if array.dtype.kind not in "buif":
        raise BrokenImage(f"{path}: a volume holds real numbers, not {array.dtype}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise BrokenImage(f"{path}: it holds NaN or infinite values")
    return Volume(array.reshape(array.shape[:3]), affine, stored)


def _read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    import nibabel
    from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

    if not path.is_file():
        raise BrokenImage("not a file" if path.exists() else "No such file")
    try:
        image: Any = nibabel.load(path)
    except nibabel.filebasedimages.ImageFileError:
        raise BrokenImage("not a NIfTI file, or damaged") from None
    _check_shape(image.shape)
    stored = io_orientation(image.affine)
    if np.isnan(stored).any() or np.linalg.norm(image.affine[:3, :3], axis=0).min() < 1e-6:
        raise BrokenImage("its affine has an axis without length")
    slope, offset = image.dataobj.slope, image.dataobj.inter  # not get_fdata: float64 of eight times the memory
    raw = np.asanyarray(image.dataobj.get_unscaled())
    scaled = (slope, offset) == (1, 0)
    array = raw if scaled else raw.astype(np.float32) * np.float32(slope) + np.float32(offset)
    array = array.reshape(array.shape[:3])
    array = np.ascontiguousarray(apply_orientation(array, stored))
    return array, image.affine @ inv_ornt_aff(stored, image.shape[:3]), stored


def _check_shape(shape: Sequence[int]) -> None:
    if len(shape) < 3 or 0 in shape or any(side != 1 for side in shape[3:]):
        raise BrokenImage(f"a volume has three axes, not the shape {tuple(shape)}")
    if math.prod(shape) > LARGEST_VOLUME:
        raise BrokenImage(f"{math.prod(shape) // 10**6} million voxels; {LARGEST_VOLUME // 10**6} at most are read")


def write_labels(file: BinaryIO, labels: np.ndarray, like: Volume) -> None:
    """Writes the labels (X, Y, Z) of a volume, uint8: .nii.gz with the axes and the affine of its file, or .npy.

    Args:
        file: open for writing.
        labels: of the axes of `like`.
        like: the volume; one that has no affine makes it .npy.
    """
    if like.affine is None:
        np.save(file, labels, allow_pickle=False)
        return
    import nibabel
    from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

    affine = like.affine
    if like.stored is not None:
        back = ornt_transform(axcodes2ornt("RAS"), like.stored)
        affine, labels = affine @ inv_ornt_aff(back, labels.shape), apply_orientation(labels, back)
    content = nibabel.Nifti1Image(np.ascontiguousarray(labels), affine).to_bytes()
    with io.BytesIO() as buffer:
        with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as packed:
            packed.write(content)
        file.write(buffer.getbuffer())


@dataclass(frozen=True)
class VolumePreprocess:
    """How a model wants its volumes.

    Attributes:
        spacing: millimetres from voxel to voxel that volumes are resampled to; those without an affine stay as they
            are.
        intensity: (low, high), which become 0 and 1; what lies beyond is cut off. Of CT, Hounsfield units.
        window: side of the cubes that the model reads.

    Raises:
        InputError: a spacing that is not above 0, an empty range, or a window that is no number of voxels.
    """

    spacing: tuple[float, float, float]
    intensity: tuple[float, float]
    window: int

    def __post_init__(self):
        object.__setattr__(self, "spacing", tuple(self.spacing))
        object.__setattr__(self, "intensity", tuple(self.intensity))
        for name, count in (("spacing", 3), ("intensity", 2)):
            values = getattr(self, name)
            if len(values) != count or not all(type(v) in (int, float) and math.isfinite(v) for v in values):
                raise InputError(f"{name} is {count} numbers, not {values}")
        if min(self.spacing) <= 0 or not self.intensity[0] < self.intensity[1]:
            raise InputError(f"spacing is above 0 and intensity rises, not {self.spacing} and {self.intensity}")
        if type(self.window) is not int or not 16 <= self.window <= 1024:
            raise InputError(f"a window has 16 to 1024 voxels a side, not {self.window}")

    def grid(self, volume: Volume) -> tuple[int, int, int]:
        """Voxels along each axis of the resampled volume."""
        if volume.spacing is None:
            return volume.array.shape
        sides = zip(volume.array.shape, volume.spacing, self.spacing)
        return tuple(max(round(count * own / wanted), 1) for count, own, wanted in sides)

    def __call__(self, volume: Volume) -> Tensor:
        """Values (X', Y', Z'), float32 in 0..1, at the model's spacing.

        Raises:
            InputError: it would be larger than `LARGEST_VOLUME`.
        """
        if math.prod(grid := self.grid(volume)) > LARGEST_VOLUME:
            raise InputError(f"it has {math.prod(grid) // 10**6} million voxels at the model's spacing: too many")
        low, high = self.intensity
        values = torch.from_numpy(volume.array.astype(np.float32))
        values = ((values - low) / (high - low)).clamp_(0, 1)
        return F.interpolate(values[None, None], grid, mode="trilinear", align_corners=False)[0, 0]

    def labels(self, volume: Volume) -> Tensor:
        """Labels (X', Y', Z'), uint8, at the model's spacing: those of the nearest voxels."""
        values = torch.from_numpy(volume.array.astype(np.float32))
        return F.interpolate(values[None, None], self.grid(volume), mode="nearest-exact")[0, 0].byte()
