"""Sets of point clouds, with classes and labels of points, and the samples that are made of them."""

import json
import random
from abc import ABC, abstractmethod
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import InputError
from ..media.clouds import PointAugment, PointPreprocess
from ..media.draw_points import PointView, draw_points
from ..media.find import find_clouds
from ..media.labels import class_names
from ..media.points import PointCloud, column_names, read_points
from .image_sets import Digits, class_folders, roots, split

__all__ = [
    "CloudFiles", "CloudSamples", "CloudSet", "DigitClouds", "PARTS_OF_DIGITS", "Parts", "cloud_classes",
    "every_cloud", "few_shot", "has_classes", "open_clouds",
]  # fmt: skip

MOST_READ = 2**16
"""Points of a file that are kept, drawn evenly over the file, of which a sample takes its own."""


class CloudSet(ABC):
    """Clouds with classes.

    Attributes:
        classes: the name of each class.
        labels: the class of each cloud.
        names: what to call each cloud in messages; the path where there is one.
        in_memory: whether reading takes no time.
    """

    classes: Sequence[str] = ()
    labels: Sequence[int]
    names: Sequence[str]
    in_memory: bool = False

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def cloud(self, index: int) -> PointCloud:
        """Cloud `index`.

        Raises:
            InputError: it cannot be read.
        """


class CloudFiles(CloudSet):
    """Files, each of a class.

    Args:
        files: pairs of a path and the number of its class.
        classes: their names.
        columns: of formats without names, as `read_points` takes them.

    Raises:
        InputError: wrong columns.
    """

    def __init__(self, files: Sequence[tuple[Path, int]], classes: Sequence[str] = (), columns: str | None = None):
        self.names = [str(path) for path, _ in files]
        self.labels = [label for _, label in files]
        self.classes, self.columns = list(classes), column_names(columns)

    def cloud(self, index: int) -> PointCloud:
        return read_points(self.names[index], limit=MOST_READ, columns=self.columns)


# -- digits -----------------------------------------------------------------------------------------------------------

PARTS_OF_DIGITS = ("board", "stroke")


