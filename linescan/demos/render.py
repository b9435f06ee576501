"""Scenes of handwritten digits (`linescan.engine.digit_scenes`), written as mmseg and mmdet read them.

ROOT/SPLIT/images/00000.png       RGB
ROOT/SPLIT/masks/00000.png        class of each pixel: 0 the canvas, d + 1 the digit d (palette PNG)
ROOT/SPLIT/instances.json         COCO: category d + 1 is the digit d, masks as RLE, boxes around them
"""

import colorsys
import json
from pathlib import Path

import numpy as np
from PIL import Image

from ..engine.atomic import atomic
from ..engine.digit_scenes import scene_of
from ..engine.image_sets import Digits
from ..engine.progress import progress_bar

__all__ = ["CLASSES", "PALETTE", "WORDS", "as_palette", "read_pixels", "write_scenes", "write_words"]

CLASSES = ("canvas", *Digits.classes)
PALETTE = [(38, 40, 56)] + [
    tuple(round(255 * c) for c in colorsys.hsv_to_rgb(d / 10, 0.62 + 0.2 * (d % 2), 0.98 - 0.16 * (d % 2)))
    for d in range(10)
]  # fmt: skip
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def write_scenes(root: str | Path, split: str, count: int, size: int = 96, seed: int = 0) -> Path:
    """Renders `count` scenes of "train" or "val" into `root`, replacing what is there; returns the COCO file's path.

    The COCO file comes last, and whole: where it is, everything is.
    """
    from pycocotools import mask as coco_mask

    folder = Path(root) / split
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    path = folder / "instances.json"
    path.unlink(missing_ok=True)
    digits = Digits(held_out=split == "val")
    images, annotations = [], []
    with progress_bar(f"writing {folder}", count) as advance:
        for i in range(count):
            scene = scene_of(digits, split, i, size, seed)
            name = f"{i:05}.png"
            Image.fromarray(scene.image).save(folder / "images" / name)
            as_palette(scene.semantic).save(folder / "masks" / name)
            images.append({"id": i, "file_name": name, "width": size, "height": size})
            for label, mask, box in zip(scene.labels, scene.masks, scene.boxes):
                rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
                annotations.append({
                    "id": len(annotations) + 1, "image_id": i, "category_id": int(label) + 1, "iscrowd": 0,
                    "bbox": box.tolist(), "area": int(mask.sum()),
                    "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
                })  # fmt: skip
            advance()
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES) if i]
    with atomic(path) as file:
        file.write(json.dumps({"images": images, "annotations": annotations, "categories": categories}).encode())
    return path


def as_palette(classes: np.ndarray) -> Image.Image:
    """Classes (H, W) as an image with the palette of scenes."""
    image = Image.fromarray(classes, "P")
    image.putpalette(np.array(PALETTE, np.uint8).tobytes())
    return image


def write_words(path: str | Path, dim: int = 64) -> None:
    """Writes the digits' names with embeddings of unit length at right angles (`linescan.tasks.prompts`).

    They stand for those of a text encoder; any one can tell ten words apart.

    Args:
        path: a .npz or a .safetensors.
        dim: of the embeddings, 10 or more.
    """
    from torch import Generator, linalg, randn

    from ..tasks.prompts import write_embeddings

    basis = linalg.qr(randn(dim, len(WORDS), generator=Generator().manual_seed(0)))[0]
    write_embeddings(path, WORDS, basis.T)


def read_pixels(path: str | Path) -> np.ndarray:
    """An image file's values as they are: (H, W, 3) RGB, or (H, W) classes of a mask."""
    with Image.open(path) as image:
        return np.asarray(image)
