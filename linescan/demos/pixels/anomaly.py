"""A small MambaAD trains on whole textures, and finds what is pasted into others.

OUT/patches/                  patches of photographs, by photograph: what the teacher is trained to tell apart
OUT/teacher/                  its training, a ResNet-18's
OUT/textures/                 normal textures, and ones with defects and masks, as MVTec-AD has them
OUT/mambaad/                  the training
OUT/anomaly.png               held-out textures with defects, the masks, and the maps
"""

from pathlib import Path

import numpy as np
from PIL import Image

from ...engine.anomaly_sets import find_anomalies
from ...engine.atomic import atomic
from ...engine.cards import read_card
from ...engine.progress import say
from ...media.look import PAPER
from ...tasks.anomaly import AnomalyDetector
from ...tasks.recipes import AnomalyRecipe, ClassificationRecipe
from ..trainings import train_all

__all__ = ["commands", "run", "write_patches"]

TEXTURES = "brick", "grass", "gravel"
PHOTOGRAPHS = *TEXTURES, "astronaut", "camera", "chelsea", "coffee", "coins", "moon", "page", "rocket", "text"
PASTED = "astronaut", "chelsea", "coffee", "rocket"
TRAIN_ROWS = 352  # of a texture of 512 x 512 pixels; defects are pasted below them
SIDE = 128
SHARES = {"train": 200, "good": 16, "pasted": 16}  # images of each texture

TEACHER = {"model": "resnet18", "model_args": {"img_size": 64}, "steps": 100, "batch": 32, "lr": 1e-3, "warmup": 10}
SMALL = {
    "teacher": "resnet18", "directions": 2, "d_state": 4, "depths": [1, 1, 1, 1], "drop_path_rate": 0.0, "sigma": 2.0,
}  # fmt: skip
MAMBAAD = {"model_args": SMALL, "size": 96, "steps": 150, "batch": 8, "schedule": "cosine", "lr": 1.5e-3, "warmup": 10}
"""Images of 64 pixels would leave a few pixels of a pasted piece. The rate of the published runs, 5e-3, which have
1,000 epochs, is too high for so few steps."""


def photograph(name: str) -> np.ndarray:
    """One that scikit-image ships, RGB."""
    from skimage import data

    pixels = getattr(data, name)()
    return np.stack([pixels] * 3, -1) if pixels.ndim == 2 else pixels


def crop(image: np.ndarray, side: int, dice: np.random.Generator) -> np.ndarray:
    """A random square of an image."""
    top, left = (int(dice.integers(length - side + 1)) for length in image.shape[:2])
    return image[top : top + side, left : left + side].copy()


def paste(image: np.ndarray, patch: np.ndarray, dice: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """`image` with an ellipse of `patch`, and where it is."""
    side = len(image)
    radii = dice.uniform(9, 22, 2)
    centre = dice.uniform(radii.max(), side - radii.max(), 2)
    angle = dice.uniform(0, np.pi)
    y, x = np.indices((side, side)) + 0.5 - centre[:, None, None]
    turned = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    mask = (turned[0] / radii[0]) ** 2 + (turned[1] / radii[1]) ** 2 < 1
    return np.where(mask[..., None], patch, image), mask


def save(path: Path, pixels: np.ndarray) -> None:
    """Writes a PNG file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as file:
        Image.fromarray(pixels).save(file, "PNG")


def write_patches(folder: Path, dice: np.random.Generator) -> None:
    """Patches of photographs, by photograph."""
    for name in PHOTOGRAPHS:
        image = photograph(name)
        image = image[:TRAIN_ROWS] if name in TEXTURES else image
        for i in range(40):
            save(folder / name / f"{i:02d}.png", crop(image, 96, dice))


def write_images(out: Path, seed: int) -> None:
    """patches/ and textures/."""
    dice = np.random.default_rng(seed)
    write_patches(out / "patches", dice)
    for name in TEXTURES:
        above, below = np.split(photograph(name), [TRAIN_ROWS])
        place = out / "textures" / name
        for i in range(SHARES["train"]):
            save(place / "train" / "good" / f"{i:03d}.png", crop(above, SIDE, dice))
        for i in range(SHARES["good"]):
            save(place / "test" / "good" / f"{i:03d}.png", crop(below, SIDE, dice))
        for i in range(SHARES["pasted"]):
            patch = crop(photograph(str(dice.choice(PASTED))), SIDE, dice)
            image, mask = paste(crop(below, SIDE, dice), patch, dice)
            save(place / "test" / "pasted" / f"{i:03d}.png", image)
            save(place / "ground_truth" / "pasted" / f"{i:03d}_mask.png", np.where(mask, 255, 0).astype(np.uint8))


def run(out: Path, seed: int = 0) -> dict:
    """Trains teacher and network; returns the scores on held-out textures, as `linescan evaluate` has them."""
    write_images(out, seed)
    teacher, network = out / "teacher", out / "mambaad"
    train_all(
        {
            teacher: ClassificationRecipe(
                str(out / "patches"), seed=seed, augment="crop", evaluate_every=TEACHER["steps"], **TEACHER
            )
        }
    )
    recipe = AnomalyRecipe(
        str(out / "textures"), seed=seed, teacher_checkpoint=str(teacher / "model.safetensors"),
        evaluate_every=MAMBAAD["steps"], **MAMBAAD,
    )  # fmt: skip
    train_all({network: recipe})
    trained = read_card(network / "model.safetensors").trained
    scores = {name.removeprefix("val_"): value for name, value in trained.items() if name.startswith("val_")}
    found = len(TEXTURES) * SHARES["pasted"], len(TEXTURES) * SHARES["good"]
    say(f"{found[0]} held-out textures with something pasted into them, and {found[1]} without. AUROC of images ",
        (f"{scores['image_auroc']:.3f}", "bold green"),
        f", of pixels {scores['pixel_auroc']:.3f}; AUPRO {scores['aupro']:.3f}")  # fmt: skip
    _draw(out / "anomaly.png", out / "textures", network / "model.safetensors")
    return scores


def _draw(path: Path, textures: Path, checkpoint: Path) -> None:
    """A row for each texture: an image with a defect, its mask and its map; the same of another; a normal one."""
    from matplotlib.figure import Figure

    detect, found = AnomalyDetector(checkpoint=checkpoint, device="cpu"), find_anomalies(textures)
    figure = Figure(figsize=(10.4, 1.45 * len(found.categories)), dpi=110, facecolor=PAPER)
    axes = figure.subplots(len(found.categories), 8)
    figure.subplots_adjust(0.005, 0.005, 0.995, 0.9, hspace=0.1, wspace=0.03)
    words = [*("defect", "mask", "map") * 2, "normal", "map"]
    for category, line in enumerate(axes):
        defects = [one for one in found.test if one.category == category and one.mask][:2]
        normal = next(one for one in found.test if one.category == category and not one.mask)
        shown = []
        for one in (*defects, normal):
            image = Image.open(one.path)
            shown += [
                image,
                *([Image.open(one.mask).convert("RGB")] if one.mask else []),
                detect(one.path).drawn(image),
            ]
        for axis, image, word in zip(line, shown, words):
            axis.imshow(image)
            axis.set_axis_off()
            if category == 0:
                axis.set_title(word, fontsize=8.5, pad=3)
    figure.savefig(path)


def commands(out: Path) -> list[str]:
    """Command lines to try next."""
    network, place = out / "mambaad" / "model.safetensors", out / "textures" / "gravel" / "test"
    return [f"anomaly {place / 'pasted'} -c {network} --normal {place / 'good'} --out {out / 'inspected'}"]