class DigitClouds(CloudSet):
    """Scikit-learn's digits as clouds of 1,024 points: strokes as thick as they are dark, standing on a board.

    The board is upright, turned about the vertical axis z by up to 30 degrees either way and tilted by up to 10; points
    have noise of 1 % of the board's side. Labels of points are `PARTS_OF_DIGITS`. The same digits are held out as for
    images.

    Args:
        held_out: the held-out digits rather than those to train on.

    Attributes:
        turns: by which angle each of the clouds that were made is turned, in radians.
    """

    classes = Digits.classes
    in_memory = True
    points = 1024

    def __init__(self, held_out: bool):
        images = Digits(held_out)
        self.pixels, self.labels, self.names = images.pixels, images.labels, images.names
        self.made: dict[int, PointCloud] = {}
        self.turns: dict[int, float] = {}

    def cloud(self, index: int) -> PointCloud:
        if index not in self.made:
            self.made[index] = self._make(index)
        return self.made[index]

    def _make(self, index: int) -> PointCloud:
        dice = np.random.default_rng(int(self.names[index].rpartition(" ")[2]))
        points, labels = self.extrude(self.pixels[index], self.points, dice)
        turn, tilt = np.radians((dice.uniform(-30, 30), dice.uniform(-10, 10)))
        self.turns[index] = turn
        return PointCloud((points @ _about("x", tilt) @ _about("z", turn)).astype(np.float32), labels=labels,
                          total=len(points))  # fmt: skip

    @staticmethod
    def extrude(pixels: np.ndarray, count: int, dice: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A digit (8, 8) of bytes, in front of its board, which covers -1..1 in x and z: (count, 3), labels (count,).

        Three of four points are the stroke's: drawn in the plane by how dark it is there, and up to 0.4 in front of it.
        """
        strokes = 3 * count // 4
        dark = pixels.astype(np.float64) ** 3
        cell = dice.choice(64, strokes, p=dark.flatten() / dark.sum())
        row, column = (np.divmod(cell, 8) + dice.uniform(0, 1, (2, strokes))) / 4 - 1
        stroke = np.stack([column, dice.uniform(-0.4, 0, strokes), -row], 1)
        board = dice.uniform(-1, 1, (count - strokes, 3)) * (1, 0, 1)
        points = np.concatenate([board, stroke]) + dice.normal(0, 0.02, (count, 3))
        labels = (np.arange(count) >= count - strokes).astype(np.int64)
        order = dice.permutation(count)
        return points[order], labels[order]


def _about(axis: str, angle: float) -> np.ndarray:
    """For rows on the left: a turn about "x" or "z"."""
    cos, sin = np.cos(angle), np.sin(angle)
    if axis == "x":
        return np.array([(1, 0, 0), (0, cos, sin), (0, -sin, cos)])
    return np.array([(cos, sin, 0), (-sin, cos, 0), (0, 0, 1)])


# -- folders ----------------------------------------------------------------------------------------------------------


def cloud_classes(data: str, val: str | None = None) -> list[str]:
    """The classes of what `open_clouds` opens.

    Raises:
        InputError: no folder of classes.
    """
    if data == "digits":
        return list(DigitClouds.classes)
    return _classes(roots(data, val)[0])


def has_classes(data: str, val: str | None = None) -> bool:
    """Whether the folder has folders in it, of classes; False for "digits"."""
    root, _ = roots(data, val)
    return data != "digits" and root.is_dir() and any(p.is_dir() and not p.name.startswith(".") for p in root.iterdir())


def open_clouds(
    data: str,
    val: str | None = None,
    fraction: float = 0.1,
    labelled: bool = True,
    columns: str | None = None,
) -> tuple[CloudSet, CloudSet]:
    """The training set and the held-out set.

    What is held out is, whichever is there first: `val`; a folder `val` or `test` beside `train`, in `data` or in each
    of its classes (ModelNet40); what the lists say that come with ModelNet40 and ShapeNetPart; or `fraction` of each
    class.

    Args:
        data: "digits"; or a folder of classes; or a folder with `train` and `val` (or `test`) folders of classes in it.
        val: a folder of classes to hold out.
        fraction: of each class that is held out, where nothing says what.
        labelled: False for files of any folders, without classes.
        columns: of formats without names, as `read_points` takes them.

    Raises:
        InputError: a folder is missing, empty, or holds a class that the training set does not have.
    """
    if data == "digits":
        return DigitClouds(held_out=False), DigitClouds(held_out=True)
    root, val = roots(data, val)
    classes = _classes(root) if labelled else []
    files = _files(root, classes)
    if val is not None:
        return CloudFiles(files, classes, columns), CloudFiles(_files(val, classes), classes, columns)
    parts = _published_parts(root, [path for path, _ in files])
    if parts is None:
        held = set(split([label for _, label in files], True, fraction, classes))
        parts = ["test" if i in held else "train" for i in range(len(files))]
    return tuple(
        CloudFiles([file for file, part in zip(files, parts) if part == wanted], classes, columns)
        for wanted in ("train", "test")
    )


def every_cloud(data: str, classes: Sequence[str], columns: str | None = None) -> CloudSet:
    """All clouds of a folder of these classes, or of as many other ones, which then stand in their order.

    Where the folder says which of its clouds are for testing, these are taken; of "digits" those held out.

    Args:
        data: as `open_clouds` takes it.
        classes: of the model; empty for files of any folders.
        columns: of formats without names.

    Raises:
        InputError: the folder is missing, empty, or has another number of classes.
    """
    if data == "digits":
        clouds = DigitClouds(held_out=True)
    else:
        root = Path(data)
        if any((root / part).is_dir() for part in ("val", "test")) and (root / "train").is_dir():
            root = roots(data, None)[1]
        found = _classes(root) if classes else []
        names = list(classes) if set(found) <= set(classes) else found
        files = _files(root, names)
        parts = _published_parts(root, [path for path, _ in files])
        clouds = CloudFiles([f for i, f in enumerate(files) if parts is None or parts[i] == "test"], names, columns)
    if classes and len(clouds.classes) != len(classes):
        raise InputError(f"{data} has {len(clouds.classes)} classes, the model {len(classes)}")
    return clouds


def _class_folders(root: Path) -> list[str]:
    """Folders that hold clouds; lists, meshes' textures and the like may lie beside them."""
    return [name for name in class_folders(root) if name not in ("train_test_split",)]


def _classes(root: Path) -> list[str]:
    """The names of the classes that the folder has."""
    spoken = _spoken(root)
    return [spoken.get(name, name) for name in _class_folders(root)]


def _spoken(root: Path) -> dict[str, str]:
    """The names of ShapeNet's categories, whose folders are numbers."""
    path = root / "synsetoffset2category.txt"
    pairs = [line.split() for line in path.read_text(errors="replace").splitlines()] if path.is_file() else []
    return {pair[1]: pair[0] for pair in pairs if len(pair) == 2}


def _files(root: Path, classes: Sequence[str]) -> list[tuple[Path, int]]:
    """All clouds below `root`, each with its class; without classes all with 0."""
    if not classes:
        files = [(path, 0) for path in find_clouds(root)]
    else:
        spoken, files = _spoken(root), []
        for folder in _class_folders(root):
            if (name := spoken.get(folder, folder)) not in classes:
                raise InputError(f"{root} holds the class {name!r}, which is none of the {len(classes)} known")
            files += [(path, classes.index(name)) for path in find_clouds(root / folder)]
    if not files:
        raise InputError(f"{root} holds no point clouds")
    return files


def _published_parts(root: Path, files: Sequence[Path]) -> list[str] | None:
    """ "train", "test" or "" (neither) for each file, if the folder says so: by lists of names, or by folders."""
    names: dict[str, str] = {}
    for part in ("train", "test"):
        lists = sorted(root.glob(f"*_{part}.txt"), key=lambda path: path.stat().st_size)[-1:]
        lines = [line.strip() for path in lists for line in path.read_text(errors="replace").splitlines()]
        names |= {line: part for line in lines if line}
    for path in (root / "train_test_split").glob("shuffled_*_file_list.json"):
        part = "test" if "_test_" in path.name else "train"  # their authors train on train and val
        try:
            names |= {Path(name).name: part for name in json.loads(path.read_text())}
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}: not a list of names ({error})") from None
    if names:
        parts = [names.get(path.stem, "") for path in files]
    else:
        within = [path.relative_to(root).parts[1:-1] for path in files]
        parts = [next((p for p in ("train", "test") if p in inner), "") for inner in within]
    there = Counter(parts)
    return parts if there["train"] and there["test"] else None


