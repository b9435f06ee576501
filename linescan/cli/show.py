"""What there is: models, one model, this machine, the routes."""

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich import box
from rich.table import Table

from linescan.engine.progress import console, show, show_table
from linescan.errors import InputError

from .options import Json, ModelArgs, command, model_args, number, show_json


@command("linescan list", "linescan list vim", "linescan list 'vim_*_stride8_*' --json", name="list")
def list_models(
    pattern: Annotated[str, typer.Argument(help="Part of a name, or a pattern with * and ?.")] = "*",
    as_json: Json = False,
):
    """List the models: family, size, cost, and accuracy as their authors publish them."""
    from linescan import zoo

    found = zoo.entries("" if pattern == "*" else pattern)
    if not found:
        raise InputError(f"no model's name matches {pattern!r}; `linescan list` shows all")
    if as_json:
        show_json([entry.facts() for entry in found])
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", min_width=max(len(entry.name) for entry in found))
    table.add_column("family")
    for column in ("M params", "GMACs", "top-1 %"):
        table.add_column(column, justify="right")
    table.add_column("licence")
    for entry in found:
        top1 = entry.metrics.get("top1")
        numbers = number(entry.params, ".2f"), number(entry.gmacs, ".2f"), number(top1, ".1f")
        table.add_row(entry.name, entry.family, *numbers, entry.licence)
    show_table(table)
    show(f"{len(found)} models; numbers as published (- where they are not). `linescan info MODEL` measures one.")


@command("linescan info vim_tiny_patch16_224", "linescan info vim_small_patch16_224 --img-size 384")
def info(
    model: Annotated[str, typer.Argument(help="A timm name.")],
    img_size: Annotated[Optional[int], typer.Option(min=1, help="Measure at this image size.")] = None,
    model_arg: ModelArgs = None,
    as_json: Json = False,
):
    """Show one model: published facts beside measured ones, weights, input."""
    from linescan import zoo
    from linescan.backbones.feature_maps import dense_maps
    from linescan.engine.cards import build, measure, preprocess_of
    from linescan.errors import InputError

    args = model_args(model_arg) | ({"img_size": img_size} if img_size else {})
    built = build(model, **args)
    preprocess = preprocess_of(built, args.get("in_chans"), args.get("img_size"))
    with console.status("measuring"):
        params, macs = measure(built, preprocess.size)
    fact = zoo.find(model).facts() if zoo.is_model(model) else {"model": model, "family": "timm"}
    try:
        maps = dense_maps(model, **args)
    except InputError:  # a model of clips, or not linescan's, or too shallow for four maps
        maps = []
    if as_json:
        measured = {"params": params, "macs": macs, "input_size": preprocess.size, "maps": maps}
        show_json({**fact, "measured": measured})
        return
    table = Table(model, "published", "measured", box=box.SIMPLE_HEAD)
    table.add_row("parameters (M)", number(fact.get("params"), ".2f"), f"{params / 1e6:.2f}")
    size = " x ".join(map(str, preprocess.size))
    table.add_row("GMACs", number(fact.get("gmacs"), ".2f"), f"{macs / 1e9:.2f} at {size}")
    for name, value in fact.get("metrics", {}).items():
        table.add_row(name, number(value, ".1f"), "`linescan evaluate` measures it")
    show_table(table)
    for name, value in (
        ("family", fact["family"]),
        ("paper", fact.get("paper")),
        ("licence", fact.get("licence")),
        ("weights", fact.get("weights")),
        ("maps", ", ".join(f"{m['channels']} channels at stride {m['stride']}" for m in maps)),
        (
            "input",
            f"mean {preprocess.mean}, std {preprocess.std}, {preprocess.interpolation}, crop {preprocess.crop_pct}",
        ),
    ):
        if value:
            show("  ", (f"{name:<8}", "bold"), f" {value}")


@command("linescan doctor")
def doctor(as_json: Json = False):
    """Show versions, devices and scan kernels: what to paste into a bug report."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from linescan.scans.kernels import backend_info

    facts = {"python": platform.python_version(), "system": platform.platform()}
    for package in ("linescan", "torch", "torchvision", "timm", "triton", "numpy", "pillow", "av", "mmengine"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    facts["cpu"] = f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    facts["cuda"] = "not available"
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        facts["cuda"] = f"{torch.version.cuda}: {', '.join(cards)}"
    for name, value in backend_info().items():
        facts[f"kernel {name}"] = value
    if as_json:
        show_json(facts)
        return
    for name, value in facts.items():
        show("  ", (f"{name:<22}", "bold"), f" {value}")


@command(
    "linescan routes row,-row --size 14x14 --out routes.png",
    "linescan routes hilbert --size 32x20 --out hilbert.png",
)
def routes(
    spec: Annotated[str, typer.Argument(help="One or more orders, by name; a wrong name lists those there are.")],
    size: Annotated[str, typer.Option(help="Height x width of the grid (or depth x height x width).")] = "14x14",
    picture: Annotated[Path, typer.Option("--out", "-o", help="The picture to write.")] = Path("routes.png"),
):
    """Draw the orders in which a model visits a grid of tokens."""
    try:
        grid = tuple(int(side) for side in size.lower().split("x"))
    except ValueError:
        grid = ()
    if len(grid) not in (2, 3) or min(grid) < 1:
        raise InputError(f"--size is HEIGHTxWIDTH, as in 14x14, not {size!r}")
    if picture.suffix.lower() not in (".png", ".svg", ".pdf", ".jpg"):
        raise InputError(f"--out is a .png, .svg, .pdf or .jpg file, not {picture}")
    from linescan.engine.atomic import atomic
    from linescan.extras import require
    from linescan.scans.routes.draw import draw_routes

    require("matplotlib", "plot")
    try:
        drawing = draw_routes(spec, grid)
    except ValueError as error:
        raise InputError(str(error)) from None
    picture.parent.mkdir(parents=True, exist_ok=True)
    with atomic(picture) as file:
        drawing.savefig(file, format=picture.suffix[1:], bbox_inches="tight")
    show(str(picture))
