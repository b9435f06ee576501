"""Models applied to files: a line, masks or boxes for each."""

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from linescan.engine.progress import progress_bar, say, show
from linescan.errors import InputError

from .options import Batch, Checkpoint, Device, Json, Model, ModelArgs, Precision, command, model_args


@command(
    "linescan classify cat.jpg --model vim_tiny_patch16_224",
    "linescan classify runs/demo/images --checkpoint runs/demo/model.safetensors --topk 3",
    "linescan classify *.png --checkpoint model.safetensors --json > guesses.json",
    "linescan classify clip.mp4 --model videomamba_video_tiny_patch16_224.k400_f16 --views 4x3",
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
    from linescan.media.images import find_images
    from linescan.media.video import Views, find_videos, is_video
    from linescan.tasks.classify import Classifier

    for path in paths:
        if not path.exists():
            raise InputError(f"{path} does not exist")
    args = model_args(model_arg) | {"views": Views.parse(views) if views else None}
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
                say(("skipped", "yellow"), f" {answer}")
                continue
            [guesses] = classifier.name(answer[None], topk)
            results.append({kind: str(path), "guesses": [g._asdict() for g in guesses]})
            if not as_json:
                show(f"{path}: " + ", ".join(f"{g.label} {100 * g.probability:.1f} %" for g in guesses))
    if as_json:
        print(json.dumps(results, indent=2))
    raise typer.Exit(1 if broken else 0)


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
    from linescan.tasks.files import run

    broken, done = 0, 0.0
    with progress_bar(description, len(sources)) as advance:

        def progress(share: float):
            nonlocal done
            done += share
            advance(share)

        for i, (source, answer) in enumerate(run(sources, results, overlays, progress), 1):
            if isinstance(answer, InputError):
                broken += 1
                say(("skipped", "yellow"), f" {answer}")
            else:
                show(f"{source.path}: {answer}")
            if done < i:
                progress(i - done)
    say(f"{len(sources) - broken} of {len(sources)} done, in {results.out}")
    raise typer.Exit(1 if broken else 0)


@command(
    "linescan segment street.jpg --model segmentation/vmamba_tiny_upernet_ade20k --checkpoint vmamba.pth",
    "linescan segment photos 'more/**/*.png' drive.mp4 --model segman_seg_tiny --checkpoint segman.pth -o out",
    "linescan segment orthophoto.tif --model my_config.py -c best.pth --window 1024 --batch 8 --precision fp16",
)
def segment(
    paths: Sources,
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", help="An mmseg config (a file, one of linescan's by name, or mmseg::...), or the name "
            "of a segmentation model (segman_seg_tiny), which needs no OpenMMLab."
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
        model, checkpoint, device=device, dtype=precision.dtype, batch=batch, **sizes, **model_args(model_arg)
    )
    to.mkdir(parents=True, exist_ok=True)
    _answer_files(Masks(tool, to), sources, overlays, "segmenting")


@command(
    "linescan detect street.jpg --model detection/vmamba_tiny_mask_rcnn_1x_coco --checkpoint vmamba.pth",
    "linescan detect coco/val2017 -m my_config.py -c best.pth --annotations instances_val2017.json --no-overlays",
    "linescan detect harbour.tif -m my_config.py -c best.pth --window 1024 --score 0.5",
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
