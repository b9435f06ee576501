#!/usr/bin/env python
"""What quantisation costs a classifier in accuracy: one table of methods and bits.

    python tools/quantising.py
    python tools/quantising.py --families      # needs elpv-dataset
    python tools/quantising.py --checkpoint runs/solar-cells/vim_tiny/model.safetensors \
        --data runs/solar-cells/cells/test --calibrate runs/solar-cells/cells/train

Without a checkpoint, the small Vim of `linescan demo` is trained on the digits first (about a minute), unless a former
run has done so. Every row is a file that `linescan quantize` writes, read back and scored on the same held-out images.
With --families, a small model of each of four families is trained on the digits, and on the solar cells of
tools/solar_cells.py (an hour in all), and scored in the same way; the table is written after each. A run that was ended
goes on where it was. docs/quantise.md has both tables: --page writes them there.
"""

import csv
import io
import sys
from itertools import product
from pathlib import Path
from typing import Annotated, Iterator, NamedTuple, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import typer  # noqa: E402
from solar_cells import write_cells  # noqa: E402

from linescan.demos.digits import RECIPE  # noqa: E402
from linescan.engine import train  # noqa: E402
from linescan.engine.atomic import atomic, write_all  # noqa: E402
from linescan.engine.cards import restore  # noqa: E402
from linescan.engine.data import evaluation_batches  # noqa: E402
from linescan.engine.progress import progress_bar, say, show  # noqa: E402
from linescan.errors import InputError  # noqa: E402
from linescan.quantise import Recipe  # noqa: E402
from linescan.tasks.classify import labelled  # noqa: E402
from linescan.tasks.quantise import quantise_checkpoint  # noqa: E402
from linescan.tasks.recipes import ClassificationRecipe  # noqa: E402

BITS = ("w8a8", "w6a6", "w4a8", "w4a4")
METHODS = ("naive", "quamba", "mambaquant")
ROWS = [("dynamic", "w8a8")] + [(method, bits) for bits in BITS for method in METHODS]
COLUMNS = [(method, bits) for bits in ("w8a8", "w4a8") for method in METHODS]  # of families

# 64 tokens an image; VMamba, whose patches have 4 pixels, has 16 x 16 of a cell.
FAMILIES = {
    "Vim": ("vim_tiny_patch16_224", {"depth": 4, "embed_dim": 64}),
    "LocalVim": ("local_vim_tiny", {"depth": 4, "embed_dim": 64}),
    "Mamba-ND": ("mamband_small_patch8_224", {"depths": [2, 2], "dims": [64, 64]}),
    "VMamba": ("vmamba_tiny_s1l8", {"depths": [2, 2], "dims": [32, 64]}),
}
SIDES = {"digits": 32, "solar cells": 64}  # in pixels


class Row(NamedTuple):
    """A line of the table."""

    method: str
    bits: str
    megabytes: float
    top1: float
    agreement: float


