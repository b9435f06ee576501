"""The two pages of `make demo-dense`: scenes, truth and prediction side by side, and how they were trained."""

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..media.look import BAD, GOOD, GREY, INK, PAPER, plain
from .killable import Training, read_log
from .render import CLASSES, PALETTE, read_pixels

__all__ = ["draw"]

COLOURS = np.array(PALETTE) / 255
SURE = 0.5
"""Detections that are drawn have at least this score."""


def draw(task: str, path: Path, data: Path, training: Training, metrics: dict, predictions: list) -> None:
    """Draws a page of "segmentation" or "detection" into the file `path`.

    Args:
        data: the folder of the scenes.
        training: for its log.
        metrics, predictions: of `evaluate`.
    """
    scenes = (SegmentedScenes if task == "segmentation" else DetectedScenes)(data / "val", predictions)
    figure = Figure(figsize=(13, 10.6), dpi=130, facecolor=PAPER)
    title, said, curve = {
        "segmentation": (
            "A UPerNet on VMamba finds the pixels of digits",
            f"{metrics.get('mIoU', 0):.1f} % mIoU over the canvas and ten digits",
            ("mIoU", "mIoU (%)"),
        ),
        "detection": (
            "A Mask R-CNN on ViG-H finds digits one by one",
            f"{metrics.get('coco/bbox_mAP', 0):.3f} box AP, {metrics.get('coco/segm_mAP', 0):.3f} mask AP",
            ("coco/bbox_mAP", "box AP"),
        ),
    }[task]
    count = len(predictions)
    figure.text(0.02, 0.968, title, fontsize=17, weight="bold", color=INK)
    figure.text(
        0.02, 0.946, f"{said}, in {count} scenes of handwriting that it was not trained on; on the left of each pair "
        "the truth, on the right what it says; the worst come last", color=GREY,
    )  # fmt: skip
    _, top, bottom = figure.subfigures(3, 1, height_ratios=(0.2, 2.1, 1))
    for part in (top, bottom):
        part.set_facecolor("none")
    _draw_scenes(top, scenes)
    loss, metric, bars = bottom.subplots(1, 3)
    bottom.subplots_adjust(0.05, 0.16, 0.98, 0.86, wspace=0.2)
    _draw_curves(loss, metric, training, *curve)
    scenes.draw_bars(bars, metrics)
    for axis in (loss, metric, bars):
        plain(axis)
        axis.set_axisbelow(True)
    figure.savefig(path)


