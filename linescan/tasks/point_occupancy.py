"""The class of every cell around a scanner: files in, volumes out (`SceneCompleter`); training and scores."""

import io
from pathlib import Path
from typing import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .. import zoo
from ..engine.atomic import atomic
from ..engine.cards import ModelCard
from ..engine.scores import Evaluator, Totals
from ..engine.volume_sets import IGNORED, VolumeSamples, centres, open_volumes
from ..heads.points.occupancy import class_weights
from ..media.clouds import ScanPreprocess
from ..media.draw import default_palette
from ..media.draw_points import PointView
from ..media.find import Source
from ..media.labels import class_names
from ..media.points import PointCloud, write_ply
from .base import Task, build_model
from .clouds import CloudTool, CloudWriter, OpenedCloud, noted
from .open import expect_task
from .recipes import OccupancyRecipe
from .tool import Progress, expect_finite, silent

__all__ = ["CompletedScene", "CompletionTask", "SceneCompleter", "VolumeIoU", "VolumeTable"]


class CompletedScene:
    """The class of every cell.

    Attributes:
        volume: (X, Y, Z) uint8 numbers of `classes`; 0 is empty.
        classes: names, "empty" first.
        points: (N, 3) float32 middles of the cells that are occupied; labels: (N,) int64 their classes.
        opened: the scan.
        view: what is to be seen of it.
    """

    def __init__(self, volume: np.ndarray, classes: Sequence[str], opened: OpenedCloud, low, high):
        self.volume, self.classes, self.opened = volume, list(classes), opened
        there = np.argwhere(volume > 0)
        self.points = centres(there, low, high, volume.shape)
        self.labels = volume[tuple(there.T)].astype(np.int64)
        self.view = PointView(self.points, self.labels, self.classes)

    def counts(self) -> dict[str, int]:
        """How many cells each class has that is there, the most first."""
        numbers, counts = np.unique(self.labels, return_counts=True)
        return {self.classes[numbers[i]]: int(counts[i]) for i in np.argsort(-counts, kind="stable")}


class SceneCompleter(CloudTool):
    """Says what every cell around a scanner is, those that it did not see, too.

        complete = SceneCompleter(checkpoint="runs/occupancy/best.safetensors")
        scene = complete("000000.bin")
        print(scene.counts(), scene.volume.shape)

    Args:
        kwargs: of `CloudTool`.

    Raises:
        InputError, CheckpointError: see `CloudTool`; or the model completes no scenes.
    """

    task = "point-occupancy"

    def answer(self, opened: Sequence[OpenedCloud], progress: Progress = silent) -> list[CompletedScene]:
        rows = torch.cat([cloud.rows for cloud in opened]).to(self.device)
        found = self.module(rows, [len(cloud.rows) for cloud in opened])
        volumes = expect_finite(found.logits, large=True).argmax(1).byte().cpu().numpy()
        progress(len(opened))
        space = self.module.low, self.module.high
        return [CompletedScene(volume, self.classes, cloud, *space) for volume, cloud in zip(volumes, opened)]

    def view(self, opened: OpenedCloud, answer: CompletedScene) -> PointView:
        return answer.view


class VolumeTable(CloudWriter):
    """Volumes as OUT/volumes/NAME.npy (uint8 classes, along x, y and z), OUT/cells/NAME.ply; pages that turn.

    Args:
        out: the folder.
        classes: their names, written to OUT/classes.txt.
        pages: whether pages are wanted.
    """

    def __init__(self, out: Path, classes: Sequence[str], pages: bool = True):
        super().__init__(out, pages)
        self.palette = np.array(default_palette(len(classes)), np.uint8)
        out.mkdir(parents=True, exist_ok=True)
        with atomic(out / "classes.txt") as file:
            file.write("".join(f"{name}\n" for name in classes).encode())

    def save(self, source: Source, answer: CompletedScene, frame: int | None = None) -> list[Path]:
        """Writes the volume, its occupied cells as points, and the page."""
        paths = self.place("volumes", source, ".npy"), self.place("cells", source, ".ply")
        table = io.BytesIO()
        np.save(table, answer.volume)
        with atomic(paths[0]) as file:
            file.write(table.getvalue())
        with atomic(paths[1]) as file:
            write_ply(file, PointCloud(answer.points), answer.labels, self.palette[answer.labels])
        return [*paths, *super().save(source, answer)]

    def describe(self, answer: CompletedScene) -> str:
        """The share of occupied cells, and of what they are."""
        total = max(len(answer.labels), 1)
        shares = [f"{name} {100 * n / total:.0f} %" for name, n in list(answer.counts().items())[:4]]
        said = f"{len(answer.labels):,} of {answer.volume.size:,} cells occupied"
        return noted(": ".join([said, ", ".join(shares)]) if shares else said, answer.opened.notes)

    def as_json(self, answer: CompletedScene) -> dict:
        """How many cells each class has; how many points there are; what was left out."""
        return {"cells": answer.counts(), "size": list(answer.volume.shape), **answer.opened.facts()}


