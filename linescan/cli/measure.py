"""Time and memory of models; the routes that a search has found."""

import json
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich import box
from rich.table import Table

from linescan.engine.progress import progress_bar, show, show_table
from linescan.errors import InputError

from .options import Device, Floats, Model, ModelArgs, Precision, command, model_args, number


@command(
    "linescan benchmark vim_tiny_patch16_224 --against deit_tiny_patch16_224 --sizes 224,512,1024",
    "linescan benchmark vmamba_tiny_s1l8 vig_h_tiny --against swin_tiny_patch4_window7_224 --train --batch 8",
)
def benchmark(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="timm names, linescan's or any other.")],
    against: Annotated[Optional[str], typer.Option(help="Compare with this one: ratios, and where they cross.")] = None,
    sizes: Annotated[str, typer.Option(help="Sides of square images in pixels.")] = "224,512",
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Images in a pass.")] = 1,
    train_step: Annotated[bool, typer.Option("--train", help="Forward and backward, not the forward alone.")] = False,
    device: Device = None,
    numbers: Precision = Floats.fp32,
    threads: Annotated[int, typer.Option(min=1, help="Threads on a CPU.")] = 1,
    to: Annotated[Path, typer.Option("--out", "-o", help="OUT.json and OUT.png are written.")] = Path("runs/benchmark"),
):
    """Measure time and memory of models against resolution, side by side in one run."""
    try:
        sides = [int(side) for side in sizes.split(",")]
    except ValueError:
        sides = []
    if not sides or min(sides) < 1:
        raise InputError(f"--sizes is numbers with commas between, as in 224,512, not {sizes!r}")
    from linescan.engine.benchmark import benchmark as run
    from linescan.engine.benchmark import crossover, write_report
    from linescan.engine.processes import pick_device

    every = list(dict.fromkeys([*models, *([against] if against else [])]))
    on, sides = pick_device(device), sorted(set(sides))
    settings = dict(batch=batch, device=on, dtype=numbers.dtype, train=train_step, threads=threads)
    with progress_bar("measuring", len(every) * len(sides)) as advance:
        results = run(every, sides, **settings, progress=advance)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", min_width=max(map(len, every)))
    for column in ("pixels", "ms a pass", "images / s", "peak MB", *(["time ratio"] if against else [])):
        table.add_column(column, justify="right")
    reference = {r.size: r.seconds for r in results if r.model == against}
    for r in results:
        ratio = [f"{r.seconds / reference[r.size]:.2f}"] if against else []
        cells = f"{1e3 * r.seconds:.1f}", f"{r.images_per_second:.2f}", number(r.memory_mb, ".0f"), *ratio
        table.add_row(r.model, str(r.size), *cells)
    show_table(table)
    for name in every if against else []:
        if name != against:
            cross = crossover(results, name, against)
            where = f"faster than {against} from about {cross:.0f} pixels on" if cross else f"not faster than {against}"
            show(f"{name}: {where}" + ("" if cross else f" up to {sides[-1]} pixels"))
    for path in write_report(results, against, to, **settings):
        show(str(path))


@command("linescan directions runs/search/model.safetensors --out table.json")
def directions(
    checkpoint: Annotated[Path, typer.Argument(help="A trained LocalMamba super-net (a *_search model).")],
    model: Model = None,
    model_arg: ModelArgs = None,
    keep: Annotated[int, typer.Option(min=1, help="Routes kept in every layer.")] = 4,
    to: Annotated[Optional[Path], typer.Option("--out", "-o", help="Write the table as JSON.")] = None,
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
    show(f"{type(found).__name__} with these routes: {millions:.3f} M parameters")
    if to:
        to.parent.mkdir(parents=True, exist_ok=True)
        with atomic(to) as file:
            file.write(json.dumps([list(layer) for layer in table], indent=1).encode() + b"\n")
        show(str(to))
