"""`make demo`: a small Vim learns handwritten digits, is tried on some it has not seen, and all of it is drawn."""

import shutil
import time
from pathlib import Path

import numpy as np
import torch

from ..engine.image_sets import Digits
from ..engine.metrics import read_metrics
from ..engine.processes import threads
from ..engine.progress import say
from ..engine.recipe import Recipe
from ..engine.training import train
from ..media.look import BAD, GOOD, GREY, INK, PAPER, plain
from ..media.preprocess import Preprocess
from ..tasks.classify import Classifier
from ..tasks.recipes import ClassificationRecipe
from .telling import tell_commands, tell_files

__all__ = ["RECIPE", "demo"]

RECIPE = ClassificationRecipe(
    data="digits",
    model="vim_tiny_patch16_224",
    model_args=dict(img_size=32, patch_size=8, stride=6, depth=3, embed_dim=64, d_state=8, global_pool="avg"),
    epochs=15,
    batch=32,
    lr=3e-3,
    warmup=1,
    ema=0.995,
)


def demo(out: str | Path = "runs/demo", recipe: Recipe = RECIPE) -> float:
    """Trains `recipe` into the folder `out` and draws out/demo.png; returns the held-out accuracy in per cent.

    A demo that was there before is replaced.
    """
    out = Path(out)
    for old in ("state.pt", "tensorboard", "images"):
        shutil.rmtree(out / old) if (out / old).is_dir() else (out / old).unlink(missing_ok=True)
    started = time.monotonic()
    with threads(1):
        train(recipe, out, device="cpu")
    seconds = time.monotonic() - started

    # From here on, what any user does: read the file, classify images.
    classifier = Classifier(checkpoint=out / "model.safetensors", device="cpu")
    held_out = Digits(held_out=True)
    images = [held_out.image(i, channels=1) for i in range(len(held_out))]
    probabilities = classifier.probabilities(images)
    truth = torch.tensor(held_out.labels)
    accuracy = 100 * (probabilities.argmax(1) == truth).double().mean().item()
    (out / "images").mkdir(exist_ok=True)
    for i in range(12):
        images[i].save(out / "images" / f"{i:02}_is_{held_out.labels[i]}.png")
    _draw(out, classifier, images, probabilities, truth, accuracy)

    say()
    say(
        (f"{accuracy:.2f} %", "bold green"),
        f" of {len(images)} held-out digits right after {seconds:.0f} s of training.",
    )
    tell_files(
        out,
        {
            "demo.png": "start with this one",
            "model.safetensors": "the model: weights, classes, and how it wants its images",
            "metrics.csv": "losses and accuracies, step by step",
            "images/": "a dozen held-out digits",
        },
    )
    tell_commands(
        (
            f"classify {out}/images --checkpoint {out}/model.safetensors --topk 3",
            "routes hilbert --size 16x16 --out hilbert.png",
            "list",
            "train --help",
        )
    )
    return accuracy


