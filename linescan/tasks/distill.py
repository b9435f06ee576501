"""Distillation: a classifier that matches a frozen teacher as well as the labels.

What is matched, and where it is from:

    soft       the teacher's probabilities at a temperature: T^2 KL (Hinton et al., arXiv 1503.02531)
    hard       its likeliest class, by cross entropy (DeiT, arXiv 2012.12877, without the token)
    features   its pooled features, by their mean squared difference (FitNets, arXiv 1412.6550)
    tokens     all tokens after its final norm: 2 - 2 cos (VideoMamba's self-distillation, arXiv 2403.06977)
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..engine.optimisers import groups_of
from ..errors import InputError
from ..layers.linear import trunc_normal_
from ..layers.norm import RMSNorm
from .classify import ClassificationTask
from .recipes import DistillationRecipe
from .teacher import Teacher

__all__ = ["DistillationTask", "Student"]


def width_of(model: nn.Module) -> int:
    """The number of pooled features."""
    return getattr(model, "head_hidden_size", None) or model.num_features


class Student(nn.Module):
    """A classifier, and what maps its features to the teacher's.

    Args:
        classifier: the model that is wanted.
        match: "soft" or "hard" for logits only, "features" or "tokens".
        width: channels of the teacher's features.
    """

    def __init__(self, classifier: nn.Module, match: str, width: int):
        super().__init__()
        self.classifier, self.match = classifier, match
        self.projection: nn.Module = nn.Identity()
        if match == "features" and width_of(classifier) != width:
            self.projection = nn.Linear(width_of(classifier), width)
        if match == "tokens":
            norm = getattr(classifier, "norm", None)
            norm = type(norm) if isinstance(norm, (nn.LayerNorm, RMSNorm)) else nn.LayerNorm
            linear = nn.Linear(classifier.num_features, width)
            trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            self.projection = nn.Sequential(norm(classifier.num_features), linear)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits, and the features in the teacher's space."""
        if self.match in ("soft", "hard"):
            return self.classifier(inputs), None
        tokens = self.classifier.forward_features(inputs)
        matched = tokens if self.match == "tokens" else self.classifier.forward_head(tokens, pre_logits=True)
        return self.classifier.forward_head(tokens), self.projection(matched)


class DistillationTask(ClassificationTask):
    """Classification with a teacher: label_weight * cross entropy + match_weight * the difference from the teacher.

    Raises:
        InputError: teacher and student do not fit together.
    """

    losses = ("loss", "label_loss", "match_loss")
    recipe: DistillationRecipe

    def __init__(self, recipe: DistillationRecipe):
        super().__init__(recipe)
        self.teacher = Teacher(recipe.teacher, recipe.teacher_checkpoint, recipe.teacher_args, self.preprocess)
        self.order = self._order() if recipe.match in ("soft", "hard") else None
        teacher = self.teacher.model
        width = teacher.num_features if recipe.match == "tokens" else width_of(teacher)
        self.model = Student(self.model, recipe.match, width)
        if recipe.match in ("features", "tokens"):
            self._probe()

    def _order(self) -> list[int] | None:
        """The teacher's classes in the order of the data's, by their names; None where they already are."""
        theirs, ours = list(self.teacher.classes), list(self.classes)
        if len(theirs) != len(ours):
            raise InputError(
                f"the teacher has {len(theirs)} classes, the data have {len(ours)}; --match features needs no classes"
            )
        return [theirs.index(name) for name in ours] if theirs != ours and set(theirs) == set(ours) else None

    def _probe(self) -> None:
        """Holds the shapes of both sides against each other, on one sample of zeros."""
        channels, *size = self.preprocess.size
        frames = getattr(self.model.classifier, "num_frames", 0)
        sample = torch.zeros(1, channels, *([frames] if frames else []), *size)
        self.model.eval()
        with torch.no_grad():
            try:
                (_, mine), theirs = self.model(sample), self.target(sample)
            except (AttributeError, TypeError) as error:
                raise InputError(f"--match {self.recipe.match}: a model gives no features ({error})") from None
        self.model.train()
        if mine.shape != theirs.shape or (self.recipe.match == "tokens" and mine.ndim != 3):
            raise InputError(
                f"--match {self.recipe.match}: the student's are {tuple(mine.shape)}, the teacher's "
                f"{tuple(theirs.shape)}; they must agree" + ", one row per token" * (self.recipe.match == "tokens")
            )

    @staticmethod
    def answer(model: Student, inputs: Tensor) -> Tensor:
        return model.classifier(inputs)

    @torch.no_grad()
    def target(self, inputs: Tensor) -> Tensor:
        """What the student is to match, float32."""
        teacher, inputs = self.teacher.model, self.teacher.prepare(inputs)
        if self.recipe.match in ("soft", "hard"):
            logits = teacher(inputs).float()
            return logits if self.order is None else logits[:, self.order]
        tokens = teacher.forward_features(inputs)
        if self.recipe.match == "tokens":
            return F.normalize(tokens.float(), dim=-1)
        return teacher.forward_head(tokens, pre_logits=True).float()

    def forward(self, model: nn.Module, batch: dict) -> dict[str, Tensor]:
        recipe = self.recipe
        inputs, labels = self.mixed(batch)
        logits, features = model(inputs)
        logits, target = logits.float(), self.target(inputs)
        if recipe.match == "soft":
            t = recipe.temperature
            mine, theirs = (logits / t).log_softmax(-1), (target / t).log_softmax(-1)
            match = F.kl_div(mine, theirs, reduction="batchmean", log_target=True) * t**2
        elif recipe.match == "hard":
            match = F.cross_entropy(logits, target.argmax(1))
        elif recipe.match == "features":
            match = F.mse_loss(features.float(), target)
        else:
            match = (2 - 2 * (F.normalize(features.float(), dim=-1) * target).sum(-1)).mean()
        label = self.criterion(logits, labels)
        loss = recipe.label_weight * label + recipe.match_weight * match
        return {"loss": loss, "label_loss": label, "match_loss": match, "output": logits}

    def product(self, model: Student) -> nn.Module:
        return model.classifier

    def parameter_groups(self) -> list[dict]:
        projection = groups_of(self.recipe, self.model.projection, by_layer=False)
        return groups_of(self.recipe, self.model.classifier) + projection

    def checkpoint_gradients(self) -> None:
        self.model.classifier.set_grad_checkpointing()

    def describe(self) -> str:
        millions = sum(p.numel() for p in self.teacher.model.parameters()) / 1e6
        name = self.recipe.teacher or self.recipe.teacher_checkpoint
        return f"{super().describe()}; teacher {name}, {millions:.2f} M"
