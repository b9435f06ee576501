"""Models applied to files: labels, masks, boxes, a restored image or a map of anomalies for each."""

import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Callable, Optional

import typer

from linescan.engine.atomic import expect_folder
from linescan.engine.progress import progress_bar, say, show
from linescan.errors import InputError
from linescan.tasks.recipes import FALSE_ALARMS

from .names import complete_models
from .options import Batch, Checkpoint, Device, Floats, Json, Model, ModelArgs, Precision, command, model_args, pixels

if TYPE_CHECKING:
    from linescan.media.find import Source
    from linescan.tasks.tool import Outcome, Tool, Writer

Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="PATH...",
        help="Images, videos, folders of them, patterns with * and **; - for a list on standard input.",
        show_default=False,
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="The folder that overlays and data are written to.")]
WindowBatch = Annotated[int, typer.Option("--batch", "-b", min=1, help="Images, or windows, in one forward pass.")]
Weights = Annotated[Optional[Path], typer.Option("--checkpoint", "-c", help="Its weights (.pth, .safetensors).")]
Window = Annotated[
    Optional[str],
    typer.Option(
        metavar="HEIGHTxWIDTH",
        help="Slide windows of this size (one number: square) over the image in its own resolution, however large. "
        "Default: as the model or config says.",
    ),
]
Stride = Annotated[
    Optional[str], typer.Option(metavar="HEIGHTxWIDTH", help="From window to window. Default: two thirds of it.")
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Refuse videos that are cut short or damaged; else what can be read is used.")
]
Overlays = Annotated[bool, typer.Option("--overlays/--no-overlays", help="Draw what was found into the images.")]


@command(
    "linescan classify cat.jpg --model vim_tiny_patch16_224",
    "linescan classify runs/demo/images --checkpoint runs/demo/model.safetensors --topk 3",
    "linescan classify 'photos/**/*.jpg' --checkpoint model.safetensors --out labelled",
    "find . -name '*.png' | linescan classify - --checkpoint model.safetensors --json > labels.json",
    "linescan classify vim.onnx cat.jpg",
    "linescan classify clip.mp4 --model videomamba_video_tiny_patch16_224.k400_f16 --views 4x3",
)
def classify(
    paths: Sources,
    model: Model = None,
    checkpoint: Checkpoint = None,
    to: Annotated[
        Optional[Path], typer.Option("--out", "-o", help="Draw the classes below the images, into this folder.")
    ] = None,
    topk: Annotated[int, typer.Option("--topk", "-k", min=1, help="How many classes for each image or video.")] = 5,
    views: Annotated[
        Optional[str],
        typer.Option(
            metavar="CLIPSxCROPS",
            help="Views of each video whose mean is the answer, as in 4x3: four clips, three crops of each.",
            show_default="1x1",
        ),
    ] = None,
    device: Device = None,
    precision: Precision = Floats.fp32,
    batch: Batch = 32,
    model_arg: ModelArgs = None,
    strict: Strict = False,
    trust: Annotated[
        bool, typer.Option("--trust", help="Open a package that is a program (.pt2, .ts): it could do anything.")
    ] = False,
    as_json: Json = False,
):
    """Name what images and videos show.

    A model of images reads videos frame by frame; a model of videos reads video files and folders of frames.
    The first PATH may be a package of `linescan export` (.onnx, .pt2, .ts) in place of --model.
    A file that cannot be read is named and skipped; the exit status is then 1.
    """

    if model is None and checkpoint is None and Path(paths[0]).suffix in (".onnx", ".pt2", ".ts"):
        checkpoint, *paths = Path(paths[0]), *paths[1:]
        if not paths:
            raise InputError(
                f"name the images that {checkpoint} is to classify: linescan classify {checkpoint} PATH..."
            )

    def open_tool() -> tuple["Tool", "Writer"]:
        from linescan.media.video import Views
        from linescan.tasks.classify import Classifier, Labels

        args = model_args(model_arg) | {"views": Views.parse(views) if views else None}
        args |= {"device": device, "dtype": precision.dtype, "batch": batch, "topk": topk, "strict": strict}
        args |= {"trust": trust}
        return Classifier(model, checkpoint, **args), Labels()

    answer_files(open_tool, paths, to, to is not None, as_json, "classifying")


