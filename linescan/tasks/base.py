"""What the tools of all tasks share."""

from itertools import islice
from typing import Iterable, Iterator, Sequence

import numpy as np
import torch

from ..engine.processes import pick_device
from ..engine.scores import precision
from ..errors import InputError
from ..media.images import Picture
from ..media.large import Pixels, open_pixels
from .windows import Progress, _pair, _silent

LARGEST_DRAWING = 4096  # the longer side of an overlay at most
LARGEST_WHOLE = 4096  # of what a model is shown at once


class _Tool:
    """What segmenting and detecting have in common: a model somewhere, and pictures one after the other."""

    def __init__(self, model, device: str | None, dtype: torch.dtype, batch: int, window, stride):
        self.device, self.dtype, self.batch = pick_device(device), dtype, batch
        precision(self.device, dtype)
        self.model = model
        self.model.module.to(self.device).eval()
        self.window, self.stride = _pair(window, "window"), _pair(stride, "stride")
        if self.stride and not self.window:
            raise InputError("a stride is one of windows: give their size as well")
        if self.window and not self.stride:
            self.stride = tuple(max(2 * side // 3, 1) for side in self.window)
        if self.window and any(step > side for step, side in zip(self.stride, self.window)):
            raise InputError(f"windows of {self.window} every {self.stride} pixels leave gaps: strides are no larger")

    @property
    def classes(self) -> list[str]:
        """The names of the classes."""
        return self.model.classes

    @property
    def palette(self) -> list[tuple[int, int, int]]:
        """A colour (red, green, blue) for each class."""
        return self.model.palette

    def each(self, pictures: Iterable[Picture], progress: Progress = _silent) -> Iterator[tuple]:
        """For each picture in turn (pixels, answer); or (None, the InputError that it cannot be read).

        `pictures` may be endless; they are taken `batch` at a time. `progress` gets shares of one picture.
        """
        pictures = iter(pictures)
        while together := list(islice(pictures, self.batch)):
            opened, answers = {}, {}
            for i, picture in enumerate(together):
                try:
                    opened[i] = open_pixels(picture)
                except InputError as error:
                    answers[i] = error
            with torch.inference_mode(), precision(self.device, self.dtype):
                answers |= self._answer(opened, progress)
            yield from ((opened.get(i), answers[i]) for i in range(len(together)))

    def __call__(self, pictures: Picture | Sequence[Picture]):
        """The answer for a picture: a path, a PIL image, or an array; a list of answers for a list.

        Raises:
            BrokenImage, InputError: one that cannot be read, or is no picture.
        """
        one = not isinstance(pictures, (list, tuple))
        answers = []
        for _, answer in self.each([pictures] if one else pictures):
            if isinstance(answer, InputError):
                raise answer
            answers.append(answer)
        return answers[0] if one else answers


def _bounded(pixels: Pixels) -> np.ndarray:
    """The picture, (H, W, 3); a larger one than models are ever shown at once is reduced by a whole factor first."""
    return pixels.reduced(-(-max(pixels.size) // LARGEST_WHOLE))
