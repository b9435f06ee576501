"""Segmentation of volumes: scans in, labels out (`VolumeSegmenter`); and how such networks are trained and scored."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ..engine.atomic import atomic, write_all
from ..engine.cards import ModelCard, read_card
from ..engine.organ_sets import LabelledVolumes, find_organs, planes, richest_planes
from ..engine.scores import Evaluator, Totals
from ..errors import InputError
from ..media.draw import default_palette, draw_planes
from ..media.find import Source
from ..media.page import page, table
from ..media.volumes import Volume, VolumePreprocess, read_volume, write_labels
from ..zoo import find, is_model
from .base import Task, build_model
from .open import expect_task, restore_for
from .recipes import VolumeSegmentationRecipe
from .report import csv_bytes, previews
from .segment import cross_entropy, dice_loss
from .tool import Progress, Tool, Writer, expect_finite, silent
from .windows import positions

__all__ = ["LabelFiles", "OrganDice", "VolumeSegmentationTask", "VolumeSegmenter", "segments_volumes", "slide_volume"]

TASK = "volume-segmentation"


def segments_volumes(model: str | Path | None, checkpoint: str | Path | None) -> bool:
    """Whether a model of this name, or the one that the checkpoint names, is one for volumes."""
    card = read_card(checkpoint) if checkpoint and model is None else None
    name = card.model if card else str(model)
    return is_model(name) and find(name).task == TASK


def slide_volume(
    volume: Tensor,
    forward: Callable[[Tensor], Tensor],
    window: int,
    *,
    overlap: float = 0.5,
    batch: int = 1,
    progress: Progress = silent,
) -> Tensor:
    """The mean of the logits of all cubes over each voxel, (C, X, Y, Z), float32.

    Args:
        volume: (X, Y, Z); sides that are shorter than a cube are filled up with zeros.
        forward: cubes (B, 1, window, window, window) -> logits (B, C, ...).
        window: side of the cubes.
        overlap: the share of a cube that the next one has too, at least.
        batch: cubes in one call of `forward`.
        progress: gets the shares of the work as they are done, 1 in all.
    """
    sides = volume.shape
    volume = F.pad(volume, [n for side in reversed(sides) for n in (0, max(window - side, 0))])
    stride = max(int(window * (1 - overlap)), 1)
    starts = list(product(*(positions(side, window, stride) for side in volume.shape)))
    parts = [tuple(slice(at, at + window) for at in start) for start in starts]
    total, count = None, torch.zeros(volume.shape, device=volume.device)
    for first in range(0, len(parts), batch):
        together = parts[first : first + batch]
        answers = forward(torch.stack([volume[part] for part in together])[:, None]).float()
        if total is None:
            total = torch.zeros(answers.shape[1], *volume.shape, device=volume.device)
        for part, answer in zip(together, answers):
            total[(slice(None), *part)] += answer
            count[part] += 1
        progress(len(together) / len(parts))
    return total.div_(count)[:, : sides[0], : sides[1], : sides[2]]


# -- training ---------------------------------------------------------------------------------------------------------


class OrganDice(Evaluator):
    """Dice of each organ, the mean over the held-out volumes that have it (or seem to), and the mean of these.

    Volumes are scored whole, by cubes that overlap by half, at the model's spacing. The background does not count.

    Args:
        data: whole volumes.
        window: side of the cubes.
    """

    data: LabelledVolumes
    primary = "dice"
    batch = 1  # volumes differ in size

    def __init__(self, data: LabelledVolumes, window: int, cubes: int):
        self.data, self.window, self.cubes = data, window, cubes
        words = ("".join(c if c.isalnum() else "_" for c in name.lower()) for name in data.classes[1:])
        self.names = ("dice", *(f"dice_{word}" for word in dict.fromkeys(words)))
        if len(self.names) != len(data.classes):
            raise InputError(f"two classes have one name: {', '.join(data.classes)}")

    def measure(self, model: nn.Module, batch: dict[str, Tensor], totals: Totals) -> None:
        for volume, truth, index in zip(batch["volume"], batch["labels"], batch["index"]):
            found = slide_volume(volume[0], model, self.window, batch=self.cubes).argmax(0)
            count = len(self.data.classes)
            pairs = torch.bincount(truth.flatten().long() * count + found.flatten(), minlength=count**2)
            pairs = pairs.view(count, count).double()
            dice = 2 * pairs.diagonal() / (pairs.sum(0) + pairs.sum(1))  # NaN where there is none of it in either
            totals.keep(dice=dice[None, 1:], index=index[None])

    def scores(self, totals: Totals) -> dict[str, float]:
        each = totals["dice"].nanmean(0)
        return dict(zip(self.names, [each.nanmean().item(), *each.tolist()]))

    def describe(self, scores: dict[str, float]) -> str:
        return f"mean Dice of {len(self.names) - 1} organs {scores['dice']:.4f}"

    def report(self, totals: Totals, folder: Path, title: str) -> tuple[dict, list[Path]]:
        """report.html (Dice of each organ in each volume, the worst volume first), and volumes.csv."""
        dice, index = totals["dice"].numpy(), totals["index"].numpy()
        means = [float(np.nanmean(row)) if np.isfinite(row).any() else float("nan") for row in dice]
        order = np.argsort(means, kind="stable")
        head = ["volume", "mean", *self.data.classes[1:]]
        rows = [[Path(self.data.names[index[i]]).name, *(f"{v:.4f}" for v in (means[i], *dice[i]))] for i in order]
        scores = self.scores(totals)
        rows.append(["mean", *(f"{scores[name]:.4f}" for name in self.names)])
        worst = previews(self.data, ((int(index[i]), means[i]) for i in order[:12]))
        sections = [
            ("Volumes", "Dice of each organ; nan where a volume has none of it.", table(head, rows)),
            ("Volumes with the lowest Dice", "With their true labels.", worst),
        ]
        contents = {
            "report.html": page(title, f"{len(order)} volumes. {self.describe(scores)}.", sections),
            "volumes.csv": csv_bytes(head, rows),
        }
        return {"organs": dict(zip(self.data.classes[1:], dice.T.tolist()))}, write_all(folder, contents)


HOW = "spacing", "intensity", "window"
"""What a recipe may say of how volumes are read."""


class VolumeSegmentationTask(Task):
    """Cubes of volumes and their labels -> cross-entropy and Dice loss.

    Raises:
        InputError: a model that segments no volumes, or data that cannot be used.
    """

    losses = ("loss", "entropy", "dice")
    unit = "volumes"
    listed = TASK
    recipe: VolumeSegmentationRecipe

    def __init__(self, recipe: VolumeSegmentationRecipe):
        super().__init__(recipe)
        expect_task(recipe.model, self.listed)
        published = find(recipe.model).preprocess
        preprocess = VolumePreprocess(**{name: getattr(recipe, name) or published[name] for name in HOW})
        found = find_organs(recipe.data, recipe.holdout)
        held_out = find_organs(recipe.val, recipe.holdout) if recipe.val else found
        if held_out.classes != found.classes:
            raise InputError(f"{recipe.val} has other classes than {recipe.data}")
        args = {"num_classes": len(found.classes), "img_size": preprocess.window}
        self.model = build_model(recipe, **args)
        self.card_of = ModelCard(recipe.model, args | recipe.model_args, list(found.classes), preprocess)
        self.data = LabelledVolumes(found.train, found.classes, preprocess, recipe.repeats)
        self.evaluator = OrganDice(
            LabelledVolumes(held_out.held_out, found.classes, preprocess), preprocess.window, recipe.batch
        )

    @classmethod
    def resolve(cls, recipe: VolumeSegmentationRecipe) -> VolumeSegmentationRecipe:
        """As `Task`, and with how the volumes of its checkpoint are read."""
        card = read_card(recipe.checkpoint) if recipe.checkpoint else None
        before = {name: getattr(recipe, name) or getattr(card and card.preprocess, name, None) for name in HOW}
        return replace(super().resolve(recipe), **before)

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits, target = model(batch["volume"]).float(), batch["labels"]
        entropy, dice = cross_entropy(logits, target), dice_loss(logits, target)
        return {"loss": entropy + self.recipe.dice_weight * dice, "entropy": entropy, "dice": dice, "output": logits}

    def card(self) -> ModelCard:
        return self.card_of

    @classmethod
    def judge(cls, recipe: VolumeSegmentationRecipe, model: nn.Module, card: ModelCard) -> Evaluator:
        found = find_organs(recipe.data, recipe.holdout)
        if card.classes and len(card.classes) != len(found.classes):
            raise InputError(f"{recipe.data} has {len(found.classes)} classes, the model {len(card.classes)}")
        data = LabelledVolumes(found.held_out, found.classes, card.preprocess)
        return OrganDice(data, card.preprocess.window, recipe.batch)


# -- the user's side --------------------------------------------------------------------------------------------------


class VolumeSegmenter(Tool):
    """Says what each voxel of a volume is.

        segment = VolumeSegmenter(checkpoint="runs/btcv/best.safetensors")
        labels = segment("abdomen.nii.gz")                      # (X, Y, Z), axes to the right, the front and the top
        print(segment.classes[labels[100, 120, 40]])

    A volume is resampled to the model's spacing, read in cubes that overlap by half, and the answer is resampled back.
    Arrays, and .npy files, have no spacing: they are read as they are.

    Args:
        model: a name of `linescan list --task volume-segmentation`; not needed where the checkpoint names it.
        checkpoint: its weights (.pt, .safetensors). Without it, the published ones.
        device, dtype: as for `Tool`.
        batch: cubes in one forward pass.
        window: side of the cubes; by default as the model was trained.
        args: further arguments of the model.

    Raises:
        InputError, CheckpointError: no such model, one that segments no volumes, or no weights for it.
    """

    kinds = ("volume",)

    def __init__(
        self,
        model: str | None = None,
        checkpoint: str | Path | None = None,
        *,
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
        batch: int = 1,
        window: int | None = None,
        **args,
    ):
        module, card = restore_for(TASK, model, checkpoint, **args)
        super().__init__(card.model, module, device, dtype, batch)
        self.preprocess: VolumePreprocess = card.preprocess
        self.window = VolumePreprocess((1, 1, 1), (0, 1), self.preprocess.window if window is None else window).window
        count = getattr(module, find(card.model).classifier).out_channels
        self.classes = card.classes or [f"class {i}" for i in range(count)]
        self.palette = default_palette(len(self.classes))

    def facts(self) -> dict[str, str]:
        """What there is to know of this tool, by name."""
        return super().facts() | {"classes": f"{len(self.classes)} classes", "windows": f"cubes of {self.window}"}

    def open(self, given: Any) -> Volume:
        """A file, a `Volume`, or an array (X, Y, Z)."""
        if isinstance(given, Volume):
            return given
        if isinstance(given, (str, Path)):
            return read_volume(given)
        array = np.asarray(given)
        if array.ndim != 3 or array.dtype.kind not in "buif" or not np.isfinite(array).all():
            raise InputError(f"a volume is an array (X, Y, Z) of finite numbers, not {array.dtype} {array.shape}")
        return Volume(array)

    def answer(self, opened: Sequence[Volume], progress: Progress = silent) -> list[np.ndarray]:
        return [self._labels(volume, progress) for volume in opened]

    def _labels(self, volume: Volume, progress: Progress) -> np.ndarray:
        values = self.preprocess(volume).to(self.device)
        logits = expect_finite(
            slide_volume(values, self.module, self.window, batch=self.batch, progress=progress), large=True
        )
        best = torch.full(volume.array.shape, -torch.inf, device=self.device)
        labels = torch.zeros(volume.array.shape, dtype=torch.uint8, device=self.device)
        for number, one in enumerate(logits):  # one after the other: all of them would not fit at full size
            one = F.interpolate(one[None, None], volume.array.shape, mode="trilinear", align_corners=False)[0, 0]
            labels[one > best] = number
            best = torch.maximum(best, one)
        return labels.cpu().numpy()

    def draw(self, opened: Volume, answer: np.ndarray, frame: bool = False) -> Image.Image:
        """Planes across each axis, those with most of the classes, side by side, with a legend."""
        return self.draw_at(opened, answer, richest_planes(answer))

    def draw_at(self, opened: Volume, answer: np.ndarray, places: tuple[int, int, int]) -> Image.Image:
        """The planes at these places along x, y and z, side by side, with a legend."""
        low, high = self.preprocess.intensity
        shown = planes((opened.array.astype(np.float32) - low) / (high - low), answer, places)
        return draw_planes(shown, self.classes, self.palette)


class LabelFiles(Writer):
    """Labels as volumes, and names and colours of the classes.

        OUT/labels/NAME.nii.gz     the class of each voxel, on the grid of the file; .npy for arrays
        OUT/classes.json           [{"id": 0, "name": ..., "color": [red, green, blue]}, ...]

    Args:
        out: the folder.
        tool: whose answers are written: its classes and colours are.
    """

    def __init__(self, out: Path, tool: VolumeSegmenter):
        self.out, self.tool = out, tool
        self.voxel: float | None = None  # ml, of the volume that was written last
        described = [{"id": i, "name": n, "color": c} for i, (n, c) in enumerate(zip(tool.classes, tool.palette))]
        self.out.mkdir(parents=True, exist_ok=True)
        with atomic(out / "classes.json") as file:
            file.write(json.dumps(described, indent=1).encode())

    def save(self, source: Source, answer: np.ndarray, frame: int | None = None) -> list[Path]:
        """Writes the labels of a volume."""
        volume = self.tool.open(source.path)
        self.voxel = float(np.prod(volume.spacing)) / 1000 if volume.spacing else None
        suffix = ".npy" if volume.affine is None else ".nii.gz"
        path = self.out / "labels" / (source.name.removesuffix(".nii") + suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as file:
            write_labels(file, answer, volume)
        return [path]

    def describe(self, answer: np.ndarray) -> str:
        """The largest organs."""
        found = [one for one in self.as_json(answer) if one["index"]]
        said = (f"{one['label']} " + (f"{one['ml']:.1f} ml" if "ml" in one else f"{one['voxels']} voxels") for one in
                found[:3])  # fmt: skip
        return ", ".join(said) or "background alone"

    def as_json(self, answer: np.ndarray) -> list[dict]:
        """The classes that occur, the largest first: voxels, and millilitres where the spacing is known."""
        counts = np.bincount(answer.ravel(), minlength=len(self.tool.classes))
        order = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
        size = {} if self.voxel is None else {"ml": self.voxel}
        return [
            {"label": self.tool.classes[i], "index": i, "voxels": int(counts[i])}
            | {name: round(float(counts[i]) * value, 3) for name, value in size.items()}
            for i in order
        ]
