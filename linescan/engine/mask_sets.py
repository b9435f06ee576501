"""Scenes with masks: images whose pixels have classes, and how both are changed alike.

    ROOT/train/images/NAME.*   ROOT/train/masks/NAME.*      and ROOT/val/ (or test/), as ISIC's sets are laid out
    ROOT/images/NAME.*         ROOT/masks/NAME.*            of which a part is held out
    ROOT/classes.txt                                        the name of each class in a line, from 0 on

A mask may be named NAME_segmentation or NAME_mask. Masks hold numbers of classes (grey images, or the indices of a
palette), and 255 where none is known. Of two classes, which need no classes.txt, the second is 1, or where that does
not occur 255, or bright.
For models that read several images of a scene, the folder extra/ beside images/ holds the second.

Sets of pairs are read as Sigma's authors lay them out (`LAYOUTS`), with their lists of names and their classes: MFNet,
PST900, NYUDepth v2 and SUN RGB-D.
"""

from pathlib import Path
from typing import NamedTuple, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as V

from ..errors import InputError
from ..media.arrays import read_mask
from ..media.draw import draw_masks
from ..media.find import find_images
from ..media.images import read_image
from ..media.labels import class_names
from .image_sets import roots, split

__all__ = [
    "IGNORED",
    "LAYOUTS",
    "Augment",
    "MaskedScenes",
    "PairLayout",
    "Scene",
    "classes_of",
    "lines_of",
    "open_scenes",
    "resize_images",
    "resize_mask",
    "scenes_to_score",
]

IGNORED = 255
"""In masks: no class is known."""

TWO = ("background", "foreground")
ENDINGS = "", "_segmentation", "_mask"


class Scene(NamedTuple):
    """Files of one scene.

    Attributes:
        images: as many as the model reads, of one size.
        mask: the class of each of their pixels.
        first: what stands for the first class in the mask; where there is less, no class is known.
    """

    images: tuple[Path, ...]
    mask: Path
    first: int = 0


class PairLayout(NamedTuple):
    """A published set of pairs: its folders, and the lists of the names in them.

    Attributes:
        data: its name, for which its classes are known.
        images, extra, masks: folders of first images, second images and masks.
        train, test: files that list names, without suffixes.
        first: see `Scene`.
    """

    data: str
    images: str
    extra: str
    masks: str
    train: str
    test: str
    first: int = 0

    def is_at(self, root: Path) -> bool:
        """Whether a folder has these folders."""
        return all((root / name).is_dir() for name in (self.images, self.extra, self.masks))

    def scenes(self, root: Path, listed: str, images: int) -> list[Scene]:
        """The scenes that one of the lists names.

        Raises:
            InputError: the list is missing or empty, or names what is not there.
        """
        path = root / listed
        if not (names := lines_of(path)):
            raise InputError(f"{path} names no scenes")
        folders = [root / name for name in (self.images, self.extra)[:images]] + [root / self.masks]
        files = [_by_name(folder) for folder in folders]
        for name in names:
            for folder, there in zip(folders, files):
                if name not in there:
                    raise InputError(f"{path} names {name}, of which {folder} has no image")
        return [Scene(tuple(there[name] for there in files[:-1]), files[-1][name], self.first) for name in names]


LAYOUTS = (
    PairLayout("MFNet", "RGB", "Modal", "Label", "train2.txt", "test.txt"),
    PairLayout("PST900", "rgb_resize", "thermal_resize", "labels_resize", "train.txt", "test.txt"),
    PairLayout("NYUDepth v2", "RGB", "Depth", "Label", "train2.txt", "test2.txt", first=1),
    PairLayout("SUN RGB-D", "RGB_resize", "Depth_resize", "labels_resize", "train2.txt", "test2.txt", first=1),
)


def layout_of(root: str | Path) -> PairLayout | None:
    """The published layout of a folder, if it has one."""
    return next((layout for layout in LAYOUTS if layout.is_at(Path(root))), None)


def find_scenes(folder: Path, images: int = 1) -> list[Scene]:
    """The scenes of a folder that has images/ and masks/ in it, and extra/ where two images of each are read.

    Raises:
        InputError: a folder is missing or empty, or a file has no partner.
    """
    places = [folder / name for name in ("images", "extra")[:images]]
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    if not (places[0].is_dir() and (folder / "masks").is_dir()):
        published = ", ".join(f"{one.images}, {one.extra} and {one.masks} ({one.data})" for one in LAYOUTS)
        raise InputError(f"{folder} has no images/ and masks/ in it; train/images and train/masks as ISIC's sets have "
                         f"them are read, too, and of pairs {published}")  # fmt: skip
    named = [_by_name(place) for place in places]
    masks = _by_name(folder / "masks")
    partner = {name: next((masks[name + end] for end in ENDINGS if name + end in masks), None) for name in named[0]}
    scenes = []
    for name in named[0]:
        if partner[name] is None:
            raise InputError(f"{named[0][name]} has no mask: there is no {folder / 'masks' / name}, with or without "
                             "_segmentation or _mask at its end")  # fmt: skip
        if missing := [place for place, files in zip(places, named) if name not in files]:
            raise InputError(f"{named[0][name]} has no partner of its name in {missing[0]}")
        scenes.append(Scene(tuple(files[name] for files in named), partner[name]))
    return scenes


