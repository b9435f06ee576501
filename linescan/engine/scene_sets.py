"""Scans of streets with boxes around what is in them, in the layouts of KITTI and nuScenes, and digits as a street.

Boxes are in the scanner's coordinates, as `linescan.layers.boxes` has them: x forward, y to the left, z upwards, in
metres.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import BrokenCloud, InputError
from ..media.clouds import ScanPreprocess
from ..media.draw_points import PointView, draw_points
from ..media.labels import class_names
from ..media.points import PointCloud, read_points
from .cloud_sets import DigitClouds
from .image_sets import split
from .progress import progress_bar
from .scene_objects import Labelled, ObjectBank

__all__ = ["ATTRIBUTES", "SCENE_AUGMENTATIONS", "DigitStreet", "KittiScenes", "NuScenes", "Scene", "SceneAugment",
           "SceneSamples", "SceneSet", "open_scenes"]  # fmt: skip

LIMIT = 2**21
"""Points of a scan that are kept."""


@dataclass
class Scene:
    """A scan, and the boxes in it.

    Attributes:
        cloud: the points.
        boxes: (M, 7), or (M, 9) with velocities along x and y, float32.
        labels: (M,) int64 classes; -1 for what is of none, -2 - c for what may be taken for class c.
        levels: (M,) int64: from which difficulty on a box counts; 3 for never. Of KITTI 0 is easy, 1 moderate, 2 hard.
        age: (N,) seconds since each point was measured, or None.
        camera: (3, 4) from the scanner's coordinates to pixels, where there is one.
        attributes: (M,) int64 numbers of `ATTRIBUTES`, -1 for none; or None.
        ego: (2,) where the middle of the car is, as nuScenes has it; or None.
        racks: (R, 7) boxes of bicycle racks, as of nuScenes; or None.
    """

    cloud: PointCloud
    boxes: np.ndarray
    labels: np.ndarray
    levels: np.ndarray
    age: np.ndarray | None = None
    camera: np.ndarray | None = None
    attributes: np.ndarray | None = None
    ego: np.ndarray | None = None
    racks: np.ndarray | None = None


class SceneSet(ABC):
    """Scans with boxes.

    Attributes:
        classes: their names.
        names: what to call each scan in messages.
        thresholds: for each class, the IoU from which on a box is found.
        style: which metrics are the official ones: "kitti" (average precision by overlap) or "nuscenes".
        augment: how its scans are usually changed in training, in words of `SCENE_AUGMENTATIONS`.
        scaling, shifting: how far scans are scaled and shifted.
        pasted: for each class how many there are in a scan once others have been pasted into it.
        root: the folder of the data, where there is one.
        in_memory: whether reading takes no time.
    """

    classes: Sequence[str]
    names: Sequence[str]
    thresholds: Sequence[float]
    style: str = "kitti"
    augment: str = "flip+rotate+scale"
    scaling: float = 0.05
    shifting: float = 0.2
    pasted: Mapping[str, int] = {}
    root: Path | None = None
    in_memory: bool = False

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def scene(self, index: int) -> Scene:
        """Scan `index`.

        Raises:
            InputError: it cannot be read.
        """

    def sources(self) -> list[Path]:
        """The files that boxes come from."""
        return []


# -- KITTI ------------------------------------------------------------------------------------------------------------

NEIGHBOURS = {"Van": "Car", "Person_sitting": "Pedestrian"}
"""What KITTI counts neither as found nor as wrong when it is taken for another class."""


class KittiScenes(SceneSet):
    """Part of KITTI's object data: velodyne/N.bin, label_2/N.txt and calib/N.txt in one folder.

    As its benchmark does it, only points that the camera sees are read; image_2/N.png, or .jpg, tells its size, which
    is 1242 x 375 where there is none.

    Args:
        folder: `training`.
        frames: the numbers N.
    """

    classes = tuple(class_names("KITTI") or ())
    thresholds = (0.7, 0.5, 0.5)
    augment = "paste+mirror+rotate+scale"
    pasted = {"Car": 20, "Pedestrian": 15, "Cyclist": 15}

    def __init__(self, folder: Path, frames: Sequence[str]):
        self.folder, self.frames, self.root = folder, list(frames), folder.parent
        self.names = [str(folder / "velodyne" / f"{frame}.bin") for frame in self.frames]

    def scene(self, index: int) -> Scene:
        frame = self.frames[index]
        cloud = read_points(self.names[index], limit=LIMIT, columns="x y z intensity")
        calibration = read_calibration(self.folder / "calib" / f"{frame}.txt")
        camera = calibration["P2"] @ calibration["to_camera"]
        seen = in_image(cloud.points, camera, self.image_size(frame))
        cloud.points = cloud.points[seen]
        cloud.intensity = None if cloud.intensity is None else cloud.intensity[seen]
        boxes, labels, levels = self.objects(frame, calibration)
        return Scene(cloud, boxes, labels, levels, camera=camera)

    def sources(self) -> list[Path]:
        return [self.folder / name / f"{frame}.txt" for name in ("label_2", "calib") for frame in self.frames]

    def image_size(self, frame: str) -> tuple[int, int]:
        """Width and height."""
        for suffix in (".png", ".jpg"):
            if (path := self.folder / "image_2" / (frame + suffix)).is_file():
                with Image.open(path) as image:
                    return image.size
        return 1242, 375

    def objects(self, frame: str, calibration: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Boxes, classes and difficulties that the labels of a scan name; none where there are no labels."""
        path = self.folder / "label_2" / f"{frame}.txt"
        boxes, labels, levels = [], [], []
        for number, line in enumerate(path.read_text(errors="replace").splitlines() if path.is_file() else [], 1):
            kind, *fields = line.split() or ["DontCare"]
            if kind == "DontCare":
                continue
            try:
                values = [float(v) for v in fields[:14]]
                truncated, occluded, _, _, top, _, bottom, height, width, length, *place, turn = values
                if not np.isfinite(values).all():
                    raise ValueError
            except ValueError:
                raise InputError(f"{path}, line {number}: not 15 fields of a KITTI label") from None
            x, y, z = (calibration["to_scanner"] @ [*place, 1])[:3]
            boxes.append((x, y, z + height / 2, length, width, height, -(math.pi / 2 + turn)))
            own = NEIGHBOURS.get(kind, kind)
            label = self.classes.index(own) if own in self.classes else -1
            labels.append(-2 - label if kind in NEIGHBOURS and label >= 0 else label)
            levels.append(kitti_level(bottom - top, occluded, truncated))
        return (np.array(boxes, np.float32).reshape(-1, 7), np.array(labels, np.int64), np.array(levels, np.int64))