@torch.inference_mode()
def answers(checkpoint: Path, data: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(the likeliest class, the right one) of each image in `data`, and the megabytes of the model's file."""
    network, card = restore(checkpoint=checkpoint)
    network.eval()
    samples = labelled(data, card, getattr(network, "num_frames", 0))
    found, right = [], []
    for batch in evaluation_batches(samples, 64):
        found.append(network(batch.content["input"]).argmax(1))
        right.append(batch.content["label"])
    return torch.cat(found), torch.cat(right), checkpoint.stat().st_size / 1e6


def table(rows: list[Row]) -> str:
    """In Markdown."""
    lines = ["| method | bits | file, MB | top-1, % | same class as float32, % |", "|---|---|---:|---:|---:|"]
    lines += [f"| {r.method} | {r.bits} | {r.megabytes:.2f} | {r.top1:.1f} | {r.agreement:.1f} |" for r in rows]
    return "\n".join(lines) + "\n"


def score(
    checkpoint: Path, data: str, calibrate: str, ways: list[tuple[str, str]], to: Path, images: int, label: str
) -> list[Row]:
    """A row for the classifier as it is, and one for each method and bits; files that are there are not made again."""
    before, right, size = answers(checkpoint, data)
    rows = [Row("float32", "w32a32", size, 100 * (before == right).double().mean().item(), 100.0)]
    with progress_bar(label, len(ways)) as advance:
        for method, bits in ways:
            file = to / f"{method}-{bits}.safetensors"
            if not file.exists():
                quantise_checkpoint(None, checkpoint, Recipe(method, bits), calibrate, file, images=images, batch=16)
            after, _, size = answers(file, data)
            same, top1 = ((after == other).double().mean().item() for other in (before, right))
            rows.append(Row(method, bits, size, 100 * top1, 100 * same))
            advance(1, description=f"{method} {bits}")
    return rows


def recipe_of(family: str, data: str, cells: Path) -> ClassificationRecipe:
    """How a small model of a family is trained."""
    model, args = FAMILIES[family]
    side = SIDES[data]
    patches = {} if family == "VMamba" else {"patch_size": side // 8}
    sets = {"data": "digits"} if data == "digits" else {"data": str(cells / "train"), "val": str(cells / "test")}
    return ClassificationRecipe(
        **sets, model=model, model_args={"img_size": side, "in_chans": 1, **patches, **args}, augment="light",
        epochs=15, batch=32, lr=2e-3, warmup=1, ema=0.995, evaluate_every=15,
    )  # fmt: skip


def families(to: Path, images: int) -> Iterator[str]:
    """The table of families in Markdown, with what it is, after each of its rows; no model is trained again."""
    cells = write_cells(to / "cells")
    heads = [f"{method} {bits}" for method, bits in COLUMNS]
    head = [
        "Top-1 in % of small models of four families, trained from scratch on the digits, and on which of the cells of",
        "[solar cells](examples/solar-cells.md) are defective (654 are held out; 68.8 % of them are not). Files,",
        "images and scores are as above; made by `python tools/quantising.py --families --page docs/quantise.md`,",
        "which computes the rows that are not there yet:", "",
        f"| trained on | model | parameters | float32 | {' | '.join(heads)} |", "|---|---|" + "---:|" * 8,
    ]  # fmt: skip
    lines: dict[str, list[str]] = {data: [] for data in SIDES}
    for family, data in product(FAMILIES, SIDES):
        folder = to / data.replace(" ", "-") / family.lower()
        checkpoint = folder / "float32" / "model.safetensors"
        if not checkpoint.exists():
            train(recipe_of(family, data, cells), checkpoint.parent, device="cpu", workers=0, resume=True)
        test, others = (data, data) if data == "digits" else (str(cells / "test"), str(cells / "train"))
        rows = score(checkpoint, test, others, COLUMNS, folder, images, f"{family}, {data}")
        size = sum(weight.numel() for weight in restore(checkpoint=checkpoint)[0].parameters()) / 1e6
        lines[data].append(f"| {data} | {family} | {size:.2f} M | {' | '.join(f'{row.top1:.1f}' for row in rows)} |")
        yield "\n".join(head + sum(lines.values(), [])) + "\n"


def quantising(
    checkpoint: Annotated[Optional[Path], typer.Option("--checkpoint", "-c", help="A classifier of float32.")] = None,
    data: Annotated[str, typer.Option(help="What it is scored on: digits, or a folder of classes.")] = "digits",
    calibrate: Annotated[str, typer.Option(help="What calibrates it: digits, or a folder of images.")] = "digits",
    images: Annotated[int, typer.Option(min=1, help="How many of these.")] = 64,
    of_families: Annotated[bool, typer.Option("--families", help="Train and score four families instead.")] = False,
    to: Annotated[Path, typer.Option("--out", "-o", help="The folder for everything.")] = Path("runs/quantising"),
    page: Annotated[Optional[Path], typer.Option(help="A page whose table is replaced.")] = None,
    mark: Annotated[
        Optional[str], typer.Option(help="The table's name in the page. Default: digits, or families.")
    ] = None,
):
    """Quantise one classifier in every way, or four in some, and score each."""
    name = "families" if of_families else "table"
    if of_families:
        tables, files = families(to, images), {}
    else:
        if checkpoint is None:
            checkpoint = to / "float32" / "model.safetensors"
            if not checkpoint.exists():
                train(RECIPE, checkpoint.parent, device="cpu")
        rows = score(checkpoint, data, calibrate, ROWS, to, images, "quantising")
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([Row._fields, *rows])
        tables, files = [table(rows)], {"table.csv": text.getvalue().encode()}
    for made in tables:
        write_all(to, {f"{name}.md": made.encode(), **files})
        if page:
            _replace(page, made, mark or ("families" if of_families else "digits"))
    for line in made.splitlines():
        show(line)
    for path in (*(to / file for file in (f"{name}.md", *files)), *([page] if page else [])):
        say(str(path))


def _replace(page: Path, made: str, mark: str) -> None:
    begin, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->\n"
    head, found, rest = page.read_text().partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise InputError(f"{page} has no {begin.strip()} with an {end.strip()} after it")
    with atomic(page) as file:
        file.write(f"{head}{begin}{made}{end}{tail}".encode())


if __name__ == "__main__":
    typer.run(quantising)
