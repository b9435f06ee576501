"""Classification: images and videos in, names out."""

from collections import Counter
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any, Iterable, NamedTuple, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..engine.cards import ModelCard, restore
from ..errors import InputError
from ..media.draw import draw_labels
from ..media.find import Source
from ..media.images import ImageLike, load_image
from ..media.pixels import image_mode
from ..media.video import Clips, Views, open_video, segments
from .tool import Progress, Tool, Writer, silent

__all__ = ["Classifier", "Labels", "Prediction", "Predictions"]

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
    """An image as the model wants it, (C, H, W), and a small copy for people."""

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
        checkpoint: a file of weights; without it, the published ones are fetched.
        device: by default CUDA where there is one.
        dtype: torch.bfloat16 or torch.float16 for half precision.
        batch: images (of videos: frames) in one forward pass.
        topk: how many classes an answer has.
        views: of a video model: how many clips are taken from a video, and how many crops of each; the answer is their
            mean.
        strict: refuse videos that are cut short or damaged, instead of answering what can be read.
        args: of the model.

    Raises:
        InputError, CheckpointError: see `linescan.engine.cards.restore`.
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
        **args,
    ):
        network, card = restore(model, checkpoint, **args)
        frames = getattr(network, "num_frames", 0)
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
        """What a person wants to know of this tool, by name."""
        size = " x ".join(map(str, self.card.preprocess.size))
        seen = f"{self.clips.frames} frames of {size}" if self.clips else size
        return super().facts() | {"classes": f"{len(self.classes)} classes", "input": seen}

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
        if not logits.isfinite().all():
            raise InputError("the model answers NaN or infinity; its weights are damaged, or the precision too low")
        return logits.softmax(-1)

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
