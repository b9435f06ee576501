"""Sliding windows over images of any size.

Windows are read from the image, answered and blended strip by strip, so that memory does not grow with the image: what
is kept of the logits is a strip one window high and as wide as `memory` allows.
"""

from typing import Callable, Iterator, NamedTuple, Sequence

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..media.images import ImageLike
from ..media.large import Pixels, open_pixels
from .tool import Progress, Tool, silent

__all__ = ["Block", "Part", "Size", "WindowTool", "enlarge", "parts", "positions", "slide", "windows"]

Size = tuple[int, int]
"""(height, width)."""

LARGEST_DRAWING = 4096  # pixels of the longer side of an overlay at most
LARGEST_WHOLE = 4096  # of what a model is given at once


class WindowTool(Tool):
    """A tool for images of any size: whole, or in windows of the image's own resolution.

    Args:
        model_name, device, dtype, batch, strict: as for `Tool`; with windows, `batch` of them are in one forward pass.
        model: the model with what it does to an image before and after the forward pass, such as
            `linescan.tasks.named.NamedSegmentor`: its network is `model.module`.
        window: (height, width) of windows, or one number for both.
        stride: from one window to the next; by default two thirds of it.

    Raises:
        InputError: sizes that are none, or leave gaps between windows.
    """

    def __init__(self, model_name: str, model, device, dtype, batch: int, window, stride, strict: bool = False):
        super().__init__(model_name, model.module, device, dtype, batch, strict)
        self.model = model
        self.window, self.stride = windows(window, stride)

    @property
    def classes(self) -> list[str]:
        """The names of the classes."""
        return self.model.classes

    @property
    def palette(self) -> list[tuple[int, int, int]]:
        """A colour (red, green, blue) for each class."""
        return self.model.palette

    def facts(self) -> dict[str, str]:
        """What there is to know of this tool, by name."""
        windows = {"windows": f"windows of {self.window[0]} x {self.window[1]}"} if self.window else {}
        return super().facts() | {"classes": f"{len(self.classes)} classes"} | windows

    def open(self, given: ImageLike | Pixels) -> Pixels:
        """The pixels of an image: a path, a PIL image or an array."""
        return open_pixels(given)


