"""`make demo-points`: digits as clouds of points, named, taken off their boards, and found in a street.

The four trainings are `linescan train`'s own, each in a process and on a core of its own, two at a time.
"""

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Mapping

import numpy as np
import torch

from ..engine.atomic import atomic
from ..engine.cloud_sets import PARTS_OF_DIGITS, DigitClouds
from ..engine.processes import threads
from ..engine.progress import progress_bar, say
from ..engine.recipe import Recipe
from ..engine.scene_sets import DigitStreet
from ..media.draw import default_palette
from ..media.draw_points import PointView, draw_points, points_page
from ..media.look import BAD, GOOD, GREY, INK, PAPER, plain
from ..media.points import write_ply
from ..tasks.point_detect import BoxDetector
from ..tasks.point_parts import PartSegmenter
from ..tasks.points import PointClassifier
from ..tasks.recipes import PartsRecipe, PointClassificationRecipe, ScanDetectionRecipe
from .telling import tell_commands, tell_files
from .trainings import rows_of, train_all

__all__ = ["TRAININGS", "demo_points"]

_SMALL = dict(embed_dim=64, depth=2, groups=48, group_size=12, patch_widths=[16, 32, 64])
_ALONE = {**_SMALL, "together": False, "drop_rate": 0.2}
_COMMON: dict[str, Any] = dict(
    data="digits", points=512, augment="jitter", epochs=22, batch=16, lr=3e-3, warmup=1.0, ema=0.99
)

_STREET = dict(
    low=DigitStreet.low, high=DigitStreet.high, cells=[64, 64, 4],
    backbone=dict(dim=24, groups=[256], windows=[[4, 13, 13]], scales=[[2, 2, 2]], drop_path_rate=0.0),
    neck=dict(depths=[1, 1], strides=[1, 2], widths=[32, 64], scales=[1, 2], out_widths=[32, 32]),
    head_args=dict(shared=32, iou=0.1, weight=2.0),
)  # fmt: skip

TRAININGS: Mapping[str, Recipe] = {
    "pointmamba": PointClassificationRecipe(model="pointmamba_modelnet40", model_args=_ALONE, **_COMMON),
    "mamba3d": PointClassificationRecipe(model="mamba3d_modelnet40", model_args=_ALONE, **_COMMON),
    "parts": PartsRecipe(
        model_args=dict(backbone_args=_SMALL, taps=[0, 1], widths=[128, 64, 64, 32]), **{**_COMMON, "epochs": 3}
    ),
    "lion": ScanDetectionRecipe(
        "digits",
        model="lion_mamba_once",
        model_args=_STREET,
        augment="shift",
        epochs=8,
        batch=4,
        lr=5e-3,
        warmup=1.0,
        ema=0.99,
    ),
}
"""What is trained, by the folder that it goes to."""

SHOWN = 12  # scans that are written to be tried
VOTES = 10
"""Draws of each held-out digit's points, whose mean is the answer, as the papers evaluate."""

_LINES = {"pointmamba": "#2a9d8f", "mamba3d": "#7b5ea7"}


def demo_points(
    out: str | Path = "runs/demo-points", trainings: Mapping[str, Recipe] = TRAININGS, together: int = 2
) -> dict:
    """Trains, tries and draws, all in the folder `out`.

    A demo that was there before is replaced.

    Args:
        out: where everything goes.
        trainings: as `TRAININGS`.
        together: how many of them at a time.

    Returns:
        What metrics.json holds: accuracies, mIoU and average precision on held-out data in per cent, seconds, the
        machine's load.

    Raises:
        RuntimeError: a training failed; its log is named.
    """
    out, started, load = Path(out), time.monotonic(), os.getloadavg()[0]
    train_all({out / name: recipe for name, recipe in trainings.items()}, together)
    seconds = time.monotonic() - started

    # From here on, what any user does: open a model, give it clouds.
    held_out = DigitClouds(held_out=True)
    clouds, truth = [held_out.cloud(i) for i in range(len(held_out))], np.array(held_out.labels)
    write_scans(out / "scans", held_out)
    metrics: dict = {"load_before": load, "seconds": seconds}
    answers = {}
    for name in _LINES:
        tool = PointClassifier(checkpoint=out / name / "model.safetensors", device="cpu", topk=2, votes=VOTES)
        answers[name] = []
        with threads(1), progress_bar(f"held-out digits, {name}", len(clouds)) as advance:
            for _, answer in tool.each(clouds):
                answers[name].append(answer)
                advance()
        right = np.array([answer[0].index for answer in answers[name]]) == truth
        metrics[name] = {"top1": 100 * float(right.mean()), **_spent(out / name)}
    segmenter = PartSegmenter(checkpoint=out / "parts" / "model.safetensors", device="cpu")
    metrics["parts"] = {**_last(out / "parts"), **_spent(out / "parts")}
    metrics["lion"] = {**_last(out / "lion"), **_spent(out / "lion")}
    with atomic(out / "metrics.json") as file:
        file.write(json.dumps(metrics, indent=2).encode())

    chosen = _chosen(answers, truth)
    parts = segmenter([clouds[i] for i in chosen])
    _draw(out, held_out, chosen, answers, parts, metrics)
    view = parts[0].view
    with atomic(out / "parts.png") as file:
        draw_points(view).save(file, "PNG")
    with atomic(out / "parts.html") as file:
        file.write(points_page(view).encode())
    street = find_boxes(out)
    with atomic(out / "street.png") as file:
        draw_points(street).save(file, "PNG")
    with atomic(out / "street.html") as file:
        file.write(points_page(street).encode())
    _tell(out, metrics)
    return metrics