def kitti_level(pixels: float, occluded: float, truncated: float) -> int:
    """0 (easy), 1 (moderate), 2 (hard) or 3, by the height of the box in the image and by how much of it is hidden."""
    rules = ((40, 0, 0.15), (25, 1, 0.3), (25, 2, 0.5))
    return next((i for i, (h, o, t) in enumerate(rules) if pixels >= h and occluded <= o and truncated <= t), 3)


def read_calibration(path: Path) -> dict[str, np.ndarray]:
    """The tables of a calibration of KITTI, and those between the scanner's axes and the rectified camera's.

    Returns:
        "P2" (3, 4), "to_camera" and its inverse "to_scanner" (4, 4).

    Raises:
        InputError: it cannot be read, or a table is missing.
    """
    try:
        tables = {}
        for line in path.read_text().splitlines():
            name, _, values = line.partition(":")
            if values.strip():
                tables[name.strip()] = np.array(values.split(), np.float64)
        rectify, to_camera = np.eye(4), np.eye(4)
        rectify[:3, :3] = tables["R0_rect"].reshape(3, 3)
        to_camera[:3] = tables["Tr_velo_to_cam"].reshape(3, 4)
        matrix = rectify @ to_camera
        return {"P2": tables["P2"].reshape(3, 4), "to_camera": matrix, "to_scanner": np.linalg.inv(matrix)}
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except (KeyError, ValueError) as error:
        raise InputError(f"{path}: not a calibration of KITTI ({error})") from None


