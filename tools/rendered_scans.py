#!/usr/bin/env python
"""A small VM-UNet on rendered lesions of the skin, and a small Mamba-ND on rendered volumes, for the pages of both.

    python tools/rendered_scans.py

Writes sets in ISIC's and in BTCV's layouts, trains on them, prints the scores of what is held out, and draws
docs/images/lesions.png and docs/images/volumes.jpg. The same command again goes on where it was stopped.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nibabel  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import typer  # noqa: E402
from PIL import Image  # noqa: E402
from rendered_changes import waves  # noqa: E402

from linescan.engine.atomic import atomic  # noqa: E402
from linescan.engine.organ_sets import richest_planes  # noqa: E402
from linescan.engine.recipe import Recipe  # noqa: E402
from linescan.engine.training import train  # noqa: E402
from linescan.tasks.recipes import SegmentationRecipe, VolumeSegmentationRecipe  # noqa: E402
from linescan.tasks.segment import Segmenter  # noqa: E402
from linescan.tasks.segment_volumes import VolumeSegmenter  # noqa: E402

IMAGES = Path(__file__).parents[1] / "docs" / "images"
SIDE = 96
VM_UNET = {"dims": [32, 64, 128, 256], "depths": [1] * 4, "depths_decoder": [1] * 4, "d_state": 4, "drop_path_rate": 0}
MAMBA_ND = {"embed_dim": 16, "depth": 12, "feature_size": 8}
ORGANS = "background", "body", "liver", "left kidney", "spine"
UNITS = np.array([-170, 20, 110, -60, 230])
"""Hounsfield units of each class, as they are rendered."""


def lesion(dice: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Skin with hairs and a dark spot of uneven outline (SIDE, SIDE, 3), and where the spot is."""
    y, x = np.indices((SIDE, SIDE)) / SIDE
    centre, radii = dice.uniform(0.35, 0.65, 2), dice.uniform(0.14, 0.3, 2)
    outline = ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 + 0.9 * (waves(dice, SIDE) - 0.5)
    skin = np.array([214, 164, 143]) * (0.85 + 0.25 * waves(dice, SIDE))[..., None] * dice.uniform(0.85, 1.1)
    spot = np.array([118, 74, 58]) * (0.7 + 0.6 * waves(dice, SIDE))[..., None]
    share = 1 / (1 + np.exp((outline - 1) * 12))[..., None]
    image = share * spot + (1 - share) * skin
    for _ in range(dice.integers(0, 5)):
        at, slope, bend = dice.uniform(0, 1), dice.uniform(-1, 1), dice.uniform(-1, 1)
        image[np.abs(y - at - slope * x - bend * x**2) < 0.008] *= 0.45
    return (image + dice.normal(0, 5, image.shape)).clip(0, 255).astype(np.uint8), outline < 1


def body(dice: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A volume (48, 40, 32) of Hounsfield units, and its labels."""
    shape = 48, 40, 32
    grid, labels = np.stack(np.indices(shape), -1) / shape, np.zeros(shape, np.uint8)
    for number, middle, radii in (
        (1, (0.5, 0.5, 0.5), (0.46, 0.42, 0.9)), (2, (0.68, 0.55, 0.6), (0.17, 0.24, 0.26)),
        (3, (0.28, 0.42, 0.45), (0.09, 0.11, 0.2)), (4, (0.5, 0.2, 0.5), (0.07, 0.08, 0.9)),
    ):  # fmt: skip
        middle, radii = middle + dice.uniform(-0.03, 0.03, 3), radii * dice.uniform(0.85, 1.15, 3)
        labels[(((grid - middle) / radii) ** 2).sum(-1) < 1] = number
    return (UNITS[labels] + dice.normal(0, 25, shape)).astype(np.int16), labels


def write_lesions(root: Path) -> None:
    """A set in ISIC's layout."""
    for part, count, seed in (("train", 80, 0), ("val", 20, 1)):
        for i in range(count):
            image, mask = lesion(np.random.default_rng((seed, i)))
            for place, pixels in (("images", image), ("masks", mask.astype(np.uint8) * 255)):
                (root / part / place).mkdir(parents=True, exist_ok=True)
                with atomic(root / part / place / f"{i:03}.png") as file:
                    Image.fromarray(pixels).save(file, "PNG")


def write_volumes(root: Path) -> None:
    """A set in BTCV's layout."""
    rows = []
    for i in range(12):
        rows.append({"image": f"imagesTr/{i:02}.nii.gz", "label": f"labelsTr/{i:02}.nii.gz"})
        for file, array in zip(rows[-1].values(), body(np.random.default_rng(i))):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array, np.diag([1.5, 1.5, 2.0, 1])), root / file)
    labels = {str(i): name for i, name in enumerate(ORGANS)}
    with atomic(root / "dataset.json") as file:
        file.write(json.dumps({"labels": labels, "training": rows[:8], "validation": rows[8:]}).encode())


