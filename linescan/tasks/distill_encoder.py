"""Distillation of image encoders: a map of features that matches a frozen teacher's, without labels.

RWKV-SAM's encoder is trained to match that of SAM's ViT-H (arXiv 2406.19369), by the mean squared error. The teacher is
any model of linescan or timm; or its features, computed elsewhere, are read from files.
"""

from pathlib import Path
from typing import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from .. import zoo
from ..engine.cards import ModelCard, preprocess_of
from ..engine.image_sets import ImageSet, open_data
from ..engine.optimisers import groups_of
from ..engine.scores import Evaluator, Totals
from ..errors import InputError
from ..media.preprocess import Preprocess
from .base import Task, build_model
from .recipes import EncoderDistillationRecipe
from .teacher import Teacher

__all__ = ["EncoderDistillationTask", "EncoderStudent", "FeatureFiles", "FeatureSamples", "FeatureScores", "map_of"]


def map_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """The last map of features, (B, C, h, w): of a promptable segmentor what its decoder reads, else after the norm.

    Raises:
        InputError: the model gives none.
    """
    if hasattr(model, "prompt_encoder"):
        return model.encode(inputs).embedding
    if not hasattr(model, "forward_intermediates"):
        raise InputError(f"{type(model).__name__} gives no maps of features")
    return model.forward_intermediates(inputs, indices=1, norm=True, intermediates_only=True)[0]


class EncoderStudent(nn.Module):
    """An encoder, and what maps its features to the teacher's channels.

    Args:
        encoder: the model that is wanted. What its map does not depend on (a classifier, a decoder) is not trained.
        channels: of the teacher's map.
        shape: of the encoder's inputs, (C, H, W).
    """

    def __init__(self, encoder: nn.Module, channels: int, shape: Sequence[int]):
        super().__init__()
        self.encoder = encoder.eval()
        found = map_of(encoder, torch.zeros(1, *shape))
        found.sum().backward()
        for parameter in encoder.parameters():
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None
        self.projection = nn.Identity() if found.shape[1] == channels else nn.Conv2d(found.shape[1], channels, 1)
        self.train()

    def forward(self, inputs: Tensor, size: tuple[int, int]) -> Tensor:
        """Images (B, C, H, W) -> the map in the teacher's channels and of this (height, width), float32."""
        found = self.projection(map_of(self.encoder, inputs)).float()
        return found if found.shape[-2:] == size else F.interpolate(found, size, mode="bilinear", align_corners=False)


# -- data -------------------------------------------------------------------------------------------------------------


class FeatureFiles:
    """Features of images that a teacher has left: FOLDER/NAME.npz for the image ROOT/NAME.jpg, folders alike.

    A file holds one array (C, h, w), or one of the name `features`: of all of the image, prepared as the student's
    inputs are (see `FeatureSamples`).

    Args:
        folder: of the files.
        roots: of the images, one or several.
    """

    def __init__(self, folder: str | Path, *roots: str | Path):
        self.folder, self.roots = Path(folder), [Path(root) for root in roots]
        if not self.folder.is_dir():
            raise InputError(f"{folder} is not a folder")

    def read(self, image: str) -> Tensor:
        """The features of an image, (C, h, w) float32. Raises InputError: there are none, or they are damaged."""
        root = next(root for root in self.roots if Path(image).is_relative_to(root))
        path = self.folder / Path(image).relative_to(root).with_suffix(".npz")
        if not path.is_file():
            raise InputError(f"{image} has no features: {path} is missing")
        try:
            with np.load(path, allow_pickle=False) as arrays:
                name = "features" if "features" in arrays.files else arrays.files[0] if len(arrays.files) == 1 else None
                features = None if name is None else np.asarray(arrays[name], np.float32)
        except Exception as error:  # a damaged archive raises anything
            raise InputError(f"{path} cannot be read: {error}") from None
        if features is None or features.ndim != 3 or not features.size:
            raise InputError(f"{path} holds no array (channels, height, width), alone or by the name `features`")
        if not np.isfinite(features).all():
            raise InputError(f"{path} holds NaN or infinity")
        return torch.from_numpy(features)


