"""Boxes around objects in scans: files in, boxes out (`BoxDetector`); and how such detectors are trained and scored."""

import json
from pathlib import Path
from typing import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .. import zoo
from ..engine.atomic import atomic
from ..engine.box_scores import BoxScores
from ..engine.cards import ModelCard, read_card
from ..engine.scene_sets import SceneSamples, open_scenes
from ..errors import InputError
from ..layers.boxes import Boxes
from ..media.clouds import ScanPreprocess
from ..media.draw_points import PointView
from ..media.find import Source
from .base import Task, build_model
from .clouds import CloudTool, CloudWriter, OpenedCloud, noted
from .open import expect_task
from .recipes import ScanDetectionRecipe
from .tool import Progress, expect_finite, silent

__all__ = ["BoxDetector", "BoxTable", "FoundBoxes", "ScanDetectionTask"]


class FoundBoxes:
    """The boxes in a scan, best first.

    Attributes:
        boxes: (N, 7) or (N, 9) float32: centre x y z, length, width, height, angle about z, velocity along x and y.
        scores: (N,).
        labels: (N,) int64 numbers of `classes`.
        classes: names.
        opened: the scan.
        view: what is to be seen of it.
    """

    def __init__(self, found: Boxes, classes: Sequence[str], opened: OpenedCloud):
        self.boxes, self.scores, self.labels = (x.numpy() for x in (found.boxes, found.scores, found.labels))
        self.boxes = self.boxes + np.pad(opened.cloud.origin, (0, self.boxes.shape[1] - 3))
        self.classes, self.opened = list(classes), opened
        shown = found.boxes[:, :7].numpy()
        self.view = PointView(
            opened.cloud.points, boxes=shown, box_labels=self.labels, box_scores=self.scores, classes=self.classes
        )

    def __len__(self) -> int:
        return len(self.boxes)

    def counts(self) -> dict[str, int]:
        """How many boxes each class has, the most first."""
        numbers, counts = np.unique(self.labels, return_counts=True)
        return {self.classes[numbers[i]]: int(counts[i]) for i in np.argsort(-counts, kind="stable")}

    def as_json(self) -> list[dict]:
        """Each box as a table."""
        rows = []
        for box, score, label in zip(self.boxes.tolist(), self.scores.tolist(), self.labels.tolist()):
            row = {"class": self.classes[label], "score": round(score, 4), "centre": [round(v, 3) for v in box[:3]],
                   "size": [round(v, 3) for v in box[3:6]], "angle": round(box[6], 4)}  # fmt: skip
            rows.append(row | ({"velocity": [round(v, 3) for v in box[7:9]]} if len(box) > 7 else {}))
        return rows


class BoxDetector(CloudTool):
    """Finds objects in scans, as boxes.

        detect = BoxDetector(checkpoint="runs/street/best.safetensors")
        for box in detect("000042.bin").as_json():
            print(box["class"], box["centre"], box["score"])

    The model reads all points that lie in the space that it searches.

    Args:
        threshold: boxes with a lower score are left out.
        kwargs: of `CloudTool`.

    Raises:
        InputError, CheckpointError: see `CloudTool`; or the model finds no boxes.
    """

    task = "point-detection"

    def __init__(self, *args, threshold: float = 0.3, **kwargs):
        super().__init__(*args, **kwargs)
        self.threshold = threshold

    def answer(self, opened: Sequence[OpenedCloud], progress: Progress = silent) -> list[FoundBoxes]:
        rows = torch.cat([cloud.rows for cloud in opened]).to(self.device)
        answers = []
        for found, cloud in zip(self.module.detect(rows, [len(cloud.rows) for cloud in opened]), opened):
            found = Boxes(*(x.float() if x.is_floating_point() else x for x in vars(found.cpu()).values()))
            expect_finite(found.boxes)
            answers.append(FoundBoxes(found[found.scores >= self.threshold], self.classes, cloud))
        progress(len(opened))
        return answers

    def view(self, opened: OpenedCloud, answer: FoundBoxes) -> PointView:
        return answer.view