def project(points: np.ndarray, camera: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, 2) and depths (N,) of points (N, 3)."""
    seen = np.column_stack([points, np.ones(len(points))]) @ camera.T
    return seen[:, :2] / np.where(np.abs(seen[:, 2:]) < 1e-6, 1e-6, seen[:, 2:]), seen[:, 2]


def in_image(points: np.ndarray, camera: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Which points the camera sees, (N,) bool."""
    pixels, depth = project(points, camera)
    return (depth > 0) & ((pixels >= 0) & (pixels < size)).all(1)


# -- nuScenes ---------------------------------------------------------------------------------------------------------

NUSCENES_KINDS = {
    "movable_object.barrier": "barrier", "vehicle.bicycle": "bicycle", "vehicle.bus.bendy": "bus",
    "vehicle.bus.rigid": "bus", "vehicle.car": "car", "vehicle.construction": "construction_vehicle",
    "vehicle.motorcycle": "motorcycle", "human.pedestrian.adult": "pedestrian",
    "human.pedestrian.child": "pedestrian", "human.pedestrian.construction_worker": "pedestrian",
    "human.pedestrian.police_officer": "pedestrian", "movable_object.trafficcone": "traffic_cone",
    "vehicle.trailer": "trailer", "vehicle.truck": "truck",
}  # fmt: skip
"""The class of each category that has one in nuScenes' detection task."""


ATTRIBUTES = (
    "pedestrian.moving", "pedestrian.sitting_lying_down", "pedestrian.standing", "cycle.with_rider",
    "cycle.without_rider", "vehicle.moving", "vehicle.parked", "vehicle.stopped",
)  # fmt: skip
"""What nuScenes says of objects beside their class."""


def turned(quaternion: Sequence[float]) -> np.ndarray:
    """The rotation (3, 3) of a quaternion (w, x, y, z)."""
    w, x, y, z = np.array(quaternion, np.float64) / np.linalg.norm(quaternion)
    return np.array(
        [(1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)),
         (2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)),
         (2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y))]
    )  # fmt: skip


@contextmanager
def _tables_of_nuscenes(folder: Path) -> Iterator[None]:
    """What is missing or wrong in tables becomes a line that names their folder."""
    try:
        yield
    except InputError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise InputError(f"{folder}: not the tables of nuScenes ({reason})") from None


def pose(row: Mapping) -> np.ndarray:
    """(4, 4) from the axes that a row of `ego_pose` or `calibrated_sensor` describes to those around them."""
    matrix = np.eye(4)
    matrix[:3, :3], matrix[:3, 3] = turned(row["rotation"]), row["translation"]
    return matrix