@command(
    "linescan segment street.jpg --model segmentation/vmamba_tiny_upernet_ade20k --checkpoint vmamba.pth",
    "linescan segment photos 'more/**/*.png' drive.mp4 --model segman_seg_tiny --checkpoint segman.pth -o out",
    "linescan segment orthophoto.tif --model my_config.py -c best.pth --window 1024 --batch 8 --precision fp16",
    "linescan segment lesions --checkpoint runs/isic18/best.safetensors",
    "linescan segment abdomen.nii.gz --model mamband_unetr_small -c mamband-s.pt --precision bf16 --batch 4",
    "linescan segment night/rgb --extra night/thermal --model sigma_tiny.mfnet --checkpoint sigma_tiny_mfnet.pth",
)
def segment(
    paths: Sources,
    model: Annotated[
        Optional[str],
        typer.Option(
            "--model", "-m", help="A name of `linescan list --task segmentation`, or an mmseg config: a file, one of "
            "linescan's by name, or mmseg::... Default: that of --checkpoint."
        ),
    ] = None,
    checkpoint: Weights = None,
    extra: Annotated[
        Optional[str],
        typer.Option(
            metavar="PATH", help="The thermal or depth images of the same scenes, for models that read both: a file, a "
            "folder of files of the same names, or a pattern."
        ),
    ] = None,
    to: Out = Path("runs/segment"),
    window: Window = None,
    stride: Stride = None,
    overlays: Overlays = True,
    device: Device = None,
    precision: Precision = Floats.fp32,
    batch: WindowBatch = 1,
    model_arg: ModelArgs = None,
    strict: Strict = False,
    as_json: Json = False,
):  # fmt: skip
    """Say what each pixel of images and videos shows: masks (PNG) and overlays with a legend.

    A model for volumes reads NIfTI files and .npy: labels on the grid of each file, and pictures of three planes.
    A file that cannot be read is named and skipped; the exit status is then 1.
    """
    sizes = {"window": pixels(window, "--window"), "stride": pixels(stride, "--stride")}

    def open_tool() -> tuple["Tool", "Writer"]:
        from linescan.tasks.segment import Masks, Segmenter, expect_images
        from linescan.tasks.segment_volumes import LabelFiles, VolumeSegmenter, segments_volumes

        expect_images(model, checkpoint, 1 if extra is None else 2)
        args: dict = {"device": device, "dtype": precision.dtype, "batch": batch}
        if segments_volumes(model, checkpoint):
            side = _side(sizes)
            volumes = VolumeSegmenter(model, checkpoint, **args, window=side, **model_args(model_arg))
            return volumes, LabelFiles(to, volumes)
        args["strict"] = strict
        tool = Segmenter(model, checkpoint, **args, **sizes, **model_args(model_arg))
        return tool, Masks(to, tool.classes, tool.palette)

    kinds = ("image", "video", "volume") if extra is None else ("image",)
    answer_files(open_tool, paths, to, overlays, as_json, "segmenting", kinds=kinds, partners=extra)