class BoxTable(CloudWriter):
    """Boxes as OUT/boxes/NAME.json; pages that turn."""

    def save(self, source: Source, answer: FoundBoxes, frame: int | None = None) -> list[Path]:
        """Writes the boxes, and the page."""
        path = self.place("boxes", source, ".json")
        with atomic(path) as file:
            file.write(json.dumps(answer.as_json(), indent=1).encode())
        return [path, *super().save(source, answer)]

    def describe(self, answer: FoundBoxes) -> str:
        """How many of each class."""
        said = ", ".join(f"{count} {name}" for name, count in answer.counts().items()) or "nothing found"
        return noted(said, answer.opened.notes)

    def as_json(self, answer: FoundBoxes) -> dict:
        """Each box; how many points there are; what was left out."""
        return {"boxes": answer.as_json(), **answer.opened.facts()}


# -- training and scoring ----------------------------------------------------------------------------------------------


class ScanDetectionTask(Task):
    """Scans -> the losses of the model's head against the boxes that are there.

    Raises:
        InputError: the data and the model do not fit together.
    """

    unit = "scans"
    listed = "point-detection"
    recipe: ScanDetectionRecipe

    def __init__(self, recipe: ScanDetectionRecipe):
        super().__init__(recipe)
        entry = zoo.find(recipe.model)
        scenes, held_out = open_scenes(recipe.data, recipe.holdout, recipe.sweeps)
        card = read_card(recipe.checkpoint) if recipe.checkpoint else None
        how = card.preprocess if card else ScanPreprocess(**entry.preprocess)
        self.preprocess = how if isinstance(how, ScanPreprocess) else ScanPreprocess()
        self.classes = list(scenes.classes)
        self.args = {
            "num_classes": len(self.classes), "in_chans": self.preprocess.channels, **recipe.model_args
        }  # fmt: skip
        self.model = build_model(recipe, **self.args)
        if self.model.num_classes != len(self.classes):
            raise InputError(f"the data have {len(self.classes)} classes, the model {self.model.num_classes}")
        pasting = None if recipe.steps else max(recipe.epochs - recipe.unpasted, 0)
        self.data = SceneSamples(scenes, self.preprocess, recipe.augment or scenes.augment, pasting)
        self.evaluator = BoxScores(SceneSamples(held_out, self.preprocess))

    @classmethod
    def resolve(cls, recipe: ScanDetectionRecipe) -> ScanDetectionRecipe:
        """As `Task`. Raises InputError: the model finds no boxes in scans."""
        if recipe.val:
            raise InputError("what is held out of scenes is named by lists in their folder, or by --holdout, not --val")
        recipe = super().resolve(recipe)
        expect_task(recipe.model, cls.listed)
        return recipe

    @classmethod
    def judge(cls, recipe: ScanDetectionRecipe, model: nn.Module, card: ModelCard) -> BoxScores:
        _, held_out = open_scenes(recipe.data, recipe.holdout, recipe.sweeps)
        if list(held_out.classes) != card.classes:
            raise InputError(f"{recipe.data} has {len(held_out.classes)} classes, the model {len(card.classes)} others")
        return BoxScores(SceneSamples(held_out, card.preprocess), recipe.batch)

    def forward(self, model: nn.Module, batch: dict) -> dict[str, Tensor]:
        raw = model(batch["points"], batch["lengths"])
        loss = self.model.losses(raw, list(zip(batch["boxes"], batch["labels"])))["loss"]
        return {"loss": loss, "output": torch.tensor(batch["lengths"])}

    def card(self) -> ModelCard:
        return ModelCard(self.recipe.model, self.args, self.classes, self.preprocess)

    def describe(self) -> str:
        return f"{len(self.classes)} classes, {super().describe()}"