class FeatureSamples(Dataset):
    """Items {"input": (C, S, S)}, and with files {"target": (C', h, w)} too.

    All of an image is scaled: into a square that is padded for promptable segmentors, else to the model's shape.

    Args:
        images: the images.
        preprocess: how the student wants them.
        padded: whether they keep their shape, and are padded.
        files: the teacher's features; all of one shape.
        flip: how often an image is mirrored.
    """

    def __init__(
        self, images: ImageSet, preprocess: Preprocess, padded: bool, files: FeatureFiles | None, flip: float = 0.0
    ):
        self.images, self.preprocess, self.padded, self.files, self.flip = images, preprocess, padded, files, flip
        self.in_memory = images.in_memory
        self.shape = tuple(files.read(images.names[0]).shape) if files else None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One sample. Raises InputError: the image or its features cannot be read, or have another shape."""
        image = self.images.image(index, self.preprocess.channels)
        if float(torch.rand(())) < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        sample = {"input": self.preprocess.fitted(image)[0] if self.padded else self.preprocess.whole(image)}
        if self.files:
            target = sample["target"] = self.files.read(self.images.names[index])
            if target.shape != self.shape:
                raise InputError(
                    f"the features of {self.images.names[index]} are {tuple(target.shape)}, others {self.shape}"
                )
        return sample


# -- task -------------------------------------------------------------------------------------------------------------


class FeatureScores(Evaluator):
    """Mean squared error from the teacher's map, and the mean cosine of the angle between them, place by place.

    Args:
        task: which has the teacher.
        data: the held-out set.
    """

    names = ("mse", "cosine")
    primary = "mse"
    higher = False

    def __init__(self, task: "EncoderDistillationTask", data: FeatureSamples):
        self.task, self.data = task, data

    def measure(self, model: nn.Module, batch: dict[str, Tensor], totals: Totals) -> None:
        target = self.task.target(batch)
        found = model(batch["input"], target.shape[-2:])
        totals.add(
            mse=F.mse_loss(found, target) * len(target),
            cosine=F.cosine_similarity(found, target, dim=1).mean() * len(target),
            samples=len(target),
        )

    def scores(self, totals: Totals) -> dict[str, float]:
        return {name: (totals[name] / totals["samples"]).item() for name in self.names}


class EncoderDistillationTask(Task):
    """Images -> the mean squared error of the student's map of features from the teacher's.

    Raises:
        InputError: neither model gives maps of features, or the data or the features cannot be used.
    """

    unit = "images"
    recipe: EncoderDistillationRecipe

    def __init__(self, recipe: EncoderDistillationRecipe):
        super().__init__(recipe)
        name = recipe.model.partition(".")[0]
        promptable = zoo.is_model(name) and zoo.find(name).task == "prompting"
        args = {} if promptable else {"num_classes": 0}
        encoder = build_model(recipe, **args)
        size = recipe.model_args.get("img_size") or getattr(encoder, "img_size", None)
        preprocess = preprocess_of(encoder, recipe.model_args.get("in_chans"), size)
        self.card_of = ModelCard(recipe.model, args | recipe.model_args, [], preprocess)
        train, held_out = open_data(recipe.data, recipe.val, recipe.holdout, labelled=False)
        files = FeatureFiles(recipe.features, *filter(None, (recipe.data, recipe.val))) if recipe.features else None
        flip = 0.0 if files else recipe.flip
        self.data = FeatureSamples(train, preprocess, promptable, files, flip)
        self.evaluator = FeatureScores(self, FeatureSamples(held_out, preprocess, promptable, files))
        self.teacher = None
        if not files:
            self.teacher = Teacher(recipe.teacher, recipe.teacher_checkpoint, recipe.teacher_args, preprocess)
        sample = {"input": torch.zeros(1, *preprocess.size)}
        channels = self.data.shape[0] if files else self.target(sample).shape[1]
        self.model = EncoderStudent(encoder, channels, preprocess.size)

    @torch.no_grad()
    def target(self, batch: dict[str, Tensor]) -> Tensor:
        """The teacher's map, float32."""
        if self.teacher is None:
            return batch["target"]
        return map_of(self.teacher.model, self.teacher.prepare(batch["input"])).float()

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        target = self.target(batch)
        found = model(batch["input"], target.shape[-2:])
        return {"loss": F.mse_loss(found, target), "output": found}

    def product(self, model: EncoderStudent) -> nn.Module:
        return model.encoder

    def card(self) -> ModelCard:
        return self.card_of

    def parameter_groups(self) -> list[dict]:
        projection = groups_of(self.recipe, self.model.projection, by_layer=False)
        return groups_of(self.recipe, self.model.encoder) + projection

    def checkpoint_gradients(self) -> None:
        self.model.encoder.set_grad_checkpointing()

    def describe(self) -> str:
        recipe = self.recipe
        source = f"features of {recipe.features}" if recipe.features else recipe.teacher or recipe.teacher_checkpoint
        return f"{super().describe()}; teacher {source}"
