"""Segmentation: images in, masks out (`Segmenter`); and how models of the zoo are trained for it and scored."""

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any, Iterable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ..backbones.feature_maps import DenseBackbone
from ..engine.atomic import atomic, write_all
from ..engine.cards import ModelCard, read_card, segmentor_preprocess
from ..engine.mask_sets import (
    IGNORED,
    Augment,
    MaskedScenes,
    classes_of,
    open_scenes,
    resize_images,
    resize_mask,
    scenes_to_score,
)
from ..engine.scores import Evaluator, Totals
from ..errors import CommandError, InputError
from ..media.draw import draw_masks
from ..media.find import Source
from ..media.images import ImageLike
from ..media.large import PairedPixels, Pixels, blank, open_pixels, write_mask
from ..media.page import page, table
from ..zoo import find, is_model
from .base import Task, build_model
from .named import SegmentorInput, of_all_classes
from .open import expect_task, open_model
from .recipes import SegmentationRecipe
from .report import WORST, csv_bytes, previews
from .tool import Progress, Writer, expect_finite, silent
from .windows import Block, Size, WindowTool, bounded, enlarge, reduced_for_drawing, slide, thin, windows

__all__ = ["MaskScores", "Masks", "Segmenter", "SegmentationTask", "cross_entropy", "dice_loss", "expect_images"]


# -- training ---------------------------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """The mean over all pixels whose class is known.

    Args:
        logits: (B, C, H, W), or (B, C, X, Y, Z), of C classes; of one channel, the logits of the second of two.
        target: (B, H, W) or (B, X, Y, Z), the class, or 255.
    """
    known = target != IGNORED
    if logits.shape[1] == 1:
        losses = F.binary_cross_entropy_with_logits(logits[:, 0], (target == 1).to(logits), reduction="none") * known
    else:
        losses = F.cross_entropy(logits, target.long(), ignore_index=IGNORED, reduction="none")
    return losses.sum() / known.sum().clamp_min(1)


def dice_loss(logits: Tensor, target: Tensor, smooth: float = 1.0) -> Tensor:
    """1 - (2 sum(p t) + smooth) / (sum(p) + sum(t) + smooth): the mean over images, and over more classes than two.

    Of two classes it is that of the second. Milletari et al., "V-Net", 3DV 2016, arXiv 1606.04797.

    Args:
        logits, target: as for `cross_entropy`.
        smooth: added to both, so that a class that an image has not costs nothing where it is not found either.
    """
    count, axes = logits.shape[1], logits.ndim - 2
    numbers = torch.arange(count, device=target.device) if count > 1 else torch.ones(1, device=target.device)
    shares = (logits.softmax(1) if count > 1 else logits.sigmoid()) * (target != IGNORED)[:, None]
    truth = (target[:, None] == numbers.view(-1, *[1] * axes)).to(shares)
    shares, truth = shares.flatten(2), truth.flatten(2)
    return (1 - (2 * (shares * truth).sum(-1) + smooth) / (shares.sum(-1) + truth.sum(-1) + smooth)).mean()


def _scores_of_classes(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of each class from counts of pixels [true class, class found]; NaN where nothing is counted."""
    total, right = confusion.sum(), confusion.diagonal()
    missed, wrong = confusion.sum(1) - right, confusion.sum(0) - right
    with np.errstate(invalid="ignore"):
        return {
            "miou": right / (right + missed + wrong),
            "dice": 2 * right / (2 * right + missed + wrong),
            "sensitivity": right / (right + missed),
            "specificity": (total - right - missed - wrong) / (total - right - missed),
        }


