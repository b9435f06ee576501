"""What there is: models, one model, this machine, the routes."""

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich import box
from rich.table import Table

from linescan.engine.progress import console, show, show_table
from linescan.errors import InputError

from .names import complete_models, complete_tasks
from .options import Json, ModelArgs, command, model_args, number, show_json


@command(
    "linescan list",
    "linescan list vim",
    "linescan list 'vim_*_stride8_*' --json",
    "linescan list --task segmentation --licence permissive",
    name="list",
)
def list_models(
    pattern: Annotated[
        str, typer.Argument(help="Part of a name, or a pattern with * and ?.", autocompletion=complete_models)
    ] = "",
    task: Annotated[
        Optional[str], typer.Option(help="Only models for this task.", autocompletion=complete_tasks)
    ] = None,
    licence: Annotated[
        Optional[str], typer.Option(help="Only weights of this licence, or of these terms: permissive, ...")
    ] = None,
    as_json: Json = False,
):
    """List the models and their weights: size, cost, results as their authors publish them, and licence.

    `MODEL.WEIGHTS` names a model with certain weights; a model alone has the first ones.
    """
    from linescan import zoo

    found = zoo.entries(pattern, task, licence)
    if not found:
        among = [
            pattern and f"name matches {pattern!r}",
            task and f"task is {task}",
            licence and f"licence is {licence}",
        ]
        raise InputError(
            f"there is no model whose {' and whose '.join(filter(None, among))}; `linescan list` shows all"
        )
    if as_json:
        show_json([entry.facts() for entry in found])
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("model", "weights", "task"):
        table.add_column(column)
    for column in ("M params", "GMACs"):
        table.add_column(column, justify="right")
    for column in ("published result", "licence"):
        table.add_column(column)
    for entry in found:
        for first, tag in enumerate(zoo.tags(entry.name)):
            result = ", ".join(f"{name} {value:g}" for name, value in tag.metrics.items())
            said = f"{result} on {tag.data}" if result and tag.data else result or "-"
            numbers = number(tag.params, ".2f"), number(tag.gmacs, ".2f")
            table.add_row("" if first else tag.name, tag.tag or "-", tag.task, *numbers, said, tag.licence)
    show_table(table)
    show(f"{len(found)} models; numbers as published (- where they are not). `linescan info MODEL` measures one.")


@command(
    "linescan info vim_tiny_patch16_224",
    "linescan info vim_small_patch16_224 --img-size 384",
    "linescan info videomamba_video_tiny_patch16_224.k400_f16 --json",
)
def info(
    model: Annotated[
        str, typer.Argument(help="A name of `linescan list`, or of timm.", autocompletion=complete_models)
    ],
    img_size: Annotated[Optional[int], typer.Option(min=1, help="Measure at this image size.")] = None,
    model_arg: ModelArgs = None,
    as_json: Json = False,
):
    """Show one model: published facts beside measured ones, weights, input, feature maps."""
    from linescan import zoo
    from linescan.backbones.feature_maps import dense_maps
    from linescan.engine.cards import build, measure, measure_inputs, preprocess_of

    args = model_args(model_arg) | ({"img_size": img_size} if img_size else {})
    built = build(model, **args)
    entry = zoo.find(model) if zoo.is_model(model) else None
    with console.status("measuring"):
        if special := entry and entry.task != "classification":
            sizes, how = entry.inputs, entry.preprocess
            if "scan_features" in how:  # what is computed depends on how many voxels a scan fills
                params, macs = sum(p.numel() for p in built.parameters()), None
                how = {"points": ", ".join(("x y z", *how["scan_features"]))}
            else:
                params, macs = measure_inputs(built, sizes)
        else:
            preprocess = preprocess_of(built, args.get("in_chans"), args.get("img_size"))
            sizes, how = [preprocess.size], preprocess.as_dict()
            params, macs = measure(built, preprocess.size)
    fact = entry.facts() if entry else {"model": model, "family": "timm"}
    try:
        maps = [] if special else dense_maps(model, **args)
    except ValueError:  # a model of clips, not linescan's, or too shallow for four maps
        maps = []
    if as_json:
        measured = {"params": params, "macs": macs, "input_sizes": sizes, "maps": maps}
        show_json({**fact, "measured": measured})
        return
    table = Table(model, "published", "measured", box=box.SIMPLE_HEAD)
    table.add_row("parameters (M)", number(fact.get("params"), ".2f"), f"{params / 1e6:.2f}")
    size = " and ".join(" x ".join(map(str, size)) for size in sizes)
    table.add_row("GMACs", number(fact.get("gmacs"), ".2f"), f"{macs / 1e9:.2f} at {size}" if macs else "-")
    by_evaluating = "`linescan evaluate` measures it" if fact.get("task") in ("classification", "restoration") else "-"
    for name, value in fact.get("metrics", {}).items():
        table.add_row(name, number(value, ".4g"), by_evaluating)
    show_table(table)
    for name, value in (
        ("task", fact.get("task")),
        ("family", fact["family"]),
        ("paper", fact.get("paper")),
        ("licence", fact.get("licence")),
        ("tags", ", ".join(fact.get("tags", ()))),
        ("weights", fact.get("weights")),
        ("input", ", ".join(f"{name} {value}" for name, value in how.items() if name != "size")),
        *((f"map {i}", f"{m['channels']} channels at stride {m['stride']}, {m['module']}") for i, m in enumerate(maps)),
    ):
        if value:
            show("  ", (f"{name:<8}", "bold"), f" {value}")


@command("linescan doctor")
def doctor(as_json: Json = False):
    """Show versions, devices and scan kernels: what to paste into a bug report."""
    import platform
    from importlib.metadata import PackageNotFoundError, packages_distributions, version

    import torch

    from linescan.scans.kernels import backend_info

    facts = {"python": platform.python_version(), "system": platform.platform()}
    distributions = packages_distributions()  # the maintained fork of mmengine has another name
    for package in ("linescan", "torch", "torchvision", "timm", "triton", "numpy", "pillow", "av", "mmengine"):
        try:
            facts[package] = version(distributions.get(package, [package])[0])
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
    picture: Annotated[Path, typer.Option("--out", "-o", help="The image to write.")] = Path("routes.png"),
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
