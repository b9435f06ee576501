"""How a model wants its clouds of points, and how these are changed in training."""

import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..layers.points import farthest_points
from .points import PointCloud

__all__ = ["AUGMENTATIONS", "FEATURES", "SCAN_FEATURES", "PointAugment", "PointPreprocess", "ScanPreprocess"]

FEATURES = {"normals": 3, "colours": 3, "intensity": 1}
"""What a model may read beside the coordinates, and how many channels it takes; colours run over 0..1."""

MOST = 2**14  # points among which the farthest are sought
MOST_POINTS = 2**20


@dataclass(frozen=True)
class PointPreprocess:
    """How a model wants its clouds.

    Attributes:
        points: how many it reads of a cloud.
        features: what it reads beside the coordinates: names of `FEATURES`.
        normalise: move the mean of a cloud to the origin, and the point farthest from it to the distance 1.
        up: the axis that points upwards in the data that the model was trained on, "y" or "z".

    Raises:
        InputError: a value that none of these can have.
    """

    points: int
    features: tuple[str, ...] = ()
    normalise: bool = True
    up: str = "y"

    def __post_init__(self):
        if type(self.points) is not int or not 1 <= self.points <= MOST_POINTS:
            raise InputError(f"a model reads from 1 to {MOST_POINTS:,} points of a cloud, not {self.points!r}")
        features = self.features
        if not isinstance(features, (list, tuple)) or not set(map(str, features)) <= set(FEATURES):
            raise InputError(f"features of points are {', '.join(FEATURES)}, not {features!r}")
        if len(set(features)) < len(features):
            raise InputError(f"each feature of points is named once, not as in {', '.join(features)}")
        object.__setattr__(self, "features", tuple(features))
        if type(self.normalise) is not bool:
            raise InputError(f"clouds are normalised (true) or not (false), not {self.normalise!r}")
        if self.up not in ("y", "z"):
            raise InputError(f"the axis that points upwards is y or z, not {self.up!r}")

    def as_dict(self) -> dict:
        """Plain values."""
        return asdict(self)

    @property
    def channels(self) -> int:
        """Of a point."""
        return 3 + sum(FEATURES[name] for name in self.features)

    def rows(self, cloud: PointCloud) -> Tensor:
        """All points of a cloud as the model wants them, (N, channels) float32.

        Raises:
            InputError: the cloud lacks one of the features.
        """
        columns = [cloud.points.astype(np.float32)]
        if self.normalise:
            xyz = cloud.points.astype(np.float64)
            xyz = xyz - xyz.mean(0)
            columns = [(xyz / (np.linalg.norm(xyz, axis=1).max() or 1)).astype(np.float32)]
        for name in self.features:
            values = getattr(cloud, name)
            if values is None:
                raise InputError(f"the cloud has no {name}, which the model reads")
            values = values.astype(np.float32).reshape(len(cloud), -1)
            columns.append(values / 255 if name == "colours" else values)
        return torch.from_numpy(np.concatenate(columns, 1))

    def choose(self, rows: Tensor, random: bool = False) -> Tensor:
        """Which points the model reads: `points` of the numbers of rows (N, channels).

        In evaluation those that are farthest from each other (`farthest_points` by pointnet2's rule, among 16,384 of a
        larger cloud), always the same. In training any of 1.17 times as many, in any order, as published. Points of
        smaller clouds come several times.

        Args:
            random: as in training; drawn by torch's generator.
        """
        count, wanted = len(rows), self.points
        chosen = torch.randperm(count) if random else torch.arange(count)
        if count > MOST:
            chosen = chosen[:MOST] if random else torch.linspace(0, count - 1, MOST, dtype=torch.float64).long()
        if count > wanted:
            sought = min(len(chosen), math.ceil(1.17 * wanted)) if random else wanted
            chosen = chosen[farthest_points(rows[chosen, :3], sought, rule="pointnet2")[0]]
        if random:
            chosen = chosen[torch.randperm(len(chosen))]
        return chosen[torch.arange(wanted) % len(chosen)]


SCAN_FEATURES = ("intensity", "elongation", "time")
"""What a model of scans may read beside the coordinates: what the scanner measured, and how old a point is."""


