#!/usr/bin/env python
"""Trains one small backbone with several mixers on handwritten digits; draws accuracy against time and parameters.

    python tools/compare_mixers.py
    python tools/compare_mixers.py --mixers s6,ssd,wkv7,kda --routes row,-row,hilbert,-hilbert --merge gate --epochs 30

Everything but the mixer is the same: data, order of the images, width, depth, routes, merge, schedule. Each run is a
folder of its own (as `linescan train` writes them); the same command again goes on where it was stopped.
"""

import csv
import json
import sys
import time
from io import BytesIO
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import typer  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.image import imread  # noqa: E402
from rich import box  # noqa: E402
from rich.table import Table  # noqa: E402

from linescan.checkpoint import CheckpointError  # noqa: E402
from linescan.engine import Digits, Recipe, build, train  # noqa: E402
from linescan.engine.metrics import read_metrics  # noqa: E402
from linescan.engine.progress import console, progress_bar, say  # noqa: E402
from linescan.errors import InputError  # noqa: E402
from linescan.layers.mixers import MIXERS  # noqa: E402
from linescan.scans.routes import parse  # noqa: E402
from linescan.scans.routes.draw import draw_routes  # noqa: E402
from linescan.tasks import ClassificationRecipe, Classifier  # noqa: E402

PAPER, INK, GREY, RULE = "#fdfdfb", "#2b2d42", "#8d99ae", "#edf0f4"
COLOURS = "#e76f51 #2a9d8f #3d5a98 #e9a23b #8e5ea2 #5aa9e6 #b5446e #6a994e #774936 #9a8c98 #00798c #d1495b #30638e #555"


def compare(
    mixers: Annotated[str, typer.Option(help=f"Some of: {', '.join(MIXERS)}.")] = "s6,gla,wkv6,delta,softmax",
    routes: Annotated[str, typer.Option(help="Along which orders they read.")] = "row,-row,col,-col",
    merge: Annotated[str, typer.Option(help="How the routes' outputs become one: sum, mean, gate, ...")] = "mean",
    epochs: Annotated[int, typer.Option(min=1)] = 6,
    dim: Annotated[int, typer.Option(min=16, help="Channels, a multiple of 16.")] = 64,
    depth: Annotated[int, typer.Option(min=1, help="Blocks.")] = 2,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Of the CPU.")] = 2,
    to: Annotated[Path, typer.Option("--out", "-o", help="The folder for everything.")] = Path("runs/compare"),
):
    """Train a small backbone with several mixers on digits; draw accuracy against time and parameters."""
    names = mixers.split(",")
    if unknown := [name for name in names if name not in MIXERS]:
        raise InputError(f"unknown mixer {unknown[0]!r}; there are: {', '.join(MIXERS)}")
    torch.set_num_threads(threads)
    shape = dict(img_size=16, patch_size=2, embed_dim=dim, depth=depth, head_dim=16, mlp_ratio=2.0)
    results = []
    for name in names:
        args = dict(shape, mixer=name, routes=routes, merge=merge)
        settings = dict(epochs=epochs, batch=32, lr=3e-3, warmup=1, seed=seed)
        recipe = ClassificationRecipe("digits", model="scan_tiny", model_args=args, **settings)
        say()
        say((name, "bold"), f": {MIXERS[name].__doc__.splitlines()[0]}")
        train(recipe, to / name, device="cpu", resume=True)
        parameters, step_ms = cost(recipe)
        points = curve(to / name, step_ms)
        results.append({"mixer": name, "parameters": parameters, "step_ms": step_ms, **points[-1], "curve": points})
    write(to, results)
    page = draw(results, to, routes, f"{dim} channels, depth {depth}, 64 tokens, routes {routes} merged by {merge}")
    page.savefig(to / "compare.png")
    console.print(table(results))
    say((str(to / "compare.png"), "bold"), "  the plots; the numbers are in compare.csv and compare.json beside it")


