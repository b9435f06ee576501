"""The `linescan` command."""

import json
import sys
from enum import Enum
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from linescan.checkpoint import CheckpointError
from linescan.errors import Diverged, InputError

__all__ = ["app", "main"]

# pretty_exceptions: a traceback is for the person who mends linescan, and plain ones can be pasted.
app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Linear-time vision backbones: see, try, train and measure them.",
    epilog="Start with  [bold]linescan demo[/], then  [bold]linescan list[/].",
)
out = Console(highlight=False)

# -- options that several commands share ------------------------------------------------------------------------------

Model = Annotated[
    Optional[str], typer.Option("--model", "-m", help="A timm name; `linescan list` shows linescan's own.")
]
Checkpoint = Annotated[
    Optional[Path],
    typer.Option(
        "--checkpoint", "-c", help="A file of weights (.safetensors, .pth). One of linescan's names its model."
    ),
]
ModelArgs = Annotated[
    Optional[list[str]],
    typer.Option("--model-arg", metavar="KEY=VALUE", help="An argument for timm.create_model; may be repeated."),
]
Device = Annotated[Optional[str], typer.Option(help="cpu, cuda, cuda:1, ...; default: CUDA where there is one.")]
Batch = Annotated[int, typer.Option("--batch", "-b", min=1, help="Pictures (or frames) in one forward pass.")]
Workers = Annotated[
    Optional[int], typer.Option(min=0, help="Processes that load pictures; default: 4 for files, none for the digits.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Precision(str, Enum):
    """Names of floating-point types."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"

    @property
    def dtype(self):
        """As torch calls it."""
        import torch

        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.value]


def _model_args(pairs: list[str] | None) -> dict:
    """["depth=4", "rope=true", "class_token=head"] -> {"depth": 4, "rope": True, "class_token": "head"}."""
    args = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not key.isidentifier() or not equals:
            raise InputError(f"--model-arg takes KEY=VALUE, not {pair!r}")
        try:
            args[key] = json.loads({"True": "true", "False": "false", "None": "null"}.get(value, value))
        except json.JSONDecodeError:
            args[key] = value
    return args


def _workers(workers: int | None, data: str) -> int:
    import os

    return (0 if data == "digits" else min(4, os.cpu_count() or 1)) if workers is None else workers


def _examples(*lines: str) -> str:
    return "\n\n".join(["Examples:", *(f"  [cyan]{line}[/]" for line in lines)])


def _number(value: float | None, pattern: str) -> str:
    return "-" if value is None else format(value, pattern)


# -- looking around ---------------------------------------------------------------------------------------------------


@app.command("list", epilog=_examples("linescan list", "linescan list vim", "linescan list 'vim_*_stride8_*' --json"))
def list_models(
    pattern: Annotated[str, typer.Argument(help="Part of a name, or a pattern with * and ?.")] = "*",
    as_json: Json = False,
):
    """List the models: family, size, cost, and accuracy as their authors publish them."""
    from linescan.engine.cards import family, names
    from linescan.zoo import PUBLISHED, Published

    found = names(pattern)
    if not found:
        raise InputError(f"no model's name matches {pattern!r}; `linescan list` shows all")
    facts = {name: PUBLISHED.get(name, Published()) for name in found}
    if as_json:
        print(json.dumps([{"model": n, "family": family(n), **vars(f)} for n, f in facts.items()], indent=2))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model", min_width=max(map(len, found)))
    table.add_column("family")
    for column in ("M params", "GMACs", "top-1 %"):
        table.add_column(column, justify="right")
    table.add_column("licence")
    for name, fact in facts.items():
        numbers = _number(fact.params, ".2f"), _number(fact.gmacs, ".2f"), _number(fact.top1, ".1f")
        table.add_row(name, family(name), *numbers, fact.licence or "-")
    out.print(table)
    out.print(f"{len(found)} models; numbers as published (- where they are not). `linescan info MODEL` measures one.")


@app.command(
    epilog=_examples("linescan info vim_tiny_patch16_224", "linescan info vim_small_patch16_224 --img-size 384")
)
def info(
    model: Annotated[str, typer.Argument(help="A timm name.")],
    img_size: Annotated[Optional[int], typer.Option(min=1, help="Measure at this image size.")] = None,
    model_arg: ModelArgs = None,
    as_json: Json = False,
):
    """Show one model: published facts beside measured ones, weights, input."""
    from linescan.engine.cards import build, family, measure, preprocess_of
    from linescan.zoo import PUBLISHED, Published

    args = _model_args(model_arg) | ({"img_size": img_size} if img_size else {})
    built = build(model, **args)
    preprocess = preprocess_of(built, args.get("in_chans"), args.get("img_size"))
    with out.status("measuring"):
        params, macs = measure(built, preprocess.size)
    fact, cfg = PUBLISHED.get(model, Published()), built.pretrained_cfg
    if cfg.get("hf_hub_id"):
        weights = f"https://huggingface.co/{cfg['hf_hub_id']}" + (
            f"/blob/main/{cfg['hf_hub_filename']}" if cfg.get("hf_hub_filename") else ""
        )
    else:
        weights = cfg.get("url") or cfg.get("file") or None
    if as_json:
        measured = {"params": params, "macs": macs, "input_size": preprocess.size}
        facts = {"model": model, "family": family(model), "measured": measured, "published": vars(fact)}
        print(json.dumps({**facts, "weights": weights}, indent=2))
        return
    table = Table(model, "published", "measured", box=box.SIMPLE_HEAD)
    table.add_row("parameters (M)", _number(fact.params, ".2f"), f"{params / 1e6:.2f}")
    table.add_row("GMACs", _number(fact.gmacs, ".2f"), f"{macs / 1e9:.2f} at {' x '.join(map(str, preprocess.size))}")
    table.add_row("ImageNet top-1 (%)", _number(fact.top1, ".1f"), "`linescan evaluate` measures it")
    out.print(table)
    for name, value in (
        ("family", family(model)),
        ("paper", fact.paper),
        ("licence", fact.licence),
        ("weights", weights),
        (
            "input",
            f"mean {preprocess.mean}, std {preprocess.std}, {preprocess.interpolation}, crop {preprocess.crop_pct}",
        ),
    ):
        if value:
            out.print(f"  [bold]{name:<8}[/] {escape(str(value))}", soft_wrap=True)


@app.command(epilog=_examples("linescan doctor"))
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
        print(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        out.print(f"  [bold]{name:<22}[/] {escape(str(value))}", soft_wrap=True)


@app.command(
    epilog=_examples(
        "linescan routes row,-row --size 14x14 --out routes.png",
        "linescan routes hilbert --size 32x20 --out hilbert.png",
    )
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
    from linescan.scans.routes.draw import draw_routes

    try:
        drawing = draw_routes(spec, grid)
    except ValueError as error:
        raise InputError(str(error)) from None
    picture.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(picture, bbox_inches="tight")
    out.print(f"{escape(str(picture))}", soft_wrap=True)


# -- using a model ----------------------------------------------------------------------------------------------------


@app.command(
    epilog=_examples(
        "linescan classify cat.jpg --model vim_tiny_patch16_224",
        "linescan classify runs/demo/images --checkpoint runs/demo/model.safetensors --topk 3",
        "linescan classify *.png --checkpoint model.safetensors --json > guesses.json",
        "linescan classify clip.mp4 --model videomamba_video_tiny_patch16_224.k400_f16 --views 4x3",
    )
)
def classify(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...",
            help="Picture files, and folders of them. For a model of videos: video files, folders of them, and folders "
            "of frames.",
        ),
    ],
    model: Model = None,
    checkpoint: Checkpoint = None,
    topk: Annotated[int, typer.Option("--topk", "-k", min=1, help="How many guesses for each picture or video.")] = 5,
    views: Annotated[
        Optional[str],
        typer.Option(
            metavar="CLIPSxCROPS",
            help="Look at each video several times, as in 4x3: four clips, three crops of each. Default: 1x1.",
        ),
    ] = None,
    device: Device = None,
    precision: Annotated[Precision, typer.Option(help="Compute in this precision.")] = Precision.fp32,
    batch: Batch = 32,
    model_arg: ModelArgs = None,
    as_json: Json = False,
):
    """Say what pictures and videos show. A broken one is named and skipped; the exit status is then 1."""
    from linescan.engine.progress import console, progress_bar, say
    from linescan.media.images import find_images
    from linescan.media.video import Views, find_videos, is_video
    from linescan.tasks.classify import Classifier

    for path in paths:
        if not path.exists():
            raise InputError(f"{path} does not exist")
    args = _model_args(model_arg) | {"views": Views.parse(views) if views else None}
    classifier = Classifier(model, checkpoint, device=device, dtype=precision.dtype, batch=batch, **args)
    kind, find = ("video", find_videos) if classifier.clips else ("image", find_images)
    files: list[Path] = []
    for path in paths:
        if kind == "image" and is_video(path):
            raise InputError(
                f"{path} is a video, and {classifier.card.model} reads pictures; try one of `linescan list video_`"
            )
        inside = find(path) if path.is_dir() else [path]
        if not inside:
            raise InputError(f"{path} holds no {'videos' if classifier.clips else 'pictures'}")
        files += inside
    # On a terminal, lines must pass through the bar's console, which makes room for them.
    show = console if console.is_terminal and out.is_terminal else out
    results, broken, done = [], 0, 0.0
    with progress_bar("classifying", len(files)) as advance:

        def progress(share: float):
            nonlocal done
            done += share
            advance(share)

        for i, (path, answer) in enumerate(zip(files, classifier.each(files, progress)), 1):
            progress(i - done)
            if isinstance(answer, InputError):
                broken += 1
                results.append({kind: str(path), "error": str(answer)})
                say(f"[yellow]skipped[/] {escape(str(answer))}")
                continue
            [guesses] = classifier.name(answer[None], topk)
            results.append({kind: str(path), "guesses": [g._asdict() for g in guesses]})
            if not as_json:
                best, *others = [f"{escape(g.label)} {100 * g.probability:.1f} %" for g in guesses]
                show.print(f"{escape(str(path))}: " + ", ".join([f"[bold green]{best}[/]", *others]), soft_wrap=True)
    if as_json:
        print(json.dumps(results, indent=2))
    raise typer.Exit(1 if broken else 0)


@app.command(
    epilog=_examples(
        "linescan evaluate --data digits --checkpoint runs/demo/model.safetensors",
        "linescan evaluate --data imagenet/val --model vim_tiny_patch16_224 --batch 128 --precision bf16",
    )
)
def evaluate(
    data: Annotated[str, typer.Option("--data", "-d", help="A folder of classes, or `digits` (those held out).")],
    model: Model = None,
    checkpoint: Checkpoint = None,
    device: Device = None,
    precision: Annotated[Precision, typer.Option(help="Compute in this precision.")] = Precision.fp32,
    batch: Batch = 64,
    workers: Workers = None,
    model_arg: ModelArgs = None,
    as_json: Json = False,
):
    """Measure accuracy on labelled pictures. A broken one is named and left out; the exit status is then 1."""
    from linescan.engine.cards import restore
    from linescan.engine.data import Samples, evaluation_batches
    from linescan.engine.image_sets import Digits, Folder
    from linescan.engine.processes import Processes, pick_device
    from linescan.engine.progress import progress_bar, say
    from linescan.engine.scores import score

    us = Processes(0, 1, pick_device(device))
    restored, card = restore(model, checkpoint, **_model_args(model_arg))
    if data == "digits":
        pictures = Digits(held_out=True)
    else:
        folder = Folder(data)
        # Class folders bear the names of the classes, or (ImageNet's synsets) stand in their order.
        known = set(folder.classes) <= set(card.classes)
        pictures = Folder(data, classes=card.classes) if known else folder
    if len(pictures.classes) != len(card.classes):
        raise InputError(f"{data} has {len(pictures.classes)} classes, the model {len(card.classes)}")
    samples = Samples(pictures, card.preprocess, card.preprocess.transform())
    batches = evaluation_batches(samples, batch, workers=_workers(workers, data), pin=us.device.type == "cuda")
    with progress_bar("evaluating", len(samples)) as advance:
        scores = score(restored.to(us.device), batches, us, precision.dtype, advance)
    for index in scores.broken:
        say(f"[yellow]left out[/] {escape(pictures.names[index])}: not a picture, or damaged")
    if as_json:
        print(json.dumps({**vars(scores), "broken": [pictures.names[i] for i in scores.broken]}, indent=2))
    else:
        out.print(
            f"top-1 [bold green]{scores.top1:.2f} %[/], top-5 {scores.top5:.2f} %, loss {scores.loss:.4f} on "
            f"{scores.images} pictures",
            soft_wrap=True,
        )
    raise typer.Exit(1 if scores.broken else 0)


# -- segmenting and detecting -----------------------------------------------------------------------------------------

Sources = Annotated[
    list[str], typer.Argument(metavar="PATH...", help="Pictures, videos, folders of them, and patterns with * and **.")
]
DenseOut = Annotated[Path, typer.Option("--out", "-o", help="Where overlays and data go.")]
DenseBatch = Annotated[int, typer.Option("--batch", "-b", min=1, help="Pictures, or windows, in one forward pass.")]
DenseCheckpoint = Annotated[
    Optional[Path], typer.Option("--checkpoint", "-c", help="Its weights (.pth, .safetensors).")
]
Window = Annotated[
    Optional[str],
    typer.Option(
        metavar="HEIGHTxWIDTH",
        help="Slide windows of this size (one number: square) over the picture in its own resolution, however large. "
        "Default: as the config says.",
    ),
]
Stride = Annotated[
    Optional[str], typer.Option(metavar="HEIGHTxWIDTH", help="From window to window. Default: two thirds of it.")
]
Overlays = Annotated[bool, typer.Option("--overlays/--no-overlays", help="Draw what was found into the pictures.")]


def _size(text: str | None, option: str) -> tuple[int, int] | None:
    """ "512x1024" -> (512, 1024), "512" -> (512, 512)."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise InputError(f"{option} is a size in pixels, as in 512 or 512x1024 (height x width), not {text!r}")
    return int(sides[0]), int(sides[-1])


def _answer_files(results, sources: list, overlays: bool, description: str):
    """Runs a tool over files: one line for each on stdout, skipped ones on stderr; exit status 1 if there are any."""
    from linescan.engine.progress import console, progress_bar, say
    from linescan.tasks.files import run

    show = console if console.is_terminal and out.is_terminal else out
    broken, done = 0, 0.0
    with progress_bar(description, len(sources)) as advance:

        def progress(share: float):
            nonlocal done
            done += share
            advance(share)

        for i, (source, answer) in enumerate(run(sources, results, overlays, progress), 1):
            if isinstance(answer, InputError):
                broken += 1
                say(f"[yellow]skipped[/] {escape(str(answer))}")
            else:
                show.print(f"{escape(str(source.path))}: {escape(answer)}", soft_wrap=True)
            if done < i:
                progress(i - done)
    say(f"{len(sources) - broken} of {len(sources)} done, in {escape(str(results.out))}")
    raise typer.Exit(1 if broken else 0)


@app.command(
    epilog=_examples(
        "linescan segment street.jpg --model segmentation/vmamba_tiny_upernet_ade20k --checkpoint vmamba.pth",
        "linescan segment photos 'more/**/*.png' drive.mp4 --model segman_tiny --checkpoint segman_t_ade.pth -o out",
        "linescan segment orthophoto.tif --model my_config.py -c best.pth --window 1024 --batch 8 --precision fp16",
    )
)
def segment(
    paths: Sources,
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="An mmseg config (a file, one of linescan's by name, or mmseg::...), or segman_tiny, "
            "segman_small, segman_base, segman_large, which need no OpenMMLab."
        ),
    ],
    checkpoint: DenseCheckpoint = None,
    to: DenseOut = Path("runs/segment"),
    window: Window = None,
    stride: Stride = None,
    overlays: Overlays = True,
    device: Device = None,
    precision: Annotated[Precision, typer.Option(help="Compute in this precision.")] = Precision.fp32,
    batch: DenseBatch = 1,
    model_arg: ModelArgs = None,
):  # fmt: skip
    """Say what each pixel shows, in pictures and videos: masks (PNG) and overlays with a legend.

    A broken file is named and skipped; the exit status is then 1.
    """
    from linescan.tasks.files import Masks, find_sources
    from linescan.tasks.segment import Segmenter

    sizes = {"window": _size(window, "--window"), "stride": _size(stride, "--stride")}
    sources = find_sources(paths, to)  # before a model is read in vain
    tool = Segmenter(
        model, checkpoint, device=device, dtype=precision.dtype, batch=batch, **sizes, **_model_args(model_arg)
    )
    to.mkdir(parents=True, exist_ok=True)
    _answer_files(Masks(tool, to), sources, overlays, "segmenting")


