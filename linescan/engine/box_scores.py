"""How well boxes in scans are found: by the metrics of KITTI and of nuScenes.

`kitti_precision` and `nuscenes_scores` are plain functions of tables; `BoxScores` collects what a model finds.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..layers.boxes import Boxes, corners, iou_3d, points_in_boxes
from .scene_sets import ATTRIBUTES, SceneSamples, project
from .scores import Evaluator, Totals

__all__ = ["BoxScores", "Found", "Objects", "average_precision", "kitti_precision", "nuscenes_scores"]

RECALLS = 40  # positions of recall at which KITTI reads precision
LEVELS = ("easy", "moderate", "hard")


class Found(NamedTuple):
    """What is compared in one scan, of one class.

    Attributes:
        overlaps: (D, G) IoU of each box that was found with each that is there.
        scores: (D,).
        truth: (G,): 0 where a box counts, 1 where finding it is neither right nor wrong.
        small: (D,) bool: boxes that are too small to count where they are wrong.
    """

    overlaps: np.ndarray
    scores: np.ndarray
    truth: np.ndarray
    small: np.ndarray


def kitti_precision(scans: Sequence[Found], threshold: float) -> float:
    """Average precision at 40 positions of recall, as KITTI's benchmark computes it, in per cent.

    At the scores of the hits that are nearest to the positions, boxes and truth are matched anew; precision at a
    position is the largest at it or beyond. Of fewer than 80 objects a hit may stand for several positions, where the
    benchmark's own program leaves positions empty. NaN where nothing is there to be found.

    Args:
        scans: of one class and difficulty.
        threshold: of the overlap, which must be larger.
    """
    total = sum(int((scan.truth == 0).sum()) for scan in scans)
    if not total:
        return math.nan
    hits = sorted((score for scan in scans for score in _hits(scan, threshold)), reverse=True)
    precision, i = np.zeros(RECALLS + 1), 0
    for k in range(RECALLS + 1 if hits else 0):
        while i + 1 < len(hits) and (i + 2) / total - k / RECALLS < k / RECALLS - (i + 1) / total:
            i += 1
        right, wrong = np.sum([_count(scan, threshold, hits[i]) for scan in scans], 0)
        precision[k] = right / max(right + wrong, 1)
        if i + 1 == len(hits) and (k + 1) / RECALLS > len(hits) / total:
            break
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    return 100 * float(precision[1:].mean())


def _hits(scan: Found, threshold: float) -> list[float]:
    """The scores of the boxes that are right, when each truth takes the best score that overlaps it enough."""
    taken, hits = np.zeros(len(scan.scores), bool), []
    for g, ignored in enumerate(scan.truth):
        free = np.flatnonzero(~taken & (scan.overlaps[:, g] > threshold))
        if len(free):
            best = free[scan.scores[free].argmax()]
            taken[best] = True
            if not ignored and not scan.small[best]:
                hits.append(float(scan.scores[best]))
    return hits


def _count(scan: Found, threshold: float, cut: float) -> tuple[int, int]:
    """How many boxes with at least this score are right, and how many wrong, when truth takes the largest overlap."""
    open_ = scan.scores >= cut
    right = 0
    taken = np.zeros(len(scan.scores), bool)
    for g, ignored in enumerate(scan.truth):
        free = open_ & ~taken & (scan.overlaps[:, g] > threshold)
        large = np.flatnonzero(free & ~scan.small)
        if len(large):
            best = large[scan.overlaps[large, g].argmax()]
            right += not ignored
        elif free.any():
            best = np.flatnonzero(free)[0]
        else:
            continue
        taken[best] = True
    return right, int((open_ & ~taken & ~scan.small).sum())


# -- nuScenes ---------------------------------------------------------------------------------------------------------

REACH = {
    "car": 50, "truck": 50, "bus": 50, "trailer": 50, "construction_vehicle": 50, "pedestrian": 40, "motorcycle": 40,
    "bicycle": 40, "traffic_cone": 30, "barrier": 30,
}  # fmt: skip
"""How far from the middle of the car boxes of a class count, in metres."""

DISTANCES = (0.5, 1.0, 2.0, 4.0)
ERRORS = ("trans", "scale", "orient", "vel", "attr")
WITHOUT = {"traffic_cone": ("orient", "vel", "attr"), "barrier": ("vel", "attr")}
"""Errors that a class does not have."""

MOVING = 0.2  # m/s
ATTRIBUTES_OF = {
    **dict.fromkeys(("car", "construction_vehicle", "trailer", "truck"), ("vehicle.parked", "vehicle.moving")),
    **dict.fromkeys(("bicycle", "motorcycle"), ("cycle.without_rider", "cycle.with_rider")),
    "bus": ("vehicle.stopped", "vehicle.moving"),
    "pedestrian": ("pedestrian.standing", "pedestrian.moving"),
}
"""The attribute that a box of a class most likely has, where it stands and where it moves (as OpenPCDet tells it)."""


class Objects(NamedTuple):
    """Boxes in one scan, as nuScenes compares them.

    Attributes:
        boxes: (N, 9); velocities of NaN are not known.
        labels: (N,) classes.
        attributes: (N,) numbers of `linescan.engine.scene_sets.ATTRIBUTES`, -1 for none.
        scores: (N,), of boxes that were found.
    """

    boxes: np.ndarray
    labels: np.ndarray
    attributes: np.ndarray
    scores: np.ndarray

    def only(self, rows: np.ndarray) -> "Objects":
        """Some of them, by an index or a mask."""
        return Objects(*(x[rows] for x in self))


def average_precision(hits: np.ndarray, total: int) -> tuple[float, np.ndarray]:
    """nuScenes' average precision, and precision at 101 positions of recall, from 0 to 1.

    What lies below a recall or a precision of 0.1 does not count.

    Args:
        hits: (D,) bool whether each box is right, best score first.
        total: how many are there to be found.
    """
    if not total or not hits.any():
        return 0.0, np.zeros(101)
    right = hits.cumsum()
    precision, recall = right / np.arange(1, len(hits) + 1), right / total
    curve = np.interp(np.linspace(0, 1, 101), recall, precision, right=0)
    return float(np.maximum(curve[11:] - 0.1, 0).mean() / 0.9), curve


def nuscenes_scores(
    found: Sequence[Objects],
    truth: Sequence[Objects],
    classes: Sequence[str],
    distances: Sequence[float] = DISTANCES,
) -> dict[str, float]:
    """mAP and NDS of nuScenes' detection task, in per cent, and the mean errors of right boxes, as its devkit has them.

    A class of which there is nothing counts as one that is never found.

    Args:
        found: of each scan; of several boxes with one score the last one comes first.
        truth: of each scan.
        classes: their names.
        distances: up to which a box is right, in metres: AP is the mean over them, errors are those of 2 m.
    """
    precisions, errors = [], {name: [] for name in ERRORS}
    for c, name in enumerate(classes):
        own, there = ([scan.only(scan.labels == c) for scan in side] for side in (found, truth))
        total = sum(len(scan.labels) for scan in there)
        scan = np.concatenate([np.full(len(s.labels), i) for i, s in enumerate(own)])
        boxes = Objects(*(np.concatenate(parts) for parts in zip(*own)))
        order = np.argsort(boxes.scores, kind="stable")[::-1]
        boxes, scan = boxes.only(order), scan[order]
        for distance in distances:
            hits, _ = _match(boxes.boxes, scan, there, distance)
            precisions.append(average_precision(hits, total)[0])
        hits, pairs = _match(boxes.boxes, scan, there, 2.0)
        means = _errors(boxes, hits, pairs, total, half_turn=name == "barrier")
        for error in set(ERRORS) - set(WITHOUT.get(name, ())):
            errors[error].append(means[error])
    means = {name: float(np.mean(values)) if values else 1.0 for name, values in errors.items()}
    mean_ap = float(np.mean(precisions)) if precisions else 0.0
    rest = sum(1 - min(1, error) for error in means.values())
    return {"map": 100 * mean_ap, "nds": 10 * (5 * mean_ap + rest), **{f"ma{n[0]}e": v for n, v in means.items()}}


def _match(
    boxes: np.ndarray, scan: np.ndarray, there: Sequence[Objects], distance: float
) -> tuple[np.ndarray, Objects]:
    """Which boxes are right, best first, each with the nearest one that is still free; and these."""
    free = [np.ones(len(truth.labels), bool) for truth in there]
    hits, pairs = np.zeros(len(boxes), bool), []
    for i, (box, s) in enumerate(zip(boxes, scan)):
        if not free[s].any():
            continue
        away = np.where(free[s], np.hypot(*(there[s].boxes[:, :2] - box[:2]).T), np.inf)
        best = away.argmin()
        if away[best] < distance:
            free[s][best], hits[i] = False, True
            pairs.append(there[s].only(slice(best, best + 1)))
    return hits, Objects(*(np.concatenate(parts) for parts in zip(*pairs or [truth.only(slice(0)) for truth in there])))


def _errors(boxes: Objects, hits: np.ndarray, pairs: Objects, total: int, half_turn: bool) -> dict[str, float]:
    """Mean errors of right boxes up to each recall, averaged over recalls above 0.1 that are reached; 1 if none is."""
    nothing = dict.fromkeys(ERRORS, 1.0)
    if not hits.any():
        return nothing
    recall = hits.cumsum() / total
    score = np.interp(np.linspace(0, 1, 101), recall, boxes.scores, right=0)
    reached = np.flatnonzero(score)
    last = reached[-1] if len(reached) else 0
    if last < 11:
        return nothing
    right = boxes.only(hits)
    found, there = right.boxes, pairs.boxes
    shared = np.minimum(found[:, 3:6], there[:, 3:6]).prod(1)
    union = found[:, 3:6].prod(1) + there[:, 3:6].prod(1) - shared
    period = math.pi if half_turn else 2 * math.pi
    turn = np.abs((found[:, 6] - there[:, 6] + period / 2) % period - period / 2)
    wrong = (right.attributes != pairs.attributes).astype(float)
    each = {
        "trans": np.hypot(*(found[:, :2] - there[:, :2]).T),
        "scale": 1 - shared / union,
        "orient": turn,
        "vel": np.hypot(*(found[:, 7:9] - there[:, 7:9]).T),
        "attr": np.where(pairs.attributes < 0, np.nan, wrong),
    }
    means = {}
    for name, values in each.items():
        known = ~np.isnan(values)
        running = np.nancumsum(values) / np.maximum(known.cumsum(), 1)
        if not known.any():
            running = np.ones(len(values))
        means[name] = float(np.interp(score[::-1], right.scores[::-1], running[::-1])[::-1][11 : last + 1].mean())
    return means


# -- the evaluator -----------------------------------------------------------------------------------------------------


class BoxScores(Evaluator):
    """Average precision of boxes, by the metrics that are official for the layout of the data.

    KITTI's: in 3D at 40 positions of recall for each class, of moderate difficulty; "map" is the mean over the classes
    of which there is something, the others have 0. nuScenes': mAP, NDS and the mean errors of translation, scale,
    orientation, velocity and attributes (mATE, mASE, mAOE, mAVE, mAAE); attributes are told by class and speed.

    Args:
        data: items of `SceneSamples`.
        batch: samples in one forward pass.
    """

    primary = "map"
    batch = None

    def __init__(self, data: SceneSamples, batch: int | None = None):
        self.data, self.batch = data, batch
        scenes = data.scenes
        self.classes, self.thresholds, self.style = list(scenes.classes), scenes.thresholds, scenes.style
        if self.style == "nuscenes":
            self.names = ("map", "nds", *(f"ma{name[0]}e" for name in ERRORS))
        else:
            self.names = ("map", *(f"ap_{name}" for name in self.classes))

    def measure(self, model: nn.Module, batch: Any, totals: Totals) -> None:
        found = [boxes.cpu() for boxes in model.detect(batch["points"], batch["lengths"])]
        for i, index in enumerate(batch["index"]):
            own = {name: batch[name][i].cpu() for name in ("boxes", "labels", "levels", "attributes", "camera")}
            near, near_too = torch.ones(len(found[i])) > 0, own["labels"] > -3
            attributes = torch.full((len(found[i]),), -1)
            if self.style == "nuscenes":
                around = batch["ego"][i].cpu(), batch["racks"][i].cpu()
                near = self.counts(found[i].boxes, found[i].labels, *around)
                near_too = self.counts(own["boxes"], own["labels"], *around) & (own["levels"] < 3)
                attributes = self.attributes(found[i])
            high = pixels(found[i], own["camera"].numpy())
            none = torch.zeros(len(own["boxes"]))
            there = self.rows(index, own["boxes"], own["labels"], own["levels"], none, own["attributes"])
            boxes = self.rows(index, found[i].boxes, found[i].labels, found[i].scores, high, attributes)
            totals.keep(found=boxes[near], there=there[near_too])

    def counts(self, boxes: Tensor, labels: Tensor, ego: Tensor, racks: Tensor) -> Tensor:
        """Which boxes nuScenes counts, (N,) bool: of a class, near the car, and no bicycles in racks for them."""
        reach = boxes.new_tensor([REACH.get(name, 50) for name in self.classes])[labels]
        near = torch.linalg.vector_norm(boxes[:, :2] - ego.to(boxes), dim=1) < reach
        kept = torch.tensor([name in ("bicycle", "motorcycle") for name in self.classes])[labels]
        return (labels >= 0) & near & ~(kept & points_in_boxes(boxes, racks.to(boxes)).any(0))

    def attributes(self, found: Boxes) -> Tensor:
        """The numbers of the attributes of boxes, by class and speed; -1 for classes without."""
        table = [[ATTRIBUTES.index(name) for name in ATTRIBUTES_OF.get(own, ())] or [-1, -1] for own in self.classes]
        moves = torch.linalg.vector_norm(found.boxes[:, 7:9], dim=1) > MOVING
        return torch.tensor(table)[found.labels, moves.long()]

    @staticmethod
    def rows(index: int, boxes: Tensor, labels: Tensor, value: Tensor, pixels: Tensor, attributes: Tensor) -> Tensor:
        """(N, 14): the scan, class, a value, height in pixels, attribute, and the box."""
        facts = [torch.full((len(boxes),), index), labels, value, pixels, attributes]
        boxes = torch.cat([boxes, boxes.new_zeros(len(boxes), 9 - boxes.shape[1])], 1)
        return torch.cat([torch.stack([f.double() for f in facts], 1), boxes.double()], 1)

    def scores(self, totals: Totals) -> dict[str, float]:
        found, there = totals["found"], totals["there"]
        scans = sorted(set(found[:, 0].tolist()) | set(there[:, 0].tolist()))
        parts = [(found[found[:, 0] == s], there[there[:, 0] == s]) for s in scans]
        if self.style == "nuscenes":
            both = [[Objects(*(x.numpy() for x in (side[:, 5:], side[:, 1], side[:, 4], side[:, 2]))) for side in pair]
                    for pair in parts]  # fmt: skip
            return nuscenes_scores([pair[0] for pair in both], [pair[1] for pair in both], self.classes)
        precisions = [self.precision(parts, c, 1) for c in range(len(self.classes))]
        known = [value for value in precisions if value == value]
        mean = float(np.mean(known)) if known else 0.0
        each = {f"ap_{name}": value if value == value else 0.0 for name, value in zip(self.classes, precisions)}
        return {"map": mean, **each}

    def precision(self, parts: Sequence[tuple[Tensor, Tensor]], label: int, level: int) -> float:
        """The average precision of a class, up to a difficulty, by KITTI's metric."""
        scans = []
        for found, there in parts:
            found = found[found[:, 1] == label]
            there = there[(there[:, 1] == label) | (there[:, 1] == -2 - label)]
            ignored = (there[:, 1] != label) | (there[:, 2] > level)
            overlaps = iou_3d(found[:, 5:12], there[:, 5:12]).numpy()
            small = found[:, 3].numpy() < (40, 25, 25)[level]
            scans.append(Found(overlaps, found[:, 2].numpy(), ignored.long().numpy(), small))
        return kitti_precision(scans, self.thresholds[label])


def pixels(found: Boxes, camera: np.ndarray) -> Tensor:
    """How high boxes are in the camera's image, in pixels; infinite without a camera."""
    if not len(camera) or not len(found):
        return torch.full((len(found),), math.inf)
    flat = corners(found.boxes)
    ends = found.boxes[:, 2:3] + found.boxes[:, 5:6] / 2 * found.boxes.new_tensor([-1, 1])
    points = torch.cat([torch.cat([flat, end[:, None, None].expand(-1, 4, 1)], -1) for end in ends.unbind(1)], 1)
    rows, _ = project(points.flatten(0, 1).double().numpy(), camera)
    heights = rows[:, 1].reshape(len(found), -1)
    return torch.from_numpy(heights.max(1) - heights.min(1))