def cost(recipe: Recipe) -> tuple[int, float]:
    """Parameters, and milliseconds that the CPU works for a step, forward and backward: the fastest of five.

    The CPU's time and not the clock's, which would measure what else the machine does.
    """
    model = build(recipe.model, in_chans=1, num_classes=10, **recipe.model_args)
    images, times = torch.randn(recipe.batch, 1, 16, 16), []
    with progress_bar("measuring a step", 5) as advance:
        for _ in range(5):
            start = time.process_time()
            model(images).logsumexp(1).sum().backward()
            times.append(time.process_time() - start)
            advance()
    return sum(p.numel() for p in model.parameters()), 1000 * min(times)


def curve(run: Path, step_ms: float) -> list[dict]:
    """Held-out accuracy after each epoch of a run, and the seconds that its steps so far take."""
    rows = [row for row in read_metrics(run / "metrics.csv") if "val_top1" in row]
    return [
        {"epoch": int(row["epoch"]), "seconds": row["step"] * step_ms / 1000, "top1": row["val_top1"]} for row in rows
    ]


def write(to: Path, results: list[dict]) -> None:
    """compare.json, and compare.csv with a row an epoch."""
    (to / "compare.json").write_text(json.dumps(results, indent=2) + "\n")
    with open(to / "compare.csv", "w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("mixer", "parameters", "step_ms", "epoch", "seconds", "top1"))
        for r in results:
            run = r["mixer"], r["parameters"], f"{r['step_ms']:.2f}"
            rows.writerows((*run, *point.values()) for point in r["curve"])


def table(results: list[dict]) -> Table:
    """The best first."""
    rows = Table("mixer", box=box.SIMPLE_HEAD)
    for column in ("parameters", "CPU ms per step", "CPU s in all", "top-1 %"):
        rows.add_column(column, justify="right")
    for r in sorted(results, key=lambda r: -r["top1"]):
        numbers = f"{r['parameters']:,}", f"{r['step_ms']:.0f}", f"{r['seconds']:.1f}", f"{r['top1']:.2f}"
        rows.add_row(r["mixer"], *numbers)
    return rows


# -- the plots --------------------------------------------------------------------------------------------------------


def draw(results: list[dict], to: Path, routes: str, setting: str) -> Figure:
    """Accuracy over the time of training and over parameters; the routes; digits that the mixers disagree about."""
    colours = dict(zip((r["mixer"] for r in results), COLOURS.split()))
    figure = Figure(figsize=(13, 8), dpi=140, facecolor=PAPER)
    figure.text(0.05, 0.945, "The same network, another mixer", fontsize=17, weight="bold", color=INK)
    figure.text(0.05, 0.912, f"handwritten digits, {setting}", color=GREY)
    left = figure.add_axes((0.05, 0.36, 0.53, 0.49))
    right = figure.add_axes((0.65, 0.36, 0.30, 0.49), sharey=left)
    for r in results:
        seconds, top1 = zip(*((p["seconds"], p["top1"]) for p in r["curve"]))
        left.plot(seconds, top1, color=colours[r["mixer"]], linewidth=2, marker="o", markersize=3.5)
    slowest = max(r["step_ms"] for r in results)
    for rank, r in enumerate(sorted(results, key=lambda r: -r["top1"])):
        at, area = (r["parameters"] / 1e3, r["top1"]), 60 + 900 * r["step_ms"] / slowest
        right.scatter(*at, area, colours[r["mixer"]], linewidth=1.5, edgecolor=PAPER, alpha=0.75, clip_on=False)
        side = -1 if rank % 2 else 1  # neighbours in rank may be close: one label below, the next above
        right.annotate(f"{r['mixer']}  {r['step_ms']:.0f} ms", at, (0, side * ((area / np.pi) ** 0.5 + 3)), color=INK,
                       textcoords="offset points", ha="center", va="top" if rank % 2 else "bottom", fontsize=8.5,
                       weight="bold")  # fmt: skip
    legend(left, results, colours)
    scale(left, min(p["top1"] for r in results for p in r["curve"]))
    for axis, title, below in (
        (left, "held-out accuracy (%) over the time of training", "CPU seconds of training steps; a dot is an epoch"),
        (right, "and over parameters", "thousands; the larger the dot, the slower a step"),
    ):
        axis.set_title(title, loc="left", color=INK, weight="bold")
        axis.set_xlabel(below, color=GREY)
        axis.grid(color=RULE)
        axis.set_axisbelow(True)
        axis.tick_params(colors=GREY, labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color("#d5dae1")
    right.margins(x=0.3)
    left.set_xlim(left=0)
    draw_orders(figure, routes)
    draw_disputes(figure, {name: to / name / "model.safetensors" for name in colours}, colours)
    return figure


def legend(axis, results: list[dict], colours: dict[str, str]) -> None:
    """The mixers in the order of their final accuracies."""
    for r in sorted(results, key=lambda r: -r["top1"]):
        axis.plot([], [], color=colours[r["mixer"]], linewidth=3, label=f"{r['top1']:.1f} %  {r['mixer']}")
    axis.legend(frameon=False, labelcolor=INK, loc="lower right", fontsize=10)


def scale(axis, lowest: float) -> None:
    """An axis of accuracies that gives the last per cents the room they are worth: equal steps halve the error."""
    top = 100.5  # 100 itself is to have a place
    axis.set_yscale("function", functions=(lambda a: -torch.tensor(top - a).clamp(min=1e-3).log().numpy(),
                                           lambda y: top - torch.tensor(-y).exp().numpy()))  # fmt: skip
    ticks = [t for t in (0, 10, 50, 80, 90, 95, 98, 99, 100) if t > lowest - 10]
    axis.set_yticks(ticks, [str(t) for t in ticks])
    axis.set_ylim(max(lowest - 2, 0), 100.2)


def draw_orders(figure: Figure, routes: str) -> None:
    """The orders in which the tokens are read."""
    figure.text(0.05, 0.255, "how they read the 8 x 8 tokens of a digit", color=INK, weight="bold", fontsize=12)
    orders = parse(routes)
    side = min(0.13, 0.42 / len(orders))
    for i, order in enumerate(orders):
        page = BytesIO()
        draw_routes(order, (8, 8)).savefig(page, format="png", dpi=130, bbox_inches="tight")
        page.seek(0)
        axis = figure.add_axes((0.045 + i * side, 0.03, side, 0.205), anchor="NW")
        axis.imshow(imread(page))
        axis.set_axis_off()


def draw_disputes(figure: Figure, checkpoints: dict[str, Path], colours: dict[str, str], count: int = 6) -> None:
    """The held-out digits over which the mixers disagree most, and what each takes them for."""
    held_out = Digits(held_out=True)
    images = [held_out.image(i, channels=1) for i in range(len(held_out))]
    sure = {n: Classifier(checkpoint=path, device="cpu").probabilities(images) for n, path in checkpoints.items()}
    together = torch.stack(list(sure.values()))  # (mixers, digits, classes)
    split = together.var(0).sum(1) if len(sure) > 1 else -together[0].amax(1)
    figure.text(0.52, 0.255, "what they disagree about most", color=INK, weight="bold", fontsize=12)
    for at, i in enumerate(split.argsort(descending=True)[:count].tolist()):
        axis = figure.add_axes((0.52 + at * 0.073, 0.02, 0.066, 0.2), anchor="NW")
        axis.imshow(np.asarray(images[i]), cmap="gray_r", interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_color("#d5dae1")
        axis.set_title(f"a {held_out.labels[i]}", fontsize=9, color=GREY, pad=3)
        for row, (name, probabilities) in enumerate(sure.items()):
            guess = int(probabilities[i].argmax())
            right = guess == held_out.labels[i]
            axis.text(0, -0.16 - 0.14 * row, f"{guess}  {name}", transform=axis.transAxes, fontsize=7.5,
                      color=colours[name], weight="bold" if right else "normal", alpha=1 if right else 0.6)  # fmt: skip


def main() -> None:
    """Runs it; what the user can fix is told in one line."""
    try:
        typer.run(compare)
    except (InputError, CheckpointError) as error:
        sys.exit(f"compare_mixers: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
