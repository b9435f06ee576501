"""Scans whose surroundings are known cell by cell, in the layout of SemanticKITTI's scene completion."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from ..errors import InputError
from ..media.clouds import ScanPreprocess
from ..media.draw_points import PointView, draw_points
from ..media.labels import class_names
from ..media.points import read_points

__all__ = ["HELD_OUT", "IGNORED", "VolumeSamples", "centres", "open_volumes"]

IGNORED = 255
HELD_OUT = ("08",)
"""The sequences that SemanticKITTI holds out for validation."""

CLASSES = {
    10: 1, 11: 2, 13: 5, 15: 3, 16: 5, 18: 4, 20: 5, 30: 6, 31: 7, 32: 8, 40: 9, 44: 10, 48: 11, 49: 12, 50: 13, 51: 14,
    60: 9, 70: 15, 71: 16, 72: 17, 80: 18, 81: 19, 252: 1, 253: 7, 254: 6, 255: 8, 256: 5, 257: 5, 258: 4, 259: 5,
}  # fmt: skip
"""The class of each label in the files; all others have none."""


def _table(none: int) -> np.ndarray:
    table = np.full(2**16, none, np.uint8)
    table[list(CLASSES)] = list(CLASSES.values())
    return table


POINT_CLASSES = _table(0)  # 0 for points without a class
CELL_CLASSES = _table(IGNORED)  # what is there and has no class is unknown
CELL_CLASSES[0] = 0  # empty


def centres(index: np.ndarray, low: Sequence[float], high: Sequence[float], cells: Sequence[int]) -> np.ndarray:
    """The middles (N, 3) of cells (N, 3) of a volume, float32."""
    size = (np.array(high) - low) / cells
    return ((index + 0.5) * size + low).astype(np.float32)


def open_volumes(data: str) -> tuple[list[Path], list[Path]]:
    """The scans with volumes to train on, and those held out: sequence 08, or the last one where it is not there.

    Args:
        data: SemanticKITTI's folder, with sequences/ in it, or dataset/sequences/.

    Raises:
        InputError: there is no such folder, or one part of it is empty.
    """
    root = next((r for r in (Path(data), Path(data) / "dataset") if (r / "sequences").is_dir()), None)
    if root is None:
        raise InputError(f"{data} is no data set of volumes: SemanticKITTI has sequences/00/voxels in it")
    scans = {
        folder.name: sorted(
            folder / "velodyne" / f"{path.stem}.bin" for path in (folder / "voxels").glob("*.label")
        )
        for folder in sorted((root / "sequences").iterdir())
    }  # fmt: skip
    scans = {name: paths for name, paths in scans.items() if paths}
    held = [name for name in HELD_OUT if name in scans] or list(scans)[-1:]
    train = [path for name, paths in scans.items() for path in paths if name not in held]
    held_out = [path for name in held for path in scans[name]]
    if not train or not held_out:
        raise InputError(f"{root / 'sequences'}: {len(train)} scans with volumes to train on, {len(held_out)} held out")
    return train, held_out


class VolumeSamples(Dataset):
    """Items {"points": (N, channels), "labels": (N,) classes, "occupancy", "target": (X, Y, Z), "index"}.

    Batches have packed points with "lengths", packed labels, and stacked volumes.

    Args:
        scans: paths of velodyne/N.bin.
        preprocess: how the model wants its scans.
        low, high, cells: the volume, x first; files hold one of `cells`.
        augment: mirror at random along x and y, points and volumes alike, as in training.
    """

    in_memory = False

    def __init__(
        self,
        scans: Sequence[Path],
        preprocess: ScanPreprocess,
        low: Sequence[float],
        high: Sequence[float],
        cells: Sequence[int],
        augment: bool = False,
    ):
        self.scans, self.preprocess, self.augment = list(scans), preprocess, augment
        self.low, self.high, self.cells = tuple(low), tuple(high), tuple(cells)
        self.classes = class_names("SemanticKITTI") or []

    @property
    def names(self) -> list[str]:
        """What to call each sample."""
        return [str(path) for path in self.scans]

    def preview(self, index: int) -> Image.Image:
        """A sample as it is shown: what is there, and known."""
        target = self[index]["target"].numpy()
        there = np.argwhere((target > 0) & (target != IGNORED))
        labels = target[tuple(there.T)].astype(np.int64)
        return draw_points(PointView(centres(there, self.low, self.high, self.cells), labels, self.classes), 336)

    def __len__(self) -> int:
        return len(self.scans)

    def volume(self, path: Path, bits: bool) -> np.ndarray:
        """A file of bits, or of numbers of 16, as a volume.

        Raises:
            InputError: it cannot be read, or is of another size.
        """
        try:
            values = np.fromfile(path, np.uint8 if bits else np.uint16)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}") from None
        values = np.unpackbits(values) if bits else values
        if values.size != np.prod(self.cells):
            raise InputError(f"{path}: {values.size} cells, not {'x'.join(map(str, self.cells))}")
        return values.reshape(self.cells)

    def __getitem__(self, index: int) -> dict:
        path = self.scans[index]
        cloud = read_points(path, limit=2**21, columns="x y z intensity")
        if cloud.labels is None:
            raise InputError(f"{path}: its points have no labels (labels/{path.stem}.label)")
        stem = path.parents[1] / "voxels" / path.stem
        occupancy = self.volume(stem.with_suffix(".bin"), bits=True)
        target = CELL_CLASSES[self.volume(stem.with_suffix(".label"), bits=False)]
        if (invalid := stem.with_suffix(".invalid")).is_file():
            target[self.volume(invalid, bits=True) > 0] = IGNORED
        rows = self.preprocess.rows(cloud)
        labels = torch.from_numpy(POINT_CLASSES[cloud.labels & 0xFFFF].astype(np.int64))
        volumes = [torch.from_numpy(v.copy()) for v in (occupancy, target)]
        for axis in range(2 if self.augment else 0):
            if torch.rand(()) < 0.5:
                rows[:, axis] = self.low[axis] + self.high[axis] - rows[:, axis]
                volumes = [v.flip(axis) for v in volumes]
        return {"points": rows, "labels": labels, "occupancy": volumes[0], "target": volumes[1], "index": index}

    @staticmethod
    def collate(samples: Sequence[Mapping]) -> dict:
        """Points and their labels packed, with "lengths"; volumes stacked."""
        batch: dict = {name: [sample[name] for sample in samples] for name in samples[0]}
        lengths = [len(points) for points in batch["points"]]
        joined = {name: torch.cat(batch[name]) for name in ("points", "labels")}
        return (
            batch | joined | {name: torch.stack(batch[name]) for name in ("occupancy", "target")} | {"lengths": lengths}
        )