def trained(recipe: Recipe, out: Path) -> Path:
    """Trains, and prints the last scores; returns the file of the weights."""
    print(out.name, train(recipe, out, device="cpu", workers=0, resume=True))
    return out / "model.safetensors"


def draw_lesions(weights: Path, folder: Path, count: int = 6) -> None:
    """docs/images/lesions.png: images, true masks and what is found, below each other."""
    segment, columns = Segmenter(checkpoint=weights, device="cpu"), []
    for path in sorted((folder / "images").iterdir())[:count]:
        truth = Image.open(folder / "masks" / path.name).convert("RGB")
        [found] = segment([path])
        found = Image.fromarray(np.asarray(found > 0, np.uint8) * 255).convert("RGB")
        columns.append(np.concatenate([np.asarray(x) for x in (Image.open(path), truth, found)]))
    sheet = Image.fromarray(np.concatenate(columns, 1))
    with atomic(IMAGES / "lesions.png") as file:
        sheet.quantize(128).save(file, "PNG", optimize=True)


def draw_volume(segment: VolumeSegmenter, folder: Path, name: str) -> None:
    """docs/images/volumes.jpg: planes of a volume, with the true classes and with those that are found."""
    volume = segment.open(folder / "imagesTr" / name)
    truth = segment.open(folder / "labelsTr" / name).array.astype(np.uint8)
    places = richest_planes(truth)
    rows = [segment.draw_at(volume, labels, places) for labels in (truth, segment(volume))]
    sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)), "white")
    for row, top in zip(rows, (0, rows[0].height)):
        sheet.paste(row, (0, top))
    with atomic(IMAGES / "volumes.jpg") as file:
        sheet.save(file, "JPEG", quality=90)


def rendered_scans(
    to: Annotated[Path, typer.Option("--out", "-o", help="The folder for everything.")] = Path("runs/rendered-scans"),
):
    """Train small networks on rendered lesions and volumes, and draw what they find."""
    torch.set_num_threads(1)
    write_lesions(to / "lesions")
    write_volumes(to / "volumes")
    common = {"warmup": 5, "lr": 5e-3}
    recipe = SegmentationRecipe(
        str(to / "lesions"), model_args=VM_UNET, size="64", batch=8, steps=80, evaluate_every=80, **common
    )
    draw_lesions(trained(recipe, to / "vm-unet"), to / "lesions" / "val")
    recipe = VolumeSegmentationRecipe(
        str(to / "volumes"), model_args=MAMBA_ND, window=16, batch=2, steps=120, evaluate_every=120, **common
    )
    segment = VolumeSegmenter(checkpoint=trained(recipe, to / "mamba-nd"), device="cpu")
    draw_volume(segment, to / "volumes", "09.nii.gz")
    print(IMAGES / "lesions.png", IMAGES / "volumes.jpg")


if __name__ == "__main__":
    typer.run(rendered_scans)
