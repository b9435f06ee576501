"""Classification: images and videos in, names out (`Classifier`); and how such models are trained and scored."""

from collections import Counter
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any, Callable, Iterable, NamedTuple, Sequence

import numpy as np
import torch
from PIL import Image
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional as F

from ..engine.cards import ModelCard, preprocess_of
from ..engine.image_sets import Digits, Folder, classes_of, open_data
from ..engine.packages import Package, is_package, open_package
from ..engine.samples import Samples, reader
from ..engine.scores import Evaluator, Totals
from ..errors import InputError
from ..media.draw import draw_labels
from ..media.find import Source
from ..media.images import ImageLike, load_image
from ..media.pixels import image_mode
from ..media.preprocess import Preprocess
from ..media.video import Clips, Views, open_video, segments
from .base import Task, build_model
from .open import expect_task, restore_for, wrong_task
from .recipes import ClassificationRecipe
from .report import Report
from .tool import Progress, Tool, Writer, expect_finite, silent

__all__ = [
    "Accuracy", "ClassificationTask", "Classifier", "Labels", "Prediction", "Predictions", "default_augment",
    "labelled",
]  # fmt: skip

LARGEST_DRAWING = 1024  # pixels of the longer side of what is kept of an image, to be drawn
SHOWN_FRAMES = 8  # of a clip


class Prediction(NamedTuple):
    """One guess: the class's name, its probability, its index."""

    label: str
    probability: float
    index: int


class Predictions(list):
    """The likeliest classes, best first: a list of `Prediction`.

    Attributes:
        probabilities: of every class, (classes,), float32.
    """

    def __init__(self, probabilities: Tensor, classes: Sequence[str], topk: int):
        values, indices = probabilities.topk(min(topk, len(classes)))
        super().__init__(map(Prediction, [classes[i] for i in indices], values.tolist(), indices.tolist()))
        self.probabilities = probabilities

    def _repr_html_(self) -> str:
        """A table of bars for notebooks."""
        bar = '<div style="background:#2a9d8f;height:0.8em;width:{:.0f}px"></div>'
        rows = (
            f"<tr><td>{escape(p.label)}</td><td>{100 * p.probability:.1f} %</td>"
            f"<td>{bar.format(200 * p.probability)}</td></tr>"
            for p in self
        )
        return f"<table>{''.join(rows)}</table>"


class _Seen(NamedTuple):
    """An image as the model wants it, (C, H, W), and a small copy to draw on."""

    tensor: Tensor
    image: Image.Image


