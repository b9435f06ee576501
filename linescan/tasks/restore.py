"""Restoration: degraded images in, restored ones out (`Restorer`); and how such networks are trained and scored."""

import math
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, islice
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ..engine.atomic import atomic, expect_no_input
from ..engine.cards import ModelCard, plain_preprocess, read_card
from ..engine.image_sets import roots
from ..engine.pairs import SYMMETRIES, Pairs, find_pairs, open_pairs, symmetry
from ..engine.scores import Evaluator, Totals
from ..errors import InputError, known
from ..media.arrays import ImageFacts, array_of, expect_format, read_array, write_array
from ..media.degrade import Degradation
from ..media.draw import draw_comparison
from ..media.find import Source
from ..media.images import LARGE
from ..media.large import blank
from ..media.pixels import to_bytes
from ..media.quality import SSIM_WINDOW, luma, psnr, ssim, to_8_bits
from ..media.resize import enlarge_bicubic
from .base import Task, build_model
from .open import expect_task, restore_for
from .recipes import RestorationRecipe
from .tool import Progress, Tool, Writer, expect_finite, silent
from .windows import Part, parts

__all__ = ["FORMATS", "Photo", "Photos", "Quality", "RestorationTask", "Restorer", "ensemble", "in_parts", "whole"]

LARGEST_PART = 200
"""Side from which on an image is restored in parts, as in the published tests."""

Network = Callable[[Tensor], Tensor]


# -- networks on images of any size -----------------------------------------------------------------------------------


def in_parts(
    network: Network,
    size: tuple[int, int],
    read: Callable[[Part], Tensor],
    write: Callable[[Part, Tensor], None],
    scale: int = 1,
    largest: int = LARGEST_PART,
    batch: int = 1,
    progress: Progress = silent,
) -> None:
    """Restores an image in the parts of `linescan.tasks.windows.parts`, of which only a few are in memory at a time.

    Args:
        network: images (n, C, h, w) -> (n, C, h * scale, w * scale).
        size: (height, width) of the image.
        read: a part -> its pixels, (1, C, h, w).
        write: gets each part with what is kept of its answer, (C, ...).
        scale, largest: of `parts`.
        batch: parts in one call of the network.
        progress: gets the shares of the work as they are done, 1 in all.
    """
    every = list(parts(size, largest, scale))
    for _, alike in groupby(every, lambda part: (len(part.rows), len(part.columns))):
        while together := list(islice(alike, batch)):
            answers = network(torch.cat([read(part) for part in together]))
            for part, answer in zip(together, answers):
                write(part, answer[(..., *part.kept)])
            progress(len(together) / len(every))


def whole(network: Network, images: Tensor, scale: int = 1, largest: int = LARGEST_PART) -> Tensor:
    """Images (B, C, H, W) -> (B, C, H * scale, W * scale), restored in parts."""
    height, width = images.shape[-2:]
    result = images.new_empty(*images.shape[:2], height * scale, width * scale)

    def each(one: Tensor, restored: Tensor) -> None:
        def write(part: Part, answer: Tensor) -> None:
            restored[(..., *part.place)] = answer

        in_parts(
            network, (height, width), lambda part: one[..., part.rows[:, None], part.columns], write, scale, largest
        )

    for one, restored in zip(images.split(1), result):
        each(one, restored)
    return result


def ensemble(network: Network) -> Network:
    """The mean of a network's answers for the eight symmetries of an image, each turned back ("self-ensemble")."""

    def mean(images: Tensor) -> Tensor:
        answers = (symmetry(network(symmetry(images, i)), i, inverse=True) for i in range(SYMMETRIES))
        return sum(answers) / SYMMETRIES

    return mean


# -- training ---------------------------------------------------------------------------------------------------------


