"""Pictures and videos in, names out."""

from itertools import islice
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from ..engine.cards import ModelCard, restore
from ..engine.processes import pick_device
from ..engine.scores import precision
from ..errors import BrokenImage, BrokenVideo, InputError
from ..media.images import Picture, _from_array, read_image, to_mode
from ..media.video import Clips, Views

__all__ = ["Classifier", "Prediction", "Picture"]


class Prediction(NamedTuple):
    """One guess: the class's name, its probability, its index."""

    label: str
    probability: float
    index: int


class Classifier:
    """Names what pictures show; videos, if the model is one for videos.

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
        batch: pictures (of videos: frames) in one forward pass.
        views: of a video model: how many clips are taken from a video, and how many crops of each; the answer is their
            mean.
        args: for `timm.create_model`.

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
        views: tuple[int, int] | None = None,
        **args,
    ):
        self.device, self.dtype, self.batch = pick_device(device), dtype, batch
        precision(self.device, dtype)
        restored, card = restore(model, checkpoint, **args)
        self.model: nn.Module = restored.to(self.device).eval()
        self.card: ModelCard = card
        self._transform = card.preprocess.transform()
        frames = getattr(restored, "num_frames", 0)
        if views and not frames:
            raise InputError(f"views are taken of videos; {card.model} reads pictures")
        self.clips = Clips(frames, card.preprocess, Views(*(views or ()))) if frames else None

    @property
    def classes(self) -> list[str]:
        """The names of the classes."""
        return self.card.classes

    def tensor(self, picture: Picture) -> Tensor:
        """One picture as the model wants it, (C, H, W).

        Raises:
            BrokenImage: a file that cannot be read.
            InputError: an array that is not a picture.
        """
        channels = self.card.preprocess.channels
        if isinstance(picture, (str, Path)):
            return self._transform(read_image(picture, channels))
        if not isinstance(picture, Image.Image):
            picture = _from_array(picture)
        return self._transform(to_mode(picture, channels))

    @torch.no_grad()
    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        """Probabilities (pictures, classes), float32 on the CPU, of pictures that `tensor` has made; one forward pass.

        Raises:
            InputError: the model's answer is not finite.
        """
        with precision(self.device, self.dtype):
            logits = self.model(torch.stack(list(tensors)).to(self.device)).float().cpu()
        if not logits.isfinite().all():
            raise InputError("the model answers NaN or infinity; its weights are damaged, or the precision too low")
        return logits.softmax(-1)

    def watch(self, video: str | Path, progress: Callable[[float], None] = lambda share: None) -> Tensor:
        """The probability of each class for one video, (classes,): the mean over its views.

        `progress` gets the shares of the work as they are done, 1 in all.

        Raises:
            BrokenVideo, BrokenImage: the video, or a frame in a folder, cannot be read.
            InputError: see `forward`.
        """
        if self.clips is None:
            raise InputError(f"{self.card.model} reads pictures, not videos")
        views, answers = self.clips.views(video, lambda share: progress(share / 2)), []
        while together := list(islice(views, max(self.batch // self.clips.frames, 1))):
            answers.append(self.forward(together))
            progress(len(together) / (2 * self.clips.looks.count))
        return torch.cat(answers).mean(0)

    def each(
        self, pictures: Sequence[Picture], progress: Callable[[float], None] = lambda share: None
    ) -> Iterator[Tensor | InputError]:
        """For each picture, or video, in turn: its probabilities (classes,), or the error that it cannot be read.

        `progress` gets shares of one video; pictures are answered batch by batch.
        """
        together = 1 if self.clips else self.batch
        for at in range(0, len(pictures), together):
            answers, tensors = {}, {}
            for i, picture in enumerate(pictures[at : at + together]):
                try:
                    if self.clips:
                        answers[i] = self.watch(picture, progress)
                    else:
                        tensors[i] = self.tensor(picture)
                except (BrokenImage, BrokenVideo) as error:
                    answers[i] = error
            answers |= zip(tensors, self.forward(list(tensors.values()))) if tensors else ()
            yield from (answers[i] for i in sorted(answers))

    def probabilities(self, pictures: Sequence[Picture]) -> Tensor:
        """The probability of each class for each picture (or video), (pictures, classes), float32 on the CPU.

        Raises:
            BrokenImage, BrokenVideo, InputError: see `tensor`, `watch` and `forward`.
        """
        answers = [torch.empty(0, len(self.classes))]
        for answer in self.each(pictures):
            if isinstance(answer, InputError):
                raise answer
            answers.append(answer[None])
        return torch.cat(answers)

    def name(self, probabilities: Tensor, topk: int = 5) -> list[list[Prediction]]:
        """The `topk` likeliest classes of each row of (pictures, classes), best first."""
        values, indices = probabilities.topk(min(topk, len(self.classes)))
        return [
            [Prediction(self.classes[i], p, i) for p, i in zip(ps, ks)]
            for ps, ks in zip(values.tolist(), indices.tolist())
        ]

    def __call__(self, pictures: Picture | Sequence[Picture], topk: int = 5) -> list:
        """The `topk` likeliest classes, best first: a list of `Prediction`; for several pictures a list of lists."""
        one = not isinstance(pictures, (list, tuple))
        guesses = self.name(self.probabilities([pictures] if one else pictures), topk)
        return guesses[0] if one else guesses