def _by_name(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder")
    if not (files := find_images(folder)):
        raise InputError(f"{folder} holds no images")
    return {str(path.relative_to(folder).with_suffix("")): path for path in files}


def open_scenes(data: str, val: str | None, fraction: float, images: int = 1) -> tuple[list[Scene], list[Scene]]:
    """The scenes to train on, and those held out.

    Args:
        data: a folder with images/ and masks/ in it, one with such folders train/ and val/ (or test/) in it, or one of
            `LAYOUTS`.
        val: such a folder to hold out. Without it, what the lists of a layout say, or `fraction` of the scenes of
            `data`, always the same ones.
        images: that are read of each scene.

    Raises:
        InputError: see `find_scenes` and `PairLayout.scenes`.
    """
    if layout := layout_of(data):
        train = layout.scenes(Path(data), layout.train, images)
        return train, scenes_to_score(val or data, images)
    root, held_out = roots(data, val)
    scenes = find_scenes(root, images)
    if held_out:
        return scenes, scenes_to_score(held_out, images)
    parts = (sorted(split([0] * len(scenes), part, fraction)) for part in (False, True))
    train, test = ([scenes[i] for i in part] for part in parts)
    return train, test


def scenes_to_score(data: str | Path, images: int = 1) -> list[Scene]:
    """The scenes that a finished model is scored on.

    Args:
        data: one of `LAYOUTS`, whose test set it is; a folder with images/ and masks/ in it, or one with such a folder
            val/ (or test/) in it.
        images: that are read of each scene.

    Raises:
        InputError: see `find_scenes` and `PairLayout.scenes`.
    """
    root = Path(data)
    if layout := layout_of(root):
        return layout.scenes(root, layout.test, images)
    return find_scenes(next((root / name for name in ("val", "test") if (root / name).is_dir()), root), images)


def classes_of(data: str, otherwise: Sequence[str] = TWO) -> tuple[str, ...]:
    """The names of the classes: those of classes.txt, of the set whose layout it is, or `otherwise`.

    Raises:
        InputError: the file names fewer than two, or more than 255.
    """
    path = Path(data) / "classes.txt"
    if not path.is_file():
        layout = layout_of(data)
        return tuple(class_names(layout.data) or ()) if layout else tuple(otherwise)
    names = tuple(lines_of(path))
    if not 2 <= len(names) <= IGNORED:
        raise InputError(f"{path} names {len(names)} classes, one in a line; there are 2 to {IGNORED}")
    return names


def lines_of(path: Path) -> list[str]:
    """The lines of a text that are not empty. Raises InputError: it cannot be read."""
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or 'not a text'}") from None


def resize_mask(mask: Tensor, size: Sequence[int]) -> Tensor:
    """A mask (H, W), at another (height, width): the class of the nearest pixel."""
    return F.interpolate(mask[None, None].float(), tuple(size), mode="nearest-exact")[0, 0].to(mask.dtype)