@command(
    "linescan detect street.jpg --model detection/vmamba_tiny_mask_rcnn_1x_coco --checkpoint vmamba.pth",
    "linescan detect coco/val2017 -m my_config.py -c best.pth --annotations instances_val2017.json --no-overlays",
    "linescan detect harbour.tif -m my_config.py -c best.pth --window 1024 --score 0.5",
    "linescan detect street.jpg --model mamba_yolo_world_small -c yolo_s.pth --text 'cat, red car'",
    "linescan detect photos -m mamba_yolo_world_small -c yolo_s.pth --embeddings lvis.npz --save lvis.safetensors",
    "linescan detect photos --checkpoint lvis.safetensors",
)
def detect(
    paths: Sources,
    model: Annotated[
        Optional[str],
        typer.Option(
            "--model", "-m", help="A name of `linescan list --task detection`, or an mmdet config: a file, one of "
            "linescan's by name, or mmdet::... Default: that of --checkpoint."
        ),
    ] = None,
    checkpoint: Weights = None,
    text: Annotated[
        Optional[list[str]],
        typer.Option(metavar="WORDS", help="What to find, separated by commas, for models by name; may be repeated. "
                     "Another order gives other scores."),
    ] = None,
    embeddings: Annotated[
        Optional[Path],
        typer.Option(help="A file of names and their vectors (.npz, .safetensors), instead of a text encoder; all of "
                     "them are looked for, or only what --text names."),
    ] = None,
    text_encoder: Annotated[
        Optional[str],
        typer.Option(metavar="NAME", help="What reads --text: a CLIP of transformers by its name or folder, or "
                     "open_clip:MODEL/WEIGHTS.", show_default="openai/clip-vit-base-patch32"),
    ] = None,
    save: Annotated[
        Optional[Path],
        typer.Option(metavar="FILE", help="Write the model with these prompts (.safetensors): it needs no text then."),
    ] = None,
    to: Out = Path("runs/detect"),
    score: Annotated[float, typer.Option(min=0, max=1, help="Draw instances of at least this score.")] = 0.3,
    annotations: Annotated[
        Optional[Path], typer.Option(help="A COCO dataset whose ids of images and categories are to be used.")
    ] = None,
    window: Window = None,
    stride: Stride = None,
    overlays: Overlays = True,
    device: Device = None,
    precision: Precision = Floats.fp32,
    batch: WindowBatch = 1,
    model_arg: ModelArgs = None,
    strict: Strict = False,
    as_json: Json = False,
):  # fmt: skip
    """Find the instances in images and videos: boxes and masks (COCO's result format), and overlays with a legend.

    Models of configs know their classes; models by name find what words name.
    A file that cannot be read is named and skipped; the exit status is then 1.
    """
    sizes = {"window": pixels(window, "--window"), "stride": pixels(stride, "--stride")}
    prompts = {"text": text, "embeddings": embeddings, "text_encoder": text_encoder}

    def open_tool() -> tuple["Tool", "Writer"]:
        from linescan.tasks.detect import Detector, Instances

        args = {"device": device, "dtype": precision.dtype, "batch": batch, "score": score} | model_args(model_arg)
        args |= {name: value for name, value in prompts.items() if value}
        tool = Detector(model, checkpoint, strict=strict, **args, **sizes)
        if save:
            tool.save(save)
            say(f"{save} keeps the model and its {len(tool.classes)} prompts")
        return tool, Instances(to, tool.classes, score, annotations)

    answer_files(open_tool, paths, to, overlays, as_json, "detecting")


@command(
    "linescan restore photo.jpg --model mambair_v2_light_x4 --checkpoint mambairv2_lightSR_x4.pth --compare",
    "linescan restore scans '*.tif' -m mambair_color_dn -c ColorDN_level25.pth --self-ensemble --precision bf16",
    "linescan restore photos --checkpoint runs/x2/best.safetensors --format webp --json > restored.json",
)
def restore(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="PHOTO...",
            help="Images, folders of them, patterns with * and **; - for a list on standard input.",
            show_default=False,
        ),
    ],
    model: Annotated[
        Optional[str],
        typer.Option("--model", "-m", help="A name of `linescan list --task restoration`; default: that of "
                     "--checkpoint.", autocompletion=complete_models),
    ] = None,
    checkpoint: Checkpoint = None,
    to: Annotated[Path, typer.Option("--out", "-o", help="The folder of the restored images.")] = Path("runs/restore"),
    format: Annotated[
        Optional[str],
        typer.Option(metavar="png|tiff|jpeg|webp", help="Of the restored images. Default: png, tiff for floats."),
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Draw images before and after, into OUT/compare.")] = False,
    window: Annotated[
        int, typer.Option(min=16, help="Pixels of a side from which on an image is restored in overlapping parts.")
    ] = 200,
    self_ensemble: Annotated[
        bool, typer.Option("--self-ensemble", help="The mean over the image's eight symmetries: eight times the work.")
    ] = False,
    device: Device = None,
    precision: Precision = Floats.fp32,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Parts in one forward pass.")] = 1,
    model_arg: ModelArgs = None,
    as_json: Json = False,
):  # fmt: skip
    """Enlarge images, or take away noise or the traces of JPEG, as the model was trained to.

    Depth (8 or 16 bits), alpha, colour profile and EXIF data are kept; images are written upright.
    A file that cannot be read is named and skipped; the exit status is then 1.
    """

    def open_tool() -> tuple["Tool", "Writer"]:
        from linescan.tasks.restore import Photos, Restorer

        photos = Photos(to, format)
        args = {"device": device, "dtype": precision.dtype, "batch": batch, "window": window}
        tool = Restorer(model, checkpoint, self_ensemble=self_ensemble, **args, **model_args(model_arg))
        photos.scale = tool.scale
        return tool, photos

    answer_files(open_tool, paths, to, compare, as_json, "restoring", "compare", kinds=("image",))


