#!/usr/bin/env python
"""What quantisation costs a classifier in accuracy: one table of methods and bits.

    python tools/quantising.py
    python tools/quantising.py --checkpoint runs/solar-cells/vim_tiny/model.safetensors \
        --data runs/solar-cells/cells/test --calibrate runs/solar-cells/cells/train

Without a checkpoint, the small Vim of `linescan demo` is trained on the digits first (about a minute), unless a former
run has done so. Every row is a file that `linescan quantize` writes, read back and scored on the same held-out images.
docs/quantise.md has the table of the digits: --page writes it there.
"""

import csv
import io
import sys
from pathlib import Path
from typing import Annotated, NamedTuple, Optional

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
import typer  # noqa: E402

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

BITS = ("w8a8", "w6a6", "w4a8", "w4a4")
ROWS = [("dynamic", "w8a8")] + [(method, bits) for bits in BITS for method in ("naive", "quamba", "mambaquant")]


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


def quantising(
    checkpoint: Annotated[Optional[Path], typer.Option("--checkpoint", "-c", help="A classifier of float32.")] = None,
    data: Annotated[str, typer.Option(help="What it is scored on: digits, or a folder of classes.")] = "digits",
    calibrate: Annotated[str, typer.Option(help="What calibrates it: digits, or a folder of images.")] = "digits",
    images: Annotated[int, typer.Option(min=1, help="How many of these.")] = 64,
    to: Annotated[Path, typer.Option("--out", "-o", help="The folder for everything.")] = Path("runs/quantising"),
    page: Annotated[Optional[Path], typer.Option(help="A page whose table is replaced.")] = None,
    mark: Annotated[str, typer.Option(help="The table's name in the page.")] = "digits",
):
    """Quantise one classifier in every way, and score each."""
    if checkpoint is None:
        checkpoint = to / "float32" / "model.safetensors"
        if not checkpoint.exists():
            train(RECIPE, checkpoint.parent, device="cpu")
    before, right, size = answers(checkpoint, data)
    rows = [Row("float32", "w32a32", size, 100 * (before == right).double().mean().item(), 100.0)]
    with progress_bar("quantising", len(ROWS)) as advance:
        for method, bits in ROWS:
            file = to / f"{method}-{bits}.safetensors"
            quantise_checkpoint(None, checkpoint, Recipe(method, bits), calibrate, file, images=images, batch=16)
            after, _, size = answers(file, data)
            same, top1 = ((after == other).double().mean().item() for other in (before, right))
            rows.append(Row(method, bits, size, 100 * top1, 100 * same))
            advance(1, description=f"{method} {bits}")
    made, text = table(rows), io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([Row._fields, *rows])
    for line in made.splitlines():
        show(line)
    for path in write_all(to, {"table.md": made.encode(), "table.csv": text.getvalue().encode()}):
        say(str(path))
    if page:
        _replace(page, made, mark)
        say(str(page))


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