class Quality(Evaluator):
    """PSNR in dB and SSIM, their means over whole images, as papers measure them (`linescan.media.quality`).

    Args:
        data: pairs of whole images.
        scale: of the network.
        on: "y", the luma of colour images, or "rgb".
        crop: pixels at each border that are left out.
    """

    names = ("psnr", "ssim")
    primary = "psnr"
    batch = 1  # images differ in size

    def __init__(self, data: Pairs, scale: int, on: str, crop: int):
        self.data, self.scale, self.on, self.crop = data, scale, known("on", on, ("y", "rgb")), crop
        data.least = SSIM_WINDOW + 2 * crop

    @classmethod
    def of(cls, recipe: RestorationRecipe, data: Pairs) -> "Quality":
        """As the recipe says, or as the field does: luma without the border for super-resolution, luma for JPEG, RGB
        for noise."""
        noise_alone = data.degrade is not None and {step.kind for step in data.degrade.steps} == {"noise"}
        on = recipe.measure or ("rgb" if data.scale == 1 and (noise_alone or data.degrade is None) else "y")
        border = data.scale if data.scale > 1 else 0
        return cls(data, data.scale, on, border if recipe.crop is None else recipe.crop)

    def measure(self, model: nn.Module, batch: dict[str, Tensor], totals: Totals) -> None:
        restored = to_8_bits(whole(model, batch["low"], self.scale).float())
        for image, target in zip(restored, batch["high"]):
            if self.on == "y" and len(image) == 3:
                image, target = luma(image), luma(target)
            values = torch.tensor([[psnr(image, target, self.crop), ssim(image, target, self.crop)]])
            totals.keep(psnr=values[:, 0], ssim=values[:, 1])

    def scores(self, totals: Totals) -> dict[str, float]:
        return {name: totals[name].double().mean().item() for name in self.names}

    def describe(self, scores: dict[str, float]) -> str:
        return f"PSNR {scores['psnr']:.2f} dB, SSIM {scores['ssim']:.4f}"


def charbonnier(restored: Tensor, target: Tensor) -> Tensor:
    """The mean of sqrt(difference^2 + 1e-6): L1, smooth at 0 (Charbonnier et al., 1994)."""
    return ((restored - target).square() + 1e-6).sqrt().mean()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": F.l1_loss, "charbonnier": charbonnier}