class MaskScores(Evaluator):
    """IoU, Dice, sensitivity and specificity over the pixels of all images together, and the share of right pixels.

    Of two classes they are those of the second, as published for lesions; of more their means over the classes that
    occur. Pixels whose class is not known do not count.

    Args:
        data: images at the scale of the test, and their masks.
        input: what the network's images go through.
        factors: scales of the images, whose answers are added up, as `answers` says.
        mirror: add the answers for the mirrored images.
    """

    data: MaskedScenes
    names = ("miou", "dice", "accuracy", "sensitivity", "specificity")
    primary = "miou"

    def __init__(self, data: MaskedScenes, input: SegmentorInput, factors: Sequence[float] = (1.0,), mirror=False):
        self.data, self.input, self.factors, self.mirror = data, input, factors, mirror
        self.batch = None if input.size else 1  # images differ in size

    @classmethod
    def of(
        cls, scenes: list, classes: Sequence[str], input: SegmentorInput, recipe: SegmentationRecipe
    ) -> "MaskScores":
        """At the one size that the model resizes images to, masks as well; else with masks as they are.

        Raises:
            InputError: scales for a model of one size.
        """
        if input.size and recipe.factors != [1.0]:
            raise InputError(f"--scales is for models that take images of any size, not of {input.size} alone")

        def prepare(images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
            return input.resized(images), resize_mask(mask, input.size) if input.size else mask

        return cls(MaskedScenes(scenes, classes, prepare, input.grey_extra), input, recipe.factors, recipe.mirror)

    def answers(self, model: nn.Module, images: Tensor, size: tuple[int, int]) -> Tensor:
        """What the network says of images (B, C, H, W) of bytes: values (B, classes, *size), the highest at the class.

        Of several scales the sum of exp(logits), each resized to `size`, as Sigma's published tests have it.
        """
        every = []
        for factor in self.factors:
            sides = [max(round(side * factor), 1) for side in images.shape[-2:]]
            scaled = images if factor == 1 else torch.stack([resize_images(x, sides) for x in images])
            every.append(of_all_classes(self.input.logits(model, scaled).float()))
            if self.mirror:
                every.append(of_all_classes(self.input.logits(model, scaled.flip(-1)).float()).flip(-1))
        if len(every) > 1:
            top = torch.stack([logits.amax((1, 2, 3)) for logits in every]).amax(0)[:, None, None, None]
            every = [(logits - top).exp() for logits in every]
        return sum(x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear") for x in every)

    def measure(self, model: nn.Module, batch: dict[str, Tensor], totals: Totals) -> None:
        found = self.answers(model, batch["images"], batch["mask"].shape[-2:]).argmax(1)
        truth, count = batch["mask"].long(), len(self.data.classes)
        each = []
        for own, true in zip(found, truth):
            known = true != IGNORED
            pairs = torch.bincount(true[known] * count + own[known], minlength=count**2).view(count, count)
            each.append(pairs)
        confusion = torch.stack(each)
        totals.add(confusion=confusion.sum(0))
        worth = [self._summary(one.cpu().numpy())["miou"] for one in each]
        totals.keep(index=batch["index"], worth=torch.tensor(worth))

    def _summary(self, confusion: np.ndarray) -> dict[str, float]:
        chosen = slice(1, None) if len(confusion) == 2 else np.flatnonzero(confusion.sum(0) + confusion.sum(1))
        of_classes = {name: values[chosen] for name, values in _scores_of_classes(confusion).items()}
        means = {name: float(np.nanmean(v)) if np.isfinite(v).any() else float("nan") for name, v in of_classes.items()}
        means["accuracy"] = float(confusion.trace() / max(confusion.sum(), 1))
        return {name: means[name] for name in self.names}

    def scores(self, totals: Totals) -> dict[str, float]:
        return self._summary(totals["confusion"].numpy())

    def describe(self, scores: dict[str, float]) -> str:
        return f"mIoU {scores['miou']:.4f}, Dice {scores['dice']:.4f}, accuracy {scores['accuracy']:.4f}"

    def report(self, totals: Totals, folder: Path, title: str) -> tuple[dict, list[Path]]:
        """report.html (scores of each class, the images with the lowest IoU), classes.csv and images.csv."""
        confusion, scores = totals["confusion"].numpy(), self.scores(totals)
        of_classes = _scores_of_classes(confusion)
        cells = [[name, *(f"{values[i]:.4f}" for values in of_classes.values()), int(confusion[i].sum())]
                 for i, name in enumerate(self.data.classes)]  # fmt: skip
        head = ["class", "iou", *list(of_classes)[1:], "pixels"]
        index, worth = totals["index"].numpy(), totals["worth"].numpy()
        order = np.argsort(worth, kind="stable")  # those without a score last
        listed = [(self.data.names[index[i]], f"{worth[i]:.4f}") for i in order]
        shown = [i for i in order if np.isfinite(worth[i])][:WORST]
        worst = previews(self.data, ((int(index[i]), worth[i]) for i in shown))
        sections = [
            ("Classes", "Over the pixels of all images.", table(head, cells)),
            ("Images with the lowest IoU", "With their true masks.", worst),
        ]
        contents = {
            "report.html": page(title, f"{len(order)} images. {self.describe(scores)}.", sections),
            "classes.csv": csv_bytes(head, cells),
            "images.csv": csv_bytes(["image", "iou"], listed),
        }
        return {"classes": {row[0]: dict(zip(head[1:], map(float, row[1:]))) for row in cells}}, write_all(
            folder, contents
        )


class SegmentationTask(Task):
    """Images and masks -> cross-entropy and Dice loss.

    Two classes are told apart by one output, as in the published networks for lesions.

    Raises:
        InputError: a model that segments no images, or data that cannot be used.
    """

    losses = ("loss", "entropy", "dice")
    unit = "images"
    listed = "segmentation"
    recipe: SegmentationRecipe

    def __init__(self, recipe: SegmentationRecipe):
        super().__init__(recipe)
        expect_task(recipe.model, self.listed)
        entry = find(recipe.model)
        size, resizes = recipe.sides, "size" in entry.preprocess
        self.input = SegmentorInput(entry, size if resizes else None)
        train, held_out = open_scenes(recipe.data, recipe.val, recipe.holdout, self.input.images)
        self.classes = classes_of(recipe.data)
        self.outputs = 1 if len(self.classes) == 2 else len(self.classes)
        self.model = build_model(recipe, num_classes=self.outputs)
        words = recipe.augment or ("mirror+flip+rotate" if resizes else "mirror+scale")
        augment = Augment(words, size or self.input.size or (256, 256), IGNORED if self.outputs > 1 else 0)
        self.data = MaskedScenes(train, self.classes, augment, self.input.grey_extra)
        self.evaluator = MaskScores.of(held_out, self.classes, self.input, recipe)
        self.card_of = ModelCard(
            recipe.model, recipe.model_args | {"num_classes": self.outputs}, list(self.classes),
            segmentor_preprocess(entry, self.input.size),
        )  # fmt: skip
        self.encoder = next((module for module in self.model.modules() if isinstance(module, DenseBackbone)), None)
        if recipe.encoder_checkpoint and self.encoder is None:
            raise InputError(f"--encoder-checkpoint is for models whose encoder is a backbone, {recipe.model} has none")

    @classmethod
    def resolve(cls, recipe: SegmentationRecipe) -> SegmentationRecipe:
        """As `Task`, and with the size of its checkpoint."""
        card = read_card(recipe.checkpoint) if recipe.checkpoint else None
        before = SegmentorInput.of_card(card).size if card and not recipe.size else None
        return replace(super().resolve(recipe), **({"size": "x".join(map(str, before))} if before else {}))

    def load_weights(self) -> None:
        """As `Task`, and a classifier's into the encoder."""
        super().load_weights()
        if self.recipe.encoder_checkpoint:
            self.encoder.load_pretrained(self.recipe.encoder_checkpoint)

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        logits, target = self.input.logits(model, batch["images"]).float(), batch["mask"]
        entropy, dice = cross_entropy(logits, target), dice_loss(logits, target)
        return {"loss": entropy + self.recipe.dice_weight * dice, "entropy": entropy, "dice": dice, "output": logits}

    def card(self) -> ModelCard:
        return self.card_of

    @classmethod
    def judge(cls, recipe: SegmentationRecipe, model: nn.Module, card: ModelCard) -> Evaluator:
        classes = classes_of(recipe.data)
        if card.classes and len(card.classes) != len(classes):
            raise InputError(f"{recipe.data} has {len(classes)} classes, the model {len(card.classes)}")
        input = SegmentorInput.of_card(card)
        return MaskScores.of(scenes_to_score(recipe.data, input.images), classes, input, recipe)


# -- the user's side --------------------------------------------------------------------------------------------------

FRAME_LEGEND = 2  # rows of the legend below frames of a video, which are all of one size


def expect_images(model: str | Path | None, checkpoint: str | Path | None, count: int) -> None:
    """Looks, before a model is opened, whether it reads as many images of a scene as there are.

    Of a model of the zoo, and of a checkpoint that names one; of others only the opened model says.

    Raises:
        InputError: it reads another number.
        CheckpointError: the checkpoint cannot be read.
    """
    card = read_card(checkpoint) if checkpoint and model is None else None
    name = card.model if card else str(model)
    if is_model(name) and find(name).task == "segmentation":
        _expect_count(name, len(find(name).inputs), count)


def _expect_count(name: str, reads: int, count: int) -> None:
    if count != reads:
        wanted = f"{reads} images of each scene (--extra)" if reads > 1 else "one image"
        raise InputError(f"{name} reads {wanted}, got {count}")


class Segmenter(WindowTool):
    """Says what each pixel of an image shows.

        seg = Segmenter(checkpoint="runs/isic18/best.safetensors")      # of `linescan train`
        seg = Segmenter("my_config.py", "weights.pth")
        mask = seg("photo.jpg")                                         # (H, W), the class of each pixel
        print(seg.classes[mask[0, 0]])

    A model that reads two images of a scene takes them as a pair:

        seg = Segmenter("sigma_tiny.mfnet", "sigma.pth")
        mask = seg([("colours.png", "thermal.png")])[0]

    Without `window` an image is tested as its model or config says: resized, then whole or by windows; one whose longer
    side is above 4096 pixels is reduced by a whole factor before. With `window`, windows slide over the image in its
    own resolution, and it may be larger than memory.

    Args:
        model: the name of a segmentation model (`linescan list --task segmentation`), which needs no OpenMMLab; or an
            mmseg config: a file, a name of one of linescan's, or "mmseg::..."; None for the model that the checkpoint
            names.
        checkpoint: its weights (.pth, .safetensors). Without it, the published ones, or those that the config names as
            `load_from`.
        device: by default CUDA where there is one.
        dtype: torch.bfloat16 or torch.float16 for half precision.
        batch: images, or windows, in one forward pass.
        window: (height, width) of windows, or one number for both.
        stride: from one window to the next; by default two thirds of it.
        memory: bytes that logits may take at a time.
        strict: refuse videos that are cut short or damaged, instead of answering what can be read.
        args: further arguments of a model by name.

    Raises:
        InputError, CheckpointError: no such config or model, a package is missing, or the weights do not belong to it.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        checkpoint: str | Path | None = None,
        *,
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
        batch: int = 1,
        window: int | Size | None = None,
        stride: int | Size | None = None,
        memory: int = 2**30,
        strict: bool = False,
        **args,
    ):
        window, stride = windows(window, stride)
        opened = open_model("segmentation", model, checkpoint, **args)
        super().__init__(str(model or opened.name), opened, device, dtype, batch, window, stride, strict)
        self.memory = memory
        if not self.window and self.model.window and not self.model.resizes:
            self.window, self.stride = self.model.window, self.model.stride

    def expect(self, inputs: Sequence[Any]) -> None:
        for given in inputs:
            self._expect_images(given)

    def _expect_images(self, given: Any) -> None:
        _expect_count(self.model_name, self.model.images, len(given) if isinstance(given, tuple) else 1)

    def open(self, given: ImageLike | Pixels | tuple[ImageLike, ...]) -> Pixels:
        """The pixels of an image, or of the images of a scene, as many as the model reads.

        Raises:
            InputError: more or fewer of them, or of different sizes.
        """
        self._expect_images(given)
        images = given if isinstance(given, tuple) else (given,)
        if len(images) == 1:
            return open_pixels(images[0])
        return PairedPixels([open_pixels(image) for image in images], self.model.grey_extra)

    def draw(self, opened: ImageLike | Pixels, answer: np.ndarray, frame: bool = False) -> Image.Image:
        """The (first) image tinted by its mask, with a legend (`linescan.media.draw`); large ones are drawn smaller."""
        image, factor = reduced_for_drawing(pixels := open_pixels(opened))
        image = image[..., :3]
        mask = np.asarray(answer[thin(pixels.size[0], factor), thin(pixels.size[1], factor)])
        return draw_masks(image, mask, self.classes, self.palette, legend_rows=FRAME_LEGEND if frame else None)

    @property
    def values(self) -> int:
        """How many values a mask can have."""
        return len(self.classes)

    def answer(self, opened: Sequence[Pixels], progress: Progress = silent) -> list[np.ndarray]:
        if self.window:
            return [self._mask(pixels.size, self._slide(pixels, progress)) for pixels in opened]
        prepared = [Pixels(self.model.prepare(bounded(pixels)[0])) for pixels in opened]
        alike = defaultdict(list)  # by size: images of one size can be answered together
        for i, pixels in enumerate(prepared):
            alike[pixels.size].append(i)
        answers = {}
        for size, members in alike.items():
            if self.model.window:
                logits = (self._gather(prepared[i], progress) for i in members)
            else:
                logits = self._forward(np.stack([prepared[i].read(0, size[0], 0, size[1]) for i in members]))
            for i, whole in zip(members, logits):
                target = opened[i].size
                same = target == size
                answers[i] = self._mask(
                    target, [Block(0, size[0], 0, size[1], whole)] if same else self._enlarge(whole, target)
                )
        return [answers[i] for i in range(len(opened))]

    def _forward(self, images: np.ndarray) -> Tensor:
        """(B, h, w, C) as the model has prepared them -> logits (B, C, h, w), float32."""
        tensor = torch.from_numpy(np.ascontiguousarray(images)).to(self.device).movedim(-1, 1)
        try:
            logits = self.model.logits(tensor).float()
        except ValueError as error:  # the backbone says which sizes it takes
            if images.shape[1:3] == self.window:
                raise CommandError(f"windows of {'x'.join(map(str, self.window))} pixels: {error}") from error
            raise
        return expect_finite(logits, large=True)

    def _slide(self, pixels: Pixels, progress: Progress) -> Iterator[Block]:
        """Windows over an image as it is, or over one that the model has prepared."""
        if self.window:
            window, stride = self.window, self.stride

            def forward(windows: np.ndarray) -> Tensor:
                return self._forward(self.model.encode(windows))

        else:
            window, stride, forward = self.model.window, self.model.stride, self._forward
        return slide(
            pixels, forward, self.model.channels, window, stride,
            batch=self.batch, memory=self.memory, device=self.device, progress=progress,
        )  # fmt: skip

    def _gather(self, pixels: Pixels, progress: Progress) -> Tensor:
        whole = torch.empty(self.model.channels, *pixels.size, device=self.device)
        for top, bottom, left, right, logits in self._slide(pixels, progress):
            whole[:, top:bottom, left:right] = logits
        return whole

    def _enlarge(self, logits: Tensor, size: Size) -> Iterator[Block]:
        return enlarge(logits, size, self.model.align_corners, self.memory)

    def _mask(self, size: Size, blocks: Iterable[Block]) -> np.ndarray:
        mask = blank(size, np.uint8 if self.values <= 256 else np.uint16)
        for top, bottom, left, right, logits in blocks:
            mask[top:bottom, left:right] = self.model.decide(logits).cpu().numpy()
        return mask


class Masks(Writer):
    """Masks as PNG files, and names and colours of the classes.

        OUT/masks/NAME.png     the class of each pixel, with a palette; of a video NAME/000000.png, ...
        OUT/classes.json       [{"id": 0, "name": ..., "color": [red, green, blue]}, ...]

    Args:
        out: the folder.
        classes, palette: names and colours.
    """

    def __init__(self, out: Path, classes: Sequence[str], palette: Sequence[tuple[int, int, int]]):
        self.out, self.classes, self.palette = out, classes, palette
        self.out.mkdir(parents=True, exist_ok=True)
        described = [{"id": i, "name": n, "color": c} for i, (n, c) in enumerate(zip(classes, palette))]
        with atomic(out / "classes.json") as file:
            file.write(json.dumps(described, indent=1).encode())

    def save(self, source: Source, answer: np.ndarray, frame: int | None = None) -> list[Path]:
        """Writes the mask of an image, or of a frame of a video."""
        path = self.out / "masks" / (source.name + (".png" if frame is None else f"/{frame:06}.png"))
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as file:
            write_mask(file, answer, self.palette)
        return [path]

    def describe(self, answer: np.ndarray) -> str:
        """The largest classes and their shares of the image."""
        return ", ".join(f"{one['label']} {100 * one['share']:.0f} %" for one in self.as_json(answer)[:3])

    def as_json(self, answer: np.ndarray) -> list[dict]:
        """The classes that occur, the largest first, with their shares of the image."""
        parts = np.array_split(answer, 16)
        counts = np.sum([np.bincount(rows.ravel(), minlength=len(self.classes)) for rows in parts], axis=0)
        order = [int(i) for i in np.argsort(-counts, kind="stable") if counts[i]]
        return [{"label": self.classes[i], "share": float(counts[i] / answer.size), "index": i} for i in order]