class Classifier(Tool):
    """Names what images show; videos, if the model is one for videos.

        classify = Classifier(checkpoint="runs/demo/model.safetensors")
        for guess in classify("seven.png", topk=3):
            print(guess.label, guess.probability)

        classify = Classifier("videomamba_video_tiny_patch16_224.k400_f8", views=(4, 3))
        classify("clip.mp4")                                        # or a folder of its frames

    Args:
        model: a timm name. Not needed with a checkpoint that linescan has written: it knows its model and its classes.
        checkpoint: a file of weights, or a package of `linescan export`; without it, the published weights are fetched.
        device: by default CUDA where there is one. Packages run on the CPU.
        dtype: torch.bfloat16 or torch.float16 for half precision.
        batch: images (of videos: frames) in one forward pass.
        topk: how many classes an answer has.
        views: of a video model: how many clips are taken from a video, and how many crops of each; the answer is their
            mean.
        strict: refuse videos that are cut short or damaged, instead of answering what can be read.
        trust: open a package that is a program (`linescan.engine.packages.open_package`).
        args: of the model.

    Raises:
        InputError, CheckpointError: see `linescan.engine.cards.restore`, and `open_package`.
    """

    def __init__(
        self,
        model: str | None = None,
        checkpoint: str | Path | None = None,
        *,
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
        batch: int = 32,
        topk: int = 5,
        views: tuple[int, int] | None = None,
        strict: bool = False,
        trust: bool = False,
        **args,
    ):
        if is_package(checkpoint):
            network, card = open_package(checkpoint, trust)
            device = _fixed(model, device, dtype, args)
        else:
            network, card = restore_for("classification", model, checkpoint, **args)
        check_classifier(network, card.model)
        frames = getattr(network, "num_frames", 0)
        if not isinstance(card.preprocess, Preprocess):
            raise InputError(f"{card.model} reads point clouds: `linescan points classify` opens it")
        if views and not frames:
            raise InputError(f"views are taken of videos; {card.model} reads images")
        image_mode(card.preprocess.channels)  # refuses a model that no image can be given to
        super().__init__(card.model, network, device, dtype, batch, strict)
        self.card: ModelCard = card
        self.topk = topk
        self._transform = card.preprocess.transform()
        self.clips = Clips(frames, card.preprocess, Views(*(views or ())), strict) if frames else None
        if frames:
            self.kinds, self.whole_videos, self.together = ("video", "frames"), True, max(batch // frames, 1)
            self.batch = 1

    @property
    def classes(self) -> list[str]:
        """The names of the classes."""
        return self.card.classes

    @property
    def model(self) -> torch.nn.Module:
        """The network."""
        return self.module

    def facts(self) -> dict[str, str]:
        """What there is to know of this tool, by name."""
        size = " x ".join(map(str, self.card.preprocess.size))
        seen = f"{self.clips.frames} frames of {size}" if self.clips else size
        facts = super().facts()
        if isinstance(self.module, Package):
            del facts["parameters"]
        return facts | {"classes": f"{len(self.classes)} classes", "input": seen}

    # -- images --------------------------------------------------------------------------------------------------------

    def open(self, given: ImageLike) -> _Seen | Path:
        """An image as the model wants it. Of a video its path: it is read while it is answered."""
        if self.clips:
            if not isinstance(given, (str, Path)):
                raise InputError(f"{self.card.model} reads videos: a path is wanted, not {type(given).__name__}")
            return Path(given)
        image = self._image(given)
        return _Seen(self._transform(image), image.reduce(-(-max(image.size) // LARGEST_DRAWING)))

    def tensor(self, image: ImageLike) -> Tensor:
        """One image as the model wants it, (C, H, W).

        Raises:
            BrokenImage: a file that cannot be read.
            InputError: an array that is not an image.
        """
        return self._transform(self._image(image))

    def _image(self, image: ImageLike) -> Image.Image:
        preprocess = self.card.preprocess
        return load_image(image, preprocess.channels, preprocess.resized)

    @torch.inference_mode()
    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        """Probabilities (images, classes), float32 on the CPU, of images that `tensor` has made; one forward pass.

        Raises:
            InputError: the model's answer is not finite.
        """
        with self.precision():
            logits = self.module(torch.stack(list(tensors)).to(self.device)).float().cpu()
        return expect_finite(logits).softmax(-1)

    def answer(self, opened: Sequence[_Seen | Path], progress: Progress = silent) -> list[Predictions]:
        if self.clips:
            probabilities = [self.watch(video, progress) for video in opened]
        else:
            probabilities = self.forward([seen.tensor for seen in opened])
        return [Predictions(row, self.classes, self.topk) for row in probabilities]

    def probabilities(self, images: Iterable[ImageLike]) -> Tensor:
        """The probability of each class for each image (or video), (images, classes), float32 on the CPU.

        Raises:
            InputError: one that cannot be read or answered.
        """
        answers = self(list(images))
        return torch.stack([a.probabilities for a in answers]) if answers else torch.empty(0, len(self.classes))

    def name(self, probabilities: Tensor, topk: int | None = None) -> list[Predictions]:
        """The likeliest classes of each row of (images, classes)."""
        return [Predictions(row, self.classes, topk or self.topk) for row in probabilities]

    def __call__(self, images: ImageLike | Sequence[ImageLike], topk: int | None = None) -> Any:
        """The `topk` likeliest classes, best first; a list of such lists for a list of images."""
        answers = super().__call__(images)
        if topk is None:
            return answers
        if isinstance(answers, Predictions):
            return Predictions(answers.probabilities, self.classes, topk)
        return [Predictions(answer.probabilities, self.classes, topk) for answer in answers]

    # -- videos --------------------------------------------------------------------------------------------------------

    def watch(self, video: str | Path, progress: Progress = silent) -> Tensor:
        """The probability of each class for one video, (classes,): the mean over its views.

        Raises:
            BrokenVideo, BrokenImage: the video, or a frame in a folder, cannot be read.
            InputError: see `forward`.
        """
        if self.clips is None:
            raise InputError(f"{self.card.model} reads images, not videos")
        views, answers = self.clips.views(video, lambda share: progress(share / 2)), []
        while together := list(islice(views, self.together)):
            answers.append(self.forward(together))
            progress(len(together) / (2 * self.clips.looks.count))
        return torch.cat(answers).mean(0)

    # -- drawing -------------------------------------------------------------------------------------------------------

    def draw(self, opened: _Seen | Path, answer: Predictions, frame: bool = False) -> Image.Image:
        """The image, and below it the likeliest classes; of a clip some of its frames."""
        image = self._strip(opened) if self.clips else opened.image
        return draw_labels(image, [(p.label, p.probability) for p in answer], legend_rows=2 if frame else None)

    def _strip(self, path: Path) -> Image.Image:
        video = open_video(path)
        [indices] = segments(len(video), min(SHOWN_FRAMES, self.clips.frames))
        frames = [frame.convert("RGB") for frame in video.images(indices, 3)]
        for image in frames:
            image.thumbnail((LARGEST_DRAWING // 4, LARGEST_DRAWING // 4))
        return Image.fromarray(np.concatenate([np.asarray(image) for image in frames], 1))


def _fixed(model: str | None, device: str | None, dtype: torch.dtype, args: dict) -> str:
    """The device of a package. Raises InputError for anything that was decided when it was exported."""
    given = {"model": model, "device": None if device == "cpu" else device, "precision": dtype != torch.float32, **args}
    if changed := [name for name, value in given.items() if value]:
        raise InputError(f"a package is used as it was exported, on the CPU: {', '.join(changed)} cannot be given")
    return "cpu"


def check_classifier(network: nn.Module, name: str) -> None:
    """Raises InputError: a model of another task."""
    expect_task(name, "classification")
    if not hasattr(network, "num_classes"):
        raise wrong_task(name, "classification")


class Labels(Writer):
    """The likeliest classes in words; nothing is written but drawings."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def save(self, source: Source, answer: Predictions, frame: int | None = None) -> list[Path]:
        """Counts the best class of each frame of a video."""
        if frame == 0:
            self.seen.clear()
        if frame is not None:
            self.seen[answer[0].label] += 1
        return []

    def describe(self, answer: Predictions) -> str:
        """The classes and their probabilities."""
        return ", ".join(f"{p.label} {100 * p.probability:.1f} %" for p in answer)

    def sum_up(self, frames: int) -> str:
        """The classes that are the likeliest in most frames."""
        best = ", ".join(f"{label} in {count}" for label, count in self.seen.most_common(3))
        return super().sum_up(frames) + (f": {best}" if best else "")

    def as_json(self, answer: Predictions) -> list[dict]:
        """Each class with its probability and index."""
        return [p._asdict() for p in answer]


# -- training and scoring ----------------------------------------------------------------------------------------------


class Accuracy(Evaluator):
    """Mean cross entropy, and how often the class is the likeliest, or among the five likeliest, in per cent.

    `top5` counts all classes where there are fewer than five. Of a video's views the mean probability is scored.

    Args:
        data: items {"input": an image (C, H, W), or views of a video (V, C, T, H, W); "label": its class}.
        answer: (model, inputs) -> logits.
        batch: samples in one forward pass.
        classes: their names; given, all probabilities are kept for `report`.
    """

    data: Any  # with `names` and `preview` for `report`
    names = ("loss", "top1", "top5")
    primary = "top1"

    def __init__(
        self,
        data: Any,
        answer: Callable = lambda model, inputs: model(inputs),
        batch: int | None = None,
        classes: Sequence[str] | None = None,
    ):
        self.data, self.answer, self.batch, self.classes = data, answer, batch, classes

    def measure(self, model: nn.Module, batch: Any, totals: Totals) -> None:
        inputs, labels = batch["input"], batch["label"]
        if inputs.ndim == 6:  # (samples, views, C, T, H, W)
            logits = self.answer(model, inputs.flatten(0, 1)).float().unflatten(0, inputs.shape[:2])
            scores = logits.log_softmax(-1).logsumexp(1)
        else:
            scores = self.answer(model, inputs).float()
        hits = scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]
        loss = F.cross_entropy(scores, labels, reduction="sum")
        totals.add(loss=loss, top1=hits[:, 0].sum(), top5=hits.sum(), samples=len(labels))
        if self.classes:
            totals.keep(index=batch["index"], label=labels, probability=scores.softmax(-1))

    def scores(self, totals: Totals) -> dict[str, float]:
        count = totals["samples"].item()
        loss, top1, top5 = (totals[name].item() / count for name in self.names)
        return {"loss": loss, "top1": 100 * top1, "top5": 100 * top5}

    def describe(self, scores: dict[str, float]) -> str:
        return f"loss {scores['loss']:.3f}, top-1 {scores['top1']:.2f} %, top-5 {scores['top5']:.2f} %"

    def report(self, totals: Totals, folder: Path, title: str) -> tuple[dict, list[Path]]:
        """See `linescan.tasks.report.Report`."""
        order = totals["index"].argsort()
        index = totals["index"][order].tolist()
        found = Report(
            self.classes, [self.data.names[i] for i in index], totals["label"][order].numpy(),
            totals["probability"][order].double().numpy(),
        )  # fmt: skip
        return found.as_dict(), found.write(folder, title, lambda sample: self.data.preview(index[sample]))


def default_augment(data: str, channels: int, frames: int) -> str:
    """The augmentation for data of this many channels, and clips of this many frames (0: images)."""
    if data == "digits":
        return "light"
    if channels != 3:
        return "standard" if channels in (1, 4) else "crop"
    return "rand-m5-n2-mstd0.5-inc1" if frames else "rand-m9-mstd0.5-inc1"


def labelled(data: str, card: ModelCard, frames: int = 0, views: Views = Views()) -> Samples:
    """Data to score a model on, as its card wants them.

    Args:
        data: a folder of classes, or "digits" (those held out). Folders bear the names of the model's classes, or (as
            ImageNet's synsets) stand in their order.
        card: of the model.
        frames: of a clip; 0 for images.
        views: of each video.

    Raises:
        InputError: no such data, or another number of classes.
    """
    if data == "digits":
        images = Digits(held_out=True)
    else:
        found, _ = classes_of(data)
        known = set(found) <= set(card.classes)
        images = Folder(data, classes=card.classes if known else None, videos=bool(frames))
    if len(images.classes) != len(card.classes):
        raise InputError(f"{data} has {len(images.classes)} classes, the model {len(card.classes)}")
    return Samples(images, reader(card.preprocess, frames, views=views))


class ClassificationTask(Task):
    """Images or clips -> cross entropy against their labels.

    Raises:
        InputError: the data and the model do not fit together.
    """

    listed = "classification"

    def __init__(self, recipe: ClassificationRecipe):
        super().__init__(recipe)
        self.classes, channels = classes_of(recipe.data, recipe.val)
        self.args = {"num_classes": len(self.classes), "in_chans": channels, **recipe.model_args}
        self.model = build_model(recipe, **self.args)
        check_classifier(self.model, recipe.model)
        if self.model.num_classes != len(self.classes):
            raise InputError(f"num_classes={self.model.num_classes}, but the data have {len(self.classes)} classes")
        frames, views = getattr(self.model, "num_frames", 0), Views.parse(recipe.views)
        if views.count > 1 and not frames:
            raise InputError(f"--views are of videos; {recipe.model} reads images")
        self.preprocess = preprocess_of(self.model, self.args["in_chans"], self.args.get("img_size"))
        self.unit = "videos" if frames else "images"

        images, held_out = open_data(recipe.data, recipe.val, recipe.holdout, bool(frames))
        augment = recipe.augment or default_augment(recipe.data, self.preprocess.channels, frames)
        options = dict(augment=augment, erasing=recipe.erasing, flip=recipe.flip)
        self.data = Samples(images, reader(self.preprocess, frames, **options), recipe.repeats)
        judged = Samples(held_out, reader(self.preprocess, frames, views=views))
        self.evaluator = Accuracy(judged, self.answer, max(recipe.batch // views.count, 1))

        self.mixup, self.criterion = None, nn.CrossEntropyLoss(label_smoothing=recipe.smoothing)
        if recipe.mixup or recipe.cutmix:
            mixed = dict(label_smoothing=recipe.smoothing, num_classes=len(self.classes))
            self.mixup, self.criterion = Mixup(recipe.mixup, recipe.cutmix, **mixed), SoftTargetCrossEntropy()

    @classmethod
    def judge(cls, recipe: ClassificationRecipe, model: nn.Module, card: ModelCard) -> Accuracy:
        frames, views = getattr(model, "num_frames", 0), Views.parse(recipe.views)
        if views.count > 1 and not frames:
            raise InputError(f"--views are of videos; {card.model} reads images")
        data, batch = labelled(recipe.data, card, frames, views), max(recipe.batch // views.count, 1)
        return Accuracy(data, batch=batch, classes=card.classes)

    @staticmethod
    def answer(model: nn.Module, inputs: Tensor) -> Tensor:
        """The logits of what is trained."""
        return model(inputs)

    def mixed(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Inputs and labels, mixed up where the recipe says so."""
        inputs, labels = batch["input"], batch["label"]
        if not self.mixup:
            return inputs, labels
        flat, labels = self.mixup(inputs.flatten(1, -3), labels)  # of a clip all frames alike
        return flat.view_as(inputs), labels

    def forward(self, model: nn.Module, batch: dict) -> dict[str, Tensor]:
        inputs, labels = self.mixed(batch)
        logits = model(inputs)
        return {"loss": self.criterion(logits.float(), labels), "output": logits}

    def card(self) -> ModelCard:
        return ModelCard(self.recipe.model, self.args, list(self.classes), self.preprocess)

    def describe(self) -> str:
        return f"{len(self.classes)} classes, {super().describe()}"