class RestorationTask(Task):
    """Degraded images -> L1 or Charbonnier loss against the sharp ones.

    Raises:
        InputError: a model that restores no images, or data that do not fit it.
    """

    unit = "images"
    listed = "restoration"
    recipe: RestorationRecipe

    def __init__(self, recipe: RestorationRecipe):
        super().__init__(recipe)
        expect_task(recipe.model, self.listed)
        self.model = build_model(recipe)
        channels, scale = self.model.in_chans, self.model.upscale
        (high, low), held_out = open_pairs(recipe.data, recipe.val, recipe.holdout, scale)
        degrade = _degradation(recipe, scale, all(files is not None for files in (low, held_out[1])))
        patches = {"patch": recipe.patch, "repeats": recipe.repeats}
        self.data = Pairs(high, low, channels, scale, degrade if low is None else None, **patches)
        self.evaluator = Quality.of(recipe, Pairs(*held_out, channels, scale, degrade if held_out[1] is None else None))

    @classmethod
    def resolve(cls, recipe: RestorationRecipe) -> RestorationRecipe:
        """As for other tasks; but a model of one scale may start from the weights of another, as the published ones
        do, and channels are the model's, not the data's."""
        card = read_card(recipe.checkpoint) if recipe.checkpoint else None
        if card is None:
            return replace(recipe, model=recipe.model or recipe.default_model)
        args = card.args if recipe.model in (None, card.model) else {}
        return replace(recipe, model=recipe.model or card.model, model_args=args | recipe.model_args)

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        low, high = self._stage(batch["low"], batch["high"])
        if self.recipe.mixup and np.random.random() < 0.5:
            share, order = np.random.beta(self.recipe.mixup, self.recipe.mixup), torch.randperm(len(low))
            low, high = (share * x + (1 - share) * x[order] for x in (low, high))
        restored = model(low)
        return {"loss": LOSSES[self.recipe.loss](restored.float(), high), "output": restored}

    def _stage(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """As many patches of the batch, and as large, as there are in the stage of this step: at a random place."""
        growth = self.recipe.growth
        if not growth:
            return low, high
        ends = accumulate(steps for _, _, steps in growth[:-1])
        side, count, _ = growth[sum(end <= self.step for end in ends)]
        scale = high.shape[-1] // low.shape[-1]
        top, left = (np.random.randint(length - side + 1) for length in low.shape[-2:])

        def cut(x: Tensor, scale: int) -> Tensor:
            rows, columns = (slice(scale * at, scale * (at + side)) for at in (top, left))
            return x[:count, :, rows, columns]

        return cut(low, 1), cut(high, scale)

    def card(self) -> ModelCard:
        return ModelCard(self.recipe.model, self.recipe.model_args, [], plain_preprocess(self.model.in_chans))

    @classmethod
    def judge(cls, recipe: RestorationRecipe, model: nn.Module, card: ModelCard) -> Evaluator:
        channels, scale = model.in_chans, model.upscale
        root, held_out = roots(recipe.data, None)
        high, low = find_pairs(held_out or root, scale)
        return Quality.of(recipe, Pairs(high, low, channels, scale, _degradation(recipe, scale, low is not None)))


def _degradation(recipe: RestorationRecipe, scale: int, paired: bool) -> Degradation | None:
    if recipe.degrade is None and paired:
        return None
    if recipe.degrade is None and scale == 1:
        raise InputError(f"{recipe.data} holds no pairs (high/ and low/): --degrade says what is done to its images, "
                         "as in --degrade 'noise 25' or --degrade 'jpeg 40'")  # fmt: skip
    return Degradation(recipe.degrade or "bicubic", scale)


# -- the user's side --------------------------------------------------------------------------------------------------

FORMATS = {"png": ".png", "tiff": ".tif", "jpeg": ".jpg", "webp": ".webp"}
"""Formats of restored images, and their suffixes."""


@dataclass(frozen=True, eq=False)
class Photo:
    """An image in the depth of its file.

    Attributes:
        array: (H, W, C): grey or RGB, with alpha or not; uint8, uint16, or float32 in 0..1.
        facts: colour profile and EXIF data of its file.
    """

    array: np.ndarray
    facts: ImageFacts = ImageFacts()

    @property
    def image(self) -> Image.Image:
        """As an 8-bit PIL image."""
        return Image.fromarray(to_bytes(self.array).squeeze(-1) if self.array.shape[2] == 1 else to_bytes(self.array))


def thinned(photo: Photo) -> Photo:
    """The photo; of one of more than `LARGE` pixels every n-th row and column."""
    step = math.ceil(math.sqrt(photo.array.shape[0] * photo.array.shape[1] / LARGE))
    return replace(photo, array=photo.array[::step, ::step])


class Restorer(Tool):
    """Restores images: enlarges them, or takes away noise or the traces of JPEG, as the model was trained to.

        restorer = Restorer("mambair_v2_light_x4", "mambairv2_lightSR_x4.pth")
        restorer("photo.jpg").image.save("photo_x4.png")

    Depth, alpha and colour profile are kept. A model of colours restores grey images as such; one of grey images
    restores the luma of colours. Alpha is enlarged by bicubic interpolation.

    Args:
        model: a name of `linescan list --task restoration`; not needed where the checkpoint names it.
        checkpoint: its weights (.pth, .safetensors). Without it, the published ones.
        device, dtype: as for `Tool`.
        batch: parts of an image in one forward pass.
        window: side from which on an image is restored in overlapping parts, for memory; by default 200, as in the
            published tests.
        self_ensemble: the mean over the eight symmetries of the image: eight times the work, a little better.
        args: further arguments of the model.

    Raises:
        InputError, CheckpointError: no such model, one that restores no images, or no weights for it.
    """

    kinds = ("image",)

    def __init__(
        self,
        model: str | None = None,
        checkpoint: str | Path | None = None,
        *,
        device: str | None = None,
        dtype: torch.dtype = torch.float32,
        batch: int = 1,
        window: int = LARGEST_PART,
        self_ensemble: bool = False,
        **args,
    ):
        if not isinstance(window, int) or window < 16:
            raise InputError(f"a window is a number of pixels, 16 or more, not {window!r}")
        module, card = restore_for("restoration", model, checkpoint, **args)
        self.channels, self.scale = module.in_chans, module.upscale
        super().__init__(card.model, module, device, dtype, batch)
        self.window, self.self_ensemble = window, self_ensemble
        self.network = ensemble(self._run) if self_ensemble else self._run

    def facts(self) -> dict[str, str]:
        """What there is to know of this tool, by name."""
        scale = f"x{self.scale}" if self.scale > 1 else "same size"
        return super().facts() | {"scale": scale + ", self-ensemble" * self.self_ensemble}

    def open(self, given: Any) -> Photo:
        """A file in its depth, a PIL image in that of its mode; an array (H, W) or (H, W, C), or a `Photo`."""
        if isinstance(given, Photo):
            photo = given
        elif isinstance(given, (str, Path)):
            photo = Photo(*read_array(given))
        elif isinstance(given, Image.Image):
            photo = Photo(array_of(given))
        else:
            array = np.asarray(given)
            photo = Photo(array[..., None] if array.ndim == 2 else array)
        array = photo.array
        if array.ndim != 3 or array.shape[2] not in (1, 2, 3, 4) or min(array.shape) < 1:
            raise InputError(f"an image is grey or RGB, with alpha or not, (H, W, 1 to 4), not {array.shape}")
        if array.dtype not in (np.uint8, np.uint16, np.float32):
            raise InputError(f"images of 8 and 16 bits, and of float32 in 0..1, are restored, not of {array.dtype}")
        if array.dtype == np.float32 and not (array.min() >= 0 and array.max() <= 1):
            raise InputError("values of float32 images are in 0..1 to be restored")
        return photo

    def answer(self, opened: Sequence[Photo], progress: Progress = silent) -> list[Photo]:
        return [Photo(self._restored(photo.array, progress), photo.facts) for photo in opened]

    def _restored(self, array: np.ndarray, progress: Progress) -> np.ndarray:
        (height, width, channels), scale = array.shape, self.scale
        result = blank((height * scale, width * scale, channels), array.dtype)
        top = 1.0 if array.dtype == np.float32 else float(np.iinfo(array.dtype).max)

        def read(part: Part) -> Tensor:
            pixels = array[part.rows[:, None], part.columns].astype(np.float32)
            return torch.from_numpy(pixels / top).to(self.device).permute(2, 0, 1)[None]

        def write(part: Part, answer: Tensor) -> None:
            pixels = answer.clamp(0, 1).mul(top).permute(1, 2, 0).cpu().numpy()
            result[part.place] = pixels if top == 1 else pixels.round()

        in_parts(self._with_all_channels, (height, width), read, write, scale, self.window, self.batch, progress)
        return result

    def _with_all_channels(self, images: Tensor) -> Tensor:
        """Grey or RGB with alpha or not, in 0..1 -> the same, restored."""
        colours = 1 if images.shape[1] < 3 else 3
        given, alpha = images[:, :colours], images[:, colours:]
        if colours == self.channels:
            restored = self.network(given)
        elif colours == 1:
            restored = self.network(given.expand(-1, self.channels, -1, -1)).mean(1, keepdim=True)
        elif self.channels == 1:
            # A change of luma alone: the same for red, green and blue, so that Cb and Cr stay.
            weights = torch.tensor((0.299, 0.587, 0.114), device=given.device)[:, None, None]
            grey = (given * weights).sum(1, keepdim=True)
            restored = self._enlarged(given) + self.network(grey) - self._enlarged(grey)
        else:
            raise InputError(f"{self.model_name} restores images of {self.channels} channels, not {colours}")
        return torch.cat([restored, self._enlarged(alpha)], 1) if alpha.shape[1] else restored

    def _enlarged(self, images: Tensor) -> Tensor:
        return images if self.scale == 1 else enlarge_bicubic(images, self.scale)

    def _run(self, images: Tensor) -> Tensor:
        return expect_finite(self.module(images).float(), large=True)

    def draw(self, opened: Photo, answer: Photo, frame: bool = False) -> Image.Image:
        """Before and after (`linescan.media.draw.draw_comparison`), without alpha."""
        before, after = (thinned(photo).image.convert("RGB") for photo in (opened, answer))
        return draw_comparison(before, after, ("before", f"after {self.model_name}"))


class Photos(Writer):
    """Restored images as files, OUT/NAME.png.

    Args:
        out: the folder.
        format: a key of `FORMATS`; by default PNG, and TIFF for float32.
        scale: of the network.
    """

    def __init__(self, out: Path, format: str | None = None, scale: int = 1):
        self.out, self.format, self.scale = out, format and known("format", format.lower(), FORMATS), scale

    def _place(self, source: Source, photo: Photo) -> tuple[Path, str]:
        """The path and the format of the restored image of a photo."""
        format = self.format or ("tiff" if photo.array.dtype == np.float32 else "png")
        return self.out / (source.name + FORMATS[format]), format.upper()

    def expect(self, source: Source, opened: Photo) -> None:
        """Raises InputError: the format cannot hold the photo once it is restored, or its file is an input."""
        path, format = self._place(source, opened)
        height, width, channels = opened.array.shape
        expect_format(format, (height * self.scale, width * self.scale, channels), opened.array.dtype)
        expect_no_input(path)

    def save(self, source: Source, answer: Photo, frame: int | None = None) -> list[Path]:
        """Writes a restored image with the profile and the EXIF data of its source."""
        path, format = self._place(source, answer)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path) as file:
            write_array(file, answer.array, answer.facts, format)
        return [path]

    def describe(self, answer: Photo) -> str:
        """Size and depth."""
        return "{width} x {height} pixels, {channels} channel(s) of {bits} bits".format(**self.as_json(answer))

    def as_json(self, answer: Photo) -> dict:
        """Size and depth."""
        height, width, channels = answer.array.shape
        return {"height": height, "width": width, "channels": channels, "bits": 8 * answer.array.itemsize}
