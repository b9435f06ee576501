"""A small Sigma segments digits, half of which only a camera sees and half only a thermal camera, and beats both alone.

OUT/scenes/both/              scenes in two images and a mask, of handwriting: {train,val}/{images,extra,masks}/
OUT/scenes/{image,thermal}/   the same scenes, with one of the two images in the place of both
OUT/{both,image,thermal}/     the three trainings, of one network
OUT/pairs.png                 held-out scenes: both images, what each network says, the truth
"""

from pathlib import Path

import numpy as np
from PIL import Image

from ...engine.atomic import atomic
from ...engine.cards import read_card
from ...engine.digit_scenes import pair_of
from ...engine.image_sets import Digits
from ...engine.progress import progress_bar, say
from ...media.look import PAPER
from ...tasks.recipes import SegmentationRecipe
from ...tasks.segment import Segmenter
from ..render import CLASSES, as_palette
from ..trainings import train_all

__all__ = ["commands", "run"]

READ = {"both": ("image", "thermal"), "image": ("image", "image"), "thermal": ("thermal", "thermal")}
"""By training, what the network gets as its two images."""

CHOSEN = CLASSES[:3]  # canvas, 0 and 1
SCENES = {"train": 600, "val": 60}
SIDE = 64
SMALL = {"depths": [1, 1, 1, 1], "dim": 32, "decoder_depths": [1, 1, 1], "drop_path_rate": 0.0}
RECIPE = {
    "model": "sigma_tiny", "model_args": SMALL, "size": f"{SIDE}x{SIDE}", "augment": "none", "steps": 150, "batch": 8,
    "lr": 3e-3, "warmup": 20, "clip_grad": 5.0,
}  # fmt: skip


def chosen_digits(held_out: bool) -> Digits:
    """Handwriting of the digits in `CHOSEN`."""
    digits = Digits(held_out)
    kept = [i for i, label in enumerate(digits.labels) if label + 1 < len(CHOSEN)]
    digits.pixels, digits.labels = digits.pixels[kept], [digits.labels[i] for i in kept]
    digits.names = [digits.names[i] for i in kept]
    return digits


def write_scenes(out: Path, seed: int) -> None:
    """scenes/: every scene in the places where each of the trainings looks for it."""
    for name in READ:
        (out / name).mkdir(parents=True, exist_ok=True)
        with atomic(out / name / "classes.txt") as file:
            file.write("".join(f"{word}\n" for word in CHOSEN).encode())
        for split in SCENES:
            for place in ("images", "extra", "masks"):
                (out / name / split / place).mkdir(parents=True, exist_ok=True)
    with progress_bar(f"writing {out}", sum(SCENES.values())) as advance:
        for split, count in SCENES.items():
            digits = chosen_digits(held_out=split == "val")
            for i in range(count):
                scene, thermal = pair_of(digits, split, i, SIDE, seed, most=3)
                seen = {"image": Image.fromarray(scene.image), "thermal": Image.fromarray(thermal)}
                for name, read in READ.items():
                    for place, word in zip(("images", "extra"), read):
                        seen[word].save(out / name / split / place / f"{i:03}.png")
                    as_palette(scene.semantic).save(out / name / split / "masks" / f"{i:03}.png")
                advance()


def run(out: Path, seed: int = 0) -> dict:
    """Trains the network on both images and on each alone; returns, by training, the scores on held-out scenes."""
    write_scenes(out / "scenes", seed)
    train_all(
        {
            out / name: SegmentationRecipe(
                str(out / "scenes" / name), seed=seed, evaluate_every=RECIPE["steps"], **RECIPE
            )
            for name in READ
        }
    )
    scores = {}
    for name in READ:
        trained = read_card(out / name / "model.safetensors").trained
        scores[name] = {key.removeprefix("val_"): value for key, value in trained.items() if key.startswith("val_")}
    alone = max(("image", "thermal"), key=lambda name: scores[name]["miou"])
    say(f"Digits in {SCENES['val']} held-out scenes, mean IoU of {', '.join(CHOSEN)}: ",
        *(f"{name} {100 * scores[name]['miou']:.1f} %, " for name in ("image", "thermal")), "Sigma on both ",
        (f"{100 * scores['both']['miou']:.1f} %", "bold green"),
        f", {100 * (scores['both']['miou'] - scores[alone]['miou']):+.1f} beside {alone} alone")  # fmt: skip
    _draw(out / "pairs.png", out)
    return scores


def _draw(path: Path, out: Path, rows: int = 5) -> None:
    """A row for each held-out scene: both images, what the three networks say, and the truth."""
    from matplotlib.figure import Figure

    networks = {name: Segmenter(checkpoint=out / name / "model.safetensors", device="cpu") for name in READ}
    figure = Figure(figsize=(8.4, 1.42 * rows + 0.2), dpi=110, facecolor=PAPER)
    axes = figure.subplots(rows, 6)
    figure.subplots_adjust(0.005, 0.005, 0.995, 0.955, hspace=0.04, wspace=0.03)
    for i, line in enumerate(axes):
        places = [out / "scenes" / "both" / "val" / place / f"{i:03}.png" for place in ("images", "extra", "masks")]
        files = dict(zip(("image", "thermal"), places))
        shown = {"image": Image.open(files["image"]), "thermal": np.asarray(Image.open(files["thermal"])) / 65535}
        for name, word in (("image", "image alone"), ("thermal", "thermal alone"), ("both", "both: Sigma")):
            [mask] = networks[name]([tuple(files[read] for read in READ[name])])
            shown[word] = as_palette(mask).convert("RGB")
        shown["truth"] = Image.open(places[2]).convert("RGB")
        for axis, (word, image) in zip(line, shown.items()):
            axis.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            axis.set_axis_off()
            if i == 0:
                axis.set_title(word, fontsize=8.5, pad=3)
    figure.savefig(path)


def commands(out: Path) -> list[str]:
    """Command lines to try next."""
    place, network = out / "scenes" / "both" / "val", out / "both" / "model.safetensors"
    return [
        f"segment {place / 'images'} --extra {place / 'extra'} --checkpoint {network} --out {out / 'segmented'}",
        f"evaluate --task segmentation --data {out / 'scenes' / 'both'} --checkpoint {network}",
    ]