# -- training ---------------------------------------------------------------------------------------------------------


def _last(run: Path) -> dict[str, float]:
    """The scores of the last evaluation, by name."""
    row = [row for row in rows_of(run) if any(key.startswith("val_") for key in row)][-1]
    return {key.removeprefix("val_"): value for key, value in row.items() if key.startswith("val_")}


def _spent(run: Path) -> dict[str, float]:
    return {"training_seconds": rows_of(run)[-1]["seconds"]}


# -- what is written --------------------------------------------------------------------------------------------------


def write_scans(folder: Path, digits: DigitClouds) -> None:
    """The first held-out digits as .ply files, to be tried."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(SHOWN):
        cloud = digits.cloud(i)
        with atomic(folder / f"{i:02}_is_{digits.labels[i]}.ply") as file:
            write_ply(file, cloud, cloud.labels, np.full((len(cloud), 3), 120, np.uint8))


def find_boxes(out: Path) -> PointView:
    """Writes the first held-out streets as .npz files, and finds the digits in one of them."""
    streets = DigitStreet(held_out=True, count=SHOWN)
    (out / "streets").mkdir(parents=True, exist_ok=True)
    for i in range(SHOWN):
        cloud = streets.scene(i).cloud
        with atomic(out / "streets" / f"{i:02}.npz") as file:
            np.savez(file, points=cloud.points, intensity=cloud.intensity)
    detect = BoxDetector(checkpoint=out / "lion" / "model.safetensors", device="cpu")
    found = detect(out / "streets" / "00.npz")
    return replace(found.view, title=f"digits in a street, found by a LION of {_size(detect)} parameters")


def _size(tool: BoxDetector) -> str:
    return f"{sum(p.numel() for p in tool.module.parameters()):,}"


def _chosen(answers: Mapping[str, list], truth: np.ndarray) -> list[int]:
    """One held-out digit of each class, and the surest mistakes of each model."""
    first = [int(np.flatnonzero(truth == digit)[0]) for digit in range(10)]
    worst = []
    for named in answers.values():
        wrong = [i for i, answer in enumerate(named) if answer[0].index != truth[i] and i not in first + worst]
        worst += sorted(wrong, key=lambda i: -named[i][0].probability)[:3]
    return first + worst


def _draw(out: Path, digits: DigitClouds, chosen: list[int], answers: Mapping, parts: list, metrics: dict) -> None:
    """One page: digits, what they are taken for, which points are strokes; the curves; the patches' order."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 9), dpi=130, facecolor=PAPER)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    for part in (top, bottom):
        part.set_facecolor(PAPER)
    figure.text(0.03, 0.955, "Handwritten digits as clouds of points", fontsize=17, weight="bold", color=INK)
    scores = ", ".join(f"{name} {metrics[name]['top1']:.1f} %" for name in answers)
    said = f"held-out digits named right by {VOTES} votes: {scores}; "
    said += f"points on the right part: {metrics['parts']['accuracy']:.1f} %"
    figure.text(0.03, 0.925, f"{said}; above each, what {' and '.join(answers)} say", color=GREY)
    top.subplots_adjust(0.02, 0.01, 0.98, 0.75, hspace=0.3, wspace=0.05)
    palette = np.array(default_palette(len(PARTS_OF_DIGITS))) / 255
    axes = list(top.subplots(2, 8).flat)
    for axis in axes:
        axis.set_axis_off()
    for axis, i, found in zip(axes, chosen, parts):
        x, y, depth = _seen(digits.cloud(i).points, digits.turns[i])
        order = np.argsort(depth)
        axis.scatter(x[order], y[order], s=2.5, c=palette[found.labels[order]], linewidths=0)
        axis.set_aspect("equal")
        truth = digits.labels[i]
        for line, named in enumerate(answers.values()):
            best, good = named[i][0], named[i][0].index == truth
            words = f"{best.label}  {100 * best.probability:.0f} %" + ("" if good else f"  (is {truth})")
            axis.text(0.5, 1.13 - 0.1 * line, words, ha="center", transform=axis.transAxes, fontsize=9, weight="bold",
                      color=GOOD if good else BAD)  # fmt: skip
    left, right = bottom.subfigures(1, 2)
    _draw_curves(left, out, answers)
    _draw_order(right, out, digits, chosen[8])
    figure.savefig(out / "demo.png")