@command(
    "linescan anomaly photos --checkpoint runs/screws/best.safetensors --out runs/inspected",
    "linescan anomaly 'line3/*.png' --model mambaad_resnet34 -c mambaad_mvtec.pth --normal mvtec/screw/train/good",
    "linescan anomaly belt.mp4 --checkpoint runs/belt/best.safetensors --threshold 0.21 --json > belt.json",
)
def anomaly(
    paths: Sources,
    model: Annotated[
        Optional[str],
        typer.Option("--model", "-m", help="A name of `linescan list --task anomaly`; default: that of --checkpoint.",
                     autocompletion=complete_models),
    ] = None,
    checkpoint: Checkpoint = None,
    to: Out = Path("runs/anomaly"),
    normal: Annotated[
        Optional[list[str]],
        typer.Option(metavar="PATH", help="Normal images, or folders of them, on which the threshold is chosen; may be "
                     "repeated. Default: as training chose it, if the checkpoint says."),
    ] = None,
    false_alarms: Annotated[
        Optional[float],
        typer.Option(min=0, max=1, help="The share of the --normal images that may be above the threshold.",
                     show_default=str(FALSE_ALARMS)),
    ] = None,
    threshold: Annotated[
        Optional[float], typer.Option(min=0, help="Images with a score above this are anomalous.")
    ] = None,
    overlays: Overlays = True,
    device: Device = None,
    precision: Precision = Floats.fp32,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Images in one forward pass.")] = 8,
    model_arg: ModelArgs = None,
    strict: Strict = False,
    as_json: Json = False,
):  # fmt: skip
    """Find what is not as in normal images: scores, maps, overlays of both, and a page of the highest scores.

    maps/ has a TIFF file of floats for each image, scores.csv all scores; report.html shows the 48 highest.
    A file that cannot be read is named and skipped; the exit status is then 1.
    """
    if normal and threshold is not None:
        raise InputError("--normal chooses the threshold that --threshold gives; one of them is enough")
    if false_alarms is not None and not normal:
        raise InputError("--false-alarms is the share of the --normal images, which are not given")

    def open_tool() -> tuple["Tool", "Writer"]:
        from linescan.media.find import find
        from linescan.tasks.anomaly import AnomalyDetector, AnomalyMaps

        sources = _some(find(normal, ("image",))) if normal else []
        args = {"device": device, "dtype": precision.dtype, "batch": batch, "strict": strict, "threshold": threshold}
        tool = AnomalyDetector(model, checkpoint, **args, **model_args(model_arg))
        if normal:
            broken = [str(source.error) for source in sources if source.error]
            good = [source.path for source in sources if not source.error]
            with progress_bar("choosing the threshold", len(good)) as advance:
                unread = tool.calibrate(good, FALSE_ALARMS if false_alarms is None else false_alarms, advance)
            for line in broken + unread:
                say(("left out", "yellow"), f" {line}")
            say(f"threshold {tool.threshold:.4f}, chosen on {len(good) - len(unread)} normal images")
        return tool, AnomalyMaps(to)

    answer_files(open_tool, paths, to, overlays, as_json, "looking for anomalies")


@command(
    "linescan change 2017.png 2021.png --checkpoint runs/second/best.safetensors",
    "linescan change before after --model mambafcs_base.second --checkpoint second.pth --out runs/change --json",
    "linescan change 'old/*.tif' 'new/*.tif' -c runs/town/best.safetensors --window 512 --precision bf16",
)
def change(
    before: Annotated[
        str,
        typer.Argument(metavar="BEFORE", help="An image, a folder of images, or a pattern with * and **.",
                       show_default=False),
    ],
    after: Annotated[
        str,
        typer.Argument(metavar="AFTER", help="The same of a later date: an image, or images of the same names.",
                       show_default=False),
    ],
    model: Annotated[
        Optional[str],
        typer.Option("--model", "-m", help="A name of `linescan list --task change`; default: that of --checkpoint.",
                     autocompletion=complete_models),
    ] = None,
    checkpoint: Checkpoint = None,
    to: Out = Path("runs/change"),
    window: Window = None,
    stride: Stride = None,
    overlays: Overlays = True,
    device: Device = None,
    precision: Precision = Floats.fp32,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Pairs, or windows, in one forward pass.")] = 1,
    model_arg: ModelArgs = None,
    as_json: Json = False,
):  # fmt: skip
    """Say what has changed between two images of a place: a mask, what was there before and after, and a drawing.

    change/, before/ and after/ get a PNG file for each pair, overlays/ both images with what has changed in them.
    Both images of a pair have one size and show the same ground; one line says which seem to be shifted.
    A pair that cannot be read is named and skipped; the exit status is then 1.
    """
    sizes = {"window": pixels(window, "--window"), "stride": pixels(stride, "--stride")}

    def open_tool() -> tuple["Tool", "Writer"]:
        from linescan.tasks.change import ChangeDetector, ChangeMaps

        args = {"device": device, "dtype": precision.dtype, "batch": batch}
        tool = ChangeDetector(model, checkpoint, **args, **sizes, **model_args(model_arg))
        return tool, ChangeMaps(to, tool.classes, tool.palette)

    answer_files(
        open_tool, [before], to, overlays, as_json, "looking for changes", kinds=("image",), partners=after
    )  # fmt: skip