def windows(window: int | Size | None, stride: int | Size | None) -> tuple[Size | None, Size | None]:
    """Window and stride of a `WindowTool`, as pairs; None without windows. A tool asks before it opens a model.

    Raises:
        InputError: sizes that are none, or leave gaps between windows.
    """
    window, stride = _pair(window, "window"), _pair(stride, "stride")
    if window is None:
        if stride:
            raise InputError("a stride is one of windows: give their size as well")
        return None, None
    stride = stride or tuple(max(2 * side // 3, 1) for side in window)
    if any(step > side for step, side in zip(stride, window)):
        raise InputError(f"windows of {window} every {stride} pixels leave gaps: strides are no larger")
    return window, stride


def bounded(pixels: Pixels) -> tuple[np.ndarray, int]:
    """The image (H, W, 3), reduced by a whole factor if it is larger than models are given at once; the factor."""
    factor = -(-max(pixels.size) // LARGEST_WHOLE)
    return pixels.reduced(factor), factor


def reduced_for_drawing(pixels: Pixels) -> tuple[np.ndarray, int]:
    """The image (h, w, 3) at most as large as overlays are; the pixel (y, x) is (`thin(H, factor)[y]`, ...) of it."""
    factor = -(-max(pixels.size) // LARGEST_DRAWING)
    return pixels.reduced(factor), factor


def thin(length: int, factor: int) -> slice:
    """Every `factor`-th place along a side: one of each that `Pixels.reduced` averages, ceil(length / factor)."""
    return slice(min(factor // 2, (length - 1) % factor), length, factor)


def positions(length: int, window: int, stride: int) -> list[int]:
    """Where windows start along a side: `stride` apart, the last one at the end."""
    count = max(-(-(length - window) // stride), 0) + 1
    return [max(min(i * stride, length - window), 0) for i in range(count)]


class Part(NamedTuple):
    """A part of an image that is answered by itself, of which the middle is kept.

    Attributes:
        rows, columns: indices of the pixels to read; mirrored ones beyond the border.
        kept: (rows, columns) of the answer.
        place: (rows, columns) of the whole answer, where they belong.
    """

    rows: np.ndarray
    columns: np.ndarray
    kept: tuple[slice, slice]
    place: tuple[slice, slice]


def parts(size: Size, largest: int, scale: int = 1) -> Iterator[Part]:
    """An image in equal parts of less than `largest` pixels a side, which overlap by a tenth at each inner border.

    SwinIR's and MambaIR's partition for tests: L // largest + 1 parts along a side of L pixels, which is mirrored at
    its end to a multiple of them.

    Args:
        size: of the image.
        largest: side of the parts; an image with shorter sides is one part.
        scale: pixels of the answer per pixel of the image.
    """
    along = [_cuts(length, largest, scale) for length in size]
    for rows, kept_rows, place_rows in along[0]:
        for columns, kept_columns, place_columns in along[1]:
            yield Part(rows, columns, (kept_rows, kept_columns), (place_rows, place_columns))


def _cuts(length: int, largest: int, scale: int) -> list[tuple[np.ndarray, slice, slice]]:
    count = length // largest + 1
    step = -(-length // count)
    overlap, cuts = step // 10, []
    for i in range(count):
        first, last = max(i * step - overlap, 0), min((i + 1) * step + overlap, count * step)
        at = np.arange(first, last)
        at = np.where(at < length, at, 2 * (length - 1) - at)
        end = min((i + 1) * step, length)
        kept = slice(scale * (i * step - first), scale * (end - first))
        cuts.append((at, kept, slice(scale * i * step, scale * end)))
    return cuts


class Block(NamedTuple):
    """A part of an image and its logits (C, bottom - top, right - left)."""

    top: int
    bottom: int
    left: int
    right: int
    logits: Tensor


def slide(
    pixels: Pixels,
    forward: Callable[[np.ndarray], Tensor],
    channels: int,
    window: Size,
    stride: Size,
    *,
    batch: int = 1,
    memory: int = 2**30,
    device: torch.device | str = "cpu",
    progress: Progress = silent,
) -> Iterator[Block]:
    """The mean of the logits of all windows over each pixel, block by block, each pixel once.

    The logits of a block are good until the next one is asked for.

    The sums are kept for a strip as high as a window. Where a strip as wide as the image would take more than
    `memory` bytes, the image is done in several columns, and windows across their borders once in each.

    Args:
        pixels: the image.
        forward: windows (B, h, w, 3) -> logits (B, channels, h, w).
        window, stride: (height, width); a window is never larger than the image.
        batch: windows in one call of `forward`.
        memory: bytes for the sums of logits; never less than what one window takes.
        device: where `forward` answers.
        progress: gets the shares of the work as they are done, 1 in all.
    """
    height, width = pixels.size
    high, wide = min(window[0], height), min(window[1], width)
    tops, lefts = positions(height, high, stride[0]), positions(width, wide, stride[1])
    columns = -(-width // max(memory // (channels * high * 4), wide))
    edges = [width * i // columns for i in range(columns + 1)]
    widest = torch.empty(channels, high, max(b - a for a, b in zip(edges, edges[1:])), device=device)
    for left, right in zip(edges, edges[1:]):
        ours = [x for x in lefts if x < right and x + wide > left]
        across = _cover(ours, wide, left, right)
        sums = widest[..., : right - left].zero_()
        for top, following in zip(tops, [*tops[1:], height]):
            strip = pixels.read(top, top + high, ours[0], ours[-1] + wide)
            for at in range(0, len(ours), batch):
                together = ours[at : at + batch]
                answers = forward(np.stack([strip[:, x - ours[0] :][:, :wide] for x in together]))
                for x, answer in zip(together, answers):
                    a, b = max(x, left), min(x + wide, right)
                    sums[..., a - left : b - left] += answer[..., a - x : b - x]
                progress(len(together) / (len(tops) * len(ours) * columns))
            done = following - top
            counts = np.outer(_cover(tops, high, top, following), across)
            yield Block(top, following, left, right, sums[:, :done].div_(torch.from_numpy(counts).to(sums)))
            sums[:, : high - done] = sums[:, done:].clone()
            sums[:, high - done :] = 0


def _cover(starts: Sequence[int], length: int, first: int, last: int) -> np.ndarray:
    """How many of the windows that start at `starts` lie over each position from `first` to `last`."""
    at = np.arange(first, last)
    return sum(((start <= at) & (at < start + length)).astype(int) for start in starts)


def enlarge(logits: Tensor, size: Size, align_corners: bool = False, memory: int = 2**30) -> Iterator[Block]:
    """Logits (C, h, w) as `F.interpolate(logits, size, mode="bilinear")` has them, in strips of `memory` bytes."""
    height, width = size
    above, below, share_y = _neighbours(logits.shape[1], height, align_corners, logits.device)
    before, after, share_x = _neighbours(logits.shape[2], width, align_corners, logits.device)
    widest = max(width, logits.shape[2])
    rows = max(memory // (4 * logits.shape[0] * widest * 4), 1)  # four of them at a time, at the most
    for top in range(0, height, rows):
        at = slice(top, top + rows)
        strip = torch.lerp(logits[:, above[at]], logits[:, below[at]], share_y[at, None])
        yield Block(top, min(top + rows, height), 0, width, torch.lerp(strip[..., before], strip[..., after], share_x))


def _neighbours(small: int, large: int, align_corners: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each position of a side of `large` the two of `small` that it lies between, and how near to the second."""
    at = torch.arange(large, dtype=torch.float32, device=device)
    if align_corners:
        at = at * ((small - 1) / max(large - 1, 1))
    else:
        at = ((at + 0.5) * (small / large) - 0.5).clamp(min=0)
    first = at.long().clamp(max=small - 1)
    return first, (first + 1).clamp(max=small - 1), at - first


def _pair(value: int | Size | None, name: str) -> Size | None:
    if value is None:
        return None
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(not isinstance(side, int) or side < 1 for side in pair):
        raise InputError(f"a {name} is (height, width) in pixels, not {value!r}")
    return pair