class NuScenes(SceneSet):
    """nuScenes as it comes: samples/, sweeps/ and a folder of tables, v1.0-mini or v1.0-trainval.

    A scan is a key frame and up to `sweeps` - 1 scans before it, moved to where the car is now; the age of a point is
    one of its channels.

    Args:
        root: of the data.
        tables: the folder's name.
        scenes: names of the scenes to take; None for all.
        sweeps: scans that are joined.

    Raises:
        InputError: a table cannot be read, or lacks something; or no scene has a key frame.
    """

    classes = tuple(class_names("nuScenes") or ())
    thresholds = (0.5,) * 10
    style = "nuscenes"
    augment = "paste+flip+rotate+scale+shift"
    scaling, shifting = 0.1, 0.5
    pasted = {
        "car": 2, "truck": 3, "construction_vehicle": 7, "bus": 4, "trailer": 6, "barrier": 2, "motorcycle": 6,
        "bicycle": 6, "pedestrian": 2, "traffic_cone": 2,
    }  # fmt: skip

    def __init__(self, root: Path, tables: str, scenes: Sequence[str] | None = None, sweeps: int = 10):
        self.root, self.folder, self.sweeps = root, root / tables, sweeps
        with _tables_of_nuscenes(self.folder):
            self._link(scenes)
        if not self.keys:
            raise InputError(f"{self.folder}: no key frame of the scenes {', '.join(scenes or ())}"[:200])

    def _link(self, scenes: Sequence[str] | None) -> None:
        """Reads the tables, and finds what belongs together."""
        rows = {name: self.table(name) for name in ("ego_pose", "calibrated_sensor", "category", "instance", "sample")}
        data = self.table("sample_data")
        self.ego, self.sensor, self.samples = rows["ego_pose"], rows["calibrated_sensor"], rows["sample"]
        scans = {token: row for token, row in data.items() if "/LIDAR_TOP/" in row["filename"]}
        self.scans = scans
        keys = {row["sample_token"]: row for row in scans.values() if row["is_key_frame"]}
        named = {row["token"]: row["name"] for row in self.table("scene").values()}
        wanted = set(named.values()) if scenes is None else set(scenes)
        chosen = [s for s in self.samples.values() if named.get(s["scene_token"]) in wanted and s["token"] in keys]
        chosen.sort(key=lambda s: (named[s["scene_token"]], s["timestamp"]))
        self.keys = [keys[s["token"]] for s in chosen]
        self.names = [str(self.root / row["filename"]) for row in self.keys]
        kinds = {token: row["name"] for token, row in rows["category"].items()}
        self.kind = {token: kinds[row["category_token"]] for token, row in rows["instance"].items()}
        self.annotations = self.table("sample_annotation")
        self.attribute: dict[str, int] = {}
        if (self.folder / "attribute.json").is_file():
            named = {token: row["name"] for token, row in self.table("attribute").items()}
            self.attribute = {token: ATTRIBUTES.index(name) for token, name in named.items() if name in ATTRIBUTES}
        self.boxes_of: dict[str, list[dict]] = {}
        for row in self.annotations.values():
            self.boxes_of.setdefault(row["sample_token"], []).append(row)

    def sources(self) -> list[Path]:
        return sorted(self.folder.glob("*.json"))

    def table(self, name: str) -> dict[str, dict]:
        """The rows of a table by their tokens."""
        path = self.folder / f"{name}.json"
        try:
            return {row["token"]: row for row in json.loads(path.read_text())}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not a table of nuScenes ({error})") from None

    def to_world(self, row: Mapping) -> np.ndarray:
        """(4, 4) from the scanner's axes to the map's, of a row of sample_data."""
        return pose(self.ego[row["ego_pose_token"]]) @ pose(self.sensor[row["calibrated_sensor_token"]])

    def scene(self, index: int) -> Scene:
        with _tables_of_nuscenes(self.folder):
            return self._joined(self.keys[index])

    def _joined(self, key: Mapping) -> Scene:
        """A key frame and the scans before it."""
        from_world = np.linalg.inv(self.to_world(key))
        points, intensity, age, row = [], [], [], key
        for number in range(self.sweeps):
            try:
                cloud = read_points(self.root / row["filename"], limit=LIMIT, columns="x y z intensity ring")
            except BrokenCloud:
                if not number:
                    raise
                break  # an older scan that is not there leaves fewer points
            far = (np.abs(cloud.points[:, :2]) > 1).any(1)  # the car itself is not
            move = from_world @ self.to_world(row)
            points.append(cloud.points[far] @ move[:3, :3].T + move[:3, 3])
            intensity.append(cloud.intensity[far])
            age.append(np.full(far.sum(), (key["timestamp"] - row["timestamp"]) * 1e-6))
            if row["prev"] not in self.scans:
                break
            row = self.scans[row["prev"]]
        cloud = PointCloud(np.concatenate(points).astype(np.float32), np.concatenate(intensity))
        rows = self.boxes_of.get(key["sample_token"], [])
        racks = [row for row in rows if self.kind[row["instance_token"]] == "static_object.bicycle_rack"]
        found = [attributes[0] for row in rows for attributes in [[*row.get("attribute_tokens", ()), ""]]]
        ego = np.linalg.inv(pose(self.sensor[key["calibrated_sensor_token"]]))[:2, 3]
        boxes, labels, levels = self.objects(rows, from_world)
        return Scene(
            cloud,
            boxes,
            labels,
            levels,
            np.concatenate(age),
            attributes=np.array([self.attribute.get(token, -1) for token in found], np.int64),
            ego=ego,
            racks=self.objects(racks, from_world)[0][:, :7],
        )

    def objects(self, rows: Sequence[Mapping], from_world: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Boxes with velocities, classes, and 3 as the level of boxes without a point."""
        boxes, labels, levels = [], [], []
        for row in rows:
            centre = from_world @ [*row["translation"], 1]
            turn = from_world[:3, :3] @ turned(row["rotation"])
            width, length, height = row["size"]
            velocity = from_world[:3, :3] @ self.velocity(row)
            boxes.append((*centre[:3], length, width, height, math.atan2(turn[1, 0], turn[0, 0]), *velocity[:2]))
            kind = NUSCENES_KINDS.get(self.kind[row["instance_token"]])
            labels.append(self.classes.index(kind) if kind else -1)
            levels.append(0 if row["num_lidar_pts"] + row["num_radar_pts"] else 3)
        return np.array(boxes, np.float32).reshape(-1, 9), np.array(labels, np.int64), np.array(levels, np.int64)

    def velocity(self, row: Mapping) -> np.ndarray:
        """Metres per second in the map's axes, by where the object is before and after; NaN where it is not known."""
        ends = [self.annotations.get(row[name], row) for name in ("prev", "next")]
        first, last = (self.samples[end["sample_token"]]["timestamp"] * 1e-6 for end in ends)
        if not 0 < last - first <= 1.5 * (2 if ends[0] is not row and ends[1] is not row else 1):
            return np.full(3, np.nan)
        return np.subtract(ends[1]["translation"], ends[0]["translation"]) / (last - first)


# -- digits -----------------------------------------------------------------------------------------------------------


@dataclass
class DigitStreet(SceneSet):
    """Scikit-learn's digits on boards that stand in a street, seen from its middle: made, not read.

    A street is 25.6 m long and wide, with noise on its ground. Three to six boards of 2.4 m stand in it, facing one
    side, more or less; the points of each become fewer with the distance.

    Args:
        held_out: the held-out digits rather than those to train on.
        count: how many streets.
        by_digit: whether each digit is a class; else there is one, "digit".
    """

    held_out: bool
    count: int = 160
    by_digit: bool = False
    in_memory: bool = True
    made: dict[int, Scene] = field(default_factory=dict)

    low, high = (-12.8, -12.8, -1.0), (12.8, 12.8, 3.0)

    def __post_init__(self):
        self.digits = DigitClouds(self.held_out)
        self.classes = self.digits.classes if self.by_digit else ("digit",)
        self.thresholds = (0.5,) * len(self.classes)
        self.names = [f"street {i}" for i in range(self.count)]

    def scene(self, index: int) -> Scene:
        if index not in self.made:
            self.made[index] = self._make(index)
        return self.made[index]

    def _make(self, index: int) -> Scene:
        dice = np.random.default_rng((int(self.held_out), index))
        ground = np.column_stack([dice.uniform(-12.8, 12.8, (800, 2)), dice.normal(0, 0.03, 800)])
        parts, boxes, labels = [ground], [], []
        for _ in range(dice.integers(3, 7)):
            place, turn = dice.uniform(-10.5, 10.5, 2), dice.uniform(-1, 1)
            if any(np.hypot(*(place - box[:2])) < 3.5 for box in boxes):
                continue
            which = int(dice.integers(len(self.digits)))
            count = int(np.clip(2500 / max(np.hypot(*place), 2), 150, 700))
            points, _ = DigitClouds.extrude(self.digits.pixels[which], count, dice)
            points = 1.2 * points + (0, 0.24, 1.2)  # the board is 2.4 m wide and high, 0.48 m deep with its strokes
            cos, sin = math.cos(turn), math.sin(turn)
            x, y = points[:, 0] * cos - points[:, 1] * sin, points[:, 0] * sin + points[:, 1] * cos
            parts.append(np.column_stack([x + place[0], y + place[1], points[:, 2]]))
            boxes.append((*place, 1.2, 2.4, 0.56, 2.4, turn))
            labels.append(self.digits.labels[which] if self.by_digit else 0)
        points = np.concatenate(parts).astype(np.float32)
        intensity = np.concatenate([np.full(len(p), float(i > 0)) for i, p in enumerate(parts)])
        intensity = (0.3 * intensity + dice.uniform(0, 0.7, len(points))).astype(np.float32)
        cloud = PointCloud(points, intensity, total=len(points))
        return Scene(cloud, np.array(boxes, np.float32), np.array(labels, np.int64), np.zeros(len(boxes), np.int64))


# -- opening ----------------------------------------------------------------------------------------------------------


def open_scenes(data: str, fraction: float = 0.1, sweeps: int = 10) -> tuple[SceneSet, SceneSet]:
    """The training set and the held-out set.

    Args:
        data: "digits"; KITTI's folder, with training/velodyne in it; or nuScenes', with v1.0-trainval or v1.0-mini in
            it. KITTI's ImageSets/train.txt and val.txt name frames; nuScenes' train.txt and val.txt scenes.
        fraction: that is held out (of nuScenes: of its scenes), where there are no such lists.
        sweeps: of `NuScenes`.

    Raises:
        InputError: there is no such layout, or one part of it is empty.
    """
    if data == "digits":
        return DigitStreet(False), DigitStreet(True, 40)
    root = Path(data)
    if (root / "training" / "velodyne").is_dir():
        frames = sorted(path.stem for path in (root / "training" / "velodyne").glob("*.bin"))
        parts = _parts(root / "ImageSets", frames, fraction, "frames")
        return tuple(KittiScenes(root / "training", part) for part in parts)
    tables = next((name for name in ("v1.0-trainval", "v1.0-mini") if (root / name).is_dir()), None)
    if tables:
        try:
            scenes = sorted(row["name"] for row in json.loads((root / tables / "scene.json").read_text()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{root / tables / 'scene.json'}: not a table of nuScenes ({error})") from None
        return tuple(NuScenes(root, tables, part, sweeps) for part in _parts(root, scenes, fraction, "scenes"))
    raise InputError(
        f"{data} is no data set of scenes: KITTI has training/velodyne in it, nuScenes v1.0-trainval or v1.0-mini"
    )


def _parts(folder: Path, names: Sequence[str], fraction: float, what: str) -> tuple[list[str], list[str]]:
    """Which are trained on, and which are held out: by lists in a folder, or a share of them."""
    lists = [folder / f"{part}.txt" for part in ("train", "val")]
    if all(path.is_file() for path in lists):
        texts = [path.read_text(errors="replace") for path in lists]
        parts = [[line.strip() for line in text.splitlines() if line.strip()] for text in texts]
    elif len(names) < 2:
        parts = [list(names), []]
    else:
        held = set(split([0] * len(names), True, fraction))
        parts = [[n for i, n in enumerate(names) if i not in held], [n for i, n in enumerate(names) if i in held]]
    if not all(parts):
        raise InputError(f"{folder}: {len(parts[0])} {what} to train on and {len(parts[1])} held out")
    return parts[0], parts[1]


# -- samples ----------------------------------------------------------------------------------------------------------

SCENE_AUGMENTATIONS = {
    "paste": "objects of other scans added",
    "flip": "mirrored along x, along y, or both",
    "mirror": "left and right exchanged, for scans of what is in front",
    "rotate": "about the z axis by up to 45 degrees",
    "scale": "by a factor from 0.95 to 1.05, of nuScenes from 0.9 to 1.1",
    "shift": "along each axis by noise of deviation 0.2 m, of nuScenes 0.5 m",
}
"""What can be done to a scene in training, and how far."""


class SceneAugment:
    """Changes scenes at random, points and boxes alike, with torch's generator.

    Args:
        words: names of `SCENE_AUGMENTATIONS` joined by "+"; "none" for none. "paste" is for `SceneSamples` to do.
        scaling: how much a factor differs from 1 at most.
        shifting: deviation in metres.

    Raises:
        InputError: an unknown word.
    """

    def __init__(self, words: str, scaling: float = 0.05, shifting: float = 0.2):
        self.words = [] if words == "none" else [word.strip() for word in words.split("+")]
        if unknown := [word for word in self.words if word not in SCENE_AUGMENTATIONS]:
            there = ", ".join(SCENE_AUGMENTATIONS)
            raise InputError(
                f"unknown augmentation {unknown[0]!r} of scenes; there are: {there}, joined by +, and none"
            )
        self.scaling, self.shifting = scaling, shifting

    def __call__(self, rows: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Points (N, 3 or more) and boxes (M, 7 or 9) -> the same, changed."""
        rows, boxes = rows.clone(), boxes.clone()
        for word in self.words:
            if word != "paste":
                getattr(self, f"_{word}")(rows, boxes)
        return rows, boxes

    def _flip(self, rows: Tensor, boxes: Tensor) -> None:
        for axis in range(2):
            self._mirror(rows, boxes, axis)

    def _mirror(self, rows: Tensor, boxes: Tensor, axis: int = 1) -> None:
        if torch.rand(()) < 0.5:
            rows[:, axis] *= -1
            boxes[:, axis] *= -1
            boxes[:, 6] = (torch.pi if axis == 0 else 0) - boxes[:, 6]
            boxes[:, 7 + axis : 8 + axis] *= -1

    def _rotate(self, rows: Tensor, boxes: Tensor) -> None:
        angle = (torch.rand(()) - 0.5) * torch.pi / 2
        cos, sin = angle.cos(), angle.sin()
        matrix = torch.stack([torch.stack([cos, -sin]), torch.stack([sin, cos])])
        rows[:, :2] = rows[:, :2] @ matrix.T
        boxes[:, :2] = boxes[:, :2] @ matrix.T
        boxes[:, 6] += angle
        if boxes.shape[1] > 7:
            boxes[:, 7:] = boxes[:, 7:] @ matrix.T

    def _scale(self, rows: Tensor, boxes: Tensor) -> None:
        factor = torch.empty(()).uniform_(1 - self.scaling, 1 + self.scaling)
        rows[:, :3] *= factor
        boxes[:, :6] *= factor
        boxes[:, 7:] *= factor

    def _shift(self, rows: Tensor, boxes: Tensor) -> None:
        step = self.shifting * torch.randn(3)
        rows[:, :3] += step
        boxes[:, :3] += step


class SceneSamples(Dataset):
    """Items {"points": (N, channels), "boxes": (M, 7 or 9), "labels", "levels", ...}; batches have packed points.

    In training boxes without a class are left out, and of nuScenes those without a point; what is not known of
    velocities is 0.

    Args:
        scenes: the set.
        preprocess: how the model wants its scans.
        augment: in training: what is done to them; None as in evaluation.
        pasting: epochs in which objects are pasted, where `augment` says so; None for all.

    Attributes:
        epoch: the number of the epoch, from 0.
    """

    epoch = 0

    def __init__(
        self, scenes: SceneSet, preprocess: ScanPreprocess, augment: str | None = None, pasting: int | None = None
    ):
        self.scenes, self.preprocess, self.pasting = scenes, preprocess, pasting
        self.augment = None if augment is None else SceneAugment(augment, scenes.scaling, scenes.shifting)
        self.in_memory = scenes.in_memory
        self.bank = self.cut_objects() if self.augment and "paste" in self.augment.words else None

    @property
    def names(self) -> Sequence[str]:
        """What to call each sample."""
        return self.scenes.names

    def preview(self, index: int) -> Image.Image:
        """A sample as it is shown."""
        scene = self.scenes.scene(index)
        known = scene.labels >= 0
        view = PointView(scene.cloud.points, boxes=scene.boxes[known, :7], box_labels=scene.labels[known],
                         classes=list(self.scenes.classes))  # fmt: skip
        return draw_points(view, 336)

    def __len__(self) -> int:
        return len(self.scenes)

    def cut_objects(self) -> ObjectBank:
        """The objects of all scans; kept in the folder `linescan` of that of the data, where it can be written.

        They are cut out anew when a file that boxes come from has changed.
        """

        def scans() -> Iterator[Labelled]:
            for i in range(len(self)):
                with suppress(InputError):  # named when it is trained on
                    yield self.labelled(i, self.scenes.scene(i))

        def cut() -> ObjectBank:
            with progress_bar("cutting out objects", len(self)) as advance:
                return ObjectBank.cut(scans(), advance)

        if self.scenes.root is None:
            return cut()
        how = self.preprocess.scan_features, getattr(self.scenes, "sweeps", 1)
        stamps = [(path.stat().st_size, path.stat().st_mtime_ns) for path in self.scenes.sources() if path.is_file()]
        facts = {"scans": [Path(name).name for name in self.names], "how": how, "boxes": stamps}
        return ObjectBank.kept(self.scenes.root / "linescan", facts, cut)

    def labelled(self, index: int, scene: Scene) -> Labelled:
        """The points of a scene as the model reads them, and its boxes."""
        try:
            rows = self.preprocess.rows(scene.cloud)
        except InputError as error:
            raise InputError(f"{self.names[index]}: {error}") from None
        if scene.age is not None and "time" in self.preprocess.scan_features:
            rows[:, 3 + self.preprocess.scan_features.index("time")] = torch.from_numpy(scene.age)
        return Labelled(rows, *(torch.from_numpy(x) for x in (scene.boxes, scene.labels, scene.levels)))

    def __getitem__(self, index: int) -> dict:
        scene = self.scenes.scene(index)
        scan = self.labelled(index, scene)
        if self.augment is not None:
            if self.bank is not None and (self.pasting is None or self.epoch < self.pasting):
                wanted = {self.scenes.classes.index(name): n for name, n in self.scenes.pasted.items()}
                scan = self.bank.paste(scan, wanted)
            rows, boxes = self.augment(scan.rows, scan.boxes)
            known = scan.labels >= 0
            if self.scenes.style == "nuscenes":
                known &= scan.levels < 3
            return {"points": rows, "boxes": boxes[known].nan_to_num(0), "labels": scan.labels[known], "index": index}
        none = {"camera": (0, 4), "ego": (2,), "racks": (0, 7)}
        beside = {name: np.zeros(shape) if (x := getattr(scene, name)) is None else x for name, shape in none.items()}
        beside["attributes"] = np.full(len(scan.labels), -1) if scene.attributes is None else scene.attributes
        return {"points": scan.rows, "boxes": scan.boxes, "labels": scan.labels, "levels": scan.levels, "index": index,
                **{name: torch.from_numpy(x) for name, x in beside.items()}}  # fmt: skip

    @staticmethod
    def collate(samples: Sequence[Mapping]) -> dict:
        """Points packed, with "lengths"; all else as lists."""
        batch = {name: [sample[name] for sample in samples] for name in samples[0]}
        lengths = [len(points) for points in batch["points"]]
        return batch | {"points": torch.cat(batch["points"]), "lengths": lengths}
