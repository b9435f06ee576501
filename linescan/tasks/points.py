"""Classification of point clouds: files in, names out (`PointClassifier`); and how such models are trained and scored.

Training, augmentation and voting are those of Point-BERT (arXiv 2111.14819) and Point-MAE (arXiv 2203.06604), which
PointMamba and Mamba3D took over. Of their voting the mean is kept here, not the best of many rounds.
"""

from typing import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..engine.cards import ModelCard
from ..engine.cloud_sets import CloudSamples, CloudSet, cloud_classes, every_cloud, few_shot, open_clouds
from ..engine.data import seed_all
from ..errors import InputError
from ..media.clouds import PointAugment, PointPreprocess
from ..media.draw_points import PointView
from .base import build_model
from .classify import Accuracy, Labels, Predictions
from .clouds import CloudTask, CloudTool, CloudWriter, OpenedCloud, noted
from .recipes import PointClassificationRecipe
from .tool import Progress, expect_finite, silent

__all__ = ["CloudLabels", "NamedCloud", "PointClassificationTask", "PointClassifier"]


class NamedCloud(Predictions):
    """The likeliest classes of a cloud, best first.

    Attributes:
        opened: the cloud, and what the model read of it.
        view: what is to be seen of it.
    """

    def __init__(self, probabilities: Tensor, classes: Sequence[str], topk: int, opened: OpenedCloud, up: str):
        super().__init__(probabilities, classes, topk)
        cloud, self.opened = opened.cloud, opened
        said = ", ".join(f"{p.label} {100 * p.probability:.0f} %" for p in self[:3])
        self.view = PointView(cloud.points, colours=cloud.colours, up=up, title=said)


class PointClassifier(CloudTool):
    """Names what clouds of points show.

        classify = PointClassifier(checkpoint="runs/scans/best.safetensors")
        for guess in classify("chair.ply"):
            print(guess.label, guess.probability)

    The model reads as many points of a cloud as it was trained with, those that are farthest from each other, among
    16,384 at most. With votes, so many other draws of points are read as well, and the mean is the answer.

    Args:
        topk: how many classes an answer has.
        votes: how many draws; 0 for the one above.
        augment: what is done to each draw, as in training.
        kwargs: of `CloudTool`.

    Raises:
        InputError, CheckpointError: see `CloudTool`; or the model is no classifier.
    """

    task = "point-classification"

    def __init__(self, *args, topk: int = 5, votes: int = 0, augment: str = "none", **kwargs):
        super().__init__(*args, **kwargs)
        if not self.module.num_classes:
            raise InputError(f"this {self.model_name} names no clouds: it was saved without classes")
        self.topk, self.votes, self.augment = topk, votes, PointAugment(augment, self.card.preprocess)

    def answer(self, opened: Sequence[OpenedCloud], progress: Progress = silent) -> list[NamedCloud]:
        logits = []
        for vote in range(max(self.votes, 1)):
            inputs = [self.drawn(cloud.rows, vote) for cloud in opened]
            logits.append(expect_finite(self.module(torch.stack(inputs).to(self.device)).float().cpu()))
            progress(len(opened) / max(self.votes, 1))
        mean = torch.stack(logits).mean(0).softmax(-1)
        up = self.card.preprocess.up
        return [NamedCloud(p, self.classes, self.topk, cloud, up) for p, cloud in zip(mean, opened)]

    def drawn(self, rows: Tensor, vote: int) -> Tensor:
        """What the model reads of a cloud; of a vote, always the same, whatever other clouds there are."""
        if self.votes:
            seed_all(0, "vote", vote)
        return self.augment(rows[self.card.preprocess.choose(rows, random=bool(self.votes))])

    def view(self, opened: OpenedCloud, answer: NamedCloud) -> PointView:
        return answer.view


class CloudLabels(CloudWriter):
    """The likeliest classes in words; pages that turn."""

    def describe(self, answer: NamedCloud) -> str:
        """The classes and their probabilities."""
        return noted(Labels().describe(answer), answer.opened.notes)

    def as_json(self, answer: NamedCloud) -> dict:
        """Each class with its probability and index; how many points there are; what was left out."""
        return {"classes": Labels().as_json(answer), **answer.opened.facts()}


# -- training and scoring ----------------------------------------------------------------------------------------------


def vote(model: nn.Module, inputs: Tensor) -> Tensor:
    """Logits of clouds (B, N, C), or the mean of those of all draws (B, votes, N, C)."""
    if inputs.ndim == 3:
        return model(inputs)
    return model(inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2]).mean(1)


class PointClassificationTask(CloudTask):
    """Clouds -> cross entropy against their labels.

    Raises:
        InputError: the data and the model do not fit together.
    """

    listed = "point-classification"
    recipe: PointClassificationRecipe

    def __init__(self, recipe: PointClassificationRecipe):
        super().__init__(recipe)
        self.classes = cloud_classes(recipe.data, recipe.val)
        self.args = {"num_classes": len(self.classes), "in_chans": self.preprocess.channels, **recipe.model_args}
        self.model = build_model(recipe, **self.args)
        if getattr(self.model, "num_classes", None) != len(self.classes) or not hasattr(self.model, "get_classifier"):
            raise InputError(f"{recipe.model} is no classifier of the {len(self.classes)} classes of the data")
        clouds, held_out = open_clouds(recipe.data, recipe.val, recipe.holdout, columns=recipe.columns)
        if recipe.shots:
            clouds, held_out = few_shot(clouds, held_out, *recipe.shots, recipe.fold)
        self.data = CloudSamples(clouds, self.preprocess, self.augment)
        self.evaluator = judge(held_out, self.preprocess, recipe, self.augment)

    @classmethod
    def judge(cls, recipe: PointClassificationRecipe, model: nn.Module, card: ModelCard) -> Accuracy:
        clouds = every_cloud(recipe.data, card.classes, recipe.columns)
        augment = recipe.augment or ("scale+shift" if card.preprocess.normalise else "rotate")
        return judge(clouds, card.preprocess, recipe, augment, card.classes)

    def forward(self, model: nn.Module, batch: dict) -> dict[str, Tensor]:
        logits = model(batch["input"])
        loss = F.cross_entropy(logits.float(), batch["label"], label_smoothing=self.recipe.smoothing)
        return {"loss": loss, "output": logits}

    def card(self) -> ModelCard:
        return ModelCard(self.recipe.model, self.args, list(self.classes), self.preprocess)

    def describe(self) -> str:
        return f"{len(self.classes)} classes, {super().describe()}"


def judge(
    clouds: CloudSet,
    preprocess: PointPreprocess,
    recipe: PointClassificationRecipe,
    augment: str,
    classes: Sequence[str] | None = None,
) -> Accuracy:
    """Accuracy on held-out clouds, each as it is, or by votes."""
    votes = recipe.votes
    samples = CloudSamples(clouds, preprocess, augment if votes else None, votes)
    return Accuracy(samples, vote, max(recipe.batch // max(votes, 1), 1), classes)