@command(
    "linescan prompt photo.jpg --checkpoint runs/digits/best.safetensors --point 120,80",
    "linescan prompt photo.jpg -c best.safetensors --point 120,80 --point 140,95 --negative 30,60 --json",
    "linescan prompt photo.jpg -c best.safetensors --each --point 120,80 --box 200,40,330,210",
    "linescan prompt photos -c best.safetensors --everything --grid 16 --out runs/all",
)
def prompt(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE...",
            help="Images, folders of them, patterns with * and **; - for a list on standard input.",
            show_default=False,
        ),
    ],
    point: Annotated[
        Optional[list[str]], typer.Option(metavar="X,Y", help="A point on the object, in pixels; may be repeated.")
    ] = None,
    negative: Annotated[
        Optional[list[str]],
        typer.Option(metavar="X,Y", help="A point on what does not belong to the object; may be repeated."),
    ] = None,
    box: Annotated[
        Optional[list[str]],
        typer.Option(metavar="X0,Y0,X1,Y1", help="A box around the object: its left, top, right and bottom."),
    ] = None,
    each: Annotated[
        bool, typer.Option("--each", help="Every --point and every --box is an object of its own; --negative is for "
                           "all of them.")
    ] = False,
    everything: Annotated[
        bool, typer.Option("--everything", help="All objects: a grid of points, whose masks are filtered.")
    ] = False,
    grid: Annotated[
        Optional[int], typer.Option(min=1, max=256, help="Of --everything: points along each side.", show_default="32")
    ] = None,
    iou: Annotated[
        Optional[float], typer.Option(min=0, max=1, help="Of --everything: the least IoU that the model expects of a "
                                      "mask.", show_default="0.88")
    ] = None,
    stability: Annotated[
        Optional[float], typer.Option(min=0, max=1, help="Of --everything: the least IoU of a mask drawn larger and "
                                      "smaller.", show_default="0.95")
    ] = None,
    overlap: Annotated[
        Optional[float], typer.Option(min=0, max=1, help="Of --everything: of two masks whose boxes have a higher IoU "
                                      "than this, the better one is kept.", show_default="0.7")
    ] = None,
    model: Annotated[
        Optional[str],
        typer.Option("--model", "-m", help="A name of `linescan list --task prompting`; default: that of "
                     "--checkpoint.", autocompletion=complete_models),
    ] = None,
    checkpoint: Checkpoint = None,
    to: Out = Path("runs/prompt"),
    overlays: Overlays = True,
    device: Device = None,
    precision: Precision = Floats.fp32,
    batch: Annotated[int, typer.Option("--batch", "-b", min=1, help="Images in one forward pass.")] = 1,
    model_arg: ModelArgs = None,
    as_json: Json = False,
):  # fmt: skip
    """Cut out what points and boxes show: a mask (PNG) for each object, its scores, and overlays.

    All points and the box show one object, in every image; the image is encoded once for many objects.
    A file that cannot be read, or in which a prompt lies outside, is named and skipped; the exit status is then 1.
    """
    points, negatives = (
        [_coordinates(text, 2, option) for text in texts or ()]
        for texts, option in ((point, "--point"), (negative, "--negative"))
    )
    boxes = [_coordinates(text, 4, "--box") for text in box or ()]
    filters = {"grid": grid, "iou": iou, "stability": stability, "overlap": overlap}
    filters = {name: value for name, value in filters.items() if value is not None}
    if filters and not everything:
        raise InputError(f"--{next(iter(filters))} is for --everything, which is not asked for")
    if everything and (points or negatives or boxes):
        raise InputError("--everything finds all objects by itself, without --point, --negative and --box")
    if not (everything or points or boxes):
        raise InputError("say what to cut out: --point x,y, --box x0,y0,x1,y1, or --everything")
    if len(boxes) > 1 and not each:
        raise InputError("several boxes are several objects, which --each asks for")

    def open_tool() -> tuple["Tool", "Writer"]:
        from linescan.tasks.prompt import Everything, Prompt, PromptedMasks, Prompter

        if everything:
            prompts = Everything(**{"side" if name == "grid" else name: value for name, value in filters.items()})
        elif each:
            prompts = [Prompt([one], negatives) for one in points] + [Prompt((), negatives, one) for one in boxes]
        else:
            prompts = [Prompt(points, negatives, boxes[0] if boxes else None)]
        args = {"device": device, "dtype": precision.dtype, "batch": batch, "prompts": prompts}
        return Prompter(model, checkpoint, **args, **model_args(model_arg)), PromptedMasks(to)

    answer_files(open_tool, paths, to, overlays, as_json, "segmenting", kinds=("image",))