@dataclass(frozen=True)
class ScanPreprocess:
    """How a model of whole scenes wants its scans: all points, in metres, as the scanner saw them, z upwards.

    Attributes:
        scan_features: what it reads beside the coordinates: names of `SCAN_FEATURES`.

    Raises:
        InputError: another name, or one twice.
    """

    scan_features: tuple[str, ...] = ("intensity",)

    def __post_init__(self):
        names = self.scan_features
        if not isinstance(names, (list, tuple)) or not set(map(str, names)) <= set(SCAN_FEATURES):
            raise InputError(f"features of scans are {', '.join(SCAN_FEATURES)}, not {names!r}")
        if len(set(names)) < len(names):
            raise InputError(f"each feature of scans is named once, not as in {', '.join(names)}")
        object.__setattr__(self, "scan_features", tuple(names))

    up = "z"

    @property
    def channels(self) -> int:
        """Of a point."""
        return 3 + len(self.scan_features)

    def rows(self, cloud: PointCloud) -> Tensor:
        """All points of a cloud as the model wants them, (N, channels) float32.

        A file has one scan: its points are of age 0. Files do not tell the elongation, which is 0, too.

        Raises:
            InputError: the cloud has no intensity, and the model reads it.
        """
        columns = [cloud.points.astype(np.float32)]
        for name in self.scan_features:
            values = cloud.intensity if name == "intensity" else np.zeros(len(cloud))
            if values is None:
                raise InputError(f"the cloud has no {name}, which the model reads")
            columns.append(values.astype(np.float32).reshape(-1, 1))
        return torch.from_numpy(np.concatenate(columns, 1))


# -- augmentation -----------------------------------------------------------------------------------------------------

AUGMENTATIONS = {
    "rotate": "about the axis that points upwards, by any angle",
    "turn": "about any axis, by any angle",
    "scale": "each axis by a factor from 2/3 to 3/2",
    "shift": "along each axis by up to 0.2",
    "jitter": "each coordinate by noise of deviation 0.01, at most 0.05",
    "drop": "up to seven of eight points left out, another in place of them",
}
"""What can be done to a cloud in training, and how far; the words of PointNet++ (arXiv 1706.02413) and after."""


class PointAugment:
    """Changes clouds at random, with torch's generator; turned clouds have turned normals.

    Args:
        words: names of `AUGMENTATIONS` joined by "+", in the order in which they are done; "none" for none.
        preprocess: what the clouds were made by.

    Raises:
        InputError: an unknown word.
    """

    def __init__(self, words: str, preprocess: PointPreprocess):
        self.words = [] if words == "none" else [word.strip() for word in words.split("+")]
        if unknown := [word for word in self.words if word not in AUGMENTATIONS]:
            there = ", ".join(AUGMENTATIONS)
            raise InputError(
                f"unknown augmentation {unknown[0]!r} of clouds; there are: {there}, joined by +, and none"
            )
        self.up = "xyz".index(preprocess.up)
        self.directions = [slice(0, 3)]
        first = 3
        for name in preprocess.features:
            if name == "normals":
                self.directions.append(slice(first, first + 3))
            first += FEATURES[name]

    def __call__(self, rows: Tensor) -> Tensor:
        """(N, channels) -> the same, changed."""
        rows = rows.clone()
        for word in self.words:
            getattr(self, f"_{word}")(rows)
        return rows

    def _turn_by(self, rows: Tensor, matrix: Tensor) -> None:
        for part in self.directions:
            rows[:, part] = rows[:, part] @ matrix.T

    def _rotate(self, rows: Tensor) -> None:
        angle = 2 * math.pi * torch.rand(())
        a, b = [axis for axis in range(3) if axis != self.up]
        matrix = torch.eye(3)
        matrix[a, a] = matrix[b, b] = angle.cos()
        matrix[a, b], matrix[b, a] = -angle.sin(), angle.sin()
        self._turn_by(rows, matrix)

    def _turn(self, rows: Tensor) -> None:
        matrix, triangle = torch.linalg.qr(torch.randn(3, 3))
        matrix = matrix * triangle.diagonal().sign()  # every rotation and reflection is now equally likely
        matrix[:, 0] *= torch.linalg.det(matrix)
        self._turn_by(rows, matrix)

    def _scale(self, rows: Tensor) -> None:
        rows[:, :3] *= torch.empty(3).uniform_(2 / 3, 3 / 2)

    def _shift(self, rows: Tensor) -> None:
        rows[:, :3] += torch.empty(3).uniform_(-0.2, 0.2)

    def _jitter(self, rows: Tensor) -> None:
        rows[:, :3] += (0.01 * torch.randn(len(rows), 3)).clamp(-0.05, 0.05)

    def _drop(self, rows: Tensor) -> None:
        gone = torch.rand(len(rows)) < 0.875 * torch.rand(())
        rows[gone] = rows[(~gone).byte().argmax()].clone()