def _draw(out: Path, classifier: Classifier, images: list, probabilities, truth, accuracy: float) -> None:
    """One page: digits and guesses, the curves, the routes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8.4), dpi=140, facecolor=PAPER)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.05))
    for part in (top, bottom):
        part.set_facecolor(PAPER)
    figure.text(0.03, 0.955, "A Vim reads handwritten digits", fontsize=17, weight="bold", color=INK)
    count = sum(p.numel() for p in classifier.model.parameters())
    said = f"{count:,} parameters; {accuracy:.1f} % of {len(images)} held-out digits are right"
    figure.text(0.03, 0.925, said + "; its worst mistakes come last", color=GREY)
    _draw_digits(top, classifier, images, probabilities, truth)
    left, right = bottom.subfigures(1, 2, width_ratios=(1, 1))
    _draw_curves(left, read_metrics(out / "metrics.csv"))
    _draw_routes(right, classifier, images[truth.tolist().index(3)])
    figure.savefig(out / "demo.png")


def _draw_digits(figure, classifier: Classifier, images: list, probabilities, truth) -> None:
    """Held-out digits and what they are taken for: one of each, some more, and the surest mistakes."""
    guess = probabilities.argmax(1)
    right = (guess == truth).nonzero()[:, 0].tolist()
    wrong = (guess != truth).nonzero()[:, 0]
    worst = wrong[probabilities[wrong].amax(1).argsort(descending=True)][:5].tolist()
    first = [i for _, i in sorted({int(truth[i]): i for i in reversed(right)}.items())]
    more = [i for i in right if i not in first]
    chosen = (first + more)[: 20 - len(worst)] + worst
    figure.subplots_adjust(0.03, 0.06, 0.98, 0.75, hspace=0.5, wspace=0.18)
    for axis, i in zip(figure.subplots(2, 10).flat, chosen):
        best, second = classifier.name(probabilities[i : i + 1], topk=2)[0]
        good = best.index == truth[i]
        colour = GOOD if good else BAD
        axis.imshow(np.asarray(images[i]), cmap="gray_r", interpolation="nearest")
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set(color=colour, linewidth=1 if good else 2.5)
        said = f"{best.label}  {100 * best.probability:.0f} %" + (
            "" if good else f"  (is {classifier.classes[truth[i]]})"
        )
        axis.set_title(said, fontsize=9.5, color=colour, weight="bold", pad=4)
        axis.set_xlabel(f"or {second.label}, {100 * second.probability:.1f} %", fontsize=7.5, color=GREY, labelpad=2)


def _draw_curves(figure, metrics: list[dict]) -> None:
    """The losses, and the held-out accuracy, over the epochs."""
    loss, accuracy = figure.subplots(1, 2)
    figure.subplots_adjust(0.08, 0.13, 0.98, 0.86, wspace=0.25)
    per_epoch = max(row["step"] for row in metrics) / max(row["epoch"] for row in metrics)
    trained = [(row["step"] / per_epoch, row["loss"]) for row in metrics if "loss" in row]
    judged = [(row["step"] / per_epoch, row["val_loss"], row["val_top1"]) for row in metrics if "val_top1" in row]
    loss.plot(*zip(*trained), color=GREY, linewidth=1, label="training (smoothed labels)")
    loss.plot(*list(zip(*judged))[:2], color=GOOD, linewidth=2, marker="o", markersize=3, label="held out")
    loss.set_title("loss", loc="left", color=INK, weight="bold")
    loss.set_ylim(bottom=0)
    loss.legend(frameon=False, fontsize=8, labelcolor=INK)
    epochs, _, top1 = zip(*judged)
    accuracy.plot(epochs, top1, color=GOOD, linewidth=2, marker="o", markersize=3)
    accuracy.annotate(
        f"{top1[-1]:.1f} %", (epochs[-1], top1[-1]), (-4, -18), textcoords="offset points", ha="right", color=GOOD,
        weight="bold",
    )  # fmt: skip
    accuracy.set_title("held-out accuracy (%)", loc="left", color=INK, weight="bold")
    accuracy.set_ylim(min(80, min(top1)), 100)
    for axis in (loss, accuracy):
        axis.set_xlabel("epoch", color=GREY)
        plain(axis)


def _draw_routes(figure, classifier: Classifier, image) -> None:
    """The orders in which the model reads a digit's patches, the class token between them."""
    from io import BytesIO

    from matplotlib.image import imread

    from linescan.scans.routes.draw import draw_routes

    preprocess: Preprocess = classifier.card.preprocess
    seen = preprocess.seen(classifier.tensor(image))[0]
    model = classifier.model
    page = BytesIO()
    specs = [f"cls({route}, at=middle)" for route in model.blocks[0].mixer.along.routes]
    drawing = draw_routes(specs, model.native_grid, image=1 - seen.numpy())
    drawing.savefig(page, format="png", dpi=250, bbox_inches="tight")
    page.seek(0)
    axis = figure.add_axes((0.06, 0.04, 0.92, 0.82))
    axis.imshow(imread(page))
    axis.set_axis_off()
    figure.text(0.06, 0.885, "how it reads: patch by patch, there and back", color=INK, weight="bold", fontsize=12)