class Augment:
    """Images and their mask, changed at random and alike.

    Args:
        words: joined by "+": mirror (left and right) and flip (upside down), half of the samples each; rotate, half of
            them by any angle; scale, by a factor from 0.5 to 2, of which a part of `size` is cut; or "none".
        size: (height, width) of what is trained on. Without "scale" a whole scene is resized to it.
        outside: the class beyond the border: of what "rotate" turns into the image.

    Raises:
        InputError: an unknown word.
    """

    WORDS = "mirror", "flip", "rotate", "scale"

    def __init__(self, words: str, size: tuple[int, int], outside: int = IGNORED):
        self.words = () if words == "none" else tuple(words.split("+"))
        if strange := [word for word in self.words if word not in self.WORDS]:
            raise InputError(f"--augment is none, or of {', '.join(self.WORDS)}, joined by +; not {strange[0]!r}")
        self.size, self.outside = size, outside

    def __call__(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Bytes (C, H, W) and (H, W) -> the same, of `size`."""
        if "scale" in self.words:
            factor = float(torch.empty(()).uniform_(0.5, 2))
            sides = [max(round(side * factor), 1) for side in mask.shape]
            images, mask = self._cut(resize_images(images, sides), resize_mask(mask, sides))
        else:
            images, mask = resize_images(images, self.size), resize_mask(mask, self.size)
        for word, axis in (("mirror", -1), ("flip", -2)):
            if word in self.words and torch.rand(()) < 0.5:
                images, mask = images.flip(axis), mask.flip(axis)
        if "rotate" in self.words and torch.rand(()) < 0.5:
            angle = float(torch.empty(()).uniform_(0, 360))
            darkest = [float(images.min())] * len(images)  # which is where stretched images begin
            images = V.rotate(images, angle, InterpolationMode.BILINEAR, fill=darkest)
            mask = V.rotate(mask[None], angle, InterpolationMode.NEAREST, fill=[self.outside])[0]
        return images.contiguous(), mask.contiguous()

    def _cut(self, images: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """A random part of `size`; black and without a class, where there is no more of the images."""
        below, right = (max(side - have, 0) for side, have in zip(self.size, mask.shape))
        images, mask = F.pad(images, (0, right, 0, below)), F.pad(mask, (0, right, 0, below), value=IGNORED)
        top, left = (int(torch.randint(have - side + 1, ())) for have, side in zip(mask.shape, self.size))
        part = slice(top, top + self.size[0]), slice(left, left + self.size[1])
        return images[(slice(None), *part)], mask[part]


def resize_images(images: Tensor, size: Sequence[int]) -> Tensor:
    """Bytes (C, H, W), at another (height, width): bilinear, without a filter, as the published tests have it."""
    return F.interpolate(images[None].float(), tuple(size), mode="bilinear", align_corners=False)[0].round().byte()


class MaskedScenes(Dataset):
    """Items {"images": bytes (3 * images, H, W), RGB, "mask": bytes (H, W), "index": ...}.

    Args:
        scenes: the files.
        classes: their names.
        prepare: what is done to images and mask: `Augment`, or what a model's test does.
        grey_extra: read all images of a scene but the first as grey.
    """

    def __init__(self, scenes: Sequence[Scene], classes: Sequence[str], prepare=None, grey_extra: bool = False):
        self.scenes, self.classes, self.prepare, self.grey_extra = scenes, classes, prepare, grey_extra

    @property
    def names(self) -> list[str]:
        """What to call each scene: the path of its first image."""
        return [str(scene.images[0]) for scene in self.scenes]

    def __len__(self) -> int:
        return len(self.scenes)

    def whole(self, index: int) -> tuple[Tensor, Tensor]:
        """The images and the mask as the files have them.

        Raises:
            InputError: a file cannot be read, sizes differ, or a mask has a value that is no class.
        """
        scene = self.scenes[index]
        images = [np.asarray(read_image(scene.images[0], 3))]
        for path in scene.images[1:]:
            images.append(np.asarray(read_image(path, 1 if self.grey_extra else 3).convert("RGB")))
        mask = read_mask(scene.mask)
        for path, image in zip(scene.images, images):
            if image.shape[:2] != mask.shape:
                own, other = ("x".join(map(str, shape)) for shape in (image.shape[:2], mask.shape))
                raise InputError(f"{path} has {own} pixels, its mask {scene.mask} has {other}")
        return torch.from_numpy(np.concatenate(images, -1)).movedim(-1, 0), self._classes_of(mask, scene)

    def _classes_of(self, mask: np.ndarray, scene: Scene) -> Tensor:
        path = scene.mask
        if scene.first:
            mask = np.where((mask < scene.first) | (mask == IGNORED), IGNORED, mask.astype(np.int64) - scene.first)
        if len(self.classes) == 2:
            top = mask.max()
            if top == IGNORED and (mask == 1).any() and not ((mask > 1) & (mask < IGNORED)).any():
                return torch.from_numpy(mask.astype(np.uint8))  # numbers of classes, some of them not known
            if 1 < top < 128:
                raise InputError(f"{path}: its highest value is {top}; of two classes masks are 0 and 1, or 0 and 255, "
                                 "and classes.txt names more")  # fmt: skip
            return torch.from_numpy((mask >= (1 if top <= 1 else 128 if top < 256 else 32768)).astype(np.uint8))
        wrong = (mask >= len(self.classes)) & (mask != IGNORED)
        if wrong.any():
            value = int(mask[wrong][0]) + scene.first
            raise InputError(f"{path}: {value} is none of {len(self.classes)} classes, from {scene.first} on")
        return torch.from_numpy(mask.astype(np.uint8))

    def __getitem__(self, index: int) -> dict:
        images, mask = self.whole(index)
        images, mask = (images, mask) if self.prepare is None else self.prepare(images, mask)
        return {"images": images, "mask": mask, "index": index}

    def preview(self, index: int, side: int = 336) -> Image.Image:
        """A scene as it is shown: the first image, tinted by its mask."""
        images, mask = self.whole(index)
        factor = side / max(mask.shape)
        sides = [max(round(have * factor), 1) for have in mask.shape]
        image = resize_images(images[:3], sides).movedim(0, -1).numpy()
        return draw_masks(image, resize_mask(mask, sides).numpy(), self.classes, legend_rows=0)
