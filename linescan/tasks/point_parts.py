"""Part segmentation of point clouds: a part for each point, given the kind of object; how it is trained and scored.

Parts are classes named "category/part" (`linescan.engine.cloud_sets.Parts`). Scores are those of ShapeNetPart (Yi et
al., SIGGRAPH Asia 2016): an object's IoU is the mean over the parts of its category, 1 for a part that is neither there
nor found.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import zoo
from ..engine.atomic import atomic
from ..engine.cards import ModelCard, read_card
from ..engine.cloud_sets import CloudSamples, CloudSet, Parts, every_cloud, has_classes, open_clouds
from ..engine.progress import progress_bar
from ..engine.scores import Evaluator, Totals
from ..errors import InputError
from ..layers.points import interpolate
from ..media.clouds import PointPreprocess
from ..media.draw import default_palette
from ..media.draw_points import PointView
from ..media.find import Source
from ..media.points import write_ply
from .base import build_model
from .clouds import CloudLike, CloudTask, CloudTool, CloudWriter, OpenedCloud, noted
from .open import expect_task
from .recipes import PartsRecipe
from .tool import Progress, expect_finite, silent

__all__ = ["PartIoU", "PartLabels", "PartSegmenter", "PartsTask", "SegmentedCloud"]

BLOCK = 2**16  # points whose parts are decided at a time


class SegmentedCloud:
    """The part of each point.

    Attributes:
        labels: (N,) int64 numbers of `classes`.
        classes: names of all parts.
        opened: the cloud.
        view: what is to be seen of it.
    """

    def __init__(self, labels: np.ndarray, classes: Sequence[str], opened: OpenedCloud, up: str):
        self.labels, self.classes, self.opened = labels, classes, opened
        self.view = PointView(opened.cloud.points, labels, classes, up=up)

    def counts(self) -> dict[str, int]:
        """How many points each part has, the largest first."""
        numbers, counts = np.unique(self.labels, return_counts=True)
        return {self.classes[numbers[i]]: int(counts[i]) for i in np.argsort(-counts, kind="stable")}


class PartSegmenter(CloudTool):
    """Says which part of an object each point of a cloud belongs to.

        segment = PartSegmenter(checkpoint="runs/parts/best.safetensors", category="chair")
        answer = segment("chair.ply")
        print(answer.counts())

    The model reads as many points of a cloud as it was trained with, those that are farthest from each other, among
    16,384 at most. Every point then gets the part that its three nearest ones speak for.

    Args:
        category: the kind of object that all clouds show; by default the name of the folder that a file is in.
        kwargs: of `CloudTool`.

    Raises:
        InputError, CheckpointError: see `CloudTool`; or the model segments no points, or knows no such category.
    """

    task = "point-segmentation"

    def __init__(self, *args, category: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.parts, self.category = Parts(self.classes), category
        if category is not None and category not in self.parts.categories:
            there = ", ".join(self.parts.categories) or "none"
            raise InputError(f"the model knows no category {category!r}; there are: {there}")

    def category_of(self, path: str | Path | None) -> int:
        """The number of the category that the object in a file is of.

        Raises:
            InputError: it cannot be told.
        """
        if not self.parts.categories:
            return 0
        name = self.category or (Path(path).absolute().parent.name if path else "")
        if name not in self.parts.categories:
            there = ", ".join(self.parts.categories)
            raise InputError(f"what kind of object is it? Name it with --category, or by its folder: {there}")
        return self.parts.categories.index(name)

    def expect(self, inputs: Sequence[Any]) -> None:
        super().expect(inputs)
        known = {self.category, *(Path(given).absolute().parent.name for given in inputs)} & {*self.parts.categories}
        if inputs and not known:
            self.category_of(inputs[0])  # no file's can be told

    def open(self, given: CloudLike) -> OpenedCloud:
        opened = super().open(given)
        self.category_of(opened.path)
        return opened

    def answer(self, opened: Sequence[OpenedCloud], progress: Progress = silent) -> list[SegmentedCloud]:
        how = self.card.preprocess
        inputs = torch.stack([cloud.rows[how.choose(cloud.rows)] for cloud in opened])
        categories = [self.category_of(cloud.path) for cloud in opened]
        told = torch.tensor(categories, device=self.device) if self.parts.categories else None
        scores = expect_finite(self.module(inputs.to(self.device), told).float().cpu())
        progress(len(opened) / 2)
        answers = []
        for cloud, read, own, category in zip(opened, inputs, scores, categories):
            members = torch.tensor(self.parts.members[category])
            likely = own[:, members].softmax(-1)[None]
            labels = [
                members[interpolate(likely, read[None, :, :3], rows[None, :, :3])[0].argmax(-1)]
                for rows in cloud.rows.split(BLOCK)
            ]
            answers.append(SegmentedCloud(torch.cat(labels).numpy(), self.classes, cloud, how.up))
            progress(0.5)
        return answers

    def view(self, opened: OpenedCloud, answer: SegmentedCloud) -> PointView:
        return answer.view


class PartLabels(CloudWriter):
    """Parts as .ply files, OUT/labels/NAME.ply with a class and a colour for each point; pages that turn.

    Args:
        out: the folder.
        classes: names of the parts, written to OUT/parts.txt.
        pages: whether pages are wanted.
    """

    def __init__(self, out: Path, classes: Sequence[str], pages: bool = True):
        super().__init__(out, pages)
        self.palette = np.array(default_palette(len(classes)), np.uint8)
        out.mkdir(parents=True, exist_ok=True)
        with atomic(out / "parts.txt") as file:
            file.write("".join(f"{name}\n" for name in classes).encode())

    def save(self, source: Source, answer: SegmentedCloud, frame: int | None = None) -> list[Path]:
        """Writes the points with their parts, and the page."""
        path = self.place("labels", source, ".ply")
        with atomic(path) as file:
            write_ply(file, answer.opened.cloud, answer.labels, self.palette[answer.labels])
        return [path, *super().save(source, answer)]

    def describe(self, answer: SegmentedCloud) -> str:
        """The share of each part."""
        total = len(answer.labels)
        shares = [f"{name} {100 * n / total:.1f} %" for name, n in answer.counts().items()]
        return noted(", ".join(shares), answer.opened.notes)

    def as_json(self, answer: SegmentedCloud) -> dict:
        """How many points each part has; how many there are; what was left out."""
        return {"parts": answer.counts(), **answer.opened.facts()}


# -- training and scoring ----------------------------------------------------------------------------------------------


class PartIoU(Evaluator):
    """Intersection over union of parts, in per cent: mean over objects, and over categories; and right points.

    Args:
        data: items of `CloudSamples` with parts.
        parts: what the numbers of points mean.
        batch: samples in one forward pass.
    """

    names = ("loss", "instance_miou", "class_miou", "accuracy")
    primary = "instance_miou"

    def __init__(self, data: CloudSamples, parts: Parts, batch: int | None = None):
        self.data, self.parts, self.batch = data, parts, batch

    def measure(self, model: nn.Module, batch: dict, totals: Totals) -> None:
        scores = answer(model, batch, self.parts).float()
        truth, categories = batch["points"], batch["label"].tolist()
        loss, counted = F.cross_entropy(scores.mT, truth, ignore_index=-1, reduction="sum"), truth >= 0
        right, ious = 0, []
        for own, true, category in zip(scores, truth, categories):
            members = torch.tensor(self.parts.members[category], device=own.device)
            found = members[own[:, members].argmax(-1)]
            found, true = found[true >= 0], true[true >= 0]
            right += (found == true).sum()
            both = torch.stack([((found == m) & (true == m)).sum() for m in members])
            either = torch.stack([((found == m) | (true == m)).sum() for m in members])
            ious.append(torch.where(either > 0, both / either, 1.0).double().mean())
        totals.add(loss=loss, points=counted.sum(), right=right)
        totals.keep(iou=torch.stack(ious), category=batch["label"])

    def scores(self, totals: Totals) -> dict[str, float]:
        count, iou, category = totals["points"].item(), totals["iou"], totals["category"]
        by_category = torch.stack([iou[category == c].mean() for c in category.unique()])
        return {
            "loss": totals["loss"].item() / max(count, 1),
            "instance_miou": 100 * iou.mean().item(),
            "class_miou": 100 * by_category.mean().item(),
            "accuracy": 100 * totals["right"].item() / max(count, 1),
        }

    def describe(self, scores: dict[str, float]) -> str:
        return (
            f"loss {scores['loss']:.3f}, instance mIoU {scores['instance_miou']:.2f} %, class mIoU "
            f"{scores['class_miou']:.2f} %, {scores['accuracy']:.2f} % of points"
        )


def answer(model: nn.Module, batch: dict, parts: Parts) -> Tensor:
    """The scores of all points (B, N, parts)."""
    return model(batch["input"], batch["label"] if parts.categories else None)


class PartsTask(CloudTask):
    """Clouds whose points have labels -> cross entropy over all points.

    Raises:
        InputError: the data and the model do not fit together.
    """

    listed = "point-segmentation"

    def __init__(self, recipe: PartsRecipe):
        super().__init__(recipe)
        labelled = has_classes(recipe.data, recipe.val)
        clouds, held_out = open_clouds(recipe.data, recipe.val, recipe.holdout, labelled, recipe.columns)
        with progress_bar("reading labels", len(clouds)) as advance:
            self.parts = Parts.of(recipe.data, clouds, advance)
        channels = {"in_chans": self.preprocess.channels} if self.preprocess.features else {}
        own = recipe.model_args.get("backbone_args", {})
        self.args = {
            "num_classes": len(self.parts.names),
            "num_categories": len(self.parts.categories),
            **recipe.model_args,
            **({"backbone_args": {**channels, **own}} if channels else {}),
        }
        expect_task(recipe.model, self.listed)
        self.model = build_model(recipe, **self.args)
        self.data = CloudSamples(clouds, self.preprocess, self.augment, parts=self.parts)
        self.evaluator = PartIoU(CloudSamples(held_out, self.preprocess, parts=self.parts), self.parts)

    @classmethod
    def resolve(cls, recipe: PartsRecipe) -> PartsRecipe:
        """As `CloudTask`; a checkpoint of a backbone is what the model is built around."""
        card = read_card(recipe.checkpoint) if recipe.checkpoint else None
        if card is None or not isinstance(card.preprocess, PointPreprocess) or zoo.find(card.model).task == cls.listed:
            return super().resolve(recipe)
        args = {name: value for name, value in card.args.items() if name != "num_classes"}
        own = recipe.model_args
        around = {"backbone": card.model, "backbone_args": {**args, **own.get("backbone_args", {})}}
        resolved = super().resolve(replace(cls.as_read(recipe, card.preprocess), checkpoint=None))
        return replace(resolved, checkpoint=recipe.checkpoint, model_args={**own, **around})

    @classmethod
    def judge(cls, recipe: PartsRecipe, model: nn.Module, card: ModelCard) -> PartIoU:
        parts = Parts(card.classes)
        clouds: CloudSet = every_cloud(recipe.data, parts.categories, recipe.columns)
        return PartIoU(CloudSamples(clouds, card.preprocess, parts=parts), parts, recipe.batch)

    def forward(self, model: nn.Module, batch: dict) -> dict[str, Tensor]:
        scores = answer(model, batch, self.parts)
        return {"loss": F.cross_entropy(scores.float().mT, batch["points"], ignore_index=-1), "output": scores}

    def card(self) -> ModelCard:
        return ModelCard(self.recipe.model, self.args, self.parts.names, self.preprocess)

    def describe(self) -> str:
        kinds = len(self.parts.categories)
        return (
            f"{len(self.parts.names)} parts" + (f" of {kinds} categories" if kinds else "") + f", {super().describe()}"
        )