# -- training and scoring ----------------------------------------------------------------------------------------------


class VolumeIoU(Evaluator):
    """Intersection over union in per cent, over all cells of the held-out volumes that are known.

    "miou" is the mean over the classes that are there or found, but for empty; "iou" is that of occupied and empty, and
    "precision" and "recall" are those of occupied cells. SemanticKITTI's benchmark has the same.

    Args:
        data: items of `VolumeSamples`.
        classes: how many, with empty.
        batch: samples in one forward pass.
    """

    names = ("miou", "iou", "precision", "recall")
    primary = "miou"

    def __init__(self, data: VolumeSamples, classes: int, batch: int | None = None):
        self.data, self.classes, self.batch = data, classes, batch

    def measure(self, model: nn.Module, batch: dict, totals: Totals) -> None:
        found = model(batch["points"], batch["lengths"], batch["occupancy"]).logits.argmax(1)
        target = batch["target"].long()
        known = target != IGNORED
        pairs = self.classes * target[known] + found[known]
        totals.add(confusion=pairs.bincount(minlength=self.classes**2))

    def scores(self, totals: Totals) -> dict[str, float]:
        table = totals["confusion"].reshape(self.classes, self.classes)
        both, either = table.diagonal(), table.sum(0) + table.sum(1) - table.diagonal()
        there = either[1:] > 0
        miou = (both[1:][there] / either[1:][there]).mean() if there.any() else torch.zeros(())
        right, said, true = table[1:, 1:].sum(), table[:, 1:].sum(), table[1:].sum()

        def share(part: Tensor, whole: Tensor) -> float:
            return 100 * (part / whole.clamp_min(1)).item()

        return {"miou": 100 * miou.item(), "iou": share(right, said + true - right),
                "precision": share(right, said), "recall": share(right, true)}  # fmt: skip


class CompletionTask(Task):
    """Scans -> the losses of their volumes.

    Raises:
        InputError: the data and the model do not fit together.
    """

    losses = ("loss", "volume", "semantic", "occupied")
    unit = "scans"
    listed = "point-occupancy"
    recipe: OccupancyRecipe

    def __init__(self, recipe: OccupancyRecipe):
        super().__init__(recipe)
        train, held_out = open_volumes(recipe.data)
        self.preprocess = ScanPreprocess(**zoo.find(recipe.model).preprocess)
        self.classes = class_names("SemanticKITTI") or []
        self.args = {"num_classes": len(self.classes), "in_chans": self.preprocess.channels, **recipe.model_args}
        self.model = build_model(recipe, **self.args)
        space = self.model.low, self.model.high, self.model.cells
        self.data = VolumeSamples(train, self.preprocess, *space, augment=recipe.augment == "flip")
        self.evaluator = VolumeIoU(VolumeSamples(held_out, self.preprocess, *space), len(self.classes))

    @classmethod
    def resolve(cls, recipe: OccupancyRecipe) -> OccupancyRecipe:
        """As `Task`. Raises InputError: the model completes no scenes."""
        recipe = super().resolve(recipe)
        expect_task(recipe.model, cls.listed)
        return recipe

    @classmethod
    def judge(cls, recipe: OccupancyRecipe, model: nn.Module, card: ModelCard) -> VolumeIoU:
        _, held_out = open_volumes(recipe.data)
        samples = VolumeSamples(held_out, card.preprocess, model.low, model.high, model.cells)
        return VolumeIoU(samples, model.num_classes, recipe.batch)

    def forward(self, model: nn.Module, batch: dict) -> dict[str, Tensor]:
        found = model(batch["points"], batch["lengths"], batch["occupancy"])
        with torch.autocast(found.logits.device.type, enabled=False):
            parts = self.model.losses(found, batch["target"].long(), batch["labels"], weights=class_weights())
        return {**parts, "output": found.logits}

    def card(self) -> ModelCard:
        return ModelCard(self.recipe.model, self.args, list(self.classes), self.preprocess)