class ChosenClouds(CloudSet):
    """Some of the clouds of a set.

    Args:
        clouds: the set.
        chosen: their indices.
    """

    def __init__(self, clouds: CloudSet, chosen: Sequence[int]):
        self.clouds, self.chosen = clouds, list(chosen)
        self.classes, self.in_memory = clouds.classes, clouds.in_memory
        self.names = [clouds.names[i] for i in self.chosen]
        self.labels = [clouds.labels[i] for i in self.chosen]

    def cloud(self, index: int) -> PointCloud:
        return self.clouds.cloud(self.chosen[index])


def few_shot(train: CloudSet, held_out: CloudSet, ways: int, shots: int, fold: int) -> tuple[CloudSet, CloudSet]:
    """A few-shot experiment (Point-BERT, arXiv 2111.14819): few clouds of few classes, scored on 20 others of each.

    Args:
        train, held_out: what is drawn from.
        ways: how many classes.
        shots: clouds of each to train on.
        fold: of the draw.

    Raises:
        InputError: there are fewer classes, or fewer clouds of one.
    """
    dice = random.Random(fold)
    if ways > len(train.classes):
        raise InputError(f"{ways} classes are wanted for few shots, and {len(train.classes)} are there")
    chosen = sorted(dice.sample(range(len(train.classes)), ways))

    def draw(clouds: CloudSet, count: int, least: int) -> CloudSet:
        members = []
        for label in chosen:
            own = [i for i, other in enumerate(clouds.labels) if other == label]
            if len(own) < least:
                raise InputError(f"{least} clouds of {train.classes[label]} are wanted, and {len(own)} are there")
            members += dice.sample(own, min(count, len(own)))
        return ChosenClouds(clouds, members)

    return draw(train, shots, shots), draw(held_out, 20, 1)


# -- parts ------------------------------------------------------------------------------------------------------------