@app.command(
    epilog=_examples(
        "linescan detect street.jpg --model detection/vmamba_tiny_mask_rcnn_1x_coco --checkpoint vmamba.pth",
        "linescan detect coco/val2017 -m my_config.py -c best.pth --annotations instances_val2017.json --no-overlays",
        "linescan detect harbour.tif -m my_config.py -c best.pth --window 1024 --score 0.5",
    )
)
def detect(
    paths: Sources,
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="An mmdet config: a file, one of linescan's by name, or mmdet::..."),
    ],
    checkpoint: DenseCheckpoint = None,
    to: DenseOut = Path("runs/detect"),
    score: Annotated[float, typer.Option(min=0, max=1, help="Draw instances of at least this score.")] = 0.3,
    annotations: Annotated[
        Optional[Path], typer.Option(help="A COCO dataset whose ids of pictures and categories are to be used.")
    ] = None,
    window: Window = None,
    stride: Stride = None,
    overlays: Overlays = True,
    device: Device = None,
    precision: Annotated[Precision, typer.Option(help="Compute in this precision.")] = Precision.fp32,
    batch: DenseBatch = 1,
):
    """Find things in pictures and videos: boxes and masks (COCO's result format), and overlays with a legend.

    A broken file is named and skipped; the exit status is then 1.
    """
    from linescan.tasks.detect import Detector
    from linescan.tasks.files import Instances, find_sources

    sizes = {"window": _size(window, "--window"), "stride": _size(stride, "--stride")}
    sources = find_sources(paths, to)
    tool = Detector(model, checkpoint, device=device, dtype=precision.dtype, batch=batch, **sizes)
    to.mkdir(parents=True, exist_ok=True)
    _answer_files(Instances(tool, to, score, annotations), sources, overlays, "detecting")


