#!/usr/bin/env python
"""A small Mamba-FCS on rendered landscapes of two dates: what has changed, from what to what?

    python tools/rendered_changes.py

Writes pairs in SECOND's layout, trains on them, scores the held-out ones, and draws one of these into
docs/images/change.png. Light, colours and noise of the two dates differ everywhere; land cover differs in a few places
only. Beside it a baseline of a few lines: a pixel has changed where its colour differs by more than a threshold, which
is chosen on the training pairs. The same command again goes on where it was stopped.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import typer  # noqa: E402
from PIL import Image  # noqa: E402
from solar_cells import linescan  # noqa: E402

from linescan.engine.atomic import atomic  # noqa: E402
from linescan.engine.change_scores import confusion, two_class_scores  # noqa: E402
from linescan.engine.change_sets import find_changes  # noqa: E402
from linescan.media.arrays import read_mask  # noqa: E402
from linescan.tasks.change import ChangeDetector  # noqa: E402

SIDE = 96
FOLDERS = "im1", "im2", "label1", "label2"
COLOURS = np.array([(0, 0, 0), (52, 88, 120), (150, 140, 122), (128, 150, 92), (58, 88, 54), (168, 92, 78)], float)
"""Of water, ground, low vegetation, tree and building; the first stands for no class."""


def waves(dice: np.random.Generator, side: int) -> np.ndarray:
    """(side, side) smooth noise in 0..1."""
    small = Image.fromarray(dice.random((6, 6)).astype(np.float32))
    return np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))


def landscape(dice: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """The classes (SIDE, SIDE) of both dates."""
    before = np.where(waves(dice, SIDE) > 0.55, 4, 3)
    if dice.random() < 0.5:
        before[np.abs(waves(dice, SIDE) - 0.5) < 0.07] = 1
    for _ in range(dice.integers(2, 6)):
        before[block(dice)] = dice.choice([2, 5])
    after = before.copy()
    for _ in range(dice.integers(1, 5)):
        after[block(dice)] = dice.choice([1, 2, 3, 5])
    return before, after


def block(dice: np.random.Generator) -> tuple[slice, slice]:
    """A place of 10 to 28 pixels a side."""
    return tuple(slice(at, at + dice.integers(10, 29)) for at in dice.integers(0, SIDE - 10, 2))


def photograph(classes: np.ndarray, dice: np.random.Generator) -> np.ndarray:
    """An image (SIDE, SIDE, 3) of classes, in the light of a day."""
    colours = COLOURS + dice.normal(0, 9, COLOURS.shape)
    texture = dice.normal(0, 1, (SIDE, SIDE, 1)) * np.array([0, 3, 8, 8, 14, 6])[classes][..., None]
    light = dice.uniform(0.8, 1.2) * (0.9 + 0.2 * waves(dice, SIDE))[..., None]
    return ((colours[classes] + texture) * light).clip(0, 255).astype(np.uint8)


def write_pairs(folder: Path, count: int, seed: int) -> None:
    """Pairs in SECOND's layout."""
    for i in range(count):
        dice = np.random.default_rng((seed, i))
        classes = landscape(dice)
        changed = classes[0] != classes[1]
        arrays = [photograph(one, dice) for one in classes] + [np.where(changed, one, 0) for one in classes]
        for name, array in zip(FOLDERS, arrays):
            (folder / name).mkdir(parents=True, exist_ok=True)
            with atomic(folder / name / f"{i:03}.png") as file:
                Image.fromarray(array.astype(np.uint8)).save(file, "PNG")


def by_difference(data: Path) -> dict[str, float]:
    """Scores of the held-out pairs, by the difference of colours and the threshold that is best on the others."""

    def pixels(part: str) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = find_changes(data / part)
        images = [[np.asarray(Image.open(path), float) for path in pair[:2]] for pair in pairs]
        apart = np.stack([np.linalg.norm(a - b, axis=-1) for a, b in images])
        return torch.from_numpy(apart), torch.from_numpy(np.stack([read_mask(pair.labels[0]) > 0 for pair in pairs]))

    def scores(apart: torch.Tensor, changed: torch.Tensor, threshold: float) -> dict[str, float]:
        return two_class_scores(confusion(apart > threshold, changed, 2))

    train, test = pixels("train"), pixels("test")
    best = max(range(5, 200, 5), key=lambda threshold: scores(*train, threshold)["iou"])
    return scores(*test, best)


def rendered_changes(
    steps: Annotated[int, typer.Option(min=1)] = 240,
    to: Annotated[Path, typer.Option("--out", "-o", help="The folder for everything.")] = Path("runs/rendered-changes"),
):
    """Train a small Mamba-FCS on rendered landscapes, and draw what it finds."""
    data, run = to / "landscapes", to / "run"
    for part, count, seed in (("train", 64, 0), ("test", 24, 1)):
        write_pairs(data / part, count, seed)
    linescan(
        "train", "--task", "change", "--data", data, "--out", run, "--model-arg", "dims=16", "--model-arg",
        "depths=[1,1,2,1]", "--model-arg", "drop_path_rate=0", "--crop", SIDE, "--batch", 4, "--steps", steps, "--lr",
        2e-3, "--schedule", "cosine", "--warmup", 20, "--evaluate-every", max(steps // 3, 1), "--workers", 0,
        "--device", "cpu", "--resume",
    )  # fmt: skip
    found, _ = linescan(
        "evaluate", "--task", "change", "--data", data, "--checkpoint", run / "best.safetensors", "--workers", 0,
        "--device", "cpu", "--json", "--out", to / "report",
    )  # fmt: skip
    found = json.loads(found)
    table = np.array(found["confusion"])
    two = torch.tensor([[table[0, 0], table[0, 1:].sum()], [table[1:, 0].sum(), table[1:, 1:].sum()]])
    scores = {
        "Mamba-FCS, small": two_class_scores(two) | {name: found[name] for name in ("oa", "f_scd", "miou", "sek")},
        "difference of colours": by_difference(data),
    }
    with atomic(to / "results.json") as file:
        file.write(json.dumps(scores, indent=1).encode())
    for name, values in scores.items():
        print(name, {key: round(value, 4) for key, value in values.items()})
    detect = ChangeDetector(checkpoint=run / "best.safetensors", device="cpu")
    pairs = [pair[:2] for pair in find_changes(data / "test")]
    index = max(range(len(pairs)), key=lambda i: len(detect(*pairs[i]).transitions))
    path = Path(__file__).parents[1] / "docs" / "images" / "change.png"
    drawn = detect.draw(detect.open(pairs[index]), detect(*pairs[index]))
    with atomic(path) as file:
        drawn.quantize(192).save(file, "PNG", optimize=True)
    print(path)


if __name__ == "__main__":
    typer.run(rendered_changes)