class Parts:
    """What the labels of points mean: parts of objects of several categories, or of one.

    The label L of a point of an object of category C is the part "C/L" where a part has this name, else part number L.
    Without categories it is the part "L", else number L. A label below 0 is none.

    Args:
        names: of the parts, "category/part"; or plain names, of parts that all objects have.

    Attributes:
        categories: their names; empty without.
        members: for each category the numbers of its parts.
    """

    def __init__(self, names: Sequence[str]):
        self.names = list(names)
        kinds = [name.rpartition("/")[0] for name in self.names]
        self.categories = list(dict.fromkeys(kinds)) if all(kinds) else []
        whole = [list(range(len(self.names)))]
        self.members = [[i for i, k in enumerate(kinds) if k == c] for c in self.categories] or whole
        self.numbers = {name: i for i, name in enumerate(self.names)}

    def number(self, labels: np.ndarray, category: str) -> np.ndarray:
        """Labels of the points of an object as numbers of parts; -1 where there is none.

        Raises:
            InputError: a label that is no part.
        """
        values, place = np.unique(labels, return_inverse=True)
        prefix = f"{category}/" if self.categories else ""
        numbers = [-1 if v < 0 else self.numbers.get(f"{prefix}{v}", v) for v in values.tolist()]
        if max(numbers, default=0) >= len(self.names):
            raise InputError(f"a point has the label {values.max()}, and there are {len(self.names)} parts")
        return np.array(numbers, np.int64)[place.reshape(-1)]

    @classmethod
    def of(cls, data: str, clouds: CloudSet, progress: Callable[[float], None] = lambda share: None) -> "Parts":
        """The parts of a data set: by parts.txt in its folder (a name each line), ShapeNetPart's, or by its labels.

        Args:
            data: as `open_clouds` takes it.
            clouds: the training set, which is read through where nothing names the parts.
            progress: called with 1 after each cloud.

        Raises:
            InputError: no point has a label, or a file cannot be read.
        """
        if data == "digits":
            return cls(PARTS_OF_DIGITS)
        for root in (Path(data), roots(data, None)[0]):
            if (path := root / "parts.txt").is_file():
                names = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
                if not names or len(set(names)) < len(names):
                    raise InputError(f"{path} holds no names, or one twice")
                return cls(names)
            if _spoken(root):
                return cls(class_names("ShapeNetPart"))
        found: set[tuple[int, int]] = set()
        for i, category in enumerate(clouds.labels):
            with suppress(InputError):  # named when it is trained on
                if (labels := clouds.cloud(i).labels) is not None:
                    found |= {(category, label) for label in np.unique(labels).tolist() if label >= 0}
            progress(1)
        if not found:
            raise InputError(
                f"no point of the clouds in {data} has a label; a column without a name that holds them is named by "
                "--columns, as in 'x y z label'"
            )
        kinds = clouds.classes
        return cls([f"{kinds[category]}/{label}" if kinds else str(label) for category, label in sorted(found)])


# -- samples ----------------------------------------------------------------------------------------------------------


class CloudSamples(Dataset):
    """Items {"input": (N, channels), "label": the class, "index": its number}, with parts also "points" (N,).

    Args:
        clouds: the set.
        preprocess: how the model wants its clouds.
        augment: in training: any of the points, changed so; None as in evaluation, always the same points.
        votes: in evaluation: so many draws of points, changed by `augment`, stacked in front: (votes, N, channels).
        parts: what the labels of points mean, where they are wanted; "label" is then the number of the category.
    """

    def __init__(
        self,
        clouds: CloudSet,
        preprocess: PointPreprocess,
        augment: str | None = None,
        votes: int = 0,
        parts: Parts | None = None,
    ):
        self.clouds, self.preprocess, self.votes, self.parts = clouds, preprocess, votes, parts
        self.augment = None if augment is None else PointAugment(augment, preprocess)
        self.in_memory = clouds.in_memory

    @property
    def names(self) -> Sequence[str]:
        """What to call each sample."""
        return self.clouds.names

    def preview(self, index: int) -> Image.Image:
        """A sample as it is shown."""
        cloud = self.clouds.cloud(index)
        return draw_points(PointView(cloud.points, colours=cloud.colours, up=self.preprocess.up), 336)

    def __len__(self) -> int:
        return len(self.clouds)

    def __getitem__(self, index: int) -> dict:
        name, cloud = self.clouds.names[index], self.clouds.cloud(index)
        try:
            rows = self.preprocess.rows(cloud)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        draws = [self._draw(rows) for _ in range(max(self.votes, 1))]
        points = torch.stack([points for points, _ in draws]) if self.votes else draws[0][0]
        label = self.clouds.labels[index]
        if not self.parts:
            return {"input": points, "label": label, "index": index}
        category = self.clouds.classes[label] if self.parts.categories else ""
        if cloud.labels is None:
            raise InputError(f"{name}: its points have no labels")
        if category and category not in self.parts.categories:
            raise InputError(f"{name}: no parts of {category} are known")
        try:
            numbers = self.parts.number(cloud.labels, category)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        label = self.parts.categories.index(category) if category else 0
        return {"input": points, "label": label, "index": index, "points": torch.from_numpy(numbers)[draws[0][1]]}

    def _draw(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The model's points, and which they are."""
        chosen = self.preprocess.choose(rows, random=self.augment is not None)
        points = rows[chosen]
        return points if self.augment is None else self.augment(points), chosen