# -- making one -------------------------------------------------------------------------------------------------------

_DATA, _MODEL, _OPTIMISER, _AUGMENT, _RUN = "In and out", "Model", "Optimiser", "Augmentation", "Run"


def _option(panel: str, help: str, *names: str, **kwargs):
    return typer.Option(*names, help=help, rich_help_panel=panel, **kwargs)


@app.command(
    epilog=_examples(
        "linescan train --data digits --out runs/digits --epochs 30 --model-arg img_size=32 --model-arg patch_size=8 "
        "--model-arg depth=4",
        "linescan train --data flowers --out runs/flowers --model vim_small_patch16_224 --pretrained --epochs 30 "
        "--mixup 0.8 --cutmix 1 --ema 0.9998 --bf16",
        "linescan train --data flowers --out runs/flowers [dim](the same options)[/] --resume",
        "torchrun --standalone --nproc_per_node=4 -m linescan train --data imagenet --out runs/imagenet --epochs 300",
        "linescan train --config segmentation/vmamba_tiny_upernet_ade20k --cfg-options train_dataloader.batch_size=4",
    )
)
def train(
    data: Annotated[
        Optional[str],
        _option(_DATA, "`digits`; a folder of classes; or one with train/ and val/ in it.", "--data", "-d"),
    ] = None,
    to: Annotated[Optional[Path], _option(_DATA, "The folder of the run.", "--out", "--work-dir", "-o")] = None,
    config: Annotated[
        Optional[str],
        _option(_DATA, "Segmentation or detection instead: an OpenMMLab config, a file or one of linescan's by name."),
    ] = None,
    cfg_options: Annotated[
        Optional[list[str]],
        _option(_DATA, "A value of the config; may be repeated.", "--cfg-options", metavar="KEY=VALUE"),
    ] = None,
    val: Annotated[Optional[str], _option(_DATA, "A folder of classes to hold out.")] = None,
    holdout: Annotated[float, _option(_DATA, "Without --val: the share of each class that is held out.")] = 0.1,
    workers: Annotated[
        Optional[int], _option(_DATA, "Processes that load pictures; default: 4, none for the digits.", min=0)
    ] = None,
    model: Annotated[str, _option(_MODEL, "A timm name.", "--model", "-m")] = "vim_tiny_patch16_224",
    model_arg: Annotated[
        Optional[list[str]],
        _option(_MODEL, "An argument for timm.create_model; may be repeated.", "--model-arg", metavar="KEY=VALUE"),
    ] = None,
    pretrained: Annotated[bool, _option(_MODEL, "Start from the published weights.", "--pretrained")] = False,
    checkpoint: Annotated[
        Optional[str], _option(_MODEL, "Start from these weights, but for another classifier.", "--checkpoint", "-c")
    ] = None,
    drop_path: Annotated[float, _option(_MODEL, "Stochastic depth.")] = 0.0,
    grad_checkpointing: Annotated[bool, _option(_MODEL, "Less memory, more time.", "--grad-checkpointing")] = False,
    epochs: Annotated[int, _option(_OPTIMISER, "Times that each picture is seen.", "--epochs", "-e")] = 100,
    batch: Annotated[int, _option(_OPTIMISER, "Pictures in one forward pass of a process.", "--batch", "-b")] = 64,
    accumulate: Annotated[int, _option(_OPTIMISER, "Forward passes in one step.")] = 1,
    lr: Annotated[float, _option(_OPTIMISER, "Highest learning rate (AdamW).")] = 5e-4,
    min_lr: Annotated[float, _option(_OPTIMISER, "Learning rate at the end of the cosine.")] = 1e-5,
    warmup: Annotated[float, _option(_OPTIMISER, "Epochs in which the learning rate rises.")] = 5.0,
    weight_decay: Annotated[float, _option(_OPTIMISER, "Weight decay.")] = 0.05,
    layer_decay: Annotated[
        Optional[float], _option(_OPTIMISER, "Factor of the learning rate from each layer to the one below.")
    ] = None,
    clip_grad: Annotated[Optional[float], _option(_OPTIMISER, "Largest norm of the gradient.")] = None,
    ema: Annotated[float, _option(_OPTIMISER, "Decay of a moving average of the weights; 0: none.")] = 0.0,
    augment: Annotated[
        Optional[str],
        _option(_AUGMENT, "none, light, standard, or a policy of timm; default: light for the digits, else "
                "rand-m9-mstd0.5-inc1."),
    ] = None,
    erasing: Annotated[float, _option(_AUGMENT, "How often a rectangle is erased.")] = 0.0,
    mixup: Annotated[float, _option(_AUGMENT, "Strength of mixup; 0: none.")] = 0.0,
    cutmix: Annotated[float, _option(_AUGMENT, "Strength of cutmix; 0: none.")] = 0.0,
    smoothing: Annotated[float, _option(_AUGMENT, "Label smoothing.")] = 0.1,
    bf16: Annotated[bool, _option(_RUN, "Compute in bfloat16.", "--bf16")] = False,
    device: Annotated[Optional[str], _option(_RUN, "cpu, cuda, ...; default: CUDA where there is one.")] = None,
    seed: Annotated[int, _option(_RUN, "Of everything random.", min=0)] = 0,
    save_every: Annotated[int, _option(_RUN, "Steps between saved states; 0: once an epoch.", min=0)] = 0,
    log_every: Annotated[int, _option(_RUN, "Steps between rows of metrics.csv.", min=1)] = 10,
    resume: Annotated[
        bool, _option(_RUN, "Go on from the last saved state, with the very same steps, if there is one.", "--resume")
    ] = False,
):  # fmt: skip
    """Train a classifier. Stop it as you like: --resume takes the steps it would have taken.

    With --config, a segmentor or detector is trained by OpenMMLab instead, as the config says; of the other options
    only --out, --resume and --cfg-options count then.

    The folder of the run gets model.safetensors (last epoch), best.safetensors, metrics.csv, and what TensorBoard reads
    where that is installed. Several processes: see the last example.
    """
    from linescan.engine.progress import say

    if config:
        from linescan.openmmlab.runner import train_config

        train_config(config, to, resume, cfg_options or ())
        return
    if data is None or to is None:
        raise InputError("training needs --data and --out, or --config")
    from linescan.engine.training import Recipe
    from linescan.engine.training import train as run

    recipe = Recipe(
        data=data, val=val, holdout=holdout, model=model, model_args=_model_args(model_arg), pretrained=pretrained,
        checkpoint=checkpoint, epochs=epochs, batch=batch, accumulate=accumulate, lr=lr, min_lr=min_lr, warmup=warmup,
        weight_decay=weight_decay, layer_decay=layer_decay, clip_grad=clip_grad, augment=augment, erasing=erasing,
        mixup=mixup, cutmix=cutmix, smoothing=smoothing, ema=ema, drop_path=drop_path, bf16=bf16,
        grad_checkpointing=grad_checkpointing, seed=seed,
    )  # fmt: skip
    workers = _workers(workers, data)
    try:
        run(recipe, to, device=device, resume=resume, workers=workers, save_every=save_every, log_every=log_every)
    except KeyboardInterrupt:
        say(f"stopped; the same command with --resume goes on from the last state saved in {escape(str(to))}")
        raise typer.Exit(130) from None