def _seen(points: np.ndarray, turn: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points (N, 3) obliquely from the front of their board: across, up, and towards the eye."""
    angle = turn - 0.45
    cos, sin = np.cos(angle), np.sin(angle)
    x, y, z = points[:, 0] * cos + points[:, 1] * sin, points[:, 1] * cos - points[:, 0] * sin, points[:, 2]
    tilt = 0.3
    return x, z * np.cos(tilt) + y * np.sin(tilt), z * np.sin(tilt) - y * np.cos(tilt)


def _draw_curves(figure, out: Path, names: Mapping) -> None:
    """Held-out accuracy against time, of one draw."""
    axis = figure.subplots()
    figure.subplots_adjust(0.08, 0.13, 0.95, 0.88)
    for name in names:
        judged = [(row["seconds"], row["val_top1"]) for row in rows_of(out / name) if "val_top1" in row]
        axis.plot(*zip(*judged), color=_LINES[name], linewidth=2, marker="o", markersize=3, label=name)
    axis.axhline(95, color=GREY, linewidth=0.8, linestyle=":")
    axis.set_title("accuracy of one vote (%) against seconds of training", loc="left", color=INK, weight="bold")
    axis.set_ylim(top=100)
    axis.legend(frameon=False, labelcolor=INK, loc="lower right")
    plain(axis)


def _draw_order(figure, out: Path, digits: DigitClouds, index: int) -> None:
    """The patches of a digit in the order in which PointMamba reads them, along its two curves."""
    tool = PointClassifier(checkpoint=out / "pointmamba" / "model.safetensors", device="cpu")
    rows = tool.open(digits.cloud(index)).rows
    chosen = rows[tool.card.preprocess.choose(rows)]
    with torch.no_grad():
        found = tool.module.group(chosen[None])
        orders = tool.module.routes(found.centres)[0].numpy()
    figure.text(0.04, 0.93, "how PointMamba reads: patch by patch, along two curves", color=INK, weight="bold")
    figure.subplots_adjust(0.02, 0.02, 0.98, 0.86, wspace=0.02)
    for axis, order, name in zip(figure.subplots(1, 2), orders, ("hilbert", "hilbert-trans")):
        x, y, _ = _seen(chosen.numpy(), digits.turns[index])
        axis.scatter(x, y, s=3, color="#d5dae1", linewidths=0)
        x, y, _ = _seen(found.centres[0].numpy()[order], digits.turns[index])
        axis.plot(x, y, color=GREY, linewidth=0.9)
        axis.scatter(x, y, c=np.arange(len(order)), cmap="viridis", s=26, zorder=3)
        axis.set_title(name, fontsize=9, color=GREY)
        axis.set_aspect("equal")
        axis.set_axis_off()


def _tell(out: Path, metrics: dict) -> None:
    """The last lines on the terminal."""
    say()
    for name in _LINES:
        right = f"{metrics[name]['top1']:.2f} %", "bold green"
        say(right, f" of the held-out digits are named right by {VOTES} votes of {name}.")
    say(
        (f"{metrics['parts']['instance_miou']:.2f} %", "bold green"),
        f" mIoU of stroke and board; AP of digits in a street at an IoU of 0.5: {metrics['lion']['map']:.1f} %. "
        f"All of it took {metrics['seconds']:.0f} s of training.",
    )
    tell_files(
        out,
        {
            "demo.png": "start with this one",
            "parts.html": "a digit that turns under the mouse; parts.png shows it from four sides",
            "street.html": "a street, with boxes around the digits that were found; street.png from four sides",
            "metrics.json": "all numbers",
            "scans/": f"{SHOWN} held-out digits, as .ply files",
            "streets/": f"{SHOWN} held-out streets, as .npz files",
            "pointmamba/, mamba3d/, parts/, lion/": "the models, their metrics.csv and logs",
        },
    )
    tell_commands(
        (
            f"points classify {out}/scans --checkpoint {out}/mamba3d/model.safetensors --topk 2 --votes {VOTES}",
            f"points segment {out}/scans --checkpoint {out}/parts/model.safetensors --out {out}/segmented",
            f"points detect {out}/streets --checkpoint {out}/lion/model.safetensors --out {out}/boxes",
            "train --task points --help",
        )
    )
