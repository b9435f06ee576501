"""Time and memory of models; the routes that a search has found."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich import box
from rich.table import Table

from linescan.engine.progress import progress_bar, say, show, show_table
from linescan.errors import InputError

from .names import complete_models
from .options import (
    Device,
    Floats,
    Json,
    Model,
    ModelArgs,
    Precision,
    command,
    model_args,
    number,
    show_json,
    side_lengths,
)

if TYPE_CHECKING:
    from linescan.engine.benchmark import Measurement


@command(
    "linescan benchmark vim_tiny_patch16_224 --against deit_tiny_patch16_224 --sizes 224,512,1024",
    "linescan benchmark vmamba_tiny_s1l8 vig_h_tiny --against swin_tiny_patch4_window7_224 --train --batch 8",
)
def benchmark(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help="Names of `linescan list`, or of timm.", autocompletion=complete_models
        ),
    ],
    against: Annotated[
        Optional[str],
        typer.Option(help="Compare with this one: ratios, and where they cross.", autocompletion=complete_models),
    ] = None,
    sizes: Annotated[str, typer.Option(help="Sides of square images in pixels.")] = "224,512",
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Images in a pass.")] = 1,
    train_step: Annotated[bool, typer.Option("--train", help="Forward and backward, not the forward alone.")] = False,
    device: Device = None,
    numbers: Precision = Floats.fp32,
    threads: Annotated[int, typer.Option(min=1, help="Threads on a CPU.")] = 1,
    to: Annotated[Path, typer.Option("--out", "-o", help="OUT.json and, with matplotlib, OUT.png are written.")] = Path(
        "runs/benchmark"
    ),
    as_json: Json = False,
):
    """Measure time and memory of models against resolution, side by side in one run."""
    sides = side_lengths(sizes)
    from linescan.engine.benchmark import benchmark as run
    from linescan.engine.benchmark import describe, write_report
    from linescan.engine.processes import pick_device

    every = list(dict.fromkeys([*models, *([against] if against else [])]))
    on = pick_device(device)
    settings = dict(batch=batch, device=on, dtype=numbers.dtype, train=train_step, threads=threads)
    results = []
    try:
        with progress_bar("measuring", len(every) * len(sides)) as advance:
            for measured in run(every, sides, **settings, progress=advance):
                results.append(measured)
    finally:  # what has been measured is not lost with what cannot be
        if results and as_json:
            show_json(describe(results, against, **settings))
        elif results:
            _show_measurements(results, against)
    for path in write_report(results, against, to, **settings):
        say(str(path))


def _show_measurements(results: list["Measurement"], against: str | None) -> None:
    """A table of the measurements, and from which size on models are faster than the one they are compared with."""
    from linescan.engine.benchmark import crossovers

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model")
    for column in ("pixels", "ms per pass", "images / s", "peak MB", *(["time ratio"] if against else [])):
        table.add_column(column, justify="right")
    reference = {r.size: r.seconds for r in results if r.model == against}
    for r in results:
        ratio = [f"{r.seconds / reference[r.size]:.2f}" if r.size in reference else "-"] if against else []
        cells = f"{1e3 * r.seconds:.1f}", f"{r.images_per_second:.2f}", number(r.memory_mb, ".0f"), *ratio
        table.add_row(r.model, str(r.size), *cells)
    show_table(table)
    for name, size in crossovers(results, against).items():
        if size:
            show(f"{name}: faster than {against} from about {size:.0f} pixels on")
        else:
            show(f"{name}: not faster than {against} up to {max(reference)} pixels")


@command("linescan directions runs/search/model.safetensors --out table.json")
def directions(
    checkpoint: Annotated[Path, typer.Argument(help="A trained LocalMamba super-net (a *_search model).")],
    model: Model = None,
    model_arg: ModelArgs = None,
    keep: Annotated[int, typer.Option(min=1, help="Routes kept in every layer.")] = 4,
    to: Annotated[Optional[Path], typer.Option("--out", "-o", help="Write the table as JSON.")] = None,
    as_json: Json = False,
):
    """Read the scan routes that a LocalMamba super-net has learned to keep, and build the model that has them."""
    from linescan.backbones.localmamba import searched_directions
    from linescan.engine.atomic import atomic
    from linescan.engine.cards import restore

    supernet, _ = restore(model, checkpoint, **model_args(model_arg))
    try:
        table, found = searched_directions(supernet, keep)
    except (AttributeError, ValueError, TypeError) as error:
        raise InputError(f"{checkpoint} holds no LocalMamba super-net ({error})") from None
    millions = sum(p.numel() for p in found.parameters()) / 1e6
    if as_json:
        show_json([list(layer) for layer in table])
    else:
        show(f"{type(found).__name__} with these routes: {millions:.3f} M parameters")
    if to:
        to.parent.mkdir(parents=True, exist_ok=True)
        with atomic(to) as file:
            file.write(json.dumps([list(layer) for layer in table], indent=1).encode() + b"\n")
        say(str(to))