# -- measuring and searching ------------------------------------------------------------------------------------------


@app.command(
    epilog=_examples(
        "linescan benchmark vim_tiny_patch16_224 --against deit_tiny_patch16_224 --sizes 224,512,1024",
        "linescan benchmark vmamba_tiny_s1l8 vig_h_tiny --against swin_tiny_patch4_window7_224 --train --batch 8",
    )
)
def benchmark(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="timm names, linescan's or any other.")],
    against: Annotated[Optional[str], typer.Option(help="Compare with this one: ratios, and where they cross.")] = None,
    sizes: Annotated[str, typer.Option(help="Sides of square images in pixels.")] = "224,512",
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Images in a pass.")] = 1,
    train_step: Annotated[bool, typer.Option("--train", help="Forward and backward, not the forward alone.")] = False,
    device: Device = None,
    numbers: Annotated[Precision, typer.Option("--precision", help="Compute in this precision.")] = Precision.fp32,
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
    from linescan.engine.progress import progress_bar

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
        cells = f"{1e3 * r.seconds:.1f}", f"{r.images_per_second:.2f}", _number(r.memory_mb, ".0f"), *ratio
        table.add_row(r.model, str(r.size), *cells)
    out.print(table)
    for name in every if against else []:
        if name != against:
            cross = crossover(results, name, against)
            where = f"faster than {against} from about {cross:.0f} pixels on" if cross else f"not faster than {against}"
            out.print(f"{name}: {where}" + ("" if cross else f" up to {sides[-1]} pixels"), soft_wrap=True)
    for path in write_report(results, against, to, **settings):
        out.print(escape(str(path)), soft_wrap=True)