def _coordinates(text: str, count: int, option: str) -> tuple[Any, ...]:
    """ "120,80" -> (120.0, 80.0)."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != count:
        wanted = "x,y" if count == 2 else "x0,y0,x1,y1"
        raise InputError(f"{option} is {wanted} in pixels, as in {'120,80,300,240'[: 6 if count == 2 else None]}, "
                         f"not {text!r}")  # fmt: skip
    return numbers


def _side(sizes: dict[str, tuple[int, int] | None]) -> int | None:
    """The side of the cubes that volumes are read in."""
    if sizes["stride"] or (sizes["window"] and len(set(sizes["window"])) > 1):
        raise InputError("volumes are read in cubes that overlap by half: --window is one number, without --stride")
    return sizes["window"][0] if sizes["window"] else None


# -- what all of them do ----------------------------------------------------------------------------------------------


REASONS = 3
"""Files that are named where none can be read."""


def answer_files(
    open_tool: Callable[[], tuple["Tool", "Writer"]],
    paths: list[str],
    to: Path | None,
    overlays: bool,
    as_json: bool,
    doing: str,
    drawings: str = "overlays",
    kinds: tuple[str, ...] = ("image", "video"),
    partners: str | None = None,
) -> None:
    """Applies a tool to the files that `paths` mean, and ends the command: with status 1 if any has no answer.

    `partners` are files that are read together with them (`linescan.media.find.pair`).

    Drawings, if any are wanted, go into the folder `drawings` of `to`.
    """
    from linescan.media.find import find, pair
    from linescan.tasks.tool import run

    listed = sys.stdin.read() if "-" in paths else ""

    def sources(kinds):
        found = _some(find(paths, kinds, exclude=[to] if to else [], stdin=io.StringIO(listed)))
        if partners is not None:
            found = _some(pair(found, _some(find([partners], kinds, exclude=[to] if to else []))))
        return found

    sources(kinds)  # or a model would be opened in vain
    if to:
        expect_folder(to)
    tool, writer = open_tool()
    found = sources(tool.kinds if partners is None else kinds)
    tool.expect([source.given for source in found if source.error is None])
    if to:
        to.mkdir(parents=True, exist_ok=True)
    failed = 0
    with progress_bar(doing, len(found)) as advance, _Report(as_json) as report:
        for outcome in run(tool, writer, found, to / drawings if to and overlays else None, advance):
            failed += outcome.error is not None
            report.add(outcome)
    if to or failed:
        say(f"{len(found) - failed} of {len(found)} done" + (f", in {to}" if to else ""))
    raise typer.Exit(1 if failed else 0)


def _some(found: list["Source"]) -> list["Source"]:
    """Sources. Raises InputError: none of them can be used."""
    if all(source.error for source in found):
        reasons = list(dict.fromkeys(str(source.error) for source in found))
        more = len(reasons) - REASONS
        raise InputError("; ".join(reasons[:REASONS]) + (f"; and {more} more" if more > 0 else ""))
    return found


class _Report:
    """Prints outcomes one by one: as lines, or as the members of a JSON array that is complete however the run ends."""

    def __init__(self, as_json: bool):
        self.as_json, self.first = as_json, True

    def __enter__(self) -> "_Report":
        return self

    def add(self, outcome: "Outcome") -> None:
        if outcome.error:
            say(("skipped", "yellow"), f" {outcome.error}")
        if self.as_json:
            print("[" if self.first else ",", json.dumps(outcome.as_dict(), indent=2), sep="\n", end="", flush=True)
            self.first = False
        elif not outcome.error:
            show((str(outcome.source.path), "bold"), f": {outcome.said}")

    def __exit__(self, kind, error, trace) -> None:
        if self.as_json and not (kind and issubclass(kind, OSError)):
            print("[]" if self.first else "\n]")