class SegmentedScenes:
    """Scenes, their classes, and those that were predicted."""

    def __init__(self, folder: Path, predictions: list[np.ndarray]):
        coco = json.loads((folder / "instances.json").read_text())
        files = [image["file_name"] for image in coco["images"]]
        self.images = [read_pixels(folder / "images" / file) for file in files]
        self.truth = [read_pixels(folder / "masks" / file) for file in files]
        self.names = [[] for _ in files]
        for truth in coco["annotations"]:
            self.names[truth["image_id"]].append((truth["category_id"], truth["bbox"]))
        self.predictions = predictions

    def score(self, i: int) -> float:
        """The part of the pixels of digits, true or predicted, that are right."""
        digits = (self.truth[i] > 0) | (self.predictions[i] > 0)
        return (self.truth[i] == self.predictions[i])[digits].mean()

    def draw(self, axis, i: int, predicted: bool) -> None:
        classes = (self.predictions if predicted else self.truth)[i]
        show(axis, self.images[i], [(classes == c, c) for c in range(1, len(CLASSES))])
        for label, (left, top, width, height) in [] if predicted else self.names[i]:
            write(axis, left + width / 2, top + height / 2, CLASSES[label], "white", "center")

    def draw_bars(self, axis, metrics: dict) -> None:
        """IoU of each class, in its colour."""
        iou = [value or 0 for value in metrics["IoU"].values()]
        axis.bar(CLASSES, iou, color=COLOURS)
        axis.set_ylim(min(60, min(iou) // 10 * 10), 100)
        axis.set_title("IoU of each class (%)", loc="left", color=INK, weight="bold")


class DetectedScenes:
    """Scenes, their boxes, and those that were predicted."""

    def __init__(self, folder: Path, predictions: list[dict]):
        from pycocotools import mask as coco_mask

        coco = json.loads((folder / "instances.json").read_text())
        self.images = [read_pixels(folder / "images" / image["file_name"]) for image in coco["images"]]
        self.truth = [[] for _ in self.images]
        for truth in coco["annotations"]:
            mask = coco_mask.decode(truth["segmentation"]).astype(bool)
            self.truth[truth["image_id"]].append((mask, truth["category_id"], truth["bbox"], ""))
        self.predictions = []
        for found in predictions:
            sure = found["scores"] >= SURE
            boxes = found["bboxes"][sure] - np.pad(found["bboxes"][sure][:, :2], ((0, 0), (2, 0)))
            said = [f" {100 * score:.0f}" for score in found["scores"][sure]]
            self.predictions.append(list(zip(found["masks"][sure], found["labels"][sure] + 1, boxes, said)))

    def score(self, i: int) -> float:
        """The part of the digits, true or predicted, that have a counterpart."""
        pairs = [(t, p) for t in self.truth[i] for p in self.predictions[i] if t[1] == p[1]]
        matched = sum((t[0] & p[0]).sum() > 0.5 * (t[0] | p[0]).sum() for t, p in pairs)
        return matched / max(len(self.truth[i]) + len(self.predictions[i]) - matched, 1)

    def draw(self, axis, i: int, predicted: bool) -> None:
        found = (self.predictions if predicted else self.truth)[i]
        show(axis, self.images[i], [(mask, label) for mask, label, _, _ in found])
        for _, label, (left, top, width, height), said in found:
            colour = COLOURS[label]
            axis.add_patch(Rectangle((left - 0.5, top - 0.5), width, height, fill=False, color=colour, linewidth=1.2))
            write(axis, left, max(top - 1, 7), f"{CLASSES[label]}{said}", colour)

    def draw_bars(self, axis, metrics: dict) -> None:
        """COCO's average precisions."""
        kinds = ("mAP", "mAP_50", "mAP_75")
        for offset, (what, name, colour) in enumerate((("bbox", "boxes", GOOD), ("segm", "masks", INK))):
            heights = [metrics.get(f"coco/{what}_{kind}", 0) for kind in kinds]
            places = np.arange(3) + 0.4 * offset - 0.2
            axis.bar(places, heights, 0.36, color=colour, label=name)
            for x, y in zip(places, heights):
                axis.text(x, y + 0.01, f"{y:.2f}", ha="center", fontsize=8, color=INK)
        axis.set_xticks(range(3), ("AP", "AP at IoU 0.5", "AP at IoU 0.75"))
        axis.set_ylim(0, 1.2)
        axis.legend(frameon=False, fontsize=8, labelcolor=INK, ncols=2, loc="upper right")
        axis.set_title("average precision (COCO)", loc="left", color=INK, weight="bold")


def show(axis, image: np.ndarray, masks: list[tuple[np.ndarray, int]]) -> None:
    """The image, with masks in the colours of their classes over it."""
    shown = 0.75 * image / 255
    for mask, c in masks:
        shown[mask] = 0.25 * shown[mask] + 0.75 * COLOURS[c]
    axis.imshow(shown, interpolation="nearest")
    axis.set_axis_off()


def write(axis, x: float, y: float, text: str, colour, place: str = "left") -> None:
    """Small text that can be read on any ground."""
    from matplotlib.patheffects import withStroke

    outline = withStroke(linewidth=2, foreground=INK)
    va = "center" if place == "center" else "bottom"
    axis.text(x, y, text, color=colour, fontsize=8, weight="bold", ha=place, va=va, path_effects=[outline])


def _draw_scenes(figure, scenes) -> None:
    """Sixteen pairs of truth and prediction: twelve as they come, then the four with the lowest scores."""
    scores = [scenes.score(i) for i in range(len(scenes.images))]
    worst = [int(i) for i in np.argsort(scores)[:4][::-1]]
    chosen = [i for i in range(len(scores)) if i not in worst][:12] + worst
    pairs = figure.subfigures(4, 4, wspace=0.02, hspace=0.02)
    for k, pair in enumerate(pairs.flat):
        pair.set_facecolor("none")
        for axis, predicted in zip(pair.subplots(1, 2), (False, True)):
            axis.set_axis_off()
            if k < len(chosen):
                scenes.draw(axis, chosen[k], predicted)
        pair.subplots_adjust(0.02, 0.02, 0.98, 0.98, wspace=0.03)


def _draw_curves(loss, metric, training: Training, key: str, name: str) -> None:
    """The loss of each run, with the kill between them, and the metric where it was measured."""
    runs = read_log(training.work_dir)
    for number, run in enumerate(runs):
        learned = [(row["step"], row["loss"]) for row in run if "loss" in row]
        last = number == len(runs) - 1
        loss.plot(*zip(*learned), color=GOOD if last else GREY, linewidth=1.2 if last else 2.4)
    if training.killed_at:
        loss.axvline(training.killed_at, color=BAD, linewidth=1, linestyle=":")
        said = f"kill -9 at {training.killed_at},\nresumed from {training.resumed_from}"
        loss.annotate(
            said, (training.killed_at, 0.95), (5, 0), xycoords=("data", "axes fraction"), textcoords="offset points",
            color=BAD, fontsize=8.5, va="top",
        )  # fmt: skip
    loss.set_title("loss", loc="left", color=INK, weight="bold")
    loss.set_ylim(bottom=0)
    judged = {row["step"]: row[key] for run in runs for row in run if key in row}
    metric.plot(*zip(*sorted(judged.items())), color=GOOD, linewidth=2, marker="o", markersize=4)
    for step, value in judged.items():
        metric.annotate(f"{value:.3g}", (step, value), (0, -14), textcoords="offset points", ha="center", fontsize=8)
    metric.set_ylim(0, 1.05 * max(1, 100 if "%" in name else 1))
    metric.set_title(f"held-out {name}", loc="left", color=INK, weight="bold")
    for axis in (loss, metric):
        axis.set_xlim(0, training.iterations * 1.02)
        axis.set_xlabel("iteration", color=GREY)