@app.command(epilog=_examples("linescan directions runs/search/model.safetensors --out table.json"))
def directions(
    checkpoint: Annotated[Path, typer.Argument(help="A trained LocalMamba super-net (a *_search model).")],
    model: Model = None,
    model_args: ModelArgs = None,
    keep: Annotated[int, typer.Option(min=1, help="Routes kept in every layer.")] = 4,
    to: Annotated[Optional[Path], typer.Option("--out", "-o", help="Write the table as JSON.")] = None,
):
    """Read the scan routes that a LocalMamba super-net has learned to keep, and build the model that has them."""
    from linescan.backbones.localmamba import searched_directions
    from linescan.engine.cards import restore

    supernet, _ = restore(model, checkpoint, **_model_args(model_args))
    try:
        table, found = searched_directions(supernet, keep)
    except (AttributeError, ValueError, TypeError) as error:
        raise InputError(f"{checkpoint} holds no LocalMamba super-net ({error})") from None
    millions = sum(p.numel() for p in found.parameters()) / 1e6
    out.print(f"{type(found).__name__} with these routes: {millions:.3f} M parameters")
    if to:
        to.write_text(json.dumps([list(layer) for layer in table], indent=1) + "\n")
        out.print(escape(str(to)), soft_wrap=True)


@app.command(epilog=_examples("linescan demo", "linescan demo --out /tmp/demo", "linescan demo --dense"))
def demo(
    to: Annotated[
        Optional[Path],
        typer.Option("--out", "-o", help="Where everything goes; default: runs/demo, or runs/demo-dense."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, another network.")] = 0,
    dense: Annotated[
        bool, typer.Option("--dense", help="Segment and detect digits in scenes instead; needs OpenMMLab.")
    ] = False,
):
    """Train a small Vim on handwritten digits, try it on some it has not seen, and draw a picture of it all.

    With --dense, a UPerNet (mmseg) and a Mask R-CNN (mmdet) instead, on digits in scenes.
    """
    if dense:
        from linescan.demos.scenes import demo_dense

        demo_dense(to or "runs/demo-dense", seed=seed)
        return
    from dataclasses import replace

    from linescan.demos.digits import RECIPE
    from linescan.demos.digits import demo as run

    run(to or "runs/demo", replace(RECIPE, seed=seed))


def main() -> None:
    """Runs the command; what the user can mend is told in one line, with exit status 2."""
    try:
        status = app(sys.argv[1:] or ["--help"], prog_name="linescan", standalone_mode=False) or 0
    except (InputError, CheckpointError) as error:
        status = _complain(error, 2)
    except Diverged as error:
        status = _complain(error, 1)
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        if not hasattr(error, "format_message"):  # not one of the command line parser's
            raise
        status = _complain(error.format_message(), error.exit_code)
    sys.exit(status)


def _complain(error: object, status: int) -> int:
    line = " ".join(str(error).split())
    print(f"linescan: {line}", file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
