"""Segmentation: images in, masks out."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Iterable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..engine.atomic import atomic
from ..errors import InputError
from ..media.draw import draw_masks
from ..media.find import Source
from ..media.images import ImageLike
from ..media.large import PairedPixels, Pixels, blank, open_pixels, write_mask
from .open import open_model
from .tool import Progress, Writer, expect_finite, silent
from .windows import Block, Size, WindowTool, bounded, enlarge, reduced_for_drawing, slide, thin

__all__ = ["Masks", "Segmenter"]

FRAME_LEGEND = 2  # rows of the legend below frames of a video, which are all of one size


class Segmenter(WindowTool):
    """Says what each pixel of an image shows.

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
            mmseg config: a file, a name of one of linescan's, or "mmseg::...".
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
        model: str | Path,
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
        opened = open_model("segmentation", model, checkpoint, **args)
        super().__init__(str(model), opened, device, dtype, batch, window, stride, strict)
        self.memory = memory
        if not self.window and self.model.window and not self.model.resizes:
            self.window, self.stride = self.model.window, self.model.stride

    def open(self, given: ImageLike | Pixels | tuple[ImageLike, ...]) -> Pixels:
        """The pixels of an image, or of the images of a scene, as many as the model reads.

        Raises:
            InputError: more or fewer of them, or of different sizes.
        """
        images = given if isinstance(given, tuple) else (given,)
        if len(images) != self.model.images:
            wanted = f"{self.model.images} images of each scene (--extra)" if self.model.images > 1 else "one image"
            raise InputError(f"{self.model_name} reads {wanted}, got {len(images)}")
        return PairedPixels([open_pixels(image) for image in images]) if len(images) > 1 else open_pixels(images[0])

    def draw(self, opened: ImageLike | Pixels, answer: np.ndarray, frame: bool = False) -> Image.Image:
        """The (first) image tinted by its mask, with a legend (`linescan.media.draw`); large ones are drawn smaller."""
        image, factor = reduced_for_drawing(pixels := open_pixels(opened))
        image = image[..., :3]
        mask = np.asarray(answer[thin(pixels.size[0], factor), thin(pixels.size[1], factor)])
        return draw_masks(image, mask, self.classes, self.palette, legend_rows=FRAME_LEGEND if frame else None)

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
            raise InputError(f"windows of {'x'.join(map(str, images.shape[1:3]))} pixels: {error}") from error
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
        mask = blank(size, np.uint8 if len(self.classes) <= 256 else np.uint16)
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
